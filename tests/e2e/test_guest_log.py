"""Points under a guest are prefixes of what the guest did to its disk, flushes included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.guest import Disk, Guest
from tests.e2e.guest_log import guest_log_round, syncs
from tests.e2e.mounted import MountedSite
from tests.e2e.oracle import Oracle
from tests.oracle import writelog
from tests.oracle.prefix import PrefixOracle
from tests.oracle.stamper import check, command, events, program, read_log

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.guest, pytest.mark.slow]
MIB = 1 << 20


@pytest.mark.timeout(400)
def test_points_are_prefixes_of_the_log_of_a_guest_s_file_system(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """With every flushed write and every file that the guest was told to be durable."""
    seed = 1
    tell(f"./run soak --scenario guest-log --seed {seed}: {guest_log_round(tmp_path, seed)}")


@pytest.mark.timeout(200)
def test_each_flush_of_a_guest_is_one_flush_of_the_core(tmp_path: Path) -> None:
    """The guest's ledger, QEMU's log and the core count the same; both oracles agree on points."""
    log, trace, ledger = (tmp_path / name for name in ("write.log", "trace", "ledger"))
    log.touch()
    options = ["-D", str(trace), "-msg", "timestamp=on"]
    for event in writelog.TRACE:
        options += ["-trace", f"enable={event}"]
    # One writer: what another one writes during a flush QEMU flushes once more.
    words = command(
        "/dev/vda", "-", disk=5, size=4 * MIB, writers=1, operations=400, flush_percent=25
    )
    with MountedSite(tmp_path, options="epoch_interval_s = 0.1\n") as site:
        site.add_image("web01", 4 * MIB)
        site.init().mount()
        site.wait_shipped("web01")
        before = syncs(site)
        with Guest(
            [Disk(site.image("web01"), write_log=log)], " ".join(words), tmp_path,
            options=options, programs=[program()],
        ) as guest:  # fmt: skip
            ledger.write_text(guest.wait_exit())
        site.wait_shipped("web01")
        entries = writelog.read_entries(log)
        flushes = sum(bool(e.flags & writelog.FLUSH) for e in entries)
        told = sum(letter == "F" for letter, _ in events(ledger.read_text()))
        assert told > 50
        # When the machine is turned off there may be one more.
        assert told <= flushes <= told + 1
        assert syncs(site) - before == flushes
        history = read_log(ledger, disk=5, size=4 * MIB)
        by_stamps = Oracle(history)
        by_log = PrefixOracle(writelog.timed(entries, writelog.read_trace(trace)), bytes(4 * MIB))
        images = site.point_images("web01")
        assert len(images) > 3
        for image in images:
            by_stamps.check(image)
            by_log.check(image)
            assert check(image, ledger, disk=5).is_cut
        print(f"{len(images)} points, {len(entries)} entries, {told} flushes")
