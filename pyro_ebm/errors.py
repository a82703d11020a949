"""Errors and warnings that users may want to catch."""

from __future__ import annotations


class MissingNormalizerError(RuntimeError):
    """A parameter would be inferred through a missing, constant, free or stale log Z.

    A ``RuntimeError`` and not a ``ValueError``: Pyro rewraps the latter while tracing and its type
    would be lost.
    """


class MissingNormalizerWarning(UserWarning):
    """The same finding under ``pyro.settings.set(ebm_missing_normalizer="warn")``."""


class NonFiniteEnergyError(RuntimeError):
    """An energy or a surrogate returned NaN or an infinity where a finite number is needed."""


class DivergedTrainingError(RuntimeError):
    """Data and contrast are further apart in energy than training can make good again."""


class ConditionalEnergyError(ValueError):
    """One log Z would stand for all rows of an energy that depends on more of a row than ``x``."""


class EnergyShapeError(RuntimeError):
    """An energy returned a tensor whose shape is not one value per event."""


class UnregisteredParameterError(RuntimeError):
    """An energy's parameters receive gradients but no optimizer will ever move them."""


class ApproximateSampleWarning(UserWarning):
    """Draws come from a short chain, visibly not converged or costlier than it need be."""


class ImproperEnergyWarning(UserWarning):
    """Draws of an energy run away: the density is probably not integrable."""


class SurrogateWarning(UserWarning):
    """A learning objective runs, but with settings or noise that bend or waste what it learns."""
