"""What is said of a token before it fails, or falls into wrong hands."""

from __future__ import annotations

import time
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
        # A week before its end it is said; and so is a life of more than a year.
        ("se=2026-11-29&spr=https", []),
        ("se=2026-11-28T23:59:59Z&spr=https", ["expires at 2026-11-28T23:59:59Z"]),
        ("se=2026-11-22&spr=https", ["has expired at 2026-11-22T00:00:00Z"]),
        ("se=2027-11-23&spr=https", []),
        ("se=2027-11-24&spr=https", ["whoever copies it has it until 2027-11-24"]),
    ],
)
def test_a_token_is_warned_of_by_what_it_says(terms: str, said: list[str]) -> None:
    for token in (f"sv=1&{terms}&sig=SECRET", f"?{terms}&sig=SECRET"):
        assert token_warnings(token, NOW) == said


def test_a_time_without_a_zone_is_utc_wherever_the_host_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "JST-9")
        time.tzset()
        said = token_warnings("se=2026-11-24&spr=https", NOW)
    time.tzset()
    assert said == ["expires at 2026-11-24T00:00:00Z"]


def test_tokens_are_found_wherever_they_are_given() -> None:
    environ = {
        "AZURE_STORAGE_SAS_TOKEN": "a", "AZURE_STORAGE_CONTROL_SAS_TOKEN": "b",
        "AZURE_STORAGE_CONNECTION_STRING": "AccountName=x; SharedAccessSignature=sv=1&sig=c",
    }  # fmt: skip
    assert list(given_tokens(environ).values()) == ["a", "b", "sv=1&sig=c"]
    assert given_tokens({"AZURE_STORAGE_KEY": "k"}) == {}
