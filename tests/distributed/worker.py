"""What each of the processes runs: `python -m tests.distributed.worker FOLDER MODULE CASE...`, by a launcher.

Every case returns plain data; each rank writes all of it to FOLDER/rank<N>.json. A case that fails is written with its
error, so that the other cases are still seen.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path

import torch


def main(folder: Path, module: str, cases: list[str]) -> None:
    torch.set_num_threads(1)
    home = importlib.import_module(module if "." in module else f"tests.distributed.{module}")
    rank = home.start()
    results = {}
    for case in cases or list(home.CASES):
        try:
            results[case] = {"result": home.CASES[case]()}
        except Exception as error:
            results[case] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            break  # the ranks may have parted here
    (folder / f"rank{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    home.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
