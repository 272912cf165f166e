"""A webhook: one POST of JSON for each event, signed where there is a secret.

The body and the signature are described in vdiskfs-monitoring(7).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
from types import TracebackType
from typing import Self

import httpx

from vdiskfs.events import Event, event_document
from vdiskfs.running import VERSION
from vdiskfs.sinks.queue import SinkError
from vdiskfs.watchsettings import WebhookConfig

SIGNATURE = "X-Vdiskfs-Signature"
"""``sha256=`` and the HMAC-SHA-256 of the body in hexadecimal digits."""

_PATIENT = frozenset({408, 425, 429})


class WebhookSink:
    """Sends to one URL; entered while it is used."""

    name = "webhook"
    gather_s = 0.0
    batch = 1

    def __init__(self, config: WebhookConfig, secret: str, site: str) -> None:
        """Take the settings; nothing is sent yet."""
        self._config = config
        self._secret = secret.encode()
        self._site = site
        self._client: httpx.AsyncClient | None = None

    async def __aenter__(self) -> Self:
        """Open the client: connections are kept."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def deliver(self, events: list[Event], dropped: int) -> str:
        """See `Sink`."""
        body = json.dumps(payload(events[0], dropped, self._site)).encode()
        headers = {"Content-Type": "application/json", "User-Agent": f"vdiskfs/{VERSION}"}
        if self._secret:
            headers[SIGNATURE] = signature(self._secret, body)
        if self._client is None:
            # Made when it is first needed: it reads the host's certificates.
            self._client = httpx.AsyncClient(timeout=self._config.timeout_s)
        try:
            answer = await self._client.post(self._config.url, content=body, headers=headers)
        except httpx.TimeoutException:
            raise SinkError(f"no answer in {self._config.timeout_s:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise SinkError(f"no answer: {str(error) or type(error).__name__}") from None
        if answer.is_success:
            return f"answered {answer.status_code}"
        final = answer.status_code < 500 and answer.status_code not in _PATIENT
        raise SinkError(f"answered {answer.status_code} {answer.reason_phrase}", final=final)


def signature(secret: bytes, body: bytes) -> str:
    """Return the value of the header `SIGNATURE`."""
    return f"sha256={hmac.new(secret, body, hashlib.sha256).hexdigest()}"


def payload(event: Event, dropped: int, site: str) -> dict[str, object]:
    """Return the body's document."""
    return {
        "version": 1,
        "site": site,
        "host": socket.gethostname(),
        "dropped": dropped,
        "event": event_document(event),
    }
