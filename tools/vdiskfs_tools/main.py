"""The program: its commands, what its errors print, and its exit codes (see vdiskfs(1))."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from vdiskfs.errors import VdiskfsError
from vdiskfs_tools import completion, disk, doctor, mount, point, status, umount, vault
from vdiskfs_tools.call import Call, Group
from vdiskfs_tools.output import clean

INTERRUPTED = 130


class Program(Group):
    """The outermost group: it makes the call, and ends it with one line and an exit code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the line into a new call."""
        ctx.obj = Call()
        return super().parse_args(ctx, args)

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **settings: Any
    ) -> NoReturn:
        """Run the program and exit; whatever happens is one line, unless debugging is asked for."""
        settings.pop("standalone_mode", None)
        line = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(line, prog_name or "vdiskfs", standalone_mode=False, **settings)
            sys.stdout.flush()
        except SystemExit:
            raise
        except BaseException as error:  # noqa: BLE001 (the edge: nothing is above)
            code = end_with(error, debug="--debug" in line)
        sys.exit(code if isinstance(code, int) else 0)


def end_with(error: BaseException, *, debug: bool) -> int:
    """Print what an error says, on one line of standard error, and return its exit code."""
    error = _first(error)
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


def _first(error: BaseException) -> BaseException:
    """Return the error that counts in a group of them: an interruption, else the first of ours."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [_first(inner) for inner in error.exceptions]
    for kind in (KeyboardInterrupt, VdiskfsError):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return leaf
    return leaves[0]


@click.group("vdiskfs", cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Disks that replicate every second, and a directory for every second of their past.

    Example:
        vdiskfs vault init file:///srv/vault
        vdiskfs mount /srv/images /mnt/vd --vault file:///srv/vault
        vdiskfs status
        vdiskfs point restore web01@-15m /tmp/web01.img
    """


for command in (
    vault.vault,
    mount.mount,
    umount.umount,
    status.status,
    doctor.doctor,
    disk.disk,
    point.point,
    completion.completion,
):
    cli.add_command(command)


def main() -> NoReturn:
    """Run the program."""
    cli.main(prog_name="vdiskfs")
