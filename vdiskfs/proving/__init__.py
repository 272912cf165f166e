"""Proving that a recovery point is what it is taken for: read back, and its file systems checked.

``stored`` is known of every point: the vault has acknowledged it. ``hashed``: its chain is
complete, and every page was read back and is what was sealed. ``checked``: that, and the file
systems in it are whole.
"""

from vdiskfs.proving.filesystems import Finding, check_image, let_go, verdict
from vdiskfs.proving.proof import Outcome, keep_proof, prove_point
from vdiskfs.proving.reading import read_back

__all__ = [
    "Finding",
    "Outcome",
    "check_image",
    "keep_proof",
    "let_go",
    "prove_point",
    "read_back",
    "verdict",
]
