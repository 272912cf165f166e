"""vdiskfs status."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st

from vdiskfs_tools.status import status_lines

Run = Callable[..., Result]

DISK = {
    "name": "web01", "id": "0" * 32, "size": 1 << 30, "state": "Protected", "health": "Normal",
    "generation": 1, "epoch": 9, "shipped_lag_s": 0.4, "usable_point_age_s": 1.2,
    "proven_point_age_s": None, "dirty_bytes": 4096, "spooled_bytes": 0, "last_error": None,
    "next_retry_s": None,
}  # fmt: skip
STATUS = {
    "site": "here", "mountpoint": "/mnt/vd", "vault": "file:///v", "pid": 7, "version": "0.1.0",
    "vault_state": "ok", "vault_error": None, "points_waiting": 0, "disks": [DISK],
}  # fmt: skip

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=5,
)


def test_the_document_is_what_the_daemon_says(daemon: Any, run: Run) -> None:
    daemon.answer("GET", "/status", STATUS)
    result = run("status", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == STATUS
    assert result.stderr == ""


def test_people_see_a_table(daemon: Any, run: Run) -> None:
    daemon.answer("GET", "/status", STATUS)
    lines = run("status").stdout.splitlines()
    assert lines[0] == "/mnt/vd  site here  vault file:///v (ok)"
    assert lines[2].split() == [
        *("DISK", "STATE", "HEALTH", "SIZE", "LAG", "POINT", "AGE"),
        *("PROVEN", "AGE", "DIRTY", "SPOOLED", "RETRY", "IN"),
    ]
    assert lines[3].split() == [
        *("web01", "Protected", "Normal", "1.0", "GiB", "0.4", "s", "1.2", "s"),
        *("-", "4.0", "KiB", "0", "B", "-"),
    ]


def test_an_error_is_shown_below_the_table(daemon: Any, run: Run) -> None:
    disk = {**DISK, "health": "Critical", "last_error": "the vault \x1b[1mrefused\nthe key"}
    shown = {**STATUS, "vault_error": "no route", "points_waiting": 4, "disks": [disk]}
    daemon.answer("GET", "/status", shown)
    lines = run("status").stdout.splitlines()
    assert lines[-1] == "web01: the vault refused the key"
    assert "the vault: no route" in lines
    assert "points that wait for the vault: 4" in lines


def test_no_disk_is_said(daemon: Any, run: Run) -> None:
    daemon.answer("GET", "/status", {**STATUS, "disks": []})
    assert "no disk is protected" in run("status").stdout


@given(st.dictionaries(st.sampled_from(sorted(STATUS)), json_values), json_values)
def test_a_document_of_another_shape_is_shown_as_it_can_be(
    document: dict[str, Any], value: Any
) -> None:
    disks = [dict.fromkeys(DISK, value), value]
    assert list(status_lines(document))
    assert list(status_lines({**document, "disks": disks}))


@pytest.mark.parametrize("line", [["status", "--watch"], ["status", "--watch", "--json"]])
def test_watching_is_for_terminals(daemon: Any, run: Run, line: list[str]) -> None:
    result = run(*line)
    assert result.exit_code == 2
    assert daemon.asked == []
