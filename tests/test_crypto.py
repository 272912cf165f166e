"""Digests and encryption schemes."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdiskfs.crypto import check_scheme, digest, new_digest
from vdiskfs.errors import FormatError, StateError


@given(st.lists(st.binary(max_size=50), max_size=5), st.binary(max_size=64))
def test_a_digest_is_blake2b_of_all_parts(parts: list[bytes], key: bytes) -> None:
    expected = hashlib.blake2b(b"".join(parts), digest_size=32, key=key).digest()
    assert digest(*parts, key=key) == expected
    running = new_digest(key)
    for part in parts:
        running.update(part)
    assert running.digest() == expected


def test_the_digest_of_nothing_is_the_known_one() -> None:
    known = "0e5751c026e543b2e8ab2eb06099daa1d1e5df47778f7787faab45cdf12fe3a8"
    assert digest().hex() == known


def test_an_unencrypted_vault_opens() -> None:
    assert check_scheme("none", where="vault.json") == "none"


def test_an_encrypted_vault_is_refused_clearly() -> None:
    with pytest.raises(StateError, match=r"vault.json: the vault is encrypted \(aes-256-gcm\)"):
        check_scheme("aes-256-gcm", where="vault.json")


@pytest.mark.parametrize("scheme", ["rot13", "", None, 7, ["none"], "x" * 1000])
def test_an_unknown_scheme_is_refused(scheme: object) -> None:
    with pytest.raises(FormatError, match=r"vault.json: unknown encryption scheme") as raised:
        check_scheme(scheme, where="vault.json")
    assert len(str(raised.value)) < 300
