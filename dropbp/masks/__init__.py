"""Masks: which branches a step drops, drawn from drop rates by a sampler."""

from __future__ import annotations

from dropbp.masks.samplers import Draws as Draws
from dropbp.masks.samplers import Mask as Mask
from dropbp.masks.samplers import Sampler as Sampler
from dropbp.masks.samplers import SamplerKind as SamplerKind
from dropbp.masks.samplers import realised_rate as realised_rate
from dropbp.masks.samplers import register_sampler as register_sampler
from dropbp.masks.samplers import sampler_kind as sampler_kind
from dropbp.masks.samplers import sampler_kinds as sampler_kinds
