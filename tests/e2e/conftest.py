"""What several files of these tests begin with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_relocation import Sites
from tests.vaults import VARIABLE


@pytest.fixture(scope="module", autouse=True)
def vault_as_users_have_it() -> Iterator[None]:
    """Encrypt vaults, as `vault init` does by itself, unless the whole run has another kind."""
    with pytest.MonkeyPatch.context() as patch:
        if VARIABLE not in os.environ:
            patch.setenv(VARIABLE, "encrypted")
        yield


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Sites]:
    """Give two sites; the disk is at home, and replicated."""
    two = Sites(tmp_path)
    with two.home, two.away:
        two.begin()
        yield two
