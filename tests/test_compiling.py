"""Settings of the process that are changed for a while are as before afterwards, also when threads overlap."""

from __future__ import annotations

import concurrent.futures
import threading

import torch
import torch._dynamo
from torch._dynamo import eval_frame

from dropbp._torch import compiled_code_off
from dropbp.memory import track_tensor_bytes


def stance() -> str:
    return eval_frame._stance.stance


def test_the_last_of_two_overlapping_threads_turns_compiled_code_on_again() -> None:
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first() -> None:
        with compiled_code_off():
            first_in.set()
            assert second_in.wait(10)
        first_out.set()

    def second() -> None:
        assert first_in.wait(10)
        with compiled_code_off():
            second_in.set()
            assert first_out.wait(10)
            assert stance() == "force_eager"

    before = stance()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(first), pool.submit(second)]:
            future.result()
    assert stance() == before == "default"


def test_nested_use_and_errors_leave_the_stance_of_before() -> None:
    with torch.compiler.set_stance("eager_on_recompile"):
        try:
            with compiled_code_off(), track_tensor_bytes():
                assert stance() == "force_eager"
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        assert stance() == "eager_on_recompile"
    assert stance() == "default"
