"""The libvirt domains of this host: their disks, and whether they have a guest agent.

By ``virsh`` where that is, else from the files that libvirt keeps them in.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

CONFIGURATION = Path("/etc/libvirt/qemu")
_XML_LIMIT = 4 << 20
_LIMIT_S = 30
_AGENT = "org.qemu.guest_agent.0"


@dataclass(frozen=True)
class DomainDisk:
    """A disk of a domain: the name that its guest may know it by, its file, its format."""

    target: str
    file: str
    format: str


@dataclass(frozen=True)
class Domain:
    """A domain as it is defined."""

    name: str
    disks: tuple[DomainDisk, ...]
    has_agent: bool


def find_domains() -> tuple[list[Domain], str]:
    """Return the domains by name, and why there may be more, or nothing."""
    virsh = shutil.which("virsh")
    why = ""
    if virsh is not None:
        try:
            names = _virsh(virsh, "list", "--all", "--name").split("\n")
            texts = [_virsh(virsh, "dumpxml", "--domain", name) for name in names if name.strip()]
            return _parsed(texts), ""
        except OSError as error:
            why = f"libvirt does not answer: {error}"
    texts = []
    try:
        for path in sorted(CONFIGURATION.glob("*.xml")):
            with path.open(encoding="utf-8", errors="replace") as file:
                texts.append(file.read(_XML_LIMIT))
    except OSError as error:
        why = f"{CONFIGURATION}: {error.strerror}"
    return _parsed(texts), why


def _virsh(program: str, *words: str) -> str:
    """Run virsh.

    Raises:
        OSError: it failed.
    """
    try:
        done = subprocess.run(
            [program, "--readonly", *words], stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=_LIMIT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise OSError(f"nothing for {_LIMIT_S} s") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.split("\n") if line.strip()]
        raise OSError(lines[-1].removeprefix("error: ")[:200] if lines else "virsh failed")
    return done.stdout


def _parsed(texts: list[str]) -> list[Domain]:
    found = {}
    for text in texts:
        with contextlib.suppress(ET.ParseError):
            domain = _parse(text)
            if domain is not None:
                found[domain.name] = domain
    return [found[name] for name in sorted(found)]


def _parse(text: str) -> Domain | None:
    """Read one definition; None: it is none.

    It is root's own. A document type is refused all the same: definitions have none, and
    entities are what makes XML dangerous.
    """
    if len(text) >= _XML_LIMIT or "<!DOCTYPE" in text:
        return None
    root = ET.fromstring(text)  # noqa: S314
    name = root.findtext("name")
    if root.tag != "domain" or not name:
        return None
    disks = []
    for disk in root.iterfind("./devices/disk"):
        source, target, driver = disk.find("source"), disk.find("target"), disk.find("driver")
        file = None if source is None else source.get("file")
        if disk.get("device", "disk") == "disk" and file:
            disks.append(DomainDisk(
                "" if target is None else target.get("dev", ""), file,
                "raw" if driver is None else driver.get("type", "raw"),
            ))  # fmt: skip
    targets = root.iterfind("./devices/channel/target")
    return Domain(name, tuple(disks), any(one.get("name") == _AGENT for one in targets))
