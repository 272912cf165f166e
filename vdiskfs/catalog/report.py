"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Problem:
    """One damaged or missing object, and the points it hurts (epochs by generation)."""

    object: str
    message: str
    disk: str
    points: dict[int, list[int]] = field(default_factory=dict)

    def hurts(self, generation: int, epoch: int) -> None:
        """Note that a point cannot be read whole."""
        self.points.setdefault(generation, []).append(epoch)


@dataclass(slots=True)
class CheckReport:
    """What was looked at, and what is wrong."""

    disks: int = 0
    points: int = 0
    deltas: int = 0
    joined: int = 0
    segments: int = 0
    read_bytes: int = 0
    unused_segments: int = 0
    unused_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Return whether nothing is damaged."""
        return not self.problems

    @property
    def hurt(self) -> list[tuple[str, int, int]]:
        """Return the points that cannot be read whole: disk, generation, epoch."""
        found = {
            (problem.disk, generation, epoch)
            for problem in self.problems
            for generation, epochs in problem.points.items()
            for epoch in epochs
        }
        return sorted(found)
