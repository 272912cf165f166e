"""A shop with a database is tested elsewhere, goes away, and comes home: no sale is lost.

The guest: Debian's kernel, busybox and Debian's sqlite3 in an initramfs, an ext4 on the disk,
one durable transaction every few hundred milliseconds (tests/e2e/shop.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.journey import DISK, Journey
from tests.e2e.outliving import outlive

pytestmark = [
    pytest.mark.e2e, pytest.mark.root, pytest.mark.guest, pytest.mark.slow,
    pytest.mark.timeout(600),
]  # fmt: skip
CUT_S = 4.0


def test_a_shop_is_tested_moved_and_brought_home_and_no_sale_is_lost(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """At each stage its database is sound, and has exactly the rows that are promised."""
    with Journey(tmp_path).begun() as journey:
        away, own = journey.away, journey.own
        point = journey.point(journey.home, own.console)
        journey.sell(own.console)
        journey.check_test(*point)
        # The test was nobody's business: the shop at home goes on.
        journey.sell(own.console)
        document = away.json("failover", "start", DISK)
        assert (document["kind"], document["state"]) == ("planned", "FailedOver")
        own.wait_ended()
        stopped = f"{DISK} handover {journey.home.image(DISK)}"
        assert journey.stop_log.read_text().split("\n")[0] == stopped
        console = journey.arrived("planned failover", own.console, document)
        journey.reprotect(document["name"], console)
        back = journey.come_home(console)
        away.json("failover", "cleanup", document["name"])
        journey.close(back)
        tell(f"down, in seconds, of which a boot under emulation is most: {journey.downtimes}")


def test_a_shop_outlives_its_home_and_a_vault_that_is_cut_off(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """It has exactly the rows of the point that was chosen; what home had beyond is a branch."""
    tell(f"down, in seconds, with a cut of {CUT_S} s in mid-boot: {outlive(tmp_path, CUT_S)}")
