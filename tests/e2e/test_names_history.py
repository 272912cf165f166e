"""What becomes of a disk's history when its file is renamed, removed, replaced or resized.

The rule: a rename keeps the disk, what replaces its file is another one, and nothing that a
program does to files takes a recovery point away.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.mounted import MountedSite

pytestmark = [pytest.mark.e2e, pytest.mark.root]
LIBC = ctypes.CDLL(None, use_errno=True)
AT_FDCWD, RENAME_EXCHANGE = -100, 2
FAST = "epoch_interval_s = 0.1\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedSite]:
    """One mount without disks; each test makes its own, by writing files."""
    with MountedSite(tmp_path_factory.mktemp("names"), options=FAST) as mounted:
        yield mounted.init().mount()
        log = (mounted.state / "daemon.log").read_text()
        assert not [line for line in log.splitlines() if " ERROR " in line or " WARNING " in line]


def data(name: str, size: int = 150_000) -> bytes:
    """Return bytes that only this name has."""
    return random.Random(name).randbytes(size)


def file(site: MountedSite, name: str) -> Path:
    """A file of the mount."""
    return site.mountpoint / "disks" / name


def rows(site: MountedSite) -> dict[str, dict[str, Any]]:
    """Return the disks that are protected here, by name."""
    return {row["name"]: row for row in site.json("status")["disks"]}


def wait_disk(site: MountedSite, name: str) -> str:
    """Wait until the disk is protected and shipped; return its id."""
    site.wait(f"{name} is a disk", lambda: name in rows(site))
    site.wait_shipped(name)
    return str(rows(site)[name]["id"])


def wait_retired(site: MountedSite, name: str) -> None:
    """Wait until the disk is no longer protected and the vault's list says so."""

    def retired() -> bool:
        found = [row for row in site.json("disk", "list")["disks"] if row["name"] == name]
        return bool(found) and found[0].get("state") == "Retired" and not found[0]["here"]

    site.wait(f"{name} is retired", retired)


def images(site: MountedSite, disk: str) -> list[bytes]:
    """Return what each of a disk's points holds, oldest first, read through the directories."""
    top = site.mountpoint / "recovery-points" / disk
    site.wait(f"{disk} has a directory", top.is_dir)
    days = sorted(path for path in top.iterdir() if path.name[0].isdigit())
    points = [point for day in days for point in sorted(day.iterdir())]
    found = [[path for path in point.iterdir() if path.name != "point.json"] for point in points]
    assert all(len(names) == 1 for names in found)
    return [names[0].read_bytes() for names in found]


def restored(site: MountedSite, point: str, target: Path) -> bytes:
    """Return what restoring the point gives."""
    site.run("-m", site.mountpoint, "point", "restore", point, target)
    return target.read_bytes()


def exchange(one: Path, other: Path) -> None:
    """Let two files swap their names, in one step."""
    result = LIBC.renameat2(AT_FDCWD, bytes(one), AT_FDCWD, bytes(other), RENAME_EXCHANGE)
    assert result == 0, os.strerror(ctypes.get_errno())


def change(path: Path, content: bytes) -> None:
    """Overwrite a file's beginning in place."""
    with path.open("r+b") as live:
        live.write(content)


def test_an_image_copied_in_is_a_disk_at_its_last_close(site: MountedSite, tmp_path: Path) -> None:
    outside = tmp_path / "outside.img"
    outside.write_bytes(data("copied"))
    with file(site, "copied.img").open("wb") as first:
        shutil.copyfile(outside, file(site, "copied.img"))
        first.flush()
        assert "copied" not in rows(site)
    wait_disk(site, "copied")
    assert images(site, "copied")[-1] == data("copied")
    assert (site.source / "copied.img").read_bytes() == data("copied")


def test_a_file_written_under_another_name_is_a_disk_once_its_name_matches(
    site: MountedSite,
) -> None:
    file(site, "arriving.img.tmp").write_bytes(data("arriving"))
    file(site, "arriving.img.tmp").rename(file(site, "arriving.img"))
    wait_disk(site, "arriving")
    assert images(site, "arriving")[-1] == data("arriving")


