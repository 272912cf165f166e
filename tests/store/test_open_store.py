"""Vault URLs: what is opened, what is refused, and that nothing secret is shown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vdiskfs.errors import UsageError
from vdiskfs.store import open_store, same_place

ENVIRON = {"AZURE_STORAGE_ACCOUNT": "acc", "AZURE_STORAGE_KEY": "c2VjcmV0"}


def test_a_folder_describes_itself_as_its_url(tmp_path: Path) -> None:
    assert open_store(f"file://{tmp_path}/v/").describe() == f"file://{tmp_path}/v"
    assert open_store(f"file://{tmp_path}/a%20b").describe() == f"file://{tmp_path}/a b"


def test_a_container_describes_itself_with_its_endpoint() -> None:
    store = open_store("azure://vault/some/prefix/", environ=ENVIRON)
    assert store.describe() == "azure://vault/some/prefix at https://acc.blob.core.windows.net"
    store = open_store("azure://vault", environ=ENVIRON)
    assert store.describe() == "azure://vault at https://acc.blob.core.windows.net"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "vault",
        "s3://bucket/x",
        "file:/srv/v",
        "file://host/srv/v",
        "file://",
        "file://srv",
        "file:///a%00b",
        "file:///srv/v#x",
        "azure:/c",
        "://x",
        "azure://c?sv=1&sig=SECRET",
        "azure://SECRET@c/p",
    ],
)
def test_what_is_not_a_vault_url_is_refused_with_the_forms(url: str) -> None:
    with pytest.raises(UsageError) as raised:
        open_store(url, environ=ENVIRON)
    assert "file:///FOLDER" in raised.value.hint
    assert "azure://CONTAINER" in raised.value.hint
    assert "SECRET" not in str(raised.value)


def test_a_plain_path_is_refused_with_its_url() -> None:
    with pytest.raises(UsageError, match="use file:///srv/vault"):
        open_store("/srv/vault")


@pytest.mark.parametrize("container", ["", "ab", "Upper", "a--b", "-ab", "ab-", "a_b", "x" * 64])
def test_a_container_has_a_container_s_name(container: str) -> None:
    with pytest.raises(UsageError, match="container"):
        open_store(f"azure://{container}/p", environ=ENVIRON)


@pytest.mark.parametrize("prefix", ["../x", "a//b", "a b", ".x"])
def test_a_prefix_is_a_name(prefix: str) -> None:
    with pytest.raises(UsageError, match="prefix"):
        open_store(f"azure://vault/{prefix}", environ=ENVIRON)


def test_a_folder_vault_imports_nothing_of_azure(tmp_path: Path) -> None:
    """And naming no vault imports neither."""
    code = (
        "import sys; from vdiskfs.store import open_store; a = set(sys.modules);"
        f"open_store('file://{tmp_path}'); b = set(sys.modules);"
        "print('vdiskfs.store.local' in a, 'urllib3' in b, 'vdiskfs.store.local' in b)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True"]


def test_urls_of_one_place_are_told_however_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert same_place(f"file://{tmp_path}", f"file://{tmp_path}/link/./")
    assert not same_place(f"file://{tmp_path}", f"file://{tmp_path}/v")
    assert same_place("azure://box/a/?control=small", "azure://box/a?control=small")
    assert not same_place("azure://box/a", "azure://box/a?control=small")
    assert not same_place("azure://box", "azure://box/a")
