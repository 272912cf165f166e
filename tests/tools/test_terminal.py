"""Passphrases that are asked for on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
from pathlib import Path

from tests.e2e.mounted import PROGRAM

ASKS = re.compile(rb"(?i)(passphrase|the same again)[^\r\n]*: \Z")
WORD, OTHER = "correct horse", "battery staple"


def on_terminal(*words: str, answers: list[str]) -> tuple[int, str]:
    """Run the program on a terminal, answer what it asks; return its exit status and its words."""
    master, slave = pty.openpty()
    environ = {key: one for key, one in os.environ.items() if not key.startswith("VDISKFS_")}
    with subprocess.Popen(
        [PROGRAM, *words], stdin=slave, stdout=slave, stderr=slave, env=environ,
        start_new_session=True,
    ) as process:  # fmt: skip
        os.close(slave)
        said, asked, left = b"", 0, list(answers)
        poller = select.poll()
        poller.register(master, select.POLLIN)
        while True:
            if not poller.poll(60_000):
                process.kill()  # it waits for what nobody answers
                break
            try:
                part = os.read(master, 4096)
            except OSError:  # nobody has the other end any more
                break
            said += part
            # Not after any colon: what is typed before the question is thrown away.
            if ASKS.search(said[asked:]) and left:
                asked = len(said)
                os.write(master, left.pop(0).encode() + b"\n")
    os.close(master)
    assert not left, said
    return process.returncode, said.decode()


def test_a_passphrase_is_asked_for_twice_then_once_and_never_shown(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/vault"
    code, said = on_terminal("vault", "init", url, answers=[WORD, OTHER, WORD, WORD])
    assert code == 0, said
    assert "do not match" in said
    code, said = on_terminal("vault", "info", "--vault", url, answers=[WORD])
    assert (code, "aes-256-gcm" in said, WORD in said) == (0, True, False)
    code, said = on_terminal("vault", "info", "--vault", url, answers=[OTHER])
    assert code == 7, said
    assert OTHER not in said