def test_a_renamed_file_is_the_same_disk_and_its_points_go_on(site: MountedSite) -> None:
    (site.mountpoint / "disks" / "rack").mkdir()
    path = file(site, "rack/before.img")
    path.write_bytes(data("before"))
    disk_id = wait_disk(site, "before")
    path.rename(file(site, "rack/after.img"))
    file(site, "rack").rename(file(site, "shelf"))
    change(file(site, "shelf/after.img"), data("after"))
    assert wait_disk(site, "before") == disk_id
    assert "after" not in rows(site)
    assert site.json("disk", "show", "before")["file"] == "shelf/after.img"
    found = images(site, "before")
    assert found[0] == data("before")
    assert found[-1] == data("after")


def test_two_files_that_are_exchanged_stay_the_disks_they_are(site: MountedSite) -> None:
    ids = {}
    for name in ("left", "right"):
        file(site, f"{name}.img").write_bytes(data(name))
        ids[name] = wait_disk(site, name)
    exchange(file(site, "left.img"), file(site, "right.img"))
    change(file(site, "left.img"), data("newer")[:5000])
    assert {name: wait_disk(site, name) for name in ids} == ids
    assert images(site, "left")[-1] == data("left")
    assert images(site, "right")[-1][:5000] == data("newer")[:5000]


def test_a_removed_file_leaves_its_disk_retired_and_every_point_readable(
    site: MountedSite, tmp_path: Path
) -> None:
    """What was written just before the removal is in the last point; an open file works on."""
    path = file(site, "removed.img")
    path.write_bytes(data("first"))
    wait_disk(site, "removed")
    with path.open("r+b") as live:
        live.write(data("last words"))
        live.flush()
        path.unlink()
        wait_retired(site, "removed")
        live.write(b"nobody keeps this")
        live.flush()
        live.seek(0)
        assert live.read() == data("last words") + b"nobody keeps this"
    assert not path.exists()
    found = images(site, "removed")
    assert found[0] == data("first")
    assert found[-1] == data("last words")
    assert restored(site, "removed@latest", tmp_path / "back.img") == data("last words")
    count = len(site.points("removed"))
    assert count == len(found)


def test_a_file_removed_as_soon_as_it_was_made_leaves_no_disk_running(site: MountedSite) -> None:
    for number in range(3):
        path = file(site, f"fleeting{number}.img")
        path.write_bytes(data("fleeting"))
        path.unlink()
    file(site, "marker.img").write_bytes(data("marker"))  # is made after them: shows their end
    wait_disk(site, "marker")

    def settled() -> bool:
        return not [name for name in rows(site) if name.startswith("fleeting")]

    site.wait("no disk runs without a file", settled)


def test_a_file_renamed_as_soon_as_it_was_made_is_one_disk_of_its_present_name(
    site: MountedSite,
) -> None:
    file(site, "hasty.img").write_bytes(data("hasty"))
    file(site, "hasty.img").rename(file(site, "settled.img"))

    def names() -> set[str]:
        return set(rows(site)) & {"hasty", "settled"}

    site.wait("it is a disk", lambda: bool(names()))
    (name,) = names()
    wait_disk(site, name)
    assert len(names()) == 1
    assert images(site, name)[-1] == data("hasty")
    assert site.json("disk", "show", name)["file"] == "settled.img"
    latest = site.mountpoint / "recovery-points" / name / "latest"
    site.wait("points have its name", (latest / "settled.img").exists)


def test_a_file_that_replaces_another_is_a_new_disk_and_the_old_one_is_kept(
    site: MountedSite, tmp_path: Path
) -> None:
    path = file(site, "swap.img")
    path.write_bytes(data("old"))
    old_id = wait_disk(site, "swap")
    file(site, "swap.new").write_bytes(data("new"))
    file(site, "swap.new").rename(path)
    wait_retired(site, "swap")
    names = [name for name in rows(site) if name.startswith("swap")]
    assert len(names) == 1
    assert names[0] != "swap"
    assert wait_disk(site, names[0]) != old_id
    assert {images(site, "swap")[-1], images(site, names[0])[-1]} == {data("old"), data("new")}
    assert restored(site, "swap@latest", tmp_path / "old.img") == data("old")
    change(path, data("newer"))
    site.wait_shipped(names[0])
    assert images(site, names[0])[-1] == data("newer")


