"""``uvas doctor``: what it says of this machine, of others that are imitated, and of drivers that misbehave."""

from __future__ import annotations

import errno
import json
import mmap
import os
import resource
import subprocess
import sys
import sysconfig
from pathlib import Path

import opencl_in_tests
import pytest
from machine import KERNELS

import uvas
from uvas._core import ffi, lib
from uvas.doctor import devices, limits, userfaultfd
from uvas.doctor.userfaultfd import check_userfaultfd

NATIVE = lib.UVAS_KERNEL_NATIVE


def doctor(before: str = "", *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process where `before` was done first."""
    program = f"import sys\n{before}\nfrom uvas.cli import main\nsys.exit(main(['doctor', *sys.argv[1:]]))"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def diagnosis(before: str = "", *, code: int = 0, **environment: str):
    """What it says in JSON: whether uvas is usable, checks by name, devices by name."""
    done = doctor(before, "--json", **environment)
    assert done.returncode == code, done.stderr
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert said["usable"] == (code == 0)
    return {check["name"]: check for check in said["checks"]}, {one["name"]: one for one in said["devices"]}


def trying_only(*kinds: str) -> str:
    """Done first, it spares the devices that a test does not ask about: most of the time goes into OpenCL's."""
    tried = ", ".join(f"devices.check_{kind}()" for kind in kinds)
    return f"from uvas.doctor import devices, run; run.check_devices = lambda: [{tried}]"


@pytest.fixture(scope="module")
def here():
    return diagnosis()


# ---- this machine


def test_every_shortcoming_has_a_remedy_and_every_check_a_meaning(here):
    checks, kinds = here
    for check in checks.values():
        assert check["means"], check
        assert check["state"] in ("good", "limited", "missing")
        assert bool(check["remedy"]) == (check["state"] != "good"), check
    for kind in kinds.values():
        assert kind["advertised"], kind
        assert kind["probed"], kind
        assert bool(kind["remedy"]) == (kind["state"] != "good"), kind


def test_it_says_what_this_machine_says(here):
    checks, _ = here
    platform = ffi.new("struct uvas_platform *")
    assert lib.uvas_platform(platform) == 0
    assert checks["address bits"]["value"].split(",")[0] == str(platform.address_bits)
    assert checks["page size"]["value"] == f"{mmap.PAGESIZE >> 10} KiB"
    assert checks["PROCMAP_QUERY"]["value"] == ("yes" if platform.has_procmap_query else "no")
    assert checks["guard pages"]["value"] == ("yes" if platform.has_guard else "no")
    assert checks["tag"]["value"] == ("yes" if platform.has_tag else "no")
    most = Path("/proc/sys/vm/max_map_count").read_text().strip()
    assert checks["vm.max_map_count"]["value"].startswith(f"{most}, ")
    assert checks["overcommit"]["value"][0] == Path("/proc/sys/vm/overcommit_memory").read_text()[0]
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert checks["RLIMIT_NOFILE"]["value"] == ("unlimited" if soft == resource.RLIM_INFINITY else str(soft))
    assert os.uname().release in checks["kernel"]["value"]


def test_a_worker_really_agreed_to_a_range(here):
    checks, kinds = here
    assert checks["host"]["state"] == "good"
    assert checks["host"]["value"].startswith("a stranger was spared; 1 MiB at 0x")
    assert kinds["ProcessDevice"]["state"] == "good"
    assert sys.executable in kinds["ProcessDevice"]["advertised"]
    assert "wrote where the host reads" in kinds["ProcessDevice"]["probed"]


def test_gpus_are_not_promised(here):
    _, kinds = here
    for name, missing in (("HIP", "HipDevice"),):
        assert not hasattr(uvas, missing)  # the day there is one, doctor has to try it
        assert kinds[name]["state"] == "missing"
        assert kinds[name]["remedy"].startswith(f"uvas has no {missing} yet")


def test_opencl_says_what_is_advertised_and_what_was_tried(here):
    found = here[1]["OpenCL"]
    with opencl_in_tests.device() as device:
        known = device.info.details
    assert f"{known['device']} ({known['platform']}, {known['driver']}): {', '.join(known['advertised'])}" in (
        found["advertised"].split("; ")
    )
    assert f"{known['device']}: its kernels follow the pointers of the host" in found["probed"].split("; ")
    assert found["state"] == "good"


def test_opencl_that_cannot(monkeypatch):
    survey = {"platform": "p", "device": "d", "driver": "1.0", "places": [0, 0], "advertised": []}
    answers = {(): {"devices": [survey]}, (0, 0): {"why_not": "killed by SIGSEGV"}}
    monkeypatch.setattr(devices.platforms, "ask", lambda *places: answers[places])
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda _: True)
    found = devices.check_opencl()
    assert (found.state, found.advertised) == ("missing", "d (p, 1.0): no shared virtual memory")
    assert found.probed == "d: killed by SIGSEGV"
    assert "pocl-binary-distribution" in found.remedy
    answers[()] = {"why_not": "whoever asked it ended: exit code 1"}
    assert devices.check_opencl().probed == "whoever asked it ended: exit code 1"
    answers[()] = {"devices": []}
    assert devices.check_opencl().probed == "no platform has a device"
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda _: None)
    found = devices.check_opencl()
    assert found.probed == "not tried: there is no pyopencl"
    assert "uvas[opencl]" in found.remedy


