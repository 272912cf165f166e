"""Keys: what opens a vault, and what is derived from it. No objects, no I/O but key files.

keys      the data key of a vault, and the keys derived from it
slots     the data key, wrapped by a passphrase, a key file, or both
secrets   what a user gives; key files
given     where it is found

The format: vdiskfs-format(5), "Encryption".
"""

from vdiskfs.crypto.given import given_secrets, secrets_of
from vdiskfs.crypto.keys import TAG_SIZE, DataKey, ObjectCipher, new_data_key
from vdiskfs.crypto.secrets import Secrets, make_key_file, read_key_file
from vdiskfs.crypto.slots import (
    BOTH,
    KEY_FILE,
    PASSPHRASE,
    SLOTS_MAX,
    Slot,
    decode_slot,
    encode_slot,
    make_slot,
    open_slots,
    opened_slots,
)

SCHEME_NONE = "none"
SCHEME_AES_256_GCM = "aes-256-gcm"
SCHEMES = (SCHEME_AES_256_GCM, SCHEME_NONE)
"""How a vault may be encrypted; the first is the default of ``vault init``."""

__all__ = [
    "BOTH",
    "KEY_FILE",
    "PASSPHRASE",
    "SCHEMES",
    "SCHEME_AES_256_GCM",
    "SCHEME_NONE",
    "SLOTS_MAX",
    "TAG_SIZE",
    "DataKey",
    "ObjectCipher",
    "Secrets",
    "Slot",
    "decode_slot",
    "encode_slot",
    "given_secrets",
    "make_key_file",
    "make_slot",
    "new_data_key",
    "open_slots",
    "opened_slots",
    "read_key_file",
    "secrets_of",
]
