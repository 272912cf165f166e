"""`disks/`: the source directory as the daemon sees it.

Opens the source, finds files in it without the kernel having looked them up, and says
how full its file system is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from functools import partial

from vdiskfs import native
from vdiskfs.errors import LocalError, NotFoundError, RefusedError, UsageError
from vdiskfs.tree.directory import SourceDirectory, node_of
from vdiskfs.tree.hooks import DiskHooks
from vdiskfs.tree.node import DISKS_ID, Nodes
from vdiskfs.tree.source import Source, SourceNode, key_of
from vdiskfs.tree.sourcefile import SourceFile


def open_source(path: str) -> int:
    """Open the source directory; the descriptor sees it also when something is mounted over it.

    Raises:
        NotFoundError: there is no such directory.
        RefusedError: it may not be read.
        UsageError: it is not a directory.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such source directory") from None
    except NotADirectoryError:
        raise UsageError(f"{path}: the source is not a directory") from None
    except PermissionError as error:
        raise RefusedError(f"{path}: {error.strerror}") from None
    except OSError as error:
        raise LocalError(f"{path}: {error.strerror}") from None
    try:
        os.scandir(f"/proc/self/fd/{fd}").close()
    except OSError as error:
        os.close(fd)
        raise RefusedError(f"{path}: the source cannot be listed: {error.strerror}") from None
    return fd


class Disks:
    """The files of the source. Owns the descriptor given, from `open_source`."""

    def __init__(
        self, nodes: Nodes, core: native.Core, hooks: DiskHooks, fd: int, *, descriptors: int = 0
    ) -> None:
        self._source = Source(nodes, core, hooks, descriptors=descriptors)
        self._source.build = partial(node_of, self._source)
        self.root = SourceDirectory(self._source, key_of(os.fstat(fd)), stat.S_IFDIR, DISKS_ID)
        self.root.adopt(fd)
        self._source.enter(self.root)

    @property
    def descriptor(self) -> int:
        """The O_PATH descriptor of the source directory."""
        return self.root.descriptor

    @property
    def open_descriptors(self) -> int:
        """How many descriptors of the source are open."""
        return self._source.open_descriptors

    def find(self, path: str) -> SourceFile:
        """Return the regular file at a path below the source; the caller must `drop` it.

        Symbolic links are not followed.

        Raises:
            NotFoundError: there is none, or it is not a regular file.
        """
        directory: SourceNode = self.root
        *above, last = os.fsencode(path).split(b"/")
        try:
            for name in above:
                directory = _step(directory, name)
            found = _step(directory, last)
        except OSError as error:
            raise NotFoundError(f"{path}: {error.strerror} in the source directory") from None
        if not isinstance(found, SourceFile):
            raise NotFoundError(f"{path}: not a regular file")
        return self._held(found)

    def scan(self, matches: Callable[[str], bool]) -> list[SourceFile]:
        """Return the regular files whose path below the source matches; the caller drops each.

        A directory that cannot be read is left out (it shows in the mount as it is). Two
        names of one file give it once.
        """
        found: dict[int, SourceFile] = {}
        for file in self._walk(self.root):
            if file.id not in found and matches(file.path):
                found[file.id] = self._held(file)
        return list(found.values())

    def _walk(self, directory: SourceDirectory) -> Iterator[SourceFile]:
        with directory.pinned():
            try:
                with os.scandir(directory.proc_path) as entries:
                    names = sorted(
                        os.fsencode(entry.name)
                        for entry in entries
                        if entry.is_file(follow_symlinks=False)
                        or entry.is_dir(follow_symlinks=False)
                    )
            except PermissionError:
                return
            for name in names:
                node = directory.find_or_none(name)
                if isinstance(node, SourceDirectory):
                    yield from self._walk(node)
                elif isinstance(node, SourceFile):
                    yield node
                if node is not None:
                    self.root.nodes.settle(node)

    def _held(self, file: SourceFile) -> SourceFile:
        file.hold()
        _ = file.descriptor  # opened now: the inode cannot be used again while it is held
        return file

    def unnamed(self) -> list[SourceFile]:
        """Return the files without a name that a predecessor kept; the caller drops each."""
        found = []
        for number in self.root.nodes.handover.files:
            with contextlib.suppress(OSError):
                node = self.root.nodes.get(number)
                if isinstance(node, SourceFile) and not node.has_name:
                    found.append(self._held(node))
        return found

    def statfs(self) -> os.statvfs_result:
        """Return how full the source's file system is."""
        return os.statvfs(self.root.proc_path)

    def close(self) -> None:
        """Close the source; after the nodes were forgotten."""
        self.root.pins = 0
        self.root.nodes.settle(self.root)


def _step(directory: SourceNode, name: bytes) -> SourceNode:
    if not isinstance(directory, SourceDirectory):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if name in (b"", b".", b".."):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    return directory.find(name)
