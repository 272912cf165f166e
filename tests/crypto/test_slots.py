"""Key slots: each opens the vault, and a hostile vault.json makes nobody work."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from vdiskfs.config import Config
from vdiskfs.crypto import (
    DataKey,
    Secrets,
    Slot,
    decode_slot,
    encode_slot,
    make_key_file,
    make_slot,
    new_data_key,
    open_slots,
    read_key_file,
    slots,
)
from vdiskfs.crypto.given import given_secrets
from vdiskfs.errors import (
    AlreadyExistsError,
    FormatError,
    KeyNeededError,
    RefusedError,
    UsageError,
)

VAULT = "ab" * 16
FILE = bytes(range(32))
PASS = Secrets("correct horse")
KEY = Secrets(None, FILE)
BOTH = Secrets("correct horse", FILE)


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "SCRYPT_N", 1 << 10)


def made(given: Secrets) -> tuple[DataKey, Slot]:
    key = new_data_key(VAULT)
    return key, make_slot(key, given, label="mine", created="now")


@pytest.mark.parametrize("given", [PASS, KEY, BOTH], ids=["passphrase", "file", "both"])
def test_a_slot_opens_with_what_it_was_made_of(given: Secrets) -> None:
    key, slot = made(given)
    again = decode_slot(json.loads(json.dumps(encode_slot(slot))), where="x")
    assert again == slot
    opened, found = open_slots([again], given, VAULT, where="x")
    assert opened == key
    assert found == slot
    # More than it needs is no harm.
    if given is not BOTH:
        assert open_slots([slot], BOTH, VAULT, where="x")[0] == key


@pytest.mark.parametrize(
    ("given", "wrong", "error"),
    [
        (PASS, Secrets("correct  horse"), RefusedError),
        (KEY, Secrets(None, bytes(32)), RefusedError),
        (BOTH, Secrets("correct horse", bytes(32)), RefusedError),
        (BOTH, Secrets("battery", FILE), RefusedError),
        (BOTH, PASS, KeyNeededError),
        (BOTH, KEY, KeyNeededError),
        (PASS, KEY, KeyNeededError),
        (PASS, Secrets(), KeyNeededError),
    ],
)
def test_nothing_else_opens_it(given: Secrets, wrong: Secrets, error: type[Exception]) -> None:
    _, slot = made(given)
    with pytest.raises(error) as caught:
        open_slots([slot], wrong, VAULT, where="x")
    assert "correct" not in str(caught.value)
    assert FILE.hex() not in str(caught.value)


def test_a_slot_of_another_vault_does_not_open() -> None:
    _, slot = made(KEY)
    with pytest.raises(RefusedError):
        open_slots([slot], KEY, "cd" * 16, where="x")


@pytest.mark.parametrize("part", ["id", "kind", "label", "created", "salt", "nonce", "wrapped"])
def test_a_slot_that_was_changed_does_not_open(part: str) -> None:
    """All that a slot says is authenticated."""
    _, slot = made(BOTH)
    values = encode_slot(slot)
    text = values[part]
    values[part] = {"kind": "passphrase", "label": "yours", "created": "then"}.get(
        part, ("1" if text[0] == "0" else "0") + text[1:]
    )
    with pytest.raises(RefusedError):
        open_slots([decode_slot(values, where="x")], BOTH, VAULT, where="x")


@pytest.mark.parametrize(
    "cost",
    [
        [1 << 40, 8, 1], [1 << 21, 8, 1], [1 << 20, 8, 1], [1 << 17, 32, 1], [1 << 17, 8, 16],
        [1 << 17, 8, 0], [1 << 17, 0, 1], [100_000, 8, 1], [-8, 8, 1], [1 << 17, 8], [True, 8, 1],
        ["8", 8, 1], [1 << 17, 8, 1, 1], None, 17, [1 << 17, 8, 1 << 62],
    ],
)  # fmt: skip
def test_costs_are_bounded_before_anything_is_computed(
    cost: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, slot = made(PASS)
    monkeypatch.setattr(slots, "Scrypt", None)  # would fail if it were used
    with pytest.raises(FormatError, match="too much work"):
        decode_slot(encode_slot(slot) | {"scrypt": cost}, where="x")


def test_what_we_make_is_within_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    _, slot = made(PASS)
    assert decode_slot(encode_slot(slot), where="x") == slot
    assert slot.scrypt == (1 << 17, 8, 1)


def test_keys_derived_for_one_use_serve_no_other() -> None:
    key, other = new_data_key(VAULT), new_data_key(VAULT)
    assert key.name("names/web01.json") == key.name("names/web01.json")
    assert key.name("names/web01.json") != other.name("names/web01.json")
    plain = hashlib.sha256(b"names/web01.json").hexdigest()
    assert key.name("names/web01.json") != plain[:32]
    sealed = key.cipher(b"s" * 32).seal(0, b"bytes", b"")
    assert key.cipher(b"s" * 32).open(0, sealed, b"") == b"bytes"
    assert key.cipher(b"t" * 32).open(0, sealed, b"") is None
    assert key.cipher(b"s" * 32).open(1, sealed, b"") is None
    assert key.cipher(b"s" * 32).open_metadata(sealed, b"") is None
    assert DataKey(key.secret, "cd" * 16).cipher(b"s" * 32).open(0, sealed, b"") is None
    assert key.secret.hex() not in repr(key)


def test_a_key_file_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key = make_key_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_key_file(path) == key
    with pytest.raises(AlreadyExistsError):
        make_key_file(path)
    path.chmod(0o640)
    with pytest.raises(RefusedError, match="chmod 600"):
        read_key_file(path)


@pytest.mark.parametrize(
    "content", [b"", b"secret\n", b"vdiskfs-key-1 " + b"0" * 63, b"\xff" * 300]
)
def test_what_is_no_key_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(RefusedError, match="not a key file"):
        read_key_file(path)
    with pytest.raises(RefusedError, match="cannot be read"):
        read_key_file(tmp_path / "absent")


def test_keys_are_found_in_the_order_of_nearness(tmp_path: Path) -> None:
    """The option wins over the environment, that over the configuration."""
    keys = {name: make_key_file(tmp_path / name) for name in ("option", "variable", "config")}
    options = Config(key_file=str(tmp_path / "config"))
    environ = {"VDISKFS_KEY_FILE": str(tmp_path / "variable"), "VDISKFS_PASSPHRASE": "x"}
    found = given_secrets(options, str(tmp_path / "option"), environ)
    assert found == Secrets("x", keys["option"])
    assert given_secrets(options, None, environ).file_key == keys["variable"]
    assert given_secrets(options, None, {}) == Secrets(None, keys["config"])
    assert not given_secrets(Config(), None, {})
    with pytest.raises(UsageError):
        given_secrets(Config(), None, {"VDISKFS_PASSPHRASE": ""})


def test_a_passphrase_file_is_its_first_line_and_private(tmp_path: Path) -> None:
    path = tmp_path / "pass"
    path.touch(0o600)
    path.write_text("two words\nmore\n")
    environ = {"VDISKFS_PASSPHRASE_FILE": str(path)}
    assert given_secrets(Config(), None, environ).passphrase == "two words"
    path.chmod(0o644)
    with pytest.raises(RefusedError, match="chmod 600"):
        given_secrets(Config(), None, environ)
