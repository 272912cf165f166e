"""Nothing but FUSEError leaves a handler: anything else would end every machine's disk."""

from __future__ import annotations

import errno
import inspect
import os
from typing import Any

import pyfuse3
import pytest
import trio

from vdiskfs.errors import (
    AlreadyExistsError,
    BusyError,
    DamagedError,
    LocalError,
    NotFoundError,
    RefusedError,
    StateError,
    UsageError,
    VaultUnreachableError,
)
from vdiskfs.fs import Operations
from vdiskfs.fs.guard import handler

_PARAMETERS = {"stacktrace", "init", "forget", "poll"}


def handlers() -> list[str]:
    """Every handler that pyfuse3 calls and that we answer."""
    return [
        name
        for name, value in inspect.getmembers(pyfuse3.Operations, inspect.iscoroutinefunction)
        if not name.startswith("_") and name not in _PARAMETERS
    ]


async def errno_after(error: BaseException) -> int:
    @handler
    async def fails() -> None:
        raise error

    with pytest.raises(pyfuse3.FUSEError) as caught:
        await fails()
    number: int = caught.value.errno
    return number


class Broken:
    """A namespace that fails in every way at any touch."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"touched: {name}")


@pytest.mark.parametrize("name", handlers())
async def test_a_handler_that_fails_unexpectedly_is_eio_and_a_log_line(
    name: str, expect_log: Any, caplog: pytest.LogCaptureFixture
) -> None:
    expect_log(f"{name}: unexpected error|came to the names")
    operations = Operations.__new__(Operations)
    operations._namespace = operations._nodes = Broken()  # type: ignore[assignment]
    method = getattr(operations, name)
    arguments = [2] * len(inspect.signature(method).parameters)
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await method(*arguments)
    assert caught.value.errno == errno.EIO
    assert caplog.records


async def test_forget_never_raises(expect_log: Any) -> None:
    expect_log("forget")
    operations = Operations.__new__(Operations)
    operations._nodes = Broken()  # type: ignore[assignment]
    await operations.forget([(2, 1), (3, 1)])


def test_no_handler_is_left_to_enosys_but_poll() -> None:
    assert set(handlers()) <= set(vars(Operations))
    assert not Operations.enable_writeback_cache


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (FileNotFoundError(errno.ENOENT, "x"), errno.ENOENT),
        (OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)), errno.EOPNOTSUPP),
        (NotFoundError("x"), errno.ENOENT),
    ],
)
async def test_what_the_host_refuses_is_passed_on(error: Exception, number: int) -> None:
    assert await errno_after(error) == number


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (AlreadyExistsError("x"), errno.EEXIST),
        (BusyError("x"), errno.EBUSY),
        (StateError("x"), errno.EPERM),
        (UsageError("x"), errno.EINVAL),
        (RefusedError("x"), errno.EACCES),
        (VaultUnreachableError("x"), errno.EREMOTEIO),
        (DamagedError("x"), errno.EIO),
        (LocalError("x"), errno.EIO),
        (OSError("without a number"), errno.EIO),
        (ValueError("x"), errno.EIO),
        (ExceptionGroup("x", [ValueError("y")]), errno.EIO),
    ],
)
async def test_errors_of_ours_become_an_errno_and_a_log_line(
    error: Exception, number: int, expect_log: Any
) -> None:
    expect_log("fails")
    assert await errno_after(error) == number


async def test_cancellation_passes() -> None:
    @handler
    async def waits() -> None:
        await trio.sleep_forever()

    with trio.CancelScope() as scope:
        scope.cancel()
        await waits()
    assert scope.cancelled_caught
