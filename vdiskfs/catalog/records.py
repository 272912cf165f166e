"""What the vault's control objects say: disks and sites."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vdiskfs.catalog.documents import FORMAT, decode_document, encode_document, take
from vdiskfs.delta.layout import is_id
from vdiskfs.delta.segments import is_batch
from vdiskfs.errors import FormatError

ASKED, STOPPING, RELEASED, REFUSED = "asked", "stopping", "released", "refused"
"""The steps of a handover."""

Use = tuple[str, int, int]
"""A point that is open: disk id, generation, epoch."""

WHOLE_LINE = 0
"""The epoch of a use that means no point: all that a line has is read, and nothing is deleted."""

_SAFE = re.compile(r"[a-z0-9_-]")
_BRANCH = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")


@dataclass(frozen=True, slots=True)
class Owner:
    """Who may write a disk's current generation.

    ``writer`` is the id of a state directory, ``start`` a random number of its last start:
    a copy of that directory, or an older state of it, does not know it. ``since`` is when
    this writer came to own the disk.
    """

    site: str
    writer: str
    start: str
    since: str


@dataclass(frozen=True, slots=True)
class Branch:
    """A generation beside the main line: what a displaced writer could not ship.

    ``token`` is a random number by which its writer recognises it.
    """

    name: str
    site: str
    writer: str
    token: str
    since: str


@dataclass(frozen=True, slots=True)
class Handover:
    """A site asks the owner for the disk, and the owner's answer; one request at a time.

    ``step`` is ``asked``; ``stopping`` (the owner stops what runs on the disk), ``released``
    (its line is fenced, and holds all that was ever written there) or ``refused``. ``said`` is
    the owner's word for people.
    """

    id: str
    site: str
    writer: str
    asked: str
    step: str = ASKED
    said: str = ""


@dataclass(frozen=True, slots=True)
class Moved:
    """A failover, or a failback, that made the current generation, as long as it is not over.

    ``id`` is that of the failover, ``token`` a random number of the very step that started the
    generation; ``state`` is how far it is (the states of ``vdiskfs failover``). ``source`` is the
    owner from whom the disk came, ``generation`` the line that was current there.
    """

    id: str
    token: str
    kind: str
    state: str
    site: str
    since: str
    generation: int
    source: Owner


@dataclass(frozen=True, slots=True)
class Hold:
    """A point that stays until it is released. ``since`` is ISO 8601."""

    generation: int
    epoch: int
    note: str
    since: str


CLAIMED, DOUBTED, GIVEN_UP = "claimed", "doubted", "given-up"
"""What is said of a batch of segments that no delta may name yet."""
_STATES = {CLAIMED, DOUBTED, GIVEN_UP}


@dataclass(frozen=True, slots=True)
class Batch:
    """Segments that a writer has stored, or is about to, before the delta that names them.

    ``claimed``: its writer goes on with it. ``doubted`` since a time (store's clock, ns): nothing
    names it, and nobody has claimed it since. ``given-up``: no delta may ever name it again.
    """

    state: str = CLAIMED
    since: int = 0


@dataclass(frozen=True, slots=True)
class LedgerRef:
    """The ledger of a generation: up to ``horizon`` it alone says what there is."""

    id: str
    horizon: int


@dataclass(frozen=True, slots=True)
class DiskRecord:
    """A protected disk: disks/<id>/disk.json, changed by compare-and-swap.

    ``generation`` is the one that may grow; ``parents`` has for each generation where it
    began: None (with the empty disk) or a generation and its epoch. ``branches`` are those
    beside the main line. ``retired`` is when the image went away, or None. ``handover`` and
    ``moved`` are there while the disk goes from one site to another. ``policy`` names the
    replication policy ("": none, every point is kept), ``ledgers`` has the generations that
    were thinned. ``batches`` says what becomes of segments that nothing may name yet, ``claims``
    counts how often one was claimed.
    """

    id: str
    name: str
    created: str
    site: str
    file: str
    size: int
    generation: int = 1
    parents: Mapping[int, tuple[int, int] | None] = field(default_factory=lambda: {1: None})
    retired: str | None = None
    owner: Owner | None = None
    branches: Mapping[int, Branch] = field(default_factory=dict)
    handover: Handover | None = None
    moved: Moved | None = None
    policy: str = ""
    holds: tuple[Hold, ...] = ()
    ledgers: Mapping[int, LedgerRef] = field(default_factory=dict)
    batches: Mapping[str, Batch] = field(default_factory=dict)
    claims: int = 0

    @property
    def next_generation(self) -> int:
        """Return the number of the generation, or branch, that is started next."""
        return max(self.parents) + 1

    def branch(self, name: str) -> int | None:
        """Return the generation of a branch, or None."""
        return next((number for number, one in self.branches.items() if one.name == name), None)

    def lineage(self, generation: int) -> list[tuple[int, int]]:
        """Return (generation, last epoch that counts) of all ancestors, oldest first."""
        found: list[tuple[int, int]] = []
        parent = self.parents.get(generation)
        while parent is not None:
            found.append(parent)
            parent = self.parents.get(parent[0])
        return found[::-1]

    def base(self, generation: int) -> int:
        """Return the epoch that a generation starts from."""
        parent = self.parents.get(generation)
        return parent[1] if parent else 0


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """A heartbeat: sites/<site>.<writer>.json, one for each state directory.

    ``process`` names the process that writes it, so that one that runs on the same kernel
    can tell whether it lives; ``interval_s`` is how often it does. ``states`` is where its disks
    stood, by id, as its own status says it; ``uses`` are the points (disk id, generation, epoch)
    that are open there.
    """

    site: str
    host: str
    time: str
    version: str
    disks: tuple[str, ...]
    pid: int
    started: str
    writer: str = ""
    process: str = ""
    interval_s: int = 10
    states: Mapping[str, str] = field(default_factory=dict)
    healths: Mapping[str, str] = field(default_factory=dict)
    uses: tuple[Use, ...] = ()


@dataclass(frozen=True, slots=True)
class UnreadableSite:
    """A heartbeat that cannot be read: its object, why, when it was written (store's time, ns)."""

    object: str
    why: str
    modified_ns: int


@dataclass(frozen=True, slots=True)
class UnreadableDisk:
    """A disk whose name or record cannot be read: which object, why, the name as far as known."""

    object: str
    why: str
    name: str


def encode_disk(record: DiskRecord) -> bytes:
    """Return the document of a disk."""
    parents = {
        str(generation): {"generation": parent[0], "epoch": parent[1]} if parent else None
        for generation, parent in sorted(record.parents.items())
    }
    return encode_document({
        "format": FORMAT, "id": record.id, "name": record.name, "created": record.created,
        "generation": record.generation, "parents": parents, "site": record.site,
        "image": {"file": record.file, "size": record.size}, "retired": record.retired,
        "owner": asdict(record.owner) if record.owner else None,
        "branches": {
            str(number): asdict(branch) for number, branch in sorted(record.branches.items())
        },
        "handover": asdict(record.handover) if record.handover else None,
        "moved": asdict(record.moved) if record.moved else None,
        "policy": record.policy, "holds": [asdict(hold) for hold in record.holds],
        "ledgers": {str(number): asdict(ref) for number, ref in sorted(record.ledgers.items())},
        "batches": {batch: asdict(one) for batch, one in sorted(record.batches.items())},
        "claims": record.claims,
    })  # fmt: skip


def decode_disk(data: bytes, disk_id: str, *, where: str) -> DiskRecord:
    """Return what a disk's document says.

    Raises:
        FormatError: it contradicts itself, or is another disk's.
    """
    values = decode_document(data, where=where)
    image = take(values, "image", dict, where=where)
    retired = values.get("retired")
    record = DiskRecord(
        id=take(values, "id", str, where=where),
        name=take(values, "name", str, where=where),
        created=take(values, "created", str, where=where),
        site=take(values, "site", str, where=where),
        file=take(image, "file", str, where=where),
        size=take(image, "size", int, where=where),
        generation=take(values, "generation", int, where=where),
        parents=_parents(take(values, "parents", dict, where=where), where),
        retired=retired if isinstance(retired, str) else None,
        owner=_owner(values.get("owner"), where),
        branches=_branches(values.get("branches"), where),
        handover=_handover(values.get("handover"), where),
        moved=_moved(values.get("moved"), where),
        policy=take({"policy": "", **values}, "policy", str, where=where),
        holds=_holds(values.get("holds", []), where),
        ledgers=_ledgers(values.get("ledgers", {}), where),
        batches=_batches(values.get("batches", {}), where),
        claims=take({"claims": 0, **values}, "claims", int, where=where),
    )
    if not set(record.branches) <= set(record.parents) - {record.generation}:
        raise FormatError("a branch is no generation beside the main line", where=where)
    if record.moved is not None and record.moved.generation not in record.parents:
        raise FormatError("a move is from no generation", where=where)
    if record.id != disk_id or record.generation not in record.parents:
        raise FormatError("the document of another disk, or it contradicts itself", where=where)
    return record


def _parents(values: dict[str, Any], where: str) -> dict[int, tuple[int, int] | None]:
    parents: dict[int, tuple[int, int] | None] = {}
    for key, value in values.items():
        generation = _generation(key, where)
        parents[generation] = None
        if value is not None:
            if not isinstance(value, dict):
                raise FormatError("a parent has another type", where=where)
            parent = take(value, "generation", int, where=where)
            # Invariant: parents are older, so that a lineage ends.
            if not 0 < parent < generation:
                raise FormatError("a generation is not younger than its parent", where=where)
            parents[generation] = (parent, take(value, "epoch", int, where=where))
    return parents


def _generation(key: str, where: str) -> int:
    if not key.isascii() or not key.isdigit() or not 0 < int(key[:11]) < 1 << 32:
        raise FormatError("a generation is no number", where=where)
    return int(key)


def _owner(values: object, where: str) -> Owner | None:
    if values is None:
        return None
    if not isinstance(values, dict):
        raise FormatError("the owner has another type", where=where)
    return Owner(**_texts(values, ("site", "writer", "start", "since"), where))


def _handover(values: object, where: str) -> Handover | None:
    if values is None:
        return None
    if not isinstance(values, dict):
        raise FormatError("the handover has another type", where=where)
    keys = ("id", "site", "writer", "asked", "step", "said")
    return Handover(**_texts(values, keys, where))


def _moved(values: object, where: str) -> Moved | None:
    if values is None:
        return None
    if not isinstance(values, dict):
        raise FormatError("what moved the disk has another type", where=where)
    source = _owner(values.get("source"), where)
    if source is None:
        raise FormatError("a move has no source", where=where)
    keys = ("id", "token", "kind", "state", "site", "since")
    generation = take(values, "generation", int, where=where)
    return Moved(**_texts(values, keys, where), generation=generation, source=source)


def _branches(values: object, where: str) -> dict[int, Branch]:
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(one, dict) for one in values.values()):
        raise FormatError("the branches have another type", where=where)
    keys = ("name", "site", "writer", "token", "since")
    found = {
        _generation(key, where): Branch(**_texts(one, keys, where)) for key, one in values.items()
    }
    if not all(_BRANCH.fullmatch(branch.name) for branch in found.values()):
        raise FormatError("a branch has a name that it cannot have", where=where)
    return found


def _holds(values: object, where: str) -> tuple[Hold, ...]:
    if not isinstance(values, list) or not all(isinstance(one, dict) for one in values):
        raise FormatError("the holds have another type", where=where)
    return tuple(
        Hold(
            take(one, "generation", int, where=where), take(one, "epoch", int, where=where),
            **_texts(one, ("note", "since"), where),
        )
        for one in values
    )  # fmt: skip


def _ledgers(values: object, where: str) -> dict[int, LedgerRef]:
    if not isinstance(values, dict) or not all(isinstance(one, dict) for one in values.values()):
        raise FormatError("the ledgers have another type", where=where)
    found = {}
    for key, one in values.items():
        ref = LedgerRef(
            take(one, "id", str, where=where), take(one, "horizon", int, where=where)
        )  # fmt: skip
        if not is_id(ref.id):
            raise FormatError("a ledger has no id", where=where)
        found[_generation(key, where)] = ref
    return found


def _batches(values: object, where: str) -> dict[str, Batch]:
    if not isinstance(values, dict) or not all(isinstance(one, dict) for one in values.values()):
        raise FormatError("the batches have another type", where=where)
    found = {
        batch: Batch(take(one, "state", str, where=where), take(one, "since", int, where=where))
        for batch, one in values.items()
    }
    if not all(map(is_batch, found)) or not {one.state for one in found.values()} <= _STATES:
        raise FormatError("a batch is none", where=where)
    return found


def _texts(values: dict[str, Any], keys: tuple[str, ...], where: str) -> dict[str, str]:
    return {key: take(values, key, str, where=where) for key in keys}


def encode_site(record: SiteRecord) -> bytes:
    """Return the document of a site."""
    return encode_document({
        "format": FORMAT, "site": record.site, "host": record.host, "time": record.time,
        "version": record.version, "disks": list(record.disks), "pid": record.pid,
        "started": record.started, "writer": record.writer, "process": record.process,
        "interval_s": record.interval_s, "states": dict(sorted(record.states.items())),
        "healths": dict(sorted(record.healths.items())),
        "uses": [list(use) for use in record.uses],
    })  # fmt: skip


def decode_site(data: bytes, *, where: str) -> SiteRecord:
    """Return what a site's document says."""
    values = decode_document(data, where=where)
    disks = take(values, "disks", list, where=where)
    if not all(isinstance(disk, str) and is_id(disk) for disk in disks):
        raise FormatError("a disk is no id", where=where)
    filled = {"states": {}, "healths": {}, **values}
    states = take(filled, "states", dict, where=where)
    healths = take(filled, "healths", dict, where=where)
    return SiteRecord(
        site=take(values, "site", str, where=where),
        host=take(values, "host", str, where=where),
        time=take(values, "time", str, where=where),
        version=take(values, "version", str, where=where),
        disks=tuple(disks),
        pid=take(values, "pid", int, where=where),
        started=take(values, "started", str, where=where),
        writer=take({"writer": "", **values}, "writer", str, where=where),
        process=take({"process": "", **values}, "process", str, where=where),
        interval_s=take({"interval_s": 10, **values}, "interval_s", int, where=where),
        states={disk: str(state) for disk, state in states.items()},
        healths={disk: str(health) for disk, health in healths.items()},
        uses=decode_uses(values.get("uses", []), where),
    )


def named_by(object_name: str, prefix: str) -> str | None:
    """Return the user's name in PREFIX/NAME.json, as `safe_name` made it; None: it made none."""
    part = object_name.removeprefix(prefix).removesuffix(".json")
    raw = re.sub(rb"%([0-9a-f]{2})", lambda hit: bytes([int(hit[1], 16)]), part.encode())
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        return None
    return name if name and f"{prefix}{safe_name(name)}.json" == object_name else None


def decode_uses(values: object, where: str) -> tuple[Use, ...]:
    """Return the points that a document says are open.

    Raises:
        FormatError: they are none.
    """
    if not isinstance(values, list):
        raise FormatError("what is open has another type", where=where)
    for one in values:
        kinds = [type(part) for part in one] if isinstance(one, list) else []
        if kinds != [str, int, int] or not is_id(one[0]):
            raise FormatError("a point that is open is none", where=where)
    return tuple((one[0], one[1], one[2]) for one in values)


def safe_name(name: str) -> str:
    """Return a user's name as part of an object's name: [a-z0-9._-], all else in %hex."""
    raw = name.encode()
    return "".join(
        chr(byte) if _SAFE.fullmatch(chr(byte)) or (byte == 0x2E and index) else f"%{byte:02x}"
        for index, byte in enumerate(raw)
    )
