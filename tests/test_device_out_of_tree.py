"""A device that another package would add to PyTorch trains with the generic adapter, whatever its module tells."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

# In a process of its own: PyTorch takes one such device, for good.
pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch has no devices written in Python",
)

START = """
    import copy, torch, dropbp
    from tests.common import out_of_tree
    from tests.common.engine_models import assert_same_gradients, gradients, masks, paper_gradients, take_gradients
    from tests.common.engine_models import plain_batch, plain_loss, plain_net
    out_of_tree.register(out_of_tree.{module}())

    plain = plain_net(blocks=2)
    model, batch = copy.deepcopy(plain).to("chip"), plain_batch().to("chip")
"""


def run(module: str, body: str) -> None:
    source = textwrap.dedent(START.format(module=module)) + textwrap.dedent(body)
    command = [sys.executable, "-c", source]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]


def test_every_mask_gives_the_gradients_of_the_cpu() -> None:
    run(
        "Module",
        """
        with dropbp.enable(model, 0.5, masks="exact", stem="train", example_inputs=batch) as handle:
            assert handle.device.name == "chip" and handle.device.describe()["devices"] == 1
            for mask in masks(4):
                with handle.fixed(mask):
                    take_gradients(model, plain_loss(model, batch))
                found = {name: None if g is None else g.cpu() for name, g in gradients(model).items()}
                expected = paper_gradients(plain, [b.name for b in handle.branches], mask, plain_loss)
                dropped = {m for b, off in zip(handle.branches, mask) if off for m in b.modules}
                assert_same_gradients(found, {
                    name: None if name.rpartition(".")[0].startswith(tuple(dropped)) else gradient
                    for name, gradient in expected.items()
                })
            assert handle.report()["forwards"] == 16
            assert handle.device.memory_allocated_bytes() is None
        """,
    )


def test_a_run_with_the_defaults_trains_and_leaves_the_device_as_it_was() -> None:
    run(
        "Telling",
        """
        first = plain_loss(model, batch).item()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        with dropbp.enable(model, 0.5, device="chip", steps=20, example_inputs=batch) as handle:
            assert handle.device.memory_allocated_bytes() > 0
            for _ in range(20):
                optimizer.zero_grad()
                plain_loss(model, batch).backward()
                optimizer.step()
            assert abs(handle.report()["realised_drop_rate"] - 0.5) < 0.05
        assert plain_loss(model, batch).item() < 0.8 * first
        assert all(parameter.device.type == "chip" for parameter in model.parameters())
        """,
    )
