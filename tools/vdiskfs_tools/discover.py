"""``vdiskfs discover``: what on this host could be protected, and the commands to do it."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

import fnmatch
import json
import os
import shlex
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vdiskfs.errors import NotFoundError, RefusedError, VdiskfsError
from vdiskfs.registry import MountEntry, mount_entries
from vdiskfs_tools.call import Call, Command, FilePath
from vdiskfs_tools.output import counted, format_bytes

if TYPE_CHECKING:
    from vdiskfs_tools.domains import Domain


@dataclass(frozen=True)
class Image:
    """A file that would be a disk. ``problem``: why it cannot be protected as it is."""

    file: str
    disk: str
    size: int
    allocated: int
    domain: str | None
    protected: bool
    problem: str | None


@click.command(cls=Command)
@click.argument("source", required=False, type=FilePath())
@click.pass_obj
def discover(call: Call, *, source: str | None) -> None:
    """Find images in SOURCE and the disks of libvirt's domains, and say how to protect them.

    Without SOURCE: the source directories of the mounts here, and those of the domains.

    Example:
        vdiskfs discover /srv/images
    """
    from vdiskfs_tools.domains import find_domains

    domains, why = find_domains()
    entries = mount_entries()
    places = _places(call, source, entries, domains)
    images = _images(call, places, entries, domains)
    commands = _commands(images, domains, entries)
    settings = _settings(images, domains)
    document = {
        "images": [asdict(one) for one in images],
        "domains": [
            {"name": one.name, "agent": one.has_agent, "disks": [asdict(d) for d in one.disks]}
            for one in domains
        ],
        "commands": commands, "settings": settings, "libvirt_error": why or None,
    }  # fmt: skip
    if call.out.document(document):
        return
    if why:
        call.out.say(why)
    if not images:
        where = ", ".join(map(str, places)) or "this host"
        call.out.say(f"{where}: no images; name their directory: vdiskfs discover SOURCE")
        return
    rows = [
        (
            one.file,
            format_bytes(one.size),
            format_bytes(one.allocated),
            one.domain or "-",
            _state(one),
        )
        for one in images
    ]
    call.out.table(("IMAGE", ">SIZE", ">ALLOCATED", "DOMAIN", "STATE"), rows)
    if commands:
        call.out.say(f"{counted(len(commands), 'command')} to protect the others:")
    for line in commands:
        call.out.line(line)
    if settings:
        call.out.say("for application-consistent points, in vdiskfs.conf(5):")
    for line in settings:
        call.out.line(line)


def _state(image: Image) -> str:
    return "protected" if image.protected else image.problem or "not protected"


def _places(
    call: Call, source: str | None, entries: Sequence[MountEntry], domains: Sequence[Domain]
) -> list[Path]:
    """Return the directories to look at, each once; what is missing is said and left out."""
    if source is not None:
        place = Path(source).resolve()
        if not place.is_dir():
            raise NotFoundError(f"{source}: no such directory")
        if not os.access(place, os.R_OK | os.X_OK):
            raise RefusedError(f"{source}: may not be read by you")
        return [place]
    found = [entry.source for entry in entries if entry.source is not None]
    # What is below a mount is a live disk of its source.
    mounts = [f"{entry.mountpoint}/" for entry in entries]
    for domain in domains:
        for disk in domain.disks:
            if any(disk.file.startswith(mount) for mount in mounts):
                continue
            if Path(disk.file).parent.is_dir():
                found.append(str(Path(disk.file).parent))
            else:
                call.out.say(f"{disk.file} (domain {domain.name}): left out: no such directory")
    return [Path(one) for one in dict.fromkeys(found)]


def _images(
    call: Call, places: Sequence[Path], entries: Sequence[MountEntry], domains: Sequence[Domain]
) -> list[Image]:
    """Return the images in directories, below them too, each once, by directory and path."""
    from vdiskfs.config import load_config

    patterns = load_config(None).patterns
    protected = _protected(entries)
    by_file = _domains_of(domains, entries)
    found: dict[Path, Image] = {}
    for place in places:
        paths = [
            path
            for path in _files(call, place)
            if path in protected or any(fnmatch.fnmatchcase(path.name, one) for one in patterns)
        ]
        for path in paths:
            try:
                info = path.lstat()
            except OSError as error:
                _skip(call, error)
                continue
            if path in found or not stat.S_ISREG(info.st_mode):
                continue
            found[path] = Image(
                str(path), protected.get(path, path.stem), info.st_size, info.st_blocks * 512,
                by_file.get((info.st_dev, info.st_ino)), path in protected,
                None if path in protected else _problem(path),
            )  # fmt: skip
    return list(found.values())


def _files(call: Call, place: Path) -> Iterator[Path]:
    """Give all files below a directory, by path; what cannot be read is said and left out."""
    for directory, folders, names in os.walk(place, onerror=lambda error: _skip(call, error)):
        folders.sort()
        yield from (Path(directory, name) for name in sorted(names))


def _skip(call: Call, error: OSError) -> None:
    call.out.say(f"{error.filename}: left out: {error.strerror}")


def _domains_of(
    domains: Sequence[Domain], entries: Sequence[MountEntry]
) -> dict[tuple[int, int], str]:
    """Return whose disk a file is, by device and inode; also through a mount."""
    found = {}
    for domain in domains:
        for disk in domain.disks:
            file = disk.file
            for entry in entries:
                if entry.source is not None and file.startswith(f"{entry.mountpoint}/disks/"):
                    file = f"{entry.source}/{file.removeprefix(f'{entry.mountpoint}/disks/')}"
                    break
            try:
                info = Path(file).stat()
            except OSError:
                continue
            found[info.st_dev, info.st_ino] = domain.name
    return found


def _protected(entries: Sequence[MountEntry]) -> dict[Path, str]:
    """Return the files that mounts protect, each with its disk's name."""
    from vdiskfs_tools.client import Client

    found = {}
    for entry in entries:
        if entry.source is None:
            continue
        try:
            with Client(entry) as client:
                document: Any = client.get("disks")
        except VdiskfsError:
            continue  # its daemon does not answer: doctor says so
        for row in document["disks"]:
            if row.get("here") and row.get("file"):
                found[Path(entry.source, row["file"])] = str(row["name"])
    return found


