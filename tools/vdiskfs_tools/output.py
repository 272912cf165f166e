"""What is printed, where, and in which form.

Results go to standard output, for people or as one JSON document. Messages, progress and
errors go to standard error. Colours and progress are for terminals only, and never with
NO_COLOR or TERM=dumb. Text that came from elsewhere is cleaned before it reaches a terminal.
"""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

import click

# A terminal's own commands: CSI and OSC sequences, then any other escape.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
)
# Control characters, and those that turn the direction of a line.
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

COLOURS = {"Critical": "red", "Warning": "yellow", "Normal": "green", "Protected": "green"}

Progress = Callable[[int, int], None]
"""progress(done, total), bytes or things, both counted from the start."""


def clean(text: object) -> str:
    """Return text that does nothing to a terminal but appear, on one line."""
    one_line = re.sub(r"[\r\n\t]+", " ", str(text))
    return _CONTROLS.sub("", _ESCAPES.sub("", one_line))


def colour_wanted(stream: TextIO) -> bool:
    """Tell whether colours may be written to a stream."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return not plain and stream.isatty()


def format_age(seconds: object) -> str:
    """Write a span for people: ``0.8 s``, ``4 min``, ``2.5 h``, ``3.1 d``; - is unknown."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return "-"
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            short = seconds / divisor
            return f"{short:.1f} {unit}" if short < 10 else f"{short:.0f} {unit}"
    return f"{seconds / 86400:.1f} d"


def format_countdown(seconds: object) -> str:
    """Write what is left of a wait, to the second: ``7:05``, ``1:02:03``; - is none."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return "-"
    if not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def format_bytes(size: object) -> str:
    """Write a size for people; - is unknown."""
    from vdiskfs.units import format_size

    if isinstance(size, bool) or not isinstance(size, int | float):
        return "-"
    return format_size(size)


def counted(count: int, thing: str) -> str:
    """Write a number of things: ``1 point``, ``2 points``."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def columns(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lay a table out in lines; the names of right-aligned columns begin with ``>``."""
    names = [name.lstrip(">") for name in header]
    cells = [names, *([clean(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    lines = []
    for row in cells:
        parts = [
            cell.rjust(width) if name.startswith(">") else cell.ljust(width)
            for cell, width, name in zip(row, widths, header, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return lines


@dataclass(frozen=True)
class Output:
    """The printer of one call."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False

    def document(self, document: Mapping[str, Any]) -> bool:
        """Print the JSON document if JSON is wanted; tell whether it was.

        Only ASCII is written: a name in it cannot speak to a terminal.
        """
        if self.json:
            click.echo(json.dumps(document, indent=2))
        return self.json

    def line(self, text: object = "", *, colour: str | None = None, bold: bool = False) -> None:
        """Print one line of the result."""
        styled = click.style(clean(text), fg=colour, bold=bold)
        click.echo(styled, color=colour_wanted(sys.stdout))

    def facts(self, facts: Mapping[str, object]) -> None:
        """Print names and values, one a line."""
        width = max((len(name) for name in facts), default=0)
        words = {None: "-", True: "yes", False: "no"}
        for name, value in facts.items():
            shown = words[value] if value is None or isinstance(value, bool) else value
            if isinstance(value, list):
                shown = ", ".join(map(str, value)) or "-"
            self.line(f"{name.ljust(width)}  {shown}")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table; each line has the colour of the first word in it that has one."""
        for number, line in enumerate(columns(header, rows)):
            words = [COLOURS[word] for word in line.split() if word in COLOURS]
            self.line(line, colour=words[0] if words and number else None, bold=number == 0)

    def say(self, text: str) -> None:
        """Print a message for people, unless they want quiet."""
        if not self.quiet:
            click.echo(clean(text), err=True)

    def detail(self, text: str) -> None:
        """Print a message for people who want more."""
        if self.verbose and not self.quiet:
            click.echo(clean(text), err=True)

    @contextmanager
    def library_messages(self) -> Iterator[None]:
        """Show what the library logs: warnings, or as much as was asked for."""
        import logging

        class Clean(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                for part in self.format(record).splitlines():
                    click.echo(f"vdiskfs: {clean(part)}", err=True)

        wanted = logging.ERROR if self.quiet else logging.WARNING
        if self.verbose or self.debug:
            wanted = logging.DEBUG if self.debug else logging.INFO
        handler, logger = Clean(wanted), logging.getLogger("vdiskfs")
        before = logger.level
        logger.addHandler(handler)
        logger.setLevel(min(wanted, logger.getEffectiveLevel()))
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before)

    @property
    def shows_progress(self) -> bool:
        """Whether somebody looks: a terminal, and quiet is not wanted."""
        return not self.quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    @contextmanager
    def waiting(self, text: str) -> Iterator[Callable[[str], None]]:
        """Show that something goes on, of unknown length; what is yielded says what, anew."""
        if not self.shows_progress:
            yield lambda _: None
            return
        from rich.console import Console

        with Console(stderr=True).status(clean(text)) as status:
            yield lambda said: status.update(clean(f"{text}: {said}"))

    @contextmanager
    def progress(self, text: str, *, counts: bool = False) -> Iterator[Progress]:
        """Show how many bytes of how many are done; with ``counts``, how many things."""
        if not self.shows_progress:
            yield lambda _done, _total: None
            return
        from rich import progress as bars
        from rich.console import Console

        columns: list[bars.ProgressColumn] = [
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
        ]
        if counts:
            columns.append(bars.MofNCompleteColumn())
        else:
            columns += [bars.DownloadColumn(binary_units=True), bars.TransferSpeedColumn()]
        columns.append(bars.TimeRemainingColumn())
        with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(clean(text), total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
