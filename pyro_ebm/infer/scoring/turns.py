"""Two players that take turns: so many steps of the one, so many of the other, and again.

The first is the energy; the second is the law that it is compared with, a generator or a flow.
"""

from __future__ import annotations

from typing import Protocol


class Plays(Protocol):
    """What is asked of an objective here."""

    has_second_player: bool


def schedule(value: tuple[int, int] | None, objective: Plays) -> tuple[int, int] | None:
    """Returns a valid schedule of two players.

    Raises:
        ValueError: If it is not two non-negative integers with a positive sum, or there is no
            second player.
    """
    if value is None:
        return None
    if not objective.has_second_player:
        raise ValueError(
            f"{type(objective).__name__} has no second player, so it takes no schedule"
        )
    if len(value) != 2 or min(value) < 0 or sum(value) == 0:
        raise ValueError(
            f"schedule must be (energy steps, generator steps), two counts, got {value!r}"
        )
    return (int(value[0]), int(value[1]))


def is_second(schedule: tuple[int, int], step: int) -> bool:
    """Whether a step, counted from zero, is the second player's."""
    first, second = schedule
    return step % (first + second) >= first
