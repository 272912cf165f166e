"""A soak adds its rounds up, goes on behind a failed one, and says how to see it again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.e2e.kills import ViolationError
from tests.soak import __main__ as soak
from tests.soak.scenarios import Counts, Scenario, races
from tests.vaults import VARIABLE

RAN: list[int] = []


def good_round(directory: Path, seed: int) -> Counts:
    (directory / "file").touch()
    RAN.append(seed)
    return {"kills": 2, "pauses_s": [0.5, 1.5], "violations": 0}


def bad_round(directory: Path, seed: int) -> Counts:
    assert directory.is_dir()
    raise ViolationError([f"seed {seed} lost a write"], {"kills": 1, "violations": 1})


@pytest.fixture
def scenarios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.nice", lambda _: 0)
    monkeypatch.setenv(VARIABLE, "plain")
    rounds = {"good": Scenario(good_round, 1), "bad": Scenario(bad_round, 1)}
    monkeypatch.setattr(soak, "SCENARIOS", rounds)
    RAN.clear()


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["soak", *words])
    return soak.main()


@pytest.mark.usefixtures("scenarios")
def test_a_round_is_run_again_by_its_seed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--scenario", "good", "--seed", "41") == 0
    assert RAN == [41]
    out = capsys.readouterr().out
    assert "good: 1 rounds, 0 failed, kills 2, violations 0" in out
    assert "pauses: 2, median 1.00 s, worst 1.50 s" in out


@pytest.mark.usefixtures("scenarios")
@pytest.mark.parametrize("more", [[], ["--vault", "plain"]])
def test_a_failed_round_is_told_with_its_command_and_its_files_stay(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    assert run(monkeypatch, "--scenario", "bad", "--seed", "42", *more) == 1
    out, err = capsys.readouterr()
    assert "seed 42 lost a write" in err
    assert " ".join(["./run soak --scenario bad --seed 42", *more]) + "\n" in err
    assert "bad: 1 rounds, 1 failed, kills 1, violations 1" in out
    kept = Path(err.partition("its files are in ")[2].partition(";")[0])
    kept.rmdir()


@pytest.mark.usefixtures("scenarios")
def test_the_seed_of_a_soak_sets_its_rounds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same seed draws the same rounds, whatever became of them."""
    drawn = []
    for _ in range(2):
        ticks = iter(range(0, 600, 20))
        with monkeypatch.context() as patch:
            patch.setattr("time.monotonic", lambda: float(next(ticks)))
            assert run(patch, "--minutes", "5", "--seed", "9") == 1
        out, err = capsys.readouterr()
        for line in err.splitlines():
            if "its files are in " in line:
                Path(line.partition("its files are in ")[2].partition(";")[0]).rmdir()
        drawn.append([line for line in out.splitlines() if line.startswith("-- ")])
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) > 3


def test_a_round_of_races_counts_what_was_raced(tmp_path: Path) -> None:
    counts = races(tmp_path, 1)
    assert counts["races"] == 50
    assert counts["violations"] == 0
