"""One disk, two sites: one owns it, a takeover is asked for, what the loser wrote is kept."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.azurite import AzureVault
from tests.e2e.gauges import overwrite_pages
from tests.e2e.mounted import PROGRAM, MountedSite
from tests.e2e.test_restart import as_after_a_power_cut
from tests.vaults import is_encrypted

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.timeout(300)]

MIB = 1 << 20
SIZE = 16 * MIB
FAST = "epoch_interval_s = 0.1\nheartbeat_s = 1\n"
RARE = "epoch_interval_s = 0.1\nheartbeat_s = 600\n"


class Sites:
    """Two sites on one vault; the second has a copy of the first one's image."""

    def __init__(self, root: Path, vault: str, environ: Mapping[str, str]) -> None:
        # Its heartbeat is too rare to tell it of a takeover: it learns of it when it ships.
        self.a = MountedSite(root, vault=vault, name="site-a", environ=environ, options=RARE)
        self.b = MountedSite(root, vault=vault, name="site-b", environ=environ, options=FAST)

    def begin(self) -> None:
        """Mount the first, and give the second a copy of its image."""
        self.a.add_image("web01", SIZE, os.urandom(SIZE))
        self.a.init().mount().wait_shipped("web01")
        shutil.copy(self.a.source / "web01.img", self.b.source / "web01.img")


@pytest.fixture(params=["folder", pytest.param("azure", marks=pytest.mark.azurite)])
def sites(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sites]:
    vault, environ = f"file://{tmp_path}/vault", {}
    if request.param == "azure":
        azure: AzureVault = request.getfixturevalue("azure_vault")
        vault, environ = azure.url, azure.environ
    two = Sites(tmp_path, vault, environ)
    with two.a, two.b:
        yield two


def mounting(site: MountedSite, *extra: str) -> subprocess.CompletedProcess[str]:
    """Try to mount; return what the command said."""
    return subprocess.run(
        [PROGRAM, "mount", site.source, site.mountpoint, "--vault", site.vault,
         "--site", site.name, "--state", site.state, "--config", site.config, *extra],
        capture_output=True, text=True, env=site.environ, check=False, timeout=120,
    )  # fmt: skip


def refused(site: MountedSite, *extra: str) -> str:
    """Mount, be refused with exit 4 and one line, and return it."""
    result = mounting(site, *extra)
    if result.returncode == 0:
        site.pid = int(site.json("status")["pid"])  # so that it is ended
    assert result.returncode == 4, result
    assert not result.stdout
    lines = result.stderr.strip().split("\n")
    assert len(lines) == 1, lines
    return lines[0]


def branches(site: MountedSite) -> list[dict[str, Any]]:
    result = site.run("--json", "disk", "branches", "web01", "--vault", site.vault)
    return list(json.loads(result.stdout)["branches"])


def refuses_writes(image: Path) -> bool:
    try:
        with image.open("r+b"):
            return False
    except OSError as error:
        return error.errno == errno.EROFS


def test_a_second_site_is_refused_and_told_who_owns_the_disk_since_when(sites: Sites) -> None:
    sites.begin()
    before = sites.a.disk("web01")
    line = refused(sites.b)
    record = json.loads(
        sites.a.run("--json", "disk", "list", "--vault", sites.a.vault).stdout
    )["disks"][0]  # fmt: skip
    assert "web01" in line
    assert "site-a owns it since 20" in line
    assert "last sign of life 20" in line
    assert "--force" in line
    assert not sites.b.mountpoint.is_mount()
    assert record["site"] == "site-a"
    # Nothing was changed for the owner, and there is no second disk.
    overwrite_pages(sites.a.image("web01"), 10, seed=1)
    sites.a.wait_shipped("web01")
    after = sites.a.disk("web01")
    assert (after["generation"], after["state"]) == (before["generation"], "Protected")
    assert len(sites.a.json("disk", "list")["disks"]) == 1


