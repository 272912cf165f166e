"""Images of files of the source that are not tracked: no disks, or none for the moment.

One image for each open file, over one descriptor. It is closed with the file's last handle.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from vdiskfs import native
from vdiskfs.native import ImageFlags
from vdiskfs.tree import SourceFile


class UntrackedImages:
    """The untracked images of one mount. Trio thread only."""

    def __init__(self, core: native.Core, next_cookie: Callable[[], int]) -> None:
        """Begin with none; ``next_cookie`` numbers images."""
        self._core = core
        self._next_cookie = next_cookie
        self._images: dict[SourceFile, native.Image] = {}
        self.refused: set[SourceFile] = set()
        """Files that take no writes, whatever the host allows."""

    def image_for(self, file: SourceFile, *, writable: bool) -> native.Image:
        """Return the file's image; another one than before if that cannot be written.

        Raises:
            OSError: the host refused.
        """
        before = self._images.get(file)
        if before is not None and not (writable and before.flags & ImageFlags.READONLY):
            return before
        image = self.open(file, writable=writable)
        if before is not None:
            before.close()
        self._images[file] = image
        return image

    def open(self, file: SourceFile, *, writable: bool) -> native.Image:
        """Return a new image over the file, the caller's; it can be written if the host allows.

        Raises:
            OSError: the host refused.
        """
        refused = file in self.refused
        if refused and writable:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), file.path)
        fd, can_write = file.open_file(writable=writable)
        try:
            flags = ImageFlags.DIRECT
            if refused or not can_write:
                flags |= ImageFlags.READONLY
            return native.Image(self._core, fd, flags, self._next_cookie())
        finally:
            os.close(fd)

    def take_writable(self, file: SourceFile) -> native.Image | None:
        """Give away the image that guests have open, if it can be written."""
        image = self._images.get(file)
        if image is None or image.flags & ImageFlags.READONLY:
            return None
        return self._images.pop(file)

    def put(self, file: SourceFile, image: native.Image) -> None:
        """Take an image that was a disk's and is open still."""
        self._images[file] = image

    def close_last(self, file: SourceFile) -> None:
        """The file's last handle is gone."""
        image = self._images.pop(file, None)
        if image is not None:
            image.close()

    def sync(self) -> None:
        """Make durable what was written. Blocks.

        Raises:
            OSError: the host could not.
        """
        for image in list(self._images.values()):
            if not image.flags & ImageFlags.READONLY:
                image.sync_internal()

    def close(self) -> None:
        """Close all: the mount is gone."""
        for image in self._images.values():
            image.close()
        self._images.clear()
