"""Masks: which branches a step drops, drawn from drop rates by a sampler."""

from __future__ import annotations

from dropbp.masks.registry import Draws as Draws
from dropbp.masks.registry import Mask as Mask
from dropbp.masks.registry import SamplerKind as SamplerKind
from dropbp.masks.registry import register_sampler as register_sampler
from dropbp.masks.registry import sampler_kind as sampler_kind
from dropbp.masks.registry import sampler_kinds as sampler_kinds
from dropbp.masks.samplers import Sampler as Sampler