def test_a_takeover_ends_the_generation_and_the_loser_keeps_a_branch(sites: Sites) -> None:
    sites.begin()
    a, b = sites.a, sites.b
    fork = a.disk("web01")["epoch"]
    with a.image("web01").open("r+b", buffering=0) as guest:
        b.mount("--force")
        b.wait("the second generation", lambda: b.disk("web01")["generation"] == 2)
        b.wait_shipped("web01")
        expected = b.image("web01").read_bytes()
        # The first writes on as long as it does not know; then its image takes no more.
        written = 0
        with pytest.raises(OSError, match="Read-only"):
            for page in range(1 << 20):
                os.pwrite(guest.fileno(), b"A" * 4096, page % 512 * 4096)
                written = page + 1
        assert written > 0
    a.wait("displaced", lambda: a.disk("web01")["state"] == "Displaced")
    row = a.disk("web01")
    assert row["health"] == "Critical"
    assert "displaced by site site-b since 20" in row["last_error"]
    a.wait("shipped", lambda: a.disk("web01")["dirty_bytes"] == 0
           and a.disk("web01")["spooled_bytes"] == 0)  # fmt: skip
    left = (a.source / "web01.img").read_bytes()
    # The branch holds, byte for byte, what the loser had in the end; the main line what b has.
    (branch,) = branches(a)
    assert branch["site"] == "site-a"
    assert branch["parent"]["generation"] == 1
    assert branch["parent"]["epoch"] >= fork
    assert branch["points"] >= 1
    name = f"web01@{branch['name']}"
    for site in (a, b):
        seen = site.mountpoint / "recovery-points" / name / "latest" / "web01.img"
        site.wait("the branch is seen", seen.exists)
        assert seen.read_bytes() == left
        assert site.point("web01").read_bytes() == expected
        assert (site.mountpoint / "recovery-points" / "web01" / "latest").exists()
    copy = a.root / "restored.img"
    a.run("point", "restore", f"{name}@latest", copy, "--vault", a.vault)
    assert copy.read_bytes() == left
    shown = a.json("point", "show", f"{name}@latest")
    assert shown["generation"] == branch["generation"]
    overwrite_pages(b.image("web01"), 10, seed=2)
    b.wait_shipped("web01")
    a.run("vault", "check", "--read-data", "--vault", a.vault)
    # Of the loser the daemon alone may die: what has the image open sees no other bytes.
    with a.image("web01").open("rb", buffering=0) as guest:
        a.kill_daemon()
        assert guest.read(4096) == left[:4096]
        assert a.disk("web01")["state"] == "Displaced"
    a.wait("no write is taken", lambda: refuses_writes(a.image("web01")))
    # After an end in order it does not come back by itself, and not without a word.
    a.umount()
    assert "site-b owns it" in refused(a)
    assert len(branches(a)) == 1


STEPS = ("owner.noted", "takeover.fenced", "takeover.generation", "owner.kept")


def test_a_takeover_killed_at_each_step_goes_on_with_the_same_command(tmp_path: Path) -> None:
    vault = f"file://{tmp_path}/vault"
    with (
        MountedSite(tmp_path, vault=vault, name="site-a", options=FAST) as a,
        MountedSite(tmp_path, vault=vault, name="site-b", options=FAST) as b,
    ):
        a.add_image("web01", SIZE, os.urandom(SIZE))
        a.init().mount().wait_shipped("web01")
        a.umount("--drain")
        shutil.copy(a.source / "web01.img", b.source / "web01.img")
        for step in STEPS:
            passed = tmp_path / f"{step}.log"
            b.environ |= {"VDISKFS_CRASH": f"{step}:1", "VDISKFS_CRASH_LOG": str(passed)}
            result = mounting(b, "--force")
            assert result.returncode not in (0, 4), result
            assert step in passed.read_text().split()
            if f" {b.mountpoint} " in Path("/proc/self/mounts").read_text():
                b.run("umount", b.mountpoint)
        for name in ("VDISKFS_CRASH", "VDISKFS_CRASH_LOG"):
            del b.environ[name]
        b.mount("--force")
        b.wait_shipped("web01")
        assert b.disk("web01")["generation"] == 2
        assert b.point("web01").read_bytes() == b.image("web01").read_bytes()
        assert "site-b owns it" in refused(a)
        b.run("vault", "check", "--read-data", "--vault", b.vault)


def test_a_displaced_disk_may_go_on_into_its_branch(tmp_path: Path) -> None:
    vault = f"file://{tmp_path}/vault"
    keep = FAST + 'when_displaced = "keep"\n'
    with (
        MountedSite(tmp_path, vault=vault, name="site-a", options=keep) as a,
        MountedSite(tmp_path, vault=vault, name="site-b", options=FAST) as b,
    ):
        a.add_image("web01", SIZE, os.urandom(SIZE))
        a.init().mount().wait_shipped("web01")
        shutil.copy(a.source / "web01.img", b.source / "web01.img")
        b.mount("--force")
        a.wait("displaced", lambda: a.disk("web01")["state"] == "Displaced")
        epoch = a.disk("web01")["epoch"]
        overwrite_pages(a.image("web01"), 20, seed=3)
        a.wait("a point in the branch", lambda: a.disk("web01")["epoch"] > epoch)
        a.wait("shipped", lambda: a.disk("web01")["dirty_bytes"] == 0)
        # Only the daemon dies: programs may be there still, so the disk comes back as it was.
        a.kill_daemon()
        assert a.disk("web01")["state"] == "Displaced"
        epoch = a.disk("web01")["epoch"]
        overwrite_pages(a.image("web01"), 20, seed=4)
        a.wait("a point in the branch", lambda: a.disk("web01")["epoch"] > epoch)
        a.wait("shipped", lambda: a.disk("web01")["dirty_bytes"] == 0
               and a.disk("web01")["spooled_bytes"] == 0)  # fmt: skip
        (branch,) = branches(a)
        seen = a.point(f"web01@{branch['name']}").with_name("web01.img")
        assert seen.read_bytes() == a.image("web01").read_bytes()
        a.umount("--drain")
        # Asked for, it takes the disk back, in the third generation of the main line.
        b.umount()
        a.mount("--force")
        a.wait_shipped("web01")
        assert a.disk("web01")["state"] == "Protected"
        assert a.point("web01").read_bytes() == a.image("web01").read_bytes()
        assert len(branches(a)) == 1
        a.run("vault", "check", "--read-data", "--vault", a.vault)