def test_a_disk_that_takes_another_one_s_name_stays_itself(site: MountedSite) -> None:
    for name in ("taker", "taken"):
        file(site, f"{name}.img").write_bytes(data(name))
    taker = wait_disk(site, "taker")
    wait_disk(site, "taken")
    file(site, "taker.img").rename(file(site, "taken.img"))
    wait_retired(site, "taken")
    change(file(site, "taken.img"), data("afterwards"))
    assert wait_disk(site, "taker") == taker
    assert images(site, "taken")[-1] == data("taken")
    assert images(site, "taker")[-1] == data("afterwards")


def test_each_point_has_the_size_that_the_image_had(site: MountedSite) -> None:
    path = file(site, "sized.img")
    path.write_bytes(data("sized"))
    wait_disk(site, "sized")
    states = [data("sized")]
    states.append(states[-1][:70_001])
    states.append(states[-1].ljust(200_000, b"\0"))
    for state in states[1:]:
        os.truncate(path, len(state))
        site.json("point", "create", "sized", "--wait")
    with path.open("r+b") as live:
        live.seek(300_000)
        live.write(b"beyond")
    site.json("point", "create", "sized", "--wait")
    states.append(states[-1].ljust(300_000, b"\0") + b"beyond")
    found = images(site, "sized")
    rest = iter(found)
    assert all(state in rest for state in states)  # in this order
    assert set(found) <= {b"", *states}
    assert [point["size"] for point in site.points("sized")] == [len(image) for image in found]
    assert path.read_bytes() == states[-1]


def test_other_files_pass_through_until_they_are_protected_by_name(site: MountedSite) -> None:
    path = file(site, "appliance.bin")
    path.write_bytes(data("appliance"))
    assert (site.source / "appliance.bin").read_bytes() == data("appliance")
    assert "appliance" not in rows(site)
    site.json("disk", "protect", "appliance.bin")
    wait_disk(site, "appliance")
    assert images(site, "appliance")[-1] == data("appliance")
    change(path, data("changed"))
    site.wait_shipped("appliance")
    assert images(site, "appliance")[-1] == data("changed")


def test_unprotecting_ends_the_points_and_keeps_those_that_are(site: MountedSite) -> None:
    """A rename does not protect it again; the user does, and it is the same disk."""
    path = file(site, "paused.img")
    path.write_bytes(data("paused"))
    disk_id = wait_disk(site, "paused")
    site.json("disk", "unprotect", "paused")
    (row,) = [row for row in site.json("disk", "list")["disks"] if row["name"] == "paused"]
    assert (row["state"], row["here"]) == ("Retired", False)
    before = site.points("paused")
    change(path, data("unseen"))
    path.rename(file(site, "moved.img"))
    file(site, "other.img").write_bytes(data("other"))
    wait_disk(site, "other")
    assert not {"paused", "moved"} & set(rows(site))
    assert site.points("paused") == before
    assert images(site, "paused")[-1] == data("paused")
    site.json("disk", "protect", "moved.img")
    assert wait_disk(site, "paused") == disk_id
    found = images(site, "paused")
    assert found[: len(before)] == [data("paused")] * len(before)
    assert found[-1] == data("unseen")


def test_what_became_of_disks_is_remembered_over_a_mount(tmp_path: Path) -> None:
    """An image emptied in between gets a point of that, though nothing in it is allocated."""
    with MountedSite(tmp_path, options=FAST) as site:
        for name in ("renamed", "gone", "left", "emptied"):
            site.add_image(name, 1 << 20, data(name))
        site.init().mount()
        ids = {name: wait_disk(site, name) for name in ("renamed", "gone", "left", "emptied")}
        site.image("renamed").rename(file(site, "other.img"))
        site.image("gone").unlink()
        site.json("disk", "unprotect", "left")
        wait_retired(site, "gone")
        site.umount()
        (site.source / "other.img").rename(site.source / "third.img")
        for size in (0, 1 << 20):
            os.truncate(site.source / "emptied.img", size)
        site.mount()
        assert wait_disk(site, "renamed") == ids["renamed"]
        assert wait_disk(site, "emptied") == ids["emptied"]
        assert images(site, "emptied")[-1] == bytes(1 << 20)
        assert set(rows(site)) == {"emptied", "renamed"}
        assert site.json("disk", "show", "renamed")["file"] == "third.img"
        for name in ("renamed", "gone", "left"):
            assert images(site, name)[-1] == data(name).ljust(1 << 20, b"\0")
