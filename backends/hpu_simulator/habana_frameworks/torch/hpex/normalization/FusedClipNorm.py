"""Gradient clipping that never leaves the device.

As Gaudi's: it marks a step before and after, and leaves out parameters without a gradient, so that its recipes depend
on which those are.
"""

import torch
from habana_frameworks.torch.core.step_closure import _mark_step_if_lazy


class FusedClipNorm:
    def __init__(self, parameters, max_norm):
        first = next(iter(parameters), None)
        dtype = torch.float32 if first is None else first.dtype
        self.max_norm_t = (torch.ones(1) * max_norm).to(dtype).to("hpu")

    @torch.no_grad()
    def clip_norm(self, parameters):
        """Scale the gradients to the norm given at the start, if theirs is larger; the norm before is returned."""
        _mark_step_if_lazy()
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return torch.tensor(0.0)
        total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        scale = (self.max_norm_t / (total + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale.to(gradient.dtype))
        _mark_step_if_lazy()
        return total
