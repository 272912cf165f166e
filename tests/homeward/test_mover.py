"""An image becomes exactly a point, from whatever state it was left in."""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
import tempfile
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.catalog.lines import Lines, Place, act, differing
from tests.catalog.memory import MemoryStore
from tests.delta.model import PAGE
from tests.homeward.harness import Home, home
from vdiskfs.errors import DamagedError, LocalError, NotFoundError, VaultUnreachableError
from vdiskfs.homeward import HomeMover, prepare_home, read_home
from vdiskfs.homeward import mover as mover_module
from vdiskfs.homeward.target import TargetFile
from vdiskfs.ratelimit import RateLimiter
from vdiskfs.state import write_record


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images take many pieces."""
    monkeypatch.setattr(mover_module, "PIECE", 4)
    monkeypatch.setattr(mover_module, "MARK_PIECES", 3)


async def two_lines(test: Lines, rng: random.Random, epochs: int = 6) -> list[Place]:
    """Make a line and a branch of it with changes of all kinds; return all points."""
    test.models[1].write(0, rng.randbytes(60 * PAGE))
    for generation in (1, 2):
        if generation == 2:
            test.fork((1, rng.randrange(1, epochs)))
        for _ in range(epochs):
            for _ in range(rng.randrange(1, 4)):
                act(test.models[generation], rng, pages=70)
            await test.publish(generation)
    return sorted(test.states)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), verify=st.booleans(), full=st.booleans())
async def test_rounds_lead_to_exactly_the_points(seed: int, verify: bool, full: bool) -> None:
    """From a known point, or from anything, over several points of several lines."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        async with home(Path(place)) as one:
            points = await two_lines(one.test, rng)
            start = rng.choice(points)
            if full:
                one.begin(None, rng.randbytes(rng.randrange(90 * PAGE)))
            else:
                one.begin(start, one.test.states[start])
            mover = one.mover(verify=verify)
            for to in (rng.choice(points), rng.choice(points), points[-1]):
                planned = await mover.plan(to)
                progress = await mover.move(to)
                one.assert_is(to)
                assert progress.done_bytes == progress.total_bytes == planned


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), full=st.booleans())
async def test_a_move_that_is_cancelled_anywhere_is_gone_on_with(seed: int, full: bool) -> None:
    """Also towards other points, and with anything in the pages that were under way."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        async with home(Path(place)) as one:
            points = await two_lines(one.test, rng)
            start = rng.choice(points)
            data = rng.randbytes(80 * PAGE) if full else one.test.states[start]
            one.begin(None if full else start, data)
            for _ in range(4):
                await cut_short(one, rng.choice(points), rng.randrange(40))
                one.assert_note_holds()
                tear(one, rng)
                one.assert_note_holds()
            to = rng.choice(points)
            await one.mover(verify=True).move(to)
            one.assert_is(to)


async def cut_short(one: Home, to: Place, steps: int) -> None:
    """Move, but only for so many hooks."""
    left = steps

    def stop(name: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt(name)

    with mock.patch.object(mover_module, "hook", stop), suppress(KeyboardInterrupt):
        try:
            await one.mover().move(to)
        except BaseExceptionGroup as group:
            if group.split(KeyboardInterrupt)[1] is not None:
                raise


def tear(one: Home, rng: random.Random) -> None:
    """Put anything where the note says that anything may be."""
    note = read_home(one.notes)
    states = [one.test.states[place] for place in note.path]
    data = bytearray(one.image.read_bytes())
    pages = [
        page
        for first, second in zip(states, states[1:], strict=False)
        for page in differing(first, second)
    ]
    if note.known is not None:
        pages += range(note.known, len(data) // PAGE)
    for page in pages:
        if rng.random() < 0.3:
            end = min(len(data), (page + 1) * PAGE)
            if page * PAGE < end:
                data[page * PAGE : end] = rng.randbytes(end - page * PAGE)
    one.image.write_bytes(data)


async def test_two_moves_at_once_are_made_one_after_the_other_wherever_they_are_cut_off(
    tmp_path: Path,
) -> None:
    """What follows the other site goes on while all is asked for once more."""
    async with home(tmp_path) as one:
        points = await two_lines(one.test, random.Random(6))
        start, *others = points[0], points[3], points[-1]
        for steps in itertools.count(1):
            one.begin(start, one.test.states[start])
            mover, left, at = one.mover(verify=True), steps, []
            scope = trio.CancelScope()

            def count(_: str) -> None:
                nonlocal left
                at.append(mover.at)
                left -= 1
                if not left:
                    scope.cancel()

            with mock.patch.object(mover_module, "hook", count), scope:
                async with trio.open_nursery() as both:
                    for place in others:
                        both.start_soon(mover.move, place)
            one.assert_note_holds()
            assert set(at) == {None}  # it is on its way
            await one.mover().move(points[-1])
            one.assert_is(points[-1])
            if left > 0:
                break
        assert steps > 20


async def test_only_what_differs_is_fetched_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4 MiB, 8 pages that differ are read from the vault; the rest is not touched."""
    monkeypatch.setattr(mover_module, "PIECE", 6)  # what cuts it lies inside a chunk
    async with home(tmp_path) as one:
        rng = random.Random(1)
        model = one.test.models[1]
        model.write(0, rng.randbytes(4 << 20))
        await one.test.publish(1)
        model.write(77 * PAGE, rng.randbytes(8 * PAGE))
        await one.test.publish(1)
        one.begin((1, 1), one.test.states[1, 1])
        written = []
        write = TargetFile.write

        def noted(self: TargetFile, pages: object, data: memoryview, full: object) -> None:
            written.append(len(data) // PAGE)
            write(self, pages, data, full)  # type: ignore[arg-type]

        before = one.test.bench.store.bytes_received
        with mock.patch.object(TargetFile, "write", noted):
            progress = await one.mover().move((1, 2))
        one.assert_is((1, 2))
        assert sum(written) == 8
        assert progress.total_bytes == 8 * PAGE
        assert progress.fetched_bytes <= 9 * PAGE
        assert one.test.bench.store.bytes_received - before < 200_000


async def test_what_is_zero_becomes_a_hole(tmp_path: Path) -> None:
    """A sparse image stays sparse, and what is discarded gives its room back."""
    async with home(tmp_path) as one:
        model = one.test.models[1]
        model.write(0, random.Random(1).randbytes(256 * PAGE))
        model.truncate(2000 * PAGE)
        await one.test.publish(1)
        model.discard(10 * PAGE, 200 * PAGE)
        await one.test.publish(1)
        for at in ((1, 1), None):
            one.begin(at, one.test.states[1, 1])
            await one.mover().move((1, 2))
            one.assert_is((1, 2))
            assert one.allocated() <= 60 * PAGE


async def test_where_there_are_no_holes_zeros_are_written(tmp_path: Path) -> None:
    async with home(tmp_path) as one:
        model = one.test.models[1]
        model.write(0, b"x" * (30 * PAGE + 17))
        await one.test.publish(1)
        model.discard(3 * PAGE, 40 * PAGE)
        await one.test.publish(1)
        one.begin((1, 1), one.test.states[1, 1])
        refused = OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        with mock.patch("vdiskfs.native.punch", side_effect=refused) as punch:
            await one.mover(verify=True).move((1, 2))
        assert punch.called
        one.assert_is((1, 2))


class Moody(MemoryStore):
    """A vault that is away for three tries when it has answered so many requests."""

    leaves_at = -1
    refused = 0

    async def _request(self) -> None:
        if self.requests == self.leaves_at and self.refused < 3:
            self.refused += 1
            raise VaultUnreachableError("memory: away")
        await super()._request()


@pytest.mark.parametrize("full", [False, True])
async def test_a_vault_that_is_away_is_waited_for(
    tmp_path: Path, autojump_clock: object, full: bool
) -> None:
    """At each so many requests of the move in turn: it says so, and goes on."""
    async with home(tmp_path) as one:
        points = await two_lines(one.test, random.Random(5))
        start, to = points[0], points[-1]
        objects, leaves_at = one.test.bench.store.objects, 0
        while True:
            one.begin(None if full else start, one.test.states[start])
            store = one.test.bench.store = Moody()
            store.objects, store.leaves_at = objects, leaves_at
            said: set[str] = set()

            async def look(said: set[str], mover: HomeMover) -> None:
                while True:
                    await trio.sleep(0.5)
                    said.add(mover.progress.waiting)

            async with trio.open_nursery() as nursery:
                mover = one.mover(verify=True)
                nursery.start_soon(look, said, mover)
                await mover.move(to)
                nursery.cancel_scope.cancel()
            one.assert_is(to)
            if store.requests <= leaves_at:
                break
            assert store.refused == 3
            assert "memory: away" in said
            assert not mover.progress.waiting
            leaves_at += 3
        assert leaves_at > 5


async def test_a_folder_that_lacks_everything_may_be_one_that_is_away(
    tmp_path: Path, autojump_clock: object
) -> None:
    """Whoever knows the vault says so; otherwise it is damage, and the note stays."""
    async with home(tmp_path) as one:
        points = await two_lines(one.test, random.Random(5))
        one.begin(points[0], one.test.states[points[0]])
        objects = dict(one.test.bench.store.objects)
        one.test.bench.store.objects.clear()

        async def is_away() -> bool:
            if mover.progress.waiting:
                one.test.bench.store.objects.update(objects)
            return True

        mover = one.mover(is_away=is_away)
        await mover.move(points[-1])
        one.assert_is(points[-1])
        one.begin(points[0], one.test.states[points[0]])
        one.test.bench.store.objects.clear()
        with pytest.raises((NotFoundError, DamagedError)):
            await one.mover().move(points[-1])
        one.assert_is(points[0])


async def test_the_rate_is_bounded(tmp_path: Path, autojump_clock: object) -> None:
    """Two moves that share a limiter take as long as the bytes of both."""
    async with home(tmp_path) as one:
        model = one.test.models[1]
        model.write(0, random.Random(2).randbytes(100 * PAGE))
        await one.test.publish(1)
        limiter = RateLimiter(10 * PAGE)
        second = Home(one.test, tmp_path / "second")
        second.image.parent.mkdir()
        movers = []
        for each in (one, second):
            each.begin(None, b"")
            movers.append(each.mover(limiter=limiter))
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for mover in movers:
                nursery.start_soon(mover.move, (1, 1))
        one.assert_is((1, 1))
        second.assert_is((1, 1))
        wanted = sum(mover.progress.fetched_bytes for mover in movers) / limiter.limit
        assert wanted >= 20
        assert wanted - 10 <= trio.current_time() - began <= wanted


async def test_who_is_cancelled_takes_nothing_from_the_limit(autojump_clock: object) -> None:
    limiter = RateLimiter(100)
    await limiter.take(100)
    with trio.move_on_after(0.1):
        await limiter.take(1_000_000)
    began = trio.current_time()
    await limiter.take(100)
    assert trio.current_time() - began < 2


async def test_an_image_that_does_not_hold_what_was_written_is_seen(tmp_path: Path) -> None:
    """The disk loses a write without a word: it does not count as moved, and can be mended."""
    async with home(tmp_path) as one:
        points = await two_lines(one.test, random.Random(9))
        one.begin(points[0], one.test.states[points[0]])
        write, seen = os.pwrite, []

        def lossy(fd: int, data: bytes, offset: int) -> int:
            seen.append(offset)
            return len(data) if len(seen) == 1 else write(fd, data, offset)

        with mock.patch.object(os, "pwrite", lossy), pytest.raises(DamagedError, match="page"):
            await one.mover(verify=True).move(points[-1])
        assert read_home(one.notes).at is None
        await one.mover(verify=True).move(points[-1])
        one.assert_is(points[-1])


@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fdatasync"])
async def test_an_error_of_the_local_disk_is_one_line_and_nothing_is_lost(
    tmp_path: Path, call: str
) -> None:
    async with home(tmp_path) as one:
        points = await two_lines(one.test, random.Random(3))
        one.begin(points[0], one.test.states[points[0]])
        failure = OSError(errno.EIO, os.strerror(errno.EIO))
        with mock.patch.object(os, call, side_effect=failure), pytest.raises(LocalError) as info:
            await one.mover().move(points[-1])
        # Records are cut to their length, too.
        place = one.notes / "home.json" if call == "ftruncate" else one.image
        assert str(info.value) == f"{place}: Input/output error"
        one.assert_note_holds()
        await one.mover().move(points[-1])
        one.assert_is(points[-1])


async def test_a_full_disk_ends_a_move_that_goes_on_later(tmp_path: Path) -> None:
    """The file may not grow further: EFBIG stands for what a full disk says."""
    async with home(tmp_path) as one:
        model = one.test.models[1]
        model.write(0, random.Random(2).randbytes(100 * PAGE))
        await one.test.publish(1)
        one.begin(None, b"")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50 * PAGE, limits[1]))
        try:
            with pytest.raises(LocalError, match="File too large"):
                await one.mover().move((1, 1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        await one.mover().move((1, 1))
        one.assert_is((1, 1))


async def test_a_point_that_is_not_there_changes_nothing(tmp_path: Path) -> None:
    async with home(tmp_path) as one:
        points = await two_lines(one.test, random.Random(3))
        one.begin(points[0], one.test.states[points[0]])
        with pytest.raises(NotFoundError):
            await one.mover().move((1, 99))
        one.assert_is(points[0])


async def test_an_image_that_is_there_costs_nothing(tmp_path: Path) -> None:
    async with home(tmp_path) as one:
        points = await two_lines(one.test, random.Random(3))
        one.begin(points[0], one.test.states[points[0]])
        before = one.test.bench.store.requests
        await one.mover().move(points[0])
        assert one.test.bench.store.requests == before


def test_a_note_that_is_none_is_not_believed(tmp_path: Path) -> None:
    prepare_home(tmp_path / "note", "d" * 32, (1, 5))
    note = read_home(tmp_path / "note")
    assert note.at == (1, 5)
    for body in (
        {"format": 2, "disk": "d", "path": [[1, 5]], "known": None},
        {"format": 1, "disk": "d", "path": [], "known": None},
        {"format": 1, "disk": "d", "path": [[1]], "known": None},
        {"format": 1, "disk": "d", "path": [[1, 5]], "known": -1},
    ):
        write_record(tmp_path / "note" / "home.json", body)
        with pytest.raises(DamagedError, match="not a note"):
            read_home(tmp_path / "note")
    with pytest.raises(NotFoundError):
        read_home(tmp_path)
