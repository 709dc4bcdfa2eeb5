/* _allocation.c: blocks of an arena as Python objects.
 *
 *   Core        the arena in C. Every block has a reference to it, so it closes after the last of them
 *   Allocator   what Python's Arena derives from: alloc, and many at once
 *   Block       Python's Allocation: free, exactly once. Python adds the methods that are not for speed (uvas/arena.py): a class of Python's that derived
 *               from it would have a garbage collector's head, and cost twice as much to make
 *   Hold        the base of an array over a block: while it lives, the block does
 *
 * A block refers to the core and not to the Arena, which may have a callback that refers to blocks: so there is no cycle, and blocks need no garbage
 * collection. Allocating and freeing keep the GIL and never wait with it: they try, and where the core would wait they give the GIL up first. A
 * finalizer may not do that. It puts the block on a queue.
 *
 * Limited API. What two threads may do to one object at the same time is decided by atomics, not by the GIL.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#include "uvas.h"

#define ALIGN_MAX ((size_t)1 << 30)

typedef struct {
    PyObject_HEAD
    uvas_id id; /* C writes it here: no signal can come between its making and its keeping */
    PyObject *put;   /* puts an errand (function, number, what must live until then) on the queue of finalizers; of C, so that no interrupt comes between */
    PyObject *close; /* the function that closes the arena with an id, if it can be closed */
    int bare;            /* its blocks are addresses only; written by open */
    atomic_int closing;  /* no more blocks: closed, or to be closed when the last block goes */
    atomic_int retired;  /* to be closed when the last block goes */
    atomic_size_t users; /* allocators of NumPy that ask it for memory */
    atomic_size_t owed;  /* blocks that finalizers could not give back at once */
    atomic_int ordered;  /* its blocks note the stream that is current: a CUDA device sees them. Written by order, with relaxed ordering: when a device comes */
} Core;

typedef struct {
    PyObject_HEAD
    Core *core;
    PyTypeObject *block_type;
} Allocator;

/* The low bits of a block's state count its holds. */
#define FREED ((uint64_t)1 << 62)
#define RETIRED ((uint64_t)1 << 61) /* no more holds: it is freed with the last one */
#define ORDERED ((uint64_t)1 << 60) /* used on streams: Python gives it back, when these have come so far */
#define HOLDS (ORDERED - 1)

typedef struct {
    PyObject_HEAD
    Core *core;
    unsigned long long base;
    unsigned long long size; /* as asked for */
    _Atomic uint64_t state;
    PyObject *references; /* weak ones */
} Block;

typedef struct {
    PyObject_HEAD
    Block *block;
    unsigned long long address;
    unsigned long long size;
} Hold;

/* ---- shared ------------------------------------------------------------------------------------------------------------------------------- */

static void end_object(void *self) {
    PyTypeObject *type = Py_TYPE(self);
    freefunc end = (freefunc)PyType_GetSlot(type, Py_tp_free);
    end(self);
    Py_DECREF(type);
}

/* Whether a type is the one with this deallocator, or derives from it. The module keeps no types of its own. */
static int derives_from(PyTypeObject *type, destructor dealloc) {
    for (; type; type = (PyTypeObject *)PyType_GetSlot(type, Py_tp_base)) {
        if ((destructor)PyType_GetSlot(type, Py_tp_dealloc) == dealloc) {
            return 1;
        }
    }
    return 0;
}

/* Sets the exception that a call returned. Takes the reference; NULL: the call has set one itself. */
static void *raise_object(PyObject *error) {
    if (error) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
    return NULL;
}

/* 1 with the number, 0 if the object is no number of bytes, whose error the caller lets Python find words for. */
static int as_number(PyObject *object, size_t *out) {
    PyObject *index = NULL;
    if (!PyLong_CheckExact(object)) {
        index = PyBool_Check(object) ? NULL : PyNumber_Index(object);
        if (!index) {
            PyErr_Clear();
            return 0;
        }
        object = index;
    }
    *out = PyLong_AsSize_t(object);
    Py_XDECREF(index);
    if (*out == (size_t)-1 && PyErr_Occurred()) {
        PyErr_Clear();
        return 0;
    }
    return 1;
}

/* For finalizers: leaves an errand for others. An exception that is on its way stays, and none is added. */
static void leave_for_later(PyObject *put, PyObject *function, unsigned long long number, PyObject *alive) {
    PyObject *kind, *error, *trace;
    PyErr_Fetch(&kind, &error, &trace);
    PyObject *done = function ? PyObject_CallFunction(put, "((OKO))", function, number, alive) : NULL;
    if (!done) {
        PyErr_Clear(); /* an interpreter that has taken itself apart: the process ends, and the memory with it */
    }
    Py_XDECREF(done);
    PyErr_Restore(kind, error, trace);
}

