"""After a loss of power at any moment of a run nothing that was flushed or shipped is missing."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from tests.e2e.replays import replay_round

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.slow]


@pytest.mark.timeout(300)
def test_a_disk_recovers_from_any_moment_of_a_run(tell: Callable[[str], None]) -> None:
    """Some moments of one run; all of them: ``python -m tests.e2e.replays --states 0``."""
    counts = replay_round(1, 24)
    tell(f"seed 1: {counts}")
    assert counts["states"] == 24
    assert counts["left"] > 0
    assert counts["vault_changes"] > 0
    assert counts["points"] > 24


@pytest.mark.timeout(300)
def test_a_disk_that_loses_what_was_flushed_is_found() -> None:
    """Of the harness: the file system is damaged, or what was flushed is not there."""
    logging.disable(logging.CRITICAL)  # of what is lost anything may be said
    try:
        with pytest.raises(AssertionError):
            replay_round(1, 24, lies=True)
    finally:
        logging.disable(logging.NOTSET)
