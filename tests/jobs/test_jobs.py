"""Jobs in SQLite: what goes on after a restart, what does not, and how many are kept."""

from __future__ import annotations

import sqlite3
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
    await jobs.cancel(one, dry_run=True)
    assert not asked
    await jobs.cancel(one)
    assert asked
    jobs.done(one, "")
    for dry_run in (False, True):
        with pytest.raises(StateError, match="is over"):
            await jobs.cancel(one, dry_run=dry_run)
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


async def test_a_row_that_is_not_right_is_left_out_and_its_number_is_not_given_again(
    tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    jobs = await reopened(tmp_path)
    for number in range(9):
        jobs.done(jobs.begin(JobKind.THIN, "web01", DISK), f"turn {number}")
    await write(jobs)
    with sqlite3.connect(tmp_path / "jobs.db") as database:
        for number, change in enumerate((
            "number = 'x'", "began_ns = -1", "ended_ns = 1e30", "code = x'00'", "outcome = 5",
            "steps = '[[\"a\", null]]'", "kind = 'another'", f"steps = '{'[' * 9999}'",
        )):  # fmt: skip
            database.execute(f"UPDATE jobs SET {change} WHERE number = {number + 2}")
    database.close()
    later = await reopened(tmp_path)
    expect_log("left out: 8")
    assert [later.document(job)["outcome"] for job in later.all()] == ["turn 0"]
    assert later.begin(JobKind.THIN, "web01", DISK) == f"{DISK[:8]}-10"


async def test_a_load_that_fails_is_made_up_for_and_no_job_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    jobs = await reopened(tmp_path)
    finalize = jobs.begin(JobKind.FINALIZE, "web01", DISK)
    await write(jobs)
    later = Jobs(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(later._database, "read", lambda: 1 / 0)
        await later.load()
    expect_log("jobs cannot be read")
    proof = later.begin(JobKind.PROVE, "web01", DISK)
    await write(later)
    for one in (later, await reopened(tmp_path)):
        assert [job.id for job in one.all()] == [finalize, proof]
        assert one.document(one.find(finalize))["waits_for"] == "the disk to be taken up"


async def test_a_job_whose_disk_does_not_come_back_is_interrupted(tmp_path: Path) -> None:
    jobs = await reopened(tmp_path)
    here = jobs.begin(JobKind.RESYNC, "web01", DISK)
    gone = jobs.begin(JobKind.FINALIZE, "web02", "b" * 32)
    await write(jobs)
    later = await reopened(tmp_path)
    new = later.begin(JobKind.PROTECT, "web03", "c" * 32)  # made while the others were taken up
    later.disks_are([DISK])
    assert [one.id for one in later.all() if one.is_open] == [here, new]
    document = later.document(later.find(gone))
    assert (document["state"], document["exit_code"]) == ("interrupted", 1)
    assert document["error"] == "the disk is not protected here any more"


async def test_progress_that_cannot_be_told_hides_no_job(tmp_path: Path) -> None:
    jobs = await reopened(tmp_path)
    one = jobs.begin(JobKind.RESYNC, "web01", DISK, progress=lambda: (1 // 0, 1))
    assert jobs.document(jobs.find(one))["progress"] is None
