"""A vault that goes away, and who hears of it: a real mount, mail server and web server."""

from __future__ import annotations

import hashlib
import hmac
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.azurite import AzureVault
from tests.e2e.listeners import mail_server, web_server
from tests.e2e.mounted import PROGRAM, MountedSite
from tests.store.proxy import Fault, FaultProxy
from tests.vaults import VARIABLE

pytestmark = [pytest.mark.e2e, pytest.mark.root]

MIB = 1 << 20
EVER = 1 << 30
SECRET = "correct horse"


def options(mail: int, web: int, secret: Path) -> str:
    return f"""
heartbeat_s = 1
[watch]
rpo_warning = 4
rpo_error = "8s"
hold_s = 2
metrics_listen = "127.0.0.1:0"
[mail]
host = "127.0.0.1"
port = {mail}
sender = "vdiskfs@example.org"
to = ["admin@example.org"]
gather_s = 0
[webhook]
url = "http://127.0.0.1:{web}/hook"
secret_file = "{secret}"
"""


def write(site: MountedSite, rng: random.Random) -> None:
    with site.image("web01").open("r+b") as image:
        image.seek(rng.randrange(0, 7 * MIB, 4096))
        image.write(rng.randbytes(8192))
        os.fdatasync(image.fileno())


@contextmanager
def shipped(
    directory: Path, vault: AzureVault, proxy: FaultProxy, settings: str, rng: random.Random
) -> Iterator[MountedSite]:
    """Mount a disk, web01, that is replicated to a vault behind a proxy."""
    environ = vault.azurite.environ(proxy.port)
    with MountedSite(directory, vault=vault.url, environ=environ, options=settings) as site:
        site.add_image("web01", 8 * MIB, rng.randbytes(MIB))
        site.init().mount()
        site.wait_shipped("web01")
        yield site


@pytest.mark.azurite
def test_warning_and_error_of_a_vault_that_is_away_come_once_each_to_mail_and_webhook(
    azure_vault: AzureVault, tmp_path: Path
) -> None:
    """In the order of their thresholds, and their ends once each when it is back."""
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    rng = random.Random(5)
    with (
        FaultProxy(azure_vault.azurite.port) as proxy,
        mail_server() as mailbox,
        web_server() as web,
    ):
        settings = options(mailbox.port, web.port, secret)
        with shipped(tmp_path, azure_vault, proxy, settings, rng) as site:
            away = proxy.add(Fault("reset", "*", count=EVER))
            write(site, rng)
            site.wait("the error is told", lambda: "rpo.error" in mailbox.codes())
            site.wait("and by the webhook", lambda: "rpo.error" in web.codes())
            assert site.disk("web01")["health"] == "Critical"
            assert "rpo_error" in site.disk("web01")["last_error"]
            site.wait("it is away for long", lambda: "vault.away" in web.codes())
            assert away.fired > 0
            proxy.clear()
            site.wait_shipped("web01")
            over = {"rpo.warning.over", "rpo.error.over", "vault.away.over"}
            site.wait("their ends are told", lambda: over <= set(mailbox.codes()))
            site.wait("and by the webhook", lambda: over <= set(web.codes()))
            assert site.disk("web01")["health"] == "Normal"
            listed = site.json("event", "list", "--disk", "web01")["events"]
            lists = site.run("-m", site.mountpoint, "event", "list", "--level", "error").stdout
        told = ["rpo.warning", "rpo.error", "vault.away"]
        for codes in (mailbox.codes(), web.codes(), [one["code"] for one in listed]):
            for code in (*told, *over):
                assert codes.count(code) == 1, codes
            assert codes.index("rpo.warning") < codes.index("rpo.error")
    assert "rpo.error web01" in lists
    assert "rpo.warning" not in lists
    events = {event["code"]: event for event in web.events()}
    assert events["rpo.warning"]["level"] == "warning"
    assert events["rpo.error"]["level"] == "error"
    assert events["rpo.error"]["disk"] == "web01"
    assert "rpo_error (8 s)" in events["rpo.error"]["text"]
    assert events["rpo.error"]["health"] == "Critical"
    assert events["rpo.error"]["todo"]
    for body, headers in zip(web.bodies, web.headers, strict=True):
        expected = hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
        assert headers["X-Vdiskfs-Signature"] == f"sha256={expected}"
    mail = next(one for one in mailbox.messages if one["X-Vdiskfs-Codes"] == "rpo.error")
    assert mail["To"] == "admin@example.org"
    assert mail["Subject"].startswith("[vdiskfs site] error: web01: the vault lags")


def test_the_metrics_are_at_the_socket_and_tell_of_replication(tmp_path: Path) -> None:
    rng = random.Random(6)
    with MountedSite(tmp_path) as site:
        site.add_image("web01", 8 * MIB, rng.randbytes(MIB))
        site.init().mount()
        site.wait_shipped("web01")
        write(site, rng)
        site.wait_shipped("web01")
        transport = httpx.HTTPTransport(uds=str(site.state / "control.sock"))
        with httpx.Client(transport=transport) as client:
            text = client.get("http://vdiskfs/metrics").text
    assert 'vdiskfs_disk_health{disk="web01"} 0.0' in text
    assert 'vdiskfs_disk_shipped_lag_seconds{disk="web01"} 0.0' in text
    assert 'vdiskfs_disk_epochs_shipped_total{disk="web01"} 2.0' in text


