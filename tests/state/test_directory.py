"""The state directory: private, one daemon at a time, damage is seen and never taken for new."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vdiskfs.errors import BusyError, DamagedError, LocalError, NotFoundError, RefusedError
from vdiskfs.state import DiskRecord, FileStamp, LastEnd, StateDirectory, read_record, write_record

RECORD = DiskRecord(
    disk_id="d" * 32, name="web01", file="sub/web01.img", vault_id="a" * 32, writer_id="b" * 32,
    device=1, inode=2, birth_ns=3, generation=4, epoch=5, digest="c" * 64, size=6, time_ns=7,
    end=FileStamp(8, 9, 10),
)  # fmt: skip


def test_a_new_directory_is_private_and_has_a_writer_of_its_own(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with StateDirectory.open(tmp_path / "a" / "one") as one:
            assert one.last_end is LastEnd.NONE
            one.create_disk(RECORD)
            first = one.writer_id
        with StateDirectory.open(tmp_path / "two") as two:
            assert two.writer_id != first
    finally:
        os.umask(old)
    assert len(bytes.fromhex(first)) == 16
    for path in [tmp_path / "a" / "one", *(tmp_path / "a" / "one").rglob("*")]:
        assert not stat.S_IMODE(path.lstat().st_mode) & 0o077, path
    with StateDirectory.open(tmp_path / "a" / "one") as again:
        assert again.writer_id == first


def test_a_directory_open_to_others_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(mode=0o755)
    StateDirectory.open(tmp_path / "s").close()
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o700


@pytest.mark.root
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    os.chown(tmp_path / "s", 1234, 1234)
    with pytest.raises(RefusedError, match="user 1234"):
        StateDirectory.open(tmp_path / "s")


def test_a_second_daemon_is_told_the_pid_of_the_first(tmp_path: Path) -> None:
    with StateDirectory.open(tmp_path / "s"):
        with pytest.raises(BusyError, match=f"pid {os.getpid()}"):
            StateDirectory.open(tmp_path / "s")
        script = (
            "import sys; from pathlib import Path; from vdiskfs.state import StateDirectory\n"
            "from vdiskfs.errors import BusyError\n"
            "try: StateDirectory.open(Path(sys.argv[1]))\n"
            "except BusyError as error: print(error)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "s")],
            capture_output=True, text=True, check=True, timeout=30, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert f"pid {os.getpid()}" in done.stdout
    StateDirectory.open(tmp_path / "s").close()


def test_the_last_end_is_told_by_marks_and_boot_ids(tmp_path: Path) -> None:
    path = tmp_path / "s"
    state = StateDirectory.open(path, boot_id="one")
    state.end_clean()
    state = StateDirectory.open(path, boot_id="two")
    assert state.last_end is LastEnd.CLEAN
    assert not (path / "clean").exists()
    state.close()
    state = StateDirectory.open(path, boot_id="two")
    assert state.last_end is LastEnd.DAEMON_DIED
    state.close()
    state = StateDirectory.open(path, boot_id="three")
    assert state.last_end is LastEnd.HOST_DIED
    state.create_disk(RECORD)
    state.end_clean()
    assert not (path / "running").exists()
    (path / "clean").unlink()
    with StateDirectory.open(path, boot_id="three") as state:
        assert state.last_end is LastEnd.UNKNOWN


def test_the_cache_and_halves_of_disks_are_swept_at_start(tmp_path: Path) -> None:
    with StateDirectory.open(tmp_path / "s") as state:
        (state.cache / "points").mkdir()
        (state.cache / "points" / "x").write_bytes(b"x")
        (state.cache / "link").symlink_to(tmp_path)
        state.control.write_bytes(b"")
        state.disk(".half.new").track.mkdir(parents=True)
        state.disk(".gone.old").spool.mkdir(parents=True)
    with StateDirectory.open(tmp_path / "s") as state:
        assert list(state.cache.iterdir()) == []
        assert list((state.path / "disks").iterdir()) == []
        assert not state.control.exists()
    assert tmp_path.exists()


def test_a_disk_is_there_whole_and_goes_whole(tmp_path: Path) -> None:
    with StateDirectory.open(tmp_path / "s") as state:
        paths = state.create_disk(RECORD)
        assert paths == state.disk(RECORD.disk_id)
        for part in (paths.track, paths.spool, paths.pass_):
            assert part.is_dir()
        assert state.records() == [RECORD]
        state.write_disk(replace(RECORD, epoch=6, end=None))
        assert state.records() == [replace(RECORD, epoch=6, end=None)]
        with pytest.raises(LocalError):
            state.create_disk(RECORD)
        assert len(state.records()) == 1
        state.remove_disk(RECORD.disk_id)
        assert state.records() == []


@pytest.mark.parametrize("part", ["track", "spool", "pass", "record.json"])
def test_a_disk_without_one_of_its_parts_is_damaged(tmp_path: Path, part: str) -> None:
    with StateDirectory.open(tmp_path / "s") as state:
        paths = state.create_disk(RECORD)
        (paths.directory / part).rename(tmp_path / "elsewhere")
        with pytest.raises(DamagedError, match=part):
            state.records()


def test_a_record_that_was_changed_is_damaged_wherever_it_was(tmp_path: Path) -> None:
    with StateDirectory.open(tmp_path / "s") as state:
        path = state.create_disk(RECORD).record
        whole = path.read_bytes()
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            if whole[at : at + 1].isspace():  # between the values, where it may say nothing
                continue
            with pytest.raises(DamagedError, match=str(path)):
                state.records()
        for length in range(len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(DamagedError):
                state.records()


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"format": 2},
        {**RECORD.to_body(), "format": 99},
        {**RECORD.to_body(), "more": 1},
        {**RECORD.to_body(), "epoch": "5"},
        {**RECORD.to_body(), "epoch": True},
        {**RECORD.to_body(), "name": None},
        {**RECORD.to_body(), "end": {"size": 1}},
        {**RECORD.to_body(), "end": 7},
        {**RECORD.to_body(), "disk_id": "e" * 32},
    ],
)
def test_a_record_of_another_shape_is_damaged(tmp_path: Path, body: dict[str, object]) -> None:
    with StateDirectory.open(tmp_path / "s") as state:
        write_record(state.create_disk(RECORD).record, body)
        with pytest.raises(DamagedError):
            state.records()


def test_a_lost_site_state_is_not_made_anew_beside_disks(tmp_path: Path) -> None:
    with StateDirectory.open(tmp_path / "s") as state:
        state.create_disk(RECORD)
    (tmp_path / "s" / "state.json").unlink()
    with pytest.raises(DamagedError, match=r"state\.json"):
        StateDirectory.open(tmp_path / "s")


def test_a_record_is_the_old_or_the_new_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record"
    with pytest.raises(NotFoundError):
        read_record(path)
    write_record(path, {"a": 1})

    def fails(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(LocalError, match="Input/output"):
            write_record(path, {"a": 2})
    assert read_record(path) == {"a": 1}
    write_record(path, {"a": 3})
    assert read_record(path) == {"a": 3}


def test_what_a_full_disk_cannot_note_is_forgotten_whoever_dies_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two disks is not believed after a death right there, the second is."""
    record = replace(RECORD, end=None)
    with StateDirectory.open(tmp_path / "s", boot_id="here") as state:
        for disk_id in ("a" * 32, "b" * 32):
            state.create_disk(replace(record, disk_id=disk_id))
            state.note_started(disk_id)

        def refuse(path: Path, data: bytes) -> None:
            raise LocalError(f"{path}: {len(data)} bytes: No space left on device")

        def die(name: str) -> None:
            assert name == "distrust.forgotten"
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("vdiskfs.state.distrust.write_file", refuse)
            patch.setattr("vdiskfs.state.directory.hook", die)
            state.distrust_all()
    with StateDirectory.open(tmp_path / "s", boot_id="here") as state:
        assert state.last_end is LastEnd.DAEMON_DIED
        ends = {state.end_of_disk(one) for one in state.records()}
        assert ends == {LastEnd.UNKNOWN, LastEnd.DAEMON_DIED}
        state.distrust_all()
        assert all(state.disk(one.disk_id).distrusted.exists() for one in state.records())
