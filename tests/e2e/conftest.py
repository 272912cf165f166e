"""What several files of these tests begin with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_relocation import Sites


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Sites]:
    """Give two sites; the disk is at home, and replicated."""
    two = Sites(tmp_path)
    with two.home, two.away:
        two.begin()
        yield two
