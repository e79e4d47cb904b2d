"""The learning bench: fair comparisons, files that are kept and resumed, tables from the files alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from dropbp.bench.common import corpus, small
from dropbp.bench.common.records import SCHEMA, Record, read_folder
from dropbp.bench.learning import command as learning
from dropbp.bench.learning import curves, presets, tables, tasks

import dropbp


def run_record(method: str = "plain", drop_rate: float = 0.0, seed: int = 0, rate: float = 1e-3, **more: Any) -> Record:
    """A run of 10 plain steps whose loss falls from 3 to 2 (or to `last`) in the time of plain training."""
    last = more.pop("last", 2.0)
    points = [
        {"step": 2.5 * i, "time": 2.5 * i, "flops": 100.0 * i, "loss": 3 - (3 - last) * i / 4} for i in range(1, 5)
    ]
    config = {"task": "python", "method": method, "drop_rate": drop_rate, "learning_rate": rate, "seed": seed}
    return {
        "schema": SCHEMA,
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
    return {"schema": SCHEMA, "kind": kind, "config": {"task": "python"}, "rows": rows}


# -- the base


def test_another_base_gets_another_place_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base = small.Base()
    assert small.base_folder(base, "x").parent == tmp_path / "dropbp"
    assert small.base_folder(base, "x") == small.base_folder(small.Base(), "x")
    assert len({small.base_folder(b, d) for b in (base, replace(base, seed=1)) for d in "xy"}) == 4


def test_a_new_model_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    small.new_model(small.Base(layers=1, width=32, heads=2))
    assert torch.equal(before, torch.get_rng_state())


def test_corpora_are_long_enough_and_of_different_kinds() -> None:
    code, prose = corpus.source_code(50_000), corpus.english_prose(50_000)
    assert len(code.encode()) == len(prose.encode()) == 50_000
    assert code.count("def ") > 5 * prose.count("def ")
    assert corpus.digest(code) != corpus.digest(prose)


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
    base = {place.parts for place in corpus.python_files(lambda top: top not in tasks.HELD_OUT)}
    gentle = {place.parts for place in corpus.python_files(lambda top: top in tasks.HELD_OUT)}
    assert base and gentle and not base & gentle


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(dropbp.DropBPError, match="'chess' is unknown; known are python"):
        tasks.task("chess")


# -- comparisons


def test_a_curve_is_read_between_its_evaluations_and_not_beyond_its_end() -> None:
    record = run_record()
    assert curves.loss_at(record, "time", 10) == pytest.approx(2)
    assert curves.loss_at(record, "time", 3.75) == pytest.approx(2.625)
    assert curves.loss_at(record, "flops", 300) == pytest.approx(2.25)
    assert curves.loss_at(record, "time", 0.1) == pytest.approx(2.75)
    assert curves.loss_at(record, "time", 12) is None
    assert curves.loss_at({**record, "evaluations": []}, "time", 1) is None


def test_the_best_learning_rate_is_chosen_on_the_first_seed_alone() -> None:
    records = [run_record(rate=1.0, last=2.0), run_record(rate=2.0, last=1.9), run_record(rate=1.0, seed=1, last=1.0)]
    assert curves.best_rates(records) == {("python", "plain", 0.0): 2.0}


def test_a_diverged_or_failed_run_is_never_the_best() -> None:
    failed = run_record(rate=2.0) | {"status": "failed", "evaluations": []}
    diverged = run_record(rate=3.0, last=math.nan)
    assert curves.best_rates([failed, diverged, run_record(rate=1.0)]) == {("python", "plain", 0.0): 1.0}


PRESET = presets.Preset(
    ("python",), ("published",), (0.5,), (0, 1, 2), 10, 1, others=(("lora", 0.0),), once=(("lisa", 0.5),)
)


def records_of(runs: list[presets.Run], best: float) -> list[Record]:
    """Runs whose loss is the less the nearer their learning rate is to the best one."""
    last = [1 + abs(math.log(run.learning_rate / best)) / 10 for run in runs]
    return [
        run_record(run.method, run.drop_rate, run.seed, run.learning_rate, last=loss)
        for run, loss in zip(runs, last, strict=True)
    ]


def test_further_seeds_run_at_the_best_rate_and_some_methods_with_one_seed_only() -> None:
    firsts = presets.first_runs(PRESET)
    rates = {m: presets.rates_for(tasks.task("python"), m) for m in ("plain", "published", "lora", "lisa")}
    assert {(r.method, r.learning_rate) for r in firsts} == {(m, rate) for m in rates for rate in rates[m]}
    further = presets.further_runs(PRESET, records_of(firsts, best=1.0))
    assert {(r.method, r.seed, r.learning_rate) for r in further} == {
        (m, seed, max(rates[m])) for m in ("plain", "published", "lora") for seed in (1, 2)
    }


@pytest.mark.parametrize("best", [6e-3, 6e-5, 3e-4])
def test_learning_rates_are_tried_until_the_best_lies_between_others(best: float) -> None:
    runs = presets.first_runs(PRESET)
    while wider := presets.wider_runs(PRESET, records_of(runs, best)):
        assert not {(run.name) for run in wider} & {run.name for run in runs}
        runs += wider
    found = curves.best_rates(records_of(runs, best))
    tried = curves.tried_rates(records_of(runs, best), 0)
    assert found.keys() == tried.keys() and len(found) == 4
    for key, rates in tried.items():
        assert rates[0] < found[key] < rates[-1]
        assert found[key] == min(rates, key=lambda rate: abs(math.log(rate / best)))


def test_no_more_learning_rates_are_tried_than_the_preset_allows() -> None:
    runs = presets.first_runs(PRESET)
    while wider := presets.wider_runs(PRESET, records_of(runs, 1e9)):
        runs += wider
    assert {len(r) for r in curves.tried_rates(records_of(runs, 1e9), 0).values()} == {PRESET.most_rates}


def test_lora_is_no_rival_where_it_is_the_setting() -> None:
    names = {name for name, _ in presets.variants(PRESET, tasks.task("prose-lora"))}
    assert names == {"plain", "published"}


def test_tasks_that_a_preset_does_not_have_are_refused() -> None:
    assert presets.chosen_tasks(PRESET, None) == ("python",)
    with pytest.raises(dropbp.DropBPError, match="no task 'prose'; it has python"):
        presets.chosen_tasks(PRESET, ["prose"])


def test_time_to_a_loss_is_read_off_the_curve() -> None:
    record = run_record()  # 2.75 after 2.5 steps, 2.5 after 5, 2.25 after 7.5, 2 after 10
    assert curves.time_to(record, 2.5) == pytest.approx(5)
    assert curves.time_to(record, 2.375) == pytest.approx(6.25)
    assert curves.time_to(record, 2.9) == 2.5
    assert curves.time_to(record, 1.9) is None
    record["evaluations"][2]["loss"] = None
    assert curves.time_to(record, 2.25) == pytest.approx(7.5)


def test_time_to_the_loss_of_plain_training_stands_in_the_table() -> None:
    records = [run_record(), run_record("published", 0.5, last=1.0), run_record("lisa", 0.5, last=2.5)]
    spare = {("plain", 0.0, False): 1.0, ("published", 0.5, False): 1.0, ("lisa", 0.5, False): 1.0}
    made = tables.entries([*records, times_record(spare)])
    cells = {entry.method: tables._time_to_plain(entry, made) for entry in made}
    assert cells == {"plain": "-", "published": "0.50", "lisa": "never"}


def test_step_ratio_is_over_plain_and_says_what_was_not_measured() -> None:
    times = times_record({("plain", 0.0, False): 2.0, ("exact", 0.5, False): 1.0})
    assert curves.step_ratio([times], "exact", 0.5) == 0.5
    with pytest.raises(dropbp.DropBPError, match=r"No step times of 'lisa' at drop rate 0\.5 are"):
        curves.step_ratio([times], "lisa", 0.5)


def test_short_of_memory_what_does_not_fit_is_checkpointed() -> None:
    spare = {("plain", 0.0, False): 1.0, ("freezing", 0.5, False): 1.0, ("nested shelf", 0.5, False): 1.0}
    short = {("plain", 0.0, False): 1.0, ("plain", 0.0, True): 4 / 3, ("nested shelf capped", 0.5, False): 4 / 3}
    records = [run_record(), run_record("freezing", 0.5), run_record("nested shelf", 0.5)]
    records += [times_record(spare, {"freezing": 0.5}), times_record(short, kind=curves.SHORT_OF_MEMORY)]
    plain, freezing, nested = tables.entries(records)
    assert plain.losses_short_of_memory() == {0: pytest.approx(2.25)}
    assert freezing.losses_short_of_memory() == {0: pytest.approx(2)}
    assert nested.losses_short_of_memory() == {0: pytest.approx(2.25)}


def test_the_ratio_measured_last_says_where_equal_time_is() -> None:
    records = [run_record("freezing", 0.5), times_record({("plain", 0.0, False): 1.0, ("freezing", 0.5, False): 2.0})]
    (entry,) = tables.entries(records)
    assert entry.losses("time") == {0: pytest.approx(2.5)}  # 5 steps, not 10


def test_differences_are_taken_seed_by_seed() -> None:
    assert tables.paired({0: 1.0, 1: 3.0}, {0: 1.5, 1: 3.5, 2: 9.0}) == "-0.500 ± 0.000"
    assert tables.paired({0: 1.0}, {}) == "-"


def test_tables_stand_between_their_markers_and_leave_the_rest(tmp_path: Path) -> None:
    page = tmp_path / "learning.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n", encoding="utf-8")
    tables.write([run_record(), times_record({("plain", 0.0, False): 1.0})], tmp_path)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| plain | - | 0.001 | 1.00 | 1.00 | 2.000 | 2.250 | 2.000 | - | - | - |" in text
    assert (tmp_path / "img" / "learning.png").stat().st_size > 1000


def test_tables_of_nothing_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(dropbp.DropBPError, match="no finished run"):
        tables.write([], tmp_path)


# -- runs and their files


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> presets.Preset:
    """A preset of seconds: a base that was hardly trained, kept in a cache of its own."""
    base = small.Base(layers=2, width=32, heads=2, sequence_length=16, batch_size=2, steps=2, corpus_bytes=50_000)
    monkeypatch.setattr(tasks, "BASE", base)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return presets.Preset(("c-accumulated",), ("freezing", "nested shelf"), (0.5,), (0, 1), 3, 2, most_rates=2)


def test_a_preset_runs_resumes_and_keeps_failures(
    tiny: presets.Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_a_cancelled_run_is_kept_as_such(tiny: presets.Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    spare = {("plain", 0.0, False): 1.0, ("freezing", 0.5, False): 1.0, ("nested shelf", 0.5, False): 1.0}
    monkeypatch.setattr(learning, "step_times", lambda *_: times_record(spare))
    monkeypatch.setattr(learning, "Trainer", interrupted)
    with pytest.raises(KeyboardInterrupt, match="--resume continues"):
        learning.run_preset(tiny, tmp_path, resume=True)
    statuses = [r["status"] for r in read_folder(tmp_path) if r["kind"] == "run"]
    assert statuses == ["cancelled"]


def test_the_same_seed_gives_the_same_run_and_touches_no_global_state(tiny: presets.Preset) -> None:
    run = presets.Run("c-accumulated", "published", 0.5, 1e-3, 0, 3)
    before = torch.random.get_rng_state()
    first, again = (learning.train(run, 0.7) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first["losses"] == again["losses"] and len(first["losses"]) >= 5


def test_lora_beside_full_fine_tuning_has_the_flops_of_full_fine_tuning(tiny: presets.Preset) -> None:
    plain, lora = (
        learning.Trainer(presets.Run("c-accumulated", method, 0.0, 1e-3, 0, 3)) for method in ("plain", "lora")
    )
    windows = [torch.zeros(4, 16, dtype=torch.long)] * 2
    plain.step(windows)
    lora.step(windows)
    assert lora.plain_step_flops == plain.plain_step_flops == pytest.approx(plain.flops)
    assert lora.flops < plain.flops


def test_a_step_that_leaves_out_every_block_of_adapters_trains_nothing(tiny: presets.Preset) -> None:
    trainer = learning.Trainer(presets.Run("prose-lora", "layerdrop", 0.5, 1e-3, 0, 3))
    trainer.method.keep_rates = lambda: [0.0] * len(trainer.method.skips)  # type: ignore[attr-defined]
    before = [p.detach().clone() for p in trainer.trained]
    assert trainer.step([torch.zeros(2, 16, dtype=torch.long)]) > 0
    assert trainer.steps == 1 and all(torch.equal(a, b) for a, b in zip(before, trainer.trained, strict=True))


def test_what_needs_more_memory_is_timed_with_checkpointing_too(
    tiny: presets.Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[int, list[curves.Variant]] = {}

    def step_times(task: str, variants: list[curves.Variant], rounds: int) -> Record:
        asked[len(asked)] = variants
        saved = {"plain": 1.0, "freezing": 0.5, "nested shelf": 1.0, "lisa": 0.8}
        record = times_record(dict.fromkeys(variants, 1.0), saved)
        return record | {"config": {"task": task}}

    monkeypatch.setattr(learning, "step_times", step_times)
    preset = presets.Preset(("c-accumulated",), tiny.methods, (0.5,), (0,), 3, 2, others=(("lisa", 0.5),))
    learning._measured_times(preset, "c-accumulated", tmp_path, resume=True)
    assert set(asked[0]) == {(name, rate, False) for name, rate in presets.variants(preset, tasks.task("python"))}
    assert set(asked[1]) == {
        ("plain", 0.0, False),
        ("plain", 0.0, True),
        ("nested shelf capped", 0.5, False),
        ("lisa", 0.5, True),
    }


def test_a_run_that_ends_before_plain_training_by_newer_step_times_is_run_anew(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run_record("freezing", 0.5)))  # 10 steps
    assert learning._is_finished(path, 1.0)
    assert not learning._is_finished(path, 0.5)
    assert not learning._is_finished(tmp_path / "none.json", 1.0)
