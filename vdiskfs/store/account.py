"""Where an Azure storage account is, and with what requests to it are signed. No I/O.

The account comes from the environment, see vdiskfs(1). Secrets stay in here and in the
SDK's credential: nothing of them is in a repr, an error or a log line. A SAS token goes
into URLs; so no URL is ever shown.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias
from urllib.parse import unquote, urlsplit

from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential, TokenCredential

from vdiskfs.errors import RefusedError, UsageError

Credential: TypeAlias = AzureNamedKeyCredential | AzureSasCredential | TokenCredential

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


def control_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with the credential of the control container, if it has its own."""
    token = environ.get("AZURE_STORAGE_CONTROL_SAS_TOKEN")
    if not token:
        return dict(environ)
    text = environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
    # As `_parse_connection_string` reads it: what it takes for a secret is not to be left in.
    given = _parse_connection_string(text) if text else {}
    pairs = [f"{key}={value}" for key, value in given.items()
             if key not in ("accountkey", "sharedaccesssignature")]  # fmt: skip
    changed = {key: value for key, value in environ.items() if key != "AZURE_STORAGE_KEY"}
    changed["AZURE_STORAGE_SAS_TOKEN"] = token
    if text:
        changed["AZURE_STORAGE_CONNECTION_STRING"] = ";".join(pairs)
    return changed


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
        return AzureNamedKeyCredential(name, _checked_key(key))
    if token := given.get("sharedaccesssignature") or environ.get("AZURE_STORAGE_SAS_TOKEN"):
        return AzureSasCredential(_checked_token(token))
    try:
        # By name: slow to import, and an extra that need not be there.
        identity = importlib.import_module("azure.identity")
    except ImportError:
        raise UsageError(
            f"no secret for the Azure storage account {name}",
            hint=f"{_HINT}; or install azure-identity",
        ) from None
    source: TokenCredential = identity.DefaultAzureCredential()
    return source


def _checked_key(key: str) -> str:
    try:
        good = bool(base64.b64decode(key, validate=True))
    except (binascii.Error, ValueError):
        good = False
    if not good:
        # Raised here and not above: the other error's text would hold the key.
        raise UsageError("AZURE_STORAGE_KEY is not base64", hint="copy the whole key")
    return key


def _checked_token(token: str) -> str:
    token = token.strip().lstrip("?&")
    if "sig=" not in token or any(character.isspace() for character in token):
        raise UsageError("AZURE_STORAGE_SAS_TOKEN is not a shared access signature", hint=_HINT)
    return token
