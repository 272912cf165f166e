"""What holds for every test: nothing is left behind, nothing is logged unexpectedly.

A test fails that leaves a mount, a loop device, a process, a thread, an open file or a
temporary file behind, or that makes `vdiskfs` log at WARNING or above without saying so
(fixture ``expect_log``). Skips are printed loudly; with CI=true they fail the run.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from trio.testing import MockClock

from tests.clock import jumping_clock
from tests.leaks import Holdings, holdings

# What is started in the background of a shell has it ignored, and hands that on.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_CI = os.environ.get("CI", "").lower() in {"1", "true", "yes"}

pytest_plugins = ["tests.vaults"]
if importlib.util.find_spec("tests.azurite"):
    pytest_plugins.append("tests.azurite")

# Examples run as long as they must; the shared machine decides how long that is.
settings.register_profile(
    "dev", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if _CI else "dev"))


@pytest.fixture(scope="session", autouse=True)
def marked_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give every process that a test starts a mark, and one directory for temporary files."""
    directory = tmp_path_factory.mktemp("tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VDISKFS_TEST_MARK", f"{os.getpid()}-{time.monotonic_ns()}")
        patch.setenv("TMPDIR", str(directory))
        patch.setattr(tempfile, "tempdir", str(directory))
        yield


@pytest.fixture
def autojump_clock() -> MockClock:
    """The clock of a test that asks for it: it jumps to the next deadline when all is idle."""
    return jumping_clock()


@pytest.fixture(autouse=True)
def leak_guard(marked_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail a test that leaves anything behind."""
    base = tmp_path_factory.getbasetemp()
    before = holdings(base)
    yield
    left = _left(base, before)
    if left:
        pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)


def _left(base: Path, before: Holdings) -> list[str]:
    """Return what is there now and was not before, once what was ending has ended."""
    gc.collect()
    left = holdings(base).beyond(before)
    settled = threading.Event()
    for _ in range(100):
        if not left:
            break
        settled.wait(0.02)
        left = holdings(base).beyond(before)
    return left


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def _expected_logs() -> list[str]:
    return []


@pytest.fixture
def expect_log(_expected_logs: list[str]) -> Callable[[str], None]:
    """Say that `vdiskfs` will log, at WARNING or above, what this pattern finds.

    The test fails when it does not: a fault test proves that its fault fired.
    """
    return _expected_logs.append


@pytest.fixture(autouse=True)
def log_guard(_expected_logs: list[str]) -> Iterator[None]:
    """Fail a test during which `vdiskfs` logged what was not expected."""
    collector = _Collector()
    logger = logging.getLogger("vdiskfs")
    logger.addHandler(collector)
    yield
    logger.removeHandler(collector)
    lines = [f"{r.levelname} {r.name}: {r.getMessage()}" for r in collector.records]
    strange = [x for x in lines if not any(re.search(p, x) for p in _expected_logs)]
    missing = [p for p in _expected_logs if not any(re.search(p, x) for x in lines)]
    if strange or missing:
        text = [f"logged: {x}" for x in strange] + [f"not logged: {p}" for p in missing]
        pytest.fail("\n".join(text), pytrace=False)


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Say something at the end of the run: what was counted, with which seed."""
    return partial(record_property, "told")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this user or host cannot do, and say why."""
    missing = {
        "root": "" if os.geteuid() == 0 else "needs root: loop devices and mount",
        "e2e": "" if Path("/dev/fuse").exists() else "needs /dev/fuse",
    }
    for item in items:
        for name, reason in missing.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Name a test that failed at once: a run that is cut off has no summary."""
    if report.failed and _CI and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED {report.nodeid}\n{report.longreprtext[-2000:]}", file=sys.__stderr__)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With CI=true a test that did not run is a test that failed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if _CI and reporter and reporter.stats.get("skipped") and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests told, and what did not run, where nobody overlooks it."""
    stats = terminalreporter.stats
    done = [test for how in ("failed", "passed") for test in stats.get(how, [])]
    told = [text for test in done for name, text in test.user_properties if name == "told"]
    if told:
        terminalreporter.section("counted")
    for text in told:
        terminalreporter.write_line(text)
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    terminalreporter.section("NOT RUN", red=_CI, yellow=not _CI, bold=True)
    for report in skipped:
        where, reason = report.nodeid, ""
        if isinstance(report.longrepr, tuple):
            reason = str(report.longrepr[2])
        terminalreporter.write_line(f"{where}: {reason}")
    if _CI:
        terminalreporter.write_line(f"CI=true: {len(skipped)} skipped, so this run fails")
