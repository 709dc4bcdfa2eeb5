"""SCENARIOS B: many threads, and libraries that map behind one's back.

The oracle is the bytes: nobody's sentinel ever changes, every failure is a typed error, at the end nothing is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from crowd import Crowd
from machine import (
    ARENA,
    KERNELS,
    MIB,
    PAGE,
    Stranger,
    descriptors,
    kernel,
    map_anywhere,
    map_at,
    mappings,
    read_word,
    unmap,
    write_word,
)

import uvas

WINDOW = uvas.Range(ARENA + (1 << 32), 24 * MIB)
FULL = os.environ.get("UVAS_FULL") == "1"
TYPED = (uvas.UvasError, ValueError, BufferError)


@pytest.fixture
def clean() -> Iterator[None]:
    """The window is empty before and after, and no descriptor is left."""
    gc.collect()
    assert mappings(WINDOW.base, WINDOW.end) == []
    open_before = descriptors()
    yield
    gc.collect()
    assert mappings(WINDOW.base, WINDOW.end) == []
    assert descriptors() <= open_before


def squat(chance: random.Random) -> None:
    """Take a free place of the window as a library would, look at it again, give it back."""
    pages = chance.randrange(1, 16)
    at = WINDOW.base + chance.randrange(WINDOW.size // PAGE - 16) * PAGE
    if map_at(at, pages * PAGE):
        word = chance.getrandbits(63)
        write_word(at, word)
        write_word(at + (pages - 1) * PAGE, word)
        time.sleep(0)
        assert read_word(at + (pages - 1) * PAGE) == word
        unmap(at, pages * PAGE)


def disturb(chance: random.Random) -> None:
    """What any program does: threads that come and go, large allocations, libraries loaded."""
    kind = chance.randrange(4)
    if kind == 0:
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
    elif kind == 1:
        block = bytearray(MIB)
        block[-1] = 1
    elif kind == 2:
        handle = ctypes.CDLL("libm.so.6")._handle
        ctypes.CDLL(None).dlclose(ctypes.c_void_p(handle))
    else:
        unmap(map_anywhere(64 << 10), 64 << 10)


def work(space: uvas.AddressSpace) -> Callable[[random.Random], None]:
    """Reserve, commit, write, verify, decommit, release."""

    def body(chance: random.Random) -> None:
        size = chance.randrange(1, 16) * PAGE
        at = WINDOW.base + chance.randrange(WINDOW.size // PAGE - 16) * PAGE if chance.random() < 0.3 else None
        try:
            held = space.reserve(size, at=at)
        except (uvas.AddressInUseError, uvas.AddressSpaceExhaustedError, uvas.LimitReachedError):
            return
        held.commit()
        words = held.numpy(np.uint64)
        mark = chance.getrandbits(63)
        words[:] = mark
        time.sleep(0)
        assert (words == mark).all()
        del words
        held.decommit(0, PAGE)
        held.commit()
        words = held.numpy(np.uint64)
        assert (words[: PAGE // 8] == 0).all()
        assert (words[PAGE // 8 :] == mark).all()
        del words
        held.release()

    return body


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.usefixtures("clean")
def test_1_nobody_is_clobbered(name: str) -> None:
    with kernel(name), uvas.AddressSpace(window=WINDOW, name=name) as space:
        crowd = Crowd()
        crowd.add(8, work(space), seed=1)
        crowd.add(2, squat, seed=2)
        crowd.add(2, disturb, seed=3)
        crowd.finish(60 if FULL else 1.5, lambda: space.stats().reserves > 0)
        space.check()
        assert space.audit().findings == ()
        stats = space.stats()
        assert stats.reserves > 0
        assert stats.reservations == 0


def test_2_map_fixed_clobbers_or_dies() -> None:
    """The demonstration must be able to fail: with the destructive flag, in a child, memory is lost."""
    lost = died = maps = 0
    for _ in range(10):
        child = subprocess.run(
            [sys.executable, "-m", "uvas.demo.clobber", "1"], capture_output=True, text=True, timeout=60, check=False
        )
        died += child.returncode != 0
        for line in child.stdout.splitlines()[-1:]:
            lost += int(line.split('"victim_lost": ')[1].rstrip("}"))
            maps += int(line.split('"maps": ')[1].split(",")[0])
        if lost or died:
            break
    assert lost or died, f"{maps} destructive maps lost nothing"


@pytest.mark.usefixtures("clean")
def test_3_two_spaces_share_one_registry() -> None:
    with uvas.AddressSpace(name="one") as one, uvas.AddressSpace(name="two") as two:
        held = one.reserve(4 * PAGE, at=WINDOW.base, name="held")
        with pytest.raises(uvas.AddressInUseError) as caught:
            two.reserve(PAGE, at=WINDOW.base + PAGE)
        assert '"held" of uvas space "one"' in caught.value.owner
        assert uvas.find(WINDOW.base) is held
        assert one.find(WINDOW.base) is held
        assert two.find(WINDOW.base) is None
        held.release()


def test_3_a_second_copy_of_the_library_is_a_typed_error(tmp_path: object) -> None:
    """Loaded from another path it has variables of its own: two registries would clobber each other."""
    copy = os.path.join(str(tmp_path), "libuvas.so")
    with open(uvas.get_library(), "rb") as original, open(copy, "wb") as target:
        target.write(original.read())
    program = f"""
        import ctypes, uvas
        space = uvas.AddressSpace()
        other = ctypes.CDLL({copy!r})
        found = ctypes.c_uint64()
        assert other.uvas_space_open(None, ctypes.byref(found)) == -95, "it worked"
        same = ctypes.CDLL(uvas.get_library())
        assert same.uvas_space_open(None, ctypes.byref(found)) == 0
        assert same.uvas_space_close(found) == 0
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=60)


