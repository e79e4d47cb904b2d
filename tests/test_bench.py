"""The harness's logic: records, resume, limits, models, tables. No time decides anything here."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from dropbp.bench import parts as command
from dropbp.bench.common import presets, records
from dropbp.bench.common.models import build_model
from dropbp.bench.common.presets import MODELS, SeqlenPreset, ThroughputPreset, Training
from dropbp.bench.common.setup import PLAIN, Lane, Variant, build_batch, build_optimizer, loss_of
from dropbp.bench.learning import accuracy
from dropbp.bench.memory import seqlen
from dropbp.bench.memory.probe import Probe, Workplace, is_out_of_memory
from dropbp.bench.memory.search import is_border, tried_in_a_process
from dropbp.bench.report import paper, tables
from dropbp.bench.report.derive import backward_shares, figures, length_ratios, parts_of, share_error
from dropbp.bench.report.limits import Parts, limit_s, median_spread, share_of_possible_saving
from dropbp.bench.throughput import command as throughput
from dropbp.bench.throughput import rounds

import dropbp
from dropbp.device import get_device
from dropbp.errors import ConfigError, DropBPError, MissingDependencyError
from dropbp.memory import track_tensor_bytes

TINY = "llama-4x64"
CPU = get_device("cpu")


# -- limits


PARTS = Parts(forward_s=1.0, unrecorded_forward_s=0.8, blocks_backward_s=1.6, rest_backward_s=0.4)


def test_limit_is_forward_with_unrecorded_share_plus_kept_blocks_backward_plus_rest() -> None:
    assert PARTS.step_s == 3.0
    assert limit_s(PARTS, 0) == pytest.approx(3.0)
    assert limit_s(PARTS, 0.5) == pytest.approx(0.9 + 0.8 + 0.4)
    assert limit_s(PARTS, 0.875) == pytest.approx(0.825 + 0.2 + 0.4)


def test_unrecorded_forward_slower_than_recorded_does_not_raise_the_limit() -> None:
    noisy = Parts(1.0, 1.5, 1.6, 0.4)
    assert limit_s(noisy, 0.5) == pytest.approx(1.0 + 0.8 + 0.4)


def test_share_of_possible_saving() -> None:
    assert share_of_possible_saving(3.0, 2.0, 2.0) == 1.0
    assert share_of_possible_saving(3.0, 3.0, 2.0) == 0.0
    assert share_of_possible_saving(3.0, 2.5, 2.0) == 0.5
    assert share_of_possible_saving(3.0, 2.5, 3.0) is None


def test_median_spread_of_one_value_is_that_value() -> None:
    assert median_spread([2.0]) == (2.0, 2.0, 2.0)
    assert median_spread([1.0, 2.0, 3.0]) == (1.5, 2.0, 2.5)


# -- records


def run_once(store: records.Store, error: BaseException | None = None) -> None:
    with store.run("a run", {"size": (1, 2)}, CPU) as record:
        record["steps"] = [1.5]
        if error is not None:
            raise error


def test_finished_run_is_found_again_by_name_and_configuration(tmp_path: Path) -> None:
    store = records.Store(tmp_path, "throughput")
    assert store.finished("a run", {"size": (1, 2)}) is None
    run_once(store)
    record = store.finished("a run", {"size": (1, 2)})
    assert record is not None
    assert record["status"] == "finished" and record["steps"] == [1.5]
    assert record["versions"]["torch"] == torch.__version__ and record["device"]["name"] == "cpu"
    assert store.finished("a run", {"size": (1, 3)}) is None
    assert store.finished("another run", {"size": (1, 2)}) is None


def test_a_file_that_another_process_is_writing_is_not_read(tmp_path: Path) -> None:
    store = records.Store(tmp_path, "throughput")
    run_once(store)
    (store.folder / ".another-0123.json").write_text('{"schema": 1, "status"')
    assert [record["name"] for record in records.read_all(tmp_path, "throughput")] == ["a run"]


def test_a_run_of_more_rounds_than_asked_for_counts_as_finished(tmp_path: Path) -> None:
    store = records.Store(tmp_path, "throughput")
    with store.run("a run", {"size": 1, "rounds": 7}, CPU):
        pass
    assert store.finished("a run", {"size": 1, "rounds": 7}) == store.finished("a run", {"size": 1, "rounds": 5})
    assert store.finished("a run", {"size": 1, "rounds": 7}) is not None
    assert store.finished("a run", {"size": 1, "rounds": 8}) is None
    assert store.finished("a run", {"size": 2, "rounds": 5}) is None
    assert store.finished("a run", {"size": 1}) is None


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("out of luck"), "failed"), (KeyboardInterrupt(), "cancelled")]
)
def test_unfinished_run_is_kept_apart_with_what_it_had(tmp_path: Path, error: BaseException, status: str) -> None:
    store = records.Store(tmp_path, "throughput")
    with pytest.raises(type(error)):
        run_once(store, error)
    (record,) = records.read_unfinished(tmp_path, "throughput")
    assert record["status"] == status and record["steps"] == [1.5]
    assert records.read_all(tmp_path, "throughput") == []
    assert store.finished("a run", {"size": (1, 2)}) is None


def test_failure_is_recorded_without_a_path_of_the_machine(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run_once(records.Store(tmp_path, "throughput"), RuntimeError("out of luck"))
    (record,) = records.read_unfinished(tmp_path, "throughput")
    assert record["failures"] == [{"type": "RuntimeError", "message": "out of luck", "where": "test_bench.py:run_once"}]


@pytest.mark.parametrize("text", ["{", "[]", '{"name": 1}', '{"schema": 99}'])
def test_damaged_or_foreign_file_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.json .*Delete it"):
        records.read(path)


# -- models


@pytest.mark.parametrize(
    ("name", "billions"), [("llama2-7b", 6.738), ("llama2-13b", 13.016), ("llama2-70b", 68.977), ("llama3-8b", 8.030)]
)
def test_published_models_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    model = build_model(name, Training(), "meta")
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_every_preset_names_a_known_model_and_training() -> None:
    for preset in (*presets.THROUGHPUT.values(), *presets.SEQLEN.values()):
        assert preset.model in MODELS
        for training in preset.trainings:
            assert training.tuning in ("full", "lora", "qlora")
    for table, defaults in ((presets.THROUGHPUT, presets.DEFAULT_THROUGHPUT), (presets.SEQLEN, presets.DEFAULT_SEQLEN)):
        assert {name for names in defaults.values() for name in names} <= set(table)  # type: ignore[arg-type]


def test_building_leaves_random_state_and_default_type_alone() -> None:
    state = torch.get_rng_state()
    build_model(TINY, Training("lora", "bf16"), "cpu")
    assert torch.equal(state, torch.get_rng_state()) and torch.get_default_dtype() == torch.float32


def test_lora_trains_adapters_on_all_linear_layers_of_blocks() -> None:
    model = build_model(TINY, Training("lora", "fp32"), "cpu")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * MODELS[TINY].layers
    assert all("lora_" in name and ".layers." in name for name in trained)


def test_quantised_stand_in_holds_half_a_byte_for_each_weight() -> None:
    model = build_model(TINY, Training("qlora", "bf16"), "meta")
    packed = [p for p in model.parameters() if p.dtype == torch.uint8]
    shape = MODELS[TINY]
    weights = shape.layers * (shape.width * shape.width * 4 + 3 * shape.width * shape.intermediate)
    assert len(packed) == 7 * shape.layers
    assert sum(p.numel() for p in packed) / weights == pytest.approx(0.516, abs=0.001)


def test_quantised_model_trains_its_adapters() -> None:
    pytest.importorskip("bitsandbytes")
    model = build_model(TINY, Training("qlora", "bf16"), "cpu")
    assert sum(p.dtype == torch.uint8 for p in model.parameters()) == 7 * MODELS[TINY].layers
    lane = Lane(Variant("exact", 0.5), model, CPU)
    loss_of(lane.model, build_batch(TINY, 1, 16, "cpu")).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert 0 < sum(p.grad is not None for p in trained) < len(trained)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_chunked_loss_is_the_plain_loss(tuning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dropbp.bench.common.models.CHUNK_TOKENS", 24)
    ids = build_batch(TINY, 2, 48, "cpu")
    outcomes = []
    for loss in ("plain", "chunked"):
        model = build_model(TINY, Training(tuning, "fp32", loss=loss), "cpu")
        torch.manual_seed(1)
        value = loss_of(model, ids)
        value.backward()
        outcomes.append((value, [p.grad for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(outcomes[0], outcomes[1])


def test_lanes_share_parameters_and_forward_to_the_bit() -> None:
    model = build_model(TINY, Training("full", "fp32"), "cpu")
    ids = build_batch(TINY, 2, 32, "cpu")
    lanes = [
        Lane(v, model, CPU) for v in (PLAIN, Variant("exact", 0.75), Variant("nested", 0.75), Variant("detach", 0.75))
    ]
    for lane in lanes:
        assert {id(p) for p in lane.model.parameters()} == {id(p) for p in model.parameters()}
    losses = [loss_of(lane.model, ids) for lane in lanes]
    assert len({loss.item() for loss in losses}) == 1
    assert not any("_dropbp_root" in vars(module) for module in model.modules())


def test_reference_way_gives_the_gradients_of_dropbp_with_the_same_masks() -> None:
    model = build_model(TINY, Training("full", "fp32"), "cpu")
    ids = build_batch(TINY, 2, 32, "cpu")
    gradients = []
    for variant in (Variant("exact", 0.5), Variant("detach", 0.5)):
        lane = Lane(variant, model, CPU)
        loss_of(lane.model, ids).backward()
        gradients.append((lane.mask, lane.dropped_share, [p.grad for p in model.parameters()]))
        for parameter in model.parameters():
            parameter.grad = None
    assert gradients[0][:2] == gradients[1][:2]
    for ours, theirs in zip(gradients[0][2], gradients[1][2], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs)


# -- memory that is counted


@pytest.mark.parametrize(
    "training", [Training("full", "fp32"), Training("lora", "fp32", True), Training(loss="chunked")]
)
def test_bytes_counted_on_shapes_are_those_of_a_real_step(training: Training) -> None:
    variant = Variant("exact", 0.5)
    counted = Probe(Workplace(TINY, training), variant, masks=1).peak_bytes(2, 96)
    lane = Lane(variant, build_model(TINY, training, "cpu"), CPU)
    optimizer = build_optimizer(lane.model, training.tuning)
    for step in range(2):
        for parameter in lane.model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        if step == 0:
            optimizer.step()
    ids = build_batch(TINY, 2, 96, "cpu")
    with track_tensor_bytes(lane.model, optimizer, ids) as tracked:
        loss_of(lane.model, ids).backward()
        optimizer.step()
    assert counted == pytest.approx(tracked.peak_bytes, rel=0.01)


def test_greedy_nested_masks_are_all_kept_and_the_budget_from_the_top() -> None:
    lane = Lane(Variant("nested", 0.5), build_model(TINY, Training("full", "fp32"), "cpu"), CPU)
    whole, within = lane.peak_memory_masks(3)
    assert whole == (False,) * 8 and within is not None
    kept = [i for i, dropped in enumerate(within) if not dropped]
    assert kept == list(range(kept[0], 8)) and 0 < len(kept) < 8
    with lane.masked(within):
        loss_of(lane.model, build_batch(TINY, 1, 16, "cpu"))
    assert lane.mask == "".join("1" if dropped else "0" for dropped in within) and (lane.dropped_share or 0) >= 0.5


def test_size_is_tried_in_a_process_of_its_own() -> None:
    task = {"vary": "sequence_length", "fixed": 1, "step": 32, "most": 64, "accumulated": True}
    found, asked = tried_in_a_process(TINY, Training("full", "fp32"), Variant("nested", 0.5), "cpu", task)
    assert found == 64 and asked == [{"size": 32, "fits": True}, {"size": 64, "fits": True}]


def test_process_that_dies_is_a_result() -> None:
    task = {"vary": "batch_size", "fixed": -1, "step": 1, "most": 4, "accumulated": True}
    found, asked = tried_in_a_process(TINY, Training(), PLAIN, "cpu", task)
    assert found == 0 and asked[-1]["died"] == 1 and "negative dimension" in asked[-1]["message"][0]
    assert not is_border(asked)


def test_what_could_not_be_tried_at_all_is_an_error_and_no_length_of_zero() -> None:
    task = {"vary": "batch_size", "fixed": 16, "step": 1, "most": 4, "accumulated": True}
    with pytest.raises(DropBPError, match="llama9"):
        tried_in_a_process("llama9", Training(), PLAIN, "cpu", task)


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("HPU: Allocation failed"), True),
        (RuntimeError("shape"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error: RuntimeError, answer: bool) -> None:
    assert is_out_of_memory(error) is answer


def test_longest_sequence_is_the_border_and_grows_with_the_drop_rate(tmp_path: Path) -> None:
    args = seqlen_args(tmp_path, "--preset", "smoke")
    assert seqlen.run(args) == 0
    (record,) = records.read_all(tmp_path, "seqlen")
    ratios = length_ratios(record)
    assert ratios[0.0][1] == 1.0 and (ratios[0.875][1] or 0) > 1.5
    budget = record["configuration"]["budget_bytes"]
    for entry in record["lengths"].values():
        peaks = {asked["size"]: asked["peak_bytes"] for asked in entry["asked"]}
        assert peaks[entry["length"]] <= budget < peaks[entry["length"] + record["configuration"]["step"]]


def seqlen_args(folder: Path, *options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    seqlen.add_arguments(parser)
    return parser.parse_args(["--output", str(folder), *options])


# -- throughput


SMALL = ThroughputPreset(
    TINY, (Training("full", "fp32"),), (0.5, 0.875), 1, 24, 2, 1, (Training("full", "fp32"),), 2.0, 1
)


def throughput_args(folder: Path, *options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    throughput.add_arguments(parser)
    return parser.parse_args(["--output", str(folder), "--threads", "1", *options])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a small run of everything."""
    folder = tmp_path_factory.mktemp("results")
    throughput.run_preset("small", SMALL, throughput_args(folder))
    preset = SeqlenPreset(TINY, (Training("full", "fp32"),), (0.875,), 0.01, 64, 4096, True, 1)
    seqlen._measure("small", preset, preset.trainings[0], seqlen_args(folder))
    return folder


