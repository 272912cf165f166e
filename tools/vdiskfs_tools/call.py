"""One call of the program: its global options, which may stand before or after the command.

``Command`` and ``Group`` are click's, with these options added to each.
"""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from vdiskfs_tools.output import Output


@dataclass
class Call:
    """What the global options say. ``out`` prints accordingly."""

    mount: str | None = None
    vault: str | None = None
    key_file: str | None = None
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False

    @property
    def out(self) -> Output:
        """The printer of this call."""
        return Output(json=self.json, quiet=self.quiet, verbose=self.verbose, debug=self.debug)


def call_of(ctx: click.Context) -> Call:
    """Return the call that a command belongs to."""
    call: Call = ctx.find_root().ensure_object(Call)
    return call


F = TypeVar("F", bound=Callable[..., Any])


class GlobalOption(click.Option):
    """An option of the program as a whole."""


class FilePath(click.Path):
    """A path, completed as one by a shell. Nothing is asked of it yet; that is the command's."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the path as it was given."""
        if "\0" in value:
            self.fail("a path cannot hold a NUL character.", param, ctx)
        return str(value)


def _note(ctx: click.Context, option: click.Parameter, value: Any) -> None:
    """Keep the value of a global option, wherever on the line it stood."""
    if value not in (None, False) and option.name is not None:
        setattr(call_of(ctx), option.name, value)


def _show_version(ctx: click.Context, _option: click.Parameter, value: bool) -> None:
    """Print the version and end."""
    if value and not ctx.resilient_parsing:
        from importlib.metadata import PackageNotFoundError, version

        try:
            click.echo(f"vdiskfs {version('vdiskfs')}")
        except PackageNotFoundError:
            click.echo("vdiskfs, not installed: run from its source")
        ctx.exit()


def _global_options() -> list[click.Parameter]:
    def option(*names: str, **settings: Any) -> GlobalOption:
        return GlobalOption(names, expose_value=False, callback=_note, **settings)

    return [
        option(
            "-m",
            "--mount",
            metavar="MOUNTPOINT",
            type=FilePath(),
            help="Which mount; else $VDISKFS_MOUNT.",
        ),
        option("--vault", metavar="URL", help="Which vault; else the mount's."),
        option("--key-file", metavar="FILE", type=FilePath(), help="Key of an encrypted vault."),
        option("--json", is_flag=True, help="Print one JSON document."),
        option("-q", "--quiet", is_flag=True, help="Print no messages but errors."),
        option("-v", "--verbose", is_flag=True, help="Print more messages."),
        option("--debug", is_flag=True, help="Print all messages, and tracebacks."),
        GlobalOption(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_show_version,
            help="Print the version and exit.",
        ),
    ]


def _keep_examples(text: str) -> str:
    """Mark the examples in a help text for click: their lines stay as they are."""
    return inspect.cleandoc(text).replace("\n\nExample:\n", "\n\n\b\nExample:\n")


class Command(click.Command):
    """A command that takes the global options too."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.help = _keep_examples(self.help or "")
        self.params.extend(_global_options())

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what the library has to say meanwhile is shown."""
        with call_of(ctx).out.library_messages():
            return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command's own options, and where to read about the others."""
        records = [
            record
            for param in self.get_params(ctx)
            if not isinstance(param, GlobalOption | click.Argument)
            and (record := param.get_help_record(ctx)) is not None
        ]
        with formatter.section("Options"):
            formatter.write_dl(records)
            formatter.write_text("The options of 'vdiskfs --help' may be given here too.")


class Group(click.Group):
    """A group of commands that takes the global options too."""

    command_class = Command

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.help = _keep_examples(self.help or "")
        self.params.extend(_global_options())

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands in the order of their definition: the order of the work."""
        return list(self.commands)


def dry_run_option(function: F) -> F:
    """Add ``--dry-run``."""
    return click.option("--dry-run", is_flag=True, help="Check, say what would be done, stop.")(
        function
    )
