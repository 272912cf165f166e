"""Where an Azure storage account is, and how requests to it are signed. No I/O.

The account comes from the environment, see vdiskfs(1). Secrets stay in here: nothing of
them is in a repr, an error or a log line. The one exception is a SAS token, which the
service wants in the URL; so no URL is ever shown (``connection``).

Shared Key: "Authorize with Shared Key" of the service's REST reference, for versions of
2015-02-21 and later.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import importlib
import ipaddress
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Protocol
from urllib.parse import quote, unquote, urlsplit

from vdiskfs.errors import RefusedError, UsageError

# The newest that every Azurite of the last years knows; nothing later is used.
API_VERSION = "2021-12-02"
_SCOPE = "https://storage.azure.com/.default"
_TOKEN_MARGIN_S = 300
# The emulator's account and key are public constants, the same on every machine.
_EMULATOR = (
    "AccountName=devstoreaccount1;"
    "AccountKey=Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==;"
    "BlobEndpoint=http://127.0.0.1:10000/devstoreaccount1"
)
_HINT = (
    "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT and one of "
    "AZURE_STORAGE_KEY, AZURE_STORAGE_SAS_TOKEN"
)


@dataclass
class Request:
    """One request, before it is signed. ``path`` begins with a slash and is not encoded."""

    method: str
    path: str
    query: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    length: int = 0


class Credential(Protocol):
    """What signs a request: returns the query to append, changes the headers."""

    def sign(self, request: Request, resource: str) -> str:
        """Sign; may block (a token is fetched), so call it in a thread."""
        ...


class SharedKey:
    """The account's key."""

    def __init__(self, account: str, key: str) -> None:
        try:
            self._key = base64.b64decode(key, validate=True)
        except (binascii.Error, ValueError):
            self._key = b""
        if not self._key:
            # Raised here and not above: the other error's text would hold the key.
            raise UsageError("AZURE_STORAGE_KEY is not base64", hint="copy the whole key") from None
        self._account = account

    def sign(self, request: Request, resource: str) -> str:
        """Add the Authorization header."""
        headers = {name.lower(): value for name, value in request.headers.items()}
        ours = sorted(name for name in headers if name.startswith("x-ms-"))
        lines = [
            request.method,
            headers.get("content-encoding", ""),
            headers.get("content-language", ""),
            str(request.length) if request.length else "",
            headers.get("content-md5", ""),
            headers.get("content-type", ""),
            "",  # Date: x-ms-date is sent
            headers.get("if-modified-since", ""),
            headers.get("if-match", ""),
            headers.get("if-none-match", ""),
            headers.get("if-unmodified-since", ""),
            headers.get("range", ""),
            *(f"{name}:{headers[name]}" for name in ours),
            f"/{self._account}{resource}",
            *(f"{name}:{value}" for name, value in sorted(request.query.items())),
        ]
        digest = hmac.digest(self._key, "\n".join(lines).encode(), "sha256")
        signature = base64.b64encode(digest).decode()
        request.headers["Authorization"] = f"SharedKey {self._account}:{signature}"
        return ""


class SasToken:
    """A shared access signature: a query string that grants something for a while."""

    def __init__(self, token: str) -> None:
        self._token = token.strip().lstrip("?&")
        if "sig=" not in self._token or any(c.isspace() for c in self._token):
            raise UsageError("AZURE_STORAGE_SAS_TOKEN is not a shared access signature", hint=_HINT)

    def sign(self, request: Request, resource: str) -> str:
        """Return the token, which goes into the query as it is."""
        return self._token


class TokenSource(Protocol):
    """The part of an azure-identity credential that is used; tokens have two fields."""

    def get_token(self, *scopes: str) -> AccessToken:
        """Fetch a token, or return a kept one."""
        ...


class AccessToken(Protocol):
    """A bearer token and the second since 1970 when it ends."""

    @property
    def token(self) -> str:
        """The secret."""
        ...

    @property
    def expires_on(self) -> int:
        """The end, in seconds since 1970."""
        ...


class Bearer:
    """A managed identity, a service principal, ``az login``: whatever azure-identity finds."""

    def __init__(self, source: TokenSource) -> None:
        self._source = source
        self._token: AccessToken | None = None

    def sign(self, request: Request, resource: str) -> str:
        """Add the Authorization header; fetches a token when the last one is nearly over."""
        token = self._token
        if token is None or token.expires_on - _TOKEN_MARGIN_S < time.time():
            failure = ""
            try:
                token = self._token = self._source.get_token(_SCOPE)
            except Exception as error:  # noqa: BLE001 - a foreign library with many
                failure = type(error).__name__
            if failure:
                # Outside of the handler: the other error's text may quote a secret.
                raise RefusedError(
                    f"azure-identity found no usable credential ({failure})", hint=_HINT
                )
        assert token is not None
        request.headers["Authorization"] = f"Bearer {token.token}"
        return ""