/* ---- Core --------------------------------------------------------------------------------------------------------------------------------- */

PyDoc_STRVAR(core_doc, "Core(put, close, /)\n--\n\n"
                       "An arena of the C core. Finalizers call put((close, id, None)) after its last block, and put((settle, address, core)).");

static PyObject *core_new(PyTypeObject *type, PyObject *arguments, PyObject *names) {
    PyObject *put, *close;
    if (names && PyDict_Size(names)) {
        return PyErr_Format(PyExc_TypeError, "Core() takes no keyword arguments");
    }
    if (!PyArg_ParseTuple(arguments, "OO", &put, &close)) {
        return NULL;
    }
    Core *self = (Core *)PyType_GenericAlloc(type, 0);
    if (self) {
        self->put = Py_NewRef(put);
        self->close = Py_NewRef(close);
    }
    return (PyObject *)self;
}

static void core_dealloc(Core *self) {
    if (self->id && self->put) {
        leave_for_later(self->put, self->close, self->id, Py_None);
    }
    Py_XDECREF(self->put);
    Py_XDECREF(self->close);
    end_object(self);
}

PyDoc_STRVAR(core_open_doc, "open($self, options, /)\n--\n\nOpen it, by the address of its options; 0 or a negative errno.");

static PyObject *core_open(Core *self, PyObject *argument) {
    int rc;
    unsigned long long address = PyLong_AsUnsignedLongLong(argument);
    if (address == (unsigned long long)-1 && PyErr_Occurred()) {
        return NULL;
    }
    const struct uvas_arena_options *options = (const struct uvas_arena_options *)(uintptr_t)address;
    self->bare = (options->flags & UVAS_ARENA_BARE) != 0;
    Py_BEGIN_ALLOW_THREADS
    rc = uvas_arena_open(options, &self->id);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(rc);
}

PyDoc_STRVAR(core_close_doc, "close($self, /)\n--\n\nClose it; 0 or a negative errno.");

static PyObject *core_close(Core *self, PyObject *unused) {
    (void)unused;
    int rc;
    int open = 0;
    uvas_id id = self->id;
    if (!atomic_compare_exchange_strong(&self->closing, &open, 1)) { /* by another thread at this moment, say */
        return PyLong_FromLong(-ESTALE);
    }
    Py_BEGIN_ALLOW_THREADS
    rc = uvas_arena_close(id);
    Py_END_ALLOW_THREADS
    if (rc == 0) {
        self->id = 0;
    } else {
        atomic_store(&self->closing, 0);
    }
    return PyLong_FromLong(rc);
}

PyDoc_STRVAR(core_retire_doc, "retire($self, /)\n--\n\nHand out no more blocks, and close it when the last one goes.");

