"""The bench part `real` with a tiny model: steps at equal FLOPs, a rate that decays, records made once."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dropbp.bench.learning import rivals
from dropbp.bench.real import command, gains, tables, tasks, training
from dropbp.bench.real.training import Run, Source, batches, decayed

from dropbp.cli.examples import IGNORED, Encoder, encode_rows
from dropbp.cli.main import main
from dropbp.errors import ConfigError
from tests.common.tiny import CHAT_TEMPLATE, make_model, make_tokenizer

PLAIN = Run("plain", 0.0, 1e-3, plain_steps=0)


def tiny() -> tuple[Any, Any]:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return make_model(8), tokenizer


def tiny_data(tokenizer: Any, longest: int) -> tasks.Data:
    talks = [(f"{n}?\nA. a\nB. b", f"{'AB'[n % 2]}. x") for n in range(80)]
    roles = ("user", "assistant")
    rows = [{"messages": [{"role": r, "content": text} for r, text in zip(roles, talk, strict=True)]} for talk in talks]
    examples = encode_rows(rows, Encoder(tokenizer, 128), iter).examples
    letters = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "AB"]
    return tasks.Data(examples[16:], examples[:16], [letters] * 16)


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setitem(tasks.TASKS, "solutions", tasks.Task(tiny_data, 128, tiny))
    return Source()


@pytest.mark.parametrize(
    ("method", "steps"),
    [("plain", 8), ("default", (10, 12)), ("freezing", (10, 12)), ("exact", (10, 12)), ("default reversed", (10, 12)),
     ("default narrow", (10, 12)), ("default shelf", (10, 12)), ("nested shelf", (10, 12))],
)  # fmt: skip
def test_a_method_takes_as_many_steps_as_the_flops_of_plain_training_allow(
    method: str, steps: Any, source: Source
) -> None:
    found = training.train(Run(method, 0.0 if method == "plain" else 0.5, 1e-3, plain_steps=8), source)
    low, high = steps if isinstance(steps, tuple) else (steps, steps)
    assert low <= found["steps"] <= high
    assert len(found["losses"]) == len(found["cpu_s"]) == found["steps"]
    assert found["losses"][-1] < found["losses"][0]
    assert 0 <= found["accuracy"] <= 1
    assert not [key for key in source.fresh(PLAIN).__dict__ if "dropbp" in key or key == "forward"]


def test_every_run_begins_with_the_same_model_and_rows(source: Source) -> None:
    first, other, again = (training.train(Run(m, p, 1e-3, plain_steps=3), source) for m, p in FIRST)
    assert first["losses"] == again["losses"]
    assert first["loss"] == again["loss"] != other["loss"]
    assert first["losses"][0] == other["losses"][0]


FIRST = (("plain", 0.0), ("default", 0.5), ("plain", 0.0))


def test_adapters_train_and_are_taken_off(source: Source) -> None:
    before = training.evaluate(source.fresh(PLAIN), source, "solutions")
    found = training.train(Run("default", 0.5, 3e-3, tuning="lora", plain_steps=8), source)
    assert found["loss"] < before["loss"]
    assert training.train(PLAIN, source)["loss"] == before["loss"]


def test_the_loss_is_that_of_the_answers_and_the_letters_are_counted(source: Source) -> None:
    data, model = source.data("solutions"), source.fresh(PLAIN).eval()
    found = training.evaluate(model, source, "solutions")
    total = count = right = 0.0
    for example, options in zip(data.held_out, data.options, strict=True):
        logits = model(torch.tensor([example["input_ids"]])).logits[0, :-1].log_softmax(-1)
        places = [i for i, label in enumerate(example["labels"][1:]) if label != IGNORED]
        total -= sum(logits[i, example["labels"][i + 1]].item() for i in places)
        count += len(places)
        right += options[int(logits[places[0], options].argmax())] == example["labels"][places[0] + 1]
    assert found["loss"] == pytest.approx(total / count, rel=1e-4)
    assert found["accuracy"] == right / len(data.held_out)


def test_rates_rise_for_a_tenth_and_fall_to_zero() -> None:
    factors = [decayed(step, 50) for step in range(50)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[-1] < 0.01


def test_a_pass_has_each_row_once_and_rows_of_one_length_together(source: Source) -> None:
    rows = source.data("solutions").train
    stream = batches(rows, 0, 8)
    passed = [row for _ in range(8) for row in next(stream)]
    assert sorted(map(str, passed)) == sorted(map(str, rows))
    assert [row for _ in range(8) for row in next(stream)] != passed


def test_three_epochs_see_a_third_of_the_rows(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(training, "batches", lambda rows, *rest: seen.append(len(rows)) or batches(rows, *rest))
    training.train(Run("plain", 0.0, 1e-3, plain_steps=6, epochs=3), source)
    assert seen == [16]


def test_a_cache_changes_the_time_of_later_epochs_and_not_what_is_learnt(source: Source) -> None:
    runs = {
        method: training.train(Run(method, 0.5, 1e-3, plain_steps=12, epochs=3, equal="steps"), source)
        for method in ("default", "default, cache", "freezing", "freezing, cache")
    }
    assert {found["steps"] for found in runs.values()} == {12}
    for method in ("default", "freezing"):
        assert runs[f"{method}, cache"]["loss"] == pytest.approx(runs[method]["loss"], abs=1e-5)
        assert runs[f"{method}, cache"]["activation_cache"]["hits"] == 2 * 32
    assert "activation_cache" not in runs["default"]
    assert runs["default"]["realised_drop_rate"] == pytest.approx(0.5, abs=0.05)


def test_records_are_kept_and_not_made_twice(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(command.PRESETS, "smoke", [Run("plain", 0.0, 1e-3, plain_steps=2)])
    options = ["bench", "real", "--preset", "smoke", "--output", str(tmp_path)]
    assert main(options) == 0
    (file,) = (tmp_path / "real").glob("*.json")
    record = json.loads(file.read_text())
    assert record["status"] == "finished"
    assert record["configuration"]["learning_rate"] == 1e-3
    assert len(record["losses"]) == 2
    assert "loss" in capsys.readouterr().err
    monkeypatch.setattr(command, "Source", None)  # nothing is loaded where nothing is missing
    assert main(options) == 0
    assert json.loads(file.read_text()) == record


def record_of(run: Run, loss: float, cpu_s: float = 1.0, device: str = "cpu", ratio: float = 1.0) -> dict[str, Any]:
    found = {"loss": loss, "steps": run.plain_steps, "cpu_s": [cpu_s], "flops_ratio": ratio}
    return {"configuration": command.configuration(run), "device": {"name": device}, **found}


def test_tables_show_each_method_at_each_rate_and_keep_the_rest_of_the_page(tmp_path: Path) -> None:
    runs = [
        record_of(Run("plain", 0.0, 1e-4, plain_steps=0), 4.0),
        record_of(Run("plain", 0.0, 1e-4), 3.25),
        record_of(Run("plain", 0.0, 3e-4), 3.1, 3.0),
        record_of(Run("plain", 0.0, 3e-4, seed=1), 3.3, 1.0),
        record_of(Run("default", 0.5, 3e-4), 3.0, 0.5),
        record_of(Run("default", 0.5, 3e-4, tuning="lora"), 3.5),
        record_of(Run("plain", 0.0, 1e-4, epochs=3, equal="steps"), 2.5),
        record_of(Run("plain", 0.0, 1e-4, epochs=3, equal="steps", tuning="lora"), 2.75, 0.75),
    ]
    page = tmp_path / "learning.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.write(runs, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| plain | - | 40 | 1.00 | 3.250 | **3.200** ± 0.141 |" in text
    assert "| default | 0.5 | 40 | 0.50 | - | 3.000 |" in text
    assert "40 steps for every method of batch 8, 3 epochs" in text
    assert "| plain | - | 40 | 1.00 | 2.500 |\n| LoRA, plain | - | 40 | 0.75 | 2.750 |" in text
    assert "#### solutions, LoRA" in text and "untrained 4.000; 2 seeds" in text
    page.write_text("nothing\n")
    with pytest.raises(ConfigError, match="lacks the lines"):
        tables.write(runs, tmp_path)
    with pytest.raises(ConfigError, match="no finished run"):
        tables.write([], tmp_path)


def test_gains_are_shares_of_what_plain_training_takes_off_the_untrained_loss(tmp_path: Path) -> None:
    task = "choices whole"
    runs = [
        record_of(Run("plain", 0.0, 1e-4, task, plain_steps=0), 4.0, device="cuda"),
        record_of(Run("plain", 0.0, 1e-4, task), 3.0, device="cuda"),
        record_of(Run("plain", 0.0, 1e-4, task, seed=1), 2.0, device="cuda"),
        record_of(Run("plain", 0.0, 3e-4, task), 3.9, device="cuda"),
        record_of(Run("default", 0.5, 3e-4, task), 3.5, device="cuda", ratio=0.7),
        record_of(Run("default", 0.5, 3e-4, task, seed=1), 2.2, device="cuda", ratio=0.7),
        record_of(Run("default", 0.5, 1e-4, task), 3.6, device="cuda", ratio=0.7),
        record_of(Run("freezing", 0.5, 1e-4, task, epochs=3, equal="steps"), 1.0, device="cuda"),  # plain is missing
    ]
    found = gains.gains(runs, "flops")
    (gain,) = found["default", 0.5].values()
    assert gain.shares == pytest.approx([0.5, 0.9]) and gain.flops == 0.7
    assert gain.error == pytest.approx(0.2)
    assert gains.gains(runs, "steps") == {}
    page = tmp_path / "learning.md"
    page.write_text(f"{tables.BEGIN}\n{tables.END}\n")
    tables.write(runs, tmp_path)
    text = page.read_text()
    assert "| default | 0.5 | 70.0 ± 20.0 | 0.70 |" in text
    assert "| method | p | steps | FLOPs of a step |" in text and "| default | 0.5 | 40 | 0.70 |" in text
    assert (tmp_path / "img" / "real.png").stat().st_size > 1000


def test_at_equal_flops_of_three_epochs_the_gain_is_a_share_of_that_of_the_same_plain_steps() -> None:
    task = "choices whole"
    plain = [Run("plain", 0.0, 1e-4, task, plain_steps=0), Run("plain", 0.0, 1e-4, task, epochs=3, equal="steps")]
    runs = [record_of(run, loss, device="cuda") for run, loss in zip(plain, (4.0, 2.0), strict=True)]
    assert gains.gains(runs, "flops", 3) == {}
    runs.append(record_of(Run("default, cache", 0.5, 1e-4, task, epochs=3), 1.5, ratio=0.6))
    (gain,) = gains.gains(runs, "flops", 3)["default, cache", 0.5].values()
    assert gain.shares == [1.25] and gain.flops == 0.6
    assert "default, cache" not in str(gains.gains(runs, "flops"))
    assert "FLOPs of three epochs" in gains.section(runs)


class CountedActivation(torch.nn.SiLU):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CountedActivation.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("method", ["default", "freezing"])
def test_what_a_cache_saves_pays_for_more_steps_at_equal_flops(method: str, source: Source) -> None:
    layers = source.fresh(PLAIN).model.layers
    for layer in layers:
        layer.mlp.act_fn = CountedActivation()
    calls: list[int] = []
    settings = {"plain_steps": 48, "epochs": 3}
    without = training.train(Run(method, 0.5, 1e-3, **settings), source)
    found = training.train(
        Run(f"{method}, cache", 0.5, 1e-3, **settings), source, lambda step: calls.append(CountedActivation.calls)
    )
    assert found["steps"] > 1.1 * without["steps"]
    # the forward that checks the cache runs three times; otherwise a step runs each block once at most
    ran = [min(len(layers), after - before) for before, after in itertools.pairwise(calls)]
    saved = 1 - sum(ran) / len(ran) / len(layers)
    whole = training.Costs.counted(source.fresh(PLAIN), source.batch("solutions", source.data("solutions").train[:8]))
    promised = (without["flops_ratio"] - found["flops_ratio"]) * whole.of(rivals.Work()) / whole.forward
    assert promised == pytest.approx(saved, abs=0.04)


def test_sums_are_rows_of_a_chat_each_once_and_none_is_held_out_and_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = [{"passage": f"{n} apples. ", "question": "How many? ", "answer": f"{n} apples"} for n in range(300)]
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*sums, sums[3]]))
    monkeypatch.setattr(tasks, "package_files", lambda package: dict.fromkeys(package.files, file))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    data = tasks.TASKS["arithmetic whole"].load(tokenizer, 128)
    told = [tokenizer.decode(row["input_ids"]) for row in (*data.train, *data.held_out)]
    assert len(data.held_out) == tasks.WHOLE and len(told) == len(set(told)) == 300
    assert any("<|user|>3 apples. How many?</s><|assistant|>3 apples</s>" in text for text in told)


def test_shards_share_the_runs_of_a_preset_out(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = (1e-3, 2e-3, 3e-3)
    monkeypatch.setitem(command.PRESETS, "smoke", [Run("plain", 0.0, rate, plain_steps=1) for rate in rates])
    for shard, count in (("1/2", 1), ("0/2", 3)):
        assert main(["bench", "real", "--preset", "smoke", "--output", str(tmp_path), "--shard", shard]) == 0
        assert len(list((tmp_path / "real").glob("*.json"))) == count
    with pytest.raises(SystemExit):
        main(["bench", "real", "--shard", "2/2"])


def test_checkpointed_training_takes_fewer_steps_and_learns_the_same(source: Source) -> None:
    plain = training.train(Run("plain", 0.0, 1e-3, plain_steps=6), source)
    again = training.train(Run("plain, checkpointed", 0.0, 1e-3, plain_steps=8), source)
    assert again["steps"] == 6 and again["losses"] == plain["losses"]
