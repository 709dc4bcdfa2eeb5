"""CudaDevice on a real GPU, by kernels: ``pytest -m cuda``. Where there is none, each test says so.

How each test ends is written, with the driver's version and the card, to ``benchmarks/results/cuda_tests.json``. And
each runs everywhere over the fake of the driver, on which kernels are C: a test is not to fail on a card for what is
wrong with the test.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from machine import MIB, NOREPLACE, libc, mappings

import uvas

ADD = r"""
extern "C" __global__ void add(unsigned long long *values, unsigned long long count, unsigned long long amount) {
    unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
    if (i < count) values[i] += amount;
}
"""
WALK = r"""
struct node { unsigned long long next; long long value; };
extern "C" __global__ void walk(struct node *at, long long *sum) {
    long long total = 0;
    for (; at; at = (struct node *)at->next) total += at->value;
    *sum = total;
}
"""


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.cuda)])
def real(request) -> bool:
    """Whether the card is one."""
    return bool(request.param == "real")


@pytest.fixture
def gpu(real, monkeypatch) -> Iterator[Callable[[str], uvas.CudaDevice]]:
    """Make a device with a strategy, or skip with the reason."""
    made = []

    def one(strategy: str) -> uvas.CudaDevice:
        try:
            made.append(uvas.CudaDevice(strategy=strategy))
        except uvas.NotSupportedError as error:
            pytest.skip(f"no hardware for it: {error}")
        return made[-1]

    with ExitStack() as stack:
        if not real:
            pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings: pip install 'uvas[test]'")
            import fake_cuda
            import fake_cupy

            fake = stack.enter_context(fake_cuda.fake_driver(monkeypatch))
            fake_cupy.install(monkeypatch, fake)
            stack.callback(lambda: check(fake.leaks() == []))
        else:
            from uvas.devices.cuda import driver

            driver.forget()
            pytest.importorskip("cupy", reason="needs CuPy: pip install 'uvas[cuda]'")
        yield one
        for device in made:
            device.close()


def check(holds: bool) -> None:
    assert holds


def kernel(source: str, name: str) -> object:
    import cupy

    return cupy.RawKernel(source, name)


def launch(kernel: object, blocks: int, *arguments: object) -> None:
    import cupy

    kernel((blocks,), (256,), arguments)
    cupy.cuda.get_current_stream().synchronize()


STRATEGIES = pytest.mark.parametrize("strategy", ["hmm", "register", "vmm"])


@STRATEGIES
def test_a_kernel_writes_at_the_hosts_address(gpu, strategy):
    device = gpu(strategy)
    with uvas.AddressSpace([device]) as space, space.reserve(16 * MIB) as held:
        held.commit()
        array = held.numpy("u8", MIB)
        array[:] = np.arange(MIB)
        seen = uvas.ascupy(array)
        assert seen.data.ptr == array.ctypes.data
        launch(kernel(ADD, "add"), MIB // 256, seen, np.uint64(MIB), np.uint64(5))
        with uvas.host_access(seen) as host:
            assert (host == np.arange(MIB) + 5).all()
        del array, seen, host
        held.decommit()


@STRATEGIES
def test_a_kernel_follows_pointers_of_the_hosts(gpu, strategy):
    device = gpu(strategy)
    with uvas.AddressSpace([device]) as space, uvas.Arena(space) as arena:
        blocks = [arena.alloc(16) for _ in range(1000)]
        nodes = [block.numpy("i8", 2) for block in blocks]
        for i, node in enumerate(nodes):
            node[:] = blocks[i + 1].base if i + 1 < len(blocks) else 0, i
        total = arena.alloc(8).numpy("i8", 1)
        launch(kernel(WALK, "walk"), 1, np.uint64(blocks[0].base), uvas.ascupy(total))
        assert total[0] == sum(range(1000))
        del nodes, node, total, blocks


@STRATEGIES
def test_new_memory_is_zero_on_both_sides(gpu, strategy):
    device = gpu(strategy)
    with uvas.AddressSpace([device]) as space, space.reserve(4 * MIB) as held:
        for _ in range(3):
            held.commit()
            array = held.numpy("u1")
            assert not array.any()
            array[:] = 0xA5
            del array
            held.decommit()


@STRATEGIES
def test_release_gives_the_addresses_back(gpu, strategy):
    device = gpu(strategy)
    with uvas.AddressSpace([device]) as space:
        for _ in range(20):
            with space.reserve(8 * MIB) as held:
                held.commit(0, 4 * MIB)
            assert mappings(held.base, held.end) == []


def test_the_drivers_reservation_is_the_hosts_too(gpu, record_property):
    """What invariant 1 leans on for `owns`."""
    device = gpu("vmm")
    with uvas.AddressSpace([device]) as space, space.reserve(8 * MIB) as held:
        record_property("the driver's mappings", [str(one) for one in mappings(held.base, held.end)])
        covered = sum(min(one.end, held.end) - max(one.start, held.base) for one in mappings(held.base, held.end))
        assert covered == held.size
        got = libc.mmap(held.base, 2 * MIB, 0, 0x22 | NOREPLACE, -1, 0)
        assert got != held.base
        if got not in (None, (1 << 64) - 1):  # a kernel that takes the flag for a hint
            assert libc.munmap(got, 2 * MIB) == 0
            record_property("MAP_FIXED_NOREPLACE over the driver's range", f"moved to {got:#x}")
        assert space.audit().findings == ()


def test_memory_on_the_card_grows_and_is_aliased(gpu):
    import cupy

    device = gpu("vmm")
    with uvas.AddressSpace([device]) as space, space.reserve(8 * MIB) as held, space.reserve(8 * MIB) as mirror:
        held.commit(0, 2 * MIB, location=device)
        held.commit(2 * MIB, 2 * MIB, location=device)
        seen = held.cupy("u8", 4 * MIB // 8)
        launch(kernel(ADD, "add"), len(seen) // 256, seen, np.uint64(len(seen)), np.uint64(7))
        assert int(seen.sum()) == 7 * len(seen)
        mirror.commit(0, 2 * MIB, location=uvas.Range(held.base, 2 * MIB))
        assert int(cupy.sum(mirror.cupy("u8", 10))) == 70
        with pytest.raises(ValueError, match="lies on a device"):
            held.numpy("u1", 10)
        del seen


def test_pages_move_on_request(gpu, real, record_property):
    device = gpu("hmm")
    with uvas.AddressSpace([device]) as space, space.reserve(64 * MIB) as held:
        held.commit()
        array = held.numpy("u8")
        array[:] = 3
        space.prefetch(array, device)
        told = device.where(held.range)
        if told is not None:
            on_card = float((told == 2).mean())
            record_property("pages on the card after a prefetch", on_card)
            assert on_card > 0.9 or not real
        space.prefetch(array, "host")
        assert (array == 3).all()
        del array


def test_advice_is_taken_and_taken_back(gpu):
    device = gpu("hmm")
    with uvas.AddressSpace([device]) as space, space.reserve(4 * MIB) as held:
        held.commit(populate=True)
        for advice, applies in (("read_mostly", None), ("preferred_location", device), ("accessed_by", device)):
            space.advise(held, advice, applies)
        space.advise(held, "preferred_location", "host")
        space.advise(held, None)


@pytest.mark.parametrize("strategy", ["register", "vmm"])
def test_protection_holds_and_goes(gpu, strategy, record_property):
    """What a driver may refuse; then nothing has changed."""
    device = gpu(strategy)
    with uvas.AddressSpace([device]) as space, space.reserve(4 * MIB) as held:
        held.commit()
        array = held.numpy("u8")
        array[:] = 7
        for protection in ("r", "none"):
            try:
                held.protect(0, held.size, protection)
            except (uvas.DeviceError, uvas.NotSupportedError) as refusal:
                record_property(f"protect({protection!r}) on {strategy}", str(refusal))
                array[0] = 7  # as before
                continue
            held.protect(0, held.size, "rw")
            assert (array == 7).all()
            launch(kernel(ADD, "add"), len(array) // 256, np.uint64(held.base), np.uint64(len(array)), np.uint64(1))
            assert (array == 8).all()
            array[:] = 7
        del array


@pytest.mark.parametrize("apart", [False, True], ids=["blocking", "non-blocking"])
@STRATEGIES
def test_a_capture_goes_on_and_nothing_is_taken_away(gpu, strategy, apart):
    import cupy

    device = gpu(strategy)
    with uvas.AddressSpace([device]) as space, uvas.Arena(space) as arena:
        allocator, stream = uvas.cupy_allocator(arena), cupy.cuda.Stream(non_blocking=apart)
        add = kernel(ADD, "add")
        with allocator, stream:
            values = cupy.zeros(1024, "u8")
            add((4,), (256,), (values, np.uint64(1024), np.uint64(0)))  # loads it
            stream.synchronize()
            before = int(values[0])
            held = space.reserve(4 * MIB)
            stream.begin_capture()
            held.commit()
            add((4,), (256,), (values, np.uint64(1024), np.uint64(1)))
            with pytest.raises(uvas.DeviceError, match="CAPTURE"):
                allocator.trim()
            if not apart:  # where it cannot be seen, the driver would end the capture
                with pytest.raises(uvas.DeviceError, match="CAPTURE"):
                    held.decommit()
            graph = stream.end_capture()
            graph.launch(stream=stream)
            stream.synchronize()
            assert int(values[0]) == before + 1
            held.release()
            del values
        allocator.close()


@STRATEGIES
def test_cupy_allocates_from_an_arena(gpu, strategy):
    import cupy

    device = gpu(strategy)
    with uvas.AddressSpace([device]) as space, uvas.Arena(space) as arena:
        allocator = uvas.cupy_allocator(arena)
        with allocator:
            a = cupy.arange(10_000, dtype="f8")
            b = a * 2 + 1
        assert uvas.allocation_of(int(b.data.ptr)).arena is arena
        assert (uvas.asnumpy(b) == np.arange(10_000) * 2 + 1).all()
        with allocator:
            pointer = int(b.data.ptr)
            del b
            assert int(cupy.empty(10_000, "f8").data.ptr) == pointer  # the same stream gets it again
        del a
        allocator.close()


def test_a_block_waits_for_its_stream(gpu):
    import cupy

    device = gpu("register")
    with uvas.AddressSpace([device]) as space, uvas.Arena(space) as arena:
        stream = cupy.cuda.Stream(non_blocking=True)
        block = arena.alloc(32 * MIB)
        block.used_on(stream)
        with stream:
            seen = block.cupy("u8")
            for _ in range(200):
                kernel(ADD, "add")((len(seen) // 256,), (256,), (seen, np.uint64(len(seen)), np.uint64(1)))
        del seen
        block.free()
        stream.synchronize()
        arena.trim()
        assert arena.stats().live_blocks == 0


def in_a_process(strategy: str, real: bool, program: str) -> str:
    """Run a program that ends the context of its process, or leaves it; what it prints."""
    begin = BEGIN if real else FAKE.format(tests=str(Path(__file__).parents[1])) + BEGIN
    command = [sys.executable, "-P", "-W", "ignore", "-c", begin.format(strategy=strategy) + program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.stderr.startswith("skip: "):
        pytest.skip(f"no hardware for it: {done.stderr[6:].strip()}")
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


FAKE = """
import sys
sys.path.insert(0, {tests!r})
import fake_cuda, fake_cupy
class Patch:
    setattr = staticmethod(setattr)
    setitem = staticmethod(lambda mapping, key, value: mapping.update({{{{key: value}}}}))
