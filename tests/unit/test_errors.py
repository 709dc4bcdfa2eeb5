"""The errors as values, and what `failure` makes of the core's own words."""

from __future__ import annotations

import copy
import errno
import pickle
import resource

import pytest

from uvas import errors
from uvas._core import ffi, lib
from uvas.errors import (
    AddressInUseError,
    AddressSpaceExhaustedError,
    DeviceError,
    DeviceLostError,
    LimitReachedError,
    NotSupportedError,
    OutOfMemoryError,
    ReleasedError,
    UvasError,
    failure,
)
from uvas.ranges import Range

WANTED = Range(0x10_0000, 0x1000)
THERE = Range(0x10_0800, 0x4000)

# One of each, with: the standard type that it is as well, its errno, what its message must tell, its attributes.
SAMPLES = [
    (
        AddressInUseError(WANTED, "gpu0", THERE),
        OSError,
        errno.EEXIST,
        ["[0x100000, 0x101000)", "[0x100800, 0x104800)", "gpu0"],
        {"wanted": WANTED, "owner": "gpu0", "obstacle": THERE},
    ),
    (
        AddressInUseError(WANTED, "gpu0"),
        OSError,
        errno.EEXIST,
        ["[0x100000, 0x101000)", "gpu0"],
        {"wanted": WANTED, "owner": "gpu0", "obstacle": None},
    ),
    (
        AddressSpaceExhaustedError(0x2000, WANTED, ((0x10_0000, "gpu0"),)),
        MemoryError,
        None,
        ["0x2000", "[0x100000, 0x101000)", "1 candidate"],
        {"size": 0x2000, "window": WANTED, "tried": ((0x10_0000, "gpu0"),)},
    ),
    (
        LimitReachedError("RLIMIT_AS", 1 << 30, "raise it"),
        MemoryError,
        None,
        ["RLIMIT_AS", "1073741824", "raise it"],
        {"limit": "RLIMIT_AS", "value": 1 << 30, "remedy": "raise it"},
    ),
    (
        OutOfMemoryError(0x4000, "gpu0"),
        MemoryError,
        None,
        ["0x4000", "gpu0"],
        {"size": 0x4000, "device": "gpu0"},
    ),
    (
        DeviceError("cuMemCreate", 2, "CUDA_ERROR_OUT_OF_MEMORY", "gpu0"),
        OSError,
        errno.EIO,
        ["gpu0", "2", "CUDA_ERROR_OUT_OF_MEMORY", "cuMemCreate"],
        {"call": "cuMemCreate", "code": 2, "name": "CUDA_ERROR_OUT_OF_MEMORY", "device": "gpu0"},
    ),
    (
        DeviceLostError("claim", -9, "SIGKILL", "worker", (WANTED, THERE)),
        OSError,
        errno.EIO,
        ["worker", "SIGKILL", "claim", "[0x100000, 0x101000)", "[0x100800, 0x104800)"],
        {"call": "claim", "code": -9, "name": "SIGKILL", "device": "worker", "lost": (WANTED, THERE)},
    ),
    (
        DeviceLostError("claim", -9, "SIGKILL", "worker"),
        OSError,
        errno.EIO,
        ["nothing is lost"],
        {"lost": ()},
    ),
    (
        NotSupportedError("userfaultfd", "the kernel refuses it", "run as root"),
        OSError,
        errno.ENOTSUP,
        ["userfaultfd", "the kernel refuses it", "run as root"],
        {"feature": "userfaultfd", "reason": "the kernel refuses it", "remedy": "run as root"},
    ),
    (ReleasedError("reservation 0x1 is dead"), ValueError, None, ["reservation 0x1 is dead"], {}),
]
EACH = pytest.mark.parametrize(
    ("error", "standard", "number", "told", "attributes"), SAMPLES, ids=[type(sample[0]).__name__ for sample in SAMPLES]
)


@EACH
def test_is_what_it_says(error, standard, number, told, attributes):
    assert isinstance(error, UvasError)
    assert isinstance(error, standard)
    assert getattr(error, "errno", None) == number
    for words in told:
        assert words in str(error)
    assert {name: getattr(error, name) for name in attributes} == attributes
    assert not str(error).startswith("[Errno")


