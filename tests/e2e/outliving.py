"""A shop whose home is lost, on a vault that is cut off: in mid-boot, and while it sells."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e.journey import DISK, Journey
from tests.e2e.shop import PIECES, UP, Console, Shop
from tests.e2e.stoppable import stoppable_folder

# Most of the ballast is still in the vault when the guest reads it.
SLOW = f"hydration_limit = {32 << 10}\n"


class Cuts:
    """Cuts the vault off for so many seconds at a time, while a failed-over machine runs."""

    def __init__(
        self, journey: Journey, signal_server: Callable[[int], None], seconds: float
    ) -> None:
        self._journey = journey
        self._signal = signal_server
        self._seconds = seconds

    def in_boot(self, document: dict[str, Any]) -> Console:
        """Cut while it boots; it waits for its disk, and comes up when the vault is back."""
        journey, console = self._journey, self._journey.console(document)
        before = journey.waits(document)
        self._signal(signal.SIGSTOP)
        try:
            journey.wait("it waits", console, lambda: journey.waits(document) > before)
            self._last()
            assert UP not in console.text
        finally:
            self._signal(signal.SIGCONT)
        journey.wait("it is up", console, lambda: UP in console.text)
        console.check_clean()
        return console

    def in_run(self, document: dict[str, Any], console: Console) -> None:
        """Cut while it sells and reads: what is here goes on, what is not waits, nothing fails."""
        journey = self._journey
        journey.wait("it reads", console, lambda: console.last("PIECE") >= 3)
        before = journey.waits(document)
        self._signal(signal.SIGSTOP)
        try:
            journey.wait("it waits", console, lambda: journey.waits(document) > before)
            read = console.last("PIECE")
            self._last()
            journey.sell(console)
            # What waits may be its kernel, which reads ahead.
            assert console.last("PIECE") <= read + 2 < PIECES
        finally:
            self._signal(signal.SIGCONT)
        journey.wait("all is read", console, lambda: "PIECES DONE" in console.text)
        console.check_clean()

    def while_replicated(self, console: Console) -> None:
        """Cut while what is sold is replicated from there: it sells on."""
        self._signal(signal.SIGSTOP)
        try:
            self._last()
            self._journey.sell(console)
        finally:
            self._signal(signal.SIGCONT)
        self._journey.check_point(self._journey.away, console)
        console.check_clean()

    def _last(self) -> None:
        """Let the cut last: it is what is tested, not waited for."""
        time.sleep(self._seconds)


def outlive(directory: Path, shop: Shop, cut_s: float) -> dict[str, float]:
    """Lose home, go on away from a chosen point through cuts of the vault, and come home.

    Args:
        directory: an empty one.
        shop: the guest.
        cut_s: seconds that each cut of the vault lasts beyond its first effect.

    Returns:
        Seconds from the last row to the next one, by what was done.

    Raises:
        AssertionError: rows or errors are not what is promised.
    """
    with (
        stoppable_folder(directory / "nas") as (folder, signal_server),
        Journey(
            directory, shop, vault=f"file://{folder}/vault", away_options=SLOW
        ).begun() as journey,
    ):
        home, away, own = journey.home, journey.away, journey.own
        cuts = Cuts(journey, signal_server, cut_s)
        chosen = journey.point(home, own.console)
        journey.sell(own.console)
        journey.point(home, own.console)
        journey.sell(own.console)
        rows = journey.read_point(away, *chosen)
        own.console.check_clean()
        journey.lose_home()
        start = ("failover", "start", DISK, "--unplanned", "--point", f"#{chosen[0]}")
        document = away.json(*start, "--no-wait")
        name = document["name"]
        away.wait("it boots", lambda: away.json("failover", "show", name)["state"] == "FailedOver")
        console = cuts.in_boot(document)
        assert console.found().all_up_to(rows) < own.console.last("ROW")
        cuts.in_run(document, console)
        journey.measure("unplanned failover", own.console, console)
        journey.reprotect(name, console)
        cuts.while_replicated(console)
        journey.mount_home()
        back = journey.come_home(console)
        # What home had sold after the point is not lost either.
        sold, tried = own.console.last("ROW"), own.console.last("BEGIN")
        assert any(sold <= found.rows <= tried for found in journey.branches())
        away.json("failover", "cleanup", name)
        journey.close(back)
        return journey.downtimes
