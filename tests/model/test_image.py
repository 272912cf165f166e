"""An image under changes, seals, crashes and reads is the bytes that were written to it."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.model.image import ImageModel

SEED = int(os.environ.get("VDISKFS_MODEL_SEED", "20261121"))
EXAMPLES = int(os.environ.get("VDISKFS_MODEL_EXAMPLES", "40"))
STEPS = int(os.environ.get("VDISKFS_MODEL_STEPS", "25"))
SHRINK = os.environ.get("VDISKFS_MODEL_SHRINK", "1") == "1"


def run_model(number: int, *, examples: int = EXAMPLES, steps: int = STEPS) -> int:
    """Run the model from a seed, and return how many steps were taken; a soak calls this.

    Raises:
        AssertionError: the shortest series of steps that breaks a promise is printed.
    """
    before = ImageModel.steps
    chosen = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, database=None,
        report_multiple_bugs=False, phases=[Phase.generate, Phase.shrink][: 1 + SHRINK],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(seed(number)(ImageModel), settings=chosen)
    return ImageModel.steps - before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_image_is_the_bytes_written_to_it_whatever_happens_between(
    tell: Callable[[str], None], expect_log: Callable[[str], None]
) -> None:
    expect_log("was changed behind the mount")
    steps = run_model(SEED)
    tell(
        f"image model: {EXAMPLES} series, {steps} steps, "
        f"VDISKFS_MODEL_SEED={SEED} VDISKFS_MODEL_EXAMPLES={EXAMPLES}"
    )
