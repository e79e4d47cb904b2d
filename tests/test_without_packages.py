"""On a machine without optional packages and without a network: what needs none works, the rest names what it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OPTIONAL = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "gguf",
    "lightning",
    "matplotlib",
    "peft",
    "trl",
)
BEYOND_CORE = (*OPTIONAL, "huggingface_hub", "numpy", "safetensors", "scipy", "tokenizers", "tqdm", "transformers")

# Python imports a module of this name as it starts, in child processes too.
SITE_MODULE = "sitecustomize.py"
HIDING = """
import importlib.machinery, sys, time

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        return (d for d in super().find_distributions(*args, **kwargs) if d.metadata["Name"] not in HIDDEN)

def cut_off(event, args):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(args[1], tuple)):
        raise OSError("there is no network")

sys.meta_path[:] = [Finder if each is importlib.machinery.PathFinder else each for each in sys.meta_path]
sys.addaudithook(cut_off)
time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.1))  # huggingface_hub waits between its tries
"""
ONLINE = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}  # the network is tried, and is not there

TRAINS = """
import torch
from torch import nn
import dropbp

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)

torch.manual_seed(0)
model, x = Net(), torch.randn(64, 4)
y = x.sum(1, keepdim=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
with dropbp.enable(model, 0.5, example_inputs=x, steps=60) as handle:
    losses = []
    for _ in range(60):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    report = handle.report()
assert losses[-1] < losses[0] / 10, losses
assert abs(report["realised_drop_rate"] - 0.5) <= 0.02, report
"""


def run_without(packages: tuple[str, ...], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process in which these packages look as if they were not installed, and no address is reached."""
    site = folder / "site"
    site.mkdir(exist_ok=True)
    site.joinpath(SITE_MODULE).write_text(f"HIDDEN = {packages!r}\n{HIDING}")
    environment = {**os.environ, **ONLINE, "PYTHONPATH": str(site), "HF_HOME": str(folder / "hub")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.common.tiny import make_model

    folder = tmp_path_factory.mktemp("model")
    make_model().config.save_pretrained(folder)
    return str(folder / "config.json")


@pytest.mark.parametrize("package", BEYOND_CORE)
def test_a_hidden_package_is_neither_imported_nor_found(tmp_path: Path, package: str) -> None:
    code = f"import importlib.util as util; assert util.find_spec({package!r}) is None; import {package}"
    done = run_without(BEYOND_CORE, tmp_path, "-c", code)
    assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: No module named '{package}'"


def test_a_model_of_torch_alone_trains(tmp_path: Path) -> None:
    done = run_without(BEYOND_CORE, tmp_path, "-c", TRAINS)
    assert done.returncode == 0, done.stderr


def dropbp_without(packages: tuple[str, ...], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = run_without(packages, folder, "-m", "dropbp", *arguments)
    assert "Traceback" not in done.stderr, done.stderr
    return done


SIZE = ("--sequence-length", "16", "--drop-rate", "0", "--drop-rate", "0.5")


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "CONFIG", "--peft", "none", *SIZE),
        ("inspect", "CONFIG"),
        ("bench", "throughput", "--smoke", "--only", "full-fp32", "--output", "results"),
    ],
    ids=["plan", "inspect", "bench"],
)
def test_what_needs_no_optional_package_works(tmp_path: Path, config: str, arguments: tuple[str, ...]) -> None:
    done = dropbp_without(OPTIONAL, tmp_path, *(config if word == "CONFIG" else word for word in arguments))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("plan", "CONFIG", *SIZE), 2, "peft is required but not installed"),
        (("plan", "CONFIG", "--peft", "none", "--no-measure", *SIZE, "--plot", "a.png"), 2, "plots need matplotlib"),
        (("plan", "nobody/nothing"), 2, "nobody/nothing cannot be loaded"),
        (("finetune",), 2, "gguf is required but not installed"),  # and nothing was downloaded before
        (("finetune", "--model", "MODEL"), 2, "accelerate is required but not installed"),
        (("finetune", "--model", "MODEL", "--dataset", "rows.jsonl", "--peft", "none"), 2, "accelerate"),
        (("finetune", "--model", "MODEL", "--dataset", "nobody/rows"), 2, "datasets is required but not installed"),
        (("bench", "throughput", "--smoke", "--only", "lora-fp32", "--output", "results"), 1, "lora needs peft"),
        (("bench", "callback_overhead", "--smoke", "--output", "results"), 2, "accelerate"),
        (("bench", "all", "--smoke", "--part", "callback_overhead"), 1, "bench callback_overhead: Using the `Trainer`"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, tuple) else None,
)
def test_what_lacks_a_package_names_it_in_one_line(
    tmp_path: Path, config: str, arguments: tuple[str, ...], status: int, message: str
) -> None:
    from tests.common.tiny import save_model, sums, write_jsonl

    write_jsonl(tmp_path / "rows.jsonl", sums(20))
    places = {"CONFIG": config, "MODEL": str(save_model(tmp_path / "model"))}
    done = dropbp_without(OPTIONAL, tmp_path, *(places.get(word, word) for word in arguments))
    assert done.returncode == status, done.stderr
    assert [line for line in done.stderr.splitlines() if message in line], done.stderr
