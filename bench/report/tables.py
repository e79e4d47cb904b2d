"""`docs/results.md` and its plots, from the result files alone."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dropbp.errors import ConfigError
from dropbp.files import write_text

from ..common import markdown, records
from ..common.models import TUNINGS
from ..common.setup import SAMPLERS
from ..throughput.command import KIND
from ..throughput.growth import KIND as GROWTH_KIND
from . import cached, paper
from .derive import (
    CLOCK_NAMES,
    Figures,
    Length,
    backward_shares,
    clocks_of,
    figures,
    grown,
    length_ratios,
    memory_title,
    share_error,
    title_of,
)
from .plots import plot_all

SEQLEN_KIND = "seqlen"
DOCS = Path("docs")
PAGE = "results.md"
OTHER_PAGES = {
    "learning": "learning.md",
    "sensitivity": "sensitivity.md",
    "overhead": "overhead.md",
    "recipes": "recipes.md",
}
TARGET_SHARE, TARGET_CHECKPOINTED_RATIO, TARGET_RATE = 0.97, 0.42, 0.875
TARGET_TUNINGS = ("full", "lora")
TARGET_COLUMNS = (
    "run",
    "sequence",
    "p",
    "step / plain",
    "limit / plain",
    "share of the possible saving",
    "the same, CPU time",
    "reference",
    "backward alone",
)
THROUGHPUT_COLUMNS = (
    "variant",
    "forward s",
    "backward s",
    "optimizer s",
    "total s",
    "step s (quartiles)",
    "ratio",
    "limit",
    "share",
    "tokens/s",
    "samples/s",
    "peak GiB",
    "activations",
)
AT_LEAST = "≥ "  # the search was cut short by time, so the true border may be higher

INTRO = """# Results

`dropbp bench tables` makes this page from the files in `bench/results/`. `make bench` runs the measurements that suit a
CPU, `make bench-gpu` those at the paper's settings. All variants of a run take turns in one process, with a new mask in
each step.
"""
HOW_TO_READ = """\
| term | meaning |
|---|---|
| *step* | forward and backward; the optimizer is timed separately, and *total* includes it; medians over rounds |
| *ratio* | step time relative to the plain step |
| *limit* | the shortest possible step, relative to the plain step: the forward (its dropped share unrecorded), the \
kept share of the blocks' backward, and the rest of the backward, all measured in the same run |
| *share* | the share of the possible saving that is reached, (plain - step) / (plain - limit), with its standard \
error from the scatter between rounds; above 100 % if a step saves more than FLOPs, such as memory allocations |
| *backward alone* | the same share without the forward, from a straight line through the steps of all rates; more \
precise with few rounds |
| *exact* | each step drops a random set of branches, within one branch of the budget, as the paper does |
| *nested* | the default: each step trains the top of the model down to a random depth; times are means over steps, \
memory is that of the largest step, and the deepest steps use activation checkpointing |
| *detach*, *reference* | the method of the reference implementation: the branch is recorded and its output detached |
| *CPU time* | the process's time on all processors, which varies less than wall-clock time on a shared machine |
| *activations* | peak memory of a step beyond weights and optimizer states, gradients included |