def test_events_are_followed_over_the_death_of_a_daemon_and_sinks_are_tried(
    tmp_path: Path,
) -> None:
    """Who follows sees what happens, once; `event test` says what each sink answers."""
    with web_server() as web, MountedSite(tmp_path) as site:
        site.config.write_text(
            f'[watch]\njournal_socket = ""\n[webhook]\nurl = "http://127.0.0.1:{web.port}/"\n'
        )
        site.add_image("web01", 4 * MIB)
        site.init().mount()
        site.wait_shipped("web01")
        follower = subprocess.Popen(
            [PROGRAM, "-m", site.mountpoint, "event", "list", "--follow"],
            stdout=subprocess.PIPE, text=True, env=site.environ,
        )  # fmt: skip
        try:
            assert follower.stdout is not None
            assert "mount.started" in follower.stdout.readline()
            assert "disk.finalized" in follower.stdout.readline()
            site.kill_daemon()
            second = follower.stdout.readline()
            assert "mount.started" in second
            assert "taken over" in second
            [row] = site.json("event", "test")["sinks"]
            assert (row["sink"], row["ok"], row["answer"]) == ("webhook", True, "answered 204")
            assert "watch.test" in follower.stdout.readline()
            web.statuses = [500]
            failed = site.run("-m", site.mountpoint, "event", "test", code=1)
            assert "webhook: FAILED: answered 500" in failed.stdout
            assert "vdiskfs: webhook: not told" in failed.stderr
        finally:
            follower.kill()
            follower.communicate()
        levels = site.json("event", "list", "--level", "warning")["events"]
        assert levels == []
        (site.state / "events.db").write_bytes(b"no database at all" * 500)
        site.json("event", "test")
        assert [one["code"] for one in site.json("event", "list")["events"]] == ["watch.test"]
        log = (site.state / "daemon.log").read_text()
    assert log.count("is set aside as events.db.damaged") == 1


@pytest.mark.azurite
def test_a_key_that_is_refused_is_told_at_once_with_what_to_do_and_retried_when_asked(
    azure_vault: AzureVault, tmp_path: Path
) -> None:
    rng = random.Random(7)
    with FaultProxy(azure_vault.azurite.port) as proxy, web_server() as web:
        settings = f"""
heartbeat_s = 1
[watch]
hold_s = 1
[webhook]
url = "http://127.0.0.1:{web.port}/"
level = "error"
"""
        with shipped(tmp_path, azure_vault, proxy, settings, rng) as site:
            headers = {"x-ms-error-code": "AuthenticationFailed"}
            wrong = Fault("answer", "*", count=EVER, status=403, headers=headers)
            proxy.add(wrong)
            write(site, rng)
            site.wait("it is told", lambda: "vault.refused" in web.codes())
            row = site.disk("web01")
            assert (row["health"], row["next_retry_s"]) == ("Critical", None)
            assert "vdiskfs disk retry web01" in row["last_error"]
            assert site.json("disk", "retry", "web01")["retried"] is True
            proxy.clear()
            site.wait("the heartbeat is back", lambda: not site.json("status")["vault_error"])
            if site.disk("web01")["health"] == "Critical":  # it was asked too early
                assert site.json("disk", "retry", "web01")["retried"] is True
            site.wait_shipped("web01")
            site.wait("its end is told", lambda: "vault.refused.over" in web.codes())
            assert site.disk("web01")["health"] == "Normal"
        [told, over] = web.events()
    assert wrong.fired > 0
    assert told["level"] == "error"
    assert "check the key or token" in told["todo"]
    assert "vdiskfs disk retry" in told["todo"]
    assert (over["level"], over["health"]) == ("info", "Normal")


def test_the_thresholds_of_a_policy_hold_from_the_start_whatever_the_vault_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "plain")  # a document is damaged by hand
    expected = 'vdiskfs_disk_rpo_threshold_seconds{disk="web01",level="warning"} 77'
    with MountedSite(tmp_path, options="heartbeat_s = 1\n") as site:

        def told() -> bool:
            transport = httpx.HTTPTransport(uds=str(site.state / "control.sock"))
            with httpx.Client(transport=transport) as client:
                return expected in client.get("http://vdiskfs/metrics").text

        site.add_image("web01", MIB, b"x" * MIB)
        site.init().mount().wait_shipped("web01")
        site.run("-m", site.mountpoint, "policy", "set", "slow", "rpo_warning=77s")
        site.run("-m", site.mountpoint, "disk", "protect", "web01", "--policy", "slow", "--yes")
        site.wait("it is followed", told)
        site.kill_daemon()  # copies are made at the start, and every few minutes
        copies = site.state / "documents.others"
        site.wait("it is copied", lambda: copies.is_dir() and any(copies.iterdir()))
        (tmp_path / "vault" / "policies" / "slow.json").write_text("{")
        site.kill_daemon()
        site.wait_shipped("web01")
        assert told()
