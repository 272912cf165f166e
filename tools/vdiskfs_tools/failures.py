"""What an error prints, and the exit code that it means (see vdiskfs(1))."""

from __future__ import annotations

import os
import traceback

import click

from vdiskfs.errors import VdiskfsError
from vdiskfs_tools.output import clean

INTERRUPTED = 130


def end_with(error: BaseException, *, debug: bool) -> int:
    """Print what an error says, on one line of standard error, and return its exit code."""
    error = first_error(error)
    if debug:
        traceback.print_exception(error)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return 2
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has enough; a second error at exit is not wanted.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    text, code = describe(error)
    if text:
        click.echo(f"vdiskfs: {clean(text)}", err=True)
    return code


def describe(error: BaseException) -> tuple[str, int]:
    """Return what to print of an error, and its exit code."""
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return "interrupted", INTERRUPTED
    if isinstance(error, VdiskfsError):
        return str(error), error.exit_code
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx is not None else "vdiskfs"
        return f"{error.format_message()} See '{path} --help'.", 2
    if isinstance(error, click.ClickException):
        return error.format_message(), error.exit_code
    if isinstance(error, PermissionError):
        return f"{error.filename or 'refused'}: {error.strerror}", 7
    if isinstance(error, OSError):
        return f"{error.filename or 'this host'}: {error.strerror or error}", 1
    name = type(error).__name__
    return f"a fault of vdiskfs itself: {name}: {error}; --debug shows where", 1


def first_error(error: BaseException) -> BaseException:
    """Return the error that counts in a group of them: an interruption, else the first of ours.

    Any other error is returned as it is.
    """
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [first_error(inner) for inner in error.exceptions]
    for kind in (KeyboardInterrupt, VdiskfsError):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return leaf
    return leaves[0]
