"""The work of one training step at any batch shape: inputs, loss, precision.

Batches are built as in `dropbp.inputs`, or by repeating the rows of the example inputs. The values of tokens do not
matter: neither time nor memory of a step depends on them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from dropbp import inputs as example
from dropbp.checks import is_integer, short
from dropbp.errors import ConfigError
from dropbp.flops import Shape, shape_of
from dropbp.sensitivity.restore import training_state_restored
from dropbp.tensors import tensors_in

Loss = Callable[[Any], torch.Tensor]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Workload:
    """Training steps of a model.

    Attributes:
        model: the model, in training mode.
        given: example inputs, whose rows are repeated as needed; None if the model describes its inputs.
        loss: computes the loss from the model's output; None: the output's `loss`, or the mean square of its first
            tensor.
        autocast: the dtype of mixed precision; None for the model's own.
    """

    model: nn.Module
    given: example.Inputs | None
    loss: Loss | None
    autocast: torch.dtype | None

    @property
    def has_lengths(self) -> bool:
        """Whether batches of any length can be built."""
        return self.given is None and example.takes_text(self.model)

    def batch(self, shape: Shape) -> example.Inputs:
        """Inputs of this shape on the model's device, with labels if the model computes its own loss."""
        if self.given is not None:
            return _with_rows(self.given, shape.batch_size)
        built = example.build(self.model, shape.batch_size, max(1, shape.sequence_length))
        kwargs = dict(built.kwargs)
        if self.loss is None and _computes_own_loss(self.model):
            kwargs["labels"] = kwargs.get("decoder_input_ids", kwargs["input_ids"])
        return example.Inputs(built.args, kwargs)

    def forward(self, batch: example.Inputs) -> torch.Tensor:
        """Run one forward; return the loss.

        Raises ConfigError if the model has no positions for generated inputs of this length.
        """
        with self._precision():
            return self._loss_of(self._output(batch))

    def _output(self, batch: example.Inputs) -> Any:
        try:
            return self.model(*batch.args, **batch.kwargs)
        except IndexError as error:
            if self.given is not None:
                raise
            raise ConfigError(
                f"{type(self.model).__name__} does not take a batch of this length ({error}). Pass a sequence_length "
                "that it has positions for, or example_inputs."
            ) from error

    def step(self, batch: example.Inputs) -> None:
        """Run forward and backward."""
        self.forward(batch).backward()

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(example.device_of(self.model).type, self.autocast)

    def _loss_of(self, output: Any) -> torch.Tensor:
        if self.loss is not None:
            return self.loss(output)
        loss = getattr(output, "loss", None)
        if isinstance(loss, torch.Tensor):
            return loss
        return next(tensors_in(output)).float().square().mean()


def precision_of(name: Any) -> torch.dtype | None:
    """The autocast dtype of a precision: `bf16`, `fp16`, or None for no autocast.

    Raises ConfigError if the precision is unknown.
    """
    if name is not None and (not isinstance(name, str) or name not in AUTOCAST):
        raise ConfigError(
            f"precision is {short(name)}; allowed: {', '.join(AUTOCAST)} for mixed precision, None for the model's own."
        )
    return None if name is None else AUTOCAST[name]


def planned_shape(
    given: example.Inputs | None, text: bool, rows: int | None, length: int | None, positions: int | None = None
) -> Shape:
    """The shape of the planned steps; text has 512 tokens per row, or as many as there are positions.

    Raises ConfigError if a size is no integer of at least 1, or a length is given for inputs whose length cannot
    change.
    """
    for name, value in (("batch_size", rows), ("sequence_length", length)):
        if value is not None and not is_integer(value, 1):
            raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1.")
    if text:
        return Shape(rows or 1, length or min(512, positions or 512))
    if length is not None:
        raise ConfigError(
            f"sequence_length is {length}, but the length of these inputs cannot be changed. Leave it out, and pass "
            "example_inputs of the length to plan for."
        )
    return Shape(rows or (1 if given is None else shape_of(given.args, given.kwargs).batch_size))


@contextlib.contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """All modules in training mode; modes, gradients, buffers and random state are restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with training_state_restored(model):
            model.train()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _computes_own_loss(model: Any) -> bool:
    """Whether the model has a language model head, and takes labels of the shape of its tokens."""
    if not example.takes_text(model) or not hasattr(model, "get_output_embeddings"):
        return False
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.get_output_embeddings() is not None and "labels" in inspect.signature(inner.forward).parameters


def _with_rows(given: example.Inputs, rows: int) -> example.Inputs:
    """The rows of the example, repeated until there are `rows`."""
    present = shape_of(given.args, given.kwargs).batch_size
    if rows == present:
        return given

    def grown(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape[0] != present:
            return value
        return value.index_select(0, torch.arange(rows, device=value.device) % present)

    return example.Inputs(
        tuple(grown(value) for value in given.args), {name: grown(value) for name, value in given.kwargs.items()}
    )
