"""`dropbp finetune`: data, training, saving, resuming, reporting."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import dropbp
from dropbp.cli import causal_lm, choices, demo, registry, report, smollm, training
from dropbp.cli.examples import IGNORED, Encoder, Example, collate, collate_left, encode_rows, pack
from dropbp.cli.main import main
from dropbp.cli.rows import read_rows
from dropbp.errors import ConfigError
from tests.common.tiny import CHAT_TEMPLATE, make_model, make_tokenizer, save_model, sums, write_jsonl

SMALL = ["--batch-size", "2", "--gradient-accumulation", "2", "--max-length", "128", "--device", "cpu"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "sums.jsonl", sums(24))


def finetune(model: Path, data: Path, output: Path, *options: str) -> int:
    return main(["finetune", "--model", str(model), "--dataset", str(data), "--output", str(output), *SMALL, *options])


def result_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return content


def learned(example: Example) -> str:
    """The part of an example that has a loss, as text."""
    ids = [label for label in example["labels"] if label != IGNORED]
    text: str = make_tokenizer().decode(ids)
    return text


# -- rows


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_file_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = sums(3)
    path = tmp_path / f"rows{suffix}"
    write_as(rows, path)
    assert read_rows(str(path)) == rows


def write_as(rows: list[dict[str, str]], path: Path) -> None:
    import pandas

    frame = pandas.DataFrame(rows)
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", "[1, 2]\n", "line 1 holds a list; expected an object"),
        ("a.json", '{"text": "a"}', "holds a dict; expected a list of objects"),
        ("a.xml", "<a/>", "ends in '.xml'; supported: .csv, .json, .jsonl, .parquet, .txt"),
        ("a.jsonl", "", "holds no rows"),
        ("a.txt", " \n", "holds no rows"),
        ("a.parquet", "no", "is not a Parquet file"),
        ("a.jsonl", '{"text": "a"}\n{"text": ' + "[" * 100_000, "line 2 is nested too deeply to be read"),
        ("a.json", "[" * 100_000, "is nested too deeply to be read"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "line 1 holds a number of too many digits"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}', "line 2 holds the key 'text' twice in one object"),
        ("a.json", '[{"messages": [{"role": "user", "role": "a"}]}]', "holds the key 'role' twice in one object"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "is not text in UTF-8"),
        ("a.csv", "text\na\n".encode("utf-16"), "is not text in UTF-8"),
        ("a.jsonl", gzip.compress(b'{"text": "a"}', mtime=0), "is not text in UTF-8"),
        ("a.csv", "prompt,completion\na,b\nc\n", "line 3 has 1 fields for the 2 columns prompt, completion"),
        ("a.csv", "prompt,completion\na,b,c\n", "line 2 has 3 fields for the 2 columns"),
        ("a.csv", "text,text\na,b\n", "expected one field per column, and distinct column names"),
        ("a.csv", 'text\n"a\nb\n', "line 3 is not CSV: unexpected end of data"),
    ],
)
def test_a_broken_file_raises_an_error_with_its_path_and_fault(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        read_rows(str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_long_csv_field_is_read_without_changing_the_limit_of_the_process(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "a" * 200_000 + "\n")
    limit = csv.field_size_limit()
    assert read_rows(str(tmp_path / "a.csv")) == [{"text": "a" * 200_000}]
    assert csv.field_size_limit() == limit


# -- examples


def encoded(rows: list[dict[str, Any]], *, chat: bool = False, max_length: int = 256) -> list[Example]:
    tokenizer = make_tokenizer()
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return encode_rows(rows, Encoder(tokenizer, max_length), iter).examples


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add 1 and 2.", "input": "", "output": "3"},
        {"instruction": "Add them.", "input": "1 and 2", "output": "3"},
        {"instruction": "Add 1 and 2.", "context": "", "response": "3"},
        {"prompt": "Add 1 and 2: ", "completion": "3"},
    ],
)
def test_the_loss_is_on_the_response_and_its_end_only(row: dict[str, str]) -> None:
    (example,) = encoded([row])
    assert learned(example) == "3</s>"
    assert len(example["input_ids"]) == len(example["labels"])


def test_an_input_is_part_of_the_prompt() -> None:
    (example,) = encoded([{"instruction": "Add them.", "input": "1 and 2", "output": "3"}])
    text = make_tokenizer().decode(example["input_ids"])
    assert "### Instruction:\nAdd them.\n\n### Input:\n1 and 2\n\n### Response:\n3" in text


def test_the_loss_of_a_conversation_is_on_its_answers_only() -> None:
    messages = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "4"},
    ]
    (example,) = encoded([{"messages": messages}], chat=True)
    assert learned(example) == "2</s>4</s>"


USER, ANSWER = {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": [USER], "completion": [ANSWER]}, "<|user|>1+1</s><|assistant|>2</s>"),
        (
            {"conversations": [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}]},
            "<|user|>1+1</s><|assistant|>2</s>",
        ),
        ({"messages": [USER, {"role": "gpt", "content": "2"}]}, "<|user|>1+1</s><|assistant|>2</s>"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "2"}]}]},
            "<|user|>1+1</s><|assistant|>2</s>",
        ),
        ({"messages": [ANSWER, USER, ANSWER]}, "<|assistant|>2</s><|user|>1+1</s><|assistant|>2</s>"),
        ({"messages": [USER, ANSWER], "system": "Add."}, "<|system|>Add.</s><|user|>1+1</s><|assistant|>2</s>"),
        ({"messages": [USER, ANSWER, USER]}, "<|user|>1+1</s><|assistant|>2</s>"),
        ({"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER], "tools": None}, None),
        ({"prompt": [USER, {**ANSWER, "content": "3"}, USER], "completion": [ANSWER]}, None),
    ],
)
def test_conversations_of_every_form_are_trained_on_their_answers(row: dict[str, Any], text: str | None) -> None:
    (example,) = encoded([row], chat=True)
    assert learned(example) == "2</s>"
    assert text is None or make_tokenizer().decode(example["input_ids"]) == text


@pytest.mark.parametrize("kind", ["output", "response"])
def test_a_row_without_a_response_is_left_out_and_counted(kind: str) -> None:
    rows = [{"instruction": "Add.", kind: answer} for answer in ("3", None, " ", float("nan"), 3, 0.5)]
    result = encode_rows(rows, Encoder(make_tokenizer(), 256), iter)
    assert [learned(example) for example in result.examples] == ["3</s>", "3</s>", "0.5</s>"]
    assert dict(result.left_out) == {"no response": 3}
    assert list(result.notes()) == ["3 of 6 rows were left out: 3 with no response"]


def test_rows_without_text_and_leftover_tokens_are_counted() -> None:
    rows = [{"text": "0 1 2 3 4 5 " * 8}, {"text": None}, {"other": "a"}, {"text": ""}]
    result = encode_rows(rows, Encoder(make_tokenizer(), 16), iter)
    first, last = result.notes()
    assert first == "3 of 4 rows were left out: 3 with no text"
    assert last == f"the last {result.tokens_left_out} tokens of the text were left out: they do not fill an example"
    assert result.tokens_left_out == (len(make_tokenizer()("0 1 2 3 4 5 " * 8)["input_ids"]) + 1) % 16 > 0


def test_truncated_rows_are_counted() -> None:
    result = encode_rows([{"prompt": "a", "completion": "b " * 40}], Encoder(make_tokenizer(), 8), iter)
    assert list(result.notes()) == ["1 of 1 rows were cut at --max-length"]


def test_an_answer_keeps_its_first_token_where_the_tokenizer_would_merge_it_with_the_prompt() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", "say the{% endif %}").replace(
        "<|{{ message['role'] }}|>", "{{ 'say the' if message['role'] == 'assistant' else '<|user|>' }}"
    )
    rows = [{"messages": [USER, {"role": "assistant", "content": " sum"}]}]
    (example,) = encode_rows(rows, Encoder(tokenizer, 64), iter).examples
    assert learned(example) == " sum</s>"


BAD_ROWS = [
    ({"prompt": [USER], "completion": "2"}, "the column 'completion' is a str; expected a list of messages"),
    ({"prompt": "1+1", "completion": [ANSWER]}, "the column 'prompt' is a str; expected a list of messages"),
    ({"prompt": "1+1", "completion": {"text": "2"}}, "the column 'completion' is a dict; expected text"),
    ({"prompt": "1+1", "completion": True}, "the column 'completion' is a bool; expected text"),
    ({"prompt": "1+1", "completion": float("inf")}, "is the number inf; expected text"),
    ({"prompt": "1+1", "completion": "\ud800"}, "holds half a character (a lone surrogate, at position 0)"),
    ({"prompt": "1+1", "completion": "3", "label": False}, "the column 'label' would not be trained on"),
    ({"instruction": "1+1", "output": "2", "history": [["a", "b"]]}, "the column 'history' would not be trained on"),
    ({"instruction": "1+1", "input": {"a": 1}, "output": "2"}, "the column 'input' is a dict; expected text"),
    ({"messages": "[{'role': 'user'}]"}, "CSV cannot hold lists: use .jsonl"),
    ({"messages": ["1+1", "2"]}, "message 1 of 'messages' is a str; expected an object with role and content"),
    ({"messages": [{"content": "2"}]}, "message 1 of 'messages' has no role; supported: system"),
    ({"messages": [{"role": "Caesar", "content": "2"}]}, "has the role 'Caesar'; supported: system"),
    ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "holds tool_calls"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "parts that are not text"),
    ({"messages": [USER, ANSWER], "tools": [{"name": "f"}]}, "the column 'tools' would not be trained on"),
    ({"text": ["a"]}, "the column 'text' is a list; expected text"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_an_unusable_row_raises_an_error_with_its_number(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"^row 1 of the data set does not fit the kind") as caught:
        encoded([row], chat=True)
    assert message in str(caught.value)


def test_a_failing_chat_template_raises_an_error_with_the_row() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match=r"row 1 of x\.jsonl .* refuses a conversation: roles must alternate"):
        encode_rows([{"messages": [USER, ANSWER]}], Encoder(tokenizer, 64), iter, "x.jsonl")


TEXTS = st.text("abc xyzé\n", max_size=12)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.just("\ud800"),
    st.lists(TEXTS, max_size=2),
    st.dictionaries(TEXTS, TEXTS, max_size=2),
    st.just([[[]]]),
    TEXTS,
)
VALUES = st.one_of(TEXTS, ODD)
ROLES = st.one_of(st.sampled_from(["system", "user", "assistant", "human", "gpt", "tool", "odd"]), ODD)
PARTS = st.fixed_dictionaries({"type": st.just("text"), "text": VALUES})
MESSAGES = st.one_of(
    st.fixed_dictionaries({"role": ROLES, "content": VALUES}, optional={"name": ODD, "tool_calls": ODD}),
    st.fixed_dictionaries({"from": ROLES, "value": VALUES}),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": st.lists(PARTS)}),
    ODD,
)
LISTS = st.one_of(st.lists(MESSAGES, max_size=4), ODD)
COLUMNS = (
    {"messages": LISTS, "system": VALUES},
    {"conversations": LISTS},
    {"prompt": st.one_of(VALUES, LISTS), "completion": st.one_of(VALUES, LISTS)},
    {"instruction": VALUES, "input": VALUES, "output": VALUES},
    {"instruction": VALUES, "context": VALUES, "response": VALUES, "history": ODD},
    {"text": VALUES},
)


def rows_with(columns: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[list[dict[str, Any]]]:
    row = st.one_of(st.fixed_dictionaries(columns), st.fixed_dictionaries({}, optional=columns))
    return st.lists(row, min_size=1, max_size=4)


CHAT_TOKENIZER = make_tokenizer()
CHAT_TOKENIZER.chat_template = CHAT_TEMPLATE


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.one_of(*map(rows_with, COLUMNS)), max_length=st.sampled_from([4, 64]))
def test_random_rows_train_on_text_only_or_are_counted_or_refused(
    tmp_path: Path, rows: list[dict[str, Any]], max_length: int
) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    refusal = ""
    try:
        result = encode_rows(read_rows(str(path)), Encoder(CHAT_TOKENIZER, max_length), iter, str(path))
    except ConfigError as error:
        refusal = str(error)
    if refusal:
        assert str(path) in refusal
        return
    assert result.rows == len(rows)
    if result.kind != "text":
        assert len(result.examples) + result.rows_without_loss == len(rows)
    for example in result.examples:
        text = CHAT_TOKENIZER.decode(example["input_ids"])
        assert not any(python in text for python in ("None", "True", "False", "nan", "inf", "{", "[", "'"))
        assert any(label != IGNORED for label in example["labels"][1:])


def test_plain_text_is_packed_into_full_examples() -> None:
    examples = encoded([{"text": "Add the numbers. " * 20}, {"text": "Say the sum. " * 20}], max_length=16)
    assert {len(example["input_ids"]) for example in examples} == {16}
    assert examples[0]["labels"] == examples[0]["input_ids"]


def test_rows_whose_response_does_not_fit_are_counted() -> None:
    rows = [{"prompt": "Add " * 40, "completion": "1"}, {"prompt": "1", "completion": "2"}]
    result = encode_rows(rows, Encoder(make_tokenizer(), 8), iter)
    assert (len(result.examples), result.rows_without_loss) == (1, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a", "answer": "b"}], "the data set has the columns answer, question; supported: messages"),
        ([{"messages": []}], "the tokenizer has no chat template"),
        (
            [{"prompt": "a " * 50, "completion": "b"}],
            "none of the 1 rows leaves a token to learn within --max-length 8",
        ),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a"}],
            "row 2 of the data set does not fit the kind 'completion'",
        ),
    ],
)
def test_data_sets_without_usable_rows_are_refused(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        encoded(rows, max_length=8)
    assert message in str(caught.value)


def test_a_batch_is_padded_without_loss_or_attention() -> None:
    batch = collate([{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]


def test_packing_keeps_a_short_text_and_drops_a_remainder() -> None:
    assert [len(example["input_ids"]) for example in pack(list(range(10)), 4)] == [4, 4]
    assert [len(example["input_ids"]) for example in pack(list(range(3)), 4)] == [3]


# -- a real model


@pytest.mark.parametrize("peft", ["lora", "none"])
def test_a_fine_tuned_model_can_be_loaded_with_its_tokenizer(
    model_folder: Path, data: Path, tmp_path: Path, peft: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(model_folder, data, tmp_path, "--peft", peft, "--max-steps", "4") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.generate(**tokenizer("Add", return_tensors="pt"), max_new_tokens=2).shape[0] == 1
    (run,) = result_of(tmp_path)["runs"]
    assert len(run["step_s"]) == len(run["tokens"]) == 4
    assert run["dropbp"]["realised_drop_rate"] == pytest.approx(0.5, abs=0.1)
    assert run["evaluations"][-1]["step"] == 4
    assert (tmp_path / "dropbp.json").is_file()
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "result.json") in capsys.readouterr().out


def test_a_resumed_command_equals_the_uninterrupted_one(model_folder: Path, data: Path, tmp_path: Path) -> None:
    common = ["--save-steps", "3", "--eval-steps", "2", "--learning-rate", "1e-3"]
    assert finetune(model_folder, data, tmp_path / "whole", *common, "--max-steps", "6") == 0
    interrupt_at(model_folder, data, tmp_path / "cut", common, step=5)
    assert finetune(model_folder, data, tmp_path / "cut", *common, "--max-steps", "6", "--resume") == 0
    whole, cut = (result_of(tmp_path / name)["runs"][0] for name in ("whole", "cut"))
    for key in ("train_losses", "tokens", "calibrated_steps"):
        assert whole[key] == cut[key]
    assert [point["loss"] for point in whole["evaluations"]] == [point["loss"] for point in cut["evaluations"]]
    assert whole["dropbp"]["branches"] == cut["dropbp"]["branches"]
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert adapters[0] == adapters[1]


def interrupt_at(model: Path, data: Path, output: Path, common: list[str], step: int) -> None:
    original = training.StepRecorder.on_step_end

    def interrupting(self: training.StepRecorder, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        original(self, args, state, *rest, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.StepRecorder, "on_step_end", interrupting)
        assert finetune(model, data, output, *common, "--max-steps", "6") == 130


def test_ctrl_c_prints_the_checkpoint_to_resume_from(
    model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(model_folder, data, tmp_path, ["--save-steps", "2"], step=3)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"dropbp: interrupted; {tmp_path / 'checkpoint-2'} is kept: add --resume to continue"


def test_a_plain_run_reports_no_dropping(
    model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(model_folder, data, tmp_path, "--plain", "--max-steps", "2", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == result_of(tmp_path)
    (run,) = printed["runs"]
    assert run["dropbp"] is None
    assert run["flops_per_token"] == run["plain_flops_per_token"] > 0
    assert not (tmp_path / "dropbp.json").exists()


def test_checkpointing_and_bf16_train(model_folder: Path, data: Path, tmp_path: Path) -> None:
    assert finetune(model_folder, data, tmp_path, "--gradient-checkpointing", "--bf16", "--max-steps", "2") == 0
    assert result_of(tmp_path)["runs"][0]["steps"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--drop-rate", "1"], "--drop-rate 1.0 must be in [0, 1)"),
        (["--drop-rate", "nan"], "--drop-rate nan must be in [0, 1)"),
        (["--masks", "odd"], "masks"),
        (["--device", "abacus"], "abacus"),
        (["--max-steps", "0"], "--max-steps 0 must be above 0"),
        (["--eval-fraction", "1"], "--eval-fraction 1.0 must be in [0, 1)"),
        (["--epochs", "inf"], "--epochs inf must be above 0, and finite"),
        (["--learning-rate", "inf"], "--learning-rate inf must be above 0, and finite"),
        (["--seed", "-1"], "--seed -1 must be from 0"),
        (["--warmup-steps", "-1"], "--warmup-steps -1 must be from 0"),
        (["--batch-size", "9" * 30], "must be 16,777,216 at most"),
        (["--output", "/dev/null/x"], "/dev/null is not a folder"),
        (["--resume"], "holds no checkpoint"),
        (["--dataset", "missing.jsonl"], "--dataset missing.jsonl is not a file"),
        (["--model", "./missing"], "./missing does not exist"),
    ],
)
def test_bad_input_prints_one_line_and_exits_with_status_2(
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert finetune(model_folder, data, tmp_path, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert error[-1].startswith("dropbp: ")
    assert not any("Traceback" in line for line in error)


def test_an_output_with_checkpoints_is_not_overwritten(
    model_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    assert finetune(model_folder, data, tmp_path) == 2
    assert "pass --resume, or another --output" in capsys.readouterr().err


def test_splitting_keeps_every_example_once() -> None:
    examples = [{"input_ids": [n], "labels": [n]} for n in range(10)]
    train, held_out = causal_lm.split(examples, 0.2, seed=1)
    assert len(held_out) == 2
    assert sorted(e["input_ids"][0] for e in train + held_out) == list(range(10))
    assert causal_lm.split(examples, 0.2, seed=1) == (train, held_out)
    with pytest.raises(ConfigError, match="cannot be split for evaluation"):
        causal_lm.split(examples[:1], 0.2, seed=1)


# -- the demo

QUESTIONS = [
    choices.Question(f"Add {n} and 1.\nA. {n + 1}\nB. {n + 2}", f"A. {n + 1}" if n % 2 else f"B. {n + 2}")
    for n in range(60)
]
RECIPE = demo.Recipe(steps=4, batch_size=2, held_out=8, evaluations=2)


def chat_model(layers: int = 4) -> tuple[Any, Any]:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return make_model(layers), tokenizer


def demo_of_tiny_things(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "Recipe", lambda: RECIPE)
    monkeypatch.setattr(demo, "load_smollm", chat_model)
    monkeypatch.setattr(demo, "choice_questions", lambda held_out, *_: (QUESTIONS[held_out:], QUESTIONS[:held_out]))


def test_the_demo_shows_answers_costs_losses_and_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo_of_tiny_things(monkeypatch)
    assert main(["finetune", "--output", str(tmp_path), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    for question in QUESTIONS[:3]:
        assert question.text in text
    for words in ("right", "before", "validation loss", "after the same time", "final loss", "Right answers to 8"):
        assert words in text
    result = result_of(tmp_path)
    plain, dropped = result["runs"]
    assert plain["evaluations"][0]["loss"] == dropped["evaluations"][0]["loss"]
    assert (plain["steps"], dropped["steps"]) == (4, 6)  # at p = .5 six steps cost the FLOPs of four
    assert dropped["flops_per_token"] < plain["flops_per_token"]
    assert len(result["before"]["answers"]) == len(plain["answers"]) == len(dropped["answers"]) == 3


@pytest.mark.parametrize("has_bf16", [False, True])
def test_the_demo_without_options_trains_on_any_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_bf16: bool
) -> None:
    demo_of_tiny_things(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16, raising=False)
    assert main(["finetune"]) == 0
    assert len(result_of(tmp_path / demo.OUTPUT)["runs"]) == 2


def test_bf16_needs_no_device_on_a_machine_that_has_a_cpu_only(model_folder: Path, data: Path, tmp_path: Path) -> None:
    given = {"model": model_folder, "dataset": data, "output": tmp_path, "batch-size": 2, "max-length": 128}
    options = [f"--{name}={value}" for name, value in given.items()]
    assert main(["finetune", *options, "--gradient-accumulation=1", "--max-steps=2", "--bf16"]) == 0
    assert result_of(tmp_path)["runs"][0]["steps"] == 2


def test_the_demo_accepts_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo_of_tiny_things(monkeypatch)
    monkeypatch.setattr(demo, "load_smollm", None)
    folder, output = save_model(tmp_path / "model", chat=True), tmp_path / "out"
    assert main(["finetune", "--model", str(folder), "--plain", "--output", str(output), "--device", "cpu"]) == 0
    assert len(result_of(output)["runs"]) == 1


def test_left_padding_reduces_the_logits_and_keeps_the_loss() -> None:
    model, tokenizer = chat_model()
    rows = [question.row for question in QUESTIONS[7:12]]
    examples = encode_rows(rows, Encoder(tokenizer, 256), iter).examples
    right, left = collate(examples, 0), collate_left(examples, 0)
    longest = max(sum(label != IGNORED for label in example["labels"]) for example in examples)
    assert int((left["labels"] != IGNORED).any(0).sum()) == longest
    with dropbp.labelled_logits(model):
        outputs = model(**left)
    assert outputs.logits.shape[1] == longest
    assert outputs.loss.item() == pytest.approx(model(**right).loss.item(), rel=1e-5)


def test_labelled_logits_give_the_same_losses_as_all_logits(tmp_path: Path) -> None:
    folder, data = save_model(tmp_path / "model"), write_jsonl(tmp_path / "data.jsonl", sums(24))
    losses = []
    for logits in ("all", "labelled"):
        output = tmp_path / logits
        sizes = ["--max-steps", "3", "--batch-size", "4", "--gradient-accumulation", "2", "--device", "cpu"]
        options = ["--model", str(folder), "--dataset", str(data), "--output", str(output), "--logits", logits, *sizes]
        assert main(["finetune", *options]) == 0
        losses.append([point["loss"] for point in result_of(output)["runs"][0]["evaluations"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_accuracy_is_the_share_of_questions_whose_likeliest_letter_is_right() -> None:
    model, tokenizer = chat_model()
    right = 0
    for question in QUESTIONS:
        text = tokenizer.apply_chat_template(question.prompt, tokenize=False, add_generation_prompt=True)
        logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
        a, b = (float(logits[tokenizer(letter)["input_ids"][0]]) for letter in "AB")
        right += ("A" if a > b else "B") == question.answer[0]
    assert choices.accuracy(model, tokenizer, QUESTIONS, batch_size=7) == right / len(QUESTIONS)


def test_questions_are_split_by_their_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"passage": "P.", "question": f"Q{n}?", "options": "\nA. a\nB. b ", "answer": "A. a"} for n in range(10)]
    places = {str(n): write_jsonl(tmp_path / f"{n}.jsonl", rows[n:]) for n in range(2)}
    monkeypatch.setattr(choices, "package_files", lambda package: places)
    train, held_out = choices.choice_questions(4, seed=1)
    assert (train, held_out) == choices.choice_questions(4, seed=1) != choices.choice_questions(4, seed=2)
    assert len(train) + len(held_out) == len(set(train) | set(held_out))  # though the same are in both sets
    assert {question.text for question in train + held_out} <= {f"P. Q{n}?\nA. a\nB. b" for n in range(10)}


# -- files from the registry

CONTENT = b"what is wanted"
PACKAGE = registry.Package("dropbp-sample", "1.0", {"sample/a.txt": hashlib.sha256(CONTENT).hexdigest()})


def pip_that_gives(content: bytes | None, monkeypatch: pytest.MonkeyPatch, cache: Path) -> list[list[str]]:
    """A registry with one wheel in it; None is one that is not reached. The calls are noted."""
    calls: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no route\nERROR: No matching distribution\n")
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "sample-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("sample/a.txt", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(registry, "_call", run)
    return calls


def test_files_are_downloaded_once_and_again_if_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pip_that_gives(CONTENT, monkeypatch, tmp_path)
    (place,) = registry.package_files(PACKAGE).values()
    assert place.read_bytes() == CONTENT
    assert place.is_relative_to(tmp_path)
    assert registry.package_files(PACKAGE) == {"sample/a.txt": place}
    assert len(calls) == 1
    assert {"download", "--no-deps"} < set(calls[0])
    assert calls[0][-1] == "dropbp-sample==1.0"
    place.write_bytes(b"half")
    assert registry.package_files(PACKAGE)["sample/a.txt"].read_bytes() == CONTENT
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            None,
            "whose files are needed (ERROR: No matching distribution)",
        ),
        (b"another", "sample/a.txt of dropbp-sample 1.0 is not the expected file"),
    ],
)
def test_a_failed_or_wrong_download_raises_an_error_and_leaves_no_file(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_that_gives(content, monkeypatch, tmp_path)
    with pytest.raises(ConfigError) as caught:
        registry.package_files(PACKAGE)
    assert message in str(caught.value)
    assert not list(tmp_path.rglob("a.txt"))


def test_a_gguf_file_loads_as_the_model_and_tokenizer_it_was_made_from(tmp_path: Path) -> None:
    model, tokenizer = chat_model(2)
    model.lm_head.weight = model.model.embed_tokens.weight
    write_gguf(model, tokenizer, tmp_path / "tiny.gguf")
    read, words = smollm.read_gguf(tmp_path / "tiny.gguf")
    ids = torch.arange(1, 40)[None]
    assert torch.allclose(read.eval()(ids).logits, model.eval()(ids).logits, atol=1e-5)
    assert words("Add the numbers")["input_ids"] == tokenizer("Add the numbers")["input_ids"]
    assert words.chat_template == CHAT_TEMPLATE
    assert words.eos_token == "</s>"


def write_gguf(model: Any, tokenizer: Any, path: Path) -> None:
    import gguf

    config, vocabulary = model.config, tokenizer.get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__)]
    tokens += [f"<unused{n}>" for n in range(config.vocab_size - len(tokens))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and len(token) > 2 else 1 for token in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id, writer.add_unk_token_id):
        add(0)
    writer.add_chat_template(tokenizer.chat_template)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(*as_llama_cpp(name, weight, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_llama_cpp(name: str, weight: torch.Tensor, config: Any) -> tuple[str, Any]:
    """Names and the order of rows in queries and keys, as convert_hf_to_gguf.py of llama.cpp has them."""
    names = {theirs: ours for ours, theirs in smollm._NAMES.items()}
    module, kind = name.rsplit(".", 1)
    _, where, *rest = module.split(".")
    ours, block = (names[".".join(rest[1:])], f"blk.{rest[0]}.") if where == "layers" else (names[module], "")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(ours)
    if heads is not None:
        weight = weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
    return f"{block}{ours}.{kind}", weight.contiguous().numpy()


# -- the report


def make_run(name: str, drop_rate: float, step_s: float, final_loss: float) -> dict[str, Any]:
    flops = 100.0 * (1 - drop_rate / 2)
    return {
        "name": name,
        "drop_rate": drop_rate,
        "steps": 4,
        "step_s": [9.0, 9.0, step_s, step_s],
        "tokens": [10] * 4,
        "calibrated_steps": [],
        "flops_per_token": flops,
        "plain_flops_per_token": 100.0,
        "peak_bytes": 2**20,
        "dropbp": {"realised_drop_rate": drop_rate} if drop_rate else None,
        "evaluations": [
            {"step": 0, "train_s": 0.0, "tokens": 0, "loss": 3.0},
            {"step": 4, "train_s": 4 * step_s, "tokens": 40, "loss": final_loss},
        ],
    }


def test_the_verdict_reports_a_lower_loss_of_plain_training() -> None:
    result = {"runs": [make_run("plain", 0.0, 2.0, 1.0), make_run("dropbp", 0.5, 1.0, 2.5)]}
    cost, same_steps, same_time, same_flops = report.verdict(result)
    assert cost == "dropbp takes 50% of plain training's step time, 75% of its FLOPs, 100% of its peak memory."
    assert same_steps.endswith(
        "after the same 4 steps: plain 1.0000, DropBP 2.5000; plain training is lower by 1.5000."
    )
    assert "plain 2.0000, DropBP 2.5000; plain training is lower by 0.5000" in same_time
    assert "plain 1.5000, DropBP 2.5000" in same_flops


def test_the_verdict_warns_of_uneven_step_times() -> None:
    busy = make_run("plain", 0.0, 2.0, 1.0) | {"step_s": [2.0, 2.0, 2.0, 4.0, 2.0, 4.0]}
    result = {"runs": [busy, make_run("dropbp", 0.5, 1.0, 1.5)]}
    assert "Times of equal steps differ by a factor of 2.0" in report.verdict(result)[1]


def test_the_verdict_reports_a_lower_loss_of_dropbp() -> None:
    result = {"runs": [make_run("plain", 0.0, 2.0, 1.0), make_run("dropbp", 0.5, 1.0, 1.5)]}
    assert "DropBP is lower by 0.5000" in report.verdict(result)[2]


def demo_result(dropped_loss: float) -> dict[str, Any]:
    runs = [make_run("plain", 0.0, 2.0, 1.0), make_run("dropbp", 0.5, 1.0, dropped_loss)]
    for run, share in zip(runs, (0.5, 0.75), strict=True):
        run |= {"accuracy": share, "answers": [run["name"].upper()]}
    before = {"accuracy": 0.25, "answers": ["B. 2"]}
    asked = [{"text": "1+2?\nA. 3\nB. 2", "answer": "A. 3"}]
    return {"runs": runs, "before": before, "questions": asked, "config": {"recipe": {"held_out": 8}}}


@pytest.mark.parametrize(
    ("dropped_loss", "sentence"),
    [
        (0.0, "Plain training's final loss 1.0000: plain after 8 s, DropBP after 3 s."),
        (1.5, "DropBP did not reach plain training's final loss 1.0000, which plain reached after 8 s."),
    ],
)
def test_the_demos_verdict_reports_time_to_plains_loss_and_accuracy(dropped_loss: float, sentence: str) -> None:
    *_, reached, right = report.verdict(demo_result(dropped_loss))
    assert reached == sentence
    assert right == "Right answers to 8 held-out questions: 25% before, plain 50%, DropBP 75%."


def test_answers_are_shown_before_and_after() -> None:
    lines = report.shown_answers(demo_result(0.0)).splitlines()
    assert lines[:3] == ["1+2?", "A. 3", "B. 2"]
    assert [line.split(maxsplit=1) for line in lines[3:]] == [
        ["right", "A. 3"],
        ["before", "B. 2"],
        ["plain", "PLAIN"],
        ["dropbp", "DROPBP"],
    ]


def test_one_run_has_a_table_and_no_verdict() -> None:
    result = {"runs": [make_run("plain", 0.0, 2.0, 1.0)]}
    assert report.verdict(result) == []
    header, _, row = report.table(result).splitlines()
    assert len(header) == len(row)
    assert "2.000 s" in row
