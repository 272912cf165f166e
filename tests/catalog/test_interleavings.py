"""Thinning, collecting, killing, reading and publishing, in any order: no kept byte changes."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.catalog.harness import bench, content
from tests.catalog.test_thinning import Site
from tests.vaults import newcomer
from vdiskfs.catalog.upkeep import hold_point, release_point
from vdiskfs.errors import ConflictError, NotFoundError, VdiskfsError
from vdiskfs.point import PointReader

pytestmark = pytest.mark.usefixtures("each_vault")

ROUNDS = int(os.environ.get("VDISKFS_INTERLEAVINGS", "60"))


class KilledError(BaseException):
    """What a hook raises where a real one would kill the process."""


class Hooks:
    """Stands for `vdiskfs.crash.hook` in the modules that thin: ends a run at the nth hook."""

    MODULES = ("leaves", "thinning", "garbage", "publish")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        self.passed: set[str] = set()
        self.killed: set[str] = set()
        for module in self.MODULES:
            monkeypatch.setattr(f"vdiskfs.catalog.{module}.hook", self.hook)

    def hook(self, name: str) -> None:
        self.passed.add(name)
        if self.left:
            self.left -= 1
            if not self.left:
                self.killed.add(name)
                raise KilledError(name)


async def killed_or_done(work: Callable[[], Awaitable[object]]) -> bool:
    """Run work; say whether it was killed."""
    try:
        await work()
    except BaseException as error:
        if not _holds_kill(error):
            raise
        return True
    return False


def _holds_kill(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(_holds_kill(one) for one in error.exceptions)
    return isinstance(error, KilledError)


@pytest.mark.timeout(3600)
async def test_every_point_that_stays_is_the_same_bytes_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tell: Callable[[str], None]
) -> None:
    """ROUNDS random steps; 60 by default, VDISKFS_INTERLEAVINGS=1000 for the long form."""
    seed = int(os.environ.get("VDISKFS_SEED", random.randrange(1 << 30)))
    rng = random.Random(seed)
    tell(f"interleavings, VDISKFS_SEED={seed}")
    hooks = Hooks(monkeypatch)
    done: dict[str, int] = {}
    async with bench() as test:
        site = Site(test, tmp_path, rng)
        readers: list[tuple[PointReader, int, bool]] = []
        held: set[int] = set()
        await site.publish(70)

        async def read_one() -> None:
            reader, epoch, kept_for_sure = readers.pop(rng.randrange(len(readers)))
            try:
                assert await content(reader) == test.model.states[epoch]
            except NotFoundError as error:
                assert "thinned away" in str(error)
                assert not kept_for_sure

        for _ in range(ROUNDS):
            step = rng.choice(
                ["publish", "publish", "thin", "thin", "kill", "kill", "collect", "open", "read",
                 "hold", "release", "both", "lost"]
            )  # fmt: skip
            if step == "publish":
                await site.publish(rng.choice([1, 7, 25]))
            elif step == "thin":
                await site.thin()
            elif step == "kill":
                hooks.left = rng.randrange(1, 9)
                work: Callable[[], Awaitable[object]] = rng.choice([site.thin, site.collect])  # type: ignore[list-item]
                if not await killed_or_done(work):
                    step = "not killed"
                hooks.left = 0
                test.log.adopt(await site.record())
            elif step == "collect":
                await site.collect()
            elif step == "open":
                log = await site.log()
                point = rng.choice(await log.points())
                readers.append((await log.open(point), point.epoch, point.epoch in held))
            elif step == "read" and readers:
                await read_one()
            elif step == "hold":
                log = await site.log()
                point = rng.choice(await log.points())
                await hold_point(test.vault, log, point, "test")
                held.add(point.epoch)
            elif step == "release" and held:
                log = await site.log()
                point = await log.find(held.pop())
                await release_point(test.vault, log, point)
                readers = [(one, epoch, epoch in held) for one, epoch, _ in readers]
            elif step == "both":
                # Two sites thin at once: one of them wins.
                other = replace(site, directory=tmp_path / "other")
                (tmp_path / "other").mkdir(exist_ok=True)
                await _race(site, other)
            elif step == "lost":
                site.gone.clear()  # the daemon has started anew
            done[step] = done.get(step, 0) + 1
            if rng.random() < 0.15:
                left = await site.check()
                assert held <= set(left)
                assert test.model.epoch in left
        for _ in range(2):
            await site.thin()
            await site.collect()
        left = await site.check()
        assert held <= set(left)
        while readers:
            await read_one()
        vault = newcomer(test.vault)
        assert (await vault.log(await site.record()).tip()).epoch == test.model.epoch
    assert done.get("kill", 0) >= ROUNDS // 60, done
    tell(f"  {done}, {sorted(hooks.killed)}")


async def _race(one: Site, other: Site) -> None:
    async def thin(site: Site) -> None:
        try:
            await site.thin()
        except ConflictError:
            pass
        except VdiskfsError as error:
            # What the winner has collected meanwhile cannot be read by the one who lost.
            assert "missing" in str(error) or "no such object" in str(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(thin, one)
        nursery.start_soon(thin, other)
