"""What all routes of the control socket share: bodies that are read, errors that are answered."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vdiskfs.errors import (
    DamagedError,
    NotFoundError,
    RefusedError,
    StateError,
    UsageError,
    VaultUnreachableError,
    VdiskfsError,
)

log = logging.getLogger(__name__)

BODY_LIMIT = 64 * 1024
"""The largest request body, in bytes."""

_STATUS: tuple[tuple[type[VdiskfsError], int], ...] = (
    (UsageError, 400),
    (NotFoundError, 404),
    (StateError, 409),
    (RefusedError, 403),
    (VaultUnreachableError, 503),
    (DamagedError, 502),
)

Document: TypeAlias = Mapping[str, object]


def route(
    act: Callable[[Request], Awaitable[Document]],
) -> Callable[[Request], Awaitable[Response]]:
    """Return what answers a request with what ``act`` returns, or with its error."""

    async def answer(request: Request) -> Response:
        try:
            return JSONResponse(await act(request))
        except VdiskfsError as error:
            return _error(error, type(error).__name__)
        except Exception:
            log.exception("%s %s failed", request.method, request.url.path)
            failure = VdiskfsError("the daemon failed", hint="see its log")
            return _error(failure, "VdiskfsError", 500)

    return answer


def _error(error: VdiskfsError, kind: str, status: int | None = None) -> Response:
    if status is None:
        status = next((code for base, code in _STATUS if isinstance(error, base)), 500)
    body = {
        "kind": kind,
        "message": error.message,
        "hint": error.hint,
        "exit_code": error.exit_code,
    }
    return JSONResponse({"error": body}, status_code=status)


async def read_body(request: Request) -> dict[str, Any]:
    """Return the JSON object that a request brings; an empty one where it brings nothing."""
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > BODY_LIMIT:
            raise UsageError("the request is too large")
    if not data:
        return {}
    try:
        body = json.loads(data)
    except ValueError:
        raise UsageError("the request is not JSON") from None
    if not isinstance(body, dict):
        raise UsageError("the request is not a JSON object")
    return body


def read_text(body: dict[str, Any], what: str, limit: int) -> str:
    """Return a text of the body, of at most ``limit`` bytes; empty where it is absent."""
    text = body.get(what) or ""
    if not isinstance(text, str) or len(text.encode(errors="replace")) > limit:
        raise UsageError(f"{what}: a text of at most {limit} bytes is needed")
    return text


def read_count(text: str | None) -> int | None:
    """Return the number that a text says, None where it says nothing."""
    if text is None or text == "":
        return None
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"limit: {text!r} is not a number")
    return int(text)


def read_names(body: dict[str, Any]) -> list[str]:
    """Return the names of disks that a body brings: one at least."""
    names = body.get("disks")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise UsageError("disks: a list of names is needed")
    return names
