"""`dropbp bench analysis`: gradients by path length, and bias and variance of each mask sampler, on a real model.

The model is a small byte-level Llama, trained briefly on source code and analysed on one batch of English, as at the
start of a fine-tuning. It is compared with the linear residual network of `docs/theory.md`.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropbp.cli.figures import new_figure, save_figure
from dropbp.cli.libraries import quiet
from dropbp.cli.plan import progress_note, publish
from dropbp.errors import ConfigError

from ..common.markdown import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor, nn

TOY_BRANCHES, TOY_WIDTH, TOY_ROWS, TOY_DRAWS = 5, 8, 16, 1000
_COLUMNS = ("p", "masks", "scaling", "bias", "cosine", "per tensor", "variance", "mean-square error")
Note = Callable[[str], None]
Found = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """The model, its training, and the sample sizes."""

    layers: int = 6
    width: int = 64
    steps: int = 200
    rows: int = 8
    length: int = 64
    learning_rate: float = 3e-3
    samples: int = 24
    draws: int = 96
    seed: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    for name, text in (
        ("layers", "blocks of the model"),
        ("width", "of its residual stream"),
        ("steps", "of training before the analysis"),
        ("samples", "paths of each length"),
        ("draws", "masks of each sampler"),
        ("seed", "of everything"),
    ):
        parser.add_argument(f"--{name}", type=int, default=getattr(Setting, name), help=f"{text} (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw a PNG here (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Train, analyse, print and write.

    Raises:
        DropBPError: bad input; the message is one line.
    """
    setting = _setting(args)
    with quiet():
        found = analyse(setting, progress_note())
    publish(found, args, tables, plot)
    return 0


