"""vdiskfs.config: what a configuration file may say, and where things lie."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdiskfs import config
from vdiskfs.config import AzureConfig, Config, MachinesConfig, MountSettings
from vdiskfs.errors import NotFoundError, RefusedError, UsageError
from vdiskfs.quiesceconfig import QuiesceConfig

GIB = 1 << 30


def written(directory: Path, text: str) -> Path:
    path = directory / "vdiskfs.conf"
    path.write_text(text)
    return path


def test_a_file_that_says_nothing_is_the_defaults(tmp_path: Path) -> None:
    assert Config.from_toml(written(tmp_path, "")) == Config()


def test_how_a_disk_rests_is_read_and_written_back(tmp_path: Path) -> None:
    text = """
        application_interval_s = 3600
        freeze_limit_s = 5
        [quiesce.web01]
        agent = "/run/web01/ga.sock"
        before = ["/usr/local/bin/flush", "all"]
        hook_limit_s = 7
        [quiesce."a b"]
        filesystem = true
    """
    found = Config.from_toml(written(tmp_path, text))
    assert found.quiesce == {
        "web01": QuiesceConfig(
            agent="/run/web01/ga.sock", before=("/usr/local/bin/flush", "all"), hook_limit_s=7.0
        ),
        "a b": QuiesceConfig(filesystem=True),
    }
    assert Config.from_dict(json.loads(json.dumps(found.to_dict())), where="json") == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('agent = "relative"', "web01: agent: must be an absolute path"),
        ('agent = "/a"\nlibvirt = "b"', "web01: agent and libvirt exclude each other"),
        ("hook_limit_s = 3", "web01: one of agent, libvirt, filesystem, before is needed"),
        ('before = ["sh", "-c", "true"]', "web01: before: must be an absolute path"),
        ('before = "/bin/true"', "web01: before: must be a list"),
        ("filesystem = 1", "web01: filesystem: must be true or false"),
        ('libvirt = "--help"', "web01: libvirt: must be the name of a domain"),
        ("hook_limit_s = 0", "web01: hook_limit_s: must be seconds"),
        ("frozen = true", "web01: unknown key 'frozen'"),
    ],
)
def test_how_a_disk_rests_is_checked(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Config.from_toml(written(tmp_path, f"[quiesce.web01]\n{text}\n"))


def test_every_key_can_be_set(tmp_path: Path) -> None:
    text = """
        patterns = ["*.vmdk"]
        epoch_interval_s = 5
        cache_limit = "1GiB"
        spool_limit = 2147483648
        compression_level = 7
        workers = 2
        allow_mmap = false
        heartbeat_s = 30.5
        log_level = "debug"
        bandwidth_limit = "10MiB"
        hydration_limit = "50MiB"
        [azure]
        account = "example"
        endpoint = "https://blob.example"
        key_file = "/etc/key"
    """
    assert Config.from_toml(written(tmp_path, text)) == Config(
        patterns=("*.vmdk",),
        epoch_interval_s=5.0,
        cache_limit=GIB,
        spool_limit=2 * GIB,
        compression_level=7,
        workers=2,
        allow_mmap=False,
        heartbeat_s=30.5,
        log_level="debug",
        bandwidth_limit=10 << 20,
        hydration_limit=50 << 20,
        azure=AzureConfig("example", "https://blob.example", "/etc/key"),
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("epoch_interval = 1", "epoch_interval"),
        ("[azure]\nkey = 'secret'", "key"),
        ("azure = 3", "azure"),
        ("patterns = 'x'", "patterns"),
        ("patterns = ['a/b']", "patterns"),
        ("patterns = ['']", "patterns"),
        ("epoch_interval_s = 0", "epoch_interval_s"),
        ("epoch_interval_s = true", "epoch_interval_s"),
        ("epoch_interval_s = nan", "epoch_interval_s"),
        ("cache_limit = 'much'", "cache_limit"),
        ("cache_limit = 1", "cache_limit"),
        ("cache_limit = '99999999999999TiB'", "cache_limit"),
        ("compression_level = 20", "compression_level"),
        ("compression_level = 1.5", "compression_level"),
        ("workers = 0", "workers"),
        ("allow_mmap = 1", "allow_mmap"),
        ("heartbeat_s = inf", "heartbeat_s"),
        ("log_level = 'loud'", "log_level"),
        ("bandwidth_limit = -1", "bandwidth_limit"),
        ("hydration_limit = 'slow'", "hydration_limit"),
        ('when_displaced = "merge"', "when_displaced"),
        ("[azure]\nkey_file = 'relative'", "azure"),
        ("[machines]\nhooks_directory = 'relative'", "machines: hooks_directory"),
        ("[machines.networks]\nlan = 'bridge:a b'", "machines: networks: lan"),
        ("[machines]\nqemu_arguments = '-S'", "machines: qemu_arguments"),
        ("[machines]\nkernel = 'x'", "kernel"),
        ("workers", "not TOML"),
    ],
)
def test_what_cannot_be_used_names_file_and_key(tmp_path: Path, text: str, named: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError, match=named) as caught:
        Config.from_toml(path)
    assert str(path) in str(caught.value)


def test_bytes_that_are_no_text_are_wrong_use(tmp_path: Path) -> None:
    path = tmp_path / "vdiskfs.conf"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError):
        Config.from_toml(path)


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        config.load_config(tmp_path / "absent")


def test_without_a_file_the_defaults_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "default_config_path", lambda _environ: tmp_path / "absent")
    assert config.load_config(None) == Config()


def test_a_directory_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        Config.from_toml(tmp_path)


def settings(**changes: object) -> MountSettings:
    values = {"source": "/srv", "mountpoint": "/mnt", "vault": "file:///v", "site": "a"}
    return MountSettings(**{**values, "state": "/state", **changes})  # type: ignore[arg-type]


@given(
    st.builds(
        settings,
        source=st.none() | st.just("/srv/images"),
        over=st.booleans(),
        protect=st.booleans(),
        options=st.builds(
            Config,
            patterns=st.lists(st.sampled_from(["*.img", "a?"])).map(tuple),
            epoch_interval_s=st.floats(0.05, 86400),
            cache_limit=st.integers(16 << 20, 1 << 62),
            azure=st.builds(AzureConfig, account=st.none() | st.just("x")),
            machines=st.builds(
                MachinesConfig,
                hooks_directory=st.none() | st.just("/etc/hooks"),
                networks=st.dictionaries(st.sampled_from("ab"), st.just("bridge:br0")),
                qemu_arguments=st.lists(st.just("-S")).map(tuple),
            ),
        ),
    )
)
def test_settings_survive_json(given_settings: MountSettings) -> None:
    assert MountSettings.from_json(given_settings.to_json()) == given_settings


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "{}",
        json.dumps({"mountpoint": "relative"}),
        json.dumps({**json.loads(settings().to_json()), "more": 1}),
        json.dumps({**json.loads(settings().to_json()), "options": {"more": 1}}),
        json.dumps({**json.loads(settings().to_json()), "over": "yes"}),
    ],
)
def test_settings_that_lie_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        MountSettings.from_json(text)


def test_every_key_has_a_rule() -> None:
    assert {item.name for item in fields(Config)} == set(config._CONFIG_KEYS)
    assert {item.name for item in fields(AzureConfig)} == set(config._AZURE_KEYS)
    assert {item.name for item in fields(MountSettings)} == set(config._MOUNT_KEYS)


def test_root_keeps_state_below_var_lib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    digest = hashlib.sha256(b"/srv/my images").hexdigest()[:8]
    wanted = Path(f"/var/lib/vdiskfs/my_images-{digest}")
    assert config.default_state("/srv/my images", "/mnt") == wanted
    assert config.default_state(None, "/srv/my images") == wanted


def test_a_user_keeps_state_in_the_xdg_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/u")
    found = config.default_state("/srv", "/mnt", {"XDG_STATE_HOME": "/xdg"})
    assert found.parent == Path("/xdg/vdiskfs")
    assert config.default_state("/srv", "/mnt", {}).parent == Path("/home/u/.local/state/vdiskfs")
    relative = config.default_state("/srv", "/mnt", {"XDG_STATE_HOME": "xdg"})
    assert relative.parent == Path("/home/u/.local/state/vdiskfs")


def test_each_source_has_its_own_state() -> None:
    assert config.default_state("/a/x", "/mnt") != config.default_state("/b/x", "/mnt")


@pytest.mark.parametrize("name", ["", ".x", "A", "a/b", "a b", "x" * 64, "ä", "a\n"])
def test_a_site_has_a_plain_name(name: str) -> None:
    with pytest.raises(UsageError):
        config.check_site(name)


def test_the_hosts_name_becomes_a_name_of_a_site(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("KVM-1.Example", "-", "", "ä_host"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        assert config.check_site(config.default_site())


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("c2VjcmV0\n")
    key.chmod(0o600)
    told = Config(azure=AzureConfig("file", None, str(key)))
    assert config.vault_environ(told, {}) == {
        "AZURE_STORAGE_ACCOUNT": "file",
        "AZURE_STORAGE_KEY": "c2VjcmV0",
    }
    environ = {"AZURE_STORAGE_ACCOUNT": "environment", "AZURE_STORAGE_SAS_TOKEN": "sig"}
    assert config.vault_environ(told, environ) == environ


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret")
    key.chmod(0o640)
    with pytest.raises(RefusedError) as caught:
        config.vault_environ(Config(azure=AzureConfig(key_file=str(key))), {})
    assert "secret" not in str(caught.value)


def test_a_key_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    absent = AzureConfig(key_file=str(tmp_path / "absent"))
    with pytest.raises(RefusedError):
        config.vault_environ(Config(azure=absent), {})
