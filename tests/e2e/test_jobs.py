"""The jobs of a real mount: protection enabled, finalized, resynchronized; over a kill, too."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.mounted import CommandError, MountedSite
from tests.vaults import VARIABLE

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.timeout(120)]

MIB = 1 << 20
FAST = "epoch_interval_s = 0.1\nheartbeat_s = 1\n"
TRY_IT = "vdiskfs failover test web01"


def jobs(site: MountedSite, kind: str) -> list[dict[str, Any]]:
    return [one for one in site.json("job", "list")["jobs"] if one["kind"] == kind]


def events(site: MountedSite, code: str) -> list[dict[str, Any]]:
    return [one for one in site.json("event", "list")["events"] if one["code"] == code]


def test_the_first_replication_ends_with_what_a_failover_needs(tmp_path: Path) -> None:
    with MountedSite(tmp_path, options=FAST) as site:
        site.add_image("web01", 2 * MIB, os.urandom(MIB))
        site.init().mount().wait_shipped("web01")
        [enabled] = jobs(site, "enable-protection")
        assert (enabled["state"], enabled["disk"]) == ("done", "web01")
        assert enabled["steps"] == ["enrolled", "replicated", "stored"]
        [final] = jobs(site, "finalize")
        assert (final["state"], final["steps"]) == ("done", ["machine", "read-back"])
        assert "all 1.0 MiB of data read back" in final["outcome"]
        assert TRY_IT in final["outcome"]
        site.wait("the event", lambda: bool(events(site, "disk.finalized")))
        assert events(site, "disk.finalized")[0]["todo"] == TRY_IT
        # That is no proof of all of the point: what was proven is not claimed.
        assert {one["proof"] for one in site.points("web01")} == {"stored"}
        assert list((tmp_path / "vault").glob("disks/*/proofs/*.json"))
        # What is over stays over, and is there after a kill.
        site.run("-m", site.mountpoint, "disk", "resync", "web01", "--now")
        site.wait("it is compared", lambda: bool(jobs(site, "resynchronize")))
        again = jobs(site, "resynchronize")[-1]["id"]
        site.run("-m", site.mountpoint, "job", "wait", again)
        assert "compared" in site.json("job", "show", again)["outcome"]
        before = site.json("job", "list")["jobs"]
        site.kill_daemon()
        site.wait_shipped("web01")
        assert site.json("job", "list")["jobs"] == before
        # What the vault has lost meanwhile is found, had it not been finalized before.
        site.umount()
        [disk] = (site.state / "disks").iterdir()
        (disk / "unfinished").touch()
        files = [one for one in (tmp_path / "vault").rglob("*") if one.is_file()]
        [large] = [one for one in files if one.stat().st_size > MIB // 2]
        with large.open("r+b") as file:
            file.seek(MIB // 4)
            file.write(b"rotten")
        site.mount()
        site.wait("it is found", lambda: bool(events(site, "finalize.failed")))
        final = jobs(site, "finalize")[-1]
        assert (final["state"], final["exit_code"]) == ("failed", 6)
        assert "cannot be read back" in final["error"]
        assert "vdiskfs disk resync web01 --now" in final["hint"]
        assert site.points("web01")[-1]["proof"] == "hashed-failed"
        site.run("-m", site.mountpoint, "job", "cancel", final["id"])
        site.wait("it is let be", lambda: site.disk("web01")["health"] == "Normal")
        assert jobs(site, "finalize")[-1]["state"] == "cancelled"


def test_a_file_that_is_used_elsewhere_is_a_job_that_failed(tmp_path: Path) -> None:
    with MountedSite(tmp_path, options=FAST) as site:
        site.add_image("web01", MIB, os.urandom(MIB))
        used = site.source / "used.bin"
        used.write_bytes(b"x" * 8192)
        site.init().mount()
        assert [one["file"] for one in site.json("disk", "list")["disks"]] == ["web01.img"]
        with used.open("r+b") as file:
            # The byte by which QEMU says that it writes.
            lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 101, 1, 0)
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
            with pytest.raises(CommandError, match="QEMU uses the file"):
                site.run("-m", site.mountpoint, "disk", "protect", "used.bin")
        [failed] = [one for one in jobs(site, "enable-protection") if one["disk"] == "used.bin"]
        assert (failed["disk"], failed["state"], failed["steps"]) == ("used.bin", "failed", [])
        assert "QEMU uses the file" in failed["error"]
        assert failed["ended"] is not None
        with pytest.raises(CommandError, match="exit 4"):
            site.run("-m", site.mountpoint, "job", "wait", failed["id"])
        # It is tried again by the user, and is another job then.
        site.run("-m", site.mountpoint, "disk", "protect", "used.bin")
        site.wait_shipped("used")
        assert [one["disk"] for one in jobs(site, "enable-protection")].count("used") == 1


def test_what_cannot_be_finalized_says_so_replicates_on_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "plain")  # the name of an object is made by hand
    with MountedSite(tmp_path, options=FAST + "[watch]\nhold_s = 0.1\n") as site:
        site.add_image("web01", MIB, os.urandom(MIB))
        site.init()
        wrong = tmp_path / "vault" / "machines" / "web01.json"
        wrong.parent.mkdir()
        wrong.write_text("{")
        site.mount()
        site.wait("it is told", lambda: bool(events(site, "finalize.failed")))
        [job] = jobs(site, "finalize")
        assert (job["state"], job["ended"], job["exit_code"]) == ("failed", None, 6)
        assert "vdiskfs machine set" in job["hint"]
        row = site.disk("web01")
        assert (row["state"], row["health"]) == ("Protected", "Warning")
        assert "vdiskfs disk retry web01" in row["last_error"]
        with pytest.raises(CommandError, match="exit 6"):
            site.run("-m", site.mountpoint, "job", "wait", job["id"])
        # It replicates all the same, and a successor goes on with the same job.
        with site.image("web01").open("r+b") as file:
            file.write(b"written meanwhile")
        site.wait_shipped("web01")
        site.kill_daemon()
        site.wait("it failed again", lambda: jobs(site, "finalize")[0]["state"] == "failed")
        wrong.unlink()
        site.run("-m", site.mountpoint, "disk", "retry", "web01")
        site.run("-m", site.mountpoint, "job", "wait", job["id"])
        assert [one["id"] for one in jobs(site, "finalize")] == [job["id"]]
        site.wait("it is well", lambda: site.disk("web01")["health"] == "Normal")
        site.wait("that is told", lambda: bool(events(site, "finalize.failed.over")))
