"""Commands that work on a vault themselves, interrupted while each of their requests is under way.

What an interruption of a request to a daemon leaves is in tests/e2e/test_interrupted.py.
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from click.testing import Result

from tests.vaults import PLAIN
from vdiskfs.crypto import slots
from vdiskfs.store.local import LocalStore

Run = Callable[..., Result]
T = TypeVar("T")

INTERRUPTED = "\nvdiskfs: interrupted\n"


@contextmanager
def interruption(number: int) -> Iterator[None]:
    """Send SIGINT while the request of this number, from 1 on, is carried out by its thread."""
    seen = 0
    plain = LocalStore._run

    async def run(store: LocalStore, call: Callable[[], T]) -> T:
        nonlocal seen
        seen += 1
        if seen != number:
            return await plain(store, call)

        def cut() -> T:
            os.kill(os.getpid(), signal.SIGINT)
            return call()

        return await plain(store, cut)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "_run", run)
        yield


def walk(run: Run, again: Callable[[], None], *line: str, most: int = 12) -> int:
    """Interrupt a command at each of its requests, then have it finish; return how often.

    ``again`` lays out anew what the command works on. Beyond ``most`` only every so many.
    """
    number, step = 1, 1
    for moments in range(1, 1000):
        again()
        with interruption(number):
            result = run(*line)
        if result.exit_code == 0:
            return moments - 1
        assert (result.exit_code, result.stderr) == (130, INTERRUPTED), number
        finished = run(*line)
        assert finished.exit_code == 0, (number, finished.stderr)
        if moments % most == 0:
            step *= 2
        number += step
    raise AssertionError("it was never let finish")


def files(directory: Path) -> dict[str, bytes]:
    """Return all objects of a folder vault, without what is no object yet."""
    found = (path for path in directory.rglob("*") if path.is_file())
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in found
        if ".vdiskfs" not in path.parts
    }


@pytest.mark.parametrize("line", [("check",), ("check", "--read-data")], ids=" ".join)
def test_a_check_changes_nothing(
    history: Any, run: Run, tell: Callable[[str], None], line: tuple[str, ...]
) -> None:
    before = files(history.directory)
    moments = walk(run, lambda: None, "vault", *line, "--vault", history.url)
    tell(f"vault {' '.join(line)}: interrupted at {moments} requests")
    assert moments > 3
    after = files(history.directory)
    assert {name: after.get(name) for name in before} == before
    assert run("vault", "check", "--read-data", "--vault", history.url).exit_code == 0


def test_thinning_goes_on_when_it_is_run_again(
    history: Any,
    run: Run,
    run_json: Callable[..., Any],
    tmp_path: Path,
    tell: Callable[[str], None],
) -> None:
    """One point goes, as the policy says; those that stay are whole, wherever it was cut off."""
    where, kept = ("--vault", history.url), tmp_path / "kept"
    run_json("policy", "set", "tight", "retention=1h for 2h", *where)
    run_json("disk", "protect", "web01", "--policy", "tight", "--yes", *where)
    points = run_json("point", "list", "web01", *where)["points"]
    shutil.copytree(history.directory, kept)
    ends: list[list[dict[str, Any]]] = []

    def again() -> None:
        if number := len(ends):
            ends[-1] = run_json("point", "list", "web01", *where)["points"]
            assert [one["epoch"] for one in ends[-1]] == [one["epoch"] for one in points[1:]], (
                number
            )
            assert run_json("vault", "check", "--read-data", *where)["ok"], number
        ends.append(points)
        shutil.rmtree(history.directory)
        shutil.copytree(kept, history.directory)

    moments = walk(run, again, "vault", "gc", *where)
    tell(f"vault gc: interrupted at {moments} requests")
    assert moments > 10


@PLAIN  # of a sealed block nothing is read once a bit of it is wrong
def test_a_repair_heals_when_it_is_run_again(
    history: Any, run: Run, tell: Callable[[str], None]
) -> None:
    (slot,) = [path for path in history.directory.rglob("*0001") if path.parent.name[0] == "g"]
    whole = slot.read_bytes()

    def hurt() -> None:
        slot.unlink()
        slot.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])

    moments = walk(run, hurt, "vault", "repair", "--vault", history.url)
    tell(f"vault repair: interrupted at {moments} requests")
    assert moments > 3
    assert slot.read_bytes() == whole
    assert run("vault", "check", "--read-data", "--vault", history.url).exit_code == 0


def test_a_key_is_changed_once_and_the_vault_can_always_be_opened(
    run: Run, tmp_path: Path, tell: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the old key, or, once it was changed, by the new one: its file is there, whatever is."""
    monkeypatch.setattr(slots, "SCRYPT_N", 1 << 10)
    for name in ("PASSPHRASE", "PASSPHRASE_FILE", "KEY_FILE"):
        monkeypatch.delenv(f"VDISKFS_{name}", raising=False)
    vault, kept, old, new = (tmp_path / name for name in ("v", "kept", "old", "new"))
    where = ["--vault", f"file://{vault}"]
    assert run("vault", "init", f"file://{vault}", "--key-file", str(old)).exit_code == 0
    shutil.copytree(vault, kept)
    line = ["vault", "key", "change", *where, "--key-file", str(old), "--new-key-file", str(new)]

    def opens(key: Path) -> bool:
        return run("vault", "info", *where, "--key-file", str(key)).exit_code == 0

    for number in range(1, 100):
        shutil.rmtree(vault)
        shutil.copytree(kept, vault)
        new.unlink(missing_ok=True)
        with interruption(number):
            result = run(*line)
        if result.exit_code == 0:
            break
        assert result.exit_code == 130, number
        assert result.stderr.endswith(INTERRUPTED)
        assert new.exists() or "is kept" not in result.stderr
        if opens(old):
            finished = run(*line)
            assert finished.exit_code == 0, (number, finished.stderr)
        assert opens(new), number
        assert not opens(old), number
    tell(f"vault key change: interrupted at {number - 1} requests")
    assert number > 2
