"""Bad input of every kind: the right exit code, one clear line, nothing mounted, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.gauges import assert_same, resident_bytes, write_at
from tests.e2e.loopdev import attached, make_fs, make_image, mounted
from tests.e2e.mounted import PROGRAM, CommandError, MountedSite
from tests.fs.posix import as_nobody

pytestmark = [pytest.mark.e2e, pytest.mark.root]

MIB = 1 << 20
FAST = "epoch_interval_s = 0.1\nheartbeat_s = 1\n"


def refused(site: MountedSite, code: int, says: str, *arguments: str | Path) -> None:
    """Run a command that must fail: exit code, one line that says it, no traceback."""
    done = site.run(*arguments, code=code)
    lines = [line for line in done.stderr.splitlines() if line.startswith("vdiskfs: ")]
    assert len(lines) == 1, done.stderr
    assert says in lines[0]
    assert "Traceback" not in done.stderr + done.stdout
    assert "fault of vdiskfs" not in done.stderr


def mount_refused(
    site: MountedSite, code: int, says: str, *, source: Path | None = None,
    mountpoint: Path | None = None, vault: str | None = None, state: Path | None = None,
) -> None:  # fmt: skip
    """Try to mount; it must fail and leave nothing mounted."""
    place = mountpoint or site.mountpoint
    before = os.path.ismount(place)
    refused(
        site, code, says, "mount", source or site.source, place, "--vault", vault or site.vault,
        "--site", site.name, "--state", state or site.state, "--config", site.config,
    )  # fmt: skip
    assert os.path.ismount(place) == before


@pytest.fixture
def site(tmp_path: Path) -> Iterator[MountedSite]:
    with MountedSite(tmp_path, options=FAST) as made:
        made.add_image("web01", MIB, os.urandom(MIB))
        yield made.init()


def test_another_user_does_not_reach_the_control_socket(site: MountedSite) -> None:
    """Two things are in the way: the directory, and the socket itself."""
    ask = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1]); print('here')"

    # Others may not run an interpreter below /root.
    python = shutil.which("python3", path="/usr/bin:/bin") or str(Path(sys.executable).resolve())

    def connects(path: Path) -> bool:
        done = as_nobody(python, "-I", "-c", ask, str(path))
        assert done.stdout == "here\n" or "PermissionError" in done.stderr, done.stderr
        return done.returncode == 0

    with tempfile.TemporaryDirectory(dir="/tmp", prefix="site-") as place:
        Path(place).chmod(0o755)
        site.state = Path(place, "state")
        site.mount()
        socket = site.state / "control.sock"
        assert not connects(socket)
        site.state.chmod(0o755)
        assert not connects(socket)
        socket.chmod(0o777)
        assert connects(socket), "nothing else was in the way"
        site.umount()


def test_a_source_that_is_missing(site: MountedSite) -> None:
    mount_refused(site, 1, "does not exist", source=site.root / "nowhere")


def test_a_mountpoint_that_is_missing(site: MountedSite) -> None:
    mount_refused(site, 1, "does not exist", mountpoint=site.root / "nowhere")


def test_a_mountpoint_that_is_not_empty(site: MountedSite) -> None:
    (site.mountpoint / "file").write_text("kept")
    mount_refused(site, 4, "not empty")
    assert (site.mountpoint / "file").read_text() == "kept"


def test_a_mountpoint_that_is_mounted_already(site: MountedSite) -> None:
    site.mount().wait_shipped("web01")
    mount_refused(site, 4, "mounted already")
    assert site.disk("web01")["state"] == "Protected"


def test_a_state_directory_may_lie_deeper_than_the_address_of_a_socket_has_room_for(
    site: MountedSite,
) -> None:
    site.state = site.root / ("d" * 120) / "state"
    site.state.parent.mkdir()
    site.mount().wait_shipped("web01")
    site.kill_daemon()
    assert site.disk("web01")["state"] == "Protected"


def test_a_second_mount_with_the_same_state_directory(site: MountedSite) -> None:
    site.mount().wait_shipped("web01")
    source, mountpoint = site.root / "source2", site.root / "mnt2"
    source.mkdir()
    mountpoint.mkdir()
    mount_refused(site, 4, str(site.state), source=source, mountpoint=mountpoint)
    assert site.disk("web01")["state"] == "Protected"


@pytest.mark.parametrize("url", ["ftp://host/vault", "file://relative", "nonsense", "azure://"])
def test_a_vault_url_that_is_malformed(site: MountedSite, url: str) -> None:
    mount_refused(site, 2, "", vault=url)


def test_a_vault_that_is_absent(site: MountedSite, tmp_path: Path) -> None:
    mount_refused(site, 3, "vault", vault=f"file://{tmp_path}/nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_vault_of_a_newer_format(site: MountedSite, tmp_path: Path) -> None:
    path = tmp_path / "vault" / "vault.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 3}))
    done = site.run(
        "mount", site.source, site.mountpoint, "--vault", site.vault, "--state", site.state,
        code=6,
    )  # fmt: skip
    assert "format" in done.stderr
    assert "Traceback" not in done.stderr
    assert not os.path.ismount(site.mountpoint)


def test_a_point_that_does_not_exist_and_a_time_before_the_first(site: MountedSite) -> None:
    site.mount().wait_shipped("web01")
    first = site.points("web01")[0]
    target = site.root / "restored.img"
    this = ("-m", site.mountpoint)
    refused(site, 3, "", *this, "point", "restore", "web01@999", target)
    refused(site, 3, "", *this, "point", "show", "nodisk@latest")
    refused(
        site, 3, first["time"][:16], *this, "point", "restore", "web01@2001-01-01T00:00:00Z", target
    )
    assert not target.exists()


def test_an_unmount_while_busy_names_who_and_changes_nothing(site: MountedSite) -> None:
    site.mount().wait_shipped("web01")
    with site.image("web01").open("rb"):
        refused(site, 4, str(os.getpid()), "umount", site.mountpoint)
        assert site.disk("web01")["state"] == "Protected"


# ---- damage in the vault -------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """A vault with three points of web01 and one of other, and what each point holds."""

    vault: Path
    contents: dict[int, bytes]  # by epoch
    other: bytes
    slots: list[str]
    alien: str


@pytest.fixture(scope="module")
def whole(marked_session: None, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    root = tmp_path_factory.mktemp("whole")
    # Points are made when we ask, and only then.
    with MountedSite(root, options="epoch_interval_s = 3600\n") as site:
        for disk in ("web01", "other"):
            site.add_image(disk, MIB, os.urandom(MIB))
        site.init().mount()
        for disk in ("web01", "other"):
            site.wait_shipped(disk)
        contents = [site.image("web01").read_bytes()]
        for number in (1, 2):
            write_at(site.image("web01"), number * 65536, os.urandom(32768))
            site.run("-m", site.mountpoint, "point", "create", "web01", "--wait")
            contents.append(site.image("web01").read_bytes())
        epochs = [point["epoch"] for point in site.points("web01")]
        line, alien = (
            root / "vault" / "disks" / site.disk(disk)["id"] / "g00000001"
            for disk in ("web01", "other")
        )
        vault = root / "vault"
        slots = sorted(str(path.relative_to(vault)) for path in line.iterdir())
        return Whole(
            vault, dict(zip(epochs, contents, strict=True)), site.image("other").read_bytes(),
            slots, str(next(alien.iterdir()).relative_to(vault)),
        )  # fmt: skip


def _truncate(slot: Path, _: Whole) -> None:
    os.truncate(slot, slot.stat().st_size - 100)


def _flip(slot: Path, _: Whole) -> None:
    data = bytearray(slot.read_bytes())
    data[len(data) // 2] ^= 1
    slot.write_bytes(data)


def _replace(slot: Path, of: Whole) -> None:
    slot.write_bytes((of.vault / of.alien).read_bytes())


def _older(slot: Path, of: Whole) -> None:
    slot.write_bytes((of.vault / of.slots[0]).read_bytes())


def _delete(slot: Path, _: Whole) -> None:
    slot.unlink()


def _hostile(slot: Path, _: Whole) -> None:
    data = slot.read_bytes()
    slot.write_bytes(data[:16] + b"\xff" * (len(data) - 32) + data[-16:])


def _hostile_end(slot: Path, _: Whole) -> None:
    data = slot.read_bytes()
    slot.write_bytes(data[:-80] + b"\xff\xff\xff\xff\xff\xff\xff\x7f" * 8 + data[-16:])


@pytest.mark.parametrize(
    "do", [_truncate, _flip, _replace, _older, _delete, _hostile, _hostile_end]
)
def test_a_damaged_delta_is_named_and_never_gives_other_bytes(
    tmp_path: Path, whole: Whole, do: Callable[[Path, Whole], None]
) -> None:
    vault = tmp_path / "vault"
    shutil.copytree(whole.vault, vault)
    slot = vault / whole.slots[1]  # the second point's
    slot.chmod(0o600)
    do(slot, whole)
    first, *later = whole.contents
    with MountedSite(tmp_path) as site:
        checked = site.run("--json", "vault", "check", "--read-data", "--vault", site.vault, code=6)
        problems = json.loads(checked.stdout)["problems"]
        assert [one["object"] for one in problems] == [whole.slots[1]]
        hurt = {epoch for one in problems for hit in one["points"] for epoch in hit["epochs"]}
        assert hurt == set(later)
        assert "Traceback" not in checked.stderr
        # A recovery site reads what is whole, and gets errors for what is not.
        site.run(
            "mount", site.mountpoint, "--vault", site.vault, "--site", "dr", "--state", site.state
        )
        site.pid = int(site.json("status")["pid"])
        assert site.point("other").read_bytes() == whole.other
        target = tmp_path / "restored.img"
        this = ("-m", site.mountpoint, "point", "restore")
        with pytest.raises(CommandError) as failed:
            site.run(*this, f"web01@{later[-1]}", target)
        assert failed.value.returncode in (3, 6)
        assert not target.exists()
        site.run(*this, f"web01@{first}", target)
        assert target.read_bytes() == whole.contents[first]
        for image in site.point_images("web01"):
            facts = json.loads((image.parent / "point.json").read_text())
            _assert_right_or_error(image, whole.contents[facts["epoch"]])
        assert resident_bytes(site.pid, "VmHWM") < 400 * MIB


def _assert_right_or_error(image: Path, content: bytes) -> None:
    try:
        with image.open("rb") as file:
            for offset in range(0, len(content), 4096):
                try:
                    data = os.pread(file.fileno(), 4096, offset)
                except OSError as error:
                    assert error.errno == errno.EIO
                else:
                    assert data == content[offset : offset + 4096]
    except OSError as error:
        assert error.errno in (errno.EIO, errno.ENOENT)


# ---- full disks ----------------------------------------------------------------------------


@contextmanager
def small_fs(root: Path, size: int, directory: Path) -> Iterator[Path]:
    """Mount a small ext4 on a directory."""
    with attached(make_image(root / f"{directory.name}.fs", size)) as device:
        make_fs("ext4", device)
        with mounted(device, directory, kind="ext4") as mount:
            yield mount


def fill(ballast: Path) -> None:
    """Use up all room."""
    with ballast.open("wb", buffering=0) as file:
        for length in (MIB, 4096):
            try:
                while True:
                    file.write(bytes(length))
            except OSError as error:
                assert error.errno == errno.ENOSPC


def test_a_full_source_refuses_the_guest_and_loses_nothing(tmp_path: Path) -> None:
    source = tmp_path / "site" / "source"
    made = MountedSite(tmp_path, options=FAST)
    with small_fs(tmp_path, 48 * MIB, source), made as site:
        site.add_image("web01", 128 * MIB, os.urandom(MIB))
        site.init().mount().wait_shipped("web01")
        written: list[bytes] = []
        with site.image("web01").open("r+b", buffering=0) as file:

            def write_on() -> None:
                while True:
                    block = os.urandom(MIB)
                    assert os.pwrite(file.fileno(), block, (2 + len(written)) * MIB) == MIB
                    written.append(block)

            with pytest.raises(OSError, match="No space left") as full:
                write_on()
            assert full.value.errno == errno.ENOSPC
            kept = os.pread(file.fileno(), len(written) * MIB, 2 * MIB)
            assert kept == b"".join(written)
        assert len(written) > 8
        site.wait_shipped("web01")
        site.run("-m", site.mountpoint, "point", "create", "web01", "--wait")
        assert_same(site.point("web01"), site.image("web01"))


def test_a_full_state_directory_stops_no_guest_and_loses_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "small"
    with (
        small_fs(tmp_path, 48 * MIB, directory),
        MountedSite(tmp_path, options=FAST) as site,
    ):
        site.state = directory / "state"
        site.add_image("web01", 16 * MIB, os.urandom(16 * MIB))
        site.init().mount().wait_shipped("web01")
        last = site.disk("web01")["epoch"]
        ballast = directory / "ballast"
        fill(ballast)
        for number in range(8):
            write_at(site.image("web01"), number * 2 * MIB, os.urandom(MIB))
        site.wait("it is told", lambda: site.disk("web01")["health"] != "Normal")
        assert site.disk("web01")["last_error"]
        write_at(site.image("web01"), MIB, os.urandom(MIB))
        ballast.unlink()
        site.wait("a point", lambda: site.disk("web01")["epoch"] > last)
        site.wait_shipped("web01")
        assert_same(site.point("web01"), site.image("web01"))
        assert site.disk("web01")["health"] == "Normal"


# ---- rights --------------------------------------------------------------------------------


def test_an_image_that_this_user_may_not_read(site: MountedSite) -> None:
    (site.source / "web01.img").chmod(0)
    # Without these we are a user as every other: the modes of our own files hold us too.
    limited = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    command: list[str | Path] = [
        *limited, PROGRAM, "mount", site.source, site.mountpoint, "--vault", site.vault,
        "--state", site.state, "--site", "u",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env=site.environ, check=False, timeout=60
    )
    assert done.returncode == 7, done.stderr
    assert "web01.img" in done.stderr
    assert "Traceback" not in done.stderr
    assert not os.path.ismount(site.mountpoint)
