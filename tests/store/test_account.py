"""Accounts from the environment."""

from __future__ import annotations

import pytest
from azure.core.credentials import AzureSasCredential

from vdiskfs.errors import RefusedError, UsageError
from vdiskfs.store.account import Account, check_endpoint, control_environ

KEY = "c2VjcmV0LWtleQ=="


@pytest.mark.parametrize(
    ("environ", "endpoint"),
    [
        (
            {"AZURE_STORAGE_ACCOUNT": "acc", "AZURE_STORAGE_KEY": KEY},
            "https://acc.blob.core.windows.net",
        ),
        (
            {"AZURE_STORAGE_CONNECTION_STRING": f"AccountName=acc;AccountKey={KEY};"},
            "https://acc.blob.core.windows.net",
        ),
        (
            {
                "AZURE_STORAGE_CONNECTION_STRING": "DefaultEndpointsProtocol=https;"
                f"AccountName=acc;AccountKey={KEY};EndpointSuffix=core.chinacloudapi.cn"
            },
            "https://acc.blob.core.chinacloudapi.cn",
        ),
        (
            {
                "AZURE_STORAGE_CONNECTION_STRING": "BlobEndpoint=https://acc.blob.x.net/;"
                "SharedAccessSignature=sv=1&sig=abc%3D"
            },
            "https://acc.blob.x.net",
        ),
        (
            {
                "AZURE_STORAGE_ACCOUNT": "acc",
                "AZURE_STORAGE_SAS_TOKEN": "?sv=1&sig=abc",
                "AZURE_STORAGE_BLOB_ENDPOINT": "https://acc.privatelink.blob.core.windows.net",
            },
            "https://acc.privatelink.blob.core.windows.net",
        ),
        (
            {
                "AZURE_STORAGE_KEY": KEY,
                "AZURE_STORAGE_BLOB_ENDPOINT": "http://127.0.0.1:10000/acc/",
            },
            "http://127.0.0.1:10000/acc",
        ),
        (
            {"AZURE_STORAGE_CONNECTION_STRING": "UseDevelopmentStorage=true"},
            "http://127.0.0.1:10000/devstoreaccount1",
        ),
    ],
)
def test_an_account_comes_from_the_environment(environ: dict[str, str], endpoint: str) -> None:
    account = Account.from_environ(environ)
    assert account.endpoint == endpoint
    assert account.name == ("devstoreaccount1" if "devstore" in endpoint else "acc")


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({}, "no Azure storage account"),
        ({"AZURE_STORAGE_ACCOUNT": "a/b", "AZURE_STORAGE_KEY": KEY}, "not the name"),
        ({"AZURE_STORAGE_ACCOUNT": "acc", "AZURE_STORAGE_KEY": "SECRET!"}, "not base64"),
        ({"AZURE_STORAGE_ACCOUNT": "acc", "AZURE_STORAGE_SAS_TOKEN": "SECRET"}, "not a shared"),
        ({"AZURE_STORAGE_CONNECTION_STRING": "SECRET"}, "malformed"),
        ({"AZURE_STORAGE_CONNECTION_STRING": "AccountName=acc;SECRET"}, "malformed"),
        (
            {
                "AZURE_STORAGE_ACCOUNT": "acc",
                "AZURE_STORAGE_KEY": KEY,
                "AZURE_STORAGE_BLOB_ENDPOINT": "https://u:SECRET@h/",
            },
            "not a URL",
        ),
    ],
)
def test_a_wrong_environment_is_refused_without_its_secrets(
    environ: dict[str, str], text: str
) -> None:
    with pytest.raises(UsageError, match=text) as raised:
        Account.from_environ(environ)
    assert "SECRET" not in repr(raised.value) + str(raised.value) + repr(raised.value.__context__)


def test_an_account_without_a_secret_asks_azure_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "azure.identity", None)
    with pytest.raises(UsageError, match="install azure-identity"):
        Account.from_environ({"AZURE_STORAGE_ACCOUNT": "acc"})


@pytest.mark.parametrize("host", ["example.net", "10.0.0.1", "127.0.0.1.example.net"])
def test_secrets_never_travel_without_tls(host: str) -> None:
    with pytest.raises(RefusedError, match="without TLS"):
        check_endpoint(f"http://{host}/acc")


@pytest.mark.parametrize("host", ["127.0.0.1:10000", "127.8.8.8", "[::1]:10", "localhost"])
def test_an_emulator_on_this_host_needs_no_tls(host: str) -> None:
    assert check_endpoint(f"http://{host}/acc/") == f"http://{host}/acc"


@pytest.mark.parametrize("url", ["ftp://x", "x", "https://", "https://[x", "https://h:99999/"])
def test_an_endpoint_is_a_url(url: str) -> None:
    with pytest.raises(UsageError, match="endpoint"):
        check_endpoint(url)


def test_nothing_shows_a_secret() -> None:
    for environ in (
        {"AZURE_STORAGE_ACCOUNT": "acc", "AZURE_STORAGE_KEY": KEY},
        {"AZURE_STORAGE_ACCOUNT": "acc", "AZURE_STORAGE_SAS_TOKEN": "sv=1&sig=SECRET"},
    ):
        account = Account.from_environ(environ)
        shown = repr(account) + str(account) + repr(account.credential)
        assert KEY not in shown
        assert "sig=" not in shown
        assert "secret" not in shown.lower()


@pytest.mark.parametrize(
    "text",
    [
        f"AccountName=acc; AccountKey={KEY}",
        f"AccountName=acc;\n ACCOUNTKEY ={KEY} ;",
        "AccountName=acc; SharedAccessSignature=sv=1&sig=of-the-data",
        "UseDevelopmentStorage=true",
    ],
)
def test_the_control_containers_own_token_wins(text: str) -> None:
    token = "sv=1&sig=of-the-control"
    environ = {"AZURE_STORAGE_CONNECTION_STRING": text, "AZURE_STORAGE_CONTROL_SAS_TOKEN": token}
    data = Account.from_environ(environ)
    control = Account.from_environ(control_environ(environ))
    assert isinstance(control.credential, AzureSasCredential)
    assert control.credential.signature == token
    assert (control.name, control.endpoint) == (data.name, data.endpoint)
