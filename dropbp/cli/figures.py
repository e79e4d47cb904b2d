"""Plots as PNG files, drawn without a display and without pyplot's global state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dropbp.errors import MissingDependencyError
from dropbp.files import new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches. Raises MissingDependencyError if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "plots need matplotlib, which is not installed; install it with: pip install 'dropbp[bench]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Name both axes, draw a grid, and a legend if the lines have names."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def save_figure(figure: Figure, path: Path, dpi: int = 130) -> None:
    """Write the figure as a PNG file, whole or not at all; nothing in it depends on matplotlib's version."""
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi, metadata={"Software": None})
