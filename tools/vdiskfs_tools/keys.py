"""The key of an encrypted vault, as a command gets it: given, or asked for on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from vdiskfs.catalog import Vault
from vdiskfs.catalog.vaultfile import read_vault_file
from vdiskfs.config import load_config
from vdiskfs.crypto import (
    BOTH,
    KEY_FILE,
    PASSPHRASE,
    Secrets,
    given_secrets,
    make_key_file,
    read_key_file,
)
from vdiskfs.crypto.given import given_passphrase, read_passphrase_file
from vdiskfs.errors import KeyNeededError, UsageError, VaultUnreachableError, VdiskfsError
from vdiskfs.store import Store
from vdiskfs_tools.call import Call

_INIT_HINT = (
    "set VDISKFS_PASSPHRASE or VDISKFS_PASSPHRASE_FILE, or name --key-file FILE (it is made if"
    " it is absent), or decline with --encryption none"
)


@dataclass
class NewKey:
    """What is to be another key of a vault, and the key file that was made for it."""

    secrets: Secrets
    made: Path | None = None
    sent: bool = False

    def sending(self) -> None:
        """From here on the vault may have it, whatever is heard of that."""
        self.sent = True

    def clear_away(self, *, taken: bool) -> None:
        """Remove the key file of a key that failed, unless the vault may open with it."""
        if self.made is None:
            return
        if not taken:
            self.made.unlink(missing_ok=True)
            return
        click.echo(f"vdiskfs: {self.made} is kept: the vault may open with it", err=True)


def call_secrets(call: Call) -> Secrets:
    """Return what is given to open a vault; nothing is asked."""
    return given_secrets(load_config(None), call.key_file)


async def open_vault(store: Store, call: Call, *, ask: bool = True) -> Vault:
    """Open a vault with what is given, or with what the user types.

    Raises:
        VdiskfsError: as `Vault.open`.
    """
    given = call_secrets(call)
    try:
        return await Vault.open(store, given)
    except KeyNeededError:
        if given.passphrase is not None or not (ask and can_ask()):
            raise
    return await Vault.open(store, Secrets(ask_passphrase(), given.file_key))


async def needs_passphrase(store: Store) -> bool:
    """Look whether a vault is encrypted."""
    return (await read_vault_file(store))[0].slots is not None


def can_ask() -> bool:
    """Tell whether somebody sits at a terminal."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def ask_passphrase(*, new: bool = False) -> str:
    """Ask for a passphrase on the terminal; a new one twice."""
    text = "New passphrase of the vault" if new else "Passphrase of the vault"
    again = "The same again" if new else False
    answer: str = click.prompt(text, hide_input=True, err=True, confirmation_prompt=again)
    return answer


def first_key(call: Call, *, dry_run: bool) -> NewKey:
    """Return what is to open a new vault, and the key file that was made for it.

    Raises:
        UsageError: nothing is given, and nobody can be asked.
        RefusedError: what is named cannot be read.
    """
    made = None
    if call.key_file is not None and not Path(call.key_file).exists():
        made = Path(call.key_file)
        given = Secrets(given_passphrase())
        given.check()
        given = Secrets(given.passphrase, bytes(32) if dry_run else make_key_file(made))
    else:
        given = call_secrets(call)
    given.check()
    if given:
        return NewKey(given, None if dry_run else made)
    if not can_ask():
        raise UsageError("a vault is encrypted, and no key was given", hint=_INIT_HINT)
    return NewKey(Secrets("dry run" if dry_run else ask_passphrase(new=True)))


@contextmanager
def new_key(
    *, key_file: str | None, passphrase_file: str | None, both: bool = False
) -> Iterator[NewKey]:
    """Make another key of a vault: named by options, or asked for.

    A key file that was made for it is removed when the vault did not take it.

    Raises:
        UsageError: nothing is named, and nobody can be asked.
        RefusedError: what is named cannot be read.
    """
    kind = new_kind(key_file=key_file, passphrase_file=passphrase_file, both=both)
    given = Secrets(None if kind == KEY_FILE else _new_passphrase(passphrase_file))
    given.check()
    new = NewKey(given)
    if key_file is not None:
        path = Path(key_file)
        new.made = None if path.exists() else path
        file_key = make_key_file(path) if new.made else read_key_file(path)
        new.secrets = Secrets(given.passphrase, file_key)
    try:
        yield new
    except BaseException as error:
        refused = isinstance(error, VdiskfsError) and not isinstance(error, VaultUnreachableError)
        new.clear_away(taken=new.sent and not refused)
        raise


def new_kind(*, key_file: str | None, passphrase_file: str | None, both: bool = False) -> str:
    """Return the kind of the key that `new_key` makes of these.

    Raises:
        UsageError: file and passphrase together are wanted, and no file is named.
    """
    if both and key_file is None:
        raise UsageError("--both needs --new-key-file FILE")
    if key_file is None:
        return PASSPHRASE
    return BOTH if both or passphrase_file is not None else KEY_FILE


def _new_passphrase(passphrase_file: str | None) -> str:
    if passphrase_file is not None:
        return read_passphrase_file(Path(passphrase_file))
    if not can_ask():
        raise UsageError(
            "which new key?", hint="name --new-key-file FILE or --new-passphrase-file FILE"
        )
    return ask_passphrase(new=True)