Under gradient checkpointing, a block with one kept branch recomputes what that branch needs from the other. The limit
does not include this work, so random masks reach a lower share there, most of all at p = .5.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--output", type=Path, default=records.RESULTS, metavar="DIR", help="the result files")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="page and plots (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Write the page and the plots."""
    runs = {kind: _shown_runs(args.output, kind) for kind in (KIND, GROWTH_KIND, SEQLEN_KIND)}
    if not any(runs.values()):
        raise ConfigError(f"{args.output} holds no finished runs. Run `dropbp bench throughput` first.")
    images = plot_all(runs[KIND], runs[SEQLEN_KIND], args.docs / "img")
    write_text(args.docs / PAGE, page(args.output, runs, images, args.docs))
    sys.stdout.write(f"{args.docs / PAGE}\n")
    return 0


def _shown_runs(root: Path, kind: str) -> list[records.Record]:
    runs = [run for run in records.read_all(root, kind) if not run["name"].startswith(paper.REHEARSALS)]
    return sorted(runs, key=lambda run: _place(run["configuration"])) if kind == KIND else runs


def _place(configuration: Mapping[str, Any]) -> tuple[Any, ...]:
    """Sort key: by model, with full, LoRA and QLoRA of the same setting side by side."""
    c = configuration
    return c["model"], c["dtype"], c["compiled"], c["checkpointing"], TUNINGS.index(c["tuning"]), c["loss"]


def page(root: Path, runs: dict[str, list[records.Record]], images: Sequence[str], docs: Path) -> str:
    """The whole page as Markdown."""
    sections = [
        INTRO,
        "## Targets\n\n" + targets_table(runs[KIND]),
        "## Compared with the paper\n\n" + paper.table(paper.compare(root)),
        "## Time and memory of a step\n\n" + HOW_TO_READ,
        *[f"![{Path(image).stem}](img/{image})" for image in images if image.startswith("throughput")],
        *[throughput_section(run) for run in runs[KIND]],
        _if_any("## The largest micro-batch\n\n", runs[GROWTH_KIND], growth_section),
        _if_any(f"## The longest sequence\n\n{_how_long(runs[SEQLEN_KIND])}\n\n", runs[SEQLEN_KIND], None),
        *[f"![{Path(image).stem}](img/{image})" for image in images if image.startswith("seqlen")],
        seqlen_tables(runs[SEQLEN_KIND]),
        cached.section(root),
        _unfinished_section(root),
        _other_pages(docs),
    ]
    return "\n\n".join(section.strip() for section in sections if section.strip()) + "\n"


def _how_long(runs: Iterable[records.Record]) -> str:
    lengths = (length for run in runs for how in SAMPLERS for length in length_ratios(run, how).values())
    cut_short = " ≥: the search was cut short." if any(length.at_least for length in lengths) else ""
    return f"The micro-batch is 1, and memory also holds gradients and optimizer states.{cut_short}"


def _if_any(title: str, runs: Sequence[records.Record], section: Any) -> str:
    if not runs:
        return ""
    return title + "\n\n".join(section(run) for run in runs) if section else title


# -- targets


def targets_table(runs: Iterable[records.Record]) -> str:
    """Share of the possible saving by run and rate, and the ratio under checkpointing, each with its target."""
    known = list(runs)
    lines = [
        f"- In full fine-tuning and with LoRA, a step reaches {TARGET_SHARE:.0%} of the possible saving.",
        f"- In full fine-tuning with gradient checkpointing at p = {TARGET_RATE}, a step takes at most",
        f"  {TARGET_CHECKPOINTED_RATIO} of the plain step's time, also with checkpointing.",
        "",
        "Times are wall-clock times unless stated otherwise.",
        "",
        markdown.table(TARGET_COLUMNS, [row for run in known for row in _target_rows(run)]),
    ]
    return "\n".join([*lines, "", *(_mean_of_rows(known, clock) for clock in CLOCK_NAMES)]).rstrip()


def _mean_of_rows(runs: Sequence[records.Record], clock: str) -> str:
    """Mean over all rows that have a target; single rows scatter with the machine's noise."""
    found = [f for run in runs if clock in clocks_of(run) and _has_target(run) for f in figures(run, clock)]
    shares = [f.share for f in found if f.how == paper.OURS and f.share is not None]
    if len(shares) < 2:
        return ""
    error = statistics.stdev(shares) / math.sqrt(len(shares))
    mean = f"- Mean of the {len(shares)} rows with the first target, {CLOCK_NAMES[clock]}: "
    mean += f"{100 * statistics.fmean(shares):.1f} ± {100 * error:.1f} %"
    reference = [f.share for f in found if f.how == "detach" and f.share is not None]
    if reference:
        mean += (
            f"; of the reference implementation in {len(reference)} of them: {_percent(statistics.fmean(reference))}"
        )
    return f"{mean}."


def _has_target(run: records.Record) -> bool:
    configuration = run["configuration"]
    return configuration["tuning"] in TARGET_TUNINGS and not configuration["checkpointing"]


def _target_rows(run: records.Record) -> list[tuple[str, ...]]:
    """One row per rate."""
    by_clock = {clock: {f.name: f for f in figures(run, clock)} for clock in clocks_of(run)}
    backward = backward_shares(run, paper.OURS, "wall")
    rows = []
    for f in [f for f in by_clock["wall"].values() if f.how == paper.OURS]:
        cells = (
            title_of(run),
            str(run["configuration"]["sequence_length"]),
            f"{f.drop_rate:g}",
            _ratio_cell(run, f),
            _fixed(f.limit_ratio),
            *[_share_cell(run, by_clock.get(clock, {}).get(f.name), clock) for clock in CLOCK_NAMES],
            _share_cell(run, by_clock["wall"].get(f"detach-{f.drop_rate:g}"), "wall"),
            _plus_minus(*backward.get(f.drop_rate, (None, None))),
        )
        rows.append(cells)
    return rows


def _ratio_cell(run: records.Record, f: Figures) -> str:
    configuration = run["configuration"]
    has_target = configuration["checkpointing"] and configuration["tuning"] == "full" and f.drop_rate == TARGET_RATE
    if f.ratio is None or not has_target:
        return _fixed(f.ratio)
    return f"{f.ratio:.3f} {_verdict(f.ratio <= TARGET_CHECKPOINTED_RATIO)}"


def _share_cell(run: records.Record, f: Figures | None, clock: str) -> str:
    if f is None:
        return "-"
    cell = _plus_minus(f.share, share_error(run, f.name, clock))
    if f.share is None or f.how != paper.OURS or not _has_target(run):
        return cell
    return f"{cell} {_verdict(f.share >= TARGET_SHARE)}"


def _plus_minus(value: float | None, error: float | None) -> str:
    return _percent(value) if value is None or error is None else f"{100 * value:.1f} ± {100 * error:.1f} %"


def _verdict(met: bool) -> str:
    return "✓" if met else "✗"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# -- sections


def throughput_section(run: records.Record) -> str:
    """One run: every variant, by every clock."""
    tables = [f"{CLOCK_NAMES[clock].capitalize()}:\n\n{_throughput_table(run, clock)}" for clock in clocks_of(run)]
    return f"### {title_of(run)}\n\n{_conditions(run)}\n\n" + "\n\n".join(tables)


def _throughput_table(run: records.Record, clock: str) -> str:
    return markdown.table(THROUGHPUT_COLUMNS, map(_figures_cells, figures(run, clock)))


def _figures_cells(f: Figures) -> tuple[str, ...]:
    return (
        f.name,
        f"{f.forward_s:.3f}",
        f"{f.backward_s:.3f}",
        f"{f.optimizer_s:.3f}",
        f"{f.step_s + f.optimizer_s:.3f}",
        f"{f.step_s:.3f} ({f.step_spread_s[0]:.3f}-{f.step_spread_s[1]:.3f})",
        _fixed(f.ratio),
        _fixed(f.limit_ratio),
        _percent(f.share),
        f"{f.tokens_per_s:.0f}",
        f"{f.samples_per_s:.2f}",
        _fixed(f.peak_gib),
        _fixed(f.activations_ratio),
    )


def _conditions(run: records.Record) -> str:
    configuration, device = run["configuration"], run["device"]
    words = [
        f"sequence {configuration['sequence_length']}, micro-batch {configuration['batch_size']}",
        str(device.get("generation") or device["name"]),
        *([f"{configuration['threads']} thread(s)"] if configuration.get("threads") else []),
        f"torch {run['versions']['torch']}",
        f"{_rounds_done(run)} rounds",
        *([_graphs(run)] if configuration["compiled"] else []),
        run["started"][:10],
    ]
    return "; ".join(words) + "."


def _rounds_done(run: records.Record) -> int:
    """Number of rounds done, fewer than requested if time ran out."""
    return max((len(steps) for steps in run["steps"].values()), default=0)


def _graphs(run: records.Record) -> str:
    return f"{run['compiled_graphs']} graphs compiled in the warm-up, {run['compiled_graphs_late']} after it"


def growth_section(run: records.Record) -> str:
    """One run: the largest micro-batch at each rate, and the throughput there."""
    clock = clocks_of(run)[-1]
    memory = f"Memory: {run['budget_bytes'] / (1 << 30):.2f} GiB ({run['budget_is']})."
    title = f"### {title_of(run)}\n\n{memory} {_conditions(run)} {CLOCK_NAMES[clock].capitalize()}."
    rows = []
    for row in grown(run, clock):
        speed = "-" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.0f}"
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        size = f"{AT_LEAST if row['at_least'] else ''}{row['batch_size']}"
        rows.append((row["how"], f"{row['drop_rate']:g}", size, speed, ratio))
    columns = ("variant", "p", "largest micro-batch", "tokens/s there", "ratio to plain")
    return f"{title}\n\n{markdown.table(columns, rows)}"


