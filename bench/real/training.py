"""One fine-tuning of a pretrained model with common settings, and its results, as one plain record.

Chat template, loss on answers alone, padding on the left, rows of similar length together, AdamW, clipping, a learning
rate that warms up and then decays along a cosine to zero. A method takes as many steps as the FLOPs of the plain steps
allow, or just as many steps, and then ends sooner. Its schedule has that length: with a decaying rate, a run cut short
is a different run, so each has its own.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

import dropbp
from dropbp.cli.examples import Example, collate_left
from dropbp.cli.models import with_lora
from dropbp.inputs import IGNORED

from ..learning import rivals
from ..learning.costs import Costs
from .tasks import TASKS, Data

WARMUP_SHARE = 0.1
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
SORTED_BATCHES = 8  # batches whose rows are sorted by length together
ROUNDS = 8  # until the number of steps at equal FLOPs is found
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}


@dataclass(frozen=True)
class Run:
    """A run of the bench: a method at a drop rate and learning rate.

    Attributes:
        task: of `tasks.TASKS`.
        epochs: passes of plain training over its rows. One: every step of every run has fresh rows.
        tuning: `full` or `lora`.
        equal: `flops`, as many steps as the FLOPs of the plain steps allow, without those that a cache saves; or
            `steps`, as many as plain training.
    """

    method: str
    drop_rate: float
    learning_rate: float
    task: str = "solutions"
    tuning: str = "full"
    plain_steps: int = 40
    epochs: int = 1
    seed: int = 0
    equal: str = "flops"

    @property
    def name(self) -> str:
        """Name of its file."""
        rate = f"p{self.drop_rate:g}" if self.drop_rate else "p0"
        length = f"{self.plain_steps}x{self.epochs}" + ("-steps" if self.equal == "steps" else "")
        return f"{self.task}--{self.tuning}--{length}--{self.method}--{rate}--lr{self.learning_rate:g}--seed{self.seed}"


class Source:
    """Models, on a device, and rows, read once for all runs."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self._models: dict[Callable[..., Any], tuple[Any, Any, dict[str, Tensor]]] = {}
        self._data: dict[str, Data] = {}

    def data(self, task: str) -> Data:
        """The rows of a task."""
        if task not in self._data:
            self._data[task] = TASKS[task].load(self._loaded(task)[1], TASKS[task].longest)
        return self._data[task]

    def batch(self, task: str, rows: Sequence[Example]) -> dict[str, Tensor]:
        """Rows of a task as a batch on the device, padded on the left."""
        batch = collate_left(rows, int(self._loaded(task)[1].pad_token_id))
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _loaded(self, task: str) -> tuple[Any, Any, dict[str, Tensor]]:
        load = TASKS[task].model
        if load not in self._models:
            model, tokenizer = load()
            model.to(self.device)
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            self._models[load] = model, tokenizer, weights
        return self._models[load]

    def fresh(self, run: Run) -> Any:
        """A fresh copy of the loaded model, in training mode, with adapters if the run wants them."""
        model, _, weights = self._loaded(run.task)
        model.load_state_dict(weights)
        model.requires_grad_(True)
        tuned = with_lora(model, run.seed, **LORA) if run.tuning == "lora" else model
        return tuned.train()


def batches(examples: Sequence[Example], seed: int, batch_size: int) -> Iterator[list[Example]]:
    """Endless passes over the rows, each in a new order, with rows of similar length in a batch."""
    order = random.Random(seed)
    while True:
        rows = order.sample(examples, len(examples))
        size = batch_size * SORTED_BATCHES
        made = []
        for start in range(0, len(rows), size):
            near = sorted(rows[start : start + size], key=lambda row: len(row["input_ids"]))
            made += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
        order.shuffle(made)
        yield from (batch for batch in made if len(batch) == batch_size)


