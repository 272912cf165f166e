"""Builds and runs tests/oracle/stamper.c, and reads its log for the oracle of tests/e2e.

with Stamper(image, log, disk=7) as stamper:
    ...
Oracle(read_log(log, disk=7, size=size)).check(point)
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

from tests.e2e.workload import FOREVER, Kind, Operation, WriteLog

SOURCE = Path(__file__).with_name("stamper.c")
BLOCK = 4096
_BUILT = Path(__file__).resolve().parents[2] / "build" / "stamper"
_NONE = Operation(Kind.ZERO, 0, 0, FOREVER, FOREVER, 0, 0)
_EVENT = re.compile(r"^@([ICFE]) ([\d ]+)\r?$", re.MULTILINE)


class Verdict(NamedTuple):
    """What the C checker said of an image."""

    is_cut: bool
    text: str

    @property
    def kind(self) -> str:
        """``cut``, or what is wrong: lost, reordered, mixed, torn, strange, size."""
        return self.text.partition(":")[0]


def program() -> Path:
    """Return the program, built again where its source is newer."""
    if not _BUILT.exists() or _BUILT.stat().st_mtime_ns < SOURCE.stat().st_mtime_ns:
        _BUILT.parent.mkdir(exist_ok=True)
        partial = _BUILT.with_name(f"stamper.{os.getpid()}")
        flags = ["-std=c11", "-O2", "-static", "-pthread", "-Wall", "-Wextra", "-Wconversion"]
        subprocess.run(["gcc", *flags, "-Werror", "-o", partial, SOURCE], check=True)
        partial.rename(_BUILT)
    return _BUILT


class Stamper:
    """The writer as a process, from the beginning of the block to its end."""

    def __init__(
        self, file: Path, log: Path, *, disk: int, size: int, seed: int = 0, writers: int = 4,
        operations: int | None = None, buffered: bool = False, flush_percent: int = 5,
    ) -> None:  # fmt: skip
        self.log = log
        self._command = command(
            file, str(log), disk=disk, size=size, seed=seed, writers=writers,
            operations=operations, buffered=buffered, flush_percent=flush_percent,
        )  # fmt: skip
        self._process: subprocess.Popen[str] | None = None
        self.errors = ""

    def __enter__(self) -> Self:
        self.log.touch()
        self._process = subprocess.Popen(
            [str(program()), *self._command[1:]], stderr=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> int:
        """End the writers, and return how many operations failed; ``errors`` names them."""
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            self.errors = process.communicate(timeout=120)[1]
            if process.returncode not in (0, 3):
                raise AssertionError(f"stamper: exit {process.returncode}: {self.errors}")
            self._process = None
        return self.errors.count("\n")

    def wait(self) -> int:
        """Wait until the operations asked for are done; return how many failed."""
        assert self._process is not None
        self._process.wait(120)
        return self.stop()

    def completed(self) -> int:
        """Return how many writes have been completed so far."""
        return self.log.read_bytes().count(b"@C ")

    def wait_completed(self, goal: int, timeout_s: float = 60) -> None:
        """Wait until so many writes have been completed, or the program has ended."""
        assert self._process is not None
        end = time.monotonic() + timeout_s
        while self.completed() < goal and self._process.poll() is None:
            if time.monotonic() > end:
                raise TimeoutError(f"{self.completed()} of {goal} writes")
            time.sleep(0.02)


def command(
    file: Path | str, log: str, *, disk: int, size: int, seed: int = 0, writers: int = 4,
    operations: int | None = None, buffered: bool = False, flush_percent: int = 5,
) -> list[str]:  # fmt: skip
    """Return the words that start the writer, by the name ``stamper``."""
    words = ["stamper", "write", str(file), "--log", log, "--disk", str(disk)]
    words += ["--size", str(size), "--seed", str(seed), "--writers", str(writers)]
    words += ["--flush", str(flush_percent), *["--buffered"] * buffered]
    return words if operations is None else [*words, "--operations", str(operations)]


def check(image: Path, log: Path, *, disk: int, after: int = 0, flushed: bool = False) -> Verdict:
    """Let the C checker judge an image; it is the oracle's twin and shares no code with it.

    Args:
        image: of the size that the writer was given.
        log: of the writer; that of a guest's console may have other lines too.
        disk: the number that the stamps carry.
        after: the image is not older than this instant (ns).
        flushed: after a host's loss: each sector has at least what the last flush covers.
    """
    words = ["check", str(image), "--log", str(log), "--disk", str(disk), "--after", str(after)]
    words += ["--flushed"] * flushed
    done = subprocess.run(
        [program(), *words], capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode not in (0, 1):
        raise AssertionError(f"stamper check: exit {done.returncode}: {done.stderr}")
    return Verdict(done.returncode == 0, done.stdout.strip())


def events(text: str) -> Iterator[tuple[str, list[int]]]:
    """Yield the letter and the numbers of each line of a log."""
    for match in _EVENT.finditer(text):
        yield match[1], [int(word) for word in match[2].split()]


def read_log(log: Path, *, disk: int, size: int) -> WriteLog:
    """Return a stamper's log as one of operations; numbers that were not used are empty ones."""
    found: dict[int, Operation] = {}
    result = WriteLog(disk, size)
    for letter, words in events(log.read_text(errors="replace")):
        match letter, words:
            case "I", [number, block, count, start]:
                found[number] = Operation(
                    Kind.WRITE, block * BLOCK, count * BLOCK, start, FOREVER, size, size
                )
            case "C", [number, end]:
                found[number] = found[number]._replace(end_ns=end)
            case "F", [_, begin, end]:
                result.flushes.append((begin, end))
    result.operations = [found.get(n, _NONE) for n in range(1, max(found, default=0) + 1)]
    return result