@EACH
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_survives_pickling(error, standard, number, told, attributes, protocol):
    error.add_note("seen by a test")
    for again in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error)):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.args == error.args
        assert getattr(again, "errno", None) == number
        assert vars(again) == vars(error)
        assert "seen by a test" in again.__notes__


def test_a_message_given_is_the_message_kept():
    error = AddressInUseError(WANTED, "gpu0", message="nobody may live there")
    assert str(pickle.loads(pickle.dumps(error))) == "nobody may live there"


def test_every_public_error_is_sampled():
    public = {getattr(errors, name) for name in errors.__all__} - {UvasError, failure}
    assert public == {type(sample[0]) for sample in SAMPLES}


# ---- from C


@pytest.fixture
def space():
    out = ffi.new("uvas_id *")
    check(lib.uvas_space_open(ffi.NULL, out))
    yield out[0]
    assert lib.uvas_space_close(out[0]) in (0, -errno.ESTALE)


@pytest.fixture
def reservation(space):
    """A reservation of 16 pages; the pages are as large as they come."""
    out = ffi.new("struct uvas_reservation *")
    check(lib.uvas_reserve(space, 16 * page_size(), ffi.NULL, out))
    return out


def check(code: int) -> None:
    if code < 0:
        raise failure(code)


def page_size() -> int:
    out = ffi.new("struct uvas_platform *")
    check(lib.uvas_platform(out))
    return out.page_size


def where(**demands):
    return ffi.new("struct uvas_where *", demands)


def reserve(space, size, **demands):
    check(lib.uvas_reserve(space, size, where(**demands), ffi.new("struct uvas_reservation *")))


def test_in_use_tells_both_ranges_and_the_holder(space):
    size = 16 * page_size()
    name = ffi.new("char[]", b"the first one")
    first = ffi.new("struct uvas_reservation *")
    check(lib.uvas_reserve(space, size, where(name=name), first))
    with pytest.raises(AddressInUseError) as raised:
        reserve(space, size, at=first.base + page_size())
    assert raised.value.wanted == Range(first.base + page_size(), size)
    assert raised.value.obstacle == Range(first.base, size)
    assert "the first one" in raised.value.owner
    assert hex(first.base) in str(raised.value)
    assert raised.value.errno == errno.EEXIST


def test_exhausted_tells_window_and_candidates(space, reservation):
    """The window is the reservation that is there already."""
    with pytest.raises(AddressSpaceExhaustedError) as raised:
        reserve(space, page_size(), window_base=reservation.base, window_size=reservation.size)
    assert raised.value.size == page_size()
    assert raised.value.window == Range(reservation.base, reservation.size)
    for base, reason in raised.value.tried:
        assert base in raised.value.window
        assert reason


def test_released_is_said_of_a_dead_handle(reservation):
    check(lib.uvas_release(reservation.id))
    with pytest.raises(ReleasedError, match=hex(reservation.id)):
        check(lib.uvas_release(reservation.id))


def test_the_callers_mistake_is_a_plain_value_error(space):
    with pytest.raises(ValueError, match="0x3") as raised:
        reserve(space, page_size(), align=3)
    assert not isinstance(raised.value, UvasError)


def test_a_lease_is_a_buffer_error(reservation):
    lease = ffi.new("uvas_id *")
    check(lib.uvas_commit(reservation.id, 0, reservation.size, lib.UVAS_READ, 0))
    check(lib.uvas_lease(reservation.id, 0, reservation.size, lease))
    with pytest.raises(BufferError, match=hex(reservation.base)):
        check(lib.uvas_release(reservation.id))
    assert lib.uvas_unlease(lease[0]) == 0


