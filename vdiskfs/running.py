"""What code runs: read once, as a package may be replaced under a process."""

from __future__ import annotations

from importlib.metadata import version

VERSION = version("vdiskfs")