@pytest.mark.usefixtures("clean")
def test_5_audit_names_a_hole_and_heal_takes_it_back() -> None:
    with uvas.AddressSpace(window=WINDOW) as space:
        held = space.reserve(16 * PAGE, name="holed")
        holes = [uvas.Range(held.base + 4 * PAGE, 2 * PAGE), uvas.Range(held.base + 15 * PAGE, PAGE)]
        for hole in holes:
            unmap(hole.base, hole.size)
        assert [(one.kind, one.range) for one in space.audit().findings] == [("hole", hole) for hole in holes]
        assert [one.healed for one in space.heal().findings] == [True, True]
        assert space.audit().findings == ()
        assert not any(map_at(hole.base, PAGE) for hole in holes)
        held.release()


@pytest.mark.usefixtures("clean")
def test_5_somebody_in_the_hole_is_never_touched() -> None:
    with uvas.AddressSpace(window=WINDOW) as space:
        held = space.reserve(16 * PAGE)
        held.commit(0, 2 * PAGE)
        unmap(held.base + 4 * PAGE, 2 * PAGE)
        with Stranger(held.base + 4 * PAGE, 2 * PAGE) as stranger:
            (finding,) = space.audit().findings
            assert finding.kind == "foreign"
            assert f"{stranger.base:x}-" in finding.owner
            space.heal()
            assert [one.kind for one in space.audit().findings] == ["lost"]
            with pytest.raises(uvas.AddressInUseError, match="lost"):
                held.commit()
            held.decommit()
            held.commit(0, 4 * PAGE)
            assert stranger.intact()
            held.release()
            assert stranger.intact()
            assert [(one.start, one.end) for one in mappings(WINDOW.base, WINDOW.end)] == [
                (stranger.base, stranger.base + stranger.size)
            ]


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("lacks", [0, 1], ids=["query", "text"])
def test_5_an_audit_beside_changes_sees_each_before_or_after(lacks: int) -> None:
    with kernel("noreplace", lacks), uvas.AddressSpace(window=WINDOW, backing="memfd") as space:
        held = space.reserve(64 * PAGE)
        enough = threading.Event()

        def change(offset: int) -> None:
            while not enough.is_set():
                held.commit(offset, PAGE)
                held.decommit(offset, PAGE)

        threads = [threading.Thread(target=change, args=(offset,)) for offset in range(0, 64 * PAGE, 16 * PAGE)]
        for thread in threads:
            thread.start()
        found = [look().findings for _ in range(100) for look in (space.audit, space.heal)]
        enough.set()
        for thread in threads:
            thread.join()
        assert set(found) == {()}


@pytest.mark.usefixtures("clean")
def test_5_what_a_descriptor_holds_survives_a_hole() -> None:
    with uvas.AddressSpace(window=WINDOW, backing="memfd") as space:
        held = space.reserve(8 * PAGE)
        held.commit()
        held.numpy("u8")[:] = 9
        unmap(held.base + PAGE, PAGE)
        assert [one.healed for one in space.heal().findings] == [True]
        assert (held.numpy("u8") == 9).all()
        gc.collect()
        held.release()


