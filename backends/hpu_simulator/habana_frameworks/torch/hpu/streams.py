"""Streams and events. Everything is synchronous, so they only have to be accepted."""

import contextlib

import torch

# PyTorch's own, which belong to the accelerator of the process.
Stream = torch.Stream
Event = torch.Event


def current_stream(device=None):
    return torch.accelerator.current_stream(torch.device("hpu", 0))


def default_stream(device=None):
    return current_stream()


def set_stream(stream):
    torch.accelerator.set_stream(stream)


@contextlib.contextmanager
def stream(stream):
    if stream is None:
        yield
        return
    before = current_stream()
    set_stream(stream)
    try:
        yield
    finally:
        set_stream(before)