def test_people_read_a_table_and_the_verdict(here):
    done = doctor(COLUMNS="200")
    assert done.returncode == 0, done.stderr
    for name, check in here[0].items():
        line = next(line for line in done.stdout.splitlines() if line.startswith(name))
        assert check["state"] in line
    for check in here[0].values():
        if check["remedy"]:
            assert check["remedy"].split()[0] in done.stdout.partition("what it means")[2]
    assert "uvas can do its main job here" in done.stdout


def test_nothing_is_left_behind(here):
    leftovers = [line for line in Path("/proc/self/maps").read_text().splitlines() if "uvas:doctor" in line]
    before = sorted(os.listdir("/proc/self/fd"))
    assert devices.check_host().state == "good"
    assert devices.check_process().state == "good"
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert (
        [line for line in Path("/proc/self/maps").read_text().splitlines() if "uvas:doctor" in line] == leftovers == []
    )


# ---- limits


@pytest.mark.parametrize(
    ("limit", "value", "shown", "command"),
    [
        ("RLIMIT_AS", 16 << 30, "16 GiB", "ulimit -v"),
        ("RLIMIT_DATA", 4 << 30, "4 GiB", "ulimit -d"),
        ("RLIMIT_NOFILE", 200, "200", "ulimit -n"),
    ],
)
def test_a_limit_is_seen_and_has_a_remedy(limit, value, shown, command):
    soft = f"import resource as r; r.setrlimit(r.{limit}, ({value}, r.getrlimit(r.{limit})[1]))"
    checks, _ = diagnosis(f"{soft}\n{trying_only('process')}")
    assert checks[limit]["state"] == "limited"
    assert checks[limit]["value"].startswith(shown)
    assert checks[limit]["remedy"].startswith(command)
    both = f"import resource as r; r.setrlimit(r.{limit}, ({value}, {value}))"
    checks, _ = diagnosis(f"{both}\n{trying_only('process')}")
    assert f"the hard limit of {value} has to be raised first" in checks[limit]["remedy"]


def test_too_few_descriptors_for_a_worker_is_a_no():
    few = "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (8, 8))"
    checks, kinds = diagnosis(few, code=1)
    assert checks["host"]["state"] == "good"
    assert kinds["ProcessDevice"]["state"] == "missing"
    assert "RLIMIT_NOFILE of 8 is reached" in kinds["ProcessDevice"]["probed"]
    assert "ulimit -n" in kinds["ProcessDevice"]["remedy"]
    done = doctor(few)
    assert done.returncode == 1
    assert "uvas cannot do its main job here" in done.stdout


def test_a_host_that_refuses_everything_is_a_no():
    checks, _ = diagnosis(f"from uvas._core import lib; lib.uvas_test_fail(1, {errno.ENOMEM}, True)", code=1)
    assert checks["host"]["state"] == "missing"


# ---- limits of other machines, from files as their kernels would show them


@pytest.fixture
def files(monkeypatch):
    """Files of another machine, by path; the others are as they are."""
    texts: dict[str, str] = {}
    read = limits._read
    monkeypatch.setattr(limits, "_read", lambda path: texts[str(path)] if str(path) in texts else read(path))
    return texts


def check_named(name):
    return next(check for check in limits.check_limits() if check.name == name)


