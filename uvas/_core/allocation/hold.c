/* hold.c: Hold, the base of an array over a block: while it lives, the block does. */
#include "allocation.h"

#include <structmember.h>

#include <stddef.h>

typedef struct {
    PyObject_HEAD
    Block *block;
    unsigned long long address;
    unsigned long long size;
} Hold;

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

PyType_Spec hold_spec = {"uvas._core._allocation.Hold", sizeof(Hold), 0, Py_TPFLAGS_DEFAULT, hold_slots};
