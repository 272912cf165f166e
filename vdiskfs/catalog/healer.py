"""Healing objects of one disk: each is put together anew, verified, and stored in one step.

What is stored has its name, its size and its offsets; what refers to it stays as it is. A
conditional write replaces exactly what was read, so that whoever was faster wins, and a kill
leaves what was there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import trio

from vdiskfs.catalog.draft import Draft, load_draft, read_heads, read_part
from vdiskfs.catalog.enforced import ALLOWED, probe_enforced
from vdiskfs.catalog.inspection import Inspection
from vdiskfs.catalog.ledger import LEAF_LEVEL, decode_ledger
from vdiskfs.catalog.proofs import proofs_prefix
from vdiskfs.catalog.references import References, Said
from vdiskfs.catalog.reframe import Frame, good_pages, remade, stored_pages
from vdiskfs.catalog.reindex import Index, choose_head, settle_index
from vdiskfs.catalog.rejoin import make_again
from vdiskfs.crash import hook
from vdiskfs.delta.digest import genesis_digest
from vdiskfs.delta.layout import DeltaHead, delta_metadata, listed_of
from vdiskfs.delta.names import parse_joined, parse_slot, segment_prefix
from vdiskfs.delta.segments import SEGMENT_HEAD_SIZE, SegmentHead, encode_segment_head
from vdiskfs.delta.segments import decode_segment_head as decode_segment
from vdiskfs.errors import (
    ConflictError,
    DamagedError,
    FormatError,
    NotFoundError,
    RefusedError,
)
from vdiskfs.point import PieceInfo

_ASKS = 3
"""How often an object waits for a search: what a guest overwrites is not here the next time."""

_FRAMES_AT_ONCE = 128
"""Of which the pages are in memory: 8 MiB, three times."""

Wanted = Mapping[int, set[int]]
"""Sums of pages that are looked for, by page."""

Pages = dict[tuple[int, int], bytes]
"""Pages that were found, by number and sum."""


class Sources(Protocol):
    """What this host has of a disk. Nothing that it gives is believed without its sum."""

    async def ends(self, name: str) -> list[bytes]:
        """Return copies of an object's end, or of all of it."""

    async def pages(self, wanted: Wanted) -> Pages:
        """Return those of the pages wanted that are here."""

    async def slots(self) -> list[tuple[int, int, int]]:
        """Return generation, first and last epoch of slots that the vault has had."""

    async def take(self, size: int) -> None:
        """Wait until so many bytes may be sent."""


class NoSources:
    """There is nothing on this host."""

    async def ends(self, _: str) -> list[bytes]:
        """Return nothing."""
        return []

    async def pages(self, _: Wanted) -> Pages:
        """Return nothing."""
        return {}

    async def slots(self) -> list[tuple[int, int, int]]:
        """Return nothing."""
        return []

    async def take(self, _: int) -> None:
        """Do not wait."""


@dataclass(slots=True)
class Outcome:
    """What came of one object: whether it was (or would be) stored, and what is left.

    ``created``: it was missing; ``raced``: somebody else was faster; ``whole``: it is not damaged;
    ``waits``: pages of it are to be looked for in the vault first, with those of other objects.
    """

    stored: bool = False
    created: bool = False
    raced: bool = False
    whole: bool = False
    waits: bool = False
    why: str = ""
    parts: int = 0
    pages: dict[str, int] = field(default_factory=dict)
    """How many pages came from where: here, vault."""


@dataclass(slots=True)
class _Rest:
    """What is left of the damaged frames of an object."""

    may_wait: bool
    lost: list[int] = field(default_factory=list)
    """The pages that each lacks that is not whole."""
    unfit: int = 0
    """How many do not fit in their places."""
    untold: int = 0
    """How many wait for indexes."""
    asked: set[tuple[int, int]] = field(default_factory=set)
    """Pages that were not looked for yet, by number and sum."""


