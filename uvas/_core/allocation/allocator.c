/* allocator.c: Allocator, what Python's Arena derives from: alloc, and many at once. */
#include "allocation.h"

#include <structmember.h>

#include <errno.h>
#include <stddef.h>

#define ALIGN_MAX ((size_t)1 << 30)

typedef struct {
    PyObject_HEAD
    Core *core;
    PyTypeObject *block_type;
} Allocator;

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

PyType_Spec allocator_spec = {"uvas._core._allocation.Allocator", sizeof(Allocator), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
                                     allocator_slots};