def _problem(path: Path) -> str | None:
    """Say why an image cannot be protected as it is."""
    from vdiskfs.state import is_in_use

    if not os.access(path, os.R_OK | os.W_OK):
        return "you may not read and write it"
    try:
        used = is_in_use(str(path))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "in use: its machine is to be stopped, and started from the mount" if used else None


def _commands(
    images: Sequence[Image], domains: Sequence[Domain], entries: Sequence[MountEntry]
) -> list[str]:
    """Return what to type, in order."""
    lines = []
    left = [image for image in images if not image.protected]
    mounted = {entry.source: entry for entry in entries if entry.source is not None}
    folders = {Path(image.file).parent for image in left}
    for image in left:
        path = Path(image.file)
        above = next((str(one) for one in path.parents if str(one) in mounted), None)
        if above is None:
            # One mount for a tree: a directory that another one hides cannot be mounted.
            top = [one for one in path.parents if one in folders][-1]
            words = ["vdiskfs", "mount", str(top), "MOUNTPOINT", "--vault", "URL", "--over"]
        else:
            words = ["vdiskfs", "-m", mounted[above].mountpoint, "disk", "protect"]
            words.append(str(path.relative_to(above)))
        lines.append(shlex.join(words))
    for domain in domains:
        names = [image.disk for image in images if image.domain == domain.name]
        if len(names) > 1:
            lines.append(shlex.join(["vdiskfs", "group", "create", domain.name, *names]))
    return list(dict.fromkeys(lines))


def _settings(images: Sequence[Image], domains: Sequence[Domain]) -> list[str]:
    """Return the lines of vdiskfs.conf(5) by which disks rest whose guests have an agent."""
    agents = {domain.name for domain in domains if domain.has_agent}
    lines = []
    for image in images:
        if image.domain in agents:
            # JSON's strings and keys are TOML's, too.
            lines += [
                f"[quiesce.{json.dumps(image.disk)}]",
                f"libvirt = {json.dumps(image.domain)}",
            ]
    return lines
