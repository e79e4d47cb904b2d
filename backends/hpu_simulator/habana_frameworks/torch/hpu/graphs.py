"""HPU graphs: not simulated, and refused rather than passed over."""

from dropbp.errors import DeviceError


def _refuse(name):
    raise DeviceError(
        f"{name} captures an HPU graph, which the simulated HPU does not do; run without HPU graphs "
        "(GaudiTrainer: use_hpu_graphs_for_training=False, use_hpu_graphs_for_inference=False), or on a device."
    )


def wrap_in_hpu_graph(*args, **kwargs):
    _refuse("wrap_in_hpu_graph")


def make_graphed_callables(*args, **kwargs):
    _refuse("make_graphed_callables")


class ModuleCacher:
    def __init__(self, *args, **kwargs):
        _refuse("ModuleCacher")
