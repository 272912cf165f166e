"""What a check found, and what a repair made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from vdiskfs.errors import RefusedError, VdiskfsError


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


@dataclass(frozen=True, slots=True)
class Healed:
    """One object that is whole again, or in part: ``problem`` is what was wrong with it.

    ``pages_here`` came from this host (its image), ``pages_vault`` from other objects;
    ``in_part``: some of it is still damaged.
    """

    problem: Problem
    parts: int
    pages_here: int
    pages_vault: int
    in_part: bool = False


@dataclass(frozen=True, slots=True)
class Left:
    """What is still damaged, and why."""

    problem: Problem
    why: str


@dataclass(slots=True)
class RepairReport:
    """What was healed (with ``dry_run``: would be), and what is left."""

    dry_run: bool = False
    disks: int = 0
    points: int = 0
    read_bytes: int = 0
    healed: list[Healed] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    refused: bool = False
    """The vault lets something not be replaced."""

    @property
    def ok(self) -> bool:
        """Return whether nothing is damaged any more."""
        return not self.left


def note_stopped(report: RepairReport, name: str, where: str, error: VdiskfsError) -> None:
    """Note that an error ended the repair of a disk, before it was known what is damaged.

    Raises:
        VdiskfsError: that one, where the report would say nothing else.
    """
    if not (report.disks or report.healed or report.left):
        raise error
    report.left.append(Left(Problem(where, "could not be checked", name), error.message))
    report.refused |= isinstance(error, RefusedError)


def problem_document(problem: Problem) -> dict[str, object]:
    """Return a damaged object as ``--json`` prints it."""
    return {
        "object": problem.object,
        "message": problem.message,
        "disk": problem.disk,
        "points": [
            {"generation": generation, "epochs": sorted(epochs)}
            for generation, epochs in sorted(problem.points.items())
        ],
    }


def repair_document(report: RepairReport) -> dict[str, object]:
    """Return what a repair did as ``--json`` prints it."""
    return {
        "ok": report.ok,
        "dry_run": report.dry_run,
        "refused": report.refused,
        "disks": report.disks,
        "points": report.points,
        "read_bytes": report.read_bytes,
        "healed": [
            {
                **problem_document(one.problem), "parts": one.parts, "in_part": one.in_part,
                "pages_here": one.pages_here, "pages_vault": one.pages_vault,
            }
            for one in report.healed
        ],
        "left": [{**problem_document(one.problem), "why": one.why} for one in report.left],
    }  # fmt: skip