def test_throughput_record_holds_every_step_of_every_variant(measured: Path) -> None:
    (record,) = records.read_all(measured, "throughput")
    names = {"plain", *(f"{how}-{rate}" for how in ("exact", "nested", "detach") for rate in (0.5, 0.875))}
    assert set(record["variants"]) == set(record["memory"]) == names
    assert set(record["steps"]) == set(record["warmup_steps"]) == names | {"unrecorded"}
    for name in names:
        assert [step["round"] for step in record["steps"][name]] == [1, 2]
        assert [step["round"] for step in record["warmup_steps"][name]] == [0]
        assert all(
            step[part] > 0 for step in record["steps"][name] for part in ("forward_s", "backward_s", "optimizer_s")
        )
    masks = [step["mask"] for step in record["steps"]["exact-0.5"]]
    assert masks == [step["mask"] for step in record["steps"]["detach-0.5"]]
    assert len(set(masks)) == 2


def test_a_compiled_run_says_how_many_graphs_were_compiled_and_when(tmp_path: Path) -> None:
    training = Training("lora", "fp32", checkpointing=True, compiled=True)
    preset = ThroughputPreset(TINY, (training,), (0.5,), 1, 24, 2, 3)
    throughput.run_preset("small", preset, throughput_args(tmp_path))
    (record,) = records.read_all(tmp_path, "throughput")
    assert record["compiled_graphs"] > 0 and record["compiled_graphs_late"] == 0
    assert set(record["variants"]) == {"plain", "exact-0.5", "nested-0.5"}
    assert tables.run(argparse.Namespace(output=tmp_path, docs=tmp_path / "docs")) == 0
    page = (tmp_path / "docs" / "results.md").read_text()
    assert f"{record['compiled_graphs']} graphs compiled in the warm-up, 0 after it" in page
    assert f"| {TINY}, lora, fp32, checkpointing, compiled | 24 | 0.5 |" in page


