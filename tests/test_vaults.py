"""Tests are made with plain and with encrypted vaults: nothing of a test decides that by accident."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.catalog.harness import bench, content_at
from tests.vaults import BOTH, VARIABLE, newcomer

TOP = Path(__file__).parents[1]
ALIKE = ("catalog", "replicate", "point", "homeward", "hydration", "tools", "watch")
BY_HAND = re.compile(r"\bVault\([^)]*\bvault_id\b")
"""A vault without the key of the one whose id it takes."""


def test_no_test_opens_a_vault_without_its_key() -> None:
    files = [path for name in ALIKE for path in (TOP / "tests" / name).rglob("*.py")]
    assert len(files) > 50
    found = [str(path) for path in files if BY_HAND.search(path.read_text(encoding="utf-8"))]
    assert found == [], "newcomer() of tests/vaults.py keeps the key"
    assert BY_HAND.search('Vault(self.store, self.vault.vault_id, "")')


@BOTH
async def test_a_newcomer_reads_what_another_wrote(each_vault: str) -> None:
    async with bench() as test:
        await test.churn(2)
        fresh = newcomer(test.vault)
        assert (fresh.key is None) == (each_vault == "plain")
        log = fresh.log(await fresh.disk(test.record.id))
        assert await content_at(log, 2) == test.model.states[2]
        stored = b"".join(data for data, _, _ in test.store.objects.values())
        assert (b"web01.img" in stored) == (each_vault == "plain")


@pytest.mark.parametrize("kind", ["plain", "encrypted"])
def test_what_needs_a_plain_vault_is_left_out_by_name(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider",
         "tests/point/test_damage.py", "-k", "means_nothing"],
        cwd=TOP, env={**os.environ, VARIABLE: kind, "PYTEST_ADDOPTS": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    collected, _, left = done.stdout.partition("1 tests of plain vaults alone")
    name = "test_a_bit_of_a_frame_that_means_nothing_is_checked_too"
    assert (name in collected, name in left) == (kind == "plain", kind == "encrypted"), done.stdout
