"""The command `dropbp`: dispatch, errors, `inspect`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from dropbp.bench.parts import PARTS

import dropbp
from dropbp.cli import main as cli
from dropbp.cli.commands import Command
from dropbp.cli.libraries import _uses_bitsandbytes, _uses_deepspeed
from dropbp.errors import ConfigError
from tests.common.tiny import save_model

HEAVY = ("torch", "transformers", "peft", "matplotlib")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


def test_an_interrupt_inside_a_callback_that_cannot_raise_still_ends_the_command() -> None:
    ended = run_python("""
import signal, sys, time, weakref
from dropbp.cli import main as cli

def command(arguments):
    thing = {1}
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing
    print("goes on", flush=True)
    for _ in range(1000):
        time.sleep(0.02)

cli._dispatch = command
sys.argv = ["dropbp"]
sys.exit(cli.main())
""")
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "goes on\n", "dropbp: interrupted\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["finetune", "--help"],
        ["inspect", "--help"],
        ["plan", "--help"],
        ["bench", "--help"],
        ["--version"],
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys\nfrom dropbp.cli.main import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as end: assert not end.code\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\nassert not loaded, loaded"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_check_of_imports_can_fail() -> None:
    done = run_python("import sys, matplotlib\nassert 'matplotlib' not in sys.modules")
    assert done.returncode == 1


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"dropbp {dropbp.__version__}\n"


def test_without_a_command_there_is_help_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "finetune" in capsys.readouterr().out
    assert cli.main(["--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["commands"]) == set(cli.COMMANDS)


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["fly"])
    assert end.value.code == 2
    assert "invalid choice: 'fly'" in capsys.readouterr().err


def install(monkeypatch: pytest.MonkeyPatch, name: str, **functions: object) -> None:
    monkeypatch.setitem(sys.modules, cli.COMMANDS[name].module, SimpleNamespace(**functions))


def test_a_command_is_a_module_with_arguments_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--number", type=int)

    install(monkeypatch, "inspect", add_arguments=add_arguments, run=lambda args: args.number)
    assert cli.main(["inspect", "--number", "7"]) == 7


def test_a_part_of_the_bench_is_a_command_below_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--number", type=int)

    part = SimpleNamespace(add_arguments=add_arguments, run=lambda args: args.number)
    monkeypatch.setitem(sys.modules, PARTS["overhead"].module, part)
    assert cli.main(["bench", "overhead", "--number", "7"]) == 7


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("drop_rate=2\nmust be below 1"), 2, "dropbp: drop_rate=2 must be below 1"),
        (KeyboardInterrupt(), 130, "dropbp: interrupted"),
        (KeyboardInterrupt("interrupted; c-3 is kept"), 130, "dropbp: interrupted; c-3 is kept"),
    ],
)
def test_expected_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str
) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    install(monkeypatch, "inspect", add_arguments=lambda parser: None, run=run)
    assert cli.main(["inspect"]) == status
    assert capsys.readouterr().err.splitlines() == [line]


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(command: Command) -> None:
        raise ModuleNotFoundError("No module named 'peft'", name="peft.tuners")

    monkeypatch.setattr(Command, "load", missing)
    assert cli.main(["inspect"]) == 2
    assert (
        "peft.tuners is required but not installed; install it with: pip install 'dropbp[hf]'"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("source", ["", "config.json"])
def test_inspect_shows_each_branch_below_its_modules(
    model_folder: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    assert cli.main(["inspect", str(model_folder / source), "--sequence-length", "32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("LlamaForCausalLM")
    assert "6 branches" in lines[0]
    names = [line.split("  ")[0].strip() or line.strip().split("  ")[0] for line in lines[3:]]
    assert names.count("self_attn") == names.count("mlp") == 3


def test_inspect_counts_flops_for_the_shape_asked_for(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for length in ("16", "32"):
        assert cli.main(["inspect", str(model_folder), "--sequence-length", length, "--batch-size", "2", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    short, long = ([branch["flops"] for branch in result["branches"]] for result in found)
    assert all(2 * a <= b for a, b in zip(short, long, strict=True))
    assert sum(branch["parameters"] for branch in found[0]["branches"]) < found[0]["parameters"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./missing"], "./missing does not exist"),
        (["nobody/nothing"], "nobody/nothing cannot be loaded"),
        (["MODEL", "--batch-size", "0"], "--batch-size 0 must be 1 or more"),
    ],
)
def test_inspect_refuses_what_it_cannot_read(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]


# --- packages that a command has no use for

PREPARES_A_TRAINER = """
import sys
from dropbp.cli.commands import Command
from dropbp.cli.libraries import leave_out_unused
if sys.argv[1:]:
    leave_out_unused(sys.argv[1:])
import peft, torch, transformers
from accelerate.utils import extract_model_from_parallel
transformers.Trainer
extract_model_from_parallel(torch.nn.Linear(1, 1))
print("imported:", *(name for name in ("bitsandbytes", "deepspeed") if sys.modules.get(name)))
"""


def imported_by_a_trainer(*arguments: str, **environment: str) -> list[str]:
    """The two packages, of those installed, that are imported once a trainer is prepared, and all other output."""
    command = [sys.executable, "-c", PREPARES_A_TRAINER, *arguments]
    variables = os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280, env=variables)
    *other, names = done.stdout.splitlines()
    return names.split()[1:] + (other + done.stderr.splitlines() if arguments else [])


both_installed = pytest.mark.skipif(
    not find_spec("bitsandbytes") or not find_spec("deepspeed"), reason="they are not installed"
)


@pytest.mark.slow
@both_installed
def test_a_trainer_by_itself_imports_two_packages_that_it_has_no_use_for() -> None:
    assert imported_by_a_trainer() == ["bitsandbytes", "deepspeed"]


@both_installed
def test_a_command_imports_no_package_that_it_has_no_use_for() -> None:
    assert imported_by_a_trainer("finetune", "--max-steps", "4") == []


def test_packages_that_a_command_may_need_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, quantised = tmp_path / "plain", tmp_path / "quantised"
    for folder, config in ((plain, "{}"), (quantised, '{"quantization_config": {"quant_method": "bitsandbytes"}}')):
        folder.mkdir()
        folder.joinpath("config.json").write_text(config)
    for arguments, used in (
        (["finetune"], False),
        (["finetune", "--model", str(plain), "--dataset", "rows.json"], False),
        (["finetune", f"--model={quantised}"], True),
        (["finetune", "--model", "someone/model"], True),
        (["plan", str(plain / "config.json")], False),
        (["inspect", str(quantised)], True),
        (["bench", "all"], True),
    ):
        assert _uses_bitsandbytes(arguments) is used, arguments
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert _uses_deepspeed(["finetune"])
