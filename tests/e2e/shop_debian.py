"""The shop on a real Debian: systemd, logind for the power button, Debian's sqlite3 as a service.

The root file system is made by mmdebstrap once, below .venv/guest, and is the disk of the guest;
only the kernel and what it needs to find its disk come from outside.
"""

from __future__ import annotations

import shutil
import subprocess
import uuid
from pathlib import Path

from tests.e2e.guest_files import CACHE, GuestFilesError, initramfs, kernel
from tests.e2e.loopdev import run_tool
from tests.e2e.shop import DRIVERS, MIB, SAY, Shop, make_ballast, sell

ROOT = CACHE / "debian-agent.tar"
SUITE = "bookworm"
PACKAGES = ("systemd", "systemd-sysv", "udev", "dbus", "sqlite3", "qemu-guest-agent")
FIND_ROOT = """
say "MOUNTING"
mount -t ext4 /dev/vda2 /mnt || fail "mount"
"""
SERVICE = """
[Unit]
Description=A shop
After=local-fs.target dbus.service systemd-logind.service
[Service]
ExecStart=/usr/local/sbin/shop
ExecStop=/bin/sh -c "touch /run/stop; while kill -0 $MAINPID; do sleep 0.1; done"
TimeoutStopSec=120
[Install]
WantedBy=multi-user.target
"""


class DebianShop(Shop):
    """A guest whose disk is its root file system."""

    database = "/srv/shop.db"
    memory = 512 << 20
    size = 768 * MIB
    limit_s = 500.0

    def make_boot(self, directory: Path) -> None:
        """See `Shop`."""
        directory.mkdir(mode=0o755)
        shutil.copyfile(kernel(), directory / "vmlinuz")
        drivers = (*DRIVERS, "autofs4", "virtio_console")
        initramfs(SAY + FIND_ROOT, directory / "initrd", drivers=drivers, switch_root=True)

    def fill(self, directory: Path) -> None:
        """See `Shop`."""
        run_tool(["tar", "-xpf", fetch_root(), "-C", directory, "--numeric-owner"])
        directory.chmod(0o755)
        # Without one it would ask, at its first start, what only a person can say.
        (directory / "etc/machine-id").write_text(f"{uuid.uuid4().hex}\n")
        make_ballast(directory / "srv")
        program = directory / "usr/local/sbin/shop"
        script = SAY + "home=/srv run=/run\n" + sell() + 'say "SHOP CLOSED after $last"\n'
        program.write_text(f"#!/bin/sh\n{script}")
        program.chmod(0o755)
        units = directory / "etc/systemd/system"
        (units / "shop.service").write_text(SERVICE)
        wants = units / "multi-user.target.wants"
        wants.mkdir(exist_ok=True)
        (wants / "shop.service").symlink_to("/etc/systemd/system/shop.service")


def fetch_root() -> Path:
    """Make Debian's root file system, unless that was done; return it as an archive.

    Raises:
        GuestFilesError: it cannot be made; the message says why.
    """
    if ROOT.exists():
        return ROOT
    if shutil.which("mmdebstrap") is None:
        raise GuestFilesError("no mmdebstrap on this host: apt-get install mmdebstrap")
    partial = ROOT.with_name("debian-agent.partial.tar")
    words = ["mmdebstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
    words += [
        f"--dpkgopt=path-exclude=/usr/share/{name}/*"
        for name in ("doc", "man", "locale", "zoneinfo")
    ]
    done = subprocess.run(
        [*words, SUITE, partial], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=1800, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        partial.unlink(missing_ok=True)
        said = done.stdout.decode(errors="replace").strip().splitlines()[-5:]
        raise GuestFilesError("mmdebstrap: " + "; ".join(said))
    partial.rename(ROOT)
    return ROOT
