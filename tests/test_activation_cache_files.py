"""The activation cache in a folder: warm from run to run, and whatever happens to the folder, no row is ever wrong."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from dropbp.cache import files
from tests.common.engine_models import llama_loss, tokens
from tests.test_activation_cache import cached, found, llama

BATCHES = [tokens(seed=seed) for seed in range(4)]
ONE_BORDER = {"drop_rate": 0.8, "rates": "freeze"}


def run(folder: Path | bool | None, model: nn.Module | None = None, epochs: int = 2, **options: Any) -> dict[str, Any]:
    """Losses of some epochs, and what the cache reports. Nothing trains, so all epochs are alike."""
    model = llama() if model is None else model
    with cached(model, activation_cache=folder, **ONE_BORDER, **options) as handle:
        losses = [llama_loss(model, batch).item() for _ in range(epochs) for batch in BATCHES]
        return {"losses": losses, **(found(handle) if folder else {})}


def plain(model: nn.Module | None = None) -> list[float]:
    return run(None, model)["losses"]


def records(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.rows"))


def test_a_second_run_starts_warm(tmp_path: Path) -> None:
    first, second = run(tmp_path), run(tmp_path)
    assert first["hits"] == 8 and second["hits"] == 16
    assert first["bytes"] == second["bytes"] > 0 and first["rows"] == second["rows"] == 8
    assert second["largest_difference"] < 1e-5 and second["forwards_shortened"] >= 6
    assert first["losses"] == pytest.approx(plain(), rel=1e-6) and second["losses"] == pytest.approx(plain(), rel=1e-6)


def test_two_simultaneous_runs_share_what_they_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RESCAN_AFTER_S", 0.0)
    one, other = llama(), llama()
    options = {"activation_cache": tmp_path, **ONE_BORDER}
    with cached(one, **options), cached(other, **options) as handle:
        for batch in BATCHES:
            expected = llama_loss(one, batch).item()
            assert llama_loss(other, batch).item() == pytest.approx(expected, rel=1e-6)
        assert found(handle)["hits"] == 8
    assert len(records(tmp_path)) == 1, "the other had nothing to store"


def doubled() -> nn.Module:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2.0)
    return model


OTHERS = {
    "weights": doubled,
    "embeddings": lambda: _with(llama(), lambda m: m.model.embed_tokens.weight.mul_(1.01)),
    "type": lambda: llama().to(torch.float64),
    "configuration": lambda: llama(rms_norm_eps=1e-2),
    "a class": lambda: _with(llama(), lambda m: setattr(m.model.layers[1].mlp, "__class__", _OtherMLP)),
}


class _OtherMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(x)


def _with(model: nn.Module, change: Any) -> nn.Module:
    with torch.no_grad():
        change(model)
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_states_of_another_model_are_never_found(tmp_path: Path, name: str) -> None:
    run(tmp_path)
    other = run(tmp_path, OTHERS[name]())
    assert other["hits"] == 8, "only those of its own first epoch"
    assert other["losses"] == pytest.approx(plain(OTHERS[name]()), rel=1e-6)
    assert run(tmp_path)["hits"] == 16, "and the first model's are there as before"


@pytest.mark.parametrize("name", ["another tokenizer", "another data set"])
def test_other_rows_are_not_found(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    batches = [
        (batch + 1) % 32 if name == "another tokenizer" else tokens(seed=50 + i) for i, batch in enumerate(BATCHES)
    ]
    monkeypatch.setattr(sys.modules[__name__], "BATCHES", batches)
    other = run(tmp_path)
    assert other["hits"] == 8 and other["losses"] == pytest.approx(plain(), rel=1e-6)


# -- damage


@pytest.mark.parametrize("cut", [1, 40, 85, 500, 1000])
def test_a_truncated_file_loses_only_rows(tmp_path: Path, cut: int) -> None:
    run(tmp_path)
    (path,) = records(tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    after = run(tmp_path)
    assert 8 <= after["hits"] < 16
    assert after["losses"] == pytest.approx(plain(), rel=1e-6)
    assert run(tmp_path)["hits"] == 16, "what was lost is stored again"


@pytest.mark.parametrize("place", [0, 9, 30, 45, 60, 75, 81, 90, 400, 700])
def test_a_flipped_bit_loses_only_rows(tmp_path: Path, place: int) -> None:
    run(tmp_path, epochs=1)
    (path,) = records(tmp_path)
    data = bytearray(path.read_bytes())
    data[place] ^= 16
    path.write_bytes(data)
    after = run(tmp_path, epochs=1)
    assert after["losses"] == pytest.approx(plain()[:4], rel=1e-6)


def test_a_state_that_is_not_finite_is_not_used_though_its_checksum_is_right(tmp_path: Path) -> None:
    run(tmp_path, epochs=1)
    (path,) = records(tmp_path)
    data = path.read_bytes()
    size = len(data) // 8
    header, numbers = data[:80], bytearray(data[84:size])
    numbers[0:4] = struct.pack("<f", float("nan"))
    fields = list(files.HEADER.unpack(header))
    fields[-1] = zlib.crc32(numbers)
    header = files.HEADER.pack(*fields)
    path.write_bytes(header + files.CHECK.pack(zlib.crc32(header)) + numbers + data[size:])
    after = run(tmp_path, epochs=1)
    assert after["hits"] == 6 and after["losses"] == pytest.approx(plain()[:4], rel=1e-6)


def test_foreign_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    run(tmp_path, epochs=1)
    (path,) = records(tmp_path)
    (path.parent / "notes.txt").write_text("mine")
    (path.parent / "zeros.rows").write_bytes(bytes(5000))
    (path.parent / "empty.rows").write_bytes(b"")
    after = run(tmp_path)
    assert after["hits"] == 16 and after["losses"] == pytest.approx(plain(), rel=1e-6)
    assert (path.parent / "notes.txt").read_text() == "mine"


def test_a_file_deleted_during_use_loses_only_rows(tmp_path: Path) -> None:
    model = llama()
    with cached(model, activation_cache=tmp_path, **ONE_BORDER) as handle:
        losses = [llama_loss(model, batch).item() for batch in BATCHES]
        for path in records(tmp_path):
            path.unlink()
        again = [llama_loss(model, batch).item() for batch in BATCHES]
        assert found(handle)["hits"] == 0
    assert again == pytest.approx(losses, rel=1e-6)


# -- disks


def test_a_full_disk_ends_storing_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    written, real = [0], os.write

    def write(descriptor: int, data: bytes) -> int:
        if written[0] > 1500:
            raise OSError(errno.ENOSPC, "No space left on device")
        written[0] += 300
        return real(descriptor, data[:300])  # a disk that fills up takes a part

    monkeypatch.setattr(os, "write", write)
    full = run(tmp_path)
    assert 0 < full["rows"] < 8 and "No space left" in full["trouble"]
    assert caplog.text.count("Nothing more is stored") == 1
    assert full["losses"] == pytest.approx(plain(), rel=1e-6)
    monkeypatch.setattr(os, "write", real)
    assert run(tmp_path)["rows"] == 8, "what was written is whole"


@pytest.mark.parametrize("failing", ["mkdir", "open"])
def test_an_unwritable_folder_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, failing: str
) -> None:
    if failing == "open":
        run(tmp_path, epochs=1, activation_cache_limit=1000)  # some rows

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(*((Path, "mkdir") if failing == "mkdir" else (os, "open")), refuse)
    report = run(tmp_path / "new" if failing == "mkdir" else tmp_path)
    assert "Read-only" in report["trouble"] and caplog.text.count("Nothing more is stored") == 1
    assert report["losses"] == pytest.approx(plain(), rel=1e-6)
    assert (report["rows"] > 0) == (failing == "open"), "rows that are there are read"


def test_the_limit_counts_everything_in_the_folder(tmp_path: Path) -> None:
    run(tmp_path)
    size = sum(path.stat().st_size for path in records(tmp_path))
    other = run(tmp_path, doubled(), activation_cache_limit=size + 1000)
    assert 0 < other["rows"] < 8 and "limit" in other["trouble"]
    assert sum(path.stat().st_size for path in records(tmp_path)) <= size + 1000


CHILD = """
import sys, torch
from tests.test_activation_cache import cached, llama
from tests.common.engine_models import llama_loss, tokens
model = llama()
with cached(model, activation_cache=sys.argv[1], drop_rate=0.8, rates="freeze", steps=10**6):
    for seed in range(10**6):
        llama_loss(model, tokens(seed=seed))
        if seed == 3:
            print("ready", flush=True)
"""


def test_a_process_killed_while_storing_leaves_valid_rows(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    child = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    time.sleep(0.2)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    after = run(tmp_path, steps=10**6)
    assert after["hits"] == 16, "the killed run has stored these batches"
    assert after["losses"] == pytest.approx(run(None, steps=10**6)["losses"], rel=1e-6)
