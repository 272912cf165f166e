"""Questions to a mount, asked by the command line's code in this process.

Tests ask again and again until something is so; a process for each question takes 150 ms of a
core, and the tests would mostly measure that. What changes anything is run as a process.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import subprocess
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence

import trio

from vdiskfs_tools.main import cli

_QUESTIONS = {
    ("status",), ("disk", "list"), ("disk", "show"), ("disk", "branches"), ("point", "list"),
    ("point", "show"), ("failover", "list"), ("failover", "show"), ("group", "list"),
    ("group", "show"), ("job", "list"), ("job", "show"), ("event", "list"), ("machine", "list"),
    ("machine", "show"), ("policy", "list"), ("policy", "show"), ("site", "list"),
}  # fmt: skip
# What another program of ours would be started with, and we were not.
_FOREIGN = ("LD_PRELOAD", "PYTHONPATH", "VDISKFS_CRASH", "VDISKFS_PLAIN")

for _noisy in ("httpcore", "httpx"):
    logging.getLogger(_noisy).setLevel(logging.WARNING)

# The process has one standard output.
_lock = threading.Lock()


def can_ask(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Say whether a command is a question that this process can ask."""
    same = all(environ.get(name) == os.environ.get(name) for name in _FOREIGN)
    question = {tuple(arguments[:1]), tuple(arguments[:2])} & _QUESTIONS
    follows = {"--follow", "--watch"} & set(arguments)
    return same and bool(question) and not follows and not trio.lowlevel.in_trio_run()


def ask(arguments: Sequence[str], environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the program's code with these arguments, as a process would run it."""
    out, err = io.StringIO(), io.StringIO()
    with (
        _lock, _ours(environ), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):  # fmt: skip
        # A socket of a daemon that was killed is left open by the HTTP client; a process ends.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            cli.main(list(arguments), prog_name="vdiskfs")
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        if code:
            gc.collect()
    return subprocess.CompletedProcess(list(arguments), code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _ours(environ: Mapping[str, str]) -> Iterator[None]:
    """Have those of our variables that a site sets."""
    before = {name: value for name, value in os.environ.items() if name.startswith("VDISKFS_")}
    for name in before:
        del os.environ[name]
    os.environ.update({k: v for k, v in environ.items() if k.startswith("VDISKFS_")})
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("VDISKFS_")]:
            del os.environ[name]
        os.environ.update(before)
