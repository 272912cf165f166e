"""How a mount opens its vault: with which key, and what it has seen of it before.

The key comes with the settings, which the keeper holds in memory; successors get it with
the connection (vdiskfs.takeover). It is written to no file and to no environment.
"""

from __future__ import annotations

import logging
from pathlib import Path

import trio

from vdiskfs.catalog import Vault
from vdiskfs.config import MountSettings
from vdiskfs.crypto import secrets_of
from vdiskfs.errors import StateError, WrongVaultError
from vdiskfs.sealed import SealedStore, Seen
from vdiskfs.state import StateDirectory
from vdiskfs.store import Store

log = logging.getLogger(__name__)

SEEN = "vault-seen"


async def unlock_vault(store: Store, settings: MountSettings, state: Path) -> Vault:
    """Open the vault of a mount.

    Raises:
        WrongVaultError: it is older than what this site has seen, or not encrypted any more.
        VdiskfsError: as `Vault.open`.
    """

    def seen(vault_id: str) -> Seen:
        found = open_seen(state, vault_id)
        if settings.accept_rollback:
            log.info("%s: accepted as it is: what was seen of it is forgotten", settings.vault)
            found.forget()
        return found

    vault = await Vault.open(store, secrets_of(settings), seen=seen)
    if vault.key is None and not settings.accept_rollback:
        known = await trio.to_thread.run_sync(open_seen, state, vault.vault_id)
        if known.anything:
            raise WrongVaultError(
                f"{settings.vault}: the vault was encrypted, and says now that it is not",
                hint="somebody has replaced its vault.json: bring that back",
            )
    return vault


def check_known(vault: Vault, settings: MountSettings, state: StateDirectory) -> None:
    """Refuse another vault than the one that disks here are kept in; StateError."""
    other = [one for one in state.records() if one.vault_id != vault.vault_id]
    if other and not settings.accept_rollback:
        raise StateError(
            f"{settings.vault}: not the vault that disk {other[0].name} is kept in",
            hint="name that vault, or another --state; --accept-rollback begins anew in this one",
        )
    if other:
        aside = state.set_aside()
        log.warning("%s: another vault; what was known of the old one is in %s",
                    settings.vault, aside)  # fmt: skip


def open_seen(state: Path, vault_id: str) -> Seen:
    """Return what the state directory knows of a vault. Blocks."""
    seen = Seen(state / SEEN, vault_id=vault_id)
    seen.load()
    return seen


async def close_seen(vault: Vault) -> None:
    """Write down what was seen since the last time."""
    if isinstance(vault.store, SealedStore):
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(vault.store.seen.save)
