"""`python -m tests.campaigns.zoo`: every architecture a tiny configuration can build, one table, one JSON file.

Exit status 1 if any architecture is wrong or crashed, or if fewer than 98 % of those built that have a residual
stream are right.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import json
import logging
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import dropbp
from tests.campaigns.zoo import report, training
from tests.campaigns.zoo.check import Verdict, check_model
from tests.campaigns.zoo.tiny import FAMILIES, WITHOUT_RESIDUAL, Case, Unbuildable, cases

ROOT = Path(__file__).resolve().parents[3]
TABLE, RESULTS = ROOT / "docs" / "models.md", ROOT / "bench" / "results" / "zoo.json"
LIMIT_S = 120
ENOUGH_RIGHT = 0.98


class TooSlow(BaseException):
    """One architecture exceeded the limit of processor time."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write; returns the exit status."""
    options = _options(arguments)
    _quiet()
    chosen = [case for family in options.family or FAMILIES for case in cases(family)]
    chosen = [case for case in chosen if not options.name or case.name in options.name]
    known = _read(options.resume)
    fresh = list({case.name: case for case in chosen if case.name not in known}.values())
    for verdict in run(tqdm(fresh, unit="model", disable=options.json, dynamic_ncols=True)):
        known[verdict.name] = verdict
        _append(options.resume, verdict)
    verdicts = [dataclasses.replace(known[case.name], family=case.family) for case in chosen]
    complete = not options.family and not options.name
    results = report.results(verdicts, _versions())
    if complete or options.write_docs:
        report.write(results, TABLE, RESULTS)
    sys.stdout.write(json.dumps(results, indent=1) + "\n" if options.json else report.text(results))
    return 0 if is_good(verdicts) else 1


def is_good(verdicts: Sequence[Verdict]) -> bool:
    """No architecture is wrong or crashed, and enough of those built that have a residual stream are right."""
    counts = collections.Counter(v.verdict for v in verdicts)
    built = len(verdicts) - counts["unbuilt"] - counts["none"]
    return not counts["wrong"] and not counts["crashed"] and counts["right"] >= ENOUGH_RIGHT * built


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.zoo", description=__doc__)
    parser.add_argument("name", nargs="*", help="model classes, such as LlamaForCausalLM (all if none is named)")
    parser.add_argument("--family", action="append", choices=tuple(FAMILIES), help="may be given several times")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    parser.add_argument("--write-docs", action="store_true", help="write the files even if only a part was run")
    parser.add_argument("--resume", type=Path, help="a file that takes each verdict as it comes, and is read at first")
    return parser.parse_args(arguments)


def _read(path: Path | None) -> dict[str, Verdict]:
    """The verdicts of an aborted run."""
    if path is None or not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {verdict.name: verdict for verdict in (Verdict(**json.loads(line)) for line in lines)}


def _append(path: Path | None, verdict: Verdict) -> None:
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(verdict)) + "\n")


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()


def run(chosen: Iterable[Case]) -> Iterator[Verdict]:
    """Yield the verdict on each case."""
    for case in chosen:
        if isinstance(chosen, tqdm):
            chosen.set_postfix_str(case.name)
        yield examine(case)


def examine(case: Case) -> Verdict:
    """Build and check one architecture; every outcome becomes a verdict."""
    start = time.process_time()
    try:
        with _time_limit(LIMIT_S):
            verdict = _built_and_checked(case)
    except (Exception, TooSlow) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        detail = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        verdict = Verdict(case.name, case.family, "crashed", detail)
    verdict.seconds = time.process_time() - start
    return verdict


def _built_and_checked(case: Case) -> Verdict:
    try:
        model = case.build()
    except Exception as error:
        return Verdict(case.name, case.family, "unbuilt", str(error))
    inputs = case.inputs(model)
    verdict = check_model(case.name, case.family, model, inputs)
    if verdict.verdict == "right":
        try:
            found, verdict.warned = training.problems(case.build(), inputs)
        except Unbuildable as error:
            return Verdict(case.name, case.family, "unbuilt", str(error))
        refused = all(training.REFUSED in problem for problem in found)
        verdict.verdict = "right" if not found else "refused" if refused else "wrong"
        verdict.detail = " | ".join(found)
    if case.name in WITHOUT_RESIDUAL and verdict.detail.startswith("No residual branch was found"):
        verdict.verdict = "none"
    return verdict


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooSlow(f"more than {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _versions() -> dict[str, str]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "dropbp": dropbp.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }


if __name__ == "__main__":
    sys.exit(main())
