"""Which kind of vault tests are made with: plain, or encrypted with one key.

A test, or a module by ``pytestmark``, that uses the fixture ``each_vault`` runs with both kinds.
``VDISKFS_TEST_VAULT=encrypted`` gives every test that does not an encrypted one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdiskfs.catalog.documents import decode_document, encode_document
from vdiskfs.crypto import Secrets

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
