"""`uvas.address_map` and ``uvas maps``: exactly the addresses that are held, and by whom."""

from __future__ import annotations

import io
import json
import mmap
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from machine import ARENA, MIB, PAGE, Stranger, libc, unmap
from rich.console import Console

import uvas
from uvas._core import ffi, lib
from uvas.maps.draw import panels
from uvas.maps.kernel import Mapping, read_mappings
from uvas.maps.tags import rows_of

R = uvas.Range


def told(space):
    """Rows of one space: kind, range, name, detail."""
    return [(row.kind, row.range, row.name, row.detail) for row in uvas.address_map() if row.space == space.name]


def drawn(rows, book=()):
    """As a person sees it, without colours."""
    text = io.StringIO()
    Console(width=120, file=text).print(*panels(rows, book, width=120))
    return text.getvalue()


# ---- this process


def test_a_reservation_is_told_part_by_part(space):
    held = space.reserve(16 * PAGE, name="table")
    base = held.base
    assert told(space) == [("reserved", held.range, "table", "")]
    held.commit(4 * PAGE, 4 * PAGE)
    held.commit(8 * PAGE, PAGE, protection="r")
    assert told(space) == [
        ("reserved", R(base, 4 * PAGE), "table", ""),
        ("committed", R(base + 4 * PAGE, 4 * PAGE), "table", "rw, anonymous, private"),
        ("committed", R(base + 8 * PAGE, PAGE), "table", "r, anonymous, private"),
        ("reserved", R(base + 9 * PAGE, 7 * PAGE), "table", ""),
    ]
    held.release()
    assert told(space) == []


def test_files_and_shared_memory_are_named():
    descriptor = os.memfd_create("other")
    os.ftruncate(descriptor, PAGE)
    with uvas.AddressSpace(backing="memfd", name="shared") as space, space.reserve(4 * PAGE) as held:
        held.commit(0, PAGE)
        held.map_fd(descriptor, offset=PAGE, size=PAGE, protection="r", sharing="private")
        os.close(descriptor)
        assert [(kind, detail) for kind, _, _, detail in told(space)] == [
            ("committed", "rw, memfd, shared"),
            ("committed", "r, descriptor, private"),
            ("reserved", ""),
        ]


def test_more_parts_than_one_call_gives(space):
    held = space.reserve(400 * PAGE)
    for i in range(0, 400, 2):
        held.commit(i * PAGE, PAGE)
    rows = told(space)
    assert len(rows) == 400
    assert [row[1] for row in rows] == [R(held.base + i * PAGE, PAGE) for i in range(400)]
    assert [row[0] for row in rows] == ["committed", "reserved"] * 200
    held.release()


def test_an_adoption_is_told_with_who_is_there(space):
    with Stranger(ARENA, 4 * PAGE):
        adoption = space.adopt(ARENA, 4 * PAGE, owner="a library")
        assert told(space) == [("adopted", R(ARENA, 4 * PAGE), "a library", "rw-p anonymous memory")]
        adoption.release()
    gone = space.adopt(ARENA, 4 * PAGE, owner="nobody")
    assert told(space)[0][3] == "nothing is mapped there"
    gone.release()


def test_a_hole_and_a_stranger_in_it(space):
    held = space.reserve(16 * PAGE, at=ARENA, name="victim")
    held.commit(8 * PAGE, 8 * PAGE)
    unmap(ARENA + 2 * PAGE, 4 * PAGE)
    unmap(ARENA + 10 * PAGE, PAGE)
    assert [row[:2] for row in told(space)] == [
        ("reserved", R(ARENA, 2 * PAGE)),
        ("hole", R(ARENA + 2 * PAGE, 4 * PAGE)),
        ("reserved", R(ARENA + 6 * PAGE, 2 * PAGE)),
        ("committed", R(ARENA + 8 * PAGE, 2 * PAGE)),
        ("hole", R(ARENA + 10 * PAGE, PAGE)),
        ("committed", R(ARENA + 11 * PAGE, 5 * PAGE)),
    ]
    with Stranger(ARENA + 3 * PAGE, 2 * PAGE) as stranger:
        rows = [row for row in told(space) if row[1] in R(ARENA, 8 * PAGE)]
        assert [row[:2] for row in rows] == [
            ("reserved", R(ARENA, 2 * PAGE)),
            ("hole", R(ARENA + 2 * PAGE, PAGE)),
            ("foreign", R(ARENA + 3 * PAGE, 2 * PAGE)),
            ("hole", R(ARENA + 5 * PAGE, PAGE)),
            ("reserved", R(ARENA + 6 * PAGE, 2 * PAGE)),
        ]
        assert "rw-p (anonymous memory)" in rows[2][3]
        assert f"{stranger.base:x}-" in rows[2][3]
        space.heal()
        lost = [row[:2] for row in told(space) if row[0] not in ("reserved", "committed")]
        assert lost == [("lost", R(ARENA + 3 * PAGE, 2 * PAGE))]
        held.release()