static PyObject *core_retire(Core *self, PyObject *unused) {
    (void)unused;
    atomic_store(&self->retired, 1);
    atomic_store(&self->closing, 1);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(core_settle_doc, "settle($self, address, /)\n--\n\nGive back a block that a finalizer left; 0 or a negative errno.");

static PyObject *core_settle(Core *self, PyObject *argument) {
    int rc;
    uvas_id id = self->id;
    unsigned long long address = PyLong_AsUnsignedLongLong(argument);
    if (address == (unsigned long long)-1 && PyErr_Occurred()) {
        return NULL;
    }
    atomic_fetch_sub(&self->owed, 1);
    Py_BEGIN_ALLOW_THREADS
    rc = uvas_free(id, (uintptr_t)address);
    Py_END_ALLOW_THREADS
    if (atomic_load_explicit(&self->retired, memory_order_relaxed)) {
        leave_for_later(self->put, self->close, self->id, Py_None);
    }
    return PyLong_FromLong(rc);
}

PyDoc_STRVAR(core_owe_doc, "owe($self, /)\n--\n\nCount a block that somebody will settle.");

static PyObject *core_owe(Core *self, PyObject *unused) {
    (void)unused;
    atomic_fetch_add(&self->owed, 1);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(core_use_doc, "use($self, difference, /)\n--\n\nCount an allocator of NumPy's that asks this arena for memory, or one less; they then are.");

static PyObject *core_use(Core *self, PyObject *argument) {
    long difference = PyLong_AsLong(argument);
    if (difference == -1 && PyErr_Occurred()) {
        return NULL;
    }
    size_t users = atomic_fetch_add(&self->users, (size_t)difference) + (size_t)difference;
    if (difference < 0 && atomic_load(&self->retired)) {
        leave_for_later(self->put, self->close, self->id, Py_None);
    }
    return PyLong_FromSize_t(users);
}

PyDoc_STRVAR(core_order_doc, "order($self, ordered, /)\n--\n\nSay whether the allocator's `_note` is told of every block that it makes.");

static PyObject *core_order(Core *self, PyObject *ordered) {
    int truth = PyObject_IsTrue(ordered);
    if (truth < 0) {
        return NULL;
    }
    atomic_store_explicit(&self->ordered, truth, memory_order_relaxed);
    Py_RETURN_NONE;
}

static PyObject *core_closing(Core *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(atomic_load(&self->closing));
}

static PyMethodDef core_methods[] = {
    {"open", (PyCFunction)core_open, METH_O, core_open_doc},
    {"close", (PyCFunction)core_close, METH_NOARGS, core_close_doc},
    {"retire", (PyCFunction)core_retire, METH_NOARGS, core_retire_doc},
    {"settle", (PyCFunction)core_settle, METH_O, core_settle_doc},
    {"owe", (PyCFunction)core_owe, METH_NOARGS, core_owe_doc},
    {"use", (PyCFunction)core_use, METH_O, core_use_doc},
    {"order", (PyCFunction)core_order, METH_O, core_order_doc},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef core_members[] = {
    {"id", T_ULONGLONG, offsetof(Core, id), READONLY, "The handle; 0: not open."},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef core_getset[] = {
    {"closing", (getter)core_closing, NULL, "Whether it hands out no more blocks.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot core_slots[] = {
    {Py_tp_doc, (void *)core_doc},         {Py_tp_new, (void *)core_new},         {Py_tp_dealloc, (void *)core_dealloc},
    {Py_tp_methods, (void *)core_methods}, {Py_tp_members, (void *)core_members}, {Py_tp_getset, (void *)core_getset},
    {0, NULL},
};

static PyType_Spec core_spec = {"uvas._core._allocation.Core", sizeof(Core), 0, Py_TPFLAGS_DEFAULT, core_slots};

/* ---- Block -------------------------------------------------------------------------------------------------------------------------------- */

/* A block without memory yet. */
static Block *block_make(PyTypeObject *type, Core *core) {
    Block *self = PyObject_Malloc(sizeof *self);
    if (!self) {
        return (Block *)PyErr_NoMemory();
    }
    (void)PyObject_Init((PyObject *)self, type);
    self->core = (Core *)Py_NewRef((PyObject *)core);
    self->base = self->size = 0;
    self->references = NULL;
    atomic_init(&self->state, 0);
    return self;
}

static PyObject *block_new(PyTypeObject *type, PyObject *arguments, PyObject *names) {
    (void)arguments;
    (void)names;
    return PyErr_Format(PyExc_TypeError, "%R is made by an arena's alloc", type);
}

/* Whoever made the state FREED gives the memory back: with the GIL, or without it where that waits. */
static int give_back(Block *self) {
    uvas_id id = self->core->id;
    uintptr_t address = (uintptr_t)self->base;
    int rc = uvas_free_try(id, address);
    if (rc == -EAGAIN) {
        Py_BEGIN_ALLOW_THREADS
        rc = uvas_free(id, address);
        Py_END_ALLOW_THREADS
    }
    return rc;
}

/* The same for finalizers, which leave it to others where it waits. */
static void give_back_or_owe(Block *self) {
    Core *core = self->core;
    if (uvas_free_try(core->id, (uintptr_t)self->base) == -EAGAIN) {
        PyObject *kind, *error, *trace;
        PyErr_Fetch(&kind, &error, &trace); /* looking the method up must not meet an exception that is on its way */
        atomic_fetch_add(&core->owed, 1);
        PyObject *settle = PyObject_GetAttrString((PyObject *)core, "settle");
        leave_for_later(core->put, settle, self->base, (PyObject *)core);
        Py_XDECREF(settle);
        PyErr_Restore(kind, error, trace);
    }
}

/* After a block of an arena that was left by `with` has gone: it may have been the last. */
static void close_if_last(Core *core) {
    if (atomic_load_explicit(&core->retired, memory_order_relaxed)) {
        leave_for_later(core->put, core->close, core->id, Py_None);
    }
}

static void block_dealloc(Block *self) {
    Core *core = self->core;
    if (self->references) {
        PyObject_ClearWeakRefs((PyObject *)self);
    }
    if (core) {
        if (self->base && !(atomic_load_explicit(&self->state, memory_order_acquire) & (FREED | ORDERED))) { /* no hold lives: each has a reference */
            give_back_or_owe(self);
            close_if_last(core);
        }
        Py_DECREF((PyObject *)core);
    }
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    PyObject_Free(self);
    Py_DECREF((PyObject *)type);
}

/* 1: the caller is to give it back. 0: it has been freed, or is to be. -1: it is held. */
static int block_end(Block *self) {
    uint64_t state = 0;
    if (atomic_compare_exchange_strong(&self->state, &state, FREED)) {
        return 1;
    }
    return state & (FREED | RETIRED) ? 0 : -1;
}

/* The same; cycles that hold it and that nobody can reach go first. */
static int block_end_after_all(Block *self) {
    int ended = block_end(self);
    if (ended < 0) {
        PyObject *gc = PyImport_ImportModule("gc"); /* PyGC_Collect does nothing where collection is turned off */
        PyObject *found = gc ? PyObject_CallMethod(gc, "collect", NULL) : NULL;
        Py_XDECREF(gc);
        if (!found) {
            PyErr_Clear();
        }
        Py_XDECREF(found);
        ended = block_end(self);
    }
    return ended;
}

static PyObject *block_give_back(Block *self) {
    int rc = give_back(self);
    close_if_last(self->core);
    if (rc < 0) {
        return raise_object(PyObject_CallMethod((PyObject *)self, "_failed", "i", rc));
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(block_free_doc, "free($self, /, *, after=None)\n--\n\n"
                             "Give the memory back to the arena, exactly once.\n\n"
                             "Where a CUDA device sees it, it goes back when what was queued by now has run on the stream that was current at its\n"
                             "allocation (CuPy's, or else the default one) and on those of `used_on`. The call does not wait; during a stream capture\n"
                             "nothing goes back.\n\n"
                             "Parameters\n----------\n"
                             "after\n    One more CUDA stream to go after.\n\n"
                             "Raises\n------\n"
                             "BufferError\n    An array over it lives.\n"
                             "ReleasedError\n    It has been freed, or was left by ``with``.\n"
                             "NotSupportedError\n    `after` is being captured, or no CUDA device of the space sees the block.\n"
                             "DeviceError\n    The driver said no; it is not freed.");

/* What streams use is Python's to give back; `after` may be NULL. */
static PyObject *block_free_in_order(Block *self, PyObject *after) {
    return PyObject_CallMethod((PyObject *)self, "_free_in_order", "O", after ? after : Py_None);
}

static int used_on_streams(Block *self) {
    return (atomic_load_explicit(&self->state, memory_order_relaxed) & (ORDERED | FREED | RETIRED)) == ORDERED;
}

static PyObject *block_free(Block *self, PyObject *const *arguments, Py_ssize_t count, PyObject *names) {
    if (count || names) {
        bool after = !count && names && PyTuple_Size(names) == 1 && PyUnicode_CompareWithASCIIString(PyTuple_GetItem(names, 0), "after") == 0;
        if (!after) {
            return PyErr_Format(PyExc_TypeError, "free() takes nothing but after=stream");
        }
        if (arguments[0] != Py_None) {
            return block_free_in_order(self, arguments[0]);
        }
    }
    if (used_on_streams(self)) {
        return block_free_in_order(self, NULL);
    }
    int ended = block_end_after_all(self);
    if (ended == 0) {
        return raise_object(PyObject_CallMethod((PyObject *)self, "_dead", NULL));
    }
    if (ended < 0) {
        uint64_t holds = atomic_load(&self->state) & HOLDS;
        PyObject *name = PyObject_Repr((PyObject *)self);
        if (name) {
            PyErr_Format(PyExc_BufferError, "%U is not freed under %llu live %s", name, (unsigned long long)holds, holds == 1 ? "array" : "arrays");
            Py_DECREF(name);
        }
        return NULL;
    }
    return block_give_back(self);
}

PyDoc_STRVAR(block_retire_doc, "retire($self, /)\n--\n\nFree it now, or, where an array over it lives, when the last one goes.");

static PyObject *block_retire(Block *self, PyObject *unused) {
    (void)unused;
    if (used_on_streams(self)) {
        return PyObject_CallMethod((PyObject *)self, "_retire_in_order", NULL);
    }
    int ended = block_end_after_all(self);
    uint64_t state = atomic_load(&self->state);
    while (ended < 0) { /* held: whoever lets go last frees it, unless that has been done just now */
        if (!(state & HOLDS)) {
            ended = block_end(self);
        } else if (atomic_compare_exchange_weak(&self->state, &state, state | RETIRED)) {
            ended = 0;
        }
    }
    if (ended > 0) {
        return block_give_back(self);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(block_order_doc, "_order($self, ordered, /)\n--\n\nSay whether somebody else gives it back, when streams have come so far.");

static PyObject *block_order(Block *self, PyObject *ordered) {
    int truth = PyObject_IsTrue(ordered);
    if (truth < 0) {
        return NULL;
    }
    uint64_t before = truth ? atomic_fetch_or(&self->state, ORDERED) : atomic_fetch_and(&self->state, ~ORDERED);
    return PyBool_FromLong((before & ORDERED) != 0);
}

static PyObject *block_freed(Block *self, void *unused) {
    (void)unused;
    return PyBool_FromLong((atomic_load(&self->state) & (FREED | RETIRED)) != 0);
}

static PyObject *block_holds(Block *self, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(atomic_load(&self->state) & HOLDS);
}

static PyObject *block_arena_id(Block *self, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(self->core->id);
}

static PyMethodDef block_methods[] = {
    {"free", (PyCFunction)(void (*)(void))block_free, METH_FASTCALL | METH_KEYWORDS, block_free_doc},
    {"retire", (PyCFunction)block_retire, METH_NOARGS, block_retire_doc},
    {"_order", (PyCFunction)block_order, METH_O, block_order_doc},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef block_members[] = {
    {"base", T_ULONGLONG, offsetof(Block, base), READONLY, "The lowest address."},
    {"size", T_ULONGLONG, offsetof(Block, size), READONLY, "Bytes, as asked for."},
    {"_core", T_OBJECT, offsetof(Block, core), READONLY, "The arena in C."},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Block, references), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef block_getset[] = {
    {"freed", (getter)block_freed, NULL, "Whether it has been freed, or left by ``with``.", NULL},
    {"holds", (getter)block_holds, NULL, "How many arrays over it live; views of an array count as one with it.", NULL},
    {"arena_id", (getter)block_arena_id, NULL, "The handle of its arena.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(block_doc, "A block of an arena: ``[base, base + size)``. Made by `Arena.alloc`.\n\n"
                        "It is freed by `free`, at the end of a ``with`` block, or when neither it nor any array over it lives. As a context\n"
                        "manager it is freed at the end; under a live array it then refuses new ones and is freed when the last one goes.");

static PyType_Slot block_slots[] = {
    {Py_tp_doc, (void *)block_doc},         {Py_tp_new, (void *)block_new},         {Py_tp_dealloc, (void *)block_dealloc},
    {Py_tp_methods, (void *)block_methods}, {Py_tp_members, (void *)block_members}, {Py_tp_getset, (void *)block_getset},
    {0, NULL},
};

static PyType_Spec block_spec = {"uvas.arena.Allocation", sizeof(Block), 0, Py_TPFLAGS_DEFAULT, block_slots};

/* ---- Allocator ---------------------------------------------------------------------------------------------------------------------------- */

static int allocator_init(Allocator *self, PyObject *arguments, PyObject *names) {
    PyObject *core, *block_type;
    if (names && PyDict_Size(names)) {
        PyErr_SetString(PyExc_TypeError, "Allocator() takes no keyword arguments");
        return -1;
    }
    if (!PyArg_ParseTuple(arguments, "OO!", &core, &PyType_Type, &block_type)) {
        return -1;
    }
    if (self->core || !derives_from(Py_TYPE(core), (destructor)core_dealloc) ||
        (destructor)PyType_GetSlot((PyTypeObject *)block_type, Py_tp_dealloc) != (destructor)block_dealloc) {
        PyErr_SetString(PyExc_TypeError, "an Allocator takes a Core and the type of blocks, once");
        return -1;
    }
    self->block_type = (PyTypeObject *)Py_NewRef(block_type);
    self->core = (Core *)Py_NewRef(core);
    return 0;
}

static void allocator_dealloc(Allocator *self) {
    Py_XDECREF((PyObject *)self->core);
    Py_XDECREF((PyObject *)self->block_type);
    end_object(self);
}

static PyObject *refuse(Allocator *self, PyObject *size, PyObject *align) {
    return raise_object(align ? PyObject_CallMethod((PyObject *)self, "_refusal", "OO", size, align)
                              : PyObject_CallMethod((PyObject *)self, "_refusal", "O", size));
}

static PyObject *fail(Allocator *self, int rc, size_t size) {
    return raise_object(PyObject_CallMethod((PyObject *)self, "_failed", "in", rc, (Py_ssize_t)size));
}

/* Lets a new block note the stream that is current, where there are any. 0, or -1 with an exception set. */
static int note(Allocator *self, PyObject *block) {
    if (!atomic_load_explicit(&self->core->ordered, memory_order_relaxed)) {
        return 0;
    }
    PyObject *done = PyObject_CallMethod((PyObject *)self, "_note", "O", block);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* What finalizers owe comes first, and what streams have done with. -1 with an exception set, also where there are no more blocks to be had. */
static int prepare(Allocator *self) {
    Core *core = self->core;
    if (core && !atomic_load_explicit(&core->closing, memory_order_relaxed)) {
        if (!atomic_load_explicit(&core->owed, memory_order_relaxed) && !atomic_load_explicit(&core->ordered, memory_order_relaxed)) {
            return 0;
        }
        PyObject *done = PyObject_CallMethod((PyObject *)self, "_work_off", NULL);
        Py_XDECREF(done);
        return done ? 0 : -1;
    }
    raise_object(PyObject_CallMethod((PyObject *)self, "_dead", NULL));
    return -1;
}

/* The arguments of alloc(size, *, align=16); 0, or -1 with an exception set. */
static int alloc_arguments(PyObject *const *arguments, Py_ssize_t count, PyObject *names, PyObject **size, PyObject **align) {
    Py_ssize_t named = names ? PyTuple_Size(names) : 0;
    *size = count == 1 ? arguments[0] : NULL;
    *align = NULL;
    for (Py_ssize_t i = 0; i < named; i++) {
        PyObject *name = PyTuple_GetItem(names, i), *value = arguments[count + i];
        if (PyUnicode_CompareWithASCIIString(name, "align") == 0) {
            *align = value;
        } else if (!*size && count == 0 && PyUnicode_CompareWithASCIIString(name, "size") == 0) {
            *size = value;
        } else {
            PyErr_Format(PyExc_TypeError, "alloc() got an unexpected keyword argument %R", name);
            return -1;
        }
    }
    if (!*size || count > 1) {
        PyErr_Format(PyExc_TypeError, "alloc() takes one size, not %zd positional arguments", count);
        return -1;
    }
    return 0;
}

PyDoc_STRVAR(alloc_doc, "alloc($self, size, *, align=16)\n--\n\n"
                        "Return a block of memory, or of bare addresses.\n\n"
                        "Parameters\n----------\n"
                        "size\n    Bytes, at least 1. Contents are undefined.\n"
                        "align\n    A power of two up to 1 GiB that the base is a multiple of.\n\n"
                        "Returns\n-------\n"
                        "Allocation\n    Freed by its `Allocation.free`, by ``with``, or when neither it nor an array over it lives.\n\n"
                        "Raises\n------\n"
                        "ValueError\n    A number that cannot be: the message shows it. Raised before any system call.\n"
                        "TypeError\n    It is no integer.\n"
                        "OutOfMemoryError\n    The limit is reached, or the host has no memory.\n"
                        "AddressSpaceExhaustedError\n    No hole is large enough, and the arena may not grow or there is no room to.\n"
                        "LimitReachedError\n    A limit of this process stands against it.\n"
                        "ReleasedError\n    The arena has been closed.\n\n"
                        "Notes\n-----\n"
                        "Keeps the GIL, unless it has to wait. O(log n) in the number of holes, and O(1) for small sizes.");

static PyObject *allocator_alloc(Allocator *self, PyObject *const *arguments, Py_ssize_t count, PyObject *names) {
    PyObject *asked_size = NULL, *asked_align = NULL;
    size_t size, align = 0;
    if (alloc_arguments(arguments, count, names, &asked_size, &asked_align) < 0) {
        return NULL;
    }
    if (!as_number(asked_size, &size) || size == 0 || (asked_align && !as_number(asked_align, &align)) || (asked_align && align == 0) ||
        (align & (align - 1)) || align > ALIGN_MAX) {
        return refuse(self, asked_size, asked_align);
    }
    if (prepare(self) < 0) {
        return NULL;
    }
    Block *block = block_make(self->block_type, self->core);
    if (!block) {
        return NULL;
    }
    uvas_id id = self->core->id;
    uintptr_t base = 0;
    int rc = uvas_alloc_try(id, size, align, &base);
    if (rc == -EAGAIN) {
        Py_BEGIN_ALLOW_THREADS
        rc = uvas_alloc(id, size, align, &base);
        Py_END_ALLOW_THREADS
    }
    if (rc < 0) {
        PyObject *failed = fail(self, rc, size);
        Py_DECREF((PyObject *)block);
        return failed;
    }
    block->base = base;
    block->size = size;
    if (note(self, (PyObject *)block) < 0) {
        Py_CLEAR(block);
    }
    return (PyObject *)block;
}

/* A list of blocks for memory that has been allocated, or NULL: then the memory is given back. */
static PyObject *blocks_make(Allocator *self, const uintptr_t *bases, const size_t *sizes, Py_ssize_t count) {
    PyObject *blocks = PyList_New(count);
    Py_ssize_t made = 0;
    for (; blocks && made < count; made++) {
        Block *block = block_make(self->block_type, self->core);
        if (!block) {
            break;
        }
        block->base = bases[made];
        block->size = sizes[made];
        (void)PyList_SetItem(blocks, made, (PyObject *)block); /* a new list that nobody else has: cannot fail */
    }
    if (made == count) {
        return blocks;
    }
    Py_XDECREF(blocks);
    uvas_id id = self->core->id;
    Py_BEGIN_ALLOW_THREADS
    for (; made < count; made++) {
        (void)uvas_free(id, bases[made]);
    }
    Py_END_ALLOW_THREADS
    return NULL;
}

PyDoc_STRVAR(alloc_many_doc, "alloc_many($self, sizes, /)\n--\n\n"
                             "Return a list of blocks, one for each size: all of them or none.\n\n"
                             "Raises\n------\n"
                             "ValueError, TypeError, OutOfMemoryError, AddressSpaceExhaustedError, LimitReachedError, ReleasedError\n"
                             "    As `alloc`.\n\n"
                             "Notes\n-----\n"
                             "Gives the GIL up once.");

static PyObject *allocator_alloc_many(Allocator *self, PyObject *asked) {
    PyObject *list = PySequence_List(asked);
    if (!list || prepare(self) < 0) {
        Py_XDECREF(list);
        return NULL;
    }
    Py_ssize_t count = PyList_Size(list);
    PyObject *blocks = NULL;
    if ((size_t)count > PY_SSIZE_T_MAX / (2 * sizeof(size_t))) { /* no list is that long */
        Py_DECREF(list);
        return PyErr_NoMemory();
    }
    size_t *sizes = PyMem_Malloc((size_t)(count ? count : 1) * (sizeof *sizes + sizeof(uintptr_t)));
    if (!sizes) {
        Py_DECREF(list);
        return PyErr_NoMemory();
    }
    uintptr_t *bases = (uintptr_t *)(sizes + count);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *size = PyList_GetItem(list, i);
        if (!as_number(size, sizes + i) || sizes[i] == 0) {
            refuse(self, size, NULL);
            goto end;
        }
    }
    int rc = 0;
    uvas_id id = self->core->id;
    if (count) {
        Py_BEGIN_ALLOW_THREADS
        rc = uvas_alloc_many(id, sizes, (size_t)count, bases);
        Py_END_ALLOW_THREADS
    }
    if (rc == 0) {
        blocks = blocks_make(self, bases, sizes, count);
        for (Py_ssize_t i = 0; blocks && i < count; i++) {
            if (note(self, PyList_GetItem(blocks, i)) < 0) {
                Py_CLEAR(blocks);
            }
        }
    } else {
        size_t total = 0;
        for (Py_ssize_t i = 0; i < count; i++) {
            total += sizes[i];
        }
        fail(self, rc, total);
    }
end:
    PyMem_Free(sizes);
    Py_DECREF(list);
    return blocks;
}

static PyMethodDef allocator_methods[] = {
    {"alloc", (PyCFunction)(void (*)(void))allocator_alloc, METH_FASTCALL | METH_KEYWORDS, alloc_doc},
    {"alloc_many", (PyCFunction)allocator_alloc_many, METH_O, alloc_many_doc},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef allocator_members[] = {
    {"_core", T_OBJECT, offsetof(Allocator, core), READONLY, "The arena in C."},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(allocator_doc, "Allocator(core, block_type, /)\n--\n\nWhat hands out blocks of an arena.");

static PyType_Slot allocator_slots[] = {
    {Py_tp_doc, (void *)allocator_doc},         {Py_tp_init, (void *)allocator_init},       {Py_tp_dealloc, (void *)allocator_dealloc},
    {Py_tp_methods, (void *)allocator_methods}, {Py_tp_members, (void *)allocator_members}, {0, NULL},
};

static PyType_Spec allocator_spec = {"uvas._core._allocation.Allocator", sizeof(Allocator), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
                                     allocator_slots};

/* ---- Hold --------------------------------------------------------------------------------------------------------------------------------- */

PyDoc_STRVAR(hold_doc, "Hold(block, offset, size, /)\n--\n\nBytes of a block, for NumPy; while it lives the block is not freed.");

static PyObject *hold_new(PyTypeObject *type, PyObject *arguments, PyObject *names) {
    Block *block;
    unsigned long long offset, size;
    if (names && PyDict_Size(names)) {
        return PyErr_Format(PyExc_TypeError, "Hold() takes no keyword arguments");
    }
    if (!PyArg_ParseTuple(arguments, "OKK", &block, &offset, &size)) {
        return NULL;
    }
    if (!derives_from(Py_TYPE((PyObject *)block), (destructor)block_dealloc)) {
        return PyErr_Format(PyExc_TypeError, "Hold() takes a Block");
    }
    if (offset > block->size || size > block->size - offset) {
        return PyErr_Format(PyExc_ValueError, "%llu bytes from offset %llu are not inside a block of %llu", size, offset, block->size);
    }
    Hold *self = (Hold *)PyType_GenericAlloc(type, 0);
    if (!self) {
        return NULL;
    }
    uint64_t state = atomic_load(&block->state);
    do {
        if (state & (FREED | RETIRED)) {
            Py_DECREF((PyObject *)self);
            return raise_object(PyObject_CallMethod((PyObject *)block, "_dead", NULL));
        }
    } while (!atomic_compare_exchange_weak(&block->state, &state, state + 1));
    self->block = (Block *)Py_NewRef((PyObject *)block);
    self->address = block->base + offset;
    self->size = size;
    return (PyObject *)self;
}

static void hold_dealloc(Hold *self) {
    Block *block = self->block;
    if (block) {
        /* The last hold of a retired block frees it: nobody adds one any more. */
        if (atomic_fetch_sub(&block->state, 1) == (RETIRED | 1)) {
            atomic_store(&block->state, RETIRED | FREED);
            give_back_or_owe(block);
            close_if_last(block->core);
        }
        Py_DECREF((PyObject *)block);
    }
    end_object(self);
}

static PyObject *hold_interface(Hold *self, void *unused) {
    (void)unused;
    if (self->block->core->bare) {
        return PyErr_Format(PyExc_ValueError, "%R is bare addresses: make arrays with the numpy of the reservation around it",
                            (PyObject *)self->block);
    }
    return Py_BuildValue("{s:i,s:(K),s:s,s:(KO)}", "version", 3, "shape", self->size, "typestr", "|u1", "data", self->address, Py_False);
}

static PyMemberDef hold_members[] = {
    {"allocation", T_OBJECT, offsetof(Hold, block), READONLY, "The block."},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef hold_getset[] = {
    {"__array_interface__", (getter)hold_interface, NULL, "The bytes, for NumPy.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot hold_slots[] = {
    {Py_tp_doc, (void *)hold_doc},         {Py_tp_new, (void *)hold_new},       {Py_tp_dealloc, (void *)hold_dealloc},
    {Py_tp_members, (void *)hold_members}, {Py_tp_getset, (void *)hold_getset}, {0, NULL},
};

static PyType_Spec hold_spec = {"uvas._core._allocation.Hold", sizeof(Hold), 0, Py_TPFLAGS_DEFAULT, hold_slots};

/* ---- the module --------------------------------------------------------------------------------------------------------------------------- */

static int add_type(PyObject *module, PyType_Spec *spec) {
    PyObject *type = PyType_FromSpec(spec);
    int rc = type ? PyModule_AddType(module, (PyTypeObject *)type) : -1;
    Py_XDECREF(type);
    return rc;
}

static int execute(PyObject *module) {
    PyType_Spec *specs[] = {&core_spec, &block_spec, &allocator_spec, &hold_spec};
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++) {
        if (add_type(module, specs[i]) < 0) {
            return -1;
        }
    }
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)execute},
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "uvas._core._allocation",
    .m_doc = "Blocks of an arena as Python objects.",
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__allocation(void) {
    return PyModuleDef_Init(&definition);
}