def test_overcommit_that_never_promises_too_much(files):
    files["/proc/sys/vm/overcommit_memory"] = "2"
    files["/proc/meminfo"] = "MemTotal:  8388608 kB\nCommitLimit:    4194304 kB\nCommitted_AS:    1048576 kB"
    check = check_named("overcommit")
    assert check.state == "limited"
    assert check.value == "2, never: CommitLimit 4 GiB, 1 GiB of it promised"
    assert "vm.overcommit_memory" in check.remedy


def test_few_mappings(files):
    assert check_named("vm.max_map_count").value.endswith(
        f"{len(Path('/proc/self/maps').read_text().splitlines())} in use here"
    )
    files["/proc/self/maps"] = "\n".join(["line"] * 40_000)
    assert check_named("vm.max_map_count").state == "limited"
    files["/proc/self/maps"] = "line"
    files["/proc/sys/vm/max_map_count"] = "65530"
    assert check_named("vm.max_map_count").value == "65530, 1 in use here"
    assert check_named("vm.max_map_count").state == "good"
    files["/proc/sys/vm/max_map_count"] = "1000"
    assert check_named("vm.max_map_count").state == "limited"


def test_huge_pages(monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "_HUGE_PAGES", tmp_path)
    assert check_named("huge page pools").state == "missing"
    pool = tmp_path / "hugepages-2048kB"
    pool.mkdir()
    (pool / "nr_hugepages").write_text("8\n")
    (pool / "free_hugepages").write_text("0\n")
    assert check_named("huge page pools").state == "limited"
    (pool / "free_hugepages").write_text("3\n")
    assert check_named("huge page pools").value == "2 MiB: 8, 3 free"
    assert check_named("huge page pools").state == "good"


def test_transparent_huge_pages(monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "_TRANSPARENT", tmp_path)
    assert check_named("transparent huge pages").state == "missing"
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    (tmp_path / "shmem_enabled").write_text("always within_size [advise] never deny force\n")
    assert check_named("transparent huge pages").state == "limited"
    assert check_named("shmem huge pages").value == "advise"
    assert check_named("shmem huge pages").state == "good"


# ---- other kernels


@pytest.mark.parametrize(
    ("kernel", "found", "state"),
    [
        ("noreplace", "honoured (EEXIST)", "good"),
        ("enomem", "honoured (ENOMEM)", "limited"),
        ("hint", "ignored", "limited"),
        ("hint_fussy", "ignored", "limited"),
        ("partial_overlap_bug", "clobbers on partial overlap", "limited"),
        ("eopnotsupp", "refused (EOPNOTSUPP)", "limited"),
    ],
)
def test_the_flag_is_tried(kernel, found, state):
    checks, _ = diagnosis(imitate(KERNELS[kernel]))
    assert checks["MAP_FIXED_NOREPLACE"]["value"] == found
    assert checks["MAP_FIXED_NOREPLACE"]["state"] == state


def test_a_machine_that_aligns_shared_memory():
    checks, _ = diagnosis(imitate(KERNELS["aligns"]))
    assert checks["page size"]["value"].endswith("shared memory at multiples of 4 MiB")
    assert checks["page size"]["state"] == "limited"


@pytest.mark.parametrize(
    ("lack", "name"),
    [(lib.UVAS_LACK_QUERY, "PROCMAP_QUERY"), (lib.UVAS_LACK_GUARD, "guard pages"), (lib.UVAS_LACK_TAG, "tag")],
)
def test_features_are_tried(lack, name):
    checks, _ = diagnosis(imitate(NATIVE, lack))
    assert checks[name]["value"] == "no"
    assert checks[name]["state"] == "limited"


def imitate(kernel, lacks=0):
    return f"""
from uvas._core import lib
assert lib.uvas_test_kernel({kernel}, {lacks}) == 0
{trying_only("process")}
"""


def refuse(*_):
    raise PermissionError(errno.EPERM, "Operation not permitted")


def test_userfaultfd_is_told_apart_by_the_way_it_was_opened(monkeypatch):
    opened = userfaultfd._open_by_call
    monkeypatch.setattr(userfaultfd, "_open_by_device", refuse)
    monkeypatch.setattr(userfaultfd, "_open_by_call", refuse)
    assert check_userfaultfd().state == "missing"
    assert "CONFIG_USERFAULTFD" in check_userfaultfd().remedy
    try:
        os.close(opened(userfaultfd._SYSCALLS[os.uname().machine], userfaultfd._USER_MODE_ONLY))
    except (OSError, KeyError) as refusal:
        pytest.skip(f"no userfaultfd here: {refusal}")

    def only_user_mode(number, flags):
        return opened(number, flags) if flags else refuse()

    monkeypatch.setattr(userfaultfd, "_open_by_call", only_user_mode)
    found = check_userfaultfd()
    assert found.state == "limited"
    assert "system call, /dev/userfaultfd: operation not permitted" in found.value
    assert "user mode: yes" in found.value
    assert "pin_host" in found.means
    assert "vm.unprivileged_userfaultfd=1" in found.remedy
    assert 'memory="shared"' in found.remedy


