"""``vdiskfs vault key``: what opens an encrypted vault."""

# ruff: noqa: PLC0415 (what is slow to import is imported where it is used: see __init__)

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from vdiskfs_tools.call import Call, FilePath, Group, dry_run_option
from vdiskfs_tools.mounts import vault_url

if TYPE_CHECKING:
    from vdiskfs.catalog import Vault
    from vdiskfs.crypto import Slot


@click.group("key", cls=Group)
def key() -> None:
    """Add, remove and change the keys of an encrypted vault.

    A key is a passphrase, a key file, or both together. Each opens the vault; what it holds
    is not encrypted again when keys come and go.
    """


def _new_key_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--both", is_flag=True, help="The new key needs file and passphrase."),
        click.option(
            "--new-passphrase-file", metavar="FILE", type=FilePath(),
            help="The new passphrase is its first line.",
        ),
        click.option(
            "--new-key-file", metavar="FILE", type=FilePath(),
            help="The new key file; made if it is absent.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


@key.command("add")
@_new_key_options
@click.option("--label", default="", metavar="TEXT", help="What it is for.")
@dry_run_option
@click.pass_obj
def add(call: Call, /, *, label: str, dry_run: bool, **new: Any) -> None:
    """Let another key open the vault too.

    The vault is opened with a key that it has (see vdiskfs(1)); the new one is named by
    options, or asked for.

    Example:
        vdiskfs vault key add --new-key-file /root/second.key --vault file:///srv/vault
    """
    from vdiskfs.catalog.keys import add_slot, check_room
    from vdiskfs_tools.keys import new_key, new_kind
    from vdiskfs_tools.vaults import with_vault

    if len(label) > 100 or not label.isprintable():
        raise click.UsageError("a label has at most 100 characters, all printable")

    if dry_run:
        kind = new_kind(**_named(new))
        with_vault(call, check_room)
        if not call.out.document({"vault": vault_url(call), "dry_run": True, "would": "add"}):
            call.out.say(f"a key ({kind}) would be added")
        return

    async def work(vault: Vault) -> Slot:
        with new_key(**_named(new)) as made:
            return await add_slot(vault, made.secrets, label=label, sending=made.sending)

    slot = with_vault(call, work)
    if not call.out.document({"vault": vault_url(call), "key": _document(slot)}):
        call.out.say(f"key {slot.id} opens the vault now")


@key.command("change")
@click.argument("key_id", metavar="[KEY]", required=False)
@_new_key_options
@dry_run_option
@click.pass_obj
def change(call: Call, /, *, key_id: str | None, dry_run: bool, **new: Any) -> None:
    """Put another key in the place of one.

    The one that goes is KEY; without it, the one of the new key's kind (a passphrase for a
    passphrase, a key file for a key file) that is given. It must be the only one.

    Example:
        vdiskfs vault key change --vault file:///srv/vault
    """
    from vdiskfs.catalog.keys import change_slot, find_slot, opened_slot
    from vdiskfs.crypto import KEY_FILE, Secrets
    from vdiskfs_tools.keys import ask_passphrase, call_secrets, can_ask, new_key, new_kind
    from vdiskfs_tools.vaults import with_vault

    kind = new_kind(**_named(new))
    given = call_secrets(call)
    lacking = given.passphrase is None and (kind != KEY_FILE or not given)
    if key_id is None and lacking and can_ask():
        # The configuration's key file opens the vault; it is not what is to go.
        given = Secrets(ask_passphrase(), given.file_key)

    async def find(vault: Vault) -> Slot:
        return await (
            opened_slot(vault, given, kind) if key_id is None else find_slot(vault, key_id)
        )

    if dry_run:
        old = with_vault(call, find, given=given)
        document = {"vault": vault_url(call), "dry_run": True, "replaced": _document(old)}
        if not call.out.document(document):
            call.out.say(f"a key ({kind}) would be put in the place of {old.id} ({old.kind})")
        return

    async def work(vault: Vault) -> tuple[Slot, Slot]:
        old = await find(vault)
        with new_key(**_named(new)) as made:
            return old, await change_slot(vault, old, made.secrets, sending=made.sending)

    old, slot = with_vault(call, work, given=given)
    document = {"vault": vault_url(call), "key": _document(slot), "replaced": _document(old)}
    if not call.out.document(document):
        call.out.say(f"key {slot.id} opens the vault now, and {old.id} ({old.kind}) no more")


@key.command("remove")
@click.argument("key_id", metavar="KEY")
@dry_run_option
@click.pass_obj
def remove(call: Call, *, key_id: str, dry_run: bool) -> None:
    """Let a key open the vault no more.

    Whoever has a copy of the vault as it was can still open that with the old key.

    Example:
        vdiskfs vault key remove 9f3a01bc --vault file:///srv/vault
    """
    from vdiskfs.catalog.keys import remove_slot
    from vdiskfs_tools.vaults import with_vault

    with_vault(call, lambda vault: remove_slot(vault, key_id, dry_run=dry_run))
    document: dict[str, Any] = {"vault": vault_url(call), "removed": key_id}
    if not call.out.document(document | {"dry_run": True} if dry_run else document):
        call.out.say(f"key {key_id} {'would be' if dry_run else 'is'} removed")


@key.command("list")
@click.pass_obj
def list_keys(call: Call) -> None:
    """List the keys of a vault.

    Example:
        vdiskfs vault key list --vault file:///srv/vault
    """
    from vdiskfs.catalog.keys import list_slots
    from vdiskfs_tools.vaults import with_vault

    slots = with_vault(call, list_slots)
    if call.out.document({"vault": vault_url(call), "keys": [_document(one) for one in slots]}):
        return
    call.out.table(
        ("KEY", "KIND", "MADE", "LABEL"),
        [[one.id, one.kind, one.created, one.label or "-"] for one in slots],
    )


def _named(new: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a new key as `new_secrets` takes them."""
    return {
        "key_file": new["new_key_file"],
        "passphrase_file": new["new_passphrase_file"],
        "both": new["both"],
    }


def _document(slot: Slot) -> dict[str, str]:
    return {"id": slot.id, "kind": slot.kind, "label": slot.label, "created": slot.created}
