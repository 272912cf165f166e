"""vdiskfs_tools.client: what a daemon answers, or that it does not."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from click.testing import Result

from vdiskfs import errors
from vdiskfs.errors import BusyError, LocalError, NotFoundError, VdiskfsError
from vdiskfs.registry import MountEntry
from vdiskfs_tools.answers import error_from
from vdiskfs_tools.client import Client

Run = Callable[..., Result]


def every_error() -> list[str]:
    found = [getattr(errors, name) for name in dir(errors)]
    kinds = [kind for kind in found if isinstance(kind, type) and issubclass(kind, VdiskfsError)]
    return [kind.__name__ for kind in kinds]


def test_an_answer_is_a_document(daemon: Any) -> None:
    daemon.answer("GET", "/health", {"ok": True})
    with Client(daemon.entry) as client:
        assert client.get("health") == {"ok": True}


def test_names_are_quoted(daemon: Any) -> None:
    daemon.answer("GET", "/disks/a%2Fb%20%3F%23", {})
    with Client(daemon.entry) as client:
        client.get("disks", "a/b ?#")


def test_parameters_that_are_not_given_are_not_sent(daemon: Any) -> None:
    daemon.answer("GET", "/disks/a/points", {})
    with Client(daemon.entry) as client:
        client.get("disks", "a", "points", since=None, limit=3)
    assert daemon.asked == [("GET", "/disks/a/points?limit=3", None)]


@pytest.mark.parametrize("kind", every_error())
def test_an_error_is_the_class_that_it_was(daemon: Any, kind: str) -> None:
    daemon.refuse("GET", "/status", kind, "said", hint="do this")
    with Client(daemon.entry) as client, pytest.raises(VdiskfsError) as caught:
        client.get("status")
    assert type(caught.value) is getattr(errors, kind)
    assert str(caught.value) == "said; do this"


@pytest.mark.parametrize("kind", ["SystemExit", "annotations", "", None, 3, ["x"]])
def test_an_error_of_an_unknown_class_is_one_of_this_host(kind: object) -> None:
    error = error_from({"error": {"kind": kind, "message": "said"}}, "x")
    assert type(error) is LocalError
    assert error.message == "said"


@pytest.mark.parametrize(
    "body", [None, [], {}, {"error": 3}, {"error": {}}, {"error": {"kind": 1}}]
)
def test_an_error_without_a_reason_says_so(body: object) -> None:
    assert "gives no reason" in str(error_from(body, "it ends"))


@pytest.mark.parametrize(
    "answer", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100000, "close"], ids=str
)
def test_an_answer_that_is_not_understood_is_one_line(daemon: Any, answer: object) -> None:
    daemon.answer("GET", "/status", answer)
    with Client(daemon.entry) as client, pytest.raises(LocalError) as caught:
        client.get("status")
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_a_daemon_that_does_not_answer_is_not_waited_for(daemon: Any) -> None:
    daemon.answer("GET", "/status", "hang")
    with Client(daemon.entry, answer_s=0.05) as client, pytest.raises(LocalError) as caught:
        client.get("status")
    assert "does not answer" in str(caught.value)
    assert daemon.asked


def test_a_daemon_that_does_not_listen_is_exit_1(entry: MountEntry, run: Run) -> None:
    result = run("status")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"vdiskfs: {entry.mountpoint}: its daemon")
    assert result.stderr.count("\n") == 1


def test_a_path_too_long_for_a_socket_is_one_line(entry: MountEntry) -> None:
    with pytest.raises(LocalError):
        Client(replace(entry, socket="/" + "x" * 200))


def test_a_busy_daemon_keeps_its_exit_code(daemon: Any, run: Run) -> None:
    daemon.refuse("POST", "/umount", "BusyError", "web01.img is used by qemu (process 7)")
    result = run("umount")
    assert result.exit_code == BusyError("").exit_code == 4
    assert result.stderr == "vdiskfs: web01.img is used by qemu (process 7)\n"


def test_what_a_daemon_says_does_nothing_to_the_terminal(daemon: Any, run: Run) -> None:
    daemon.refuse("GET", "/status", "NotFoundError", "no \x1b[2J\nsuch \x07disk")
    result = run("status")
    assert result.exit_code == NotFoundError("").exit_code
    assert result.stderr == "vdiskfs: no  such disk\n"