def analyse(setting: Setting, note: Note | None = None) -> Found:
    """Analyse both models; the result is in plain types."""
    import torch

    from .estimator import analyze

    note = note or (lambda line: None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        llama, closure, loss = _trained_llama(setting, note)
        options: Any = {"samples": setting.samples, "seed": setting.seed, "progress": note}
        real = analyze(llama, closure, draws=setting.draws, **options)
        note("the linear residual net")
        toy, toy_closure, inputs = _toy()
        linear = analyze(toy, toy_closure, example_inputs=inputs, draws=TOY_DRAWS, drop_rates=(0.5,), **options)
    return {
        "kind": "dropbp analyze",
        "format": 1,
        "config": asdict(setting),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "training_loss": loss,
        "llama": real.as_dict(),
        "linear": linear.as_dict(),
    }


def tables(found: Found) -> str:
    """Markdown tables of paths by length and of mask samplers, for both models."""
    parts = []
    for name, title in (("llama", "Llama trained on source code, batch of English"), ("linear", "Linear residual net")):
        parts += [
            f"{title}: paths by length",
            path_table(found[name]),
            f"{title}: mask samplers",
            way_table(found[name]),
        ]
    return "\n\n".join(parts)


def path_table(model: Found) -> str:
    """Markdown table; norms are relative to the gradient along all paths that pass no branch."""
    unit = model["paths"][0]["norm"] or 1.0
    rows = [
        (
            str(path["length"]),
            f"{path['count']:,}",
            f"{path['norm'] / unit:.2g}",
            f"{path['total'] / unit:.3g}",
            _summed(path["together"] / unit),
        )
        for path in model["paths"]
    ]
    return table(("branches passed", "paths", "one path", "all, at most", "all, summed"), rows, "r")


def _summed(value: float) -> str:
    return f"{value:.3g}" if value > 0 else "-"  # lost in the sampling noise


def way_table(model: Found) -> str:
    """Markdown table with one row per rate, mask sampler and scaling."""
    rows = []
    for entry in model["estimators"]:
        numbers = [entry[key] for key in ("bias", "cosine", "tensor_cosine", "variance", "error")]
        cells = [f"{entry['drop_rate']:g}", entry["masks"], entry["scaling"], *(f"{number:.3g}" for number in numbers)]
        rows.append(cells)
    return table(_COLUMNS, rows, "rllr")


def plot(found: Found, path: Path) -> None:
    """Plot gradients by path length, and bias against variance of each mask sampler, as a PNG file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = new_figure(11, 4)
    lengths, estimators = figure.subplots(1, 2)
    _draw_lengths(lengths, found["llama"]["paths"])
    _draw_estimators(estimators, found["llama"]["estimators"])
    save_figure(figure, path, dpi=110)


def _draw_lengths(axes: Axes, paths: list[Found]) -> None:
    lengths, unit = [path["length"] for path in paths], paths[0]["norm"]
    for key, label in (("norm", "one path"), ("total", "all, at most"), ("together", "all, summed")):
        values = [path[key] / unit or float("nan") for path in paths]  # 0: lost in the sampling noise
        axes.plot(lengths, values, marker="o", markersize=3, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("branches passed")
    axes.set_ylabel("gradient, relative to the bare stream's")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_estimators(axes: Axes, estimators: list[Found]) -> None:
    names = list(dict.fromkeys((entry["masks"], entry["scaling"]) for entry in estimators))
    rates = list(dict.fromkeys(entry["drop_rate"] for entry in estimators))
    for entry in estimators:
        name = (entry["masks"], entry["scaling"])
        first = entry["drop_rate"] == rates[0]
        axes.scatter(
            entry["variance"], entry["bias"], color=f"C{names.index(name)}", marker="o" if first else "s",
            label=f"{name[0]}, {name[1]}" if first else None,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel(f"variance (circles p = {rates[0]:g}, squares p = {rates[-1]:g})")
    axes.set_ylabel("bias")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _trained_llama(setting: Setting, note: Note) -> tuple[nn.Module, Callable[[], Tensor], float]:
    """The model, one batch of English as a closure, and the last training loss."""
    from ..common.corpus import Windows, english_prose, source_code
    from ..common.small import Base, new_model, train_briefly

    model: Any = new_model(Base(setting.layers, setting.width, 4, setting.length, seed=setting.seed))
    size = (setting.rows, setting.length, setting.seed)
    code, english = Windows(source_code(400_000), *size), Windows(english_prose(400_000), *size)

    def progress(step: int) -> None:
        note(f"training the model, step {step} of {setting.steps}")

    loss = train_briefly(model, code.batch, setting.steps, setting.learning_rate, progress)
    ids_BS = english.batch()
    return model, lambda: model(input_ids=ids_BS, labels=ids_BS).loss, loss


def _toy() -> tuple[nn.Module, Callable[[], Tensor], Tensor]:
    """Five times x <- x + W_l x, and a squared loss. Branches are linear, so only products of masks matter."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(TOY_WIDTH, TOY_WIDTH, bias=False) for _ in range(TOY_BRANCHES))

        def forward(self, x_BD: Tensor) -> Tensor:
            for layer in self.layers:
                x_BD = x_BD + layer(x_BD)
            return x_BD

    torch.manual_seed(0)
    net, x_BD, target_BD = Net(), torch.randn(TOY_ROWS, TOY_WIDTH), torch.randn(TOY_ROWS, TOY_WIDTH)
    return net, lambda: (net(x_BD.clone().requires_grad_(True) * 1.0) - target_BD).square().mean(), x_BD


def _setting(args: argparse.Namespace) -> Setting:
    chosen = {name: getattr(args, name) for name in ("layers", "width", "steps", "samples", "draws", "seed")}
    for name, least in (("layers", 1), ("width", 8), ("steps", 1), ("samples", 1), ("draws", 2)):
        if chosen[name] < least:
            raise ConfigError(f"--{name} {chosen[name]} must be at least {least}.")
    if chosen["width"] % 8:
        raise ConfigError(f"--width {chosen['width']} must be a multiple of 8: four heads of an even width.")
    return Setting(**chosen)
