"""The learning bench: fair comparisons, files that are kept and resumed, tables from the files alone."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from dropbp.bench import learning, learning_tables, tasks

import dropbp

Record = dict[str, Any]


def run_record(method: str = "plain", drop_rate: float = 0.0, seed: int = 0, rate: float = 1e-3, **more: Any) -> Record:
    """A run of 10 plain steps whose loss falls from 3 to 2 (or to `last`) in the time of plain training."""
    last = more.pop("last", 2.0)
    points = [
        {"step": 2.5 * i, "time": 2.5 * i, "flops": 100.0 * i, "loss": 3 - (3 - last) * i / 4} for i in range(1, 5)
    ]
    config = {"task": "python", "method": method, "drop_rate": drop_rate, "learning_rate": rate, "seed": seed}
    return {
        "kind": "run",
        "status": "finished",
        "config": {**config, "plain_steps": 10},
        "flops_budget": 300.0,
        "evaluations": points,
        **more,
    }


def times_record(
    ratios: dict[tuple[str, float, bool], float], saved: dict[str, float] | None = None, kind: str = "step times"
) -> Record:
    rows = [
        {"method": m, "drop_rate": p, "checkpointing": c, "cpu_s": [r, r], "saved_mib": [(saved or {}).get(m, 1.0)]}
        for (m, p, c), r in ratios.items()
    ]
    return {"kind": kind, "config": {"task": "python"}, "rows": rows}


# -- tasks


@pytest.mark.parametrize("name", tasks.TASKS)
def test_training_and_validation_text_do_not_overlap(name: str) -> None:
    split = tasks.split(tasks.task(name))
    assert len(split.train) > 100_000
    text = bytes(split.train.to(torch.uint8).tolist())
    windows = [bytes(window.to(torch.uint8).tolist()) for window in split.validation]
    assert len(windows) == tasks.VALIDATION_WINDOWS
    assert sum(window in text for window in windows) <= len(windows) // 10  # texts repeat themselves a little


def test_batches_depend_on_the_seed_alone_and_micro_batches_make_up_the_batch() -> None:
    task = tasks.task("c-accumulated")
    split = tasks.split(task)
    first, again, other = (list(islice(tasks.batches(split, task, seed), 3)) for seed in (0, 0, 1))
    assert all(torch.equal(torch.cat(a), torch.cat(b)) for a, b in zip(first, again, strict=True))
    assert not torch.equal(torch.cat(first[0]), torch.cat(other[0]))
    assert [len(batch) for batch in first] == [task.micro_batches] * 3
    assert torch.cat(first[0]).shape == (task.batch_size, tasks.BASE.sequence_length)


def test_the_base_has_not_seen_the_gentle_shift() -> None:
    base = {place.parts for place in tasks.python_files(lambda top: top not in tasks.HELD_OUT)}
    gentle = {place.parts for place in tasks.python_files(lambda top: top in tasks.HELD_OUT)}
    assert base and gentle and not base & gentle


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(dropbp.DropBPError, match="'chess' is unknown; known are python"):
        tasks.task("chess")


# -- comparisons


def test_a_curve_is_read_between_its_evaluations_and_not_beyond_its_end() -> None:
    record = run_record()
    assert learning.loss_at(record, "time", 10) == pytest.approx(2)
    assert learning.loss_at(record, "time", 3.75) == pytest.approx(2.625)
    assert learning.loss_at(record, "flops", 300) == pytest.approx(2.25)
    assert learning.loss_at(record, "time", 0.1) == pytest.approx(2.75)
    assert learning.loss_at(record, "time", 12) is None
    assert learning.loss_at({**record, "evaluations": []}, "time", 1) is None


def test_the_best_learning_rate_is_chosen_on_the_first_seed_alone() -> None:
    records = [run_record(rate=1.0, last=2.0), run_record(rate=2.0, last=1.9), run_record(rate=1.0, seed=1, last=1.0)]
    assert learning.best_rates(records) == {("python", "plain", 0.0): 2.0}


def test_a_diverged_or_failed_run_is_never_the_best() -> None:
    failed = run_record(rate=2.0) | {"status": "failed", "evaluations": []}
    diverged = run_record(rate=3.0, last=math.nan)
    assert learning.best_rates([failed, diverged, run_record(rate=1.0)]) == {("python", "plain", 0.0): 1.0}


def test_further_seeds_run_at_the_best_rate_and_reference_runs_once() -> None:
    preset = learning.Preset(("python",), ("published",), (0.5,), (0, 1, 2), 10, 1, once=(("lisa", 0.5),))
    firsts = learning.first_runs(preset, learning.variants) + learning.first_runs(preset, learning.rivals_run_once)
    rates = tasks.task("python").learning_rates
    assert {(r.method, r.learning_rate) for r in firsts} == {
        (m, rate) for m in ("plain", "published", "lisa") for rate in rates
    }
    records = [run_record(r.method, r.drop_rate, rate=r.learning_rate, last=2 - r.learning_rate) for r in firsts]
    further = learning.further_runs(preset, records)
    assert {(r.method, r.seed, r.learning_rate) for r in further} == {
        (m, seed, max(rates)) for m in ("plain", "published") for seed in (1, 2)
    }


def test_step_ratio_is_over_plain_and_says_what_was_not_measured() -> None:
    times = times_record({("plain", 0.0, False): 2.0, ("exact", 0.5, False): 1.0})
    assert learning.step_ratio([times], "exact", 0.5) == 0.5
    with pytest.raises(dropbp.DropBPError, match=r"No step times of 'lisa' at drop rate 0\.5 are"):
        learning.step_ratio([times], "lisa", 0.5)


def test_short_of_memory_what_does_not_fit_is_checkpointed() -> None:
    spare = {("plain", 0.0, False): 1.0, ("freezing", 0.5, False): 1.0, ("nested shelf", 0.5, False): 1.0}
    short = {("plain", 0.0, False): 1.0, ("plain", 0.0, True): 4 / 3, ("nested shelf capped", 0.5, False): 4 / 3}
    records = [run_record(), run_record("freezing", 0.5), run_record("nested shelf", 0.5)]
    records += [times_record(spare, {"freezing": 0.5}), times_record(short, kind=learning.SHORT_OF_MEMORY)]
    plain, freezing, nested = learning_tables.entries(records)
    assert plain.losses_short_of_memory() == {0: pytest.approx(2.25)}
    assert freezing.losses_short_of_memory() == {0: pytest.approx(2)}
    assert nested.losses_short_of_memory() == {0: pytest.approx(2.25)}


def test_the_ratio_measured_last_says_where_equal_time_is() -> None:
    records = [run_record("freezing", 0.5), times_record({("plain", 0.0, False): 1.0, ("freezing", 0.5, False): 2.0})]
    (entry,) = learning_tables.entries(records)
    assert entry.losses("time") == {0: pytest.approx(2.5)}  # 5 steps, not 10


def test_differences_are_taken_seed_by_seed() -> None:
    assert learning_tables.paired({0: 1.0, 1: 3.0}, {0: 1.5, 1: 3.5, 2: 9.0}) == "-0.500 ± 0.000"
    assert learning_tables.paired({0: 1.0}, {}) == "-"


def test_tables_stand_between_their_markers_and_leave_the_rest(tmp_path: Path) -> None:
    page = tmp_path / "learning.md"
    page.write_text(f"before\n{learning_tables.BEGIN}\nold\n{learning_tables.END}\nafter\n", encoding="utf-8")
    learning_tables.write([run_record(), times_record({("plain", 0.0, False): 1.0})], tmp_path)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| plain | - | 0.001 | 1.00 | 1.00 | 2.250 | 2.000 | - | - |" in text
    assert (tmp_path / "img" / "learning.png").stat().st_size > 1000


def test_tables_of_nothing_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(dropbp.DropBPError, match="no finished run"):
        learning_tables.write([], tmp_path)


# -- runs and their files


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> learning.Preset:
    """A preset of seconds: a base that was hardly trained, kept in a cache of its own."""
    base = tasks.Base(layers=2, width=32, heads=2, sequence_length=16, batch_size=2, steps=2, corpus_bytes=50_000)
    monkeypatch.setattr(tasks, "BASE", base)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return learning.Preset(("c-accumulated",), ("freezing", "nested shelf"), (0.5,), (0, 1), 3, 2)


def test_a_preset_runs_resumes_and_keeps_failures(
    tiny: learning.Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "results"
    learning.run_preset(tiny, folder, resume=True)
    runs = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(runs) == 2 + 3 * 2 + 3
    record = json.loads((folder / "c-accumulated--plain--p0--lr0.0015--seed0.json").read_text())
    assert record["status"] == "finished" and len(record["losses"]) == len(record["step_s"]) == 3
    assert record["versions"]["torch"] and record["device"]["threads"] and record["config"]["base"]["layers"] == 2
    assert record["evaluations"][-1]["flops"] == pytest.approx(record["flops_budget"])
    (broken,) = folder.glob("*freezing*seed1.json")
    broken.unlink()
    monkeypatch.setattr(learning, "Trainer", failing)
    learning.run_preset(tiny, folder, resume=True)
    failed = json.loads(broken.read_text())
    assert failed["status"] == "failed" and "no more memory" in failed["error"]
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p != broken}.items() <= runs.items()


def failing(*_: object) -> None:
    raise RuntimeError("no more memory")


def test_a_cancelled_run_is_kept_as_such(
    tiny: learning.Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(learning, "step_times", lambda *_: times_record({("plain", 0.0, False): 1.0}))
    monkeypatch.setattr(learning, "Trainer", interrupted)
    with pytest.raises(KeyboardInterrupt, match="--resume goes on"):
        learning.run_preset(tiny, tmp_path, resume=True)
    statuses = [r["status"] for r in learning.read(tmp_path) if r["kind"] == "run"]
    assert statuses == ["cancelled"]


def test_the_same_seed_gives_the_same_run_and_touches_no_global_state(tiny: learning.Preset) -> None:
    run = learning.Run("c-accumulated", "published", 0.5, 1e-3, 0, 3)
    before = torch.random.get_rng_state()
    first, again = (learning.train(run, 0.7) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first["losses"] == again["losses"] and len(first["losses"]) >= 5


def test_a_run_that_ends_before_plain_training_by_newer_step_times_is_run_anew(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run_record("freezing", 0.5)))  # 10 steps
    assert learning._is_finished(path, 1.0)
    assert not learning._is_finished(path, 0.5)
    assert not learning._is_finished(tmp_path / "none.json", 1.0)