def test_a_changed_protection(space):
    held = space.reserve(4 * PAGE)
    assert libc.mprotect(held.base + PAGE, PAGE, mmap.PROT_READ) == 0
    assert told(space)[1][:2] == ("changed", R(held.base + PAGE, PAGE))
    assert libc.mprotect(held.base + PAGE, PAGE, 0) == 0
    held.release()


def test_all_spaces_are_told_those_of_c_code_as_well(space):
    with space.reserve(PAGE, at=ARENA + MIB):
        options = ffi.new("struct uvas_space_options *")
        name = ffi.new("char[]", b"from C")
        options.name = name
        cell, got = ffi.new("uvas_id *"), ffi.new("struct uvas_reservation *")
        where = ffi.new("struct uvas_where *", {"at": ARENA})
        assert lib.uvas_space_open(options, cell) == 0
        assert lib.uvas_reserve(cell[0], 2 * PAGE, where, got) == 0
        rows = [(row.space, row.range) for row in uvas.address_map() if row.space in ("from C", "test")]
        assert rows == [("from C", R(ARENA, 2 * PAGE)), ("test", R(ARENA + MIB, PAGE))]
        assert lib.uvas_space_close(cell[0]) == 0


def test_what_a_child_inherits_is_in_no_registry(space):
    with space.reserve(4 * PAGE) as held:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            rows = [(row.kind, row.space, row.range) for row in uvas.address_map() if row.space == "test"]
            os.write(writing, repr(rows == [("unregistered", "test", held.range)]).encode() or b"?")
            os._exit(0)
        os.close(writing)
        os.waitpid(child, 0)
        with os.fdopen(reading) as answer:
            assert answer.read() == "True"


def test_a_row_says_itself():
    row = uvas.MapRow(R(0x1000, 0x1000), "committed", "space", "name", "rw")
    assert str(row) == "[0x1000, 0x2000) committed 'name' of 'space': rw"
    with pytest.raises(AttributeError):
        row.kind = "reserved"


# ---- by tags alone


def line(base, size, permissions, name="", offset=0):
    return Mapping(R(base, size), permissions, offset, 1, name)


def tag(base, size, space):
    return line(base, size, "---p", f"/memfd:uvas:{space} (deleted)", base)


def kinds(*book):
    return [(row.kind, row.range.base, row.space, row.name) for row in rows_of(list(book))]


def test_tags_of_a_book():
    assert kinds(
        line(0x1000, 0x1000, "rw-p", "/lib/a.so"),
        tag(0x2000, 0x1000, "s"),
        line(0x3000, 0x1000, "rw-p"),
        line(0x4000, 0x1000, "r--p", "/some/file"),
        tag(0x5000, 0x1000, "s"),
        line(0x6000, 0x1000, "rw-s", "/memfd:uvas:s/name (deleted)"),
        line(0x7000, 0x1000, "rw-p"),
        line(0x8000, 0x1000, "rw-p", "[heap]"),
        line(0xA000, 0x1000, "rw-p"),
    ) == [
        ("reserved", 0x2000, "s", ""),
        ("unknown", 0x3000, "s", ""),  # between tags
        ("unknown", 0x4000, "s", ""),
        ("reserved", 0x5000, "s", ""),
        ("committed", 0x6000, "s", "name"),
        ("unknown", 0x7000, "s", ""),  # beside one
    ]


def test_what_merged_during_the_look_is_told_once(monkeypatch):
    text = """1000-3000 ---p 00001000 00:01 7  /memfd:uvas:s (deleted)
1000-5000 ---p 00001000 00:01 7  /memfd:uvas:s (deleted)
2000-5000 ---p 00002000 00:01 7  /memfd:uvas:s (deleted)
5000-6000 rw-p 00000000 00:00 0
"""
    monkeypatch.setattr("uvas.maps.kernel._text", lambda _pid: text)
    assert [(one.range, one.offset) for one in read_mappings()] == [
        (R(0x1000, 0x2000), 0x1000),
        (R(0x3000, 0x2000), 0x3000),
        (R(0x5000, 0x1000), 0),
    ]
    assert {row.kind for row in rows_of(read_mappings())} == {"reserved", "unknown"}