@pytest.mark.usefixtures("clean")
def test_6_fork_while_others_reserve() -> None:
    with uvas.AddressSpace(window=WINDOW) as space:
        held = space.reserve(4 * PAGE)
        held.commit()
        array = held.numpy(np.uint64)
        array[:] = 11
        crowd = Crowd()
        crowd.add(3, work(space), seed=5)
        children = []
        for _ in range(20):
            pid = os.fork()
            if pid == 0:
                status = 1
                with contextlib.suppress(BaseException):
                    status = _child_after_fork(space, held, array)
                os._exit(status)
            children.append(pid)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        crowd.finish(0.1)
        assert statuses == [0] * 20
        assert (array == 11).all()
        del array
        held.release()


def _child_after_fork(space: uvas.AddressSpace, held: uvas.Reservation, array: np.ndarray) -> int:
    """0, or the number of the claim that does not hold."""
    for number, verb in enumerate((held.commit, held.release, space.stats, lambda: space.reserve(PAGE)), 2):
        try:
            verb()
        except uvas.ReleasedError:
            continue
        return number
    if not (array == 11).all():
        return 10
    array[:] = 12  # private: the parent's stays
    if uvas.find(held.base) is not None:
        return 11
    with uvas.AddressSpace(window=WINDOW, name="child") as own:
        mine = own.reserve(4 * PAGE)
        mine.commit()
        mine.numpy("u8")[:] = 1
        if mine.range.overlaps(held.range):
            return 12
        own.check()
    return 0 if (array == 12).all() else 13


def test_6_multiprocessing_fork() -> None:
    program = """
        import multiprocessing, uvas, numpy as np
        def child(queue):
            with uvas.AddressSpace() as own, own.reserve(4096) as held:
                held.commit()
                array = held.numpy(np.uint8)
                array[:] = 3
                queue.put(int(array.sum()))
                del array
        if __name__ == "__main__":
            context = multiprocessing.get_context("fork")
            with uvas.AddressSpace() as space:
                space.reserve(4096)
                queue = context.Queue()
                one = context.Process(target=child, args=(queue,))
                one.start()
                assert queue.get(timeout=30) == 3 * 4096
                one.join(30)
                assert one.exitcode == 0
    """
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(program)], check=True, timeout=60)


@pytest.mark.parametrize(
    "ending",
    ["pass", "raise ValueError", "raise KeyboardInterrupt", "import os; os._exit(3)", "import sys; sys.exit(4)"],
)
def test_7_every_way_to_end(ending: str) -> None:
    program = f"""
        import uvas, numpy as np
        space = uvas.AddressSpace()
        held = space.reserve(1 << 20)
        held.commit()
        array = held.numpy(np.uint64)
        loop = [array, held, space]
        loop.append(loop)
        del space, held, array
        {ending}
    """
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    expected = {"pass": 0, "raise ValueError": 1, "raise KeyboardInterrupt": -signal.SIGINT}
    assert done.returncode == expected.get(ending, int(ending[-2]) if ending[-2].isdigit() else 0), done.stderr
    assert "Fatal" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.usefixtures("clean")
def test_9_release_against_everything() -> None:
    """Release in one thread, verbs of the same reservation in others, a stranger who takes every hole that opens."""
    with uvas.AddressSpace(window=WINDOW) as space:
        shared: list[uvas.Reservation] = [space.reserve(8 * PAGE)]
        counts = {"done": 0, "released": 0}

        def verbs(chance: random.Random) -> None:
            held = shared[0]
            try:
                verb = chance.randrange(4)
                if verb == 0:
                    held.commit()
                elif verb == 1:
                    held.decommit(PAGE, PAGE)
                elif verb == 2:
                    fd = os.memfd_create("verb")
                    try:
                        os.ftruncate(fd, PAGE)
                        held.map_fd(fd, offset=0, size=PAGE)
                    finally:
                        os.close(fd)
                else:
                    space.audit()
                counts["done"] += 1
            except uvas.ReleasedError:
                counts["released"] += 1

        def release(chance: random.Random) -> None:
            time.sleep(chance.random() / 2000)
            old = shared[0]
            with contextlib.suppress(uvas.AddressSpaceExhaustedError):
                shared[0] = space.reserve(8 * PAGE)
                old.release()

        crowd = Crowd()
        crowd.add(3, verbs, seed=7)
        crowd.add(1, release, seed=8)
        crowd.add(2, squat, seed=9)
        crowd.finish(30 if FULL else 2, lambda: min(counts.values()) > 0)
        assert counts["done"] > 0
        assert counts["released"] > 0
        shared[0].release()
        space.check()


