"""Which kind of vault tests are made with: plain, or encrypted with one key.

A test, or a module by ``pytestmark``, that uses the fixture ``each_vault`` runs with both kinds.
``VDISKFS_TEST_VAULT=encrypted`` gives every test that does not an encrypted one. Those of real
mounts (tests/e2e) have encrypted ones by themselves, and plain ones with ``=plain``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from vdiskfs.catalog import Vault
from vdiskfs.catalog.documents import decode_document, encode_document
from vdiskfs.catalog.records import SiteRecord, encode_disk
from vdiskfs.crypto import Secrets
from vdiskfs.sealed import SealedStore, Seen
from vdiskfs.store import Store, open_store

VARIABLE = "VDISKFS_TEST_VAULT"
FILE_KEY = bytes(range(32))


def is_encrypted() -> bool:
    """Tell whether vaults are to be encrypted now."""
    return os.environ.get(VARIABLE) == "encrypted"


def given() -> Secrets | None:
    """Return what opens the vaults of this test; None: they are plain."""
    return Secrets(file_key=FILE_KEY) if is_encrypted() else None


def key_file(directory: Path) -> Path | None:
    """Return a key file for commands; None: vaults are plain."""
    if not is_encrypted():
        return None
    path = directory / "vault.key"
    if not path.exists():
        path.touch(0o600)
        path.write_text(f"vdiskfs-key-1 {FILE_KEY.hex()}\n")
    return path


def init_options(directory: Path) -> list[str]:
    """Return the options of ``vault init``."""
    path = key_file(directory)
    return ["--encryption", "none"] if path is None else ["--key-file", str(path)]


def newcomer(vault: Vault, store: Store | None = None) -> Vault:
    """Return the vault as somebody has it who has its key, and has read nothing of it yet.

    Over another ``store`` where one is given; it is the one below that which seals.
    """
    inner = vault.store.inner if isinstance(vault.store, SealedStore) else vault.store
    return Vault.reopened(store or inner, vault.vault_id, vault.created, vault.key, Seen())


async def _opened(directory: Path) -> Vault:
    return await Vault.open(open_store(f"file://{directory}"), given())


def disk_records(directory: Path) -> list[dict[str, Any]]:
    """Return the records of all disks of a vault in a folder, as their documents have them."""

    async def read() -> list[dict[str, Any]]:
        found = await (await _opened(directory)).disks()
        return [decode_document(encode_disk(record), where=record.name) for record in found]

    return trio.run(read)


def heartbeats(directory: Path) -> list[SiteRecord]:
    """Return the heartbeats in a vault in a folder."""

    async def read() -> list[SiteRecord]:
        return await (await _opened(directory)).sites()

    return trio.run(read)


def read_object(directory: Path, name: str) -> bytes:
    """Return what an object of a vault in a folder holds."""

    async def read() -> bytes:
        return (await (await _opened(directory)).store.read(name))[0]

    return trio.run(read)


def put_object(directory: Path, name: str, data: bytes) -> None:
    """Add an object, of whatever content, to a vault in a folder."""

    async def put() -> None:
        await (await _opened(directory)).store.create(name, data)

    trio.run(put)


def edited(data: bytes, **changes: object) -> bytes:
    """Return a document of a vault with other values, its check right."""
    return encode_document({**decode_document(data, where="a test"), **changes})


@pytest.fixture(params=["plain", "encrypted"])
def each_vault(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test with a plain and with an encrypted vault."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, request.param)
        yield request.param


# For a test, or a module, that runs with both.
BOTH = pytest.mark.usefixtures("each_vault")

# For a test that looks into objects as they lie in a plain vault.
PLAIN = pytest.mark.plain_vault

_left_out = pytest.StashKey[list[str]]()


def _is_left_out(item: pytest.Item) -> bool:
    """Tell whether a test of a plain vault would get an encrypted one."""
    call = getattr(item, "callspec", None)
    kind = call.params.get("each_vault") if call else None
    encrypted = is_encrypted() if kind is None else kind == "encrypted"
    return encrypted and item.get_closest_marker("plain_vault") is not None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, where vaults are encrypted, the tests that need a plain one."""
    left = [item for item in items if _is_left_out(item)]
    config.stash[_left_out] = [item.nodeid for item in left]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not _is_left_out(item)]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Name what an encrypted run has left out."""
    left = config.stash.get(_left_out, [])
    if is_encrypted() and left:
        terminalreporter.section(f"{len(left)} tests of plain vaults alone")
        for name in left:
            terminalreporter.write_line(name)