def test_what_is_not_as_uvas_left_it():
    moved = line(0x9000, 0x1000, "---p", "/memfd:uvas:s (deleted)", 0x2000)
    opened = line(0x20000, 0x1000, "rw-p", "/memfd:uvas:s (deleted)", 0x20000)
    rows = rows_of([moved, opened])
    assert [(row.kind, row.detail) for row in rows] == [("changed", "---p, moved from 0x2000"), ("changed", "rw-p")]


def test_slashes_in_names():
    shared = line(0x9000, 0x1000, "rw-s", "/memfd:uvas:a/b/c (deleted)")
    assert kinds(shared) == [("committed", 0x9000, "a", "b/c")]
    assert kinds(tag(0x1000, 0x1000, "a/b"), shared)[1] == ("committed", 0x9000, "a/b", "c")


def test_names_cannot_steer_the_terminal():
    text = drawn(rows_of([tag(0x1000, 0x1000, "\x1b[2Jboo [red]not markup[/]")]))
    assert "\x1b" not in text
    assert r"\x1b[2Jboo [red]not markup[/]" in text


def test_a_map_is_drawn_by_neighbourhood():
    far = 1 << 40
    text = drawn(rows_of([tag(0x10000, 0x10000, "near"), tag(far, 0x10000, "far")]))
    assert text.count("╭") == 2
    assert "0x10000-0x20000" in text
    assert "far: reserved" in text
    strangers = [line(0x18000, 0x1000, "r--p", "/lib/a.so")]
    rows = rows_of([tag(0x10000, 0x8000, "s"), tag(0x20000, 0x8000, "s")])
    assert "▒ somebody else" in drawn(rows, strangers)
    assert "▒ somebody else" not in drawn(rows)


def test_what_is_amiss_is_not_crowded_out():
    rows = [uvas.MapRow(R(0x10000 * i, 0x1000), "reserved", "s", "", "") for i in range(1, 200)]
    text = drawn([*rows, uvas.MapRow(R(0x10000 * 200, 0x1000), "foreign", "s", "", "a stranger")])
    assert "... and 160 more" in text
    assert "s: foreign, a stranger" in text
    assert "! not as uvas left it" in text


def test_names_with_odd_ends_of_lines():
    descriptor = os.memfd_create("odd\x0b\x1c\u2028\n name")
    os.ftruncate(descriptor, PAGE)
    with mmap.mmap(descriptor, PAGE):
        names = [mapping.name for mapping in read_mappings() if "odd" in mapping.name]
    os.close(descriptor)
    assert names == ["/memfd:odd\x0b\x1c\u2028\\012 name (deleted)"]


# ---- another process, by the command line

HOLDER = """
import json, sys
from machine import ARENA, PAGE, map_at, unmap
import uvas
with uvas.AddressSpace(name="child", backing="memfd") as space:
    held = space.reserve(16 * PAGE, at=ARENA, name="table")
    held.commit(4 * PAGE, 4 * PAGE)
    assert map_at(ARENA + (1 << 20), PAGE)
    adoption = space.adopt(ARENA + (1 << 20), PAGE, owner="somebody")
    own = [[row.kind, row.range.base, row.range.size, row.space, row.name] for row in uvas.address_map()]
    print(json.dumps(own), flush=True)
    sys.stdin.read()
    adoption.release()
"""


