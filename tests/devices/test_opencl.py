"""OpenCL devices: what is believed of them, and what is said where there is none."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import opencl_kernels
import pytest

import uvas
from uvas.devices.opencl import platforms, probe

device = opencl_kernels.device


# ---- what is believed ------------------------------------------------------------------------------------------------


def test_what_it_says_and_what_was_tried_are_kept_apart(device):
    info = device.info
    assert info.placement == "follows"
    assert info.details["probed"] == ("fine_grain_system",)
    assert info.details["advertised"] == probe.advertised_by(device._cl, device.context.devices[0])
    if "Portable" in info.details["platform"]:
        assert "fine_grain_system" not in info.details["advertised"]  # the day it is, platforms.py can be simpler
    assert info.details["device"] == device.context.devices[0].name


def test_a_device_that_is_chosen(device):
    with uvas.OpenCLDevice(device.context.devices[0]) as same:
        assert same.info.name == device.info.details["device"]
        assert same.context.devices == device.context.devices


def test_an_unknown_one_is_tried_in_a_process_of_its_own(device, monkeypatch):
    monkeypatch.setattr(platforms, "_POCL", "somebody else")
    monkeypatch.setattr(probe, "try_out", lambda *_: pytest.fail("it was tried here"))
    platforms._answer.cache_clear()
    with uvas.OpenCLDevice() as other:
        assert other.info.details["probed"] == ("fine_grain_system",)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("import time; time.sleep(60)", "did not answer within 1 s"),
        ("raise SystemExit('no such thing')", "exit code 1; no such thing"),
        ('print(\'{"why_not": "it did not read what the host had written"}\')', "did not read what the host"),
        ("print()", "ended: exit code 0"),
    ],
)
def test_one_that_cannot_is_refused_and_does_no_harm(device, monkeypatch, tmp_path, program, reason):
    (tmp_path / "probe.py").write_text(program)
    monkeypatch.setattr(platforms, "_POCL", "somebody else")
    monkeypatch.setattr(platforms, "_PATIENCE_S", 1.0 if "sleep" in program else 30.0)
    monkeypatch.setattr(probe, "__file__", str(tmp_path / "probe.py"))
    platforms._answer.cache_clear()
    try:
        with pytest.raises(uvas.NotSupportedError, match=reason) as caught:
            uvas.OpenCLDevice()
    finally:
        platforms._answer.cache_clear()
    assert device.info.details["device"] in caught.value.reason
    assert "PoCL" in caught.value.remedy


def test_a_device_whose_kernels_see_other_memory_is_no_follower(device, monkeypatch):
    """The list is walked and changed in copies: what such a device would do."""
    cl = device._cl
    monkeypatch.setattr(probe, "_SOURCE", "kernel void follow(ulong node, ulong sum) { *(global ulong *)sum = 4950; }")
    assert probe.try_out(cl, device.context.devices[0]) == "it did not write where the host reads"
    monkeypatch.setattr(probe, "_SOURCE", "kernel void follow(ulong node, ulong sum) { }")
    assert probe.try_out(cl, device.context.devices[0]) == "it did not read what the host had written"


# ---- none ------------------------------------------------------------------------------------------------------------


def without(preparation: str) -> str:
    """What an interpreter says who has made a device after that."""
    program = f"""
        import os, sys
        {preparation}
        import uvas
        try:
            uvas.OpenCLDevice()
        except uvas.NotSupportedError as error:
            print(error.reason, error.remedy, sep=" | ")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_without_pyopencl_it_says_what_to_install():
    said = without("sys.modules['pyopencl'] = None")
    assert "pyopencl cannot be imported" in said
    assert "pip install 'uvas[opencl]'" in said


@pytest.mark.parametrize("how", ["none", "an error"])
def test_without_a_platform_it_says_what_to_install(device, monkeypatch, how):
    cl = device._cl

    def none():
        if how == "an error":
            cl.Context([])  # any error will do
        return []

    monkeypatch.setattr(cl, "get_platforms", none)
    with pytest.raises(uvas.NotSupportedError, match="no OpenCL platform") as caught:
        uvas.OpenCLDevice()
    assert "pocl-binary-distribution" in caught.value.remedy
