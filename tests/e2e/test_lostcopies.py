"""Files of a failover, or its vault, that are gone: it is still listed, and there is a way out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.mounted import MountedSite
from tests.e2e.test_relocation import DISK, Sites

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.timeout(300)]


def lose(away: MountedSite, what: str) -> dict[str, Any]:
    """Remove a file of each failover while nothing is mounted; return the last failover."""
    away.umount()
    for path in away.state.glob(f"failovers/*/*/{what}"):
        path.unlink()
    away.mount(recovery=True)
    found: list[dict[str, Any]] = away.json("failover", "list")["failovers"]
    return found[-1]


def test_a_failover_without_its_copy_is_listed_told_and_rolled_back_or_begun_anew(
    sites: Sites,
) -> None:
    home, away = sites.home, sites.away
    test = away.json("failover", "test", DISK)["name"]
    name = sites.start("--unplanned")["name"]
    found = lose(away, "image")
    assert (found["name"], found["state"], found["disks"]) == (name, "FailedOver", [])
    assert "image" in found["damaged"]
    where = ("-m", away.mountpoint)
    assert "FailedOver (damaged)" in away.run(*where, "failover", "list").stdout
    told = {one["subject"] for one in away.json("event", "list")["events"]
            if one["code"] == "failover.damaged"}  # fmt: skip
    assert told == {test, name}
    for words in (("failover", "commit", name), ("reprotect", DISK)):
        result = away.run(*where, *words, code=6)
        assert "its copies cannot be opened" in result.stderr
        assert f"vdiskfs failover rollback {name}" in result.stderr
    away.json("failover", "cleanup", test)
    # What was written is lost with the file; the point is not.
    anew = away.json("failover", "change-point", name, "--point", "latest")
    assert (anew["state"], anew["damaged"]) == ("FailedOver", None)
    assert Path(anew["disks"][0]["path"]).read_bytes() == home.image(DISK).read_bytes()
    assert lose(away, "presence/*")["damaged"]
    away.json("failover", "rollback", name)
    assert away.json("failover", "list")["failovers"] == []
    home.wait("home is back", lambda: home.disk(DISK)["state"] == "Protected")


def test_a_rollback_without_its_vault_waits_and_gives_the_disk_back_when_that_is_there(
    sites: Sites,
) -> None:
    """Its file system is not mounted: the folder is empty, which says nothing of the disk."""
    home, away = sites.home, sites.away
    vault = home.state.parent.parent / "vault"
    name = sites.start("--unplanned", "--rollback-after", "2")["name"]
    vault.rename(vault.with_name("kept"))
    vault.mkdir()
    try:

        def stands() -> bool:
            [found] = away.json("failover", "list")["failovers"]
            return found["state"] == "RollingBack" and bool(found["job"]["error"])

        away.wait("it stands still", stands)
        where = ("-m", away.mountpoint)
        result = away.run(*where, "failover", "rollback", name, code=5)
        assert "the vault is not there" in result.stderr
    finally:
        assert [path.name for path in vault.iterdir()] in ([], [".vdiskfs"])  # nothing but a lock
        shutil.rmtree(vault)
        vault.with_name("kept").rename(vault)
    away.wait("it is rolled back", lambda: away.json("failover", "list")["failovers"] == [])
    home.wait("home is back", lambda: home.disk(DISK)["state"] == "Protected")
