"""fio's own verification, an oracle that shares nothing with ours, agrees."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.e2e.mounted import MountedSite

pytestmark = [pytest.mark.e2e, pytest.mark.root]
SIZE = 8 << 20


def job(image: Path, *words: str) -> list[str]:
    """Return the command for one random write of each block, or what reads it back."""
    return [
        "fio", "--name=v", f"--filename={image}", "--rw=randwrite", "--bs=4k", f"--size={SIZE}",
        "--ioengine=libaio", "--iodepth=8", "--direct=1", "--verify=sha256", "--verify_fatal=1",
        "--randseed=7", "--verify_state_save=0", *words,
    ]  # fmt: skip


def verify(image: Path) -> subprocess.CompletedProcess[str]:
    """Let fio read all blocks back."""
    return subprocess.run(
        job(image, "--verify_only=1"), capture_output=True, text=True, check=False, timeout=60
    )


def test_fio_finds_all_that_it_wrote_though_the_daemon_was_killed(tmp_path: Path) -> None:
    """In the live image and in a restored point; and it does find one wrong byte."""
    with MountedSite(tmp_path, options="epoch_interval_s = 0.1\n") as site:
        site.add_image("web01", SIZE)
        site.init().mount()
        site.wait_shipped("web01")
        command = job(site.image("web01"), "--do_verify=0", "--rate_iops=250")
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as fio:
            # Asked of the image: a command takes longer than fio, where the machine is busy.
            live = site.image("web01")
            site.wait("fio writes", lambda: live.stat().st_blocks * 512 > SIZE // 8)
            assert live.stat().st_blocks * 512 < SIZE  # the rest is written after
            pause = site.kill_daemon()
            out = fio.communicate(timeout=90)[0]
        assert fio.returncode == 0, out
        site.wait_shipped("web01")
        restored = tmp_path / "restored.img"
        site.run("-m", site.mountpoint, "point", "restore", "web01@latest", restored)
        for image in (site.image("web01"), restored):
            done = verify(image)
            assert done.returncode == 0, done.stdout + done.stderr
        print(f"fio, with a pause of {pause:.2f} s; {len(site.points('web01'))} points")
        with restored.open("r+b") as file:
            file.seek(SIZE // 2 + 1234)
            file.write(b"X")
        assert verify(restored).returncode != 0
