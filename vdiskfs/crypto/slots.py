"""Key slots: the data key, wrapped by what a user gives. Several; each opens the vault.

What a slot says is authenticated with the vault's id when it is opened. Its numbers come
from whoever can write to the vault, so they are bounded before anything is computed: a
slot never takes more than 256 MiB, and half a minute for all of them on a slow host.
"""

from __future__ import annotations

import json
import secrets as random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from vdiskfs.crypto.keys import KEY_SIZE, DataKey
from vdiskfs.crypto.secrets import Secrets
from vdiskfs.errors import FormatError, KeyNeededError, RefusedError

SLOTS_MAX = 8
PASSPHRASE, KEY_FILE, BOTH = "passphrase", "key-file", "both"
_KINDS = (PASSPHRASE, KEY_FILE, BOTH)
# 128 MiB and a third of a second: twice what RFC 7914 and OWASP advise at least.
SCRYPT_N, SCRYPT_R, SCRYPT_P = 1 << 17, 8, 1
_N_MAX, _MEMORY_MAX, _WORK_MAX = 1 << 20, 256 << 20, 1 << 22

WAYS = "give --key-file, VDISKFS_PASSPHRASE, VDISKFS_PASSPHRASE_FILE, or key_file in vdiskfs.conf"


@dataclass(frozen=True, slots=True)
class Slot:
    """One way to open the vault. ``scrypt`` is (N, r, p), or None where no passphrase is."""

    id: str
    kind: str
    label: str
    created: str
    scrypt: tuple[int, int, int] | None
    salt: str
    nonce: str
    wrapped: str


def make_slot(key: DataKey, given: Secrets, *, label: str, created: str) -> Slot:
    """Return a slot that opens with all that is given."""
    given.check()
    kind = kind_of(given)
    cost = None if kind == KEY_FILE else (SCRYPT_N, SCRYPT_R, SCRYPT_P)
    nonce = random.token_bytes(12)
    slot = Slot(
        random.token_hex(4), kind, label, created, cost, random.token_hex(32), nonce.hex(), ""
    )
    wrapping = AESGCM(_wrapping_key(slot, given, key.vault_id))
    wrapped = wrapping.encrypt(nonce, key.secret, _about(slot, key.vault_id))
    return Slot(**asdict(slot) | {"wrapped": wrapped.hex()})


def open_slots(
    slots: Sequence[Slot], given: Secrets, vault_id: str, *, where: str
) -> tuple[DataKey, Slot]:
    """Return the data key and the first slot that opens.

    Takes seconds and up to 256 MiB: in a thread.

    Raises:
        KeyNeededError: nothing was given, or not all that some slot needs.
        RefusedError: what was given opens no slot.
    """
    if not given:
        raise KeyNeededError(f"{where}: the vault is encrypted, and no key was given", hint=WAYS)
    for secret, slot in _opened(slots, given, vault_id):
        return DataKey(secret, vault_id), slot
    if not any(_fits(slot, given) for slot in slots):
        wanted = " or ".join(sorted({slot.kind for slot in slots})) or "none"
        raise KeyNeededError(
            f"{where}: the vault opens with another kind of key ({wanted})", hint=WAYS
        )
    raise RefusedError(f"{where}: the key does not open this vault", hint="is it the right one?")


def opened_slots(slots: Sequence[Slot], given: Secrets, vault_id: str) -> list[Slot]:
    """Return all slots that what is given opens. As slow as all of them: in a thread."""
    return [slot for _, slot in _opened(slots, given, vault_id)]


def encode_slot(slot: Slot) -> dict[str, Any]:
    """Return a slot as vault.json has it."""
    values = asdict(slot)
    if slot.scrypt is None:
        del values["scrypt"]
    else:
        values["scrypt"] = list(slot.scrypt)
    return values