@pytest.mark.parametrize(
    ("features", "state", "said"),
    [
        (0x1FFFF, "good", "with MOVE, with POISON"),
        (0x0FFFF, "limited", "without MOVE, with POISON"),  # Linux 6.6
        (0x13FFF, "good", "with MOVE, without POISON"),
        (0x007FF, "missing", "without MOVE, without POISON"),  # Linux 5.14: no write protection of shared memory
    ],
)
def test_features_that_the_pager_rests_on(monkeypatch, features, state, said):
    monkeypatch.setattr(userfaultfd, "_features_of", lambda _: features)
    monkeypatch.setitem(userfaultfd._SYSCALLS, os.uname().machine, 0)
    found = check_userfaultfd()
    assert found.state == state
    assert said in found.value
    assert bool(found.remedy) == (state != "good")
    assert ("this kernel lacks write protection of shared memory" in found.means) == (state == "missing")


def test_pages_really_moved(here):
    _, kinds = here
    if check_userfaultfd().state == "missing":
        pytest.skip("no userfaultfd here")
    assert kinds["private memory"]["state"] == "good"
    assert kinds["private memory"]["probed"].startswith("1 MiB moved to process ")


def without_userfaultfd(*, user_mode):
    tests = str(Path(__file__).parents[1])
    denied = f"import sys; sys.path.append({tests!r}); import privileges; privileges.deny_userfaultfd({user_mode=})"
    return f"{denied}\n{trying_only('process', 'private')}"


def test_without_the_privilege_private_memory_is_missing_and_shared_is_not():
    checks, kinds = diagnosis(without_userfaultfd(user_mode=False))
    assert checks["userfaultfd"]["state"] == "missing"
    assert kinds["ProcessDevice"]["state"] == "good"
    assert kinds["private memory"]["state"] == "missing"
    assert "userfaultfd" in kinds["private memory"]["remedy"]


def test_in_user_mode_pages_move_all_the_same():
    checks, kinds = diagnosis(without_userfaultfd(user_mode=True))
    if checks["userfaultfd"]["state"] == "missing":
        pytest.skip("no userfaultfd here")
    assert checks["userfaultfd"]["state"] == "limited"
    assert kinds["private memory"]["state"] == "good"


# ---- drivers

DRIVER = r"""
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static const char *manner(void) { return getenv("DRIVER_MANNER"); }
int cuInit(unsigned flags) {
    if (!strcmp(manner(), "hangs")) pause();
    if (!strcmp(manner(), "crashes")) abort();
    return !strcmp(manner(), "refuses") ? 100 : 0;
}
int cuDriverGetVersion(int *version) { *version = 12040; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Imitation", size); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 102; return 0; }
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A directory with a libcuda.so.1 that behaves as DRIVER_MANNER says."""
    directory = tmp_path_factory.mktemp("driver")
    (directory / "cuda.c").write_text(DRIVER)
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    target = directory / "libcuda.so.1"
    subprocess.run([*compiler, "-shared", "-fPIC", directory / "cuda.c", "-o", target], check=True)
    return str(directory)


@pytest.mark.parametrize(
    ("manner", "answer"),
    [
        ("answers", "CUDA 12.4: Imitation (virtual memory management)"),
        ("refuses", "cuInit answered 100"),
        ("crashes", "whoever asked it ended: killed by SIGABRT"),
        ("hangs", "it did not answer within 1 s"),
    ],
)
def test_a_driver_is_asked_and_cannot_do_harm(driver, manner, answer):
    impatient = f"import uvas.doctor.devices as d; d._PATIENCE_S = 1.0\n{trying_only('process', 'cuda')}"
    _, kinds = diagnosis(impatient, LD_LIBRARY_PATH=driver, DRIVER_MANNER=manner)
    assert "libcuda.so.1" in kinds["CUDA"]["advertised"]
    assert kinds["CUDA"]["probed"].startswith(answer)
    assert kinds["CUDA"]["state"] in ("missing", "limited")  # whatever it says: no CudaDevice works on it
