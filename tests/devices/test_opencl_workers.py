"""OpenCL devices beside workers: kernels meet what those wrote, also where the memory is a worker's own."""

from __future__ import annotations

from collections.abc import Iterator

import on_device
import opencl_kernels
import pytest

import uvas

device, kernels = opencl_kernels.device, opencl_kernels.kernels


@pytest.fixture(params=["shared", "private"])
def worker(request, device) -> Iterator[uvas.ProcessDevice]:
    try:
        one = uvas.ProcessDevice(name="worker", memory=request.param)
    except uvas.NotSupportedError as refusal:
        pytest.skip(str(refusal))
    with one:
        yield one


def test_a_kernel_meets_what_a_worker_wrote_and_the_other_way_round(device, kernels, worker):
    """With private memory the pages are the worker's: a kernel that meets one waits for it and gets it."""
    private = worker.info.memory == "private"
    with uvas.AddressSpace([worker, device], name="three") as space, space.reserve(1 << 20) as held:
        held.commit()
        nodes, total = held.numpy("u8", (1000, 2)), held.numpy("i8", 1, offset=1 << 19)
        for _ in range(3):
            first = worker.run(on_device.chain, nodes)
            if private:
                assert set(space.where(nodes)) == {uvas.PageFlag.device(1)}  # and nobody else has them
                before = space.movement().host
            device.run(kernels("walk"), 1, None, first, total)
            if private:
                moved = space.movement().host
                assert moved.read_faults + moved.write_faults > before.read_faults + before.write_faults
                assert all(word & uvas.PageFlag.HOST for word in space.where(nodes))
            assert total[0] == 5000
            total[0] = 0
            device.run(kernels("walk_from"), 1, None, first, total)
            assert int.from_bytes(worker.read(total.ctypes.data, 8), "little") == 5000
        del nodes, total


def test_a_kernel_and_a_worker_write_into_one_page_at_the_same_time(device, kernels, worker):
    """With private memory it goes to and fro; nobody's words are lost."""
    with uvas.AddressSpace([worker, device], name="both") as space, space.reserve(1 << 16) as held:
        held.commit()
        theirs, ours, ready = held.numpy("u8", 1), held.numpy("u8", 1, offset=64), held.numpy("i4", 1, offset=128)
        worker.run(on_device.count_up, theirs, 1)
        future = device.submit(kernels("count"), 1, None, ours, 1 << 24, ready)
        while not ready[0] and not future.done():
            pass
        assert worker.run(on_device.count_up, theirs, 20_000) == 20_001
        future.result(60)
        assert (theirs[0], ours[0]) == (20_001, 1 << 24)
        if worker.info.memory == "private":
            movement = space.movement()
            assert movement.host.bytes_in > 0
            assert movement.devices["worker"].bytes_in > 0
        del theirs, ours, ready