def seqlen_tables(runs: Sequence[records.Record]) -> str:
    """One table per model and memory size: one row per training, one column per rate."""
    groups: dict[str, list[records.Record]] = {}
    for run in runs:
        groups.setdefault(memory_title(run), []).append(run)
    return "\n\n".join(f"### {title}\n\n{_seqlen_table(group)}" for title, group in groups.items())


def _seqlen_table(runs: Sequence[records.Record]) -> str:
    rates = sorted({rate for run in runs for rate in length_ratios(run)})
    head = ["training", "masks", *("plain" if rate == 0 else f"p = {rate:g}" for rate in rates)]
    rows = []
    for run in runs:
        for how in SAMPLERS:
            ratios = length_ratios(run, how)
            rows.append([title_of(run).partition(", ")[2], how, *(_length_cell(ratios.get(rate)) for rate in rates)])
    return markdown.table(head, rows, "llr")


def _length_cell(entry: Length | None) -> str:
    if entry is None:
        return "-"
    text = f"{entry.length}" if entry.ratio is None or entry.ratio == 1 else f"{entry.length} ({entry.ratio:.2f}x)"
    return f"{AT_LEAST}{text}" if entry.at_least else text


def _unfinished_section(root: Path) -> str:
    """Every run that failed or was cancelled, and every part that failed inside a run."""
    lines = []
    for kind in (KIND, GROWTH_KIND, SEQLEN_KIND):
        for run in [*records.read_unfinished(root, kind), *_shown_runs(root, kind)]:
            reasons = [f"{f.get('variant', '')} {f['type']}: {f['message'][:160]}".strip() for f in run["failures"]]
            if reasons or run["status"] != "finished":
                lines.append(f"- {kind} {run['name']}, {run['started']}: {run['status']}. {' '.join(reasons)}")
    return "## Failed and cancelled runs\n\n" + "\n".join(lines) if lines else ""


def _other_pages(docs: Path) -> str:
    found = [f"- [{name}]({name}.md)" for name in OTHER_PAGES if (docs / f"{name}.md").is_file()]
    return "## Other parts of the bench\n\n" + "\n".join(found) if found else ""
