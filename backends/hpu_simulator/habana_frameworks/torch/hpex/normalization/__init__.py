"""Fused normalization and clipping."""

from habana_frameworks.torch.hpex.normalization.FusedClipNorm import FusedClipNorm

__all__ = ["FusedClipNorm"]
