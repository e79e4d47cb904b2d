"""Which generation the device is: a Gaudi2."""

import enum

from habana_frameworks.torch import hpu

__all__ = ["_get_device_type", "hpu", "synDeviceType"]


class synDeviceType(enum.Enum):
    synDeviceGaudi = 1
    synDeviceGaudi2 = 2
    synDeviceGaudi3 = 3


def _get_device_type():
    return synDeviceType.synDeviceGaudi2
