"""What a check of a model's normalizers found, site by site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pyro_ebm.poutine.gradient_check import GradientCheck


@dataclass(frozen=True)
class SiteCheck:
    """What is known of one EBM site or energy factor.

    Attributes:
        kind: ``"EBM site"`` or ``"energy_factor"``.
        log_normalizer: How log Z was given, in words.
        latents: The latent sites that its energy or base depends on.
        uncovered: Those among them that log Z does not account for.
        parameters: Trained parameters that log Z does not account for.
        gradients: Comparisons of the slope of log Z with draws.
        notes: Anything else worth knowing.
        problem: What :func:`check_model` reports, or ``None``.
    """

    kind: str
    log_normalizer: str
    latents: tuple[str, ...] = ()
    uncovered: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    gradients: tuple[GradientCheck, ...] = ()
    notes: tuple[str, ...] = ()
    problem: str | None = None

    def lines(self, name: str) -> Iterator[str]:
        """Yields the lines of a report on this site."""
        verdict = "ok" if self.problem is None else "PROBLEM"
        yield f"{self.kind} {name!r}: {verdict}, log Z {self.log_normalizer}"
        if self.latents:
            yield f"    depends on latent {listed(self.latents)}"
        if self.parameters:
            yield f"    trained without log Z (needs an objective): {', '.join(self.parameters)}"
        yield from (f"    {check}" for check in self.gradients)
        yield from (f"    note: {note}" for note in self.notes)
        if self.problem is not None:
            yield f"    {self.problem}"


@dataclass(frozen=True)
class ModelCheck:
    """What :func:`check_model` found, by site; ``str()`` of it is a report to read."""

    sites: Mapping[str, SiteCheck] = field(default_factory=dict)

    @property
    def is_sound(self) -> bool:
        """Whether no site has a problem."""
        return all(site.problem is None for site in self.sites.values())

    def __str__(self) -> str:
        if not self.sites:
            return "no EnergyDistribution site and no energy_factor"
        return "\n".join(line for name, site in self.sites.items() for line in site.lines(name))


def listed(names: Sequence[str]) -> str:
    """Returns names in quotes, separated by commas."""
    return ", ".join(map(repr, names))
