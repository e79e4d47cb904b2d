"""`dropbp bench gpu`: the whole plan with tiny models, stopped and continued, and what is said before and after."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from dropbp.bench import parts as command
from dropbp.bench.common import records
from dropbp.bench.gpu import command as gpu
from dropbp.bench.gpu.command import Ledger, missing, plan, to_do

from dropbp.errors import ConfigError

MOST_FILE_BYTES = 16 << 20


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    arguments = ["-m", "dropbp", "bench", "gpu", "--smoke", "--device", "cpu", "--output", str(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE, text=True, env=environment)


def figures(folder: Path) -> int:
    """How many figures the folder holds: steps, lengths, sizes, checked variants, of finished and unfinished runs."""
    count = 0
    for path in folder.rglob(records.FILES):
        record = json.loads(path.read_text())
        count += sum(map(len, record.get("steps", {}).values()))
        count += sum(len(record.get(key, ())) for key in ("lengths", "batch_sizes", "memory"))
        count += len(record.get("variants", ())) if record["kind"] == "invariants" else 0
    return count


def stop_after(process: subprocess.Popen[str], folder: Path, count: int, number: signal.Signals) -> int:
    """Send a signal once there are more figures than `count`; returns how many there are after the process' end."""
    end_s = time.monotonic() + 400
    while figures(folder) <= count and process.poll() is None:
        assert time.monotonic() < end_s
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=60)
    return figures(folder)


def left_behind(folder: Path) -> str:
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return "\n".join(line for line in listed.splitlines() if str(folder) in line)


@pytest.mark.timeout(1200)
def test_the_whole_plan_stopped_and_continued_twice(tmp_path: Path) -> None:
    """By a signal that can be handled and by one that cannot. No figure is lost, no process is left behind."""
    have = 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        have = stop_after(start(tmp_path), tmp_path, have + 4, number)
        assert have > 0 and not left_behind(tmp_path)
    with start(tmp_path, "--minutes", "18") as process:
        _, said = process.communicate(timeout=1100)
    items, ledger = plan(smoke=True), Ledger(tmp_path)
    able = [item for item in items if missing(item) is None]
    assert {ledger.status(item) for item in able} == {"finished"}, said
    assert process.returncode == 0 and to_do(items, ledger) == []
    assert figures(tmp_path) > have
    assert "continued" in "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) <= len(items) + 1 and max(path.stat().st_size for path in files) < MOST_FILE_BYTES
    assert {record["status"] for kind in KINDS for record in records.read_all(tmp_path, kind)} == {"finished"}
    for record in records.read_all(tmp_path, "throughput"):
        rounds = record["configuration"]["rounds"]
        assert {len(steps) for steps in record["steps"].values()} == {rounds}
        assert set(record["memory"]) == set(record["variants"]) and "bfloat16" in record["optimizer"]


KINDS = ("throughput", "growth", "seqlen", "invariants")


def test_parts_come_in_the_order_of_their_value_and_name_runs_that_exist() -> None:
    for smoke in (False, True):
        items = plan(smoke)
        assert [item.part for item in items] == sorted(item.part for item in items)
        assert len({item.name for item in items}) == len(items)
        for item in items:
            args = command.build_parser().parse_args([*item.command, "--device", "cuda", "--output", "DIR"])
            assert args.preset and args.only
    rehearsed = {(item.part, item.command[0], item.command[4]) for item in plan(True)}
    assert rehearsed == {(item.part, item.command[0], item.command[4]) for item in plan(False)}


def test_estimate_says_the_minutes_of_each_part_and_what_lacks_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "get_device", lambda name: None)
    monkeypatch.setattr(gpu, "missing", lambda item: item.package)
    assert command.main(["gpu", "--output", str(tmp_path), "--plan"]) == 0
    said = capsys.readouterr().err
    assert "(a) Llama-2-7B" in said and " min      throughput llama2-7b full-bf16 --no-growth" in said
    assert "no bitsandbytes" in said and "no liger_kernel" in said and "no flash_attn" in said
    assert not list(tmp_path.iterdir())
    assert 0 < sum(gpu.estimate_s(item, "cuda") for item in plan(False) if item.part == "a") < 600


def test_what_fails_comes_last_and_not_a_third_time(tmp_path: Path) -> None:
    items, ledger = plan(True), Ledger(tmp_path)
    ledger.note(items[0], "failed", 1.0, "no")
    ledger.note(items[1], "finished", 1.0)
    ledger.note(items[2], "begun", 1.0)
    again = Ledger(tmp_path)
    left = to_do(items, again)
    assert left[0] == items[2] and left[-1] == items[0] and items[1] not in left
    again.note(items[0], "failed", 1.0, "no")
    assert items[0] not in to_do(items, Ledger(tmp_path))
    assert Ledger(tmp_path).reason(items[0]) == "no" and Ledger(tmp_path).seconds(items[0]) == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--device", "cpu"], "rehearsed with tiny models: --smoke"), (["--minutes", "0"], "--minutes 0 must be above 0")],
)
def test_bad_arguments_are_named(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        command.main(["gpu", "--output", str(tmp_path), *options])


def test_an_item_whose_process_dies_does_not_keep_the_others_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying:
        asked: list[Any] = []  # noqa: RUF012 - of all workers

        def __init__(self, module: str, environment: Any) -> None:
            pass

        def ask(self, request: Any) -> None:
            self.asked.append(request)

        def answers(self, until_s: float, stop: Any) -> Any:
            yield None if len(self.asked) == 1 else {"status": 0, "error": None, "held_bytes": 0}

        def end(self) -> int:
            return -9

    monkeypatch.setattr(gpu, "Worker", Dying)
    args = argparse.Namespace(device="cpu", output=tmp_path)
    items, ledger = plan(True)[:3], Ledger(tmp_path)
    left = gpu.Work(items, ledger, args).until(time.monotonic() + 60)
    assert left == [items[0]] and len(Dying.asked) == 3
    assert [ledger.status(item) for item in items] == ["failed", "finished", "finished"]
