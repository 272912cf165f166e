"""``vdiskfs mount``: check everything first, then start the daemon."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from vdiskfs.errors import BusyError, LocalError, RefusedError, UsageError
from vdiskfs.registry import mount_entries
from vdiskfs_tools.call import Call, Command, FilePath, dry_run_option
from vdiskfs_tools.mounts import mounted_types, real_mountpoint, real_path


@click.command(cls=Command)
@click.argument("paths", nargs=-1, metavar="[SOURCE] MOUNTPOINT", type=FilePath())
@click.option("--site", metavar="NAME", help="This site's name in the vault; else the host's.")
@click.option("--config", metavar="FILE", type=FilePath(), help="vdiskfs.conf(5) to read.")
@click.option("--state", metavar="DIR", type=FilePath(), help="State directory of this mount.")
@click.option("--over", is_flag=True, help="Show disks/ in the place of SOURCE too.")
@click.option("--allow-other", is_flag=True, help="Let other users in, as file permissions say.")
@click.option("--foreground", is_flag=True, help="Stay in the foreground; end with Ctrl-C.")
@click.option("--no-protect", is_flag=True, help="Protect no disk that is not protected yet.")
@click.option("--force", is_flag=True, help="Take over disks that another site owns.")
@click.option("--accept-rollback", is_flag=True, help="Go on though the vault lacks what it had.")
@dry_run_option
@click.pass_obj
def mount(
    call: Call, /, *, paths: tuple[str, ...], foreground: bool, dry_run: bool, **wanted: Any
) -> None:
    """Mount the disks of SOURCE, and protect them.

    The files of SOURCE appear in MOUNTPOINT/disks, the recovery points of all disks of the
    vault in MOUNTPOINT/recovery-points. Without SOURCE this host is a recovery site.

    Example:
        vdiskfs mount /srv/images /mnt/vd --vault file:///srv/vault
    """
    if len(paths) not in (1, 2):
        raise UsageError("mount takes SOURCE and MOUNTPOINT, or MOUNTPOINT alone")
    if call.vault is None:
        raise UsageError("which vault?", hint="name it with --vault")
    source, mountpoint = (None, *paths) if len(paths) == 1 else paths
    settings = _with_key(call, _settings(call.vault, source, mountpoint, **wanted))
    if not (foreground and _is_successor()):
        _check(settings)
    if dry_run:
        # Else the daemon looks, before it mounts: once is enough.
        _check_vault(settings)
        _show(call, settings, {"dry_run": True})
        return
    from vdiskfs_tools import launch

    if foreground:
        call.out.say(f"{mountpoint}: in the foreground; Ctrl-C ends it")
        launch.run_in_place(settings)
    with call.out.waiting(f"starting {mountpoint}"):
        pid = launch.start(settings)
    _show(call, settings, {"pid": pid})


def _settings(vault: str, source: str | None, mountpoint: str, **wanted: Any) -> Any:
    """Build the settings of the mount from the command line."""
    from vdiskfs import config

    place = real_mountpoint(mountpoint)
    real_source = real_path(source) if source is not None else None
    state = wanted["state"] or config.default_state(real_source, place)
    return config.MountSettings(
        source=real_source,
        mountpoint=place,
        vault=vault,
        site=config.check_site(wanted["site"] or config.default_site()),
        state=os.path.realpath(state),
        allow_other=wanted["allow_other"],
        over=wanted["over"],
        protect=not wanted["no_protect"],
        force=wanted["force"],
        accept_rollback=wanted["accept_rollback"],
        options=config.load_config(Path(wanted["config"]) if wanted["config"] else None),
    )


def _is_successor() -> bool:
    """Tell whether systemd starts this process to go on with a mount that it keeps."""
    mine = os.environ.get("LISTEN_PID") == str(os.getpid())
    return mine and "connection" in os.environ.get("LISTEN_FDNAMES", "").split(":")


def _check(settings: Any) -> None:
    """Refuse what cannot work, before anything is touched.

    Raises:
        UsageError, LocalError, BusyError, RefusedError: it cannot.
    """
    source, mountpoint = settings.source, settings.mountpoint
    for entry in mount_entries():
        if entry.mountpoint == mountpoint:
            raise BusyError(f"{mountpoint}: mounted already (process {entry.pid})")
        if source is not None and entry.source == source:
            raise BusyError(f"{source}: mounted already, on {entry.mountpoint}")
        if entry.state == settings.state:
            raise BusyError(f"{settings.state}: the state of the mount on {entry.mountpoint}")
    types = mounted_types(mountpoint)
    if types and "vdiskfs" in types[-1]:
        raise BusyError(
            f"{mountpoint}: a mount whose daemon is gone",
            hint=f"vdiskfs umount {shlex.quote(mountpoint)}",
        )
    if types:
        raise BusyError(f"{mountpoint}: a file system ({types[-1]}) is mounted there")
    if source is not None:
        _check_directory(source, "the source directory")
        _check_apart(source, mountpoint)
    _check_directory(mountpoint, "the mountpoint")
    with os.scandir(mountpoint) as found:
        if next(found, None) is not None:
            raise BusyError(f"{mountpoint}: not empty", hint="mount on an empty directory")
    if _within(settings.state, mountpoint):
        raise UsageError(f"{settings.state}: the state directory lies in the mountpoint")
    if settings.over and source is not None and _within(settings.state, source):
        # The daemon would wait for itself.
        raise UsageError(
            f"{settings.state}: the state directory lies in the source that --over hides"
        )
    _check_rights(settings)


def _check_directory(path: str, what: str) -> None:
    """Refuse a path that is not a directory that we may read."""
    if not Path(path).exists():
        raise LocalError(f"{path}: {what} does not exist", hint=f"mkdir {path}, or correct it")
    if not Path(path).is_dir():
        raise UsageError(f"{path}: {what} is not a directory")
    if not os.access(path, os.R_OK | os.X_OK):
        raise RefusedError(f"{path}: {what} may not be read by you")


def _check_apart(source: str, mountpoint: str) -> None:
    """Refuse a source and a mountpoint that hold one another."""
    if source == mountpoint:
        raise UsageError(
            "source and mountpoint are the same", hint="use another mountpoint, and --over"
        )
    if _within(source, mountpoint) or _within(mountpoint, source):
        raise UsageError(f"{source} and {mountpoint}: one lies in the other")


def _check_rights(settings: Any) -> None:
    """Refuse what only root may do."""
    if settings.over and settings.source is None:
        raise UsageError("--over needs a source directory")
    if os.geteuid() == 0:
        return
    if settings.over:
        raise RefusedError("--over: only root may bind over a directory")
    from vdiskfs_tools.checks import allows_other_users

    if settings.allow_other and not allows_other_users():
        raise RefusedError(
            "--allow-other: this host does not let users do that",
            hint="add the line user_allow_other to /etc/fuse.conf",
        )


def _check_vault(settings: Any) -> None:
    """Refuse a vault that is not there, that we cannot open, or of a newer format than we know."""
    from vdiskfs.catalog import Vault
    from vdiskfs.crypto import secrets_of
    from vdiskfs_tools.vaults import with_store

    with_store(settings.vault, lambda store: Vault.open(store, secrets_of(settings)))


def _with_key(call: Call, settings: Any) -> Any:
    """Return the settings with the vault's key: given, or asked for where somebody can be."""
    from vdiskfs.crypto import given_secrets

    if _is_successor():
        return settings  # its predecessor has left it the key
    given = given_secrets(settings.options, call.key_file)
    passphrase, file_key = given.passphrase, given.file_key
    if not given:
        from vdiskfs_tools.keys import ask_passphrase, can_ask, needs_passphrase
        from vdiskfs_tools.vaults import with_store

        if can_ask() and with_store(settings.vault, needs_passphrase):
            passphrase = ask_passphrase()
    return replace(settings, passphrase=passphrase, file_key=file_key and file_key.hex())


def _within(path: str, directory: str) -> bool:
    return Path(path).is_relative_to(directory)


def _show(call: Call, settings: Any, more: dict[str, Any]) -> None:
    """Print where things are."""
    names = ("mountpoint", "source", "vault", "site", "state")
    document = {name: getattr(settings, name) for name in names} | more
    if settings.source is not None:
        document["disks"] = f"{settings.mountpoint}/disks"
    document["recovery_points"] = f"{settings.mountpoint}/recovery-points"
    if call.out.document(document):
        return
    if more.get("dry_run"):
        call.out.say("nothing was done; this would be mounted:")
    call.out.facts(
        {
            "source": settings.source or "none: this is a recovery site",
            "disks": document.get("disks"),
            "recovery points": document["recovery_points"],
            "vault": settings.vault,
            "site": settings.site,
            "state": settings.state,
            "end it with": f"vdiskfs umount {shlex.quote(settings.mountpoint)}",
        }
    )
