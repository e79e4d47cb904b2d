"""Compiled graphs and launches on the simulated HPU, for each way of training with random masks on a lazy device.

One process per trainer trains tiny models (`worker`). All counts go to `bench/results/recipes.json`, and
`docs/recipes.md` is generated from that file alone. GaudiTrainer needs an environment of its own, `.venv-gaudi`, which
`make test-gaudi` builds. Without it, its existing results stay in the file, and a warning says so.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dropbp.errors import ConfigError, DropBPError
from dropbp.files import write_text

from ..common.options import progress
from ..common.records import RESULTS, versions
from . import tables
from .worker import MARK

logger = logging.getLogger(__name__)

FILE = "recipes.json"
PAGE = "recipes.md"
ROOT = Path(__file__).resolve().parents[2]
GAUDI_PYTHON = ROOT / ".venv-gaudi" / "bin" / "python"
Case = dict[str, Any]

# Arguments of `DropBPCallback`; None trains without it.
BARE = {"masks": "exact", "boundary": "none", "fill": "none", "group_parameters": False, "rehearse": False}
LAYER = BARE | {"boundary": "layer"}
GROUPS = LAYER | {"group_parameters": True}
DESIGNS: dict[str, Mapping[str, Any] | None] = {
    "no-drop": None,
    "detach": {},
    "naive": BARE | {"masks": "independent"},
    "layer": LAYER,
    "layer-zero": LAYER | {"fill": "zero"},
    "groups": BARE | {"group_parameters": True},
    "layer-groups": GROUPS,
    "layer-groups-rehearsed": GROUPS | {"rehearse": True},
    "sublayer-groups-rehearsed": GROUPS | {"boundary": "sublayer", "rehearse": True},
    "pool": BARE | {"masks": "pool", "pool_size": 8},
    "pool-zero": BARE | {"masks": "pool", "pool_size": 8, "fill": "zero"},
    "nested-bare": BARE | {"masks": "nested"},
    "nested": {"masks": "nested"},
}
SHORT_DESIGNS = ("no-drop", "naive", "layer-groups-rehearsed", "nested")
COMPILED: dict[str, tuple[str, Mapping[str, Any]]] = {
    "whole-exact": ("model", {"masks": "exact"}),
    "whole-pool": ("model", {"masks": "pool", "pool_size": 8}),
    "whole-nested": ("model", {"masks": "nested"}),
    "region-exact": ("region", {"masks": "exact"}),
    "region-nested": ("region", {"masks": "nested"}),
}
MEMORY_RATES = (0.0, 0.25, 0.5, 0.75, 0.875)
TRAINERS = ("gaudi", "transformers", "compiled")


@dataclass(frozen=True)
class Plan:
    """The set of cases."""

    steps: int = 100
    depths: tuple[int, ...] = (6, 16, 32)
    rates: tuple[float, ...] = (0.5, 0.875)
    methods: tuple[str, ...] = ("full", "lora")
    memory_rates: tuple[float, ...] = MEMORY_RATES


SMOKE = Plan(steps=3, depths=(2,), rates=(0.5,), methods=("lora",), memory_rates=(0.5,))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dropbp bench recipes`."""
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="where recipes.json goes")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="tables (docs/recipes.md of a checkout)")
    parser.add_argument("--again", action="store_true", help="also cases that are finished already")
    parser.add_argument("--smoke", action="store_true", help="a few tiny cases, to see that everything works")
    parser.add_argument("--trainer", choices=TRAINERS, help="only this trainer")
    parser.add_argument("--tables-only", action="store_true", help="run nothing")
    parser.add_argument(
        "--gaudi-python",
        type=Path,
        default=GAUDI_PYTHON,
        metavar="FILE",
        help="Python of an environment with optimum-habana (.venv-gaudi/bin/python)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure the missing cases and write the tables."""
    path = args.output / FILE
    record = read(path)
    if not args.tables_only:
        for trainer, python in _trainers(args):
            cases = list(make_cases(trainer, SMOKE if args.smoke else Plan()))
            _measure(record, path, python, [case for case in cases if args.again or not _finished(record, case)])
    docs = args.docs or _docs_of_checkout(args)
    if docs is not None and record["cases"]:
        write_text(docs, tables.render(record))
    return 0


def read(path: Path) -> dict[str, Any]:
    """The results so far; an empty record if there are none.

    Raises:
        ConfigError: the file is damaged.
    """
    if not path.is_file():
        return {"schema": 1, "kind": "recipes", "versions": {}, "cases": []}
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] != 1 or record["kind"] != "recipes":
            raise KeyError("schema")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no result file of recipes ({error!r}). Delete it to measure again.") from error
    return record


