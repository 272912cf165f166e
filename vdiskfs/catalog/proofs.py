"""What was proven of points: by whom, when, how far, and how it came out.

One small object for each point of which anything beyond its being stored is known:
``disks/<id>/proofs/<generation>-<epoch>.json``; its metadata says the best level that passed,
so that a list of points costs one listing. vdiskfs-format(5), "Proofs".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vdiskfs.catalog.documents import (
    DOCUMENT_LIMIT,
    FORMAT,
    decode_document,
    encode_document,
    take,
)
from vdiskfs.catalog.points import Point
from vdiskfs.crash import hook
from vdiskfs.errors import AlreadyExistsError, ConflictError, FormatError, NotFoundError
from vdiskfs.store import ObjectInfo, Store

STORED, HASHED, CHECKED = "stored", "hashed", "checked"
LEVELS = (STORED, HASHED, CHECKED)
"""What can be proven of a point, each more than the one before."""

PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"
OUTCOMES = (PASS, FAIL, INCONCLUSIVE)

_KEYS = {"passed": PASS, "failed": FAIL, "inconclusive": INCONCLUSIVE}
"""What the metadata has, in the order of `Proven`: of each outcome the highest level."""

_TRIES = 16
_NAME = re.compile(r"([0-9]{1,10})-([0-9]{1,19})\.json")

Place = tuple[int, int]
"""A generation, and an epoch of it."""


@dataclass(frozen=True, slots=True)
class Proof:
    """One attempt to prove a point at a level.

    ``reason`` says why it did not pass, or what was found; ``seconds`` is how long it took,
    ``read_bytes`` how much of the disk was read; ``time`` when it ended (ISO 8601, UTC).
    """

    level: str
    outcome: str
    reason: str
    time: str
    seconds: float
    site: str
    read_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Recovery:
    """A machine that answered on a copy of a point: ``seconds`` from its start; the recovery time.

    ``time`` is when it answered (ISO 8601, UTC), ``detail`` what it was asked.
    """

    seconds: float
    time: str
    machine: str
    detail: str


@dataclass(frozen=True, slots=True)
class Proven:
    """What a listing says of a point: the best level that passed, that failed, that is unsure.

    ``recovery_s`` is the recovery time that was measured last, in seconds; None: none was.
    """

    passed: str
    failed: str
    unsure: str = ""
    recovery_s: float | None = None

    @property
    def has_failed(self) -> bool:
        """Return whether it failed at a level above the best that passed."""
        return _rank(self.failed) > _rank(self.passed)

    def settles(self, level: str) -> bool:
        """Say whether a point is proven, and a level of it passed, or cannot be told."""
        best = max(_rank(self.passed), _rank(self.unsure))
        return bool(_rank(self.passed)) and not self.has_failed and best >= _rank(level)


async def write_proof(store: Store, disk_id: str, place: Place, proof: Proof) -> None:
    """Keep an attempt with its point, in place of the last one at its level. Durable on return.

    Raises:
        ConflictError: others change it all the time.
        VaultUnreachableError: the vault does not answer.
    """

    def add(proofs: dict[str, Proof], recovery: Recovery | None) -> Recovery | None:
        proofs[proof.level] = proof
        return recovery

    await _change(store, disk_id, place, add)


async def write_recovery(store: Store, disk_id: str, place: Place, recovery: Recovery) -> None:
    """Keep a measured recovery time with its point, in place of the last one.

    Raises:
        As `write_proof`.
    """
    await _change(store, disk_id, place, lambda _, __: recovery)


async def _change(
    store: Store, disk_id: str, place: Place,
    add: Callable[[dict[str, Proof], Recovery | None], Recovery | None],
) -> None:  # fmt: skip
    name = proof_name(disk_id, place)
    for _ in range(_TRIES):
        try:
            data, info = await store.read(name, limit=DOCUMENT_LIMIT)
            (proofs, recovery), etag = _decode(data, name), info.etag
        except NotFoundError:
            proofs, recovery, etag = {}, None, None
        recovery = add(proofs, recovery)
        body = encode_document({
            "format": FORMAT, "generation": place[0], "epoch": place[1],
            "proofs": [asdict(proofs[level]) for level in LEVELS if level in proofs],
            **({"recovery": asdict(recovery)} if recovery is not None else {}),
        })  # fmt: skip
        try:
            await store.replace(name, body, etag=etag, metadata=_metadata(proofs, recovery))
        except (ConflictError, AlreadyExistsError, NotFoundError):
            continue
        hook("proof.written")
        return
    raise ConflictError(f"{name}: it is changed by others all the time")


async def read_proofs(store: Store, disk_id: str, place: Place) -> list[Proof]:
    """Return the last attempt at each level, the lowest first; none: it is stored, no more.

    Raises:
        FormatError: the object is damaged.
    """
    found, _ = await _read(store, disk_id, place)
    return [found[level] for level in LEVELS if level in found]


async def _read(
    store: Store, disk_id: str, place: Place
) -> tuple[dict[str, Proof], Recovery | None]:
    name = proof_name(disk_id, place)
    try:
        data, _ = await store.read(name, limit=DOCUMENT_LIMIT)
    except NotFoundError:
        return {}, None
    return _decode(data, name)


async def list_proven(store: Store, disk_id: str) -> dict[Place, Proven]:
    """Return what is proven of the points of a disk: one listing, whatever their number."""
    found: dict[Place, Proven] = {}
    prefix = proofs_prefix(disk_id)
    for info in [info async for info in store.list(prefix)]:
        place = _place(info, prefix)
        if place is not None:
            metadata = info.metadata
            if not metadata:  # lost, where a folder was copied, or older than what was seen
                metadata = _metadata(*await _read(store, disk_id, place))
            said = (metadata.get(key, "") for key in _KEYS)
            passed, failed, unsure = (level if level in LEVELS else "" for level in said)
            seconds = _seconds(metadata.get("recovery", ""))
            found[place] = Proven(passed, failed, unsure, seconds)
    return found


async def with_proofs(store: Store, disk_id: str, points: Sequence[Point]) -> list[Point]:
    """Return points with what is proven of each."""
    proven = await list_proven(store, disk_id) if points else {}
    return [mark_proven(one, proven.get((one.generation, one.epoch))) for one in points]


def is_proven(point: Point) -> bool:
    """Say whether more is known of a point than that the vault has acknowledged it."""
    return point.proof in LEVELS[1:]


def proof_name(disk_id: str, place: Place) -> str:
    """Return the name of the object that has a point's proofs."""
    return f"{proofs_prefix(disk_id)}{place[0]}-{place[1]}.json"


