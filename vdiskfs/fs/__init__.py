"""The FUSE side of names: pyfuse3's handlers, look-up counts, errnos. Nothing else."""

from __future__ import annotations

from vdiskfs.fs.operations import MAX_TASKS, OPTIONS, Operations

__all__ = ["MAX_TASKS", "OPTIONS", "Operations"]
