"""Random operations on one file, each answer compared with a model in memory.

As a program, in a process of its own, because a store to a map whose server is gone is a SIGBUS:

    python -m tests.e2e.fsx FILE --seed N --model COPY [--operations N] [--base BASE]

ends at SIGTERM, or when the operations are done; then it writes what the file must hold to COPY.
Exit status: 0, 1 another answer than the model's, 3 an operation failed. It alone may write to
the file.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Self

MAX_SIZE = 2 << 20
_PAGE = 4096
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class WrongAnswerError(AssertionError):
    """The file did not hold what was last written to it."""


class Exerciser:
    """One file, its model, and the operations done."""

    def __init__(self, path: Path, seed: int, base: Path) -> None:
        self.path = path
        self.model = bytearray(base.read_bytes())
        self.done = 0
        self._rng = random.Random(seed)
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._direct = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
        self._acts = [
            (self._read, 5), (self._write, 6), (self._write_direct, 4), (self._read_map, 2),
            (self._write_map, 4), (self._truncate, 1), (self._discard, 2), (self._sync, 1),
            (self._reopen, 1),
        ]  # fmt: skip

    def step(self) -> None:
        """Do one operation and compare."""
        act = self._rng.choices([a for a, _ in self._acts], [w for _, w in self._acts])[0]
        act()
        self.done += 1

    def finish(self) -> None:
        """Make all durable and compare every byte."""
        os.fsync(self._fd)
        self._compare("at the end", 0, os.pread(self._fd, MAX_SIZE + 1, 0), len(self.model))
        os.close(self._fd)
        os.close(self._direct)

    def _range(self, grain: int = 1, *, inside: bool = True) -> tuple[int, int]:
        length = self._rng.choice([1, 512, _PAGE, 20_000, 150_000])
        length = self._rng.randrange(1, length + 1)
        limit = len(self.model) if inside else MAX_SIZE
        offset = self._rng.randrange(max(1, limit - length + 1)) // grain * grain
        length = -(-length // grain) * grain
        return offset, min(length, (limit - offset) // grain * grain)

    def _compare(self, what: str, offset: int, data: bytes, length: int) -> None:
        wanted = self.model[offset : offset + length]
        if data == wanted:
            return
        at = next(
            (i for i, (a, b) in enumerate(zip(data, wanted, strict=False)) if a != b),
            min(len(data), len(wanted)),
        )
        raise WrongAnswerError(
            f"operation {self.done}, {what} [{offset}, +{length}): {len(data)} bytes of "
            f"{len(wanted)}; from byte {offset + at}: {data[at : at + 16].hex()}, not "
            f"{wanted[at : at + 16].hex()}"
        )

    def _put(self, offset: int, data: bytes) -> None:
        if offset > len(self.model):
            self.model.extend(bytes(offset - len(self.model)))
        self.model[offset : offset + len(data)] = data

    def _read(self) -> None:
        offset, length = self._range()
        self._compare("read", offset, os.pread(self._fd, length, offset), length)

    def _write(self) -> None:
        offset, length = self._range(inside=self._rng.random() < 0.8)
        data = self._rng.randbytes(length)
        if os.pwrite(self._fd, data, offset) != length:
            raise OSError(f"short write of {length} at {offset}")
        self._put(offset, data)

    def _write_direct(self) -> None:
        offset, length = self._range(_PAGE)
        if length <= 0:
            return
        with mmap.mmap(-1, length) as memory:
            memory[:] = self._rng.randbytes(length)
            if os.pwrite(self._direct, memory, offset) != length:
                raise OSError(f"short direct write of {length} at {offset}")
            self._put(offset, memory[:])

    def _read_map(self) -> None:
        if not self.model:
            return
        offset, length = self._range()
        with mmap.mmap(self._fd, len(self.model), prot=mmap.PROT_READ) as view:
            self._compare("mapped read", offset, view[offset : offset + length], length)

    def _write_map(self) -> None:
        if not self.model:
            return
        offset, length = self._range()
        data = self._rng.randbytes(length)
        with mmap.mmap(self._fd, len(self.model)) as view:
            view[offset : offset + length] = data
            # Otherwise the pages stay dirty until the kernel writes them, or a read needs them.
            if self._rng.random() < 0.5:
                view.flush()
        self._put(offset, data)

    def _truncate(self) -> None:
        size = self._rng.randrange(_PAGE, MAX_SIZE)
        os.ftruncate(self._fd, size)
        self.model = self.model[:size].ljust(size, b"\0")

    def _discard(self) -> None:
        offset, length = self._range()
        mode = _KEEP_SIZE | self._rng.choice([_PUNCH_HOLE, _ZERO_RANGE])
        if length and _libc.fallocate(self._fd, mode, offset, length) != 0:
            raise OSError(ctypes.get_errno(), "fallocate")
        self._put(offset, bytes(length))

    def _sync(self) -> None:
        os.fsync(self._fd)

    def _reopen(self) -> None:
        os.close(self._fd)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        if os.fstat(self._fd).st_size != len(self.model):
            raise WrongAnswerError(f"operation {self.done}: another size after opening again")


class Fsx:
    """The program as a child, from the beginning of the block to its end."""

    def __init__(self, path: Path, model: Path, seed: int, base: Path | None = None) -> None:
        self.model = model
        self._command = [
            sys.executable, "-m", "tests.e2e.fsx", str(path), "--seed", str(seed),
            "--model", str(model), "--base", str(base or path),
        ]  # fmt: skip
        self._process: subprocess.Popen[str] | None = None
        self.operations = 0
        self.status = 0
        self.message = ""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def is_running(self) -> bool:
        """Say whether it has not ended of its own."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End it; ``operations``, ``status`` and ``message`` say how it went."""
        process = self._process
        if process is not None:
            process.terminate()
            out, self.message = process.communicate(timeout=120)
            self.operations = int(out.rpartition("operations ")[2] or 0)
            self.status = process.returncode
            self._process = None


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="what FILE holds; reading it would fill it")
    parser.add_argument("--operations", type=int, default=2**62)
    words = parser.parse_args()
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    exerciser = Exerciser(words.file, words.seed, words.base or words.file)
    print("ready", flush=True)
    status = 0
    try:
        while not stopped.is_set() and exerciser.done < words.operations:
            exerciser.step()
        exerciser.finish()
    except WrongAnswerError as error:
        print(error, file=sys.stderr)
        status = 1
    except OSError as error:
        print(f"operation {exerciser.done}: {error}", file=sys.stderr)
        status = 3
    words.model.write_bytes(exerciser.model)
    print(f"operations {exerciser.done}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