def test_plain_backward_is_split_into_blocks_and_rest(measured: Path) -> None:
    (record,) = records.read_all(measured, "throughput")
    for step in record["steps"]["plain"]:
        assert 0 < step["blocks_backward_s"] < step["backward_s"]
    parts = parts_of(record)
    assert parts.blocks_backward_s > 0 and parts.rest_backward_s > 0


def test_blocks_backward_ends_with_the_backward_where_nothing_below_needs_a_gradient() -> None:
    bench = rounds.Bench(SMALL, Training("lora", "fp32"), [PLAIN], CPU)
    timing = bench.step(bench.lanes[0], split=True)
    assert 0 < timing["blocks_backward_s"] <= timing["backward_s"]


def test_figures_follow_from_the_record_alone(measured: Path) -> None:
    (record,) = records.read_all(measured, "throughput")
    for variant in record["steps"].values():
        for step in variant:
            step.update(forward_s=1.0, backward_s=1.0, forward_cpu_s=1.0, backward_cpu_s=1.0)
    for step in record["steps"]["plain"]:
        step.update(backward_s=2.0, blocks_backward_s=1.6)
    plain, half, *_ = figures(record)
    assert (plain.step_s, plain.ratio, plain.share) == (3.0, 1.0, None)
    assert half.ratio == pytest.approx(2 / 3)
    assert half.limit_ratio == pytest.approx((1 + (1 - half.dropped_share) * 1.6 + 0.4) / 3)
    assert half.share == pytest.approx(1 / (half.dropped_share * 1.6))
    assert half.tokens_per_s == 12 and half.samples_per_s == 0.5
    assert half.activations_ratio is not None and half.activations_ratio < 1