class Healer:
    """Heals what is damaged of one disk, as one reading of its deltas found it."""

    def __init__(
        self, work: Inspection, references: References, sources: Sources, *,
        horizons: Mapping[int, int], leaves: Mapping[str, PieceInfo],
        joins: Mapping[str, PieceInfo], dry_run: bool,
    ) -> None:  # fmt: skip
        """Prepare.

        Args:
            work: a reading of the disk.
            references: what its deltas say of the objects that are damaged.
            sources: what this host has of it.
            horizons: of generations that were thinned.
            leaves: what leads from state to state below them, by name.
            joins: joined deltas that a ledger names.
            dry_run: store nothing.
        """
        self._work = work
        self._store = work.store
        self._references = references
        self._sources = sources
        self._horizons = horizons
        self._leaves = leaves
        self._joins = joins
        self._dry_run = dry_run
        self._replaces: bool | None = None
        self._asks: dict[str, int] = {}

    async def heal(self, name: str) -> Outcome:
        """Heal one object, as far as that is possible.

        Raises:
            RefusedError: the vault lets nothing be replaced.
        """
        if name.startswith(proofs_prefix(self._work.record.id)):
            return Outcome(why="it may be deleted: no point is hurt by it")
        try:
            joined = parse_joined(name)
            if joined is not None and joined[1] != LEAF_LEVEL:
                return await self._heal_joined(self._info(name))
            if joined is None and parse_slot(name) is None:
                if name.startswith(segment_prefix(self._work.record.id)):
                    return await self._heal_segment(name)
                return await self._heal_ledger(name)
            return await self._heal_delta(self._info(name))
        except ConflictError:
            return Outcome(raced=True, why="somebody else has changed it meanwhile")
        except (DamagedError, NotFoundError) as error:
            return Outcome(why=error.message.removeprefix(f"{name}: "))

    def _info(self, name: str) -> PieceInfo:
        """Return what a delta's name says."""
        slot, joined = parse_slot(name), parse_joined(name)
        if slot is not None:
            return PieceInfo(name, slot[0], 0, slot[1], slot[1], 0)
        assert joined is not None
        return PieceInfo(name, joined[0], joined[1], joined[2], joined[3], 0, None, joined[4])

    # ---- deltas --------------------------------------------------------------------------

    async def _heal_delta(self, info: PieceInfo) -> Outcome:
        """Heal a slot or a leaf: its index from copies of its end, then its frames."""
        name, said = info.name, await self._references.said(info.name)
        is_needed = name in self._leaves or info.from_epoch >= self._horizons.get(
            info.generation, 0
        )
        draft, index = await self._indexed(info, said) if is_needed else (None, None)
        if draft is not None and index is not None:
            outcome = await self._finish(draft, index.frames, delta_metadata(index.head))
            if outcome.stored:
                self._references.beside.add(index.head)
            return outcome
        if said.size is None:
            why = ", ".join(draft.lost) if draft is not None else "its index"
            return Outcome(why=f"{why}: no copy is known here")
        # Frames that joined deltas refer to can be had without the index.
        if draft is None or draft.size != said.size:
            ends = await self._sources.ends(name)
            lost = draft.lost if draft is not None else []
            draft = await load_draft(self._store, name, said.size, ends)
            draft.lost += lost if lost or not is_needed else ["its index"]
        return await self._finish(draft, said.frames, draft.metadata)

    async def _indexed(self, info: PieceInfo, said: Said) -> tuple[Draft | None, Index | None]:
        ends = await self._sources.ends(info.name)
        heads = await read_heads(self._store, info.name, said.size, ends)
        work = self._work
        found = choose_head(heads, info, vault_id=work.vault_id, disk_id=work.record.id)
        if found is None:
            return None, None
        head, stored = found
        await self._check_links(head, info.name)
        draft = await load_draft(self._store, info.name, head.object_size, ends)

        async def fetch(name: str, offset: int, length: int) -> bytes | None:
            return await read_part(self._store, name, offset + length, offset, length)

        return draft, await settle_index(draft, head, stored, fetch)

    async def _check_links(self, head: DeltaHead, name: str) -> None:
        """Check that a delta follows the one before it, and the next one follows it.

        Raises:
            FormatError: it does not: the copy is of another history than the vault is.
        """
        beside, work = self._references.beside, self._work
        parent = work.record.parents.get(head.generation)
        if head.from_epoch == work.record.base(head.generation) and parent is not None:
            before = await beside.ends(*parent)
        elif head.from_epoch == 0:
            before = {(genesis_digest(work.vault_id, work.record.id), 0)}
        else:
            before = await beside.ends(head.generation, head.from_epoch)
        after = await beside.starts(head.generation, head.to_epoch)
        # Where those beside it disagree it is not known which of them is right.
        if not before <= {(head.from_digest, head.from_size)} or not after <= {
            (head.to_digest, head.size)
        }:
            raise FormatError("the copy of it does not fit the deltas beside it", where=name)

    async def _heal_joined(self, info: PieceInfo) -> Outcome:
        """Heal a joined delta from copies of its end, or make it again from what it joins."""
        known = self._joins.get(info.name)
        draft, index = await self._indexed(info, Said())
        if draft is not None and index is not None:
            return await self._finish(draft, index.frames, delta_metadata(index.head))
        pieces = [
            piece for piece in await self._references.beside.parts(info, self._references.names)
            if (known is not None) == (piece.name in self._leaves or piece.name in self._joins)
        ]  # fmt: skip
        work = self._work
        made = await make_again(
            self._store, info, pieces, vault_id=work.vault_id, disk_id=work.record.id
        )
        if made is None:
            return Outcome(why="what it joins is damaged itself, or is not there any more")
        data, head = made
        if known is not None and (len(data), listed_of(head)) != (known.size, known.listed):
            return Outcome(why="made again it is another one than its ledger says")
        etag = await self._etag(info.name)
        return await self._put(info.name, data, etag, delta_metadata(head), Outcome(parts=1))

    # ---- segments and ledgers --------------------------------------------------------------

    async def _heal_segment(self, name: str) -> Outcome:
        said = await self._references.said(name)
        if said.size is None:
            return Outcome(why="no index that can be read refers to it")
        draft = await load_draft(self._store, name, said.size, await self._sources.ends(name))
        segment_id = name.rpartition("/")[2]
        head = SegmentHead(
            self._work.vault_id, self._work.record.id, said.writer_id, segment_id, said.size
        )
        if not draft.settle(0, SEGMENT_HEAD_SIZE, lambda part: _is_segment(part, head)):
            draft.put(0, encode_segment_head(head))
        draft.right = 0  # a head alone is of no use
        for offset, length, wanted in said.blocks:
            if not draft.settle_hashed(offset, length, wanted):
                draft.lost.append("a block of an index")
        return await self._finish(draft, said.frames, {"segment": segment_id})

    async def _heal_ledger(self, name: str) -> Outcome:
        """Put a ledger back: it never changes, so that any copy that is whole is it."""
        generation, ref = next(
            (
                (generation, ref)
                for generation, ref in self._work.record.ledgers.items()
                if name.endswith(f"/{ref.id}")
            ),
            (0, None),
        )
        for copy in await self._sources.ends(name):
            try:
                ledger = decode_ledger(copy, self._work.record.id, where=name)
            except DamagedError:
                continue
            if ref is not None and (ledger.generation, ledger.horizon) == (generation, ref.horizon):
                return await self._put(name, copy, await self._etag(name), {}, Outcome(parts=1))
        return Outcome(why="no copy of it is known here")

    async def _etag(self, name: str) -> str | None:
        try:
            return (await self._store.stat(name)).etag
        except NotFoundError:
            return None

    # ---- frames --------------------------------------------------------------------------

    async def _finish(
        self, draft: Draft, frames: Mapping[int, Frame], metadata: Mapping[str, str]
    ) -> Outcome:
        """Heal the frames of a draft, and store it where that makes it better."""
        outcome, copies = Outcome(), self._references.copies
        is_full = copies.is_full

        def settle() -> list[Frame]:
            return [frame for frame in frames.values() if not draft.settle_frame(frame)]

        bad = await trio.to_thread.run_sync(settle)
        rest = _Rest(may_wait=self._asks.get(draft.name, 0) < _ASKS)
        for start in range(0, len(bad), _FRAMES_AT_ONCE):
            await self._reframe(draft, bad[start : start + _FRAMES_AT_ONCE], outcome, rest)
        if rest.asked:
            if not is_full:
                copies.ask(rest.asked)
                self._asks[draft.name] = self._asks.get(draft.name, 0) + 1
            outcome.waits = True
            return outcome
        if lost := sum(rest.lost):
            draft.lost.append(
                f"{len(rest.lost)} of {len(bad)} damaged frames, of which {lost} pages are nowhere"
            )
        if rest.unfit:
            draft.lost.append(f"{rest.unfit} frames that come out longer than they were")
        if rest.untold:
            draft.lost.append(
                f"{rest.untold} frames with pages that only indexes tell of that are damaged"
            )
        if not draft.right:
            draft.lost = draft.lost or ["nothing that was in it is known"]
        elif draft.etag is None and draft.lost and not await self._may_replace():
            draft.lost.append("and what is put back in part the vault would keep so for ever")
            draft.right = 0
        outcome.why = ", ".join(draft.lost)
        if not draft.right:
            return outcome
        outcome.parts = draft.mended
        if not draft.mended and draft.is_size_right:
            outcome.whole = not draft.lost
            return outcome
        return await self._put(draft.name, bytes(draft.data), draft.etag, metadata, outcome)

    async def _reframe(
        self, draft: Draft, frames: Sequence[Frame], outcome: Outcome, rest: _Rest
    ) -> None:
        """Make frames of a draft again, and note what that left."""
        pages: list[dict[int, bytes]] = []
        stored: list[dict[int, bytes]] = []
        wanted: dict[int, set[int]] = {}
        for frame in frames:
            stored.append(stored_pages(frame, draft.part(frame.offset, frame.length)))
            good = good_pages(frame, stored[-1])
            pages.append(good)
            for page in frame.sums.keys() - good.keys():
                wanted.setdefault(page, set()).add(frame.sums[page])
        found = await self._found(wanted, outcome, rest)
        if rest.asked:
            return  # nothing is made of it before they were looked for

        def make() -> None:
            for frame, known, own in zip(frames, pages, stored, strict=True):
                more = {page: found[page, one] for page, one in frame.sums.items()
                        if page not in known and (page, one) in found}  # fmt: skip
                # An index that cannot be read now may need pages that no other one tells of.
                may_lose = not self._references.unread or draft.there < frame.end
                is_told = may_lose or bool(own) or frame.is_told
                made = None
                # With pages that are lost it still gives those that are not; and where none
                # is, its check may be wrong.
                right = known | more
                if right and is_told:
                    made = remade(frame, right, own, may_lose=may_lose)
                if made is not None:
                    draft.put(frame.offset, made)
                    draft.right += 1
                lost = len(frame.sums) - len(known) - len(more)
                if lost or made is None:
                    rest.lost.append(lost)
                if right and made is None:
                    rest.untold += not may_lose and not frame.is_told
                    rest.unfit += may_lose or frame.is_told

        await trio.to_thread.run_sync(make)

    async def _found(self, wanted: Wanted, outcome: Outcome, rest: _Rest) -> Pages:
        """Return those of the pages wanted that are somewhere."""
        found = await self._sources.pages(wanted) if wanted else {}
        outcome.pages["here"] = outcome.pages.get("here", 0) + len(found)
        left = {
            page: others for page, sums in wanted.items()
            if (others := {one for one in sums if (page, one) not in found})
        }  # fmt: skip
        copies = self._references.copies
        if rest.may_wait:
            rest.asked |= copies.unknown(left)
        if not left or rest.asked:
            return found
        more = await copies.read(left)
        outcome.pages["vault"] = outcome.pages.get("vault", 0) + len(more)
        return {**found, **more}

    async def _may_replace(self) -> bool:
        """Say whether the vault lets objects be replaced: then more may be put back later."""
        if self._replaces is None and not self._dry_run:
            try:
                self._replaces = (await probe_enforced(self._store)).overwrite == ALLOWED
            except RefusedError:
                self._replaces = False
        return self._replaces is not False

    async def _put(
        self, name: str, data: bytes, etag: str | None, metadata: Mapping[str, str],
        outcome: Outcome,
    ) -> Outcome:  # fmt: skip
        """Store an object in the place of what was read under its name."""
        outcome.stored = True
        if self._dry_run:
            return outcome
        await self._sources.take(len(data))
        hook("repair.assembled")
        try:
            await self._store.replace(name, data, etag=etag, metadata=metadata)
        except RefusedError as error:
            raise RefusedError(
                f"{name}: what is damaged cannot be replaced: {error.message}",
                hint="an immutable vault keeps damage too: repair it where it may be written",
            ) from error
        outcome.created = etag is None
        hook("repair.stored")
        return outcome


def _is_segment(part: bytes, head: SegmentHead) -> bool:
    """Say whether a part is the head of a segment, whoever wrote it."""
    try:
        return replace(decode_segment(part, where=""), writer_id=head.writer_id) == head
    except FormatError:
        return False
