"""Paths and estimators: against sums that are written out, and on the command line."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from dropbp.bench.analysis.command import path_table, plot, way_table
from dropbp.bench.analysis.estimator import Estimator, analyze
from dropbp.bench.analysis.paths import Paths, path_lengths
from torch import Tensor, nn

import dropbp
from dropbp.cli import main as cli
from dropbp.discovery.discover import find
from dropbp.errors import ConfigError, StateError
from tests.common import trained
from tests.common.engine_models import tokens

RESULT = Path(__file__).parents[1] / "bench" / "results" / "analysis.json"


class Linear(nn.Module):
    """x <- x + W_l x: the gradient of a path is a product of its branches' matrices."""

    def __init__(self, branches: int = 4, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(branches))

    def forward(self, x_BD: Tensor) -> Tensor:
        for layer in self.layers:
            x_BD = x_BD + layer(x_BD)
        return x_BD


class Problem:
    """The net with a loss whose gradient at its output is known."""

    def __init__(self) -> None:
        self.net = Linear()
        self.x_BD, self.pull_BD = torch.randn(3, 5), torch.randn(3, 5)
        self.structure = find(self.net, self.x_BD, None).structure

    def loss(self) -> Tensor:
        return (self.net(self.x_BD.clone().requires_grad_(True) * 1.0) * self.pull_BD).sum()

    def along(self, path: tuple[int, ...]) -> Tensor:
        gradient = self.pull_BD
        for branch in reversed(path):
            gradient = gradient @ self.net.layers[branch].weight
        return gradient.detach()


def all_paths(branches: int) -> list[tuple[int, ...]]:
    return [path for k in range(branches + 1) for path in itertools.combinations(range(branches), k)]


def test_a_paths_gradient_is_the_product_of_its_branches():
    problem = Problem()
    paths = Paths(problem.net, problem.structure, problem.loss)
    for path in all_paths(4):
        torch.testing.assert_close(paths.gradient(path), problem.along(path))
    paths.close()


def test_the_gradients_of_all_paths_add_up_to_the_gradient():
    model = trained.llama(layers=2, width=16)
    structure, batch = find(model, None, None).structure, tokens()
    paths = Paths(model, structure, lambda: trained.loss_of(model, batch))
    whole = paths.gradient(None)
    parts = sum(paths.gradient(path) for path in all_paths(4))
    paths.close()
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_lengths_hold_counts_means_and_sums():
    problem = Problem()
    found = path_lengths(problem.net, problem.structure, problem.loss, samples=100)
    for k, entry in enumerate(found):
        gradients = [problem.along(path) for path in all_paths(4) if len(path) == k]
        norms = [float(g.norm()) for g in gradients]
        assert (entry.length, entry.count) == (k, math.comb(4, k))
        assert entry.norm == pytest.approx(sum(norms) / len(norms), rel=1e-5)
        assert entry.total == pytest.approx(sum(norms), rel=1e-5)
        assert entry.together == pytest.approx(float(sum(gradients).norm()), rel=1e-4)


def test_a_sample_of_paths_foretells_their_sum():
    problem = Problem()
    whole = path_lengths(problem.net, problem.structure, problem.loss, samples=6)[2].together
    sampled = [path_lengths(problem.net, problem.structure, problem.loss, 5, seed=s)[2].together for s in range(40)]
    assert math.sqrt(sum(s * s for s in sampled) / 40) == pytest.approx(whole, rel=0.1)


# -- estimators


def exact_moments(problem: Problem, masks: list[tuple[tuple[bool, ...], float]]) -> tuple[float, float, float]:
    """Relative bias, variance and error by enumeration, with masks written into the gradient by hand."""
    gradients = []
    with dropbp.enable(problem.net, 0.0, masks="exact", example_inputs=problem.x_BD) as handle:
        for mask, weight in [((False,) * 4, 0.0), *masks]:
            problem.net.zero_grad(set_to_none=True)
            with handle.fixed(mask):
                problem.loss().backward()
            flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in problem.net.parameters()]
            gradients.append((torch.cat([g.flatten() for g in flat]).double(), weight))
    problem.net.zero_grad(set_to_none=True)
    true = gradients[0][0]
    mean = sum(weight * g for g, weight in gradients)
    variance = sum(weight * float((g - mean).square().sum()) for g, weight in gradients)
    error = sum(weight * float((g - true).square().sum()) for g, weight in gradients)
    square = float(true.square().sum())
    return float((mean - true).norm()) / math.sqrt(square), variance / square, error / square