def proofs_prefix(disk_id: str) -> str:
    """Return what the names of all proofs of a disk begin with."""
    return f"disks/{disk_id}/proofs/"


def _rank(level: str) -> int:
    return LEVELS.index(level or STORED)


def _place(info: ObjectInfo, prefix: str) -> Place | None:
    found = _NAME.fullmatch(info.name.removeprefix(prefix))
    return (int(found[1]), int(found[2])) if found else None


def mark_proven(point: Point, proven: Proven | None) -> Point:
    """Return a point with what a listing says of it; None: nothing."""
    if proven is None:
        return point
    proof = f"{proven.failed}-failed" if proven.has_failed else proven.passed or STORED
    return replace(point, proof=proof, recovery_s=proven.recovery_s)


def _seconds(text: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _metadata(proofs: Mapping[str, Proof], recovery: Recovery | None) -> dict[str, str]:
    def best(outcome: str) -> str:
        found = [level for level in LEVELS if level in proofs and proofs[level].outcome == outcome]
        return found[-1] if found else ""

    metadata = {key: best(outcome) for key, outcome in _KEYS.items()}
    if recovery is not None:
        metadata["recovery"] = f"{recovery.seconds:.3f}"
    return {key: value for key, value in metadata.items() if value}


def _decode(data: bytes, where: str) -> tuple[dict[str, Proof], Recovery | None]:
    values = decode_document(data, where=where)
    found: dict[str, Proof] = {}
    for item in take(values, "proofs", list, where=where):
        proof = _proof(item, where)
        found[proof.level] = proof
    said = values.get("recovery")
    if said is None:
        return found, None
    if not isinstance(said, dict) or not isinstance(said.get("seconds"), int | float):
        raise FormatError("a recovery time is none", where=where)
    texts = {key: take(said, key, str, where=where) for key in ("time", "machine", "detail")}
    return found, Recovery(seconds=float(said["seconds"]), **texts)


def _proof(item: Any, where: str) -> Proof:
    if not isinstance(item, dict):
        raise FormatError("a proof is none", where=where)
    seconds = item.get("seconds")
    proof = Proof(
        **{key: take(item, key, str, where=where)
           for key in ("level", "outcome", "reason", "time", "site")},
        seconds=float(seconds) if isinstance(seconds, int | float) else 0.0,
        read_bytes=take(item, "read_bytes", int, where=where),
    )  # fmt: skip
    if proof.level not in LEVELS or proof.outcome not in OUTCOMES:
        raise FormatError("a proof of no known level or outcome", where=where)
    return proof