def test_9_sigint_at_random_moments_leaks_nothing() -> None:
    """Sent by another process: a thread of this one would wait for the GIL, and hit only where it is given up."""
    rounds = 10_000 if FULL else 600
    pester = """
        import os, random, signal, sys, time
        chance = random.Random(1)
        host = os.getppid()
        while os.getppid() == host:
            time.sleep(chance.random() / 2000)
            os.kill(host, signal.SIGINT)
    """
    program = f"""
        import gc, os, signal, subprocess, sys, time, warnings
        sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r})
        warnings.simplefilter("ignore", ResourceWarning)
        sys.unraisablehook = lambda _: None  # an interrupt in a finalizer: Python goes on
        import uvas
        from machine import descriptors, mappings, PAGE
        space = uvas.AddressSpace()
        space.reserve(PAGE).release()
        interrupts = 0
        armed = False
        def on_interrupt(number, frame):
            global armed
            if armed:  # one interrupt raises once, and none outside the work
                armed = False
                raise KeyboardInterrupt
        signal.signal(signal.SIGINT, on_interrupt)
        gc.collect()
        before = len(descriptors())
        pester = subprocess.Popen([sys.executable, "-c", {textwrap.dedent(pester)!r}])
        while interrupts < {rounds}:
            try:
                armed = True
                while armed:
                    held = array = None
                    held = space.reserve(4 * PAGE)
                    held.commit()
                    array = held.numpy("u1", PAGE)
                    array[0] = 1
                    array = None
                    held.decommit()
                    held.release()
            except (KeyboardInterrupt, BufferError, uvas.ReleasedError):
                pass
            interrupts += 1
        pester.kill()
        pester.wait()
        held = array = None
        for _ in range(100):
            gc.collect()
            if space.stats().reservations == 0:
                break
            time.sleep(0.01)
        assert space.stats().reservations == 0, space.stats()
        space.check()
        left = [one for one in mappings() if one.name.startswith("/memfd:uvas")]
        assert left == [], left
        assert len(descriptors()) == before
        space.close()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=600)


def test_10_descriptors_exhausted_in_the_middle_of_each_verb() -> None:
    program = f"""
        import os, resource, sys
        sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r})
        import uvas
        from machine import PAGE, mappings
        space = uvas.AddressSpace(backing="memfd")
        held = space.reserve(8 * PAGE)
        fd = os.memfd_create("mine")
        os.ftruncate(fd, PAGE)
        before = [one for one in mappings() if "uvas" in one.name]
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        taken = []
        while True:
            try:
                taken.append(os.dup(fd))
            except OSError:
                break
        for verb in (held.commit, lambda: held.map_fd(fd, offset=0, size=PAGE), uvas.AddressSpace):
            try:
                verb()
            except uvas.LimitReachedError as error:
                assert (error.limit, error.value) == ("RLIMIT_NOFILE", 40), error
            else:
                raise SystemExit("it worked without a descriptor")
        for one in taken:
            os.close(one)
        assert [one for one in mappings() if "uvas" in one.name] == before
        held.commit()
        held.map_fd(fd, offset=0, size=PAGE)
        held.release()
        space.check()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=60)


def test_10_memory_limit_in_the_middle_of_each_verb() -> None:
    program = f"""
        import resource, sys
        sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r})
        import uvas
        from machine import MIB, PAGE, mappings
        space = uvas.AddressSpace()
        held = space.reserve(512 * MIB)
        size = int(open("/proc/self/statm").read().split()[0]) * PAGE + 32 * MIB
        large = space.reserve(32 << 40)
        if int(open("/proc/sys/vm/overcommit_memory").read()) == 0:
            try:
                large.commit()  # 32 TiB at once is what the kernel's heuristic refuses
            except uvas.OutOfMemoryError as error:
                assert error.size == 32 << 40
            else:
                raise SystemExit("32 TiB were committed")
        large.release()
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        assert space.stats().committed_bytes == 0
        assert space.audit().findings == ()
        held.commit(0, 64 * MIB)
        held.numpy("u1", 64 * MIB)[:] = 1
        try:
            space.reserve(64 * MIB)
        except uvas.LimitReachedError as error:
            assert error.limit == "RLIMIT_AS"
        else:
            raise SystemExit("reserved over RLIMIT_AS")
        import gc; gc.collect()
        held.release()
        space.check()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=60)
