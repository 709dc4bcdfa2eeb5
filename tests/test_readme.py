"""What the README shows runs, and prints what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import opencl_in_tests
import pytest

import uvas

README = (Path(__file__).parent.parent / "README.md").read_text()

PRINTED = (  # by each piece of Python in turn: one pattern a line
    (r"1040\.0 41\.0", r"<Reservation \[0x[0-9a-f]+, 0x[0-9a-f]+\) of '.*'>"),
    (r"1000\.0", "True False", r"True 9000\.0", r"5\.0 True"),
    ("True", ".* is not freed under 1 live array", "1000 64000", r"1048576 1048576 \d+ \d+", r"\d+"),
    ("True", "True", r"262144\.0", "1 1"),
    (
        r"7\.0 7\.0",
        r"\(.*\) \('fine_grain_system',\)",
        "x of saxpy: the array .* does not lie in memory that .* shares.*",
    ),
)


def pieces(language: str) -> list[str]:
    """Return what stands between fences of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def run(*command: str) -> str:
    """Run a command to its good end; what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def promised(program: str) -> list[tuple[int, str]]:
    """Return what comments after a ``print`` say, if they begin with a value: which one of them, and the value."""
    comments = re.findall(r"^ *print\(.*?\)(?:  # (.*))?$", program, re.MULTILINE)
    values = [re.match(r"(?:.*\? )?((?:True|False|[\d.]+)(?: (?:True|False|[\d.]+))*)(?:$|:)", one) for one in comments]
    return [(place, value[1]) for place, value in enumerate(values) if value]


def test_every_piece_of_python_is_expected() -> None:
    assert len(pieces("python")) == len(PRINTED)


@pytest.mark.parametrize("number", range(len(PRINTED)))
def test_python(number: int, tmp_path: Path) -> None:
    program = pieces("python")[number]
    if "OpenCL" in program:
        opencl_in_tests.device().close()
    file = tmp_path / "piece.py"
    file.write_text(program)
    lines = run(sys.executable, "-W", "error", str(file)).splitlines()
    for line, pattern in zip(lines, PRINTED[number], strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)
    said = promised(program)
    assert len(said) >= 1
    for place, value in said:
        assert lines[place] == value


def test_c(tmp_path: Path) -> None:
    (piece,) = pieces("c")
    calls, count = re.subn(r"^(uvas_\w+\(.*?\));", r"if (\1 < 0) return __LINE__;", piece, flags=re.MULTILINE)
    assert count == 5
    source = tmp_path / "piece.c"
    source.write_text(f"""
        #include <uvas.h>
        int main(void) {{
            uvas_id space, arena;
            uintptr_t block;
            struct uvas_allocation found;
            if (uvas_space_open(NULL, &space) < 0) return __LINE__;
            {calls}
            return found.base == block && found.size >= 1000 && uvas_space_close(space) == 0 ? 0 : __LINE__;
        }}
    """)
    library = Path(uvas.get_library())
    program = tmp_path / "piece"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{uvas.get_include()}", f"-Wl,-rpath,{library.parent}"]
    run("cc", *flags, str(source), str(library), "-o", str(program))
    assert run(str(program)) == ""


@pytest.mark.parametrize("strategy", ["hmm", "register", "vmm"])
def test_the_table_of_devices_says_what_hardware_has_shown(strategy: str) -> None:
    (row,) = [one for one in README.splitlines() if one.startswith(f'| `CudaDevice(strategy="{strategy}")`')]
    evidence = Path(__file__).parent.parent / "benchmarks" / "results" / "cuda_tests.json"
    if evidence.exists():
        assert f"benchmarks/results/{evidence.name}" in row
    else:
        assert "not yet seen on hardware" in row
