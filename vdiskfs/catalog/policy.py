"""Replication policies in the vault: ``policies/NAME.json``, changed by compare-and-swap.

A policy says how a disk is replicated and which of its points stay. A disk names its policy
in its record; one without keeps every point. The presets are there without a document, until
one of that name is written.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from vdiskfs.catalog.documents import (
    DOCUMENT_LIMIT,
    FORMAT,
    decode_document,
    encode_document,
    take,
)
from vdiskfs.catalog.groups import check_group_name
from vdiskfs.catalog.records import DiskRecord, named_by, safe_name
from vdiskfs.catalog.retention import Ladder, parse_ladder
from vdiskfs.crash import hook
from vdiskfs.errors import (
    ConflictError,
    DamagedError,
    FormatError,
    NotFoundError,
    UsageError,
    VdiskfsError,
)
from vdiskfs.store import Store
from vdiskfs.units import NS, parse_size, parse_span
from vdiskfs.window import Window

PREFIX = "policies/"
_SWAP_TRIES = 20
_HOUR_S = 3600


@dataclass(frozen=True, slots=True)
class Policy:
    """How a disk is replicated. Texts are as a user writes them; "" is "as the mount has it".

    ``epoch_interval``, ``application_interval`` and the RPO thresholds are spans;
    ``bandwidth_limit`` is bytes a second, which hold in
    ``bandwidth_hours`` (always, if that is "").
    """

    name: str
    retention: str = "1s for 1h, 1m for 1d, 1h for 15d, 1d for 1y"
    epoch_interval: str = ""
    application_interval: str = ""
    rpo_warning: str = ""
    rpo_error: str = ""
    bandwidth_limit: str = ""
    bandwidth_hours: str = ""
    resync_window: str = ""
    compression_level: int = 0

    @property
    def ladder(self) -> Ladder:
        """Return the rungs of the retention."""
        return parse_ladder(self.retention)

    @property
    def epoch_interval_s(self) -> float | None:
        """Return the seconds between points, or None: as the mount has it."""
        return _seconds(self.epoch_interval)

    @property
    def application_interval_s(self) -> float | None:
        """Return the seconds between application-consistent points, or None: as the mount."""
        return _seconds(self.application_interval)

    @property
    def rpo_s(self) -> tuple[float | None, float | None]:
        """Return the lags that are a warning and an error, seconds; None: as the mount has it."""
        return _seconds(self.rpo_warning), _seconds(self.rpo_error)

    @property
    def bandwidth_bytes(self) -> int | None:
        """Return the bytes a second of uploads, or None: as the mount has it."""
        return parse_size(self.bandwidth_limit) if self.bandwidth_limit else None

    def to_body(self) -> dict[str, Any]:
        """Return what a document, and a script, gets of it."""
        return asdict(self)


PRESETS = {
    "default": Policy("default"),
    "asr-standard": Policy(
        "asr-standard", retention="1s for 1h, 5m for 72h", application_interval="4h",
        rpo_warning="15m", rpo_error="30m",
    ),
    "asr-premium": Policy(
        "asr-premium", retention="1s for 1h, 5m for 24h", application_interval="1h",
        rpo_warning="15m", rpo_error="30m",
    ),
}  # fmt: skip

KEYS = tuple(field.name for field in fields(Policy) if field.name != "name")


def changed_policy(policy: Policy, settings: dict[str, str]) -> Policy:
    """Return a policy with some of its settings changed.

    Raises:
        UsageError: there is no such setting, or it cannot have that value.
    """
    values: dict[str, Any] = {}
    for key, text in settings.items():
        if key not in KEYS:
            raise UsageError(f"a policy has no {key[:40]!r}", hint=f"it has {', '.join(KEYS)}")
        if key == "compression_level":
            if not (text.isascii() and text.isdigit() and int(text[:3]) <= 19):
                raise UsageError(f"compression_level: 0 (as the mount has it) to 19, not {text!r}")
            values[key] = int(text)
        else:
            values[key] = text.strip()
    return check_policy(replace(policy, **values))


def check_policy(policy: Policy) -> Policy:
    """Return a policy whose settings make sense together.

    Raises:
        UsageError: one does not.
    """
    parse_ladder(policy.retention)
    for key in ("epoch_interval", "application_interval", "rpo_warning", "rpo_error"):
        _check(key, getattr(policy, key), _seconds)
    _check("bandwidth_limit", policy.bandwidth_limit, parse_size)
    _check("bandwidth_hours", policy.bandwidth_hours, Window.parse)
    _check("resync_window", policy.resync_window, Window.parse)
    epoch_s, application_s = policy.epoch_interval_s, _seconds(policy.application_interval)
    if epoch_s is not None and not 0.05 <= epoch_s <= _HOUR_S:
        raise UsageError("epoch_interval: 50ms to 1h")
    if application_s is not None and not 10 <= application_s <= 12 * _HOUR_S:
        raise UsageError("application_interval: 10s to 12h, or nothing")
    warning, error = _seconds(policy.rpo_warning), _seconds(policy.rpo_error)
    if warning is not None and error is not None and warning > error:
        raise UsageError("rpo_warning is above rpo_error")
    if not 0 <= policy.compression_level <= 19:
        raise UsageError("compression_level: 0 (as the mount has it) to 19")
    return policy


async def read_policy(store: Store, name: str) -> Policy:
    """Return a policy of the vault, or a preset.

    Raises:
        NotFoundError: there is none of that name.
        FormatError: its document is damaged.
    """
    return (await _read(store, name))[0]


async def list_policies(store: Store) -> tuple[list[Policy], dict[str, str]]:
    """Return all policies that can be read, by name, presets among them; and what cannot be.

    That is: the objects of the others, each with why.
    """
    found, unreadable = dict(PRESETS), {}
    for object_name in [info.name async for info in store.list(PREFIX)]:
        try:
            data, _ = await store.read(object_name, limit=DOCUMENT_LIMIT)
            policy = decode_policy(data, object_name)
        except NotFoundError:
            continue
        except DamagedError as error:
            unreadable[object_name] = error.message.removeprefix(f"{object_name}: ")
            # A preset that was changed is not what it was made as.
            found.pop(named_by(object_name, PREFIX) or "", None)
        else:
            found[policy.name] = policy
    return [found[name] for name in sorted(found)], unreadable


async def read_or_new(store: Store, name: str, *, anew: bool = False) -> tuple[Policy, str | None]:
    """Return a policy and its etag; one that is not there, as the preset ``default`` is.

    Args:
        store: the vault's.
        name: the policy's.
        anew: one whose document is damaged, too.

    Raises:
        FormatError: its document is damaged.
    """
    try:
        return await _read(store, name)
    except NotFoundError:
        return Policy(name), None
    except DamagedError as error:
        if not anew:
            raise FormatError(
                error.message,
                hint="it is made anew, of what is given, where its retention is:"
                f" vdiskfs policy set {shlex.quote(name)} retention=...",
            ) from None
        return Policy(name), (await store.stat(policy_object(name))).etag


async def set_policy(
    store: Store, name: str, change: Callable[[Policy], Policy], *, anew: bool = False
) -> Policy:
    """Change a policy, or make it (from the preset ``default``), by compare-and-swap.

    One whose document is damaged is made ``anew``, or left as it is: see `read_or_new`.
    """
    check_group_name(name)
    for _ in range(_SWAP_TRIES):
        policy, etag = await read_or_new(store, name, anew=anew)
        changed = check_policy(change(policy))
        document = encode_document({"format": FORMAT, "policy": changed.to_body()})
        try:
            await store.replace(policy_object(name), document, etag=etag)
        except (ConflictError, NotFoundError):
            continue
        hook("policy.written")
        return changed
    raise ConflictError(f"policy {name}: changed by others all the time")


async def missing_policies(store: Store, disks: Sequence[DiskRecord]) -> dict[str, list[str]]:
    """Return the objects of policies that disks follow and that are not there; whose they are."""
    wanted: dict[str, list[str]] = {}
    for record in disks:
        if record.policy and record.policy not in PRESETS:
            wanted.setdefault(policy_object(record.policy), []).append(record.name)
    if wanted:
        async for info in store.list(PREFIX):
            wanted.pop(info.name, None)
    return wanted


async def _read(store: Store, name: str) -> tuple[Policy, str | None]:
    where = policy_object(check_group_name(name))
    try:
        data, info = await store.read(where, limit=DOCUMENT_LIMIT)
    except NotFoundError:
        if name in PRESETS:
            return PRESETS[name], None
        raise NotFoundError(
            f"the vault has no policy {name!r}", hint="see `vdiskfs policy list`"
        ) from None
    policy = decode_policy(data, where)
    if policy.name != name:
        raise FormatError("the document of another policy", where=where)
    return policy, info.etag


def decode_policy(data: bytes, where: str) -> Policy:
    """Return what a policy's document says; FormatError: it is damaged."""
    body = take(decode_document(data, where=where), "policy", dict, where=where)
    known = {field.name: field for field in fields(Policy)}
    values = {
        key: take(body, key, int if key == "compression_level" else str, where=where)
        for key in known
        if key in body
    }
    if "name" not in values:
        raise FormatError("the policy has no name", where=where)
    try:
        return check_policy(Policy(**values))
    except UsageError as error:
        raise FormatError(error.message, where=where) from None


def _seconds(text: str) -> float | None:
    return parse_span(text) / NS if text else None


def _check(key: str, text: str, parse: Callable[[str], object]) -> None:
    try:
        if text:
            parse(text)
    except (ValueError, VdiskfsError) as error:
        raise UsageError(f"{key}: {error}") from None


def policy_object(name: str) -> str:
    """Return the name of a policy's document."""
    return f"{PREFIX}{safe_name(name)}.json"
