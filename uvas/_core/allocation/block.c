/* block.c: Block, which Python knows as Allocation: the memory of one allocation, given back exactly once. */
#include "allocation.h"

#include <structmember.h>

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>

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
void give_back_or_owe(Block *self) {
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

void block_dealloc(Block *self) {
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

PyType_Spec block_spec = {"uvas.arena.Allocation", sizeof(Block), 0, Py_TPFLAGS_DEFAULT, block_slots};
