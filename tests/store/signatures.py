"""Shared access signatures for the tests of the Azure store."""

from __future__ import annotations

import datetime

from azure.storage.blob import generate_container_sas

from tests.azurite import ACCOUNT, KEY, AzureVault

DATA = bytes(range(256)) * 40


def sas(azure_vault: AzureVault, permissions: str, *, lives_s: int = 3600) -> str:
    """Sign a token for the container."""
    return generate_container_sas(
        ACCOUNT,
        azure_vault.container,
        account_key=KEY,
        permission=permissions,
        expiry=datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=lives_s),
    )


def sas_environ(azure_vault: AzureVault, port: int, token: str) -> dict[str, str]:
    return {
        "AZURE_STORAGE_SAS_TOKEN": token,
        "AZURE_STORAGE_BLOB_ENDPOINT": f"http://127.0.0.1:{port}/{ACCOUNT}",
    }
