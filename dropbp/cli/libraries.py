"""For the command line: silences other libraries, and keeps them from importing packages that a command does not use.

PEFT imports bitsandbytes and accelerate imports DeepSpeed wherever they are installed. Both look for a GPU, and without
one a run begins with their warnings. Both are hidden by Python's own means: a module that is None in `sys.modules`
counts as not installed.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import cast

CONFIG_FILE = "config.json"
_TALKATIVE = ("huggingface_hub", "datasets", "accelerate")


@contextmanager
def quiet() -> Iterator[None]:
    """Disable warnings and progress bars of libraries inside the context."""
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


def leave_out_unused(arguments: Sequence[str]) -> None:
    """Make packages that this command does not use look as if they were not installed.

    Only in a process that belongs to the command: libraries remember what is not installed.
    """
    for name, is_used in _IS_USED.items():
        if not is_used(arguments):
            sys.modules.setdefault(name, cast(ModuleType, None))


def _uses_deepspeed(arguments: Sequence[str]) -> bool:
    """`accelerate launch` says so in this variable."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() not in ("", "0", "false", "no")


def _uses_bitsandbytes(arguments: Sequence[str]) -> bool:
    """The bench for QLoRA; other commands for a model that is quantised with it, which may be any model of the Hub."""
    words = [word for argument in arguments for word in argument.split("=")]
    if words[:1] == ["bench"]:
        return True
    if words[:1] == ["finetune"] and not any(word.startswith("--mo") for word in words):
        return False  # the demo
    files = [file for word in words for file in (Path(word), Path(word, CONFIG_FILE)) if file.name == CONFIG_FILE]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
    return not texts or any("bitsandbytes" in text for text in texts)


_IS_USED: Mapping[str, Callable[[Sequence[str]], bool]] = {
    "bitsandbytes": _uses_bitsandbytes,
    "deepspeed": _uses_deepspeed,
}
