"""Private memory where the process may serve page faults of its code only, and the kernel itself may not wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, warnings
sys.path.insert(0, {tests!r})
import numpy as np, on_device, uvas

def main():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        device = uvas.ProcessDevice(memory="private")
        uvas.ProcessDevice(memory="private").close()
    assert [str(one.message)[:38] for one in said] == ["this process may serve page faults of "], said
    with device, uvas.AddressSpace([device]) as space, space.reserve(1 << 20) as held:
        held.commit()
        array = held.numpy(np.uint8)
        array[:] = 1
        assert device.run(on_device.total, array) == 1 << 20
        array[:] = 2
        assert device.read(held.base, 4) == b"\\2" * 4
        device.write(held.base, b"\\3" * 4)
        assert array[:5].tolist() == [3, 3, 3, 3, 2]
        try:
            device.read(held.base, (1 << 20) + 1)
        except uvas.DeviceError:
            pass
        else:
            raise AssertionError("it read what is not there")
        space.prefetch(array, device)
        with open("/dev/zero", "rb", buffering=0) as zeros:
            try:
                zeros.readinto(memoryview(array))
            except OSError as error:
                assert error.errno == 14, error
            else:
                raise AssertionError("the kernel waited")
            with space.pin_host(array):
                assert zeros.readinto(memoryview(array)) == 1 << 20
        assert not array.any()
        assert device.run(on_device.total, array) == 0
        del array

if __name__ == "__main__":
    main()
    print("good")
"""


def test_code_waits_and_the_kernel_does_not(tmp_path: Path) -> None:
    """In a user namespace of its own, without /dev/userfaultfd: no privilege that counts outside."""
    probe = subprocess.run(
        ["unshare", "-r", "-m", "mount", "--bind", "/dev/null", "/dev/userfaultfd"], capture_output=True, check=False
    )
    if probe.returncode != 0:
        pytest.skip(f"no user namespace to be had here: {probe.stderr.decode().strip()}")
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("everybody may use userfaultfd here (vm.unprivileged_userfaultfd = 1)")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(tests=str(Path(__file__).parents[1])))
    hide = 'mount --bind /dev/null /dev/userfaultfd && exec "$@"'
    done = subprocess.run(
        ["unshare", "-r", "-m", "sh", "-c", hide, "sh", sys.executable, str(program)],
        capture_output=True, text=True, timeout=60, check=False, env=dict(os.environ),
    )  # fmt: skip
    assert done.stdout == "good\n", done.stderr