fake_cupy.install(Patch, fake_cuda.FakeDriver().install(Patch))
"""
BEGIN = """
import numpy as np, uvas
try:
    device = uvas.CudaDevice(strategy={strategy!r})
except uvas.NotSupportedError as error:
    raise SystemExit(f"skip: {{error}}")
import cupy
space = uvas.AddressSpace([device])
held = space.reserve(1 << 22)
held.commit()
array = held.numpy("u8")
array[:] = 5
"""


@STRATEGIES
def test_the_card_dies_of_a_bad_address_with_a_typed_error(real, strategy):
    dies = """
kernel = cupy.RawKernel('extern "C" __global__ void bad(int *p) { *p = 1; }', "bad")
try:
    kernel((1,), (1,), (np.uint64(0x1000),))
    cupy.cuda.get_current_stream().synchronize()
except Exception as error:
    print("CuPy says:", str(error).splitlines()[0])
try:
    device.card.synchronize()
    space.reserve(1 << 21).commit()
except uvas.DeviceLostError as error:
    print("lost:", error.name)
assert device.lost and (array == 5).all()
import os, sys
sys.stdout.flush()
os._exit(0)
"""
    assert "lost: CUDA_ERROR_" in in_a_process(strategy, real, dies)


@STRATEGIES
def test_the_interpreter_ends_with_everything_open(real, strategy):
    """Arrays, a stream's blocks, the space and the device: nothing is closed."""
    leaves = """
arena = uvas.Arena(space)
allocator = uvas.cupy_allocator(arena)
with allocator:
    values = cupy.arange(1000)
block = arena.alloc(1000)
block.used_on(cupy.cuda.get_current_stream())
print("sum", int(values.sum()))
"""
    assert in_a_process(strategy, real, leaves) == "sum 499500\n"


@STRATEGIES
def test_a_forked_child_calls_nothing_and_ends(real, strategy):
    forks = """
import os
seen = held.cupy("u8", 10)
child = os.fork()
if not child:
    code = 1
    try:
        for verb in (held.decommit, uvas.CudaDevice, lambda: space.reserve(1 << 21)):
            try:
                verb()
            except uvas.ReleasedError:
                continue
            raise AssertionError("went on in a child")
        device.close()
        code = 0
    finally:
        os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("card", int(seen.sum()))
"""
    assert in_a_process(strategy, real, forks) == "card 50\n"