def test_the_error_of_a_share_follows_from_the_scatter_between_rounds(measured: Path) -> None:
    (record,) = records.read_all(measured, "throughput")
    name, same = "exact-0.5", {"forward_s": 1.0, "backward_s": 1.0, "blocks_backward_s": 0.8, "dropped_share": 0.5}
    for variant in record["steps"].values():
        for step in variant:
            step.update(same)
    assert share_error(record, name, "wall") == 0
    record["steps"][name][0]["backward_s"] = 0.9
    once = share_error(record, name, "wall")
    record["steps"][name][0]["backward_s"] = 0.8
    twice = share_error(record, name, "wall")
    assert once is not None and twice == pytest.approx(2 * once)
    record["steps"] = {key: steps[:1] for key, steps in record["steps"].items()}
    assert share_error(record, name, "wall") is None


def test_the_share_of_the_backward_is_read_off_a_line_through_all_steps(measured: Path) -> None:
    (record,) = records.read_all(measured, "throughput")
    for step in record["steps"]["plain"]:
        step.update(backward_s=2.0, blocks_backward_s=1.6)
    for name in ("exact-0.5", "exact-0.875"):
        for step in record["steps"][name]:
            step["backward_s"] = 0.4 + 1.6 * (1 - step["dropped_share"])
    for rate, (share, error) in backward_shares(record, "exact", "wall").items():
        assert (share, error) == (pytest.approx(1), pytest.approx(0, abs=1e-6)), rate
    for name in ("exact-0.5", "exact-0.875"):
        for step in record["steps"][name]:
            step["backward_s"] += 0.08
    shares = {rate: share for rate, (share, _) in backward_shares(record, "exact", "wall").items()}
    assert shares == pytest.approx({0.5: 1 - 0.08 / 0.8, 0.875: 1 - 0.08 / 1.4})