def estimate(problem: Problem, masks: str, scaling: str = "none", draws: int = 600) -> Estimator:
    found = analyze(
        problem.net, problem.loss, drop_rates=(0.5,), ways=((masks, scaling),), samples=1, draws=draws,
        example_inputs=problem.x_BD,
    )  # fmt: skip
    return found.estimators[0]


def test_independent_masks_have_the_moments_of_all_masks_together():
    problem = Problem()
    every = [(mask, 1 / 16) for mask in itertools.product((False, True), repeat=4)]
    bias, variance, error = exact_moments(problem, every)
    found = estimate(problem, "independent")
    assert found.bias == pytest.approx(bias, rel=0.1)
    assert found.variance == pytest.approx(variance, rel=0.15)
    assert found.error == pytest.approx(error, rel=0.1)


def test_scaling_takes_the_bias_of_independent_masks_and_brings_variance():
    plain, scaled = (estimate(Problem(), "independent", scaling) for scaling in ("none", "unbiased"))
    assert scaled.bias < 0.15 < plain.bias and scaled.cosine > 0.98
    assert scaled.error > plain.error


def test_nested_masks_are_taken_all_and_keep_every_tensors_direction():
    problem = Problem()
    found = estimate(problem, "nested")
    with dropbp.enable(problem.net, 0.5, example_inputs=problem.x_BD) as handle:
        edges = sorted({0.0, *handle.rates, 1.0})
        masks = [(tuple(rate > low for rate in handle.rates), high - low) for low, high in itertools.pairwise(edges)]
    bias, variance, error = exact_moments(problem, masks)
    assert (found.bias, found.variance, found.error) == pytest.approx((bias, variance, error), rel=1e-4)
    assert found.tensor_cosine == pytest.approx(1.0, abs=1e-6)


def test_without_dropping_there_is_neither_bias_nor_variance():
    problem = Problem()
    found = analyze(
        problem.net, problem.loss, drop_rates=(0.0,), ways=(("exact", "none"),), samples=1, draws=3,
        example_inputs=problem.x_BD,
    ).estimators[0]  # fmt: skip
    assert (found.bias, found.variance, found.error) == pytest.approx((0.0, 0.0, 0.0), abs=1e-3)


def test_the_analysis_leaves_the_model_as_it_was():
    model = trained.llama(layers=2, width=16).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [vars(module).keys() for module in model.modules()]
    analyze(model, lambda: trained.loss_of(model, tokens()), drop_rates=(0.5,), samples=2, draws=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [vars(module).keys() for module in model.modules()] == attributes
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_what_makes_no_sense_is_refused():
    model = trained.llama(layers=1, width=16)
    with pytest.raises(ConfigError, match="samples >= 1 and draws >= 2"):
        analyze(model, lambda: trained.loss_of(model, tokens()), draws=1)
    with dropbp.enable(model), pytest.raises(StateError, match="already enabled"):
        analyze(model, lambda: trained.loss_of(model, tokens()))


# -- the command and its result


def test_the_command_prints_tables_and_writes_json_and_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dropbp.bench.analysis.command.TOY_DRAWS", 4)
    file, image = tmp_path / "analysis.json", tmp_path / "analysis.png"
    sizes = ["--layers", "1", "--width", "16", "--steps", "2", "--samples", "2", "--draws", "2"]
    assert cli.main(["bench", "analysis", *sizes, "--output", str(file), "--plot", str(image)]) == 0
    printed = capsys.readouterr().out
    found: dict[str, Any] = json.loads(file.read_text())
    assert path_table(found["llama"]) in printed and way_table(found["linear"]) in printed
    assert image.read_bytes().startswith(b"\x89PNG")
    assert found["config"]["layers"] == 1 and len(found["llama"]["paths"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--draws", "1"], "--draws 1 must be at least 2"), (["--width", "20"], "must be a multiple of 8")],
)
def test_the_command_refuses_in_one_line(arguments, message, capsys):
    assert cli.main(["bench", "analysis", *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_committed_result_says_what_the_theory_says(tmp_path):
    found = json.loads(RESULT.read_text())
    ways = {(way["masks"], way["scaling"], way["drop_rate"]): way for way in found["llama"]["estimators"]}
    for rate in (0.5, 0.875):
        assert ways["nested", "none", rate]["tensor_cosine"] >= ways["independent", "none", rate]["tensor_cosine"]
        assert ways["independent", "unbiased", rate]["variance"] > ways["independent", "none", rate]["variance"]
    plot(found, tmp_path / "analysis.png")
    page = (RESULT.parents[2] / "docs" / "theory.md").read_text()
    for table in (path_table(found["llama"]), way_table(found["llama"]), way_table(found["linear"])):
        assert table in page
