"""What ``vdiskfs doctor`` looks at on this host. Nothing here changes anything."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import stat
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from vdiskfs.units import format_size

FUSE = Path("/dev/fuse")
FUSE_CONF = Path("/etc/fuse.conf")

QEMU_SYSTEM = "qemu-system-x86_64"

# What a host needs at least, and what it should have: a spool of some minutes of writes.
SPACE_NEEDED = 64 << 20
SPACE_WANTED = 1 << 30
# A disk takes about 10 descriptors, a request to the vault one.
FILES_WANTED = 4096

_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronized


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``missing`` is needed and not there; a ``warning`` costs something."""

    name: str
    status: Literal["ok", "warning", "missing"]
    detail: str
    fix: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the finding as ``--json`` prints it."""
        return asdict(self)


def host_findings(state: Path) -> list[Finding]:
    """Look at this host; ``state`` is where the state directory is, or would be."""
    checks: list[Callable[[], Finding]] = [
        check_kernel,
        check_fuse,
        check_helper,
        check_other_users,
        lambda: check_space("state directory", state),
        check_clock,
        check_files,
        check_qemu,
        check_machines,
    ]
    return [check() for check in checks]


def check_kernel(release: str | None = None) -> Finding:
    """Look at the kernel's version, for what FUSE can do in it."""
    release = os.uname().release if release is None else release
    match = re.match(r"(\d+)\.(\d+)", release)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version < (6, 6):
        return Finding(
            "kernel", "warning", f"{release}: no mmap of disks; requests under way when the daemon"
            " dies or is upgraded fail with EIO",
            "set allow_mmap = false, give QEMU werror=stop,rerror=stop, or run Linux 6.9 or later",
        )  # fmt: skip
    if version < (6, 9):
        return Finding(
            "kernel", "warning",
            f"{release}: requests under way when the daemon dies or is upgraded fail with EIO",
            "give QEMU werror=stop,rerror=stop, or run Linux 6.9 or later",
        )  # fmt: skip
    return Finding("kernel", "ok", release)


def check_fuse() -> Finding:
    """Look for the device through which a file system is served."""
    try:
        if not stat.S_ISCHR(FUSE.stat().st_mode):
            raise FileNotFoundError
    except OSError:
        fix = "modprobe fuse; in a container: --device /dev/fuse --cap-add SYS_ADMIN"
        return Finding("fuse device", "missing", f"{FUSE} is not there", fix)
    if not os.access(FUSE, os.R_OK | os.W_OK):
        return Finding("fuse device", "missing", f"{FUSE} is not open to you", f"chmod 666 {FUSE}")
    return Finding("fuse device", "ok", str(FUSE))


def check_helper() -> Finding:
    """Look for the program that mounts for ordinary users."""
    if os.geteuid() == 0:
        return Finding("fusermount3", "ok", "not needed by root")
    found = shutil.which("fusermount3")
    if found is None:
        return Finding("fusermount3", "missing", "not installed", "apt install fuse3")
    info = Path(found).stat()
    if not (info.st_mode & stat.S_ISUID and info.st_uid == 0):
        fix = f"as root: chown root {found}; chmod u+s {found}"
        return Finding("fusermount3", "missing", f"{found} does not run as root", fix)
    return Finding("fusermount3", "ok", found)


def check_other_users() -> Finding:
    """Look whether ordinary users may let others in."""
    if os.geteuid() == 0:
        return Finding("allow other users", "ok", "root may")
    if allows_other_users():
        return Finding("allow other users", "ok", f"user_allow_other in {FUSE_CONF}")
    fix = f"for --allow-other only: add the line user_allow_other to {FUSE_CONF}"
    return Finding("allow other users", "warning", f"no user_allow_other in {FUSE_CONF}", fix)


def allows_other_users() -> bool:
    """Tell whether ordinary users may let other users into their mounts."""
    try:
        lines = FUSE_CONF.read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def check_space(name: str, path: Path) -> Finding:
    """Look at the free space where a directory is, or would be made."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        info = os.statvfs(place)
    except OSError as error:
        return Finding(name, "missing", f"{path}: {error.strerror}", "use another directory")
    free = info.f_bavail * info.f_frsize
    detail = f"{path}: {format_size(free)} free"
    if not os.access(place, os.W_OK | os.X_OK):
        return Finding(name, "missing", f"{place}: you may not write there", "use another one")
    if free < SPACE_NEEDED:
        return Finding(name, "missing", detail, "free some space, or use another directory")
    if free < SPACE_WANTED:
        return Finding(name, "warning", detail, f"have {format_size(SPACE_WANTED)} or more free")
    return Finding(name, "ok", detail)


def check_clock() -> Finding:
    """Ask the kernel whether the clock is synchronized."""
    # struct timex of zeros asks and changes nothing; it has 208 bytes on 64-bit hosts.
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(512))
    if state < 0:
        return Finding("clock", "ok", "cannot be told here")
    if state == _TIME_ERROR:
        fix = "run chrony or systemd-timesyncd: points are named by this clock"
        return Finding("clock", "warning", "not synchronized", fix)
    return Finding("clock", "ok", "synchronized")


def check_files() -> Finding:
    """Look how many files the daemon may have open; it raises its own limit to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= FILES_WANTED:
        shown = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
        return Finding("open files", "ok", f"{shown} allowed")
    fix = f"raise it to {FILES_WANTED}: ulimit -Hn, or LimitNOFILE= of the service"
    return Finding("open files", "warning", f"only {hard} allowed", fix)


def check_qemu() -> Finding:
    """Look which QEMU is there. None is needed to protect disks."""
    program = shutil.which("qemu-img")
    if program is None:
        return Finding("qemu", "ok", "not installed, and not needed to protect disks")
    try:
        result = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return Finding("qemu", "warning", f"{program} does not run", "install it again")
    line = (result.stdout.splitlines() or ["unknown version"])[0]
    return Finding("qemu", "ok", re.sub(r"\s*\(.*", "", line))


def check_machines() -> Finding:
    """Look whether a failover can start machines here, and with KVM: QEMU is started to see."""
    program = shutil.which(QEMU_SYSTEM)
    if program is None:
        return Finding(
            "machines", "warning", f"no {QEMU_SYSTEM}: a failover here starts them by hooks only",
            "apt install qemu-system-x86",
        )  # fmt: skip
    commands = '{"execute": "qmp_capabilities"}{"execute": "quit"}'
    words = [program, "-nodefaults", "-no-user-config", "-display", "none", "-S", "-m", "16"]
    words += ["-machine", "q35", "-cpu", "max", "-qmp", "stdio", "-accel"]
    works = {}
    for accel in ("kvm", "tcg"):
        try:
            result = subprocess.run(
                [*words, accel], input=commands, capture_output=True, text=True, timeout=30,
                check=False,
            )  # fmt: skip
            works[accel] = result.returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            works[accel] = False
        if works[accel]:
            break
    if works.get("kvm"):
        return Finding("machines", "ok", f"{program} starts with KVM")
    if works.get("tcg"):
        return Finding(
            "machines", "warning", f"{program} does not start with KVM: machines will be slow",
            "switch virtualization on in the firmware, and give this user /dev/kvm",
        )  # fmt: skip
    return Finding("machines", "warning", f"{program} does not run", "install it again")
