"""--dry-run: what changes something has it, and the daemon is told of it."""

from collections.abc import Callable, Iterator
from typing import Any

import click
import pytest
from click.testing import Result

from vdiskfs_tools.call import Command
from vdiskfs_tools.main import cli

Run = Callable[..., Result]

READS = """
vault key list; vault info; vault check; status; doctor; discover; disk list; disk show;
disk branches; machine list; machine show; group list; group show; site list; site show;
point list; point show; point diff; policy list; policy show; failover list; failover show;
job list; job show; job wait; event list; event test; completion
"""
"""What changes no disk, no vault and no mount."""

IN_THE_VAULT = """
vault init; vault key add; vault key change; vault key remove; vault gc; mount; machine set;
point hold; point release; point restore; point prove; policy set
"""
"""What is done without a daemon: tested where the rest of the command is."""

LOOKS = """
disk protect web01; disk unprotect web01; disk retry web01; disk pause web01; disk resume web01;
disk resync web01; disk resync web01 --now; disk resync web01 --cancel; point create web01;
umount; upgrade
"""
"""What only looks: nothing is sent to the daemon but questions."""

ASKED = {
    "vault repair": "/repairs",
    "group create shop web01": "/groups",
    "group add shop web01": "/groups/shop/add",
    "group remove shop web01": "/groups/shop/remove",
    "group delete shop": "/groups/shop/delete",
    "failover test web01": "/failovers",
    "failover cleanup t1": "/failovers/t1/cleanup",
    "failover start web01": "/failovers/start",
    "failover start web01 --unplanned --vm none": "/failovers/start",
    "failover change-point t1 --point -1h": "/failovers/t1/change-point",
    "failover commit t1": "/failovers/t1/commit",
    "failover rollback t1": "/failovers/t1/rollback",
    "reprotect web01": "/reprotect/web01",
    "failback start web01": "/failbacks/web01",
    "failback complete web01": "/failbacks/web01/complete",
    "failback complete web01 --unplanned": "/failbacks/web01/complete",
    "failback commit web01": "/failbacks/web01/commit",
    "job cancel a-1": "/jobs/a-1/cancel",
}
"""What the daemon is asked for: it alone knows what would be done."""

# A failover that goes on, and whose machine is waited for: a dry run waits for nothing.
ANSWER = {
    "name": "t1", "id": "a", "state": "Starting", "job": {"id": "a-1", "state": "running"},
    "machine": {"name": "shop"}, "health": None, "dry_run": True, "disks": [], "plain": None,
    "version": "1", "members": [{"disk": "web01", "point_time": None}], "ok": True, "points": 1,
    "healed": [], "left": [], "refused": False, "read_bytes": 1,
}  # fmt: skip
REPAIRED = {**ANSWER, "disks": 1}


def lines(text: str) -> list[str]:
    return [" ".join(one.split()) for one in text.split(";")]


def commands(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path}{name} ")
        else:
            yield path + name, command


def test_what_changes_something_has_a_dry_run_and_a_test_of_it() -> None:
    known = dict(commands(cli))
    assert all(isinstance(one, Command) for one in known.values())
    dry = {name for name, one in known.items() for it in one.params if "--dry-run" in it.opts}
    assert set(known) - dry == set(lines(READS))
    tried = [*lines(LOOKS), *ASKED]
    of_daemon = {name for name in known for one in tried if f"{one} ".startswith(f"{name} ")}
    assert dry == of_daemon | set(lines(IN_THE_VAULT))


@pytest.mark.parametrize("line", lines(LOOKS))
def test_a_dry_run_asks_only(daemon: Any, run: Run, line: str) -> None:
    for path in ("/disks/web01", "/status"):
        daemon.answer("GET", path, {"name": "web01", "version": "1", "plain": None})
    result = run(*line.split(), "--dry-run")
    assert (result.exit_code, "would" in result.stderr) == (0, True), result.stderr
    assert {method for method, _, _ in daemon.asked} <= {"GET"}


@pytest.mark.parametrize("line", ASKED)
def test_the_daemon_is_told_that_it_is_a_dry_run(
    daemon: Any, run: Run, run_json: Callable[..., Any], line: str
) -> None:
    path = ASKED[line]
    daemon.answer("GET", "/status", {"disks": [{"name": "web01", "id": "b"}], "plain": None})
    daemon.answer("POST", path, REPAIRED if path == "/repairs" else ANSWER)
    more = ["--disk", "web01"] if path == "/repairs" else []
    result = run(*line.split(), *more, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "would" in result.stderr + result.stdout or path == "/repairs"
    assert run_json(*line.split(), *more, "--dry-run")["dry_run"] is True
    sent = [(one, body["dry_run"]) for method, one, body in daemon.asked if method == "POST"]
    assert sent == [(path, True)] * 2
