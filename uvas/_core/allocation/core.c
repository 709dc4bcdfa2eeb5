/* core.c: Core, the arena in C as an object: opened, closed, or to be closed after its last block; and how a finalizer leaves to others what it may not
 * wait for. */
#include "allocation.h"

#include <structmember.h>

#include <errno.h>
#include <stddef.h>

void leave_for_later(PyObject *put, PyObject *function, unsigned long long number, PyObject *alive) {
    PyObject *kind, *error, *trace;
    PyErr_Fetch(&kind, &error, &trace);
    PyObject *done = function ? PyObject_CallFunction(put, "((OKO))", function, number, alive) : NULL;
    if (!done) {
        PyErr_Clear(); /* an interpreter that has taken itself apart: the process ends, and the memory with it */
    }
    Py_XDECREF(done);
    PyErr_Restore(kind, error, trace);
}

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

void core_dealloc(Core *self) {
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

PyType_Spec core_spec = {"uvas._core._allocation.Core", sizeof(Core), 0, Py_TPFLAGS_DEFAULT, core_slots};
