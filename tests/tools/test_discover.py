"""vdiskfs discover: images, domains, and what to type."""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import struct
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tools.conftest import FakeDaemon, Run
from vdiskfs_tools import domains

XML = """<domain type='kvm'><name>{name}</name><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
<source file='{first}'/><target dev='vda' bus='virtio'/></disk>
<disk type='file' device='disk'><source file='{second}'/><target dev='vdb'/></disk>
<disk type='file' device='cdrom'><source file='/srv/cd.iso'/><target dev='sda'/></disk>
<disk type='block' device='disk'><source dev='/dev/sdz'/><target dev='vdc'/></disk>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
</devices></domain>"""


@pytest.fixture(autouse=True)
def libvirt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of definitions, and no virsh."""
    directory = tmp_path / "libvirt"
    directory.mkdir()
    monkeypatch.setattr(domains, "CONFIGURATION", directory)
    monkeypatch.setattr("vdiskfs_tools.domains.shutil.which", lambda _: None)
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    (directory / "more").mkdir(parents=True)
    for name in ("web.qcow2", "data.img", "more/old.img", "readme.txt"):
        (directory / name).write_bytes(b"x" * 8192)
    return directory


def define(libvirt: Path, source: Path) -> None:
    text = XML.format(name="web", first=source / "web.qcow2", second=source / "data.img")
    (libvirt / "web.xml").write_text(text)
    (libvirt / "evil.xml").write_text(f"<!DOCTYPE a [<!ENTITY b 'c'>]>{text}")
    (libvirt / "broken.xml").write_text("<domain><name>")


def test_images_and_domains_are_found_with_what_to_do(
    run_json: Callable[..., Any], libvirt: Path, source: Path
) -> None:
    define(libvirt, source)
    found = run_json("discover", str(source))
    assert [(one["disk"], one["domain"], one["protected"]) for one in found["images"]] == [
        ("data", "web", False), ("web", "web", False), ("old", None, False),
    ]  # fmt: skip
    assert found["images"][0]["size"] == 8192
    assert found["domains"] == [{"name": "web", "agent": True, "disks": [
        {"target": "vda", "file": str(source / "web.qcow2"), "format": "qcow2"},
        {"target": "vdb", "file": str(source / "data.img"), "format": "raw"},
    ]}]  # fmt: skip
    commands = [shlex.split(line) for line in found["commands"]]
    mount = ["vdiskfs", "mount", str(source), "MOUNTPOINT", "--vault", "URL", "--over"]
    assert commands[0] == mount
    assert commands[-1] == ["vdiskfs", "group", "create", "web", "data", "web"]
    assert tomllib.loads("\n".join(found["settings"])) == {
        "quiesce": {"data": {"libvirt": "web"}, "web": {"libvirt": "web"}}
    }
    # Without a source: where the domains have their disks.
    assert run_json("discover")["images"] == found["images"]


def test_the_words_of_a_command_are_quoted(
    run_json: Callable[..., Any], libvirt: Path, source: Path
) -> None:
    source = source.rename(source.with_name("my images"))
    text = XML.format(name="my web", first=source / "web.qcow2", second=source / "data.img")
    (libvirt / "web.xml").write_text(text)
    commands = [shlex.split(line) for line in run_json("discover", str(source))["commands"]]
    assert commands[0][:3] == ["vdiskfs", "mount", str(source)]
    assert commands[-1] == ["vdiskfs", "group", "create", "my web", "data", "web"]


def test_what_a_mount_protects_is_shown_as_such(
    run: Run, run_json: Callable[..., Any], daemon: FakeDaemon, libvirt: Path
) -> None:
    source = Path(str(daemon.entry.source))
    (source / "web.img").write_bytes(b"x")
    (source / "new.img").write_bytes(b"x")
    live = f"{daemon.entry.mountpoint}/disks"
    text = XML.format(name="web", first=f"{live}/web.img", second=f"{live}/new.img")
    (libvirt / "web.xml").write_text(text)
    daemon.answer("GET", "/disks", {"disks": [{"name": "web", "here": True, "file": "web.img"}]})
    found = run_json("discover")
    assert {one["disk"]: one["protected"] for one in found["images"]} == {"web": True, "new": False}
    assert {one["domain"] for one in found["images"]} == {"web"}
    assert shlex.split(found["commands"][0]) == [
        "vdiskfs", "-m", daemon.entry.mountpoint, "disk", "protect", "new.img",
    ]  # fmt: skip
    shown = run("discover").stdout
    assert "not protected" in shown
    assert "disk protect new.img" in shown


def test_what_is_protected_is_told_by_the_file_and_one_mount_is_offered_for_a_tree(
    run_json: Callable[..., Any], daemon: FakeDaemon, source: Path
) -> None:
    mounted = Path(str(daemon.entry.source))
    (mounted / "sub").mkdir()
    for name in ("web01.img", "sub/web01.img", "plain"):
        (mounted / name).write_bytes(b"x")
    rows = [{"name": "web01", "here": True, "file": "web01.img"},
            {"name": "plain", "here": True, "file": "plain"},
            {"name": "web01-2", "here": False}]  # fmt: skip
    daemon.answer("GET", "/disks", {"disks": rows})
    found = run_json("discover")
    assert [
        (Path(one["file"]).relative_to(mounted), one["protected"]) for one in found["images"]
    ] == [(Path("plain"), True), (Path("web01.img"), True), (Path("sub/web01.img"), False)]
    assert [shlex.split(line)[-1] for line in found["commands"]] == ["sub/web01.img"]
    # A directory below the source of a mount is that mount's, too.
    below = run_json("discover", str(mounted / "sub"))
    assert [shlex.split(line)[-1] for line in below["commands"]] == ["sub/web01.img"]
    assert run_json("discover", str(source))["commands"] == [
        f"vdiskfs mount {source} MOUNTPOINT --vault URL --over"
    ]


def test_what_cannot_be_read_is_said_and_the_rest_is_found(
    run: Run, libvirt: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    define(libvirt, source)
    text = XML.format(name="gone", first="/nowhere/a.img", second=source / "more" / "old.img")
    (libvirt / "gone.xml").write_text(text)
    scandir = os.scandir

    def refused(path: Any) -> Any:
        if str(path).endswith("more"):  # as lost+found is for anybody but root
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    found = run("discover")
    assert found.exit_code == 0
    assert "web.qcow2" in found.stdout
    assert "/nowhere/a.img (domain gone): left out: no such directory" in found.stderr
    assert f"{source}/more: left out: Permission denied" in found.stderr


def test_an_image_that_is_used_is_said_and_left_alone(
    run_json: Callable[..., Any], source: Path
) -> None:
    fd = os.open(source / "web.qcow2", os.O_RDWR)
    try:
        # The byte by which QEMU says that it writes.
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 101, 1, 0))
        problems = {
            one["disk"]: one["problem"] for one in run_json("discover", str(source))["images"]
        }
    finally:
        os.close(fd)
    assert "in use" in problems["web"]
    assert problems["data"] is None


def test_virsh_is_asked_where_it_is(
    run_json: Callable[..., Any], tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = XML.format(name="db & co", first=source / "web.qcow2", second=source / "data.img")
    (tmp_path / "db.xml").write_text(text.replace("db & co", "db &amp; co"))
    virsh = tmp_path / "virsh"
    virsh.write_text(
        '#!/bin/sh\n[ "$1" = --readonly ] || exit 9\n'
        'if [ "$2" = list ]; then echo "db & co"; echo; exit; fi\n'
        f'[ "$4" = "db & co" ] && cat {tmp_path}/db.xml\n'
    )
    virsh.chmod(0o755)
    monkeypatch.setattr("vdiskfs_tools.domains.shutil.which", lambda _: str(virsh))
    found = run_json("discover", str(source))
    assert [one["name"] for one in found["domains"]] == ["db & co"]
    virsh.write_text("#!/bin/sh\necho 'error: failed to connect to the hypervisor' >&2; exit 1\n")
    found = run_json("discover", str(source))
    assert found["libvirt_error"] == "libvirt does not answer: failed to connect to the hypervisor"


def test_a_directory_that_is_not_there_is_exit_3(run: Run) -> None:
    assert run("discover", "/nowhere").exit_code == 3


def test_nothing_found_says_what_to_do(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("discover", str(tmp_path / "empty"))
    assert result.exit_code == 0
    assert "vdiskfs discover SOURCE" in result.stderr + result.stdout
