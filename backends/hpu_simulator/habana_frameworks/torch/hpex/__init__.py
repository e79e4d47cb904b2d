"""Gaudi's own operators: the ones a training run touches."""

from habana_frameworks.torch.hpex import kernels, normalization, optimizers

__all__ = ["kernels", "normalization", "optimizers"]
