"""Azurite, the emulator of Azure Blob Storage, for tests. A pytest plugin of two fixtures.

``azurite`` runs for the whole session; ``azure_vault`` is a vault URL of its own for one
test, with the environment that opens it. Neither makes the container: ``vault init`` does.

    def test_something(azure_vault: AzureVault) -> None:
        store = open_store(azure_vault.url, environ=azure_vault.environ)
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ACCOUNT = "devstoreaccount1"
# Public, the same in every Azurite.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_ROOT = Path(__file__).resolve().parent.parent
_LISTENS = re.compile(r"listens on http://127\.0\.0\.1:(\d+)")
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Azurite:
    """A running emulator."""

    port: int
    pid: int

    def environ(self, port: int | None = None) -> dict[str, str]:
        """Return the environment that opens a vault in it, or through a proxy at ``port``."""
        endpoint = f"http://127.0.0.1:{port or self.port}/{ACCOUNT}"
        return {
            "AZURE_STORAGE_CONNECTION_STRING": (
                f"AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint}"
            )
        }


@dataclass(frozen=True)
class AzureVault:
    """A place for one vault that nothing else uses."""

    container: str
    prefix: str
    environ: dict[str, str]
    azurite: Azurite

    @property
    def url(self) -> str:
        """The vault's URL."""
        return f"azure://{self.container}/{self.prefix}"


def find_azurite() -> str | None:
    """Return the program: of the tree's own installation, else of the host."""
    own = _ROOT / ".venv/azurite/node_modules/.bin/azurite-blob"
    return str(own) if own.exists() else shutil.which("azurite-blob")


@contextmanager
def run_azurite(directory: Path | None = None) -> Iterator[Azurite]:
    """Run an emulator, empty, on a port that the system gives; in memory unless told where."""
    program = find_azurite()
    if program is None:
        pytest.skip("needs Azurite: ./run setup installs it")
    arguments = ["--blobHost", "127.0.0.1", "--blobPort", "0"]
    arguments += ["--inMemoryPersistence"] if directory is None else ["--location", str(directory)]
    arguments += ["--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    process = subprocess.Popen(
        [program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        seen: list[str] = []
        port = None
        # Ends when it listens, or when it has ended.
        for line in process.stdout:
            seen.append(line)
            if port := _LISTENS.search(line):
                break
        assert port is not None, "Azurite did not start: " + "".join(seen)
        yield Azurite(int(port[1]), process.pid)
    finally:
        # It holds nothing that is to live on, and would wait for connections that are kept.
        process.kill()
        process.wait(timeout=30)
        process.stdout.close()


@pytest.fixture(scope="session")
def azurite() -> Iterator[Azurite]:
    """Give the session's emulator."""
    with run_azurite() as running:
        yield running


@pytest.fixture
def azure_vault(azurite: Azurite) -> AzureVault:
    """Give this test a container of its own, not made yet."""
    return AzureVault(f"vault-{next(_numbers)}", "some/prefix", azurite.environ(), azurite)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the emulator before what guards one test looks at what is there."""
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        if "azurite" in item.fixturenames:
            item.add_marker("azurite")
        elif item.get_closest_marker("azurite"):
            item.fixturenames.insert(0, "azurite")
