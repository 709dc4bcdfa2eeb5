"""The examples do what they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import machine
import opencl_in_tests
import pytest
from rich.console import Console

import uvas
from uvas.demo import moving

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*command: str) -> str:
    """Run a command to its good end; what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_device_in_python() -> None:
    out = run(sys.executable, "-W", "error", str(EXAMPLES / "my_device.py"))
    assert "both agree on" in out
    assert "1 candidate(s) of 2 were refused" in out
    assert out.endswith("released on both sides\n")


def run_without_python(name: str, directory: Path, *flags: str) -> str:
    """Build an example in C as a stranger would, and run it; what it prints."""
    library = Path(uvas.get_library())
    program = directory / name
    source = EXAMPLES / name / "main.c"
    flags = (*flags, "-Wall", "-Wextra", "-Werror", f"-I{uvas.get_include()}")
    run("cc", *flags, str(source), str(library), f"-Wl,-rpath,{library.parent}", "-o", str(program))
    assert "python" not in run("ldd", str(program)).lower().replace(str(library.parent).lower(), "")
    return run(str(program))


def test_a_runtime_in_c_without_python(tmp_path: Path) -> None:
    out = run_without_python("c_runtime", tmp_path, "-std=c11")
    assert "host and device agree on [0x2c01" in out
    assert 'is held by reservation "queue" of uvas space "c_runtime"' in out


def test_an_arena_in_c_without_python(tmp_path: Path) -> None:
    lines = run_without_python("c_arena", tmp_path, "-std=gnu11", "-pthread").splitlines()
    counts = re.fullmatch(
        r"80000 messages of (\d+) MiB went round, each freed by another thread; 0 live, at most (\d+) KiB were in use",
        lines[0],
    )
    assert counts, lines
    assert 100 < int(counts[1]) < 1000
    assert 0 < int(counts[2]) < int(counts[1]) << 10  # it was used again and again
    assert re.fullmatch("as it should be: 0x[0-9a-f]+ is not the base of a live block .*freed already.*", lines[1])
    mapped = re.fullmatch('mapped at 0x([0-9a-f]+), and at 0x([0-9a-f]+): "One memory, two addresses"', lines[2])
    assert mapped, lines
    first, second = (int(one, 16) for one in mapped.groups())
    assert first != second
    assert first % (2 << 20) == second % (2 << 20) == 0
    assert len(lines) == 3