@pytest.fixture
def holder():
    """A process that holds a reservation with a committed part, and an adoption; what it says of itself is in `own`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    process.own = json.loads(process.stdout.readline())
    yield process
    process.communicate()
    assert process.returncode == 0


def maps(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "uvas", "maps", *arguments], capture_output=True, text=True, check=False
    )


EXPECTED = [
    ["reserved", ARENA, 4 * PAGE, "child", "table"],
    ["committed", ARENA + 4 * PAGE, 4 * PAGE, "child", "table"],
    ["reserved", ARENA + 8 * PAGE, 8 * PAGE, "child", "table"],
    ["adopted", ARENA + (1 << 20), PAGE, "child", "somebody"],
]


def test_a_child_is_told_exactly(holder):
    assert holder.own == EXPECTED
    done = maps("--json", "--pid", str(holder.pid))
    assert (done.returncode, done.stderr) == (0, "")
    (process,) = json.loads(done.stdout)["processes"]
    assert process["pid"] == holder.pid
    seen = [[row["kind"], row["base"], row["size"], row["space"]] for row in process["rows"]]
    assert seen == [row[:4] for row in EXPECTED[:3]]  # an adoption leaves no trace
    assert [row["name"] for row in process["rows"]] == ["", "table", ""]  # the tag names the space only


def test_without_a_pid_every_process_is_looked_at(holder):
    done = maps("--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = {process["pid"]: process["rows"] for process in json.loads(done.stdout)["processes"]}
    assert [row["base"] for row in found[holder.pid]] == [row[1] for row in EXPECTED[:3]]
    assert all(found.values())  # no process without rows


def test_people_see_a_picture(holder):
    done = maps("--pid", str(holder.pid))
    assert done.returncode == 0
    assert f"process {holder.pid}: " in done.stdout
    assert f"[{ARENA:#x}, {ARENA + 16 * PAGE:#x}): 64 KiB" in done.stdout
    assert f"{ARENA + 4 * PAGE:#x}-{ARENA + 8 * PAGE:#x}" in done.stdout
    assert "child: committed" in done.stdout


def test_a_process_without_uvas():
    with subprocess.Popen(["sleep", "60"]) as other:
        done = maps("--pid", str(other.pid))
        other.kill()
    assert done.returncode == 0
    assert "nothing that is tagged by uvas" in done.stdout


def test_no_such_process():
    gone = subprocess.Popen(["true"])
    gone.wait()
    done = maps("--pid", str(gone.pid))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"uvas maps: there is no process {gone.pid}\n"
    with pytest.raises(ProcessLookupError):
        read_mappings(gone.pid)


SECRET = "import ctypes, sys; assert ctypes.CDLL(None).prctl(4, 0, 0, 0, 0) == 0; print(flush=True); sys.stdin.read()"
"""PR_SET_DUMPABLE: its maps are for those with CAP_SYS_PTRACE."""

WITHOUT_POWER = """
import os, sys
from uvas.maps.run import main
if os.getuid() == 0:
    os.setuid(65534)
sys.exit(main(as_json=False, watch=False, pid=int(sys.argv[1])))
"""
"""Nobody imports anything: root's Python may be out of reach."""


def test_no_permission():
    with subprocess.Popen(
        [sys.executable, "-c", SECRET], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        other.stdout.readline()
        command = [sys.executable, "-c", WITHOUT_POWER, str(other.pid)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        other.stdin.close()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"uvas maps: the maps of process {other.pid} may not be read: ")
    assert "CAP_SYS_PTRACE" in done.stderr
    assert done.stderr.count("\n") == 1


# ---- watching


def read_until(descriptor, wanted, patience=60.0):
    """Read from a terminal until `wanted` has come, and return all that came."""
    seen = b""
    until = time.monotonic() + patience
    while wanted not in seen and time.monotonic() < until:
        if select.select([descriptor], [], [], 0.1)[0]:
            try:
                seen += os.read(descriptor, 65536)
            except OSError:  # the other end is closed
                break
    return seen


def test_watching_follows_and_leaves_a_clean_terminal(holder):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "uvas", "maps", "--watch", "--pid", str(holder.pid)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    watcher = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen = read_until(ours, b"child: committed")
    assert b"\x1b[?25l" in seen  # the cursor is hidden while it draws
    seen += read_until(ours, b"\x1b[2K")  # drawn again, over the first picture
    watcher.send_signal(signal.SIGINT)
    seen += read_until(ours, b"\x1b[?25h")
    assert watcher.wait(20) == 0
    os.close(ours)
    assert seen.count(b"\x1b[?25h") == seen.count(b"\x1b[?25l") == 1
    assert b"Traceback" not in seen


def test_watching_in_json_is_one_line_a_look():
    with subprocess.Popen(
        [sys.executable, "-m", "uvas", "maps", "--watch", "--json", "--pid", str(os.getpid())],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watcher:

        def look():
            rows = json.loads(watcher.stdout.readline())["processes"][0]["rows"]
            return [row["base"] for row in rows if row["space"] == "watched" and row["kind"] == "reserved"]

        assert look() == []
        with uvas.AddressSpace(name="watched") as space, space.reserve(PAGE) as held:
            seen: list[int] = []
            for _ in range(100):  # the first may have been on their way
                if (seen := look()) == [held.base]:
                    break
        assert seen == [held.base]
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(20) == 0
        assert watcher.stderr.read() == ""


def test_watching_a_process_that_ends():
    with subprocess.Popen(["sleep", "60"]) as other:
        command = [sys.executable, "-m", "uvas", "maps", "--watch", "--json", "--pid", str(other.pid)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watcher:
            assert watcher.stdout.readline()
            other.kill()
            other.wait()
            assert watcher.wait(20) == 2
            assert f"there is no process {other.pid}" in watcher.stderr.read()
