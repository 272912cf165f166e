"""What the user can set: ``Config`` is vdiskfs.conf(5), ``MountSettings`` is one mount.

Also the places where things lie unless the user says otherwise (state directory, site
name, configuration file). Reads files, keeps no state. Secrets are never held here: the
configuration names a key file, and ``vault_environ`` reads it when a vault is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import stat
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vdiskfs.errors import NotFoundError, RefusedError, UsageError
from vdiskfs.quiesceconfig import QuiesceConfig, parse_quiesce, quiesce_table
from vdiskfs.tablerules import Rule, number, read_table, truth
from vdiskfs.units import parse_size
from vdiskfs.watchsettings import (
    MailConfig,
    WatchConfig,
    WebhookConfig,
    read_mail,
    read_watch,
    read_webhook,
)
from vdiskfs.window import Window

GIB = 1 << 30
WHEN_DISPLACED = ("read-only", "stop-machine", "keep")
# The name of an interface has at most 15 bytes.
_ATTACHMENT = re.compile(r"none|user|(bridge|tap):[A-Za-z0-9][A-Za-z0-9._-]{0,14}")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class AzureConfig:
    """The ``[azure]`` table: which account, and the file that holds its key."""

    account: str | None = None
    endpoint: str | None = None
    key_file: str | None = None


@dataclass(frozen=True)
class MachinesConfig:
    """The ``[machines]`` table: what definitions from the vault may use of this host.

    ``networks`` maps the name of a source's network to what it is here (``is_attachment``).
    """

    hooks_directory: str | None = None
    boot_directory: str | None = None
    networks: Mapping[str, str] = field(default_factory=dict)
    qemu: str = "qemu-system-x86_64"
    qemu_arguments: tuple[str, ...] = ()
    stop_command: tuple[str, ...] = ()
    start_command: tuple[str, ...] = ()
    shutdown_s: float = 120.0


@dataclass(frozen=True)
class Config:
    """The keys of vdiskfs.conf(5), with their defaults. Sizes are bytes."""

    patterns: tuple[str, ...] = ("*.img", "*.raw", "*.qcow2")
    epoch_interval_s: float = 1.0
    cache_limit: int = 4 * GIB
    spool_limit: int = 8 * GIB
    resync_threshold: float = 50.0
    prove_interval_s: float = 0.0
    prove_level: str = "hashed"
    resync_window: str = ""
    compression_level: int = 1
    workers: int = 8
    allow_mmap: bool = True
    heartbeat_s: float = 10.0
    log_level: str = "info"
    bandwidth_limit: int = 0
    hydration_limit: int = 0
    when_displaced: str = "read-only"
    application_interval_s: float = 0.0
    freeze_limit_s: float = 10.0
    quiesce: Mapping[str, QuiesceConfig] = field(default_factory=dict)
    key_file: str = ""
    azure: AzureConfig = field(default_factory=AzureConfig)
    machines: MachinesConfig = field(default_factory=MachinesConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    mail: MailConfig = field(default_factory=MailConfig)
    webhook: WebhookConfig = field(default_factory=WebhookConfig)

    @classmethod
    def from_toml(cls, path: Path) -> Config:
        """Read a configuration file.

        Raises:
            NotFoundError: there is no such file.
            RefusedError: it may not be read.
            UsageError: it is not TOML, or a key or a value is wrong; names file and key.
        """
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise NotFoundError(f"{path}: no such configuration file") from None
        except PermissionError as error:
            raise RefusedError(f"{path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: not TOML: {error}") from None
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: cannot be read: {error}") from None
        return cls.from_dict(table, where=str(path))

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], *, where: str) -> Config:
        """Check a table of keys and build the configuration; ``where`` names it in errors.

        Raises:
            UsageError: a key is unknown, or a value cannot be used.
        """
        return cls(**_checked(table, _CONFIG_KEYS, where=where))

    def to_dict(self) -> dict[str, Any]:
        """Return the table that ``from_dict`` reads back to an equal configuration."""
        table = asdict(self)
        table["patterns"] = list(self.patterns)
        for name in ("azure", "machines", "mail", "webhook"):
            table[name] = {key: value for key, value in table[name].items() if value is not None}
        table["quiesce"] = quiesce_table(self.quiesce)
        return table


@dataclass(frozen=True)
class MountSettings:
    """All that the daemon is told about one mount. Paths are absolute.

    ``source`` is None on a recovery site: a mount that protects nothing of its own.
    ``passphrase`` and ``file_key`` (hexadecimal) open an encrypted vault: never shown.
    """

    source: str | None
    mountpoint: str
    vault: str
    site: str
    state: str
    allow_other: bool = False
    over: bool = False
    protect: bool = True
    force: bool = False
    accept_rollback: bool = False
    passphrase: str | None = field(default=None, repr=False)
    file_key: str | None = field(default=None, repr=False)
    options: Config = field(default_factory=Config)

    def to_json(self) -> str:
        """Write the settings as one JSON document."""
        table = {item.name: getattr(self, item.name) for item in fields(self)}
        return json.dumps({**table, "options": self.options.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> MountSettings:
        """Read what ``to_json`` wrote.

        Raises:
            UsageError: it is not such a document.
        """
        where = "mount settings"
        try:
            table = json.loads(text)
        except ValueError as error:
            raise UsageError(f"{where}: not JSON: {error}") from None
        if not isinstance(table, dict):
            raise UsageError(f"{where}: not an object")
        checked = _checked(table, _MOUNT_KEYS, where=where)
        missing = [key for key in ("mountpoint", "vault", "site", "state") if key not in checked]
        if missing:
            raise UsageError(f"{where}: {missing[0]} is missing")
        return cls(**{"source": None, **checked})


def default_config_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where vdiskfs.conf lies for this user. It need not exist."""
    if os.geteuid() == 0:
        return Path("/etc/vdiskfs/vdiskfs.conf")
    return _xdg(environ, "XDG_CONFIG_HOME", ".config") / "vdiskfs" / "vdiskfs.conf"


