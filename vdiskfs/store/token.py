"""What a shared access signature says of itself: until when, and for which protocols. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs

SOON = timedelta(days=7)
LONG = timedelta(days=366)


def token_warnings(token: str, now: datetime) -> list[str]:
    """Return what its user should know of a token, each as one line; nothing of it is in them.

    What it leaves to a stored access policy (``si``) is not known here, and not warned of.
    """
    said = {key: values[-1] for key, values in parse_qs(token.lstrip("?&")).items()}
    found = []
    expires = _time(said.get("se", ""))
    if expires is not None and expires - now < SOON:
        when = "has expired" if expires <= now else "expires"
        found.append(f"{when} at {expires:%Y-%m-%dT%H:%M:%SZ}")
    elif expires is not None and expires - now > LONG:
        found.append(f"whoever copies it has it until {expires:%Y-%m-%d}")
    if said.get("spr", "" if "si" not in said else "https") != "https":
        found.append("is valid for http, too")
    return found


def given_tokens(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the tokens that the environment gives, by variable."""
    found = {}
    for name in ("AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_CONTROL_SAS_TOKEN"):
        if environ.get(name):
            found[name] = environ[name].strip()
    name = "AZURE_STORAGE_CONNECTION_STRING"
    for part in environ.get(name, "").split(";"):
        key, _, value = part.partition("=")
        if key.strip().lower() == "sharedaccesssignature":
            found[name] = value.strip()
    return found


def _time(text: str) -> datetime | None:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
