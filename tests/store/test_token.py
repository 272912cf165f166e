"""What is said of a token before it fails, or falls into wrong hands."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from vdiskfs.store.token import given_tokens, token_warnings

NOW = datetime(2026, 11, 22, tzinfo=UTC)


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ("se=2027-01-01T00%3A00%3A00Z&spr=https", []),
        ("se=2026-11-24T12:00:00Z&spr=https", ["expires at 2026-11-24T12:00:00Z"]),
        ("se=2026-11-20&spr=https", ["has expired at 2026-11-20T00:00:00Z"]),
        ("se=2036-01-01&spr=https", ["whoever copies it has it until 2036-01-01"]),
        ("se=2027-01-01&spr=https,http", ["is valid for http, too"]),
        ("se=2027-01-01", ["is valid for http, too"]),
        ("si=a-policy", []),
        ("se=never&spr=https", []),
    ],
)
def test_a_token_is_warned_of_by_what_it_says(terms: str, said: list[str]) -> None:
    assert token_warnings(f"?sv=1&{terms}&sig=SECRET", NOW) == said


def test_tokens_are_found_wherever_they_are_given() -> None:
    environ = {
        "AZURE_STORAGE_SAS_TOKEN": "a", "AZURE_STORAGE_CONTROL_SAS_TOKEN": "b",
        "AZURE_STORAGE_CONNECTION_STRING": "AccountName=x; SharedAccessSignature=sv=1&sig=c",
    }  # fmt: skip
    assert list(given_tokens(environ).values()) == ["a", "b", "sv=1&sig=c"]
    assert given_tokens({"AZURE_STORAGE_KEY": "k"}) == {}