def load_config(path: Path | None, environ: Mapping[str, str] = os.environ) -> Config:
    """Read the file that was asked for, or the user's own one where it exists.

    Raises:
        NotFoundError, RefusedError, UsageError: as ``Config.from_toml``.
    """
    if path is not None:
        return Config.from_toml(path)
    try:
        return Config.from_toml(default_config_path(environ))
    except NotFoundError:
        return Config()


def default_state(
    source: str | None, mountpoint: str, environ: Mapping[str, str] = os.environ
) -> Path:
    """Return the state directory of a mount: one for each source directory.

    Without a source, one for each mountpoint. The name is readable and unique: the last
    part of the path, then 8 hex digits of the SHA-256 of the whole real path.
    """
    real = os.path.realpath(source if source is not None else mountpoint)
    digest = hashlib.sha256(os.fsencode(real)).hexdigest()[:8]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(real).name)[:64] or "root"
    if os.geteuid() == 0:
        return Path("/var/lib/vdiskfs") / f"{name}-{digest}"
    return _xdg(environ, "XDG_STATE_HOME", ".local/state") / "vdiskfs" / f"{name}-{digest}"


def default_site() -> str:
    """Return this host's name, as a name of a site may be written."""
    name = re.sub(r"[^a-z0-9._-]", "-", socket.gethostname().lower()).strip(".-_")
    return name[:63] or "localhost"


def check_site(name: str) -> str:
    """Return the name of a site, checked.

    Raises:
        UsageError: it is not 1 to 63 of a-z, 0-9, dot, dash, underscore, or begins with
            something other than a letter or a digit.
    """
    if re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", name) is None:
        raise UsageError(
            f"not a name of a site: {name!r}", hint="use a-z, 0-9, dot and dash, at most 63"
        )
    return name


