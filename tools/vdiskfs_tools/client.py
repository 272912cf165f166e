"""The client of a mount's daemon: HTTP over its Unix socket.

An error that the daemon answers is raised as the class it was there. A daemon that does
not answer, or not as agreed, is a ``LocalError``: one line, exit 1.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Self
from urllib.parse import quote

import httpx

from vdiskfs.errors import LocalError
from vdiskfs.registry import MountEntry, address_of
from vdiskfs_tools.answers import error_from

CONNECT_S = 5.0
ANSWER_S = 30.0


class Client:
    """A connection to one daemon. Closed by ``close`` or at the end of a ``with``.

    Raises:
        LocalError: nobody listens there.
    """

    def __init__(self, entry: MountEntry, *, answer_s: float | None = ANSWER_S) -> None:
        self.entry = entry
        with self._translated(), ExitStack() as opened:
            address = opened.enter_context(address_of(entry.socket))
            _check_listens(address)
            self._opened = opened.pop_all()
        self._http = httpx.Client(
            base_url="http://vdiskfs",
            # No TLS on a Unix socket: else httpx would read the host's certificates.
            transport=httpx.HTTPTransport(uds=address, verify=False),
            timeout=httpx.Timeout(answer_s, connect=CONNECT_S),
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()
        self._opened.close()

    def get(self, *path: str, **params: str | int | None) -> dict[str, Any]:
        """Ask; ``path`` is given in parts, which are quoted here.

        Raises:
            VdiskfsError: what the daemon answered, or that it did not.
        """
        given = {key: value for key, value in params.items() if value is not None}
        with self._translated():
            return _document(self._http.get(_url(path), params=given))

    def post(
        self, *path: str, body: Mapping[str, Any] | None = None, patient: bool = False
    ) -> dict[str, Any]:
        """Have something done; ``patient`` waits as long as it takes.

        Raises:
            VdiskfsError: what the daemon answered, or that it did not.
        """
        timeout = httpx.Timeout(None, connect=CONNECT_S) if patient else httpx.USE_CLIENT_DEFAULT
        with self._translated():
            return _document(self._http.post(_url(path), json=dict(body or {}), timeout=timeout))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what can go wrong between the two processes into one error."""
        where = f"{self.entry.mountpoint}: its daemon (process {self.entry.pid})"
        hint = f"see its log in {self.entry.state}"
        try:
            yield
        except httpx.TimeoutException:
            raise LocalError(f"{where} does not answer", hint=hint) from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise LocalError(f"{where} does not answer: {error}", hint=hint) from None
        except (ValueError, TypeError, RecursionError):
            raise LocalError(f"{where} answers what is not understood", hint=hint) from None


def _check_listens(address: str) -> None:
    """Refuse a socket on which nobody listens, without leaving one of ours open."""
    with socket.socket(socket.AF_UNIX) as trial:
        trial.settimeout(CONNECT_S)
        trial.connect(address)


def _url(path: tuple[str, ...]) -> str:
    return "/v1/" + "/".join(quote(part, safe="") for part in path)


def _document(response: httpx.Response) -> dict[str, Any]:
    """Return the document of an answer, or raise the error in it."""
    document = response.json()
    if not response.is_success:
        raise error_from(document, f"the daemon answers with status {response.status_code}")
    if not isinstance(document, dict):
        raise TypeError("not an object")
    return document
