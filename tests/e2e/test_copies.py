"""Writable copies of points: a machine on one sees a disk like any other."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.asking import ask
from tests.e2e.fsx import Fsx
from tests.e2e.gauges import assert_same, processor_s, write_at
from tests.e2e.loopdev import attached, check_fs, file_system, mounted, run_tool
from tests.e2e.mounted import CommandError, MountedSite

pytestmark = [pytest.mark.e2e, pytest.mark.root]

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
PAGE = 4096
TURNS = 40
RARE = "epoch_interval_s = 3600\nheartbeat_s = 3600\n"
FAST = "epoch_interval_s = 0.2\nheartbeat_s = 1\n"


def failover_of(site: MountedSite, *arguments: str) -> Path:
    """Make a test failover of web01; return its image."""
    document = site.json("failover", "test", "web01", *arguments)
    [row] = document["disks"]
    return Path(row["path"])


def failovers(site: MountedSite) -> list[str]:
    """Return the names of the failovers, as the directory shows them."""
    return sorted(path.name for path in (site.mountpoint / "failovers").iterdir())


def prepared(site: MountedSite, size: int = 8 * MIB) -> Path:
    """Mount a disk of random bytes that is in the vault; return what it holds."""
    content = random.Random(1).randbytes(size)
    site.add_image("web01", size, content)
    site.init().mount().wait_shipped("web01")
    base = site.root / "base"
    base.write_bytes(content)
    return base


def test_a_copy_is_the_point_and_what_is_written_to_it_stays_there(tmp_path: Path) -> None:
    with MountedSite(tmp_path, options=FAST) as site:
        base = prepared(site)
        copy = failover_of(site, "--name", "t1")
        assert copy == site.mountpoint / "failovers/t1/web01.img"
        assert copy.stat().st_size == base.stat().st_size
        row = site.json("failover", "show", "t1")["disks"][0]
        assert row["present_bytes"] == 0, "nothing is fetched before it is asked for"
        # Whole pages, parts of pages, over the end of pages, of pages that are not here.
        model = bytearray(base.read_bytes())
        rng = random.Random(2)
        with copy.open("r+b", buffering=0) as file:
            for length in [PAGE, 100, 5000, 70_000, 1, PAGE * 3 + 1] * 4:
                offset = rng.randrange(len(model) - length)
                data = rng.randbytes(length)
                assert os.pwrite(file.fileno(), data, offset) == length
                model[offset : offset + length] = data
                around = max(0, offset - 3000)
                wanted = bytes(model[around : around + length + 6000])
                assert os.pread(file.fileno(), len(wanted), around) == wanted
            assert site.json("failover", "show", "t1")["disks"][0]["present_bytes"] < len(model)
            os.fsync(file.fileno())
        assert copy.read_bytes() == model
        # The live disk, its points and another copy know nothing of it; replication goes on.
        write_at(site.image("web01"), 0, b"live")
        site.wait_shipped("web01")
        assert site.image("web01").read_bytes()[4:] == base.read_bytes()[4:]
        [first, *_] = site.point_images("web01")
        assert_same(first, base)
        other = failover_of(site, "--point", "latest")
        assert other.read_bytes() == b"live" + base.read_bytes()[4:]
        assert failovers(site) == ["t1", other.parent.name]
        # Over a restart in order, too.
        site.umount()
        site.mount()
        assert copy.read_bytes() == model
        site.json("failover", "cleanup", "t1", "--notes", "fine")
        assert failovers(site) == [other.parent.name]
        assert other.exists()
        site.json("failover", "cleanup", other.parent.name)
        assert not other.parent.exists(), "gone at once, whatever the kernel remembers"
        assert not list((site.state / "failovers").iterdir())


@pytest.mark.slow
def test_kills_of_the_daemon_cost_a_program_on_a_copy_nothing(tmp_path: Path) -> None:
    with MountedSite(tmp_path, options=FAST) as site:
        base = prepared(site, 2 * MIB)
        copies = [failover_of(site) for _ in range(2)]
        fsx = [
            Fsx(copy, tmp_path / f"model{number}", seed=number, base=base)
            for number, copy in enumerate(copies)
        ]
        with fsx[0], fsx[1]:
            for _ in range(3):
                time.sleep(1)
                site.kill_daemon()
            assert all(one.is_running() for one in fsx), [one.message for one in fsx]
        for one, copy in zip(fsx, copies, strict=True):
            assert one.status == 0, one.message
            assert one.operations > 20
            assert_same(copy, one.model)
        assert_same(site.image("web01"), base)


def test_what_was_synced_survives_the_hosts_death(tmp_path: Path) -> None:
    with MountedSite(tmp_path, options=FAST) as site:
        base = prepared(site)
        copy = failover_of(site)
        name = copy.parent.name
        model = bytearray(base.read_bytes())
        rng = random.Random(3)
        with copy.open("r+b", buffering=0) as file:
            for _ in range(50):
                offset, data = (
                    rng.randrange(len(model) - 9000),
                    rng.randbytes(rng.choice([1, 9000])),
                )
                os.pwrite(file.fileno(), data, offset)
                model[offset : offset + len(data)] = data
            os.ftruncate(file.fileno(), 6 * MIB + 100)
            os.ftruncate(file.fileno(), 8 * MIB)
            model[6 * MIB + 100 :] = bytes(2 * MIB - 100)
            os.fsync(file.fileno())
            # Not synced: may be there or not, page by page.
            os.pwrite(file.fileno(), b"x" * PAGE, MIB)
        site.kill_for_good()
        run_tool(["umount", "-l", site.mountpoint])
        # Another boot: what says which pages are present is not believed any more.
        for boot in (site.state / "failovers").glob("*/*/boot"):
            boot.write_text("another")
        (site.state / "running").write_text("another")
        site.mount()
        held = bytearray((site.mountpoint / "failovers" / name / "web01.img").read_bytes())
        assert held[MIB : MIB + PAGE] in (b"x" * PAGE, model[MIB : MIB + PAGE])
        held[MIB : MIB + PAGE] = model[MIB : MIB + PAGE]
        assert held == model


def test_a_vault_that_goes_away_is_waited_for_and_never_an_error(tmp_path: Path) -> None:
    vault, aside = tmp_path / "vault", tmp_path / "aside"
    with MountedSite(tmp_path, options=FAST) as site, ThreadPoolExecutor() as threads:
        base = prepared(site)
        copy = failover_of(site)
        model = bytearray(base.read_bytes())
        with copy.open("r+b", buffering=0) as file:
            fd = file.fileno()
            assert os.pread(fd, PAGE, 0) == model[:PAGE]
            vault.rename(aside)
            # What is here works on, and so do writes of whole pages.
            assert os.pread(fd, PAGE, 0) == model[:PAGE]
            os.pwrite(fd, b"a" * PAGE, 4 * MIB)
            assert os.pread(fd, PAGE, 4 * MIB) == b"a" * PAGE
            os.fsync(fd)
            before = site.pid
            os.kill(before, signal.SIGKILL)
            site.wait_successor(before, set())  # disks wait for the vault
            assert os.pread(fd, PAGE, 4 * MIB) == b"a" * PAGE
            read = threads.submit(os.pread, fd, PAGE, 6 * MIB)
            part = threads.submit(os.pwrite, fd, b"part", 7 * MIB + 10)
            time.sleep(3)
            assert not read.done()
            assert not part.done()
            os.pwrite(fd, b"b" * PAGE, 5 * MIB)
            aside.rename(vault)
            assert read.result(60) == model[6 * MIB : 6 * MIB + PAGE]
            assert part.result(60) == 4
        model[4 * MIB : 4 * MIB + PAGE] = b"a" * PAGE
        model[5 * MIB : 5 * MIB + PAGE] = b"b" * PAGE
        model[7 * MIB + 10 : 7 * MIB + 14] = b"part"
        assert copy.read_bytes() == model
        site.wait("the disk is back", lambda: len(site.json("status")["disks"]) == 1)
        site.wait_shipped("web01")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_file_system_on_a_copy_replays_its_log_and_is_written_to(
    kind: str, tmp_path: Path
) -> None:
    with MountedSite(tmp_path, options=FAST) as site:
        site.add_image("web01", 320 * MIB)
        site.init().mount()
        with file_system(kind, site.image("web01"), tmp_path / "live") as root:
            for number in range(50):
                (root / f"file{number}").write_bytes(random.Random(number).randbytes(20_000))
            os.sync()
            copy = failover_now(site)
            (root / "later").write_text("later")
            options = ["nouuid"] if kind == "xfs" else []
            with (
                attached(copy) as device,
                mounted(device, tmp_path / "copy", kind=kind, options=options) as other,
            ):
                assert not (other / "later").exists()
                for number in range(50):
                    wanted = random.Random(number).randbytes(20_000)
                    assert (other / f"file{number}").read_bytes() == wanted
                for number in range(0, 50, 2):
                    (other / f"file{number}").unlink()
                (other / "mine").write_bytes(bytes(range(256)) * 4096)
            check_fs(kind, copy)
        site.json("failover", "cleanup", copy.parent.name)


def failover_now(site: MountedSite) -> Path:
    """Make a test failover of a point of now."""
    site.json("point", "create", "web01", "--wait")
    return failover_of(site)


def test_a_copy_in_use_is_not_cleaned_up_and_wrong_words_are_refused(tmp_path: Path) -> None:
    with MountedSite(tmp_path, options=FAST) as site:
        prepared(site)
        where = ("-m", str(site.mountpoint))
        copy = failover_of(site, "--name", "t1")
        site.run(*where, "failover", "test", "web01", "--name", "t1", code=4)
        site.run(*where, "failover", "test", "web01", "--name", "../t2", code=2)
        site.run(*where, "failover", "test", "absent", code=3)
        site.run(*where, "failover", "test", "web01", "--point", "#999", code=3)
        site.run(*where, "failover", "cleanup", "absent", code=3)
        with pytest.raises(CommandError, match="in use: .*web01.img"), copy.open("rb"):
            site.run(*where, "failover", "cleanup", "t1")
        for _ in range(2):
            assert site.json("failover", "test", "web01", "--name", "t2", "--dry-run")["dry_run"]
            assert site.json("failover", "cleanup", "t1", "--dry-run")["dry_run"]
            assert failovers(site) == ["t1"]
        # Its directory is what the administrator asks for, whatever a file operation says.
        with pytest.raises(OSError, match="Read-only"):
            copy.unlink()
        with pytest.raises(OSError, match="Read-only"):
            (site.mountpoint / "failovers/mine").mkdir()
        copy.chmod(0o640)
        assert copy.stat().st_mode & 0o777 == 0o640
        site.run(*where, "failover", "cleanup", "t1")
        assert failovers(site) == []
        assert not list((site.state / "failovers").iterdir())


def said(site: MountedSite, *words: str) -> str:
    """Give a command in this process: a process for each would be most of what a test does."""
    result = ask(["-m", str(site.mountpoint), *words], site.environ)
    assert result.returncode == 0, result
    return result.stdout


@pytest.mark.slow
def test_the_time_to_the_first_byte_does_not_grow_with_the_disk(tmp_path: Path) -> None:
    """Objects read and processor time of a test failover: the same data, 1 GiB to 4 TiB."""
    sizes = {"a": GIB, "b": 16 * GIB, "c": 256 * GIB, "d": 4 * TIB}
    with MountedSite(tmp_path, options=RARE) as site:
        for disk, size in sizes.items():
            path = site.add_image(disk, size)
            with path.open("r+b") as file:
                for number in range(64):
                    file.seek(number * (size // 64) // PAGE * PAGE)
                    file.write(random.Random(number).randbytes(64 << 10))
        site.init().mount()
        for disk in sizes:
            site.wait_shipped(disk)
        requests: dict[str, int] = {}
        spent: dict[str, list[float]] = {"a": [], "d": []}
        for turn in range(TURNS):
            for disk in sizes if turn == 0 else spent:
                before = site.json("status")["vault_requests"] if turn == 0 else 0
                began_s = processor_s(site.pid)
                words = ("--name", f"{disk}{turn}", "--vm", "none")
                document = json.loads(said(site, "--json", "failover", "test", disk, *words))
                with Path(document["disks"][0]["path"]).open("rb") as file:
                    assert file.read(PAGE) == random.Random(0).randbytes(64 << 10)[:PAGE]
                if turn == 0:
                    requests[disk] = site.json("status")["vault_requests"] - before
                else:
                    spent[disk].append(processor_s(site.pid) - began_s)
                said(site, "failover", "cleanup", f"{disk}{turn}")
        medians = {disk: statistics.median(times) for disk, times in spent.items()}
        print(json.dumps({"requests": requests, "processor_s": medians}))
        assert max(requests.values()) <= 1.2 * min(requests.values())
        # At another site, which knows nothing yet of any of them.
        cold = {}
        for disk in sizes:
            with MountedSite(tmp_path, vault=site.vault, name=f"to-{disk}", options=RARE) as other:
                other.mount(recovery=True)
                before = other.json("status")["vault_requests"]
                document = other.json("failover", "test", disk, "--vm", "none")
                with Path(document["disks"][0]["path"]).open("rb") as file:
                    assert file.read(PAGE) == random.Random(0).randbytes(64 << 10)[:PAGE]
                cold[disk] = other.json("status")["vault_requests"] - before
        print(f"requests at a site that knows nothing: {cold}")
        assert max(cold.values()) <= 1.2 * min(cold.values())
        assert max(medians.values()) <= 1.2 * min(medians.values()) + 0.0005, medians
