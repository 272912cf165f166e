"""A container that is missing and a key that is wrong: one line, the right exit code."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.azurite import ACCOUNT, KEY, AzureVault
from tests.e2e.mounted import MountedSite
from tests.e2e.test_bad_input import FAST, MIB, mount_refused, refused

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.azurite]


@pytest.fixture
def site(tmp_path: Path, azure_vault: AzureVault) -> Iterator[MountedSite]:
    environ = azure_vault.environ
    with MountedSite(tmp_path, vault=azure_vault.url, environ=environ, options=FAST) as made:
        made.add_image("web01", MIB, os.urandom(MIB))
        yield made


def test_a_container_that_is_missing(site: MountedSite) -> None:
    mount_refused(site, 3, "vault init")
    refused(site, 3, "vault init", "vault", "info", "--vault", site.vault)


def test_a_key_that_is_wrong(site: MountedSite) -> None:
    site.init()
    wrong = base64.b64encode(b"not the key" * 5).decode()
    right = dict(site.environ)
    for name, value in right.items():
        site.environ[name] = value.replace(KEY, wrong)
    mount_refused(site, 7, ACCOUNT)
    refused(site, 7, ACCOUNT, "vault", "info", "--vault", site.vault)
    # Nothing was lost by it: with the right one the same line mounts.
    site.environ.update(right)
    site.mount().wait_shipped("web01")
    assert wrong not in (site.state / "daemon.log").read_text()
