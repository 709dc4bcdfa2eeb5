"""Functions that run in a worker: what travels, and how it fails."""

from __future__ import annotations

import functools
import operator
import os
import pickle
import threading
from concurrent.futures import CancelledError

import numpy as np
import on_device
import pytest

import uvas


@pytest.fixture
def device(reused: uvas.ProcessDevice) -> uvas.ProcessDevice:
    """One for all tests."""
    return reused


def test_a_function_runs_elsewhere(device):
    assert device.run(on_device.process_id) == device.pid != os.getpid()


def test_it_runs_on_the_main_thread(device):
    assert device.run(on_device.thread_is_main)


def test_arguments_by_place_and_by_name(device):
    assert device.run(on_device.keywords, 5, second=3) == 2


def test_an_argument_may_have_the_name_of_a_parameter_of_submit(device):
    assert device.run(dict, function=1, self=2) == {"function": 1, "self": 2}


@pytest.mark.parametrize(
    "value",
    [None, True, -1, 1 << 70, 1.5, "text", b"bytes", [1, [2]], {"a": (1,)}, {1, 2}, range(3), np.float32(1.5), 2 + 3j],
    ids=repr,
)
def test_values_travel_by_pickle(device, value):
    there_and_back = device.run(on_device.same, value)
    assert there_and_back == value
    assert type(there_and_back) is type(value)


def test_partial_functions_and_methods(device):
    assert device.run(functools.partial(on_device.keywords, second=1), 5) == 4
    assert device.run("a b".split) == ["a", "b"]
    assert device.run(operator.methodcaller("upper"), "x") == "X"


def test_what_is_large_travels_too(device):
    large = os.urandom(5 << 20)
    assert device.run(on_device.same, large) == large


def test_calls_run_one_after_the_other_in_order(device):
    for i in range(100):
        device.submit(on_device.keep, i)
    assert device.run(sorted_kept) == (list(range(100)), True)


def sorted_kept() -> tuple[list[int], bool]:
    return on_device.kept, on_device.kept == sorted(on_device.kept)


def test_many_threads_submit(device):
    results: list[list[int]] = [[] for _ in range(8)]

    def submit(own: list[int], start: int) -> None:
        own.extend(device.submit(on_device.double, start + i).result() for i in range(50))

    threads = [threading.Thread(target=submit, args=(own, 1000 * i)) for i, own in enumerate(results)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[2 * (1000 * i + j) for j in range(50)] for i in range(8)]


def test_a_lambda_is_refused_at_once(device):
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        device.submit(lambda: 1)
    assert device.run(on_device.double, 2) == 4


def test_what_cannot_be_pickled_is_refused_at_once(device):
    with pytest.raises(TypeError, match="lock"):
        device.submit(on_device.same, threading.Lock())


# ---- failures --------------------------------------------------------------------------------------------------------


def test_an_exception_comes_back_with_its_traceback(device):
    with pytest.raises(ValueError, match=r"^from the worker$") as caught:
        device.run(on_device.fail, "value")
    assert caught.value.__cause__ is not None
    text = str(caught.value.__cause__)
    assert "on_device.py" in text
    assert "in fail" in text
    assert 'raise ValueError("from the worker")' in text


def test_a_chain_of_exceptions_is_in_the_text(device):
    with pytest.raises(ValueError, match="outer") as caught:
        device.run(on_device.fail, "chain")
    assert "KeyError: 'inner'" in str(caught.value.__cause__)


def test_the_worker_survives_sys_exit(device):
    future = device.submit(on_device.fail, "exit")
    assert isinstance(future.exception(), SystemExit)
    assert device.run(on_device.process_id) == device.pid


def test_an_exception_that_cannot_be_made_again(device):
    with pytest.raises(uvas.DeviceError, match=r"fail raised .*Unkind: not to be made again.* cannot travel") as caught:
        device.run(on_device.fail, "unkind")
    assert "in fail" in str(caught.value.__cause__)
    assert not isinstance(caught.value, uvas.DeviceLostError)


def test_an_exception_that_cannot_be_pickled(device):
    with pytest.raises(uvas.DeviceError, match="fail raised ValueError") as caught:
        device.run(on_device.fail, "lambda")
    assert "in fail" in str(caught.value.__cause__)
    assert device.run(on_device.double, 1) == 2


def test_a_result_that_cannot_be_pickled(device):
    with pytest.raises(TypeError, match=r"the result of unpicklable cannot be sent back: .*lock"):
        device.run(on_device.unpicklable)
    assert device.run(on_device.double, 1) == 2


def test_errors_of_uvas_come_back_as_themselves(device, space):
    with space.reserve(4096) as held:
        with pytest.raises(uvas.AddressInUseError) as caught:
            device.run(on_device.reserve_there, held.base, 4096)
        assert caught.value.wanted == held.range
        assert caught.value.obstacle == held.range


def test_an_interrupt_does_not_reach_the_worker(device):
    assert device.run(on_device.interrupted) == "unmoved"


# ---- futures ---------------------------------------------------------------------------------------------------------


def test_a_call_that_waits_can_be_cancelled_and_one_at_work_cannot(device, pipe):
    at_work = device.submit(on_device.waits_for, pipe)
    waiting = device.submit(on_device.keep, "cancelled")
    last = device.submit(sorted_kept)
    assert not at_work.cancel()
    assert waiting.cancel()
    with open(pipe, "w") as end:
        end.write("go on")
    assert at_work.result() == "go on"
    assert last.result() == ([], True)
    with pytest.raises(CancelledError):
        waiting.result()


def test_a_callback_may_submit(device):
    chained = threading.Event()
    results = []

    def and_again(future):
        follower = device.submit(on_device.double, future.result())
        follower.add_done_callback(lambda one: (results.append(one.result()), chained.set()))

    device.submit(on_device.double, 1).add_done_callback(and_again)
    assert chained.wait(30)
    assert results == [4]


def test_claims_are_answered_while_a_function_runs(device, space, tmp_path):
    at_work = device.submit(on_device.spins_until, str(tmp_path / "done"))
    with space.reserve(1 << 20) as held:
        held.commit()
        held.numpy("u1")[:] = 7
        assert device.read(held.base, 3) == b"\7\7\7"
        assert not at_work.done()
    (tmp_path / "done").touch()
    assert at_work.result() > 0


def test_what_is_printed_appears_when_the_call_is_done(capfd):
    with uvas.ProcessDevice() as device:
        device.run(on_device.say, "hello from the worker")
        assert capfd.readouterr().out == "hello from the worker\n"
