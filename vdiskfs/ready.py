"""How a daemon tells whoever started it that it is ready, or why it cannot be."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Mapping

from vdiskfs.errors import LocalError, VdiskfsError

log = logging.getLogger(__name__)


class Ready:
    """The one line that whoever started the daemon waits for."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self.told = False

    def tell(self, document: Mapping[str, object]) -> None:
        """Write the line, once."""
        if self._fd is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._fd, json.dumps(document).encode() + b"\n")
            os.close(self._fd)
            self._fd = None
        self.told = True


def report_failure(failure: BaseException, ready: Ready) -> int:
    """Tell whoever waits, or the log, why the daemon ends; return its exit status."""
    error = _first_error(failure)
    if error is None:
        log.error("the daemon failed", exc_info=failure)
        error = LocalError(f"the daemon failed: {failure!r}")
    body = {
        "kind": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "exit_code": error.exit_code,
    }
    if ready.told:
        log.error("%s", error)
    else:
        sys.stderr.write(f"vdiskfs: {error}\n")
    ready.tell({"error": body})
    return error.exit_code


def describe_failure(failure: BaseException) -> str:
    """Return one line that says why the daemon ends."""
    error = _first_error(failure)
    if error is not None:
        return str(error)
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return f"{type(failure).__name__}: {failure}"


def _first_error(failure: BaseException) -> VdiskfsError | None:
    if isinstance(failure, VdiskfsError):
        return failure
    if isinstance(failure, BaseExceptionGroup):
        found = [_first_error(one) for one in failure.exceptions]
        return next((one for one in found if one is not None), None)
    return None
