"""How far the walks over crash hooks went is printed at the end of the run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest


@pytest.fixture
def crash_reports(record_property: Callable[[str, object], None]) -> Callable[[object], None]:
    """Keep a report for the end of the run, whichever process prints it."""
    return partial(record_property, "crash_report")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [
        value
        for test in terminalreporter.stats.get("passed", [])
        for name, value in test.user_properties
        if name == "crash_report"
    ]
    if not reports:
        return
    terminalreporter.section("crash hooks")
    names: dict[str, set[str]] = {"python": set(), "c": set()}
    for report in reports:
        for side, found in report["hooks"].items():
            names[side].update(found)
        terminalreporter.write_line(
            f"{report['scenario']}: killed at {report['crashes']} hooks, and again during the "
            f"recovery at {report['second_crashes']}"
        )
    crashes = sum(report["crashes"] + report["second_crashes"] for report in reports)
    terminalreporter.write_line(
        f"{len(names['python'])} named hooks in Python, {len(names['c'])} in C, "
        f"{crashes} crash points walked"
    )
