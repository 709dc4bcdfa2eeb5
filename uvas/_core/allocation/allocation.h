/* allocation.h: blocks of an arena as Python objects, the extension module _allocation. A file for each type:
 *
 *   core.c        Core: the arena in C. Every block has a reference to it, so it closes after the last of them
 *   block.c       Block, Python's Allocation: free, exactly once. Python adds the methods that are not for speed (uvas/allocation.py): a class of
 *                 Python's that derived from it would have a garbage collector's head, and cost twice as much to make
 *   hold.c        Hold: the base of an array over a block: while it lives, the block does
 *   allocator.c   Allocator: what Python's Arena derives from: alloc, and many at once
 *   module.c      the module
 *
 * A block refers to the core and not to the Arena, which may have a callback that refers to blocks: so there is no cycle, and blocks need no garbage
 * collection. Allocating and freeing keep the GIL and never wait with it: they try, and where the core would wait they give the GIL up first. A
 * finalizer may not do that. It puts the block on a queue.
 *
 * Limited API. What two threads may do to one object at the same time is decided by atomics, not by the GIL.
 *
 * Private to the module's files, which are compiled with hidden visibility.
 */
#ifndef UVAS_ALLOCATION_H
#define UVAS_ALLOCATION_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdatomic.h>
#include <stdint.h>

#include "uvas.h"

/* -- of all types -- */

static inline void end_object(void *self) {
    PyTypeObject *type = Py_TYPE(self);
    freefunc end = (freefunc)PyType_GetSlot(type, Py_tp_free);
    end(self);
    Py_DECREF(type);
}

/* Whether a type is the one with this deallocator, or derives from it. The module keeps no types of its own. */
static inline int derives_from(PyTypeObject *type, destructor dealloc) {
    for (; type; type = (PyTypeObject *)PyType_GetSlot(type, Py_tp_base)) {
        if ((destructor)PyType_GetSlot(type, Py_tp_dealloc) == dealloc) {
            return 1;
        }
    }
    return 0;
}

/* Sets the exception that a call returned. Takes the reference; NULL: the call has set one itself. */
static inline void *raise_object(PyObject *error) {
    if (error) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
    return NULL;
}

/* -- core.c -- */

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

extern PyType_Spec core_spec;

void core_dealloc(Core *self); /* derives_from knows a Core by it */

/* For finalizers: leaves an errand for others. An exception that is on its way stays, and none is added. */
void leave_for_later(PyObject *put, PyObject *function, unsigned long long number, PyObject *alive);

/* After a block of an arena that was left by `with` has gone: it may have been the last. */
static inline void close_if_last(Core *core) {
    if (atomic_load_explicit(&core->retired, memory_order_relaxed)) {
        leave_for_later(core->put, core->close, core->id, Py_None);
    }
}

/* -- block.c -- */

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

extern PyType_Spec block_spec;

void block_dealloc(Block *self); /* derives_from knows a Block by it */

/* A block without memory yet. */
static inline Block *block_make(PyTypeObject *type, Core *core) {
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

/* Whoever made the state FREED gives the memory back. This is for finalizers, which leave it to others where it waits. */
void give_back_or_owe(Block *self);

/* -- hold.c, allocator.c -- */

extern PyType_Spec hold_spec, allocator_spec;

#endif