def decode_slot(values: Any, *, where: str) -> Slot:
    """Return a slot of vault.json, its numbers bounded.

    Raises:
        FormatError: it is not one.
    """
    texts = {"id": 8, "salt": 64, "nonce": 24, "wrapped": 2 * (KEY_SIZE + 16)}
    if not isinstance(values, dict) or set(values) - {"scrypt"} != {
        *texts, "kind", "label", "created",
    }:  # fmt: skip
        raise FormatError("a key slot has other parts than it should", where=where)
    for name, length in texts.items():
        if not _is_hex(values[name], length):
            raise FormatError(f"a key slot's {name} is none", where=where)
    kind, label, created = values["kind"], values["label"], values["created"]
    if kind not in _KINDS or not _is_short(label) or not _is_short(created):
        raise FormatError("a key slot has unknown values", where=where)
    cost = values.get("scrypt")
    if (cost is None) != (kind == KEY_FILE) or (cost is not None and not _is_cost(cost)):
        raise FormatError("a key slot asks for too much work, or none", where=where)
    parts = {name: values[name] for name in texts}
    return Slot(
        kind=kind, label=label, created=created,
        scrypt=None if cost is None else (cost[0], cost[1], cost[2]), **parts,
    )  # fmt: skip


def _is_hex(value: object, length: int) -> bool:
    return (
        isinstance(value, str) and len(value) == length and not set(value) - set("0123456789abcdef")
    )


def _is_short(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 100 and (not value or value.isprintable())


def _is_cost(cost: object) -> bool:
    if not isinstance(cost, list) or [type(part) for part in cost] != [int, int, int]:
        return False
    n, r, p = cost
    if not (1 < n <= _N_MAX and n & (n - 1) == 0 and 1 <= r <= 32 and 1 <= p <= 16):
        return False
    return bool(128 * n * r <= _MEMORY_MAX and n * r * p <= _WORK_MAX)


def kind_of(given: Secrets) -> str:
    """Return the kind of a slot that opens with all that is given."""
    if given.passphrase is not None and given.file_key is not None:
        return BOTH
    return PASSPHRASE if given.passphrase is not None else KEY_FILE


def _opened(slots: Sequence[Slot], given: Secrets, vault_id: str) -> Iterator[tuple[bytes, Slot]]:
    # A key file is compared at once; a passphrase takes its time.
    for slot in sorted(slots, key=lambda slot: slot.scrypt is not None):
        if not _fits(slot, given):
            continue
        wrapping = AESGCM(_wrapping_key(slot, given, vault_id))
        nonce, wrapped = bytes.fromhex(slot.nonce), bytes.fromhex(slot.wrapped)
        try:
            secret = wrapping.decrypt(nonce, wrapped, _about(slot, vault_id))
        except InvalidTag:
            continue
        yield secret, slot


def _fits(slot: Slot, given: Secrets) -> bool:
    """Say whether all is given that a slot needs; one that needs less is tried as well."""
    has = {PASSPHRASE: given.passphrase is not None, KEY_FILE: given.file_key is not None}
    return all(has.values()) if slot.kind == BOTH else has[slot.kind]


def _wrapping_key(slot: Slot, given: Secrets, vault_id: str) -> bytes:
    salt = bytes.fromhex(slot.salt)
    material = b""
    if slot.scrypt is not None and given.passphrase is not None:
        n, r, p = slot.scrypt
        material += Scrypt(salt=salt, length=32, n=n, r=r, p=p).derive(
            given.passphrase.encode(errors="surrogateescape")
        )
    if slot.kind != PASSPHRASE and given.file_key is not None:
        material += given.file_key
    info = b"vdiskfs slot 1 " + slot.kind.encode() + b" " + bytes.fromhex(vault_id)
    return HKDF(hashes.SHA256(), KEY_SIZE, salt, info).derive(material)


def _about(slot: Slot, vault_id: str) -> bytes:
    said = encode_slot(slot) | {"wrapped": "", "vault_id": vault_id}
    return json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
