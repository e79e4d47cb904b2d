"""Takes a batch from a trainer's own data, for models that do not describe their inputs, without changing the run.

Asking a data loader for a batch would draw an order and start workers. So the first rows of its data set are collated
here, on copies of everything that may count or draw random numbers.
"""

from __future__ import annotations

import copy
import logging
import random
import types
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset

from dropbp.device import fork_rng
from dropbp.errors import ConfigError, DiscoveryError
from dropbp.inputs import device_of

logger = logging.getLogger(__name__)

_MOST_ROWS = 2  # enough for models that compare rows with each other
_STATELESS = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_NESTED = ("dataset", "data_collator", "collate_fn")  # attributes in which wrappers keep the wrapped object


def first_batch(loader: Any, model: nn.Module) -> dict[str, Any]:
    """The first rows of a data loader's data set as keyword arguments of the model, on its device.

    No random state moves, and the loader's next batch does not change. Raises ConfigError if the batches are not
    dictionaries, or the data set has no rows.
    """
    with fork_rng(model), _fork_python_rng():
        batch = _copied(loader.collate_fn)(_first_rows(loader))
    if not isinstance(batch, Mapping):
        raise ConfigError(f"the trainer's batches are of type {type(batch).__name__}, but must be dictionaries.")
    device = device_of(model)
    return {name: _moved(value, device) for name, value in batch.items()}


def batch_for(loader: Any, model: nn.Module, failure: DiscoveryError) -> dict[str, Any]:
    """A batch for a model whose discovery failed without one. Raises DiscoveryError with both reasons."""
    try:
        return first_batch(loader, model)
    except Exception as error:  # data sets and collators are the user's and can raise anything
        raise DiscoveryError(
            f"{failure} The trainer's own data gave no batch to try either ({type(error).__name__}: {error})."
        ) from error


def with_media(options: dict[str, Any], loader: Any, model: nn.Module) -> dict[str, Any]:
    """The options of `enable`, with a batch as example if the model reads images or sound beside the text.

    With text alone as example, discovery would not see the other parts of such a model.
    """
    config = getattr(model, "config", None)
    media = any(hasattr(config, part) for part in ("vision_config", "audio_config"))
    if not media or loader is None or options.get("example_inputs") is not None:
        return options
    try:
        return {**options, "example_inputs": first_batch(loader, model)}
    except Exception as error:  # noqa: BLE001 - data sets and collators are the user's and can raise anything
        logger.debug("no example batch for the model: %s", error)
        return options


def _first_rows(loader: Any) -> Any:
    sampler = getattr(loader, "batch_sampler", None)
    batch_size = loader.batch_size or getattr(sampler, "batch_size", None)
    if isinstance(loader.dataset, IterableDataset):
        rows = list(islice(iter(copy.deepcopy(loader.dataset)), min(batch_size or 1, _MOST_ROWS)))
    else:
        dataset: Any = _copied(loader.dataset)
        held = len(dataset) if isinstance(dataset, Sized) else 1
        rows = [dataset[index] for index in range(min(held, batch_size or 1, _MOST_ROWS))]
    if not rows:
        raise ConfigError("the trainer's data set has no rows.")
    return rows if batch_size or sampler is not None else rows[0]


def _copied(part: Any) -> Any:
    """A copy of a data set or collator that shares the data but has its own counters and generators."""
    if isinstance(part, (list, tuple, dict, *_STATELESS)) or not hasattr(part, "__dict__"):
        return part
    twin = copy.copy(part)
    for name, value in vars(part).items():
        if name in _NESTED:
            twin.__dict__[name] = _copied(value)
        elif isinstance(value, torch.Generator):
            twin.__dict__[name] = value.clone_state()
        elif isinstance(value, (random.Random, np.random.Generator, np.random.RandomState)):
            twin.__dict__[name] = copy.deepcopy(value)
    return twin


@contextmanager
def _fork_python_rng() -> Iterator[None]:
    own, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state, to restore it
    try:
        yield
    finally:
        random.setstate(own)
        np.random.set_state(numpys)  # noqa: NPY002


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(item, device) for name, item in value.items()}
    return type(value)(_moved(item, device) for item in value) if type(value) in (list, tuple) else value
