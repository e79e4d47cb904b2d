"""Thousands of cycles of enable, train and remove, and thousands of steps: nothing leaks, nothing drifts."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import MetadataPathFinder
from typing import Any

import psutil
import torch
from torch import nn

import dropbp
from dropbp.engine.runtime import REMEMBERED_FORWARDS, ForwardRecord
from dropbp.engine.side_outputs import CallPlan
from dropbp.masks.plan import ForwardPlan
from tests.common.engine_models import (
    assert_same_gradients,
    paper_gradients,
    plain_batch,
    plain_loss,
    plain_net,
    take_gradients,
    tiny_llama,
    tokens,
)

OBJECTS = 50  # tolerance for the interpreter's caches
PARTS = 5
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"masks": "exact", "scaling": "unbiased"},
    {"masks": "pool", "boundary": "sublayer"},
    {"masks": "independent", "fill": "zero"},
)


@contextlib.contextmanager
def young_heap() -> Iterator[None]:
    """Exclude existing objects from garbage collection, which makes each collection fast."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@young_heap()
def cycles(count: int) -> dict[str, Any]:
    """Enable, train, sometimes calibrate, and remove: the model is restored, and nothing holds the handle.

    Half of the cycles share one model, the others have a model each; other models and classes are compared at the end.
    """
    kept, other = plain_net(blocks=1), plain_net(blocks=1)
    classes = {type(module): dict(vars(type(module))) for module in kept.modules()}
    untouched = [dict(vars(module)) for module in other.modules()]
    before, figures = [set(vars(module)) for module in kept.modules()], []
    for number in range(count):
        model = kept if number % 2 else plain_net(blocks=1)
        alive = _cycle(model, number)
        del model
        if number % 100 == 0:
            gc.collect()
            assert alive() is None, f"the handle of cycle {number} is still held"
        if (number + 1) % (count // PARTS) == 0:
            figures.append(_memory())
    assert [set(vars(module)) for module in kept.modules()] == before
    assert [dict(vars(module)) for module in other.modules()] == untouched
    assert all(dict(vars(kind)) == content for kind, content in classes.items())
    return {"cycles": count, **_flat(figures)}


def _cycle(model: nn.Module, number: int) -> weakref.ref[dropbp.Handle]:
    with dropbp.enable(model, example_inputs=plain_batch(), seed=number, **OPTIONS[number % len(OPTIONS)]) as handle:
        plain_loss(model).backward()
        if number % 10 == 0:
            handle.calibrate(lambda: plain_loss(model))
    model.zero_grad()
    return weakref.ref(handle)


@young_heap()
def models_are_released(count: int) -> dict[str, Any]:
    """A model that is deleted while enabled is freed, along with its handle."""
    for number in range(count):
        model = plain_net(blocks=1)
        handle = dropbp.enable(model, example_inputs=plain_batch(), **OPTIONS[number % len(OPTIONS)])
        plain_loss(model).backward()
        alive = weakref.ref(model), weakref.ref(handle)
        del model, handle
        gc.collect()
        assert [reference() for reference in alive] == [None, None]
    return {"cycles": count}


def threads(count: int, workers: int = 4) -> dict[str, Any]:
    """Several threads at once, each with cycles of its own model: masks and gradients are those of a single thread."""

    nets = [(plain_net(), plain_net()) for _ in range(workers)]  # here, as their weights come from one generator

    def train(seed: int) -> int:
        plain, model = nets[seed]
        for number in range(count // workers):
            with dropbp.enable(model, masks="exact", example_inputs=plain_batch(), seed=seed + number) as handle:
                got = take_gradients(model, plain_loss(model))
                names, mask = [branch.name for branch in handle.branches], handle.mask
            assert mask is not None
            assert_same_gradients(got, paper_gradients(plain, names, mask, plain_loss))
        return count // workers

    with ThreadPoolExecutor(workers) as pool:
        return {"cycles": sum(pool.map(train, range(workers))), "threads": workers}


@young_heap()
def long_run(steps: int, masks: str = "nested") -> dict[str, Any]:
    """One long run: realised drop rate, and CPU time per step and memory at the end relative to the start."""
    model = tiny_llama(layers=4, hidden_size=32, intermediate_size=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step_s, figures, losses = [], [], []
    inputs = {"input_ids": tokens(), "labels": tokens()}  # of the run's own shape, which makes rates exact
    with dropbp.enable(model, masks=masks, example_inputs=inputs) as handle:
        for step in range(steps):
            begin_s = time.process_time()
            losses.append(_step(model, optimizer, step))
            step_s.append(time.process_time() - begin_s)
            if (step + 1) % (steps // PARTS) == 0:
                figures.append(_memory())
        report = handle.report()
    rates = [(entry["rate"], entry["realised_rate"]) for entry in report["branches"]]
    return {
        "steps": report["forwards"],
        "masks": masks,
        "drop_rate": report["drop_rate"],
        "realised_drop_rate": round(report["realised_drop_rate"], 5),
        "largest_deviation_of_a_branch": round(max(abs(a - b) for a, b in rates), 5),
        "loss": [round(statistics.fmean(losses[:20]), 3), round(statistics.fmean(losses[-20:]), 3)],
        **_drift(step_s),
        **_flat(figures),
    }


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    batch = tokens(seed=step % 5)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _drift(step_s: list[float]) -> dict[str, float]:
    """Median CPU times in the second and in the last fifth; allocators settle in the first."""
    part = len(step_s) // PARTS
    early, late = statistics.median(step_s[part : 2 * part]), statistics.median(step_s[-part:])
    return {"early_step_cpu_ms": round(early * 1e3, 3), "late_step_cpu_ms": round(late * 1e3, 3)}


def _memory() -> tuple[Counter[str], int]:
    """Python objects by type, and memory, without the records of the last forwards, of which a bounded number is kept.

    Before Python 3.11 the attributes of each record are a separate object, a dict.
    """
    MetadataPathFinder().invalidate_caches()  # Python's cache, which grows when a folder it searches changes
    gc.collect()
    objects = gc.get_objects()
    records = [each for each in objects if type(each) in (ForwardRecord, ForwardPlan, CallPlan)]
    assert len(records) <= 2 * REMEMBERED_FORWARDS, f"{len(records)} records of forwards"
    left_out = {*map(id, records), *(id(vars(each)) for each in records if isinstance(each, ForwardRecord))}
    kinds = Counter(type(each).__qualname__ for each in objects if id(each) not in left_out)
    del kinds["LogRecord"]  # kept by whatever captures the log
    return kinds, int(psutil.Process().memory_info().rss)


def _flat(figures: Sequence[tuple[Counter[str], int]]) -> dict[str, Any]:
    """Python objects and memory after the second part and at the end.

    Raises:
        AssertionError: there are more objects at the end.
    """
    (objects, rss), (late_objects, late_rss) = figures[1], figures[-1]
    more = late_objects.total() - objects.total()
    grown = ", ".join(f"{count} {kind}" for kind, count in (late_objects - objects).most_common(5))
    assert more < OBJECTS, f"{objects.total()} objects became {late_objects.total()}: {grown}"
    return {"more_objects": more, "rss_growth_mib": round((late_rss - rss) / 2**20, 2)}
