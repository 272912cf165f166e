"""Jobs in SQLite: what goes on after a restart, what does not, and how many are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from vdiskfs.errors import DamagedError, NotFoundError, StateError
from vdiskfs.jobs import JobKind, Jobs, JobState, Progress
from vdiskfs.jobs.jobs import KEPT_OF_KIND

DISK = "a" * 32


async def write(jobs: Jobs) -> None:
    """Let what was said be written, as the end of a daemon does."""
    with trio.move_on_after(0.01):
        await jobs.run()


async def reopened(state: Path) -> Jobs:
    jobs = Jobs(state)
    await jobs.load()
    return jobs


async def test_what_can_go_on_is_the_same_job_and_the_rest_is_interrupted(tmp_path: Path) -> None:
    jobs = await reopened(tmp_path)
    finalize = jobs.begin(JobKind.FINALIZE, "web01", DISK)
    jobs.step(finalize, "machine")
    proof = jobs.begin(JobKind.PROVE, "web01", DISK)
    await write(jobs)
    later = await reopened(tmp_path)
    assert later.find(proof).state is JobState.INTERRUPTED
    assert later.find(proof).ended_ns
    assert later.document(later.find(finalize))["waits_for"] == "the disk to be taken up"
    assert later.begin(JobKind.FINALIZE, "web01", DISK) == finalize
    document = later.document(later.find(finalize))
    assert (document["state"], document["steps"], document["waits_for"]) == (
        "running", ["machine"], None)  # fmt: skip
    # One that is over is another one.
    later.done(finalize, "it works")
    await write(later)
    last = await reopened(tmp_path)
    assert (last.find(finalize).state, last.find(finalize).outcome) == (JobState.DONE, "it works")
    assert last.begin(JobKind.FINALIZE, "web01", DISK) not in (finalize, proof)


async def test_one_that_fails_says_what_to_do_and_goes_on(tmp_path: Path) -> None:
    jobs = await reopened(tmp_path)
    progress = Progress()
    one = jobs.begin(JobKind.FINALIZE, "web01", DISK, progress=progress.shown)
    progress.tell(4096, 8192)
    assert jobs.document(jobs.find(one))["progress"] == {"done_bytes": 4096, "total_bytes": 8192}
    jobs.stands(one, DamagedError("it is rotten", hint="mend it"))
    found = jobs.document(jobs.find(one))
    assert (found["state"], found["error"], found["hint"], found["exit_code"]) == (
        "failed", "it is rotten", "mend it", 6)  # fmt: skip
    assert found["ended"] is None
    assert jobs.begin(JobKind.FINALIZE, "web01", DISK) == one
    assert jobs.document(jobs.find(one))["error"] is None


async def test_a_bounded_number_is_kept_but_none_that_goes_on_is_lost(tmp_path: Path) -> None:
    jobs = await reopened(tmp_path)
    first = jobs.begin(JobKind.PROTECT, "web01", DISK)
    for number in range(KEPT_OF_KIND + 5):
        jobs.note(JobKind.THIN, "web01", DISK, 1, f"turn {number}")
    await write(jobs)
    later = await reopened(tmp_path)
    assert [one.id for one in later.all() if one.kind is JobKind.PROTECT] == [first]
    kept = [one.outcome for one in later.all() if one.kind is JobKind.THIN]
    assert (len(kept), kept[-1]) == (KEPT_OF_KIND, f"turn {KEPT_OF_KIND + 4}")


async def test_only_what_can_be_cancelled_is(tmp_path: Path) -> None:
    jobs = await reopened(tmp_path)
    asked = []

    async def give_up() -> None:
        asked.append(True)

    one = jobs.begin(JobKind.RESYNC, "web01", DISK, cancel=give_up)
    await jobs.cancel(one)
    assert asked
    jobs.done(one, "")
    with pytest.raises(StateError, match="is over"):
        await jobs.cancel(one)
    with pytest.raises(StateError, match="cannot be cancelled"):
        await jobs.cancel(jobs.begin(JobKind.PROTECT, "web01", DISK))
    with pytest.raises(NotFoundError):
        await jobs.cancel("none")


async def test_a_damaged_database_is_set_aside_and_jobs_go_on(
    tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    (tmp_path / "jobs.db").write_bytes(b"no database at all" * 500)
    jobs = await reopened(tmp_path)
    expect_log(r"set aside as jobs\.db\.damaged; jobs begin anew")
    one = jobs.begin(JobKind.THIN, "web01", DISK)
    await write(jobs)
    assert [job.id for job in (await reopened(tmp_path)).all()] == [one]
