"""``vdiskfs doctor``: what this host and its vault lack, and the fix."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

import shlex
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vdiskfs.errors import NotFoundError, RefusedError, VdiskfsError
from vdiskfs.registry import MountEntry, is_alive, mount_entries
from vdiskfs_tools.call import Call, Command
from vdiskfs_tools.mounts import find_mount, named_mount

if TYPE_CHECKING:
    from vdiskfs_tools.checks import Finding

# Beyond this, thinning of points by age stops (see the design of time in the vault).
CLOCK_SKEW_S = 300
VAULT_LIMIT_S = 60

_COLOURS = {"ok": "green", "warning": "yellow", "missing": "red"}


@click.command(cls=Command)
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Say what this host lacks, and the fix. With a mount or --vault, the vault too.

    Exit code 1 when something that is needed is missing.

    Example:
        vdiskfs doctor --vault file:///srv/vault
    """
    call: Call = ctx.obj
    from vdiskfs_tools import checks

    entry = _given_mount(call)
    findings = checks.host_findings(Path(entry.state) if entry else _usual_state())
    findings.append(_check_core())
    if entry is not None:
        findings += [_check_daemon(entry), _check_keeper(entry)]
    url = call.vault or (entry.vault if entry else None)
    if url is not None:
        findings.extend(_check_vault(call, url))
    ok = all(finding.status != "missing" for finding in findings)
    document = {"ok": ok, "checks": [finding.to_dict() for finding in findings]}
    if not call.out.document(document):
        for finding in findings:
            _show(call, finding)
    if not ok:
        ctx.exit(1)


def _show(call: Call, finding: Finding) -> None:
    if call.quiet and finding.status == "ok":
        return
    line = f"{finding.status:<8} {finding.name}: {finding.detail}"
    call.out.line(line, colour=_COLOURS[finding.status])
    if finding.fix:
        call.out.line(f"         fix: {finding.fix}")


def _given_mount(call: Call) -> MountEntry | None:
    """Return the mount that was named, or the only one; none is no error here."""
    if named_mount(call) is None and (call.vault is not None or len(mount_entries()) != 1):
        return None
    return find_mount(call)


def _usual_state() -> Path:
    """Return the directory that holds the state directories."""
    from vdiskfs.config import default_state

    return default_state(None, "/").parent


def _check_core() -> Finding:
    """Load the C core: a package for another Python or C library shows here."""
    from vdiskfs_tools.checks import Finding

    try:
        import vdiskfs.native  # noqa: F401
    except ImportError as error:
        return Finding("C core", "missing", f"cannot be loaded: {error}", "install vdiskfs again")
    return Finding("C core", "ok", "loads")


def _check_daemon(entry: MountEntry) -> Finding:
    from vdiskfs_tools.checks import Finding
    from vdiskfs_tools.client import Client

    try:
        with Client(entry) as client:
            plain = client.get("status").get("plain")
    except VdiskfsError as error:
        return Finding("daemon", "missing", error.message, error.hint)
    if isinstance(plain, dict):
        fix = f"vdiskfs upgrade -m {shlex.quote(entry.mountpoint)}"
        return Finding(
            "daemon", "missing", f"the mount is served untracked: {plain.get('reason', '-')}",
            f"see the log in {entry.state}, then {fix}",
        )  # fmt: skip
    return Finding("daemon", "ok", f"{entry.mountpoint}: answers")


def _check_keeper(entry: MountEntry) -> Finding:
    """Look whether somebody would start the daemon again."""
    from vdiskfs_tools.checks import Finding

    if entry.keeper == 0:
        return Finding("keeper", "ok", "none of ours: systemd keeps the mount, or nobody")
    if is_alive(entry.keeper, entry.keeper_start):
        return Finding("keeper", "ok", f"process {entry.keeper} restarts a daemon that dies")
    return Finding(
        "keeper", "warning", "it is gone: machines get errors if the daemon dies",
        f"when no machine runs: vdiskfs umount {shlex.quote(entry.mountpoint)}, and mount again",
    )  # fmt: skip


def _check_vault(call: Call, url: str) -> list[Finding]:
    """Look whether the vault is there, has space, lets us write, and has the same time."""
    from vdiskfs.config import load_config, vault_environ
    from vdiskfs_tools.checks import Finding, check_space
    from vdiskfs_tools.vaults import with_store

    findings = []
    if url.startswith("file:///"):
        findings.append(check_space("vault folder", Path(url.removeprefix("file://"))))
    if url.startswith("azure://"):
        findings += _check_tokens(vault_environ(load_config(None)))
    try:
        findings.extend(with_store(url, lambda store: _probe(store, call), limit_s=VAULT_LIMIT_S))
    except NotFoundError as error:
        fix = f"vdiskfs vault init {shlex.quote(url)}"
        findings.append(Finding("vault", "missing", error.message, fix))
    except VdiskfsError as error:
        fix = error.hint or "see the credentials in vdiskfs(1)"
        findings.append(Finding("vault", "missing", error.message, fix))
    return findings


def _check_tokens(environ: Mapping[str, str]) -> list[Finding]:
    """Look at what shared access signatures say of themselves."""
    from datetime import UTC, datetime

    from vdiskfs.store.token import given_tokens, token_warnings
    from vdiskfs_tools.checks import Finding

    fix = "make one for https that lives some months, and put it there before that one expires"
    return [
        Finding("vault token", "warning", f"{name}: {said}", fix)
        for name, token in given_tokens(environ).items()
        for said in token_warnings(token, datetime.now(UTC))
    ]


async def _probe(store: Any, call: Call) -> list[Finding]:
    """Create, read and delete an object."""
    import time

    from vdiskfs.catalog.enforced import probe_enforced
    from vdiskfs_tools.checks import Finding
    from vdiskfs_tools.keys import open_vault

    vault = await open_vault(store, call)
    store = vault.store
    name, content = f"probe-{uuid.uuid4().hex}", b"vdiskfs doctor\n"
    await store.create(name, content)
    back, info = await store.read(name)
    findings = [Finding("vault", "ok", f"vault {vault.vault_id}: reachable and writable")]
    if back != content:
        findings = [Finding("vault", "missing", "gives back other bytes than it got", "replace it")]
    try:
        await store.delete(name)
    except RefusedError:
        findings.append(Finding("vault key", "ok", f"may not delete: {name} stays there"))
    findings += _enforced_findings(await probe_enforced(store))
    skew_s = abs(time.time_ns() - info.modified_ns) / 1e9
    if skew_s > CLOCK_SKEW_S:
        detail = f"differs from this host's by {skew_s:.0f} s"
        findings.append(Finding("vault clock", "warning", detail, "set this host's clock by NTP"))
    return findings


def _enforced_findings(found: Any) -> list[Finding]:
    """Say what was tried: who has this credential may take points away, or may not."""
    from vdiskfs.catalog.enforced import ALLOWED
    from vdiskfs_tools.checks import Finding

    detail = f"overwriting is {found.overwrite}, deleting is {found.delete}"
    if not found.is_kept:
        detail += ": whoever has this credential can take points away"
    findings = [Finding("vault data", "ok", detail)]
    if found.documents != ALLOWED:
        fix = "let them lie in a second container: azure://CONTAINER/PREFIX?control=CONTAINER"
        detail = f"replacing one is {found.documents}: no disk can be replicated"
        findings.append(Finding("vault documents", "missing", detail, fix))
    return findings
