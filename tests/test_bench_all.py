"""`dropbp bench all`: which parts it runs, with which options, where results go, and what it says."""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from dropbp.bench import everything
from dropbp.bench import parts as command
from dropbp.bench.common import records
from dropbp.bench.everything import Outcome

from dropbp.errors import ConfigError, DeviceError

Calls = dict[str, list[str]]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What each part was given, in the order of their runs; none does anything, and overhead fails."""
    calls: Calls = {}

    def run(arguments: Sequence[str]) -> int:
        name, *options = arguments
        calls[name] = options
        if name == "overhead":
            raise ConfigError("no")
        return 0

    def beside(commands: Mapping[str, Sequence[str]]) -> list[Outcome]:
        calls.update({name: list(options) for name, options in commands.items()})
        return [Outcome(name, True, 1.0) for name in commands]

    monkeypatch.setattr(everything, "main", run)
    monkeypatch.setattr(everything, "run_beside", beside)
    return calls


def test_all_runs_every_part_of_the_device_though_one_fails(called: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["all"]) == 1
    timed = ["throughput", "activation_cache", "sensitivity", "learning", "overhead", "callback_overhead"]
    assert list(called) == [*timed, "seqlen", "recipes", "tables"]
    assert "did not run to their end: overhead" in capsys.readouterr().err


def test_all_says_how_long_each_part_took(called: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["all", "--part", "seqlen"])
    assert list(called) == ["seqlen", "tables"]
    assert "seqlen               0 min  1 s\ntables" in capsys.readouterr().err


def test_results_in_another_folder_have_their_pages_there(called: Calls, tmp_path: Path) -> None:
    command.main(["all", "--output", str(tmp_path)])
    folder, docs = str(tmp_path), str(tmp_path / "docs")
    assert called["throughput"] == ["--output", folder, "--device", "cpu"]
    assert called["recipes"] == ["--output", folder, "--docs", f"{docs}/recipes.md"]
    assert called["learning"] == ["--output", f"{folder}/learning", "--resume", "--docs", docs]
    assert called["tables"] == ["--output", folder, "--docs", docs]


def test_finished_runs_are_kept_unless_asked_for_again(called: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["all"])
    assert "finished runs are kept. To measure again: --again, or --output DIR" in capsys.readouterr().err
    assert "--again" not in called["throughput"] and "--resume" in called["learning"]
    command.main(["all", "--again"])
    assert "finished runs are kept" not in capsys.readouterr().err
    assert all("--again" in called[name] for name in ("throughput", "seqlen", "sensitivity", "recipes", "overhead"))


def test_short_learning_runs_never_replace_the_published_ones(called: Calls, tmp_path: Path) -> None:
    command.main(["all", "--again"])
    quick = records.RESULTS / "learning-quick"
    assert called["learning"] == ["--output", str(quick), "--docs", str(quick / "docs")]
    command.main(["all", "--again", "--output", str(tmp_path)])
    assert called["learning"] == ["--output", str(tmp_path / "learning"), "--docs", str(tmp_path / "docs")]


def test_accelerator_that_is_not_there_is_one_clear_error(called: Calls) -> None:
    with pytest.raises(DeviceError, match="device 'cuda' is not available here"):
        command.main(["all", "--device", "cuda", "--smoke"])
    assert not called


def test_accelerator_runs_its_parts_with_their_time_limit(called: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(everything, "get_device", lambda name: None)
    command.main(["all", "--device", "cuda", "--minutes", "5"])
    assert list(called) == ["gpu", "tables"]
    assert called["gpu"][-4:] == ["--device", "cuda", "--minutes", "5.0"]


@pytest.mark.filterwarnings("ignore")
def test_all_with_tiny_sizes_runs_through(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The code of `--device cuda --smoke`, on CPU."""
    options = ["all", "--device", "cpu", "--smoke", "--output", str(tmp_path)]
    assert command.main([*options, "--part", "throughput", "--part", "seqlen"]) == 0
    assert re.search(r"^throughput +\d+ min", capfd.readouterr().err, re.MULTILINE)
    for kind, trainings in (("throughput", 2), ("growth", 1), ("seqlen", 1)):
        found = records.read_all(tmp_path, kind)
        assert [record["status"] for record in found] == ["finished"] * trainings


def test_tiny_sizes_leave_nothing_in_the_published_results(called: Calls) -> None:
    command.main(["all", "--smoke"])
    assert "learning" not in called and "tables" not in called
    assert not Path(called["throughput"][1]).exists() and Path(called["throughput"][1]) != records.RESULTS


def test_parts_side_by_side_report_their_own_end(tmp_path: Path) -> None:
    broken = tmp_path / "recipes.json"
    broken.write_text("{")
    commands = {"recipes": ["--output", str(tmp_path)], "paper": ["--output", str(tmp_path)]}
    outcomes = {outcome.name: outcome.succeeded for outcome in everything.run_beside(commands)}
    assert outcomes == {"recipes": False, "paper": True}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("wait_s", [0.0, 0.05, 1.0])
def test_interruption_ends_the_parts_side_by_side(tmp_path: Path, wait_s: float, number: signal.Signals) -> None:
    """At any moment: no part goes on measuring, or writing, after the command that started it has ended."""
    code = (
        "from dropbp.bench import everything\n"
        f"everything.run_beside({{'seqlen': ['--preset', 'llama2-7b-80gib', '--output', {str(tmp_path)!r}]}})"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stderr.readline() == "-- seqlen\n"
        time.sleep(wait_s)
        process.send_signal(number)
        assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
        assert process.returncode != 0
    assert not list((tmp_path / "seqlen").glob("*.json"))
    listed = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in listed.splitlines() if line.split()[0] == str(process.pid)]


def test_help_says_how_to_reproduce(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["all", "--help"])
    text = capsys.readouterr().out
    assert "--again" in text and "--output DIR" in text and "To reproduce them" in text


def test_recorded_options_are_plain_data(tmp_path: Path) -> None:
    """They go to other processes, as words."""
    args = argparse.Namespace(device="cuda", again=True, smoke=True, minutes=2.5, output=tmp_path, parts=None)
    for name in command.PARTS:
        options = everything.options_of(name, args, tmp_path)
        assert json.loads(json.dumps(options)) == options