def make_cases(trainer: str, plan: Plan) -> Iterator[Case]:
    """The cases of a trainer."""
    base = {"trainer": trainer, "batch_size": 2, "sequence_length": 12, "width": 32, "accumulation": 1}
    if trainer == "compiled":
        yield from _compiled_cases(base, plan)
        return
    designs = DESIGNS if trainer == "gaudi" else SHORT_DESIGNS
    for method in plan.methods:
        for design in designs:
            for rate in _rates(design, plan):
                yield base | _case("designs", design, method, rate, plan.depths[0], plan.steps)
    if trainer == "gaudi":
        yield from _deep_cases(base, plan)
        yield from _memory_cases(base, plan)


def _deep_cases(base: Case, plan: Plan) -> Iterator[Case]:
    for method in plan.methods:
        for design in ("layer-groups-rehearsed", "nested"):
            for layers in plan.depths:
                yield base | _case("depth", design, method, plan.rates[0], layers, max(plan.steps * 2 // 5, 2))


def _memory_cases(base: Case, plan: Plan) -> Iterator[Case]:
    wide = base | {"batch_size": 4, "sequence_length": 64, "width": 64}
    for method in plan.methods:
        for design in ("layer-groups-rehearsed", "nested"):
            for rate in plan.memory_rates:
                yield wide | _case("memory", design, method, rate, plan.depths[0], max(plan.steps // 5, 2))


def _compiled_cases(base: Case, plan: Plan) -> Iterator[Case]:
    for design, (scope, options) in COMPILED.items():
        for layers in plan.depths[:2] if scope == "region" else plan.depths[:1]:
            case = _case("compiled", design, "full", plan.rates[0], layers, max(plan.steps * 2 // 5, 2))
            yield base | case | {"scope": scope, "options": dict(options)}


def _rates(design: str, plan: Plan) -> Sequence[float]:
    if DESIGNS[design] is None:
        return (0.0,)
    return plan.rates if design in SHORT_DESIGNS else plan.rates[:1]


def _case(table: str, design: str, method: str, rate: float, layers: int, steps: int) -> Case:
    options = DESIGNS.get(design)
    return {
        "table": table,
        "design": design,
        "options": None if options is None else dict(options),
        "method": method,
        "drop_rate": rate,
        "layers": layers,
        "steps": steps,
    }


def _finished(record: Mapping[str, Any], case: Case) -> bool:
    return any(each["case"] == case for each in record["cases"])


def _trainers(args: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    for trainer in TRAINERS if args.trainer is None else (args.trainer,):
        if trainer != "gaudi":
            yield trainer, Path(sys.executable)
        elif args.gaudi_python.exists() or args.trainer == "gaudi":
            yield trainer, args.gaudi_python
        else:
            logger.warning("no %s: GaudiTrainer is not measured. Build it with: make test-gaudi", GAUDI_PYTHON.name)


def _measure(record: dict[str, Any], path: Path, python: Path, cases: Sequence[Case]) -> None:
    if not cases:
        return
    record["versions"][cases[0]["trainer"]] = versions_of(python)
    with _worker(python, cases) as process, progress(len(cases), cases[0]["trainer"]) as bar:
        for case, result in zip(cases, _results(process), strict=True):
            others = [each for each in record["cases"] if each["case"] != case]
            record["cases"] = [*others, {"case": case, **result}]
            write_text(path, to_text(record))
            bar.update()


def to_text(record: Mapping[str, Any]) -> str:
    """JSON with one line per case, so that diffs show which cases changed."""
    head = {key: value for key, value in record.items() if key != "cases"}
    lines = ",\n".join(json.dumps(case) for case in record["cases"])
    return f'{json.dumps(head)[:-1]},\n"cases": [\n{lines}\n]}}\n'


def versions_of(python: Path) -> dict[str, str | None]:
    """Versions of the packages that the counts depend on, in the environment of that Python."""
    if python == Path(sys.executable):
        return versions()
    code = (
        "import importlib.metadata as m, json, platform, torch; names = ['dropbp', 'torch', 'transformers', 'peft', "
        "'optimum-habana']; found = {'python': platform.python_version()} | {n: m.version(n) for n in names}; "
        "print(json.dumps(found | {'torch': str(torch.__version__)}))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def _worker(python: Path, cases: Sequence[Case]) -> subprocess.Popen[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [str(python), "-m", f"{__package__}.worker", json.dumps(cases)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


def _results(process: subprocess.Popen[str]) -> Iterator[Case]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(MARK):
            yield json.loads(line.removeprefix(MARK))
    if process.wait() != 0:
        raise DropBPError(
            f"The process that trains ended with status {process.returncode}; run it by hand to see why: "
            "python -m dropbp.bench.recipes.worker '[...]'. What it had finished is kept."
        )


def _docs_of_checkout(args: argparse.Namespace) -> Path | None:
    usual = args.output == RESULTS and not args.smoke
    return ROOT / "docs" / PAGE if usual and (ROOT / "docs").is_dir() else None
