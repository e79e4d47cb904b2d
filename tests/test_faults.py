"""Faults injected: afterwards the model is right, the last checkpoint is good, and the message says what to do."""

from __future__ import annotations

import errno
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dropbp.errors import ResourceError, as_resource_error
from dropbp.files import fault_of, last_whole_checkpoint, new_file, write_text
from tests.campaigns.reliability.registry import CHECKS, FAULTS

SLOW = {"kill"}  # in tests/test_killed.py, so that the two files can run side by side


@pytest.mark.parametrize("name", [name for name, check in CHECKS.items() if check.part == FAULTS and name not in SLOW])
def test_a_fault_leaves_everything_in_order(name: str, tmp_path: Path) -> None:
    CHECKS[name].run(CHECKS[name].few, tmp_path)


def test_a_file_is_on_the_disk_before_it_bears_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr("os.fsync", lambda descriptor: flushed.append((tmp_path / "state.json").exists()))
    write_text(tmp_path / "state.json", "{}")
    assert flushed == [False]


def test_a_disk_that_fills_up_while_flushing_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "state.json"
    write_text(path, "old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"), new_file(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
    assert [file.read_text(encoding="utf-8") for file in tmp_path.iterdir()] == ["old"]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"weight": torch.ones(8)}, folder / "model.safetensors")
        torch.save({"state": torch.ones(8)}, folder / "optimizer.pt")
        write_text(folder / "trainer_state.json", '{"global_step": 1}')
    (tmp_path / "checkpoint-x").mkdir()
    return tmp_path


def test_the_checkpoint_of_the_most_steps_is_the_last(checkpoints: Path) -> None:
    assert last_whole_checkpoint(checkpoints) == (checkpoints / "checkpoint-10", {})
    assert last_whole_checkpoint(checkpoints / "nowhere") == (None, {})


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_checkpoint_with_a_file_cut_anywhere_is_left_out_with_the_reason(checkpoints: Path, name: str) -> None:
    path = checkpoints / "checkpoint-10" / name
    content = path.read_bytes()
    for length in range(0, len(content) - 1, 7):
        path.write_bytes(content[:length])
        last, faults = last_whole_checkpoint(checkpoints)
        assert last == checkpoints / "checkpoint-2", length
        assert name in faults["checkpoint-10"]


def test_a_checkpoint_whose_last_file_is_missing_is_left_out(checkpoints: Path) -> None:
    (checkpoints / "checkpoint-10" / "trainer_state.json").unlink()
    assert "which is written last, is missing" in last_whole_checkpoint(checkpoints)[1]["checkpoint-10"]


def test_a_checkpoint_without_weights_is_left_out(checkpoints: Path) -> None:
    (checkpoints / "checkpoint-10" / "model.safetensors").unlink()
    last, faults = last_whole_checkpoint(checkpoints)
    assert last == checkpoints / "checkpoint-2"
    assert faults == {"checkpoint-10": "the weights are missing"}


def test_no_file_is_unpickled_to_see_whether_it_is_whole(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", b"cos\nsystem\n(S'exit 1'\ntR.")
    assert fault_of(tmp_path / "evil.pt") is None


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write any more"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "cannot write any more"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (MemoryError(), "out of memory"),
    ],
)
def test_memory_or_disk_that_ran_out_is_told_in_a_line(error: BaseException, says: str) -> None:
    told = as_resource_error(error)
    assert isinstance(told, ResourceError)
    assert str(told).startswith(says)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), KeyError("x"), OSError(errno.ENOENT, "no file")])
def test_other_errors_are_left_alone(error: BaseException) -> None:
    assert as_resource_error(error) is None
