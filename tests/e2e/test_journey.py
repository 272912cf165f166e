"""A shop with a database is tested elsewhere, goes away, and comes home: no sale is lost.

The guest: Debian's kernel, busybox and Debian's sqlite3 in an initramfs, an ext4 on the disk,
one durable transaction every few hundred milliseconds (tests/e2e/shop.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.journey import there_and_back
from tests.e2e.outliving import outlive
from tests.e2e.shop import Shop

pytestmark = [
    pytest.mark.e2e, pytest.mark.root, pytest.mark.guest, pytest.mark.slow,
    pytest.mark.timeout(600),
]  # fmt: skip
CUT_S = 4.0


def test_a_shop_is_tested_moved_and_brought_home_and_no_sale_is_lost(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """At each stage its database is sound, and has exactly the rows that are promised."""
    tell(f"down, in seconds, mostly of an emulated boot: {there_and_back(tmp_path, Shop())}")


def test_a_shop_outlives_its_home_and_a_vault_that_is_cut_off(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """It has exactly the rows of the point that was chosen; what home had beyond is a branch."""
    down = outlive(tmp_path, Shop(), CUT_S)
    tell(f"down, in seconds, with a cut of {CUT_S} s and more in mid-boot: {down}")