def example(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one in Python, and return what it printed and its exit code."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_tour() -> None:
    out = run(sys.executable, "-W", "error", str(EXAMPLES / "reserve.py"))
    assert 'is held by reservation "exact" of uvas space "tour"' in out
    assert "and so is what a stranger has: " in out
    assert "a file inside the reservation: 'from a file'" in out
    assert "the very object: True" in out
    assert "nothing is released under a live array" in out
    assert "audit: 0 differences" in out


def test_pointers_mean_the_same_to_all() -> None:
    out = run(sys.executable, "-W", "error", str(EXAMPLES / "shared_pointers.py"))
    assert "left followed them and counts: the 5, and 2, course 1, uvas 0" in out
    assert "right followed them and counts: the 5, and 2, course 1, uvas 0" in out
    assert "the host and right now count [1, 6] and [1, 6]" in out


def test_a_solver_whose_arrays_lie_where_the_device_sees_them() -> None:
    out = run(sys.executable, "-W", "error", str(EXAMPLES / "conjugate_gradients.py"), "60")
    assert "the eigenvector of frequencies 3 and 5 is one, to " in out
    solved = re.search(r"60 x 60 points: (\d+) iterations, .* residual (\S+), largest error (\S+)\n", out)
    assert solved, out
    assert 10 < int(solved[1]) < 400
    assert float(solved[2]) < 1e-9
    assert float(solved[3]) < 1e-6
    assert "0 bytes of them travelled" in out
    assert "here and there: <Region 'vectors' [0x" in out
    assert "1 live, of 32 KiB" in out  # of 62 x 62 numbers; whatever the iterations made is gone
    assert "an array from elsewhere is refused: the array of shape (62, 62)" in out
    assert out.endswith("afterwards 0 blocks live\n")


def test_a_driver_s_buffers_at_addresses_of_an_arena() -> None:
    out = run(sys.executable, "-W", "error", str(EXAMPLES / "bare_arena.py"))
    assert " is 1 TiB with 0 bytes of memory" in out
    assert "written through the first address, read through the second: 0xc0ffee" in out
    assert "is byte 0xfa0 of a block of 'driver'" in out
    assert out.count("in no block") == 2
    assert " is not ours" in out
    assert "nothing is taken away under a live array: " in out
    assert "the address is used again: True; what is there now is 0" in out
    assert "10003 blocks of 19.5 GiB of addresses; the space has 0 bytes of memory committed" in out
    assert out.endswith("all is one hole again: True\nreleased\n")


def test_an_index_that_two_devices_probe() -> None:
    out = run(sys.executable, "-W", "error", str(EXAMPLES / "hash_index.py"), "20000")
    assert "all of them right: True" in out
    faults = re.findall(r"^   (host|left|right): (\d+) faults, (\d+) KiB came in", out, re.MULTILINE)
    assert [name for name, _, _ in faults] == ["host", "left", "right"] * 2
    assert all(int(count) > 0 for _, count, _ in faults)
    table = int(re.search(r"the table of keys, (\d+) KiB, stayed", out)[1])
    again = int(re.search(r"by the host (\d+) KiB came to left anew", out)[1])
    assert table == 512
    assert 0 < again < 2 * table + 1024


def test_a_plate_in_two_halves() -> None:
    """Who has the rows at the border at the end, and how many were sent ahead, is a matter of who came first.

    So the plate is large: a row of the other half for each, every step, and never a part of it that counts.
    """
    out = run(sys.executable, "-W", "error", str(EXAMPLES / "stencil.py"), "10", "1024").splitlines()
    assert out[0].endswith("8 MiB: 11111111111111112222222222222222")
    assert re.fullmatch(r"after 10 steps: +1{15}[12+]{2}2{15}", out[1])
    rows = re.search(r": (\d+\.\d) rows a step, of 1024", out[2])
    assert rows, out
    assert 2 <= float(rows[1]) <= 64
    assert out[3].startswith("the same, to the bit, as the host alone: True")


def test_a_sort_of_more_than_the_device_holds() -> None:
    out = run(sys.executable, "-W", "error", str(EXAMPLES / "out_of_core_sort.py"), "24", "8")
    assert "24 MiB of data, 8 MiB of device memory" in out
    assert "6 runs, 24 pieces, all in order" in out
    moved = re.search(r"(\d+) MiB came to the device and (\d+) MiB went back, in (\d+) faults; (\d+) evictions", out)
    assert moved, out
    assert int(moved[1]) >= 3 * 24 - 8  # to be sorted, to be gathered, and what is written
    assert int(moved[4]) > 0


def test_many_libraries_over_one_memory() -> None:
    out = run(sys.executable, str(EXAMPLES / "exchange.py"))
    assert "NumPy" in out
    assert "both are unified: True" in out
    assert out.endswith("everybody let go of it, and the arena is closed\n")


def test_a_kernel_walks_what_the_host_linked() -> None:
    opencl_in_tests.device().close()
    out = run(sys.executable, "-W", "error", str(EXAMPLES / "opencl_pointers.py"))
    found = re.search(r"10000 look-ups, (\d+) found, all right: True", out)
    assert found, out
    assert 8900 < int(found[1]) < 9100
    assert "the kernel finds 4711 there" in out
    assert "nothing is copied unasked: keys of look_up: the array of shape (20000,) and dtype uint64" in out


def test_a_kernel_without_opencl_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "pyopencl.py").write_text("raise ImportError('not here')")
    command = [sys.executable, str(EXAMPLES / "opencl_pointers.py")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 2, done.stderr
    assert "uvas[opencl]" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_segments_of_a_position_independent_file(tmp_path: Path) -> None:
    source, program = tmp_path / "program.c", tmp_path / "program"
    source.write_text("int data = 1; int main(void) { return data - 1; }")
    run("cc", "-fPIE", "-pie", "-o", str(program), str(source))
    done = example("elf_segments.py", str(program))
    assert done.returncode == 0, done.stderr
    assert " rx " in done.stdout
    assert " rw " in done.stdout
    assert "DIFFERENT" not in done.stdout


def fixed_program(directory: Path) -> Path:
    """Build a program with addresses of its own, and zeros behind its data."""
    source = directory / "fixed.c"
    source.write_text("""
        int data[300] = {1, 2, 3};
        char zeros[9000];
        __attribute__((noreturn)) void _start(void) {
            for (;;) data[0] += zeros[1];
        }
    """)
    program = directory / "fixed"
    place = ["-static", "-no-pie", "-mcmodel=large", "-Wl,-Ttext-segment=0x2d0000000000"]
    run("cc", "-nostdlib", *place, "-o", str(program), str(source))
    return program


def test_segments_at_fixed_addresses_or_not_at_all(tmp_path: Path) -> None:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import elf_segments
    finally:
        sys.path.pop(0)
    program = fixed_program(tmp_path)
    done = example("elf_segments.py", str(program))
    assert done.returncode == 0, done.stderr
    assert "[0x2d0000000000," in done.stdout
    assert "where it demands" in done.stdout
    with uvas.AddressSpace() as space:
        span, bias = elf_segments.load(space, program)
        data = next(one for one in elf_segments.segments_of(program)[1] if one.size > one.file_size)
        array = span.numpy("u1", data.size, offset=data.address - span.base)
        assert bias == 0
        assert array[: data.file_size].any()
        assert not array[data.file_size :].any()
        del array
        with pytest.raises(uvas.AddressInUseError, match="fixed"):  # it is there already
            elf_segments.load(space, program)
        span.release()
    assert machine.map_at(0x2D00_0000_1000, machine.PAGE)
    try:
        assert elf_segments.main(str(program)) == 1
        assert [one for one in machine.mappings() if one.start == 0x2D00_0000_1000]
    finally:
        machine.unmap(0x2D00_0000_1000, machine.PAGE)


def test_what_is_no_elf_file_is_refused_politely(tmp_path: Path) -> None:
    for name, content in (("empty", b""), ("text", b"#!/bin/sh"), ("cut", b"\x7fELF\x02\x01" + bytes(60))):
        (tmp_path / name).write_bytes(content)
        done = example("elf_segments.py", str(tmp_path / name))
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
    done = example("elf_segments.py", str(tmp_path / "not there"))
    assert done.returncode == 2
    assert "not there" in done.stderr


def test_the_demo_verifies_what_it_claims() -> None:
    outcome = json.loads(run(sys.executable, "-W", "error", "-m", "uvas", "demo", "--json"))
    assert outcome["failures"] == []
    assert outcome["right_answers"] == outcome["queries"] == 2000
    assert outcome["conflicts"] > 0
    assert outcome["squatter_blocks"] > 0
    assert outcome["squatter_bytes_lost"] == 0
    assert outcome["audit_findings"] == 0
    assert outcome["moving_refused"] == ""
    assert outcome["moving_faults"] > 0
    assert outcome["moving_evictions"] > 0
    pictures = dict(enumerate(outcome["moving_pictures"]))
    assert pictures[1] == "H" * 64
    assert pictures[2] == "+" * 8 + "H" * 56
    assert pictures[3] == "L" * 8 + "H" * 56
    assert pictures[4] == "L" * 8 + "H" * 24 + "R" * 32
    assert pictures[5] == "+" * 8 + "H" * 24 + "R" * 32
    assert pictures[7].count("+") >= 8
    assert pictures[8] == "H" * 64
    assert pictures[9] == "+" * 64
    assert outcome["clobber_lost"] > 0 or outcome["clobber_deaths"]


def test_the_demo_in_kernels_too() -> None:
    opencl_in_tests.device().close()
    outcome = json.loads(run(sys.executable, "-W", "error", "-m", "uvas", "demo", "--json", "--opencl"))
    assert outcome["failures"] == []
    assert outcome["right_in_kernels"] == outcome["right_answers"] == 2000


def test_the_demo_in_kernels_without_opencl_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "pyopencl.py").write_text("raise ImportError('not here')")
    command = [sys.executable, "-m", "uvas", "demo", "--opencl"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert "uvas[opencl]" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_moving_act_notices_wrong_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def _count(words, more):
        words += 2  # here; the devices count as they should
        return True

    _count.__module__, _count.__qualname__ = moving.__name__, "_count"
    monkeypatch.setattr(moving, "_count", _count)
    assert not moving.show(Console(quiet=True)).right
    monkeypatch.undo()
    assert moving.show(Console(quiet=True)).right


def test_the_demo_shows_the_harm_from_wherever_it_is_started(tmp_path: Path) -> None:
    """In a checkout whose package is installed elsewhere, ``-m`` would find sources that are not built."""
    (tmp_path / "uvas").mkdir()
    (tmp_path / "uvas" / "__init__.py").write_text("raise ImportError('sources, not built')")
    program = "from uvas.demo.run import main; raise SystemExit(main(as_json=True))"
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["clobber_maps"] > 0
    assert not [death for death in outcome["clobber_deaths"] if death.startswith("exit code")]


@pytest.mark.parametrize("name", ["cuda_list", "cuda_saxpy", "cuda_prefetch"])
def test_cuda_examples_do_what_they_say_or_say_what_is_missing(name: str) -> None:
    out = run(sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"))
    done = {"cuda_list": "appended node 1001", "cuda_saxpy": "nothing copied", "cuda_prefetch": "through the card"}
    assert done[name] in out or out.startswith("this example needs a CUDA GPU: "), out


ON_FAKES = """
import gc, runpy, sys, time
sys.path.insert(0, {tests!r})
import fake_cuda, fake_cupy
class Patch:
    setattr = staticmethod(setattr)
    setitem = staticmethod(lambda mapping, key, value: mapping.update({{key: value}}))
fake = fake_cuda.FakeDriver(fake_cuda.FakeCard(dict(fake_cuda.{card}))).install(Patch)
fake_cupy.install(Patch, fake)
runpy.run_path({example!r}, run_name="__main__")
for _ in range(200):  # its globals are in a cycle with its functions; what went with them is given back by a thread
    gc.collect()
    if not fake.leaks():
        break
    time.sleep(0.05)
assert fake.leaks() == [], fake.leaks()
"""


@pytest.mark.parametrize("card", ["HMM_CARD", "REGISTER_CARD", "VMM_CARD"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cuda_list", "the kernel followed 1000 pointers of the host's"),
        ("cuda_saxpy", "y = 2 x + y over 1,048,576 floats"),
        ("cuda_prefetch", "MiB went through the card"),
    ],
)
def test_what_needs_a_card_works_over_the_fake_of_its_driver(name: str, said: str, card: str) -> None:
    pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings: pip install 'uvas[test]'")
    program = ON_FAKES.format(tests=str(Path(__file__).parent), card=card, example=str(EXAMPLES / f"{name}.py"))
    out = run(sys.executable, "-W", "error", "-c", program)
    if (name, card) in (("cuda_prefetch", "REGISTER_CARD"), ("cuda_prefetch", "VMM_CARD")):
        assert "this example needs a CUDA GPU: CUDA device 0: hmm: cuda:0: the card cannot access" in out
    else:
        assert said in out
