"""Masks: which branches a step drops, drawn from drop rates by a sampler."""

from __future__ import annotations

from dropbp.masks.samplers import Coupling as Coupling
from dropbp.masks.samplers import Draws as Draws
from dropbp.masks.samplers import Mask as Mask
from dropbp.masks.samplers import Sampler as Sampler
from dropbp.masks.samplers import coupling as coupling
from dropbp.masks.samplers import couplings as couplings
from dropbp.masks.samplers import realised_rate as realised_rate
from dropbp.masks.samplers import register_coupling as register_coupling
