"""The device's random generator."""

import torch
from dropbp.backends.hpu_simulator._session import extension

default_generators = [extension().default_generator()]


def _generator(device):
    index = torch.device(device).index if isinstance(device, torch.device | str) else device
    if index not in (None, -1, 0):
        raise RuntimeError(f"asked for the generator of hpu:{index}; there is one device, hpu:0")
    return default_generators[0]


def get_rng_state(device="hpu"):
    return _generator(device).get_state()


def set_rng_state(new_state, device="hpu"):
    _generator(device).set_state(new_state)


def get_rng_state_all():
    return [get_rng_state()]


def set_rng_state_all(new_states):
    states = list(new_states)
    if len(states) != 1:
        raise RuntimeError(f"got random states of {len(states)} devices; there is one device")
    set_rng_state(states[0])


def manual_seed(seed):
    return default_generators[0].manual_seed(int(seed))


def manual_seed_all(seed):
    manual_seed(seed)


def seed():
    return default_generators[0].seed()


def seed_all():
    seed()


def initial_seed():
    return default_generators[0].initial_seed()
