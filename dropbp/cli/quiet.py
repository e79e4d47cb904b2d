"""For the command line: silences the libraries below about what the command has chosen itself."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_TALKATIVE = ("huggingface_hub", "datasets", "accelerate")


@contextmanager
def quiet() -> Iterator[None]:
    """Their warnings and progress bars are off inside, and as before afterwards."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in _TALKATIVE}
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
