"""The states of a failover, in one table; DESIGN section 8."""

from __future__ import annotations

from enum import StrEnum

from vdiskfs.errors import StateError


class Kind(StrEnum):
    """Why there is a failover."""

    TEST = "test"
    PLANNED = "planned"
    UNPLANNED = "unplanned"
    FAILBACK = "failback"


class State(StrEnum):
    """Where a failover stands."""

    TEST_FAILOVER = "TestFailover"
    STARTING = "Starting"
    FAILED_OVER = "FailedOver"
    CHANGING_POINT = "ChangingPoint"
    ROLLING_BACK = "RollingBack"
    COMMITTED = "Committed"
    REPROTECTING = "Reprotecting"
    FAILBACK_READY = "FailbackReady"
    HANDED_OVER = "HandedOver"
    FAILING_BACK = "FailingBack"
    COMPLETING = "Completing"
    FAILBACK_UNCOMMITTED = "FailbackUncommitted"
    FAILED_BACK = "FailedBack"
    REMOVING = "Removing"


class Step(StrEnum):
    """What is asked for."""

    TEST = "test"
    START = "start"
    CHANGE_POINT = "change-point"
    COMMIT = "commit"
    ROLLBACK = "rollback"
    REPROTECT = "reprotect"
    HANDOVER = "handover"
    FAILBACK = "failback"
    COMPLETE = "complete"
    CLEANUP = "cleanup"


TABLE: dict[tuple[State, Step], State] = {
    (State.TEST_FAILOVER, Step.CLEANUP): State.REMOVING,
    # A step that was cut short goes on.
    (State.REMOVING, Step.CLEANUP): State.REMOVING,
    (State.STARTING, Step.START): State.STARTING,
    (State.CHANGING_POINT, Step.CHANGE_POINT): State.CHANGING_POINT,
    (State.ROLLING_BACK, Step.ROLLBACK): State.ROLLING_BACK,
    (State.REPROTECTING, Step.REPROTECT): State.REPROTECTING,
    # Until it is committed nothing is final.
    (State.STARTING, Step.ROLLBACK): State.ROLLING_BACK,
    (State.FAILED_OVER, Step.ROLLBACK): State.ROLLING_BACK,
    (State.CHANGING_POINT, Step.ROLLBACK): State.ROLLING_BACK,
    (State.FAILED_OVER, Step.CHANGE_POINT): State.CHANGING_POINT,
    (State.FAILED_OVER, Step.COMMIT): State.COMMITTED,
    (State.COMMITTED, Step.REPROTECT): State.REPROTECTING,
    # The disk goes home: asked for through the vault.
    (State.FAILBACK_READY, Step.HANDOVER): State.HANDED_OVER,
    (State.HANDED_OVER, Step.HANDOVER): State.HANDED_OVER,
    (State.HANDED_OVER, Step.CLEANUP): State.REMOVING,
    (State.FAILING_BACK, Step.FAILBACK): State.FAILING_BACK,
    (State.FAILING_BACK, Step.COMPLETE): State.COMPLETING,
    (State.COMPLETING, Step.COMPLETE): State.COMPLETING,
    # Called off, as long as no disk is home.
    (State.FAILING_BACK, Step.CLEANUP): State.REMOVING,
    (State.COMPLETING, Step.CLEANUP): State.REMOVING,
    (State.FAILBACK_UNCOMMITTED, Step.COMMIT): State.FAILED_BACK,
    (State.FAILED_BACK, Step.CLEANUP): State.REMOVING,
}
"""What each step makes of each state. What is not here is refused."""


def allowed(state: State) -> list[Step]:
    """Return the steps that a state allows a user."""
    return [step for step in Step if step is not Step.HANDOVER and (state, step) in TABLE]


def after(name: str, state: State, step: Step) -> State:
    """Return the state that the step leads to.

    Raises:
        StateError: the failover ``name`` cannot take the step now.
    """
    found = TABLE.get((state, step))
    if found is None:
        steps = ", ".join(allowed(state)) or "none"
        raise StateError(
            f"failover {name}: {step} is not possible in state {state}; possible: {steps}",
            hint=f"vdiskfs failover show {name}",
        )
    return found
