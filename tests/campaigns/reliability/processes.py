"""Faults that need a process of their own: kill -9, Ctrl-C, a full disk, a rank that dies."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
from pathlib import Path
from random import Random
from typing import Any

from tests.campaigns.reliability import rank
from tests.campaigns.reliability.children import BEGINS, LIMIT_S, Child, command
from tests.common.tiny import save_model, sums, write_jsonl

STEPS = 16
KILLS_OF_A_RUN = 6
MOST_S = {"inspect": 0.1, "plan": 0.5}  # commands that end quickly


def inputs(folder: Path) -> list[str]:
    """Options of a fine-tuning of a few seconds, with a checkpoint at every second step."""
    given = {
        "model": save_model(folder / "model"),
        "dataset": write_jsonl(folder / "data.jsonl", sums(24)),
        "max-steps": STEPS,
        "batch-size": 2,
        "gradient-accumulation": 2,
        "max-length": 160,
        "save-steps": 2,
        "eval-steps": STEPS,
        "learning-rate": "1e-3",
        "masks": "exact",
        "output": folder / "run",
    }
    return ["finetune", *(text for name, value in given.items() for text in (f"--{name}", str(value)))]


def killed(count: int, folder: Path) -> dict[str, Any]:
    """Kill -9 at random moments, mostly while a checkpoint is written; in the end the run equals an uninterrupted one.

    A run is killed and resumed again and again. Its weights, losses and masks must be as if it had never been killed.
    """
    options = inputs(folder)
    uninterrupted = _finish(options, folder).rename(folder / "uninterrupted")
    _assert_no_step_too_many(uninterrupted, options, folder)
    kills = writing = 0
    while kills < count:
        shutil.rmtree(folder / "run", ignore_errors=True)
        for _ in range(min(KILLS_OF_A_RUN, count - kills)):
            inside = _kill_once(options, folder, Random(f"kill:{kills}"))
            if inside is None:
                break
            kills, writing = kills + 1, writing + inside
        _assert_equal(uninterrupted, _finish(options, folder))
    return {"injected": kills, "while_a_checkpoint_was_written": writing}


def _kill_once(options: list[str], folder: Path, random: Random) -> bool | None:
    """Whether a checkpoint was being written; None if the run had already ended."""
    output = folder / "run"
    before = _newest(output)
    with command(_resumed_if_possible(options, output), folder) as child:
        if random.random() < 0.75:  # when a new checkpoint appears, or some milliseconds later
            child.wait_until(lambda: _newest(output) > before)
            time.sleep(random.random() * 0.03)
        else:
            time.sleep(random.random() * 4)
        if child.ended:
            assert child.wait() == 0, child.said
            return None
        child.send(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    newest = output / f"checkpoint-{_newest(output)}"
    return newest.is_dir() and not (newest / "dropbp.json").is_file()


def _finish(options: list[str], folder: Path) -> Path:
    with command(_resumed_if_possible(options, folder / "run"), folder) as child:
        assert child.wait() == 0, child.said
    return folder / "run"


def _assert_no_step_too_many(uninterrupted: Path, options: list[str], folder: Path) -> None:
    """Killed after the last step but before its result was written."""
    cut = Path(shutil.copytree(uninterrupted, folder / "run"))
    for path in cut.iterdir():
        if path.is_file():
            path.unlink()
    _finish(options, folder)
    _assert_equal(uninterrupted, cut)


def _resumed_if_possible(options: list[str], output: Path) -> list[str]:
    """Add --resume if there is a complete checkpoint; otherwise remove the partial one, as the message advises."""
    from dropbp.files import last_whole_checkpoint

    if last_whole_checkpoint(output)[0] is None:
        shutil.rmtree(output, ignore_errors=True)
        return options
    return [*options, "--resume"]


def _newest(output: Path) -> int:
    names = [path.name for path in output.glob("checkpoint-*")]
    return max((int(name.rpartition("-")[2]) for name in names), default=0)


def _assert_equal(uninterrupted: Path, cut: Path) -> None:
    one, two = (
        json.loads((run / "result.json").read_text(encoding="utf-8"))["runs"][0] for run in (uninterrupted, cut)
    )
    for key in ("train_losses", "tokens", "calibrated_steps", "dropbp"):
        assert one[key] == two[key], key
    name = "adapter_model.safetensors"
    assert (uninterrupted / name).read_bytes() == (cut / name).read_bytes()


def interrupted(count: int, folder: Path) -> dict[str, Any]:
    """Ctrl-C at random moments of every command: status 130, one line, no traceback, and a complete checkpoint is
    named.
    """
    commands = commands_of_all_kinds(folder)
    sent = dict.fromkeys(commands, 0)
    for number in range(count):
        name = list(commands)[number % len(commands)]
        sent[name] += _interrupt(name, commands[name], folder, Random(f"interrupt:{number}"))
    return {"injected": sum(sent.values()), "by_command": sent}


def commands_of_all_kinds(folder: Path) -> dict[str, list[str]]:
    """Every command of `dropbp`, in a form that runs for a few seconds."""
    from dropbp.cli.main import COMMANDS

    model = str(folder / "model")
    known = {
        "finetune": inputs(folder),
        "inspect": ["inspect", model, "--sequence-length", "4096"],
        "plan": ["plan", model],
        "analyze": ["bench", "analysis"],
        "bench": ["bench", "throughput", "--smoke", "--output", str(folder / "bench")],
    }
    unknown = set(COMMANDS) - {name.split()[0] for name in known}
    assert not unknown, f"tests/campaigns/reliability/processes.py has no arguments for the new command {unknown}"
    return {name: given for name, given in known.items() if given[0] in COMMANDS}


def _interrupt(name: str, arguments: list[str], folder: Path, random: Random) -> bool:
    output = folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    with command(arguments, folder) as child:
        child.wait_until(lambda: BEGINS in child.said)
        if name == "finetune" and random.random() < 0.6:
            child.wait_until(lambda: _newest(output) > 2)
        time.sleep(0.02 + random.random() * MOST_S.get(name, 2))
        if child.ended:
            assert child.wait() == 0, child.said
            return False
        child.send(signal.SIGINT)
        _assert_interrupted(name, child.wait(), child.said)
    return True


def _assert_interrupted(name: str, status: int, text: str) -> None:
    last = (text.strip().splitlines() or [""])[-1]
    assert status in (0, 130), f"{name}: status {status}\n{text[-3000:]}"  # 0: it had finished when the signal came
    assert "Traceback" not in text, f"{name}\n{text[-3000:]}"
    assert status == 0 or ("dropbp" in last and "interrupted" in last), f"{name}\n{text[-3000:]}"


def file_limit(count: int, folder: Path) -> dict[str, Any]:
    """A disk that fills up during the run: status 1, one line, and the previous checkpoint is complete."""
    from dropbp.files import last_whole_checkpoint

    options = inputs(folder)
    largest = max(path.stat().st_size for path in _finish(options, folder).rglob("*") if path.is_file())
    for number in range(count):
        shutil.rmtree(folder / "run")
        limit = Random(f"disk:{number}").randrange(1000, largest)
        with command(options, folder, limit) as child:
            status, text = child.wait(), child.said
        assert status == 1, f"limit {limit}: status {status}\n{text[-3000:]}"
        assert "Traceback" not in text, text[-3000:]
        assert "cannot write any more" in text.strip().splitlines()[-1], text[-3000:]
        last, _ = last_whole_checkpoint(folder / "run")
        assert last is None or f"{last} is kept" in text, text[-3000:]
    return {"injected": count}


def rank_dies(count: int, folder: Path) -> dict[str, Any]:
    """One of two ranks is killed in a DDP step: the other ends with an error, within the group's timeout."""
    waits_s = []
    for number in range(count):
        where, port = rank.PLACES[number % len(rank.PLACES)], _free_port()
        ranks = [Child(rank.main, (each, port, where), folder / f"rank{each}") for each in range(2)]
        try:
            assert ranks[1].wait() == -signal.SIGKILL, ranks[1].said
            begin_s = time.monotonic()
            assert ranks[0].wait(rank.TIMEOUT_S + LIMIT_S) == rank.ENDED_WITH_AN_ERROR, ranks[0].said
            waits_s.append(time.monotonic() - begin_s)
        finally:
            for child in ranks:
                child.close()
    assert max(waits_s) < rank.TIMEOUT_S, waits_s
    return {"injected": count, "longest_wait_s": round(max(waits_s), 2), "timeout_s": rank.TIMEOUT_S}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
