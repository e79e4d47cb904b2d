"""The device's random generator. A process has that of its own device, which it calls 0; another one is refused."""

from dropbp.backends.hpu_simulator._session import extension
from habana_frameworks.torch.hpu._utils import device_index

default_generators = [extension().default_generator()]


def _generator(device, asked):
    if device_index(device) != 0:
        raise RuntimeError(f"hpu {asked} supports only device 0")
    return default_generators[0]


def get_rng_state(device="hpu"):
    return _generator(device, "get_rng_state").get_state()


def set_rng_state(new_state, device="hpu"):
    _generator(device, "set_rng_state").set_state(new_state)


def get_rng_state_all():
    return [get_rng_state()]


def set_rng_state_all(new_states):
    states = list(new_states)
    if len(states) != 1:
        raise RuntimeError(f"hpu set_rng_state_all supports only states len of 1, not {len(states)}")
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
