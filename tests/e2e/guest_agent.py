"""The real guest agent in a small guest: Debian's qemu-ga with its libraries, in an initramfs."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.e2e.guest import Disk, Guest
from tests.e2e.guest_files import CACHE, GuestFilesError
from tests.e2e.loopdev import run_tool

_ROOT = CACHE.with_name("guest-agent")
_WANTED = ("qemu-guest-agent", "libglib2.0-0", "libnuma1", "libudev1", "liburing2", "libpcre2-8-0")
SCRIPT = """
mount -t ext4 /dev/vda /mnt || exit 1
export LD_LIBRARY_PATH=/bin
qemu-ga --method=virtio-serial --path=$(ls /dev/vport*p1) --statedir=/tmp &
agent=$!
(count=0; while [ ! -e /tmp/stop ]; do
    count=$((count + 1))
    dd if=/dev/urandom of=/mnt/new bs=4k count=3 conv=fsync 2>/dev/null || exit 1
    mv /mnt/new /mnt/file$((count % 30))
    [ $((count % 7)) != 0 ] || rm -f /mnt/file$(((count - 3) % 30))
    echo "WROTE $count"
done) &
writer=$!
read stop
touch /tmp/stop
wait $writer
kill $agent
wait $agent
umount /mnt
"""


def fetch_agent() -> Path:
    """Download and unpack the agent and its libraries, unless that was done; return the root.

    Raises:
        GuestFilesError: apt has none; the message says so.
    """
    if _ROOT.exists():
        return _ROOT
    partial = Path(tempfile.mkdtemp(dir=CACHE.parent, prefix="guest-agent-"))
    try:
        command = ["apt-get", "-q", "-o", "APT::Sandbox::User=", "download", *_packages()]
        done = subprocess.run(command, cwd=partial, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise GuestFilesError(f"apt-get download: {done.stderr.strip()}")
        for package in partial.glob("*.deb"):
            run_tool(["dpkg-deb", "-x", package, partial / "root"])
        (partial / "root").rename(_ROOT)
    finally:
        shutil.rmtree(partial)
    return _ROOT


def _packages() -> list[str]:
    """Return the names that this host's release has for what is wanted."""
    found = []
    for name in _WANTED:
        # Since 2024 some names end in t64.
        for known in (f"{name}t64", name):
            done = subprocess.run(
                ["apt-cache", "show", "--no-all-versions", known], capture_output=True, check=False
            )
            if done.returncode == 0 and done.stdout.strip():
                found.append(known)
                break
    return found


def agent_guest(image: Path, directory: Path, socket: Path) -> Guest:
    """Return a guest that writes to the ext4 on a disk, and whose agent is at a socket.

    It prints ``WROTE n``, and ends in order when it is sent a line.
    """
    root = fetch_agent()
    program = root / "usr/sbin/qemu-ga"
    packed = {path.name: path for path in root.glob("**/lib/**/*.so.*") if path.is_file()}
    places = ":".join(sorted({str(path.parent) for path in packed.values()}))
    needed = run_tool(["env", f"LD_LIBRARY_PATH={places}", "ldd", program])
    paths = [Path(name) for name in re.findall(r"(/\S+) \(0x", needed)]
    ours = [path for path in paths if path.is_relative_to(root)]
    options = ["-device", "virtio-serial-pci"]
    options += ["-chardev", f"socket,id=agent,path={socket},server=on,wait=off"]
    options += ["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
    return Guest(
        [Disk(image)], SCRIPT, directory, options=options, programs=[program, *ours],
        libraries=[path for path in paths if path not in ours], drivers=["virtio_console"],
    )  # fmt: skip
