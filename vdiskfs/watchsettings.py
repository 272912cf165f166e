"""The tables of vdiskfs.conf(5) that say what is watched, and who is told of it.

``[watch]``, ``[mail]`` and ``[webhook]``; `config` reads them with its own. Secrets are not held
here: they come from a file or the environment when a mount starts (`secret`).
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vdiskfs.errors import RefusedError, UsageError
from vdiskfs.tablerules import Rule, number, read_table, truth
from vdiskfs.units import NS, parse_span

_DAYS = 366 * 86400
_seconds = partial(number, what="a number of seconds")
LEVELS = ("info", "warning", "error")
JOURNAL = "/run/systemd/journal/socket"
_ADDRESS = re.compile(r"[^\s@<>,;:\"()\\]+@[^\s@<>,;:\"()\\]+")


@dataclass(frozen=True, slots=True)
class RpoThresholds:
    """What one disk's shipped lag may be, in seconds; 0: no threshold.

    One object for each disk: `watch` asks for it whenever it looks.
    """

    warning_s: float = 300.0
    error_s: float = 1800.0


@dataclass(frozen=True)
class WatchConfig:
    """The ``[watch]`` table; the thresholds are seconds, 0: none."""

    rpo_warning: float = 300.0
    rpo_error: float = 1800.0
    hold_s: float = 30.0
    journal_socket: str = JOURNAL
    journal_level: str = "info"
    metrics_listen: str = ""

    @property
    def thresholds(self) -> RpoThresholds:
        """Return those of a disk that has none of its own."""
        return RpoThresholds(self.rpo_warning, self.rpo_error)


@dataclass(frozen=True)
class MailConfig:
    """The ``[mail]`` table; without a host and somebody to send to there is no mail."""

    host: str = ""
    port: int = 25
    starttls: bool = False
    user: str = ""
    password_file: str | None = None
    sender: str = ""
    to: tuple[str, ...] = ()
    level: str = "warning"
    gather_s: float = 2.0
    timeout_s: float = 30.0


@dataclass(frozen=True)
class WebhookConfig:
    """The ``[webhook]`` table; without a URL there is none."""

    url: str = ""
    secret_file: str | None = None
    level: str = "info"
    timeout_s: float = 10.0


def read_watch(value: Any) -> WatchConfig:
    """Check the ``[watch]`` table.

    Raises:
        ValueError: says which key cannot be used, and why.
    """
    config = WatchConfig(**read_table(value, _WATCH, " in [watch]"))
    if 0 < config.rpo_error < config.rpo_warning:
        raise ValueError("rpo_error: must not be below rpo_warning")
    return config


def read_mail(value: Any) -> MailConfig:
    """Check the ``[mail]`` table.

    Raises:
        ValueError: says which key cannot be used, and why.
    """
    config = MailConfig(**read_table(value, _MAIL, " in [mail]"))
    needed = {"host": config.host, "sender": config.sender, "to": config.to}
    missing = [key for key, given in needed.items() if not given]
    if missing and len(missing) < len(needed):
        raise ValueError(f"{missing[0]} is missing in [mail]")
    return config


def read_webhook(value: Any) -> WebhookConfig:
    """Check the ``[webhook]`` table.

    Raises:
        ValueError: says which key cannot be used, and why.
    """
    return WebhookConfig(**read_table(value, _WEBHOOK, " in [webhook]"))


def secret(path: str | None, variable: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return a secret from the environment, else from a file that only its owner may read.

    Raises:
        RefusedError: the file is absent, not readable, not text, or open to other users.
    """
    if variable in environ or path is None:
        return environ.get(variable, "")
    try:
        with Path(path).open(encoding="utf-8") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise RefusedError(f"{path}: other users may read this secret", hint="chmod 600 it")
            return file.read(4096).strip()
    except OSError as error:
        raise RefusedError(f"{path}: this secret cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RefusedError(f"{path}: this is not a secret in text") from None


def check_login(config: MailConfig) -> None:
    """Check that a password goes to the mail server encrypted, or not through a network.

    Raises:
        UsageError: it would go in clear.
    """
    if config.user and not (config.starttls or _is_loopback(config.host)):
        raise UsageError(
            f"[mail]: the password of {config.user} would go to {config.host} in clear",
            hint="set starttls = true, or no user",
        )


def listen_address(text: str) -> tuple[str, int]:
    """Return host and port of ``127.0.0.1:9469`` or ``[::1]:9469``.

    Raises:
        ValueError: it is not such an address, or not one of the loopback interface.
    """
    host, separator, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    loopback = bare != "localhost" and _is_loopback(bare)
    if not (separator and loopback and port.isascii() and port.isdigit()):
        raise ValueError('must be a loopback address and a port such as "127.0.0.1:9469"')
    if not 0 <= int(port) <= 65535:
        raise ValueError("the port must be from 0 to 65535")
    return bare, int(port)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError("must be a text of one line")
    return value


def _path(value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and value.startswith("/")):
        raise ValueError("must be an absolute path")
    return value


def _socket(value: Any) -> str:
    return _path(value) or "" if value != "" else ""


def _span(value: Any) -> float:
    if isinstance(value, str):
        value = parse_span(value) / NS
    return _seconds(0, _DAYS)(value)


def _port(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65535:
        raise ValueError("must be a port: 1 to 65535")
    return value


def _level(value: Any) -> str:
    if value not in LEVELS:
        raise ValueError(f"must be one of {', '.join(LEVELS)}")
    return str(value)


def _address(value: Any) -> str:
    if not isinstance(value, str) or _ADDRESS.fullmatch(value) is None:
        raise ValueError("must be a mail address such as admin@example.org")
    return value


def _addresses(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError("must be a list of mail addresses")
    return tuple(_address(item) for item in value)


def _optional(rule: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: rule(value) if value != "" else ""


def _listen(value: Any) -> str:
    if value != "":
        listen_address(_text(value))
    return str(value)


def _url(value: Any) -> str:
    parts = urlsplit(_text(value))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be a URL such as https://example.org/hook")
    if parts.username is not None:
        raise ValueError("must not hold a user or a password")
    return str(value)


_WATCH: dict[str, Rule] = {
    "rpo_warning": _span, "rpo_error": _span,
    "hold_s": _seconds(0, 86400), "journal_socket": _socket, "journal_level": _level,
    "metrics_listen": _listen,
}  # fmt: skip
_MAIL: dict[str, Rule] = {
    "host": _text, "port": _port, "starttls": truth, "user": _text, "password_file": _path,
    "sender": _optional(_address), "to": _addresses, "level": _level, "gather_s": _seconds(0, 3600),
    "timeout_s": _seconds(1, 600),
}  # fmt: skip
_WEBHOOK: dict[str, Rule] = {
    "url": _optional(_url), "secret_file": _path,
    "level": _level, "timeout_s": _seconds(1, 600),
}  # fmt: skip
