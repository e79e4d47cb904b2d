"""Runs that are stopped, run out of memory, or lack a package: what they measured stays, and says what it is."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from dropbp.bench.common import models, processes, records
from dropbp.bench.common.options import TimeLimit
from dropbp.bench.common.presets import SeqlenPreset, ThroughputPreset, Training
from dropbp.bench.common.setup import PLAIN, Variant
from dropbp.bench.memory import search, seqlen
from dropbp.bench.report import paper, tables
from dropbp.bench.report.derive import figures, grown, length_ratios
from dropbp.bench.throughput import command as throughput
from dropbp.bench.throughput import growth
from dropbp.bench.throughput.rounds import Bench

from dropbp.device import get_device
from dropbp.errors import ConfigError

TINY = "llama-4x64"
CPU = get_device("cpu")
FULL = Training("full", "fp32")
FITS, TOO_LONG = {"size": 64, "fits": True}, {"size": 96, "fits": False}


def arguments(part: Any, folder: Path, *options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    part.add_arguments(parser)
    return parser.parse_args(["--output", str(folder), *options])


# -- records


def stopped_run(store: records.Store, value: int, error: type[BaseException] | None = KeyboardInterrupt) -> None:
    with store.run("a run", {"size": 1}, CPU, goes_on=True) as record:
        record.setdefault("values", []).append(value)
        if error is not None:
            raise error


def test_a_stopped_run_goes_on_with_what_it_had(tmp_path: Path) -> None:
    store = records.Store(tmp_path, "throughput")
    for value in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            stopped_run(store, value)
    stopped_run(store, 3, None)
    record = store.finished("a run", {"size": 1})
    assert record is not None and record["values"] == [1, 2, 3] and len(record["continued"]) == 2
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a-run.json"]


def test_what_a_killed_process_saved_is_gone_on_with(tmp_path: Path) -> None:
    store = records.Store(tmp_path, "throughput")
    killed = records.new_record("throughput", "a run", {"size": 1}, CPU) | {"values": [1]}
    store.save(killed)
    stopped_run(store, 2, None)
    record = store.finished("a run", {"size": 1})
    assert record is not None and record["values"] == [1, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"configuration": {"size": 2}},
        {"versions": {"torch": "0"}},
        {"device": {"name": "cpu", "generation": "another one"}},
        {"status": "failed"},
    ],
)
def test_another_run_or_machine_and_what_failed_are_not_gone_on_with(tmp_path: Path, change: dict[str, Any]) -> None:
    store = records.Store(tmp_path, "throughput")
    store.save(records.new_record("throughput", "a run", {"size": 1}, CPU) | {"values": [1]} | change)
    stopped_run(store, 2, None)
    record = store.finished("a run", {"size": 1})
    assert record is not None and record["values"] == [2]


def test_what_was_stopped_before_the_run_was_finished_is_old(tmp_path: Path) -> None:
    store = records.Store(tmp_path, "throughput")
    old = records.new_record("throughput", "a run", {"size": 1}, CPU) | {"values": [1], "started": "2020-01-01"}
    store.save(old)
    with store.run("a run", {"size": 1}, CPU) as record:  # one that does not go on with others
        record["values"] = [2]
    stopped_run(store, 3, None)
    record = json.loads(store.path("a run").read_text())
    assert record["values"] == [3]


def test_versions_name_the_build_of_torch() -> None:
    assert records.versions()["torch"] == torch.__version__


# -- rounds


def test_rounds_of_a_stopped_run_are_kept_and_have_other_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = ThroughputPreset(TINY, (FULL,), (0.5,), 1, 16, 3, 1)
    step, done = Bench.step, []

    def stop_in_the_middle(self: Any, lane: Any, *rest: Any, **options: Any) -> Any:
        done.append(lane.variant.name)
        if len(done) == 4 * 3 + 2:  # a warm-up, memory, a round, and half of the next
            raise KeyboardInterrupt
        return step(self, lane, *rest, **options)

    monkeypatch.setattr(Bench, "step", stop_in_the_middle)
    args = arguments(throughput, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        throughput.run_preset("small", preset, args)
    (stopped,) = records.read_unfinished(tmp_path, "throughput")
    assert stopped["status"] == "cancelled" and set(stopped["memory"]) == set(stopped["variants"])
    first = stopped["steps"]["exact-0.5"]
    assert len(first) in (1, 2) and {len(steps) for steps in stopped["steps"].values()} == {len(first)}
    assert throughput.run_preset("small", preset, args) == 0
    (record,) = records.read_all(tmp_path, "throughput")
    assert record["steps"]["exact-0.5"][: len(first)] == first
    assert {len(steps) for steps in record["steps"].values()} == {3}
    rounds = [one["round"] for one in record["steps"]["plain"]]
    assert rounds == sorted(set(rounds))
    assert records.read_unfinished(tmp_path, "throughput") == []


def without_memory(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    step = Bench.step

    def steps(self: Any, lane: Any, *rest: Any, **options: Any) -> Any:
        if lane.variant.name in names:
            raise torch.OutOfMemoryError("no memory left")
        return step(self, lane, *rest, **options)

    monkeypatch.setattr(Bench, "step", steps)


@pytest.mark.parametrize("absent", ["plain", "exact-0.5"])
def test_a_variant_without_memory_leaves_the_others_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: str
) -> None:
    without_memory(monkeypatch, absent)
    preset = ThroughputPreset(TINY, (FULL,), (0.5, 0.875), 1, 16, 2, 1)
    assert throughput.run_preset("small", preset, arguments(throughput, tmp_path)) == 0
    (record,) = records.read_all(tmp_path, "throughput")
    assert [failure["variant"] for failure in record["failures"]] == [absent]
    shown = {figure.name: figure for figure in figures(record)}
    assert set(shown) == set(record["variants"]) - {absent}
    assert all((figure.ratio is None) == (absent == "plain") for figure in shown.values())
    assert tables.run(argparse.Namespace(output=tmp_path, docs=tmp_path / "docs")) == 0
    page = (tmp_path / "docs" / "results.md").read_text()
    assert f"finished. {absent} OutOfMemoryError: no memory left" in page and "| exact-0.875 |" in page


def test_a_run_none_of_whose_variants_has_memory_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["plain", *(f"{how}-0.5" for how in ("exact", "nested", "detach"))]
    without_memory(monkeypatch, *names)
    preset = ThroughputPreset(TINY, (FULL,), (0.5,), 1, 16, 1, 1)
    assert throughput.run_preset("small", preset, arguments(throughput, tmp_path)) == 1
    (failed,) = records.read_unfinished(tmp_path, "throughput")
    assert failed["status"] == "failed" and len(failed["failures"]) == len(names) + 1


def test_growth_runs_alone_and_a_micro_batch_that_fragments_memory_is_made_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Bench.step

    def steps(self: Any, lane: Any, *rest: Any, **options: Any) -> Any:
        if lane.variant.name == "exact-0.875" and options["ids_BS"].shape[0] >= largest[0]:
            largest[0] = options["ids_BS"].shape[0]
            raise torch.OutOfMemoryError("in fragments")
        return step(self, lane, *rest, **options)

    largest = [0]
    monkeypatch.setattr(Bench, "step", steps)
    preset = ThroughputPreset(TINY, (FULL,), (0.875,), 1, 24, 2, 1, (FULL,), 4.0, 2)
    assert throughput.run_preset("small", preset, arguments(throughput, tmp_path, "--growth-only")) == 0
    assert records.read_all(tmp_path, "throughput") == []
    (record,) = records.read_all(tmp_path, "growth")
    sizes, name = {key: found["batch_size"] for key, found in record["batch_sizes"].items()}, "exact-0.875"
    assert 0 < record["timed_sizes"][name] < sizes[name] and record["timed_sizes"]["plain"] == sizes["plain"]
    shown = {(row["how"], row["drop_rate"]): row for row in grown(record)}
    assert shown["exact", 0.875]["batch_size"] == record["timed_sizes"][name] and shown["exact", 0.875]["ratio"]


def test_on_an_accelerator_each_variant_has_the_memory_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[list[str]] = []

    class Alone(Bench):
        def __init__(self, preset: Any, training: Any, variants: Any, device: Any, record: Any) -> None:
            groups.append([variant.name for variant in variants])
            super().__init__(preset, training, variants, CPU, record)

    monkeypatch.setattr(growth, "Bench", Alone)
    preset = ThroughputPreset(TINY, (FULL,), (0.5,), 1, 16, growth_rounds=2)
    variants = [PLAIN, Variant("exact", 0.5), Variant("nested", 0.5)]
    record: dict[str, Any] = {"batch_sizes": {v.name: {"batch_size": n} for n, v in enumerate(variants, 1)}}
    card = cast(Any, types.SimpleNamespace(name="cuda"))
    growth._time_grown(record, preset, FULL, variants, card, TimeLimit(), lambda: None)
    assert groups == [["plain"], ["exact-0.5"], ["nested-0.5"]]
    assert {name: len(steps) for name, steps in record["steps"].items()} == {v.name: 2 for v in variants}


# -- searches


TRIED = SeqlenPreset(TINY, (FULL,), (0.5, 0.875), step=16, max_length=32)


def test_a_search_goes_on_with_what_was_tried_before() -> None:
    task = {"vary": "sequence_length", "fixed": 1, "step": 16, "most": 64, "accumulated": True}
    known, noted = [{"size": 16, "fits": True}, {"size": 48, "fits": False}, {"ended_after_s": 1.0}], []
    found, asked = search.tried_in_a_process(
        TINY, FULL, PLAIN, "cpu", task, known=known, note=lambda size, entries: noted.append((size, len(entries)))
    )
    assert found == 32 and asked == [*known[:2], {"size": 32, "fits": True}] and noted == [(32, 3)]
    assert search.is_border(asked)


def lengths(**asked: list[dict[str, Any]]) -> dict[str, Any]:
    entries = {
        name: {"length": max((one["size"] for one in found if one.get("fits")), default=0), "asked": found}
        for name, found in asked.items()
    }
    return {"lengths": {name.replace("_", "-").replace("-5", "-0.5"): entry for name, entry in entries.items()}}


def test_a_border_that_was_cut_short_is_said_to_be_at_least_that() -> None:
    cut = [FITS, {"ended_after_s": 3.0}]
    whole = length_ratios(lengths(plain=[FITS, TOO_LONG], exact_5=[*cut]))
    assert whole[0.0] == (64, 1.0, False) and whole[0.5] == (64, 1.0, True)
    assert tables._length_cell(whole[0.5]._replace(ratio=2.0)) == "≥ 64 (2.00x)"
    unknown = length_ratios(lengths(plain=cut, exact_5=[FITS, TOO_LONG]))
    assert unknown[0.5] == (64, None, False), "a ratio to what is no border would say too much"
    assert 0.5 not in length_ratios(lengths(plain=[FITS, TOO_LONG], exact_5=[{"ended_after_s": 3.0}]))
    run = lengths(plain=[FITS, TOO_LONG], exact_5=cut) | {"configuration": {}}
    run["lengths"]["exact-0.875"] = run["lengths"]["exact-0.5"]
    assert paper._cut_short(run)


def test_lengths_can_be_narrowed_to_a_training_to_rates_and_to_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(seqlen.SEQLEN, "small", TRIED)  # type: ignore[index]
    monkeypatch.setattr(search, "tried_in_a_process", lambda *given: (32, [FITS, TOO_LONG]))
    options = ["--preset", "rehearsal", "--only", "full-bf16", "--drop-rates", "0.875", "--masks", "exact"]
    assert seqlen.run(arguments(seqlen, tmp_path, *options)) == 0
    (record,) = records.read_all(tmp_path, "seqlen")
    assert set(record["lengths"]) == {"plain", "exact-0.875"} and record["name"].endswith("full-bf16--p0.875--exact")
    with pytest.raises(ConfigError, match="--only 'half' is not in the preset; it has full-bf16"):
        seqlen.run(arguments(seqlen, tmp_path, "--preset", "rehearsal", "--only", "half"))
    with pytest.raises(ConfigError, match=r"--drop-rates 1 must be above 0 and below 1"):
        seqlen.run(arguments(seqlen, tmp_path, "--preset", "rehearsal", "--drop-rates", "1"))


@pytest.mark.parametrize("part", [seqlen, throughput])
def test_without_bitsandbytes_qlora_is_not_run_and_nothing_is_filed(
    part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert part.run(arguments(part, tmp_path, "--preset", "rehearsal", "--only", "qlora-bf16")) == 1
    assert "qlora needs bitsandbytes, which is not installed" in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_kernels_that_are_not_installed_or_not_known_are_named() -> None:
    with pytest.raises(ConfigError, match="kernels is 'fast'; allowed: torch, or of liger, flash"):
        models.check_training(Training(kernels="fast"))
    assert "kernels" not in Training().configuration() and Training(kernels="liger").configuration()["kernels"]
    assert Training("full", kernels="flash").name == "full-bf16-flash"


# -- processes


def test_a_process_imports_what_its_parent_imports_wherever_it_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dropbp").mkdir()
    (tmp_path / "dropbp" / "__init__.py").write_text("raise ImportError('the one of the working directory')")
    monkeypatch.chdir(tmp_path)
    task = {"vary": "sequence_length", "fixed": 1, "step": 16, "most": 16, "accumulated": True}
    found, asked = search.tried_in_a_process(TINY, FULL, Variant("nested", 0.5), "cpu", task)
    assert found == 16, asked


ORPHAN = """
import sys, time
from dropbp.bench.common.processes import Worker
worker = Worker({module!r})
print("started", flush=True)
time.sleep(600)
"""


def test_a_process_ends_with_the_one_that_started_it_though_that_is_killed(tmp_path: Path) -> None:
    marker = f"module_{os.getpid()}_{random.randrange(10**9)}"
    (tmp_path / f"{marker}.py").write_text(
        "from dropbp.bench.common.processes import requests\nfor request in requests():\n    pass\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN.format(module=marker)], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "started\n"
        parent.kill()
    end_s = time.monotonic() + 60
    while marker in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout:
        assert time.monotonic() < end_s, "left behind"
        time.sleep(0.1)


def test_a_signal_is_noted_and_not_raised_wherever_it_strikes() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with processes.stoppable() as stop:
        assert not stop()
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop() and stop.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
