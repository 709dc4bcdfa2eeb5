"""The examples do what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import machine
import pytest

import uvas

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


def test_a_runtime_in_c_without_python(tmp_path: Path) -> None:
    library = Path(uvas.get_library())
    program = tmp_path / "c_runtime"
    source = EXAMPLES / "c_runtime" / "main.c"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{uvas.get_include()}"]
    run("cc", *flags, str(source), str(library), f"-Wl,-rpath,{library.parent}", "-o", str(program))
    out = run(str(program))
    assert "host and device agree on [0x2c01" in out
    assert 'is held by reservation "queue" of uvas space "c_runtime"' in out
    assert "python" not in run("ldd", str(program)).lower().replace(str(library.parent).lower(), "")


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


def test_many_libraries_over_one_memory() -> None:
    out = run(sys.executable, str(EXAMPLES / "exchange.py"))
    assert "NumPy" in out
    assert "both are unified: True" in out
    assert out.endswith("everybody let go of it, and the arena is closed\n")


def test_segments_of_a_position_independent_file() -> None:
    done = example("elf_segments.py", sys.executable)
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
    assert outcome["clobber_lost"] > 0 or outcome["clobber_deaths"]