def vault_environ(config: Config, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment with which a vault is opened: ``[azure]`` where it is silent.

    The environment wins. The key file is read now, and is not kept.

    Raises:
        RefusedError: the key file is absent, not readable, or open to other users.
    """
    merged = dict(environ)
    azure = config.azure
    if azure.account is not None:
        merged.setdefault("AZURE_STORAGE_ACCOUNT", azure.account)
    if azure.endpoint is not None:
        merged.setdefault("AZURE_STORAGE_BLOB_ENDPOINT", azure.endpoint)
    given = ("AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_CONNECTION_STRING")
    if azure.key_file is not None and not any(name in merged for name in given):
        merged["AZURE_STORAGE_KEY"] = _read_key(azure.key_file)
    return merged


def is_attachment(value: Any) -> bool:
    """Tell whether a value says what a network is: none, user, bridge:NAME or tap:NAME."""
    return isinstance(value, str) and _ATTACHMENT.fullmatch(value) is not None


def _read_key(path: str) -> str:
    """Return the key in a file that only its owner may read."""
    try:
        with Path(path).open(encoding="ascii") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise RefusedError(f"{path}: other users may read this key", hint="chmod 600 it")
            return file.read(4096).strip()
    except OSError as error:
        raise RefusedError(f"{path}: the account's key cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RefusedError(f"{path}: this is not an account's key") from None


def _xdg(environ: Mapping[str, str], variable: str, fallback: str) -> Path:
    """Return a base directory as the XDG specification finds it (relative ones are ignored)."""
    value = environ.get(variable, "")
    return Path(value) if value.startswith("/") else Path.home() / fallback


def _checked(table: Mapping[str, Any], keys: Mapping[str, Rule], *, where: str) -> dict[str, Any]:
    """Return the values of a table, each checked by its key's own rule."""
    checked = {}
    for key, value in table.items():
        rule = keys.get(key)
        if rule is None:
            raise UsageError(f"{where}: unknown key {key!r}", hint="see vdiskfs.conf(5)")
        try:
            checked[key] = rule(value)
        except ValueError as error:
            raise UsageError(f"{where}: {key}: {error}", hint="see vdiskfs.conf(5)") from None
    return checked


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("must be a text that is not empty")
    return value


def _optional_text(value: Any) -> str | None:
    return None if value is None else _text(value)


def _size(minimum: int) -> Callable[[Any], int]:
    def rule(value: Any) -> int:
        if isinstance(value, str):
            value = parse_size(value)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value < 1 << 63:
            raise ValueError(f'must be a size such as "8GiB", at least {minimum} bytes')
        return value

    return rule


def _count(low: int, high: int) -> Callable[[Any], int]:
    def rule(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return rule


def _window(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError('must be a window such as "22:00-06:00"')
    Window.parse(value)
    return value


def _interval(value: Any) -> float:
    return 0.0 if value == 0 and not isinstance(value, bool) else number(10, 604800)(value)


def _log_level(value: Any) -> str:
    if value not in LOG_LEVELS:
        raise ValueError(f"must be one of {', '.join(LOG_LEVELS)}")
    return str(value)


def _prove_level(value: Any) -> str:
    if value not in ("hashed", "checked"):
        raise ValueError('must be "hashed" or "checked"')
    return str(value)


def _when_displaced(value: Any) -> str:
    if value not in WHEN_DISPLACED:
        raise ValueError(f"must be one of {', '.join(WHEN_DISPLACED)}")
    return str(value)


def _patterns(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError("must be a list of file name patterns")
    if not all(isinstance(item, str) and item and not {"/", "\0"} & set(item) for item in value):
        raise ValueError("each pattern must be a file name, without a slash")
    return tuple(value)


def _absolute(value: Any) -> str:
    if not _text(value).startswith("/"):
        raise ValueError("must be an absolute path")
    return str(value)


def _optional_absolute(value: Any) -> str | None:
    return None if value is None else _absolute(value)


def _azure(value: Any) -> AzureConfig:
    return AzureConfig(**read_table(value, _AZURE_KEYS, " in [azure]"))


def _machines(value: Any) -> MachinesConfig:
    return MachinesConfig(**read_table(value, _MACHINES_KEYS, " in [machines]"))


def _networks(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(value):
        raise ValueError("must be a table of networks")
    for name, target in value.items():
        if not is_attachment(target):
            raise ValueError(f"{name}: must be none, user, bridge:NAME or tap:NAME")
    return dict(value)


def _words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError("must be a list of words")
    return tuple(_text(item) for item in value)


def _options(value: Any) -> Config:
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    return Config.from_dict(value, where="options")


_AZURE_KEYS: dict[str, Rule] = {
    "account": _text,
    "endpoint": _text,
    "key_file": _absolute,
}

_MACHINES_KEYS: dict[str, Rule] = {
    "hooks_directory": _absolute,
    "boot_directory": _absolute,
    "networks": _networks,
    "qemu": _text,
    "qemu_arguments": _words,
    "stop_command": _words,
    "start_command": _words,
    "shutdown_s": number(1, 86400),
}

_CONFIG_KEYS: dict[str, Rule] = {
    "patterns": _patterns,
    "epoch_interval_s": number(0.05, 86400),
    "cache_limit": _size(16 << 20),
    "spool_limit": _size(16 << 20),
    "resync_threshold": number(1, 100),
    "prove_interval_s": number(0, 366 * 86400),
    "prove_level": _prove_level,
    "resync_window": _window,
    "compression_level": _count(1, 19),
    "workers": _count(1, 64),
    "allow_mmap": truth,
    "heartbeat_s": number(1, 3600),
    "log_level": _log_level,
    "bandwidth_limit": _size(0),
    "hydration_limit": _size(0),
    "when_displaced": _when_displaced,
    "application_interval_s": _interval,
    "freeze_limit_s": number(0.1, 600),
    "quiesce": parse_quiesce,
    "key_file": lambda value: "" if value == "" else _absolute(value),
    "azure": _azure,
    "machines": _machines,
    "watch": read_watch,
    "mail": read_mail,
    "webhook": read_webhook,
}

_MOUNT_KEYS: dict[str, Rule] = {
    "source": _optional_absolute,
    "mountpoint": _absolute,
    "vault": _text,
    "site": _text,
    "state": _absolute,
    "allow_other": truth,
    "over": truth,
    "protect": truth,
    "force": truth,
    "accept_rollback": truth,
    "passphrase": _optional_text,
    "file_key": _optional_text,
    "options": _options,
}
