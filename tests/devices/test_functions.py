"""Where workers find the functions of a script, a module, or no file at all; and uvas."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from workers_in_tests import python, script

import uvas

MAIN = """
    import uvas
    def triple(number):
        return 3 * number
    class Pair:
        def __init__(self, a):
            self.a = a
    def make(a):
        return Pair(a)
    if __name__ == "__main__":
        with uvas.ProcessDevice() as device:
            print(device.run(triple, 5), device.run(make, 7).a, type(device.run(make, 7)).__name__)
"""


def test_functions_of_a_script(tmp_path):
    done = python(script(tmp_path, MAIN))
    assert (done.stdout, done.stderr) == ("15 7 Pair\n", "")


def test_functions_of_a_module_that_is_run(tmp_path):
    (tmp_path / "runnable.py").write_text(textwrap.dedent(MAIN))
    done = python("-m", "runnable", cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("15 7 Pair\n", "")


def test_main_is_imported_only_when_it_is_needed(tmp_path):
    text = "print('imported')\n" + textwrap.dedent(MAIN).replace("device.run(triple, 5)", "device.run(abs, -5)", 1)
    path = tmp_path / "script.py"
    path.write_text(text.partition(", device.run(make, 7).a")[0] + ")\n")
    done = python(str(path))
    assert (done.stdout, done.stderr) == ("imported\n5\n", "")


def test_functions_that_are_imported_work_from_python_c():
    done = python("-c", "import uvas, os; d = uvas.ProcessDevice(); print(d.run(abs, -3)); d.close()")
    assert (done.stdout, done.stderr) == ("3\n", "")


@pytest.mark.parametrize("way", ["-c", "stdin"])
def test_functions_that_no_file_holds_are_a_clear_error(way):
    text = textwrap.dedent(
        """
        import uvas
        def f(): pass
        with uvas.ProcessDevice() as device:
            error = device.submit(f).exception()
            print(type(error).__name__, error)
            print(device.run(abs, -3))
        """
    )
    done = python("-c", text) if way == "-c" else python("-", input=text)
    assert done.stdout.startswith("AttributeError 'f' of the host's __main__ is not to be found in the worker")
    assert "define it in a module" in done.stdout
    assert done.stdout.endswith("\n3\n")
    assert done.stderr == ""


def test_a_script_without_its_guard_is_told_so(tmp_path):
    path = script(
        tmp_path,
        """
        import uvas
        def f(): pass
        with uvas.ProcessDevice() as device:
            print(device.submit(f).exception())
        """,
    )
    done = python(path)
    assert "if __name__ == '__main__':" in done.stdout
    assert done.returncode == 0


def test_the_worker_finds_uvas_where_the_host_found_it(tmp_path):
    package = Path(uvas.__file__).parents[1]
    path = script(
        tmp_path,
        f"""
        import sys
        sys.path[:] = [{str(package)!r}, *sys.path]
        import uvas, os
        os.environ.pop("PYTHONPATH")
        if __name__ == "__main__":
            with uvas.ProcessDevice() as device:
                print(device.run(eval, "__import__('uvas').__file__"))
        """,
    )
    others = [part for part in sys.path if Path(part) != package]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(others)}
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment, check=False)
    assert (done.stdout, done.stderr) == (f"{uvas.__file__}\n", "")