def test_a_copied_state_directory_is_refused_while_its_original_runs(tmp_path: Path) -> None:
    with (
        MountedSite(tmp_path, name="site-a", options=FAST) as a,
        MountedSite(tmp_path, name="clone", options=FAST) as clone,
    ):
        a.add_image("web01", SIZE, os.urandom(SIZE))
        a.init().mount().wait_shipped("web01")
        # As a cloned host: image and state are there, their inodes are others.
        shutil.copy(a.source / "web01.img", clone.source / "web01.img")
        shutil.copytree(a.state, clone.state, ignore=shutil.ignore_patterns("*.sock", "cache"))
        _adopt_image(clone)
        clone.name = a.name  # a host name that is the same on both
        line = refused(clone)
        assert "site-a uses a copy of this state directory since 20" in line
        overwrite_pages(a.image("web01"), 10, seed=1)
        a.wait_shipped("web01")
        assert a.disk("web01")["state"] == "Protected"
        assert a.disk("web01")["generation"] == 1


def _adopt_image(site: MountedSite) -> None:
    """Write the inode of the copied image into the copied record: a block-level clone has it."""
    from dataclasses import replace

    from vdiskfs import native
    from vdiskfs.state import DiskRecord, read_record, write_record

    (path,) = site.state.glob("disks/*/record.json")
    with (site.source / "web01.img").open("rb") as file:
        identity = native.file_identity(file.fileno())
    record = replace(
        DiskRecord.from_body(read_record(path), where=str(path)),
        device=identity.device, inode=identity.inode, birth_ns=identity.birth_ns,
    )  # fmt: skip
    write_record(path, record.to_body())


def test_a_site_comes_back_after_every_end_without_a_word(tmp_path: Path) -> None:
    with MountedSite(tmp_path, name="site-a", options=FAST) as a:
        a.add_image("web01", SIZE, os.urandom(SIZE))
        a.init().mount().wait_shipped("web01")
        ends: list[Callable[[MountedSite], None]]
        ends = [_end_both, MountedSite.umount, _end_both, _power_cut, _power_cut]
        for number, end in enumerate(ends):
            epoch = a.disk("web01")["epoch"]
            overwrite_pages(a.image("web01"), 10, seed=number)
            a.wait("a point", lambda: a.disk("web01")["epoch"] > epoch)
            end(a)
            a.mount().wait_shipped("web01")
            assert a.disk("web01")["state"] == "Protected"
            assert a.disk("web01")["generation"] == 1
            assert a.point("web01").read_bytes() == a.image("web01").read_bytes()
        assert branches(a) == []


def _end_both(site: MountedSite) -> None:
    """Kill keeper and daemon, and clear the dead mount away."""
    site.kill_for_good()
    site.run("umount", site.mountpoint)
    site.pid = 0


def _power_cut(site: MountedSite) -> None:
    _end_both(site)
    as_after_a_power_cut(site)


def test_a_vault_that_was_rolled_back_is_refused_until_that_is_accepted(tmp_path: Path) -> None:
    with MountedSite(tmp_path, name="site-a", options=FAST) as a:
        a.add_image("web01", SIZE, os.urandom(SIZE))
        a.init().mount().wait_shipped("web01")
        a.umount("--drain")
        older = tmp_path / "older"
        shutil.copytree(tmp_path / "vault", older)
        a.mount()
        epoch = a.disk("web01")["epoch"]
        overwrite_pages(a.image("web01"), 10, seed=1)
        a.wait("a point", lambda: a.disk("web01")["epoch"] > epoch)
        a.wait_shipped("web01")
        last = a.disk("web01")["epoch"]
        a.umount("--drain")
        shutil.rmtree(tmp_path / "vault")
        older.rename(tmp_path / "vault")
        line = refused(a)
        lacks = "has gone back" if is_encrypted() else f"lacks epoch {last} of generation 1"
        assert lacks in line
        assert "--accept-rollback" in line
        a.mount("--accept-rollback")
        a.wait_shipped("web01")
        a.wait("a point", lambda: a.disk("web01")["epoch"] > last)
        assert a.disk("web01")["generation"] == 2
        assert a.point("web01").read_bytes() == a.image("web01").read_bytes()
        a.run("vault", "check", "--read-data", "--vault", a.vault)


def test_another_vault_of_the_same_name_is_refused_until_that_is_accepted(tmp_path: Path) -> None:
    with MountedSite(tmp_path, name="site-a", options=FAST) as a:
        a.add_image("web01", SIZE, os.urandom(SIZE))
        a.init().mount().wait_shipped("web01")
        a.umount("--drain")
        shutil.rmtree(tmp_path / "vault")
        a.init()
        assert "not the vault that disk web01 is kept in" in refused(a)
        a.mount("--accept-rollback")
        a.wait_shipped("web01")
        assert a.point("web01").read_bytes() == a.image("web01").read_bytes()
        assert list(a.state.glob("disks.*/*/record.json"))