def test_a_system_call_that_should_not_fail_is_an_os_error(reservation):
    try:
        lib.uvas_test_fail(1, errno.EPERM, 0)
        with pytest.raises(OSError, match=r"mmap|mprotect") as raised:
            check(lib.uvas_commit(reservation.id, 0, reservation.size, lib.UVAS_READ, 0))
    finally:
        lib.uvas_test_fail(0, 0, 0)
    assert raised.value.errno == errno.EPERM
    assert not isinstance(raised.value, UvasError)


RANGE = "void *, uintptr_t, size_t"
CALLBACKS = {
    "claim": f"int({RANGE}, struct uvas_obstacle *)",
    "unclaim": f"int({RANGE})",
    "commit": f"int({RANGE}, const struct uvas_backing_info *, uint32_t)",
    "decommit": f"int({RANGE})",
    "protect": f"int({RANGE}, uint32_t)",
}


@pytest.fixture
def attach(space):
    """Attach a device named toaster, whose callbacks answer what the test says, and otherwise 0."""
    alive = [ffi.new("char[]", b"toaster")]

    def attach(backings=lib.UVAS_BACKING_ANONYMOUS, **answers):
        calls = {
            call: ffi.callback(kind, lambda *_, call=call: answers.get(call, 0)) for call, kind in CALLBACKS.items()
        }
        fields = {"name": alive[0], "placement": lib.UVAS_CLAIMS, "backings": backings, **calls}
        alive.append(calls)
        check(lib.uvas_attach(space, ffi.new("struct uvas_device *", fields), ffi.new("uvas_id *")))

    yield attach
    check(lib.uvas_space_close(space))  # before the callbacks go


def test_a_device_that_is_broken_is_a_device_error(space, attach):
    attach(claim=-errno.ENODEV)
    with pytest.raises(DeviceError, match=r"toaster.* claim") as raised:
        reserve(space, page_size())
    assert raised.value.call == "claim"
    assert raised.value.device == "toaster"
    assert raised.value.code == -errno.ENODEV
    assert raised.value.name == "ENODEV"


def test_a_device_that_is_taken_everywhere_exhausts_the_window(space, attach):
    attach(claim=-errno.EEXIST)
    with pytest.raises(AddressSpaceExhaustedError) as raised:
        reserve(space, page_size())
    assert 0 < len(raised.value.tried) <= lib.UVAS_TRIED_MAX
    assert "toaster" in raised.value.tried[-1][1]


def test_a_device_that_cannot_live_with_what_is_there_is_not_supported(space, reservation, attach):
    check(lib.uvas_commit(reservation.id, 0, reservation.size, lib.UVAS_READ, 0))
    with pytest.raises(NotSupportedError, match="toaster") as raised:
        attach(backings=lib.UVAS_BACKING_MEMFD)
    assert raised.value.feature
    assert raised.value.remedy
    assert raised.value.errno == errno.ENOTSUP


def test_no_memory_is_not_no_room(reservation):
    try:
        lib.uvas_test_fail(1, errno.ENOMEM, 1)
        with pytest.raises(OutOfMemoryError, match="the host") as raised:
            check(lib.uvas_commit(reservation.id, 0, reservation.size, lib.UVAS_READ, 0))
    finally:
        lib.uvas_test_fail(0, 0, 0)
    assert raised.value.size == reservation.size
    assert raised.value.device == "the host"


def test_a_limit_is_named_with_its_value(space):
    limit = 64 << 30
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
        with pytest.raises(LimitReachedError, match="RLIMIT_AS") as raised:
            reserve(space, 2 * limit)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert raised.value.limit == "RLIMIT_AS"
    assert raised.value.value == limit
    assert raised.value.remedy


def test_a_record_of_another_call_is_not_taken_for_this_ones(space):
    with pytest.raises(ValueError, match="0x3"):
        reserve(space, page_size(), align=3)
    error = failure(-errno.ENOTTY)
    assert type(error) is OSError
    assert error.errno == errno.ENOTTY


def test_every_kind_of_failure_has_a_type():
    kinds = {name for name in dir(lib) if name.startswith("UVAS_FAILURE_")} - {"UVAS_FAILURE_NONE"}
    assert {getattr(lib, name) for name in kinds} == set(errors._BUILDERS)
