"""SCENARIOS A: a fixed mapping that never replaces, on each of the seven kernels.

For each: the answer, the bytes of whatever was there, and the registry and the maps afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import ARENA, KERNELS, MIB, NOREPLACE, PAGE, Stranger, kernel, libc, map_at, mappings, unmap

import uvas

WINDOW = uvas.Range(ARENA, 64 * MIB)


@pytest.fixture(params=[name for name in KERNELS if name != "hint_fussy"])
def space(request: pytest.FixtureRequest) -> Iterator[uvas.AddressSpace]:
    """A space on every kernel that maps where it is asked to."""
    before = mappings(WINDOW.base, WINDOW.end)
    with kernel(request.param):
        one = uvas.AddressSpace(name="fixed")
        yield one
        one.check()
        assert one.audit().findings == ()
        one.close()
    assert mappings(WINDOW.base, WINDOW.end) == before


def refused(space: uvas.AddressSpace, base: int, size: int) -> uvas.AddressInUseError:
    """The refusal of a range, which must name it and have changed nothing."""
    before, ranges = mappings(WINDOW.base, WINDOW.end), [one.base for one in space.ranges()]
    with pytest.raises(uvas.AddressInUseError) as caught:
        space.reserve(size, at=base)
    assert caught.value.errno == errno.EEXIST
    assert caught.value.wanted == uvas.Range(base, size)
    assert caught.value.owner
    assert f"{base:#x}" in str(caught.value)
    assert mappings(WINDOW.base, WINDOW.end) == before
    assert [one.base for one in space.ranges()] == ranges
    return caught.value


def test_1_five_pages_at_a_free_place(space: uvas.AddressSpace) -> None:
    with space.reserve(5 * PAGE, at=ARENA) as five:
        assert (five.base, five.size) == (ARENA, 5 * PAGE)
        assert space.find(ARENA + 5 * PAGE - 1) is five
        assert space.find(ARENA + 5 * PAGE) is None
        (mapping,) = mappings(ARENA, ARENA + 5 * PAGE)
        assert (mapping.start, mapping.end, mapping.permissions) == (ARENA, ARENA + 5 * PAGE, "---p")
    assert mappings(ARENA, ARENA + 5 * PAGE) == []


def test_2_three_pages_inside_a_free_place(space: uvas.AddressSpace) -> None:
    with space.reserve(3 * PAGE, at=ARENA + PAGE) as three:
        assert three.base == ARENA + PAGE


@pytest.mark.parametrize("ours", [True, False], ids=["over uvas", "over a stranger"])
@pytest.mark.parametrize(
    ("first", "pages"),
    [(0, 5), (2, 1), (3, 2), (0, 2), (1, 3)],
    ids=["3 superset", "4 inside", "5 tail", "6 head", "exactly"],
)
def test_3_to_6_any_overlap_is_refused(space: uvas.AddressSpace, first: int, pages: int, ours: bool) -> None:
    base = ARENA + PAGE
    if ours:
        there = space.reserve(3 * PAGE, at=base, name="the first")
        there.commit()
        array = there.numpy("u8")
        array[:] = 7
        error = refused(space, ARENA + first * PAGE, pages * PAGE)
        assert "the first" in error.owner
        assert (array == 7).all()
        del array
        there.release()
    else:
        with Stranger(base, 3 * PAGE) as stranger:
            error = refused(space, ARENA + first * PAGE, pages * PAGE)
            assert f"{base:x}-" in error.owner
            assert stranger.intact()


@pytest.mark.parametrize("ours", [True, False], ids=["beside uvas", "beside a stranger"])
@pytest.mark.parametrize("first", [0, 4], ids=["7 before", "8 after"])
def test_7_and_8_adjacent_places_are_free(space: uvas.AddressSpace, first: int, ours: bool) -> None:
    there = space.reserve(3 * PAGE, at=ARENA + PAGE) if ours else Stranger(ARENA + PAGE, 3 * PAGE)
    with there, space.reserve(PAGE, at=ARENA + first * PAGE) as one:
        assert one.base == ARENA + first * PAGE


def test_9_everything_released_the_maps_are_as_before(space: uvas.AddressSpace) -> None:
    before = mappings()
    held = [space.reserve((1 + i % 3) * PAGE, window=uvas.Range(ARENA, 256 * MIB)) for i in range(20)]
    for one in held[::2] + held[1::2]:
        one.release()
    after = mappings()
    assert [one for one in after if one.name == "/memfd:uvas:fixed (deleted)"] == []
    assert {one for one in after if one.inode} - set(before) == set()
    assert space.ranges() == []


def test_10_a_second_file_mapping_at_the_address_of_the_first(space: uvas.AddressSpace) -> None:
    fd = os.memfd_create("first")
    try:
        os.ftruncate(fd, PAGE)
        os.pwrite(fd, b"first", 0)
        address = libc.mmap(ARENA, PAGE, mmap.PROT_READ, mmap.MAP_SHARED | NOREPLACE, fd, 0)
        assert address == ARENA
        refused(space, ARENA, PAGE)
        assert ctypes.string_at(ARENA, 5) == b"first"
        unmap(ARENA, PAGE)
        with space.reserve(PAGE, at=ARENA) as held:
            held.map_fd(fd, offset=0, size=PAGE)
            assert ctypes.string_at(ARENA, 5) == b"first"
            refused(space, ARENA, PAGE)
            assert ctypes.string_at(ARENA, 5) == b"first"
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("size", "at", "number"),
    [
        (PAGE, ARENA + 1, f"{ARENA + 1:#x}"),
        (PAGE, ARENA + PAGE // 2, f"{ARENA + PAGE // 2:#x}"),
        (0, ARENA, "0"),
        (-PAGE, ARENA, f"{-PAGE:#x}"),
        (PAGE, 0, "0"),
        (PAGE, -PAGE, f"{-PAGE:#x}"),
        ((1 << 64) - PAGE, ARENA, f"{(1 << 64) - PAGE:#x}"),
        (1 << 64, ARENA, f"{1 << 64:#x}"),
        (PAGE, 1 << 60, f"{1 << 60:#x}"),
        (PAGE, 1 << 70, f"{1 << 70:#x}"),
        (1 << 58, None, f"{1 << 58:#x}"),
    ],
)
def test_11_nonsense_is_a_plain_value_error_before_any_system_call(
    space: uvas.AddressSpace, size: int, at: int | None, number: str
) -> None:
    from uvas._core import lib

    lib.uvas_test_fail(0, 0, False)
    with pytest.raises(ValueError, match=number) as caught:
        space.reserve(size, at=at)
    assert type(caught.value) is ValueError
    assert lib.uvas_test_calls() == 0


@pytest.mark.parametrize("align", [0, -4096, 3, 4097, 1 << 64])
def test_11_an_alignment_is_a_power_of_two(space: uvas.AddressSpace, align: int) -> None:
    with pytest.raises(ValueError, match="alignment") as caught:
        space.reserve(PAGE, align=align)
    assert type(caught.value) is ValueError


def _guarded(base: int) -> None:
    assert libc.madvise(base, 3 * PAGE, 102) in (0, -1)  # MADV_GUARD_INSTALL, where the kernel has it


@pytest.mark.parametrize("make", [None, _guarded], ids=["PROT_NONE", "guard pages"])
def test_12_over_what_cannot_be_touched(space: uvas.AddressSpace, make: object) -> None:
    base = ARENA + PAGE
    protection = 0 if make is None else mmap.PROT_READ | mmap.PROT_WRITE
    assert libc.mmap(base, 3 * PAGE, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NOREPLACE, -1, 0) == base
    if callable(make):
        make(base)
    for first, pages in ((0, 5), (2, 1), (3, 2), (0, 2)):
        refused(space, ARENA + first * PAGE, pages * PAGE)
    unmap(base, 3 * PAGE)


def run_alone(kernel_name: str, program: str) -> str:
    """Run a program in a process of its own, on that kernel; what it prints."""
    head = f"""
        import ctypes, mmap, os, resource, sys
        sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r})
        import uvas
        from machine import *
        from uvas._core import lib
        assert lib.uvas_test_kernel({KERNELS[kernel_name]}, 0) == 0
        space = uvas.AddressSpace(name="alone")
    """
    source = textwrap.dedent(head) + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


every_kernel = pytest.mark.parametrize("kernel_name", KERNELS)


@every_kernel
def test_12_over_a_sealed_mapping(kernel_name: str) -> None:
    """In a process of its own: what is sealed cannot be unmapped again."""
    out = run_alone(
        kernel_name,
        """
        base = ARENA + PAGE
        stranger = Stranger(base, 3 * PAGE)
        if libc.syscall(462, ctypes.c_void_p(base), ctypes.c_size_t(3 * PAGE), 0) != 0:
            print("this kernel has no mseal")
        for first, pages in ((0, 5), (2, 1), (3, 2), (0, 2)):
            try:
                space.reserve(pages * PAGE, at=ARENA + first * PAGE)
            except uvas.AddressInUseError:
                continue
            raise SystemExit("it was not refused")
        assert stranger.intact()
        print("intact")
        """,
    )
    assert out.endswith("intact\n")


@every_kernel
def test_13_growth_rooms_are_never_chosen_and_refused_by_name(kernel_name: str) -> None:
    run_alone(
        kernel_name,
        """
        stack = next(one for one in mappings() if one.name == "[stack]")
        for at in (stack.start - PAGE, stack.start - 64 * PAGE, stack.end - (8 << 20)):
            try:
                space.reserve(PAGE, at=at)
            except uvas.AddressInUseError as error:
                assert error.owner == "[stack] growth room", error.owner
            else:
                raise SystemExit(f"{at:#x} was given away")
        libc.sbrk.restype = ctypes.c_void_p
        libc.sbrk.argtypes = [ctypes.c_long]
        end = -(-libc.sbrk(0) // PAGE) * PAGE
        for at in (end, end + 100 * PAGE):
            try:
                space.reserve(PAGE, at=at)
            except uvas.AddressInUseError as error:
                assert error.owner == "[heap] growth room", error.owner
            else:
                raise SystemExit(f"{at:#x} was given away")
        # A window that is nothing but growth room has no room.
        for low, high in ((stack.end - (8 << 20), stack.start), (end, end + (1 << 20))):
            try:
                space.reserve(PAGE, window=uvas.Range(low, high - low))
            except uvas.AddressSpaceExhaustedError:
                continue
            raise SystemExit("growth room was chosen")
        before = libc.sbrk(0)
        assert libc.sbrk(1 << 20) == before
        """,
    )


@every_kernel
def test_13_nothing_is_chosen_just_below_a_mapping_of_somebody_else(kernel_name: str) -> None:
    """It may grow down, and the kernel does not say."""
    run_alone(
        kernel_name,
        """
        GROWSDOWN = 0x100
        top = ARENA + 32 * MIB
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NOREPLACE | GROWSDOWN
        assert libc.mmap(top, 4 * PAGE, 3, flags, -1, 0) == top
        held = []
        window = uvas.Range(ARENA, 64 * MIB)
        try:
            while True:
                held.append(space.reserve(512 << 10, window=window))
        except uvas.AddressSpaceExhaustedError:
            pass
        assert held
        for one in held:
            assert one.end <= top - MIB or one.base >= top, hex(one.base)
        """,
    )


AT_MAX_MAP_COUNT = """
            limit = int(open("/proc/sys/vm/max_map_count").read())
            if limit > 200_000:
                raise SystemExit(0)  # too many to fill
            spare = [libc.malloc(1000) for _ in range(400)][::2]
            stranger = Stranger(ARENA, PAGE)
            filler = ARENA + 16 * MIB
            while map_at(filler, PAGE, 0):
                filler += 2 * PAGE
            while libc.malloc(12_000) or libc.malloc(3_000) or libc.malloc(1_000):
                pass  # nor does the heap have what the kernel has not
            for block in spare:
                libc.free(block)  # but for Python's own objects: small ones, no two of them beside each other
"""


@every_kernel
def test_14_at_max_map_count(kernel_name: str) -> None:
    run_alone(
        kernel_name,
        f"""
            space.reserve(PAGE, at=ARENA).release()
            {AT_MAX_MAP_COUNT}
            try:
                space.reserve(PAGE, at=ARENA)
            except uvas.AddressInUseError as error:
                assert f"{{ARENA:x}}-" in error.owner
            else:
                raise SystemExit("not refused")
            try:
                space.reserve(PAGE, at=ARENA + 12 * MIB)
            except uvas.LimitReachedError as error:
                assert error.limit == "max_map_count" and error.value == limit, error
                assert "max_map_count" in error.remedy
            except uvas.AddressInUseError as error:
                assert "moved by the kernel" in error.owner, error
            else:
                raise SystemExit("not refused")
            assert stranger.intact()
        """,
    )


def test_14_bookkeeping_that_is_refused_at_max_map_count_has_the_same_name() -> None:
    run_alone(
        "noreplace",
        f"""
            from uvas._core import ffi
            made, owner = ffi.new("struct uvas_reservation *"), ffi.new("char[]", b"a stranger")
            identity = space._cell[0]
            {AT_MAX_MAP_COUNT}
            codes, found = [], []
            for ask in (
                lambda: lib.uvas_reserve(identity, PAGE, ffi.NULL, made),
                lambda: lib.uvas_adopt(identity, ARENA, PAGE, owner, made),
            ):
                codes.append(ask())
                said = lib.uvas_last_failure()
                found.append((said.kind, ffi.string(said.what), said.value))
            assert stranger.intact()
            assert libc.munmap(ARENA + 16 * MIB, 16 * MIB) == 0  # room for what an assertion makes
            assert found == 2 * [(lib.UVAS_FAILURE_LIMIT, b"max_map_count", limit)], found
            assert max(codes) < 0, codes
        """,
    )


@every_kernel
def test_15_under_rlimit_as(kernel_name: str) -> None:
    run_alone(
        kernel_name,
        """
        size = int(open("/proc/self/statm").read().split()[0]) * PAGE + 64 * MIB
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        for at in (None, ARENA):
            try:
                space.reserve(256 * MIB, at=at)
            except uvas.LimitReachedError as error:
                assert (error.limit, error.value) == ("RLIMIT_AS", size)
            except uvas.AddressInUseError as error:
                assert "moved by the kernel" in error.owner, error
            else:
                raise SystemExit("not refused")
        space.reserve(MIB).release()
        """,
    )


def test_16_huge_pages_the_registry_holds_what_the_kernel_holds(space: uvas.AddressSpace) -> None:
    """A descriptor of 2 MiB pages takes 2 MiB whatever is asked: it must not reach over the reservation's end."""
    try:
        fd = os.memfd_create("huge", 0x0004)  # MFD_HUGETLB
    except OSError as error:
        pytest.skip(f"this kernel has no huge pages: {error}")
    huge = 2 * MIB
    try:
        with space.reserve(3 * huge, at=ARENA) as held, Stranger(ARENA + 3 * huge, PAGE) as neighbour:
            with pytest.raises(ValueError, match="inside"):
                held.map_fd(fd, offset=2 * huge + PAGE, size=PAGE)
            with pytest.raises(ValueError, match=f"{huge:#x}"):
                held.map_fd(fd, offset=PAGE, size=PAGE)
            before = mappings(WINDOW.base, WINDOW.end)
            try:
                held.map_fd(fd, offset=2 * huge, size=PAGE, protection="none")
            except (MemoryError, OSError):
                assert mappings(WINDOW.base, WINDOW.end) == before  # no huge page to be had: and nothing changed
            else:
                mapped = [one for one in mappings(ARENA, ARENA + 3 * huge) if "huge" in one.name]
                assert [(one.start, one.end) for one in mapped] == [(ARENA + 2 * huge, ARENA + 3 * huge)]
            assert neighbour.intact()
    finally:
        os.close(fd)


@pytest.mark.parametrize("lacks", [0, 1, 2, 4, 7], ids=["all", "no query", "no guards", "no tag", "nothing"])
def test_a_fussy_kernel_loses_nothing(lacks: int) -> None:
    """It moves mappings although the place is free: `at` may be refused, a search finds a place where it does not."""
    before = mappings(WINDOW.base, WINDOW.end)
    with kernel("hint_fussy", lacks), Stranger(ARENA + PAGE, 3 * PAGE) as stranger:
        with uvas.AddressSpace(name="fussy") as space:
            for first, pages in ((0, 5), (2, 1), (3, 2), (0, 2)):
                with pytest.raises(uvas.AddressInUseError):
                    space.reserve(pages * PAGE, at=ARENA + first * PAGE)
            with pytest.raises(uvas.AddressInUseError) as caught:
                space.reserve(PAGE, at=ARENA + 2 * MIB)
            assert caught.value.owner == "moved by the kernel"
            held = [space.reserve(PAGE, window=WINDOW) for _ in range(8)]
            for one in held:
                one.commit()
                one.numpy("u8")[:] = 1
            space.check()
            assert space.audit().findings == ()
        assert stranger.intact()
    assert mappings(WINDOW.base, WINDOW.end) == before


@pytest.mark.parametrize("name", ["hint", "hint_fussy"])
@pytest.mark.parametrize("lacks", [0, 4], ids=["tag", "no tag"])
def test_what_the_kernel_moved_is_given_back(name: str, lacks: int) -> None:
    """Strays lie anywhere: they would show in the size of the process."""
    whole = 64 << 30

    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE

    with kernel(name, lacks), Stranger(ARENA + MIB, PAGE) as stranger, uvas.AddressSpace() as space:
        before = mapped()
        for _ in range(3):
            with pytest.raises(uvas.AddressInUseError):
                space.reserve(whole, at=ARENA)
        assert mapped() - before < whole
        assert stranger.intact()


@pytest.mark.parametrize("lacks", [1, 2, 4, 7], ids=["no query", "no guards", "no tag", "nothing"])
@pytest.mark.parametrize("name", ["noreplace", "hint", "partial_overlap_bug"])
def test_kernels_that_lack_more(name: str, lacks: int) -> None:
    with kernel(name, lacks), Stranger(ARENA, PAGE) as stranger, uvas.AddressSpace() as space:
        with pytest.raises(uvas.AddressInUseError):
            space.reserve(2 * PAGE, at=ARENA)
        with space.reserve(4 * PAGE, window=WINDOW) as held:
            held.commit()
            held.numpy("u8")[:] = 5
            held.decommit(PAGE, PAGE)
            assert space.audit().findings == ()
        assert stranger.intact()


def test_a_misaligned_descriptor_where_shared_memory_is_aligned() -> None:
    """As SHMLBA does on parisc: reservations are aligned so that descriptors fit; elsewhere it is a ValueError."""
    fd = os.memfd_create("aligned")
    os.ftruncate(fd, 4 * PAGE)
    with contextlib.closing(os.fdopen(fd, "rb")), kernel("aligns"), uvas.AddressSpace(backing="memfd") as space:
        held = space.reserve(8 * MIB)
        assert held.base % (4 * MIB) == 0
        held.commit(0, PAGE)
        held.map_fd(fd, offset=4 * MIB, size=PAGE)
        with pytest.raises(ValueError, match=f"{4 * MIB:#x}"):
            held.map_fd(fd, offset=PAGE, size=PAGE)
        odd = space.reserve(PAGE, at=ARENA + PAGE)
        with pytest.raises(ValueError, match=f"{4 * MIB:#x}"):
            odd.commit()
        held.release()
        odd.release()


def test_a_mapping_whose_path_is_longer_than_any_buffer_hides_nobody(tmp_path: Path) -> None:
    """Directories made one inside the other have no greatest depth, and each is named in the kernel's text."""
    with contextlib.ExitStack() as undo:
        inside = os.open(tmp_path, os.O_PATH)
        undo.callback(shutil.rmtree, tmp_path / ("d" * 250))
        undo.callback(lambda: os.close(inside))
        for _ in range(100):
            os.mkdir("d" * 250, dir_fd=inside)
            above, inside = inside, os.open("d" * 250, os.O_PATH, dir_fd=inside)
            os.close(above)
        fd = os.open("file", os.O_RDWR | os.O_CREAT, dir_fd=inside)
        undo.callback(os.close, fd)
        os.ftruncate(fd, PAGE)
        assert map_at(ARENA, PAGE, fd=fd)
        undo.callback(unmap, ARENA, PAGE)
        with kernel("noreplace", lacks=1), Stranger(ARENA + 2 * PAGE, PAGE), uvas.AddressSpace() as space:
            for at, owner in ((ARENA, f" {tmp_path}/ddd"), (ARENA + 2 * PAGE, "anonymous memory")):
                with pytest.raises(uvas.AddressInUseError) as caught:
                    space.reserve(PAGE, at=at)
                assert f"{at:x}-{at + PAGE:x} rw-p" in caught.value.owner
                assert owner in caught.value.owner