def train(run: Run, source: Source, progress: Callable[[int], None] = lambda step: None) -> dict[str, Any]:
    """Train and evaluate; returns the results in JSON types."""
    model, data, size = source.fresh(run), source.data(run.task), TASKS[run.task].batch_size
    rows = data.train if run.epochs == 1 else data.train[: run.plain_steps * size // run.epochs]
    steps, ratio = equal_steps(run, model, source.batch(run.task, data.train[:size]))
    stream = batches(rows, run.seed, size)
    found: dict[str, Any] = {"steps": steps, "flops_ratio": ratio, "losses": [], "cpu_s": [], "wall_s": []}
    with torch.random.fork_rng(devices=[]), dropbp.labelled_logits(model):
        torch.manual_seed(run.seed)
        with method_of(run, model, steps) as method:
            groups = method.groups(run.learning_rate)
            optimizer = torch.optim.AdamW(groups, run.learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(decayed, steps=steps))
            for step in range(steps):
                batch = source.batch(run.task, next(stream))
                cpu_s, wall_s = time.process_time(), time.perf_counter()
                method.begin_step(step)
                loss = _step(model, method, optimizer, batch)
                schedule.step()
                found["cpu_s"].append(round(time.process_time() - cpu_s, 3))
                found["wall_s"].append(round(time.perf_counter() - wall_s, 3))
                found["losses"].append(round(loss, 4))
                progress(step + 1)
            found |= method.report()
    found |= evaluate(model, source, run.task)
    if run.tuning == "lora":
        model.unload()
    return found


def _step(model: nn.Module, method: rivals.Method, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> float:
    with method.micro_batch():
        loss = model(**batch, use_cache=False).loss
        loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def decayed(step: int, steps: int) -> float:
    """The factor of the learning rate: it rises in the first tenth of the steps, then decays to zero along a cosine."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Reversed(rivals.DropBP):
    """The annealed masks of the default in reversed order: the deepest steps come last, with the lowest rates."""

    def __init__(self, model: nn.Module, drop_rate: float, *, seed: int, steps: int) -> None:
        super().__init__(model, drop_rate, seed=seed, steps=steps, resample="step")
        schedule = self.handle.fresh_schedule()
        self.masks = [schedule.expected_mask(step) for step in reversed(range(steps))]
        self.mask = self.masks[0]

    def begin_step(self, step: int) -> None:
        self.mask = self.masks[step]

    def micro_batch(self) -> AbstractContextManager[object]:
        return self.handle.fixed(self.mask)


def narrow(model: nn.Module, drop_rate: float, seed: int, steps: int, width: float = 0.25) -> rivals.Method:
    """The default with a border that moves over a share `width` of the model only, around that of freezing."""
    branches = dropbp.discover(model)
    total, below, rates = sum(branch.flops for branch in branches), 0.0, []
    for branch in branches:
        centre = (below + branch.flops / 2) / total
        rates.append(min(1.0, max(0.0, 0.5 + (drop_rate - centre) / width)))
        below += branch.flops
    return rivals.DropBP(model, drop_rate, seed=seed, steps=steps, resample="step", rates=rates)


class HeadTrains(rivals.Method):
    """A method that freezes a tied embedding except in its use as the head, whose gradient is available in each step.

    The output of the embedding is detached, so that the gradient of the shared weight is that of the head alone.
    """

    def __init__(self, model: nn.Module, make: Callable[[nn.Module], rivals.Method]) -> None:
        super().__init__(model)
        embedding = cast("Any", model).get_input_embeddings()
        self._hook = embedding.register_forward_hook(lambda module, args, output: output.detach())
        self.inner = make(model)
        embedding.requires_grad_(True)

    def begin_step(self, step: int) -> None:
        self.inner.begin_step(step)

    def micro_batch(self) -> AbstractContextManager[object]:
        return self.inner.micro_batch()

    def work(self) -> rivals.Work:
        return self.inner.work()

    def remove(self) -> None:
        self.inner.remove()
        self._hook.remove()


class Checkpointed(rivals.Method):
    """Plain training at the cost of gradient checkpointing: the blocks' forward runs twice. The result is the same."""

    def work(self) -> rivals.Work:
        return rivals.Work(forward=2.0)


class DefaultCached(rivals.DropBP):
    """The default with the cache: of a row seen before, only the blocks run that may still train."""

    def __init__(self, model: nn.Module, drop_rate: float, seed: int, steps: int) -> None:
        super().__init__(model, drop_rate, seed=seed, steps=steps, resample="step", activation_cache=True)

    def resting(self) -> Sequence[float]:
        schedule, flops = self.handle.fresh_schedule(), [branch.flops for branch in self.handle.branches]
        lowest = [schedule.expected_mask(step).index(False) for step in range(schedule.length)]
        ends = reversed(list(itertools.accumulate(reversed(lowest), min)))  # the lowest branch of this step or a later
        return [sum(flops[:end]) / sum(flops) for end in ends]


class FreezingCached(rivals.Method):
    """Freezing with this library's cache: the frozen part does not run again for rows it has seen."""

    def __init__(self, model: nn.Module, drop_rate: float, seed: int, steps: int) -> None:
        super().__init__(model)
        self.inner, self._steps = rivals.Freezing(model, drop_rate), steps
        self._cache = rivals.DropBP(model, 0.0, seed=seed, steps=steps, activation_cache=True)

    def work(self) -> rivals.Work:
        return self.inner.work()

    def resting(self) -> Sequence[float]:
        return [1 - self.inner.work().activations] * self._steps

    def report(self) -> dict[str, Any]:
        return self._cache.report()

    def remove(self) -> None:
        self._cache.remove()
        self.inner.remove()


def _head_trains(name: str) -> Callable[..., rivals.Method]:
    return lambda model, drop_rate, seed, steps: HeadTrains(
        model, lambda model: rivals.method(name, model, drop_rate, seed, steps)
    )


VARIANTS: dict[str, Callable[..., rivals.Method]] = {
    "default reversed": lambda model, drop_rate, seed, steps: Reversed(model, drop_rate, seed=seed, steps=steps),
    "default shelf": lambda model, drop_rate, seed, steps: rivals.DropBP(
        model, drop_rate, seed=seed, steps=steps, resample="step", rates="shelf"
    ),
    "default narrow": narrow,
    "plain, checkpointed": lambda model, drop_rate, seed, steps: Checkpointed(model),
    "default, head trains": _head_trains("default"),
    "freezing, head trains": _head_trains("freezing"),
    "default, cache": DefaultCached,
    "freezing, cache": FreezingCached,
}


def method_of(run: Run, model: nn.Module, steps: int) -> rivals.Method:
    """A method of the learning bench by its name, or a variant of the default."""
    make = VARIANTS.get(run.method)
    if make is not None:
        return make(model, run.drop_rate, run.seed, steps)
    return rivals.method(run.method, model, run.drop_rate, run.seed, steps)


def expected_work(method: rivals.Method, drop_rate: float) -> rivals.Work:
    """The average work of a step without a cache; masks of this library keep their budget."""
    if isinstance(getattr(method, "inner", method), rivals.DropBP):
        return rivals.Work(1.0, 1 - drop_rate, 1 - drop_rate)
    method.begin_step(0)
    return method.work()


def equal_steps(run: Run, model: nn.Module, batch: dict[str, Tensor]) -> tuple[int, float]:
    """The number of steps of the run, and the mean cost of a step relative to a plain step."""
    with method_of(run, model, run.plain_steps) as method:
        work, resting = expected_work(method, run.drop_rate), method.resting()
    with dropbp.labelled_logits(model):
        whole = Costs.counted(model, batch)
    steps, ratio = run.plain_steps, 1.0
    for _ in range(ROUNDS if run.equal == "flops" else 1):  # more steps are more epochs, of which a cache saves more
        forward = 1 - saved_forward(resting, run.epochs * steps / max(1, run.plain_steps))
        ratio = whole.of(work._replace(forward=work.forward * forward)) / whole.of(rivals.Work())
        steps = round(run.plain_steps / ratio) if run.equal == "flops" else run.plain_steps
    return steps, ratio


def saved_forward(resting: Sequence[float], epochs: float) -> float:
    """The share of the blocks' forward that a cache saves in a run of this many epochs.

    In its first epoch all rows are new. Later a row starts where the blocks ended that no longer trained when it was
    seen last, one epoch before. `resting` has their share of the FLOPs, from the first step of the run to its last.
    """
    if not resting or epochs <= 1:
        return 0.0
    seen_before = int(len(resting) * (1 - 1 / epochs))
    return sum(resting[:seen_before]) / len(resting)


@torch.no_grad()
def evaluate(model: nn.Module, source: Source, task: str) -> dict[str, float]:
    """Loss per token of the held-out answers; for questions with options, also the loss of the letter and the share
    right.
    """
    model.eval()
    data, size = source.data(task), 2 * TASKS[task].batch_size
    total = tokens = letter_loss = right = 0.0
    order = sorted(range(len(data.held_out)), key=lambda i: len(data.held_out[i]["input_ids"]))
    with dropbp.labelled_logits(model, evaluation=True):
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            batch = source.batch(task, [data.held_out[i] for i in chosen])
            following = batch["labels"][:, 1:]
            labels_BK = following[:, (following != IGNORED).any(0)]
            logits_BKV = model(**batch, use_cache=False).logits[:, : labels_BK.shape[1]].float()
            losses_BK = nn.functional.cross_entropy(logits_BKV.transpose(1, 2), labels_BK, reduction="none")
            total, tokens = total + float(losses_BK.sum()), tokens + int((labels_BK != IGNORED).sum())
            first_B = (labels_BK != IGNORED).int().argmax(1).tolist()
            for row, (i, first) in enumerate(zip(chosen, first_B, strict=True)):
                letter_loss += float(losses_BK[row, first])
                if data.options:
                    best = int(logits_BKV[row, first, data.options[i]].argmax())
                    right += data.options[i][best] == int(labels_BK[row, first])
    model.train()
    found = {"loss": total / tokens}
    count = len(order)
    return found | ({"letter_loss": letter_loss / count, "accuracy": right / count} if data.options else {})
