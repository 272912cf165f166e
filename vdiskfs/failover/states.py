"""The states of a failover, in one table; DESIGN section 8 names all, these are reached today."""

from __future__ import annotations

from enum import StrEnum

from vdiskfs.errors import StateError


class Kind(StrEnum):
    """Why there is a failover."""

    TEST = "test"


class State(StrEnum):
    """Where a failover stands."""

    TEST_FAILOVER = "TestFailover"
    REMOVING = "Removing"


class Step(StrEnum):
    """What is asked for."""

    CLEANUP = "cleanup"


TABLE: dict[tuple[State, Step], State] = {
    (State.TEST_FAILOVER, Step.CLEANUP): State.REMOVING,
    # A clean-up that was cut short goes on.
    (State.REMOVING, Step.CLEANUP): State.REMOVING,
}
"""What each step makes of each state. What is not here is refused."""


def after(name: str, state: State, step: Step) -> State:
    """Return the state that the step leads to.

    Raises:
        StateError: the failover ``name`` cannot take the step now.
    """
    found = TABLE.get((state, step))
    if found is None:
        raise StateError(
            f"failover {name}: {step} is not possible in state {state}",
            hint=f"vdiskfs failover show {name}",
        )
    return found
