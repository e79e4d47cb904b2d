"""Your own training loop and model, with DropBP. Runs on a CPU in seconds.

    python examples/plain_loop.py --drop-rate 0.5 --masks exact --calibrate

Under `exact` masks the drop rates can follow the branches' sensitivities; `nested`, the default, needs no calibration.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

import dropbp

WIDTH, CLASSES = 32, 4


class Block(nn.Module):
    """A residual block that no library knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x_BD: Tensor) -> Tensor:
        """Shapes: B batch, D width."""
        return x_BD + self.mlp(self.norm(x_BD))


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    """Points and the class of the nearest of four centres."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    points = [torch.randn(64, WIDTH, generator=generator) for _ in range(steps)]
    return [(x_BD, torch.cdist(x_BD, centres).argmin(-1)) for x_BD in points]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, print the table of branches, and return the handle's report with the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drop-rate", type=float, default=0.5)
    parser.add_argument("--masks", default="nested")
    parser.add_argument("--calibrate", action="store_true", help="set rates from sensitivities at a tenth of the run")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Block() for _ in range(6)), nn.Linear(WIDTH, CLASSES))
    optimizer, loss_of, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), nn.CrossEntropyLoss(), []
    example = torch.randn(2, WIDTH)
    with dropbp.enable(model, options.drop_rate, masks=options.masks, example_inputs=example) as handle:
        for step, (x_BD, labels_B) in enumerate(batches(options.steps)):
            if options.calibrate and step == options.steps // 10:
                handle.calibrate(lambda x_BD=x_BD, labels_B=labels_B: loss_of(model(x_BD), labels_B))
            loss = loss_of(model(x_BD), labels_B)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(handle.summary())
        report = handle.report()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return {**report, "losses": losses}


if __name__ == "__main__":
    main()
