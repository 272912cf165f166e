"""Which kind of vault tests are made with: plain, or encrypted with one key.

A test, or a module by ``pytestmark``, that uses the fixture ``each_vault`` runs with both kinds.
``VDISKFS_TEST_VAULT=encrypted`` gives every test that does not an encrypted one.
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
from vdiskfs.store import open_store

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


def edited(data: bytes, **changes: object) -> bytes:
    """Return a document of a vault with other values, its check right."""
    return encode_document({**decode_document(data, where="a test"), **changes})


@pytest.fixture(params=["plain", "encrypted"])
def each_vault(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test with a plain and with an encrypted vault."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, request.param)
        yield request.param


# For a test, of a module that runs with both, that looks into objects as they lie in a plain vault.
PLAIN = pytest.mark.parametrize("each_vault", ["plain"], indirect=True)
