"""Flags and kinds of the C core, as Python's enumerations. Part of ``vdiskfs.native``."""

from __future__ import annotations

from enum import IntEnum, IntFlag

from vdiskfs._native import lib


class MountFlags(IntFlag):
    """How to mount."""

    NONE = 0
    ALLOW_OTHER = lib.VDF_MOUNT_ALLOW_OTHER


class CoreFlags(IntFlag):
    """What the connection allows."""

    NONE = 0
    ALLOW_MMAP = lib.VDF_CORE_ALLOW_MMAP
    ASK_ROOM = lib.VDF_CORE_ASK_ROOM


class ImageFlags(IntFlag):
    """What an image is; see ``vdf_image_create``."""

    NONE = 0
    READONLY = lib.VDF_IMAGE_READONLY
    DIRECT = lib.VDF_IMAGE_DIRECT
    KEEP_CACHE = lib.VDF_IMAGE_KEEP_CACHE
    LAZY = lib.VDF_IMAGE_LAZY


class EventKind(IntEnum):
    """What the core has to say."""

    WANT = lib.VDF_EVENT_WANT
    SEEK = lib.VDF_EVENT_SEEK
    DIRTY = lib.VDF_EVENT_DIRTY
    ABANDONED = lib.VDF_EVENT_ABANDONED
    SYNC_FAILED = lib.VDF_EVENT_SYNC_FAILED
    ENDED = lib.VDF_EVENT_ENDED
    NODE = lib.VDF_EVENT_NODE
    INTENT_VOID = lib.VDF_EVENT_INTENT_VOID
    NO_ROOM = lib.VDF_EVENT_NO_ROOM
