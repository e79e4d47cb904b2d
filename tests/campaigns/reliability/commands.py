"""Invalid command lines, data sets, models and checkpoints: one line and status 2 or 1, or success."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from tests.campaigns.reliability.processes import inputs
from tests.campaigns.reliability.values import damaged

WORDS = (
    "",
    "-1",
    "0",
    "1",
    "0.5",
    "nan",
    "inf",
    "1e400",
    "x",
    "--",
    "-x",
    "é",
    "none",
    "cpu",
    "meta",
    "nested",
    "pool",
)
OPTIONS = (
    *("--drop-rate", "--masks", "--peft", "--max-steps", "--epochs", "--batch-size", "--gradient-accumulation"),
    *("--learning-rate", "--warmup-steps", "--seed", "--device", "--save-steps", "--eval-steps", "--eval-fraction"),
    *(
        "--max-length",
        "--dataset",
        "--model",
        "--report-to",
        "--gradient-checkpointing",
        "--bf16",
        "--plain",
        "--resume",
    ),
    *("--json", "--bogus", "--sequence-length"),
)
FLAGS = {"--gradient-checkpointing", "--bf16", "--plain", "--resume", "--json", "--bogus"}
GARBAGE = (b"", bytes(64), b"\xff\xfe{", b"{}", b"[]", b"null", b"[1]", b'{"a": ', b"PAR1", b'\xe9;\n"')
SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".parquet", ".bin", "")


class Traceback(AssertionError):
    """A command that ended with anything but its own one-line message."""


def run(arguments: list[str]) -> tuple[int, str]:
    """Run a command in this process; returns its status and standard error."""
    from dropbp.cli.main import main

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 2
        except Exception as error:
            raise Traceback(f"dropbp {arguments} ended with {type(error).__name__}: {error}") from error
    return status, errors.getvalue()


def command_lines(count: int, folder: Path) -> dict[str, Any]:
    """Options of `finetune` and `inspect` with changed values; accepted ones run for one step."""
    base = _short_inputs(folder)
    statuses = Counter[int]()
    for number in range(count):
        random = Random(f"line:{number}")
        shutil.rmtree(folder / "run", ignore_errors=True)
        arguments = [*base] if random.random() < 0.7 else ["inspect", str(folder / "model")]
        for option in random.sample(OPTIONS, k=random.choice((1, 1, 2))):
            arguments += [option] if option in FLAGS else [option, random.choice(WORDS)]
        statuses[_checked(arguments)] += 1
    return {"inputs": count, "accepted": statuses[0], "refused": count - statuses[0]}


def files(count: int, folder: Path) -> dict[str, Any]:
    """Garbage data sets in every format, and models with a missing, truncated or garbage file."""
    base, statuses = _short_inputs(folder), Counter[int]()
    for number in range(count):
        random = Random(f"file:{number}")
        shutil.rmtree(folder / "run", ignore_errors=True)
        if random.random() < 0.5:
            path = folder / f"garbage{random.choice(SUFFIXES)}"
            path.write_bytes(random.choice(GARBAGE) + random.randbytes(random.randrange(40)))
            statuses[_checked([*base, "--dataset", str(path)])] += 1
            continue
        broken = _copy(folder / "model", folder / "broken")
        _damage_file(random.choice(sorted(broken.iterdir())), random)
        command = [*base, "--model", str(broken)] if random.random() < 0.6 else ["inspect", str(broken)]
        statuses[_checked(command)] += 1
    return {"inputs": count, "accepted": statuses[0], "refused": count - statuses[0]}


def checkpoints(count: int, folder: Path) -> dict[str, Any]:
    """Resume from checkpoints with a missing or truncated file, or with damaged DropBP state."""
    base, statuses = _short_inputs(folder), Counter[int]()
    options = ["--max-steps", "2", "--save-steps", "1"]
    assert _checked([*base, *options]) == 0
    whole = (folder / "run").rename(folder / "whole")
    for number in range(count):
        random = Random(f"checkpoint:{number}")
        cut = _copy(whole, folder / "run")
        chosen = cut / f"checkpoint-{random.choice((1, 2))}"
        if random.random() < 0.5:
            _cut_file(random.choice(sorted(chosen.iterdir())), random)
        else:
            _damage_state(chosen / "trainer_state.json", random)
        statuses[_checked([*base, *options, "--resume"])] += 1
    return {"inputs": count, "accepted": statuses[0], "refused": count - statuses[0]}


def _short_inputs(folder: Path) -> list[str]:
    """Options of a fine-tuning of one step."""
    return [*inputs(folder), "--max-steps", "1", "--gradient-accumulation", "1", "--save-steps", "1"]


def _checked(arguments: list[str]) -> int:
    status, errors = run(arguments)
    last = (errors.strip().splitlines() or [""])[-1]
    if status not in (0, 1, 2) or "Traceback" in errors or (status and "dropbp" not in last):
        raise Traceback(f"dropbp {arguments}: status {status}\n{errors[-2000:]}")
    return status


def _copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


def _damage_file(path: Path, random: Random) -> None:
    if random.random() < 0.3:
        path.write_bytes(random.choice(GARBAGE))
    else:
        _cut_file(path, random)


def _cut_file(path: Path, random: Random) -> None:
    """Truncate a file, as an interrupted write does."""
    if random.random() < 0.3:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size or 1)])


def _damage_state(path: Path, random: Random) -> None:
    state = json.loads(path.read_text(encoding="utf-8"))
    parts = state["stateful_callbacks"]
    parts["DropBPCallback"] = _plain(damaged(parts["DropBPCallback"], random))
    path.write_text(json.dumps(state), encoding="utf-8")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=lambda other: None, skipkeys=True))
