"""Ends of every kind, and the next mount: nothing is missed, nothing is sent twice."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.gauges import (
    added,
    assert_same,
    data_objects,
    overwrite_pages,
    total,
    write_at,
)
from tests.e2e.mounted import MountedSite
from tests.e2e.workload import Mix, Workload

pytestmark = [pytest.mark.e2e, pytest.mark.root]

MIB = 1 << 20
SIZE = 32 * MIB
FAST = "epoch_interval_s = 0.1\nheartbeat_s = 1\n"
PAGE = 4096
# Of one delta beyond its data: head, index, footer.
OVERHEAD = 64 << 10


def began(root: Path, size: int = SIZE) -> MountedSite:
    """Return a site with one disk of random bytes; not mounted yet."""
    site = MountedSite(root, options=FAST)
    site.add_image("web01", size, os.urandom(size))
    return site.init()


def end_daemon(site: MountedSite) -> None:
    """Kill daemon and keeper, and clear the dead mount away as an administrator does."""
    site.kill_for_good()
    site.run("umount", site.mountpoint)
    site.pid = 0


def as_after_a_power_cut(site: MountedSite) -> None:
    """Leave the notes that a host leaves which died with its daemon running."""
    (site.state / "clean").unlink(missing_ok=True)
    for note in [site.state / "running", *(site.state / "disks").glob("*/boot")]:
        note.write_text("00000000-0000-4000-8000-000000000000\n")


def wait_latest(site: MountedSite, after: int) -> None:
    """Wait for a point newer than an epoch, and until everything is shipped."""
    site.wait("a new point", lambda: site.disk("web01")["epoch"] > after)
    site.wait_shipped("web01")


def assert_latest_is_live(site: MountedSite) -> None:
    assert_same(site.point("web01"), site.image("web01"))


def epochs(site: MountedSite) -> list[int]:
    return [point["epoch"] for point in site.points("web01")]


def test_after_an_orderly_end_nothing_is_sent_again_and_the_points_go_on(tmp_path: Path) -> None:
    with began(tmp_path) as site:
        vault = tmp_path / "vault"
        site.mount().wait_shipped("web01")
        overwrite_pages(site.image("web01"), 20, seed=1)
        wait_latest(site, 1)
        disk, points = site.disk("web01"), site.points("web01")
        site.umount("--drain")
        before = data_objects(vault)
        site.mount().wait_shipped("web01")
        again = site.disk("web01")
        for key in ("id", "name", "generation", "epoch", "size"):
            assert again[key] == disk[key]
        assert site.points("web01") == points
        assert_latest_is_live(site)
        assert data_objects(vault) == before
        overwrite_pages(site.image("web01"), 20, seed=2)
        wait_latest(site, disk["epoch"])
        assert_latest_is_live(site)
        assert total(added(before, data_objects(vault))) <= 20 * PAGE + OVERHEAD
        assert {point["generation"] for point in site.points("web01")} == {1}


@pytest.mark.usefixtures("each_vault")
@pytest.mark.parametrize("seed", [1, 2])
def test_a_daemon_killed_under_load_misses_nothing_and_reuses_no_epoch(
    tmp_path: Path, seed: int
) -> None:
    with began(tmp_path, 8 * MIB) as site:
        site.mount().wait_shipped("web01")
        used = 0
        mix = Mix(max_size=12 * MIB, min_size=2 * MIB, truncate=0.01, extend=0.03, zero=0.08)
        for turn in range(2):
            load = Workload(
                site.image("web01"), seed=10 * seed + turn, writers=4, mix=mix, tolerant=True
            )
            with load:
                load.wait_operations(300)
                used = max(used, site.json("disk", "show", "web01")["captured_epoch"])
                load.wait_operations(600)
                site.kill_for_good()
            assert load.errors  # the writers saw it
            site.run("umount", site.mountpoint)
            site.pid = 0
            on_disk = (site.source / "web01.img").read_bytes()
            site.mount()
            wait_latest(site, used)
            assert site.image("web01").read_bytes() == on_disk
            assert_latest_is_live(site)
        found = epochs(site)
        assert found == sorted(set(found))
        assert {point["generation"] for point in site.points("web01")} == {1}
        site.run("vault", "check", "--read-data", "--vault", site.vault)


def test_what_changed_behind_the_mount_is_found_and_only_that_is_sent(tmp_path: Path) -> None:
    with began(tmp_path) as site:
        vault = tmp_path / "vault"
        site.mount().wait_shipped("web01")
        last = site.disk("web01")["epoch"]
        site.umount()
        before = data_objects(vault)
        image = site.source / "web01.img"
        overwrite_pages(image, 40, seed=3)
        write_at(image, 3 * MIB + 17, b"short")
        write_at(image, 8 * MIB, bytes(MIB))
        os.truncate(image, SIZE + MIB + 5)
        expected = image.read_bytes()
        site.mount()
        wait_latest(site, last)
        assert site.point("web01").read_bytes() == expected
        assert_latest_is_live(site)
        assert total(added(before, data_objects(vault))) <= 41 * PAGE + OVERHEAD
        assert "was changed behind the mount" in (site.state / "daemon.log").read_text()


def fill(image: Path, size: int) -> None:
    """Fill an image: a small one with bytes that do not compress, a large one with ones that do."""
    with image.open("wb") as file:
        for _ in range(size // MIB):
            pages = (os.urandom(64) + bytes(PAGE - 64) for _ in range(MIB // PAGE))
            file.write(os.urandom(MIB) if size <= 1024 * MIB else b"".join(pages))


def test_a_first_replication_killed_again_and_again_goes_on(
    tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """Written to all the while; VDISKFS_TEST_FIRST is its MiB and kills, such as 5120,10."""
    mib, kills = map(int, os.environ.get("VDISKFS_TEST_FIRST", "300,4").split(","))
    size, patience_s = mib * MIB, 60 + mib / 2
    with MountedSite(tmp_path, options=FAST) as site:
        fill(site.add_image("web01", size), size)
        site.init()

        def in_pass(pattern: str) -> bool:
            return any((site.state / "disks").glob(f"*/pass/{pattern}")) or compared() == size

        def compared() -> int:
            row = site.disk("web01")
            # A machine that is faster than we look has shipped it all.
            done = size if row["state"] == "Protected" else 0
            return int(row["progress"]["done_bytes"]) if row["progress"] else done

        moments: list[Callable[[], bool]] = [
            lambda: True,
            lambda: in_pass("*"),
            lambda: in_pass("*.part"),
            *[lambda: compared() >= size // kills] * (kills - 3),  # of what was left
        ]
        stored = [0]
        for number, moment in enumerate(moments):
            site.mount()
            write_at(site.image("web01"), number * size // kills, os.urandom(PAGE + 512))
            site.wait(f"moment {number}", moment, patience_s)
            write_at(site.image("web01"), size - (number + 1) * MIB + 512, os.urandom(PAGE))
            done = compared()
            end_daemon(site)
            stored.append(total(data_objects(tmp_path / "vault")))
            tell(f"killed at {done // MIB} of {mib} MiB: {stored[-1] // MIB} MiB stored")
        assert stored == sorted(stored)
        site.mount()
        site.wait("it is protected", lambda: compared() == size, patience_s)
        site.wait_shipped("web01")
        assert_latest_is_live(site)
        site.run("vault", "check", "--vault", site.vault)


def test_a_spool_left_behind_is_shipped_after_the_next_mount(tmp_path: Path) -> None:
    with began(tmp_path) as site:
        vault, away = tmp_path / "vault", tmp_path / "away"
        site.mount().wait_shipped("web01")
        last = site.disk("web01")["epoch"]
        vault.rename(away)
        overwrite_pages(site.image("web01"), 50, seed=4)
        site.wait("the spool holds it", lambda: site.disk("web01")["spooled_bytes"] > 50 * PAGE)
        overwrite_pages(site.image("web01"), 50, seed=5)
        row = site.disk("web01")
        assert row["health"] != "Normal"
        assert row["last_error"]
        assert row["epoch"] == last
        site.umount()
        expected = (site.source / "web01.img").read_bytes()
        assert not vault.exists()
        away.rename(vault)
        before = data_objects(vault)
        site.mount()
        wait_latest(site, last)
        assert site.point("web01").read_bytes() == expected
        assert total(added(before, data_objects(vault))) <= 100 * PAGE + 4 * OVERHEAD


def test_after_a_power_cut_without_its_log_all_is_compared_and_only_differences_are_sent(
    tmp_path: Path,
) -> None:
    with began(tmp_path) as site:
        vault = tmp_path / "vault"
        site.mount().wait_shipped("web01")
        last = site.disk("web01")["epoch"]
        end_daemon(site)
        before = data_objects(vault)
        overwrite_pages(site.source / "web01.img", 30, seed=6)
        as_after_a_power_cut(site)
        (log,) = (site.state / "disks").glob("*/track/intent")
        write_at(log, 0, b"damaged")
        site.mount()
        wait_latest(site, last)
        assert "the intent log is void or damaged" in (site.state / "daemon.log").read_text()
        assert_latest_is_live(site)
        assert total(added(before, data_objects(vault))) <= 30 * PAGE + OVERHEAD
        assert site.disk("web01")["generation"] == 1


def test_after_a_power_cut_that_lost_nothing_nothing_is_sent(tmp_path: Path) -> None:
    with began(tmp_path) as site:
        vault = tmp_path / "vault"
        site.mount().wait_shipped("web01")
        last = site.disk("web01")["epoch"]
        end_daemon(site)
        before = data_objects(vault)
        as_after_a_power_cut(site)
        site.mount().wait_shipped("web01")
        assert data_objects(vault) == before
        assert site.disk("web01")["state"] == "Protected"
        write_at(site.image("web01"), 5 * PAGE, b"z" * PAGE)
        wait_latest(site, last)
        assert_latest_is_live(site)


def test_an_older_state_directory_never_continues_the_line(tmp_path: Path) -> None:
    with began(tmp_path) as site:
        older = tmp_path / "older"
        site.mount().wait_shipped("web01")
        site.umount()
        shutil.copytree(site.state, older, ignore=shutil.ignore_patterns("*.sock"))
        site.mount()
        contents = {}
        for seed in range(3):
            last = site.disk("web01")["epoch"]
            overwrite_pages(site.image("web01"), 30, seed)
            wait_latest(site, last)
            contents[site.disk("web01")["epoch"]] = site.image("web01").read_bytes()
        last = site.disk("web01")["epoch"]
        site.umount("--drain")
        shutil.rmtree(site.state)
        older.rename(site.state)
        site.mount()
        site.wait("a new generation", lambda: site.disk("web01")["generation"] == 2)
        overwrite_pages(site.image("web01"), 30, seed=9)
        wait_latest(site, last)
        assert_latest_is_live(site)
        points = {point["epoch"]: point for point in site.points("web01")}
        assert min(e for e, point in points.items() if point["generation"] == 2) > last
        for epoch, content in contents.items():
            copy = tmp_path / f"{epoch}.img"
            site.run("-m", site.mountpoint, "point", "restore", f"web01@{epoch}", copy)
            assert copy.read_bytes() == content
        site.run("vault", "check", "--read-data", "--vault", site.vault)