@dataclass(frozen=True)
class Account:
    """An endpoint and what signs. ``endpoint`` has no slash at its end."""

    name: str
    endpoint: str
    credential: Credential = field(repr=False)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Account:
        """Take the account from the environment.

        Raises:
            UsageError: it names none, or names it wrongly.
            RefusedError: secrets would travel without TLS.
        """
        text = environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
        given = _parse_connection_string(text) if text else {}
        endpoint = environ.get("AZURE_STORAGE_BLOB_ENDPOINT") or given.get("blobendpoint", "")
        name = given.get("accountname") or environ.get("AZURE_STORAGE_ACCOUNT", "")
        name = name or _name_of(endpoint)
        if not name:
            raise UsageError("no Azure storage account is named", hint=_HINT)
        if not name.isalnum() or not name.isascii():
            raise UsageError("AZURE_STORAGE_ACCOUNT is not the name of an account", hint=_HINT)
        if not endpoint:
            protocol = given.get("defaultendpointsprotocol", "https")
            suffix = given.get("endpointsuffix", "core.windows.net")
            endpoint = f"{protocol}://{name}.blob.{suffix}"
        return cls(name, check_endpoint(endpoint), _credential(name, given, environ))

    def prepare(self, request: Request, *, content_type: str = "") -> str:
        """Date and sign a request, and return its URL. May block, see `Credential`."""
        request.headers["x-ms-date"] = formatdate(usegmt=True)
        request.headers["x-ms-version"] = API_VERSION
        if content_type:
            request.headers["Content-Type"] = content_type
        base = urlsplit(self.endpoint).path
        resource = quote(base + request.path, safe="/-._~")
        token = self.credential.sign(request, resource)
        query = "&".join(
            f"{key}={quote(value, safe='-._~')}" for key, value in request.query.items()
        )
        query = "&".join(part for part in (query, token) if part)
        root = self.endpoint[: len(self.endpoint) - len(base)]
        return f"{root}{resource}?{query}" if query else f"{root}{resource}"


def check_endpoint(endpoint: str) -> str:
    """Return the endpoint without a slash at its end, if secrets are safe on the way there.

    Raises:
        UsageError: it is not a URL of a service.
        RefusedError: it is plain HTTP to another host.
    """
    try:
        parts = urlsplit(endpoint)
        host = parts.hostname
        _ = parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https") or "@" in parts.netloc or parts.query:
        # Not shown: people put SAS tokens there.
        raise UsageError(
            "the blob endpoint is not a URL", hint="such as https://ACCOUNT.blob.core.windows.net"
        )
    if parts.scheme == "http" and not _is_loopback(host):
        raise RefusedError(
            f"the endpoint http://{host} would carry secrets without TLS",
            hint="use https; http is for an emulator on this host",
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _name_of(endpoint: str) -> str:
    """Return the account in ``https://NAME.blob...`` or ``http://127.0.0.1:10000/NAME``."""
    try:
        parts = urlsplit(endpoint)
        host = parts.hostname or ""
    except ValueError:
        return ""
    if parts.path.strip("/"):
        return unquote(parts.path.strip("/").split("/")[0])
    return host.split(".")[0] if ".blob." in host else ""


def _parse_connection_string(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.strip().rstrip(";").split(";") if part.strip()]
    if not pairs or any(not key or not equals for key, equals, _ in pairs):
        raise UsageError(
            "AZURE_STORAGE_CONNECTION_STRING is malformed", hint="copy it whole from the portal"
        )
    given = {key.strip().lower(): value.strip() for key, _, value in pairs}
    if given.get("usedevelopmentstorage", "").lower() == "true":
        return _parse_connection_string(_EMULATOR)
    return given


def _credential(name: str, given: Mapping[str, str], environ: Mapping[str, str]) -> Credential:
    if key := given.get("accountkey") or environ.get("AZURE_STORAGE_KEY"):
        return SharedKey(name, key)
    if token := given.get("sharedaccesssignature") or environ.get("AZURE_STORAGE_SAS_TOKEN"):
        return SasToken(token)
    try:
        # By name: slow to import, and an extra that need not be there.
        identity = importlib.import_module("azure.identity")
    except ImportError:
        raise UsageError(
            f"no secret for the Azure storage account {name}",
            hint=f"{_HINT}; or install azure-identity",
        ) from None
    source: TokenSource = identity.DefaultAzureCredential()
    return Bearer(source)
