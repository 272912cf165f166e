"""How far the walks over crash hooks went is printed at the end of the run."""

from __future__ import annotations

from typing import Any

import pytest

REPORTS = pytest.StashKey[list[dict[str, Any]]]()


@pytest.fixture
def crash_reports(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return request.config.stash.setdefault(REPORTS, [])


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    reports = config.stash.get(REPORTS, [])
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
