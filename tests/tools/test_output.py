"""vdiskfs_tools.output: what reaches a terminal."""

import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdiskfs_tools.output import Output, clean, colour_wanted, columns, format_age, format_bytes


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("web01", "web01"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07name", "name"),
        ("\x1b]8;;http://x\x1b\\link", "link"),
        ("\x9b31mred", "red"),
        ("a\x00b\x7fc\x85d", "abcd"),
        ("gnp\u202e.exe", "gnp.exe"),
        ("two\r\nlines\tand more", "two lines and more"),
        ("\x1bc\x1b(Bx", "x"),
        ("Übung 日本", "Übung 日本"),
        ("\ud800x", "x"),
    ],
)
def test_text_does_nothing_to_a_terminal(text: str, shown: str) -> None:
    assert clean(text) == shown


@given(st.text())
def test_no_control_character_is_left(text: str) -> None:
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", clean(text))
    assert clean(clean(text)) == clean(text)


def test_json_is_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    Output(json=True).document({"name": "\x1b[31m\u202eä"})
    out = capsys.readouterr().out
    assert out.isascii()
    assert "\x1b" not in out
    assert json.loads(out) == {"name": "\x1b[31m\u202eä"}


def test_columns_line_up() -> None:
    assert columns(("NAME", ">SIZE"), [("a", 1), ("long", 1000)]) == [
        "NAME  SIZE",
        "a        1",
        "long  1000",
    ]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-"), (True, "-"), (0, "0.0 s"), (0.84, "0.8 s"), (12, "12 s"), (600, "10 min"),
     (7200, "2.0 h"), (864000, "10.0 d"), ("x", "-")],
)  # fmt: skip
def test_ages_are_short(seconds: object, shown: str) -> None:
    assert format_age(seconds) == shown


def test_an_unknown_size_is_a_dash() -> None:
    assert format_bytes(None) == format_bytes("x") == "-"
    assert format_bytes(1 << 30) == "1.0 GiB"


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert colour_wanted(Terminal())
    assert not colour_wanted(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colour_wanted(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not colour_wanted(Terminal())


def test_quiet_prints_no_messages(capsys: pytest.CaptureFixture[str]) -> None:
    Output(quiet=True, verbose=True).say("x")
    Output(quiet=True, verbose=True).detail("x")
    Output().detail("x")
    assert capsys.readouterr() == ("", "")
    Output(verbose=True).detail("y")
    assert capsys.readouterr() == ("", "y\n")


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Output().progress("x") as progress, Output().waiting("y"):
        progress(1, 2)
    assert capsys.readouterr() == ("", "")
