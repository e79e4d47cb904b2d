"""AdamW that works on all parameters of a group in one graph.

As Gaudi's: it marks a step before each group and after the last, leaves out parameters without a gradient (so its
recipes depend on which those are), counts steps per group, and has `eps=1e-6` by default.
"""

import math

import torch
from habana_frameworks.torch.core.step_closure import _mark_step_if_lazy


class FusedAdamW(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, bias_correction=True):
        _check(lr, betas, eps)
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": bias_correction},
        )

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _mark_step_if_lazy()
            self._update(group, [p for p in group["params"] if p.grad is not None])
        _mark_step_if_lazy()
        return loss

    def _update(self, group, params):
        if not params:
            return
        group["step"] = group.get("step", 0) + 1
        step_size = _step_size(group)
        kept = 1.0 - group["weight_decay"] * group["lr"]
        for p in params:
            exp_avg, exp_avg_sq = self._moments(p)
            _adamw(p, exp_avg, exp_avg_sq, step_size, kept, group)

    def _moments(self, p):
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros(p.shape, dtype=p.dtype).to(p.device)
            state["exp_avg_sq"] = torch.zeros(p.shape, dtype=p.dtype).to(p.device)
        return state["exp_avg"], state["exp_avg_sq"]


def _check(lr, betas, eps):
    if lr < 0.0:
        raise ValueError(f"learning rate {lr} is negative; it must be 0 or more")
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas {betas} must be in [0, 1)")
    if eps < 0.0:
        raise ValueError(f"eps {eps} is negative; it must be 0 or more")


def _step_size(group):
    beta1, beta2 = group["betas"]
    if not group["bias_correction"]:
        return group["lr"]
    return group["lr"] * math.sqrt(1.0 - beta2 ** group["step"]) / (1.0 - beta1 ** group["step"])


def _adamw(p, exp_avg, exp_avg_sq, step_size, kept, group):
    beta1, beta2 = group["betas"]
    exp_avg.mul_(beta1).add_(p.grad, alpha=1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(p.grad, p.grad, value=1.0 - beta2)
    p.mul_(kept).addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(group["eps"]), value=-step_size)
