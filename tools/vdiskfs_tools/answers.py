"""What a daemon says when it could not do what was asked: on its socket, or while it starts."""

from __future__ import annotations

from vdiskfs import errors
from vdiskfs.errors import LocalError, VdiskfsError


def error_from(document: object, origin: str) -> VdiskfsError:
    """Return the error that a daemon's answer describes, as the class it was there.

    ``origin`` says what happened, for an answer that does not.
    """
    body = document.get("error") if isinstance(document, dict) else None
    if not isinstance(body, dict) or not isinstance(body.get("message"), str):
        return LocalError(f"{origin} and gives no reason")
    hint = body.get("hint")
    kind = getattr(errors, str(body.get("kind")), None)
    if not (isinstance(kind, type) and issubclass(kind, VdiskfsError)):
        kind = LocalError
    return kind(body["message"], hint=hint if isinstance(hint, str) else "")