def test_memory_of_a_step_falls_with_the_drop_rate(measured: Path) -> None:
    (record,) = records.read_all(measured, "throughput")
    peaks = [record["memory"][name]["peak_bytes"] for name in ("plain", "exact-0.5", "exact-0.875")]
    assert peaks[0] > peaks[1] > peaks[2]


def test_largest_micro_batch_is_within_the_budget(measured: Path) -> None:
    (record,) = records.read_all(measured, "growth")
    sizes = {name: found["batch_size"] for name, found in record["batch_sizes"].items()}
    assert sizes["plain"] == 2 and sizes["exact-0.875"] >= sizes["exact-0.5"] > 2
    for found in record["batch_sizes"].values():
        peaks = {asked["size"]: asked["peak_bytes"] for asked in found["asked"]}
        assert peaks[found["batch_size"]] <= record["budget_bytes"] < peaks[found["batch_size"] + 1]


def test_finished_runs_are_not_run_again(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(rounds, "build_model", refuse)
    throughput.run_preset("small", SMALL, throughput_args(measured))
    with pytest.raises(AssertionError, match="built again"):
        throughput.run_preset("small", SMALL, throughput_args(measured, "--again"))


def test_run_that_fails_does_not_keep_others_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(model: str, training: Training, device: str) -> Any:
        if training.tuning == "full":
            raise torch.OutOfMemoryError("no memory left")
        return build_model(model, training, device)

    monkeypatch.setattr(rounds, "build_model", build)
    preset = ThroughputPreset(TINY, (Training("full", "fp32"), Training("lora", "fp32")), (0.5,), 1, 16, 1, 0)
    throughput.run_preset("two", preset, throughput_args(tmp_path))
    (finished,), (failed,) = records.read_all(tmp_path, "throughput"), records.read_unfinished(tmp_path, "throughput")
    assert finished["configuration"]["tuning"] == "lora"
    assert failed["failures"][0]["message"] == "no memory left"


# -- pages


def test_page_and_plots_follow_from_files(measured: Path, tmp_path: Path) -> None:
    args = argparse.Namespace(output=measured, docs=tmp_path)
    assert tables.run(args) == 0
    first = (tmp_path / "results.md").read_text()
    assert f"### {TINY}, full, fp32" in first and "exact-0.875" in first and "## Compared with the paper" in first
    assert "## The largest micro-batch" in first and "## The longest sequence" in first
    assert {path.name for path in (tmp_path / "img").iterdir()} == {f"throughput-{TINY}.png", f"seqlen-{TINY}.png"}
    for image in (tmp_path / "img").iterdir():
        assert f"(img/{image.name})" in first and image.stat().st_size > 2000
    tables.run(args)
    assert (tmp_path / "results.md").read_text() == first


def test_tables_without_results_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Run `dropbp bench throughput` first"):
        tables.run(argparse.Namespace(output=tmp_path, docs=tmp_path))


def test_cancelled_runs_are_listed(measured: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), records.Store(tmp_path, "seqlen").run("stopped", {}, CPU):
        raise KeyboardInterrupt
    runs = {kind: records.read_all(measured, kind) for kind in ("throughput", "growth", "seqlen")}
    assert "- seqlen stopped, " in tables.page(tmp_path, runs, [], tmp_path)


def test_paper_marks_what_could_not_be_run(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paper.run(argparse.Namespace(output=measured, json=False))
    text = capsys.readouterr().out
    assert text.count("not run: needs") == len(paper.PUBLISHED)
    assert "-57.0 %" in text and "7.10x" in text


def test_paper_takes_a_figure_of_the_published_model_for_ours(measured: Path, tmp_path: Path) -> None:
    record = json.loads(next((measured / "throughput").glob("*.json")).read_text())
    record["configuration"].update(model="llama2-7b", dtype="bf16")
    record["device"] = {"name": "cuda", "generation": "A card"}
    (tmp_path / "throughput").mkdir()
    (tmp_path / "throughput" / "real.json").write_text(json.dumps(record))
    full, lora, *_ = paper.compare(tmp_path)
    assert full.ours is not None and full.ours_on == "llama2-7b on A card"
    assert lora.ours is None and "not run" in lora.ours_on


# -- accuracy


ALPACA = [{"instruction": "Add 1 and 2.", "input": "", "output": "3"}]
OASST = [
    {"message_id": "a", "parent_id": None, "text": "Hi?", "role": "prompter", "lang": "en"},
    {"message_id": "b", "parent_id": "a", "text": "Bad.", "role": "assistant", "lang": "en", "rank": 1},
    {"message_id": "c", "parent_id": "a", "text": "Good.", "role": "assistant", "lang": "en", "rank": 0},
    {"message_id": "d", "parent_id": "c", "text": "And?", "role": "prompter", "lang": "en", "rank": 0},
    {"message_id": "e", "parent_id": None, "text": "Hallo?", "role": "prompter", "lang": "de"},
    {"message_id": "f", "parent_id": None, "text": "Alone?", "role": "prompter", "lang": "en"},
]


def data_file(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    path = folder / "rows.json"
    path.write_text(json.dumps(list(rows)))
    return str(path)


def test_data_sets_are_read_from_local_files(tmp_path: Path) -> None:
    assert accuracy.load_data("alpaca", data_file(tmp_path, ALPACA)) == ALPACA
    messages = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Good."}]
    assert accuracy.load_data("oasst1", data_file(tmp_path, OASST)) == [{"messages": messages}]


def test_file_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not in the format of dolly: no column 'context'"):
        accuracy.load_data("dolly", data_file(tmp_path, ALPACA))
    with pytest.raises(ConfigError, match="known are alpaca, dolly, oasst1"):
        accuracy.load_data("c4")


def accuracy_args(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    accuracy.add_arguments(parser)
    return parser.parse_args(list(options))


def test_finetuning_gets_the_papers_settings(tmp_path: Path) -> None:
    given = accuracy.finetune_arguments(accuracy_args("--model", "m", "--tuning", "full"), tmp_path / "d", tmp_path)
    assert "--learning-rate 2e-05" in " ".join(given) and "--peft none" in " ".join(given)
    plain = accuracy.finetune_arguments(accuracy_args("--model", "m", "--drop-rate", "0"), tmp_path / "d", tmp_path)
    assert "--plain" in plain and "--drop-rate" not in plain


def test_missing_harness_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match="pip install lm-eval"):
        accuracy.run(accuracy_args("--model", "m"))


def test_tiny_local_model_is_finetuned_and_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.common.tiny import save_model, sums

    asked: list[dict[str, Any]] = []

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        asked.append(options)
        return {"results": {options["tasks"][0]: {"acc,none": 0.25, "acc_norm,none": 0.5}}}

    harness = ModuleType("lm_eval")
    harness.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    model = save_model(tmp_path / "model")
    options = [
        "--data",
        "alpaca",
        "--source",
        data_file(tmp_path, sums(40)),
        "--max-steps",
        "1",
        "--tasks",
        "mmlu",
        "piqa",
    ]
    args = accuracy_args(
        "--model", str(model), *options, "--work", str(tmp_path / "w"), "--output", str(tmp_path / "r")
    )
    monkeypatch.setitem(accuracy.TUNINGS, "lora", accuracy.Hyperparameters(1e-4, "lora", 2, 1, 0, 256))  # type: ignore[index]
    assert accuracy.run(args) == 0
    (record,) = records.read_all(tmp_path / "r", "accuracy")
    assert record["results"] == {"mmlu": 0.25, "piqa": 0.5}
    assert [(a["num_fewshot"], a["device"]) for a in asked] == [(5, "cpu"), (0, "cpu")]
    assert asked[0]["model_args"].startswith(f"pretrained={model},peft=")


# -- the command


def test_help_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in command.PARTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["throughput", "--only", "full-fp8", "--preset", "smoke"], "--only 'full-fp8' is not in the preset"),
        (["throughput", "--rounds", "0"], "--rounds 0 must be at least 1"),
        (["throughput", "--threads", "0"], "--threads 0 must be at least 1"),
        (["throughput", "--device", "gpu9"], "gpu9"),
        (["seqlen", "--preset", "llama2-7b"], "needs an accelerator"),
        (["seqlen", "--preset", "cpu", "--budget-gib", "-1"], "must be above 0"),
    ],
)
def test_bad_arguments_are_errors_in_one_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DropBPError) as error:
        command.main([*arguments, "--output", str(tmp_path)])
    assert message in str(error.value)


def test_bad_values_of_a_training_are_named() -> None:
    with pytest.raises(ConfigError, match="tuning is 'half'; allowed: full, lora, qlora"):
        build_model(TINY, Training("half"), "cpu")
    with pytest.raises(ConfigError, match="model 'llama9' is unknown; known are llama-4x64"):
        build_model("llama9", Training(), "cpu")


def test_library_is_as_before_after_a_run(measured: Path) -> None:
    assert dropbp.enable(build_model(TINY, Training("full", "fp32"), "cpu"), 0.5).enabled
