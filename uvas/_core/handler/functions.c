/* functions.c: what NumPy calls for memory, and what becomes of what an arena's callback raises meanwhile. */
#include "handler.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#define GIL_KEPT ((size_t)256 << 10) /* bytes that are filled with zeros or copied without giving up the GIL, which may cost more than they do */

/* ---- what an arena's callback raises ------------------------------------------------------------------------------------------------------ */

enum { ASKS = 1, INTERRUPTED = 2 };

/* NumPy waits for memory on this thread: it can say that there is none, and nothing else. */
static _Thread_local unsigned numpy_asks;

static unsigned begin_to_ask(void) {
    unsigned before = numpy_asks;
    numpy_asks = ASKS;
    return before;
}

/* Ctrl-C comes again, as if it had been pressed now: NumPy's function has its end first. */
static void end_to_ask(unsigned before) {
    if (numpy_asks & INTERRUPTED) {
        PyErr_SetInterrupt();
    }
    numpy_asks = before;
}

PyDoc_STRVAR(asks_doc, "asks($module, value, /)\n--\n\nSay whether NumPy is who waits on this thread; return what was said before.");

static PyObject *asks(PyObject *module, PyObject *value) {
    (void)module;
    unsigned long said = PyLong_AsUnsignedLong(value);
    if (said == (unsigned long)-1 && PyErr_Occurred()) {
        return NULL;
    }
    unsigned before = numpy_asks;
    numpy_asks = (unsigned)said;
    return PyLong_FromUnsignedLong(before);
}

PyDoc_STRVAR(tell_doc, "tell($module, error, who, /)\n--\n\nTell sys.unraisablehook of an error; of an interrupt, the main thread when NumPy is done.");

static PyObject *tell(PyObject *module, PyObject *arguments) {
    (void)module;
    PyObject *error, *who;
    if (!PyArg_ParseTuple(arguments, "OO", &error, &who)) {
        return NULL;
    }
    if (PyErr_GivenExceptionMatches(error, PyExc_KeyboardInterrupt)) {
        numpy_asks |= INTERRUPTED;
    } else {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        PyErr_WriteUnraisable(who);
    }
    Py_RETURN_NONE;
}

PyMethodDef asking_methods[] = {
    {"asks", asks, METH_O, asks_doc},
    {"tell", tell, METH_VARARGS, tell_doc},
    {NULL, NULL, 0, NULL},
};

/* ---- the functions ------------------------------------------------------------------------------------------------------------------------ */

static void *take(uvas_id arena, size_t size) {
    uintptr_t base = 0;
    int rc = arena ? uvas_alloc_try(arena, size, 0, &base) : -ENOMEM;
    if (rc == -EAGAIN) {
        PyThreadState *thread = give_up();
        unsigned before = begin_to_ask();
        rc = uvas_alloc(arena, size, 0, &base);
        end_to_ask(before);
        take_back(thread);
    }
    return rc == 0 ? (void *)base : NULL;
}

void *handler_malloc(void *context, size_t size) {
    return take(arena_of(context), size ? size : 1);
}

void *handler_calloc(void *context, size_t count, size_t element) {
    size_t size;
    if (__builtin_mul_overflow(count, element, &size)) {
        return NULL;
    }
    size = size ? size : 1;
    uvas_id arena = arena_of(context);
    uintptr_t base = 0;
    int rc = !arena ? -ENOMEM : size <= GIL_KEPT ? uvas_alloc_zeroed_try(arena, size, 0, &base) : -EAGAIN;
    if (rc == -EAGAIN) {
        PyThreadState *thread = give_up();
        unsigned before = begin_to_ask();
        rc = uvas_alloc_zeroed(arena, size, 0, &base);
        end_to_ask(before);
        take_back(thread);
    }
    return rc == 0 ? (void *)base : NULL;
}

static int give(uvas_id arena, uintptr_t base) {
    int rc = uvas_free_try(arena, base);
    if (rc == -EAGAIN) {
        PyThreadState *thread = give_up();
        rc = uvas_free(arena, base);
        take_back(thread);
    }
    return rc;
}

void handler_free(void *context, void *pointer, size_t size) {
    struct handler *handler = context;
    size_t bytes;
    (void)size; /* what NumPy says it was is not always what it asked for */
    if (pointer && !inherited(handler, (uintptr_t)pointer, &bytes) && give(arena_of(handler), (uintptr_t)pointer) < 0) {
        (void)fprintf(stderr, "uvas: NumPy freed %p, which is no live block of its arena\n", pointer);
    }
}

void *handler_realloc(void *context, void *pointer, size_t size) {
    struct handler *handler = context;
    size_t old;
    if (!pointer) {
        return handler_malloc(context, size);
    }
    size = size ? size : 1;
    if (inherited(handler, (uintptr_t)pointer, &old)) {
        void *block = take(own_arena(handler->limit), size);
        return block && old ? memcpy(block, pointer, old < size ? old : size) : block;
    }
    uvas_id arena = arena_of(handler);
    uintptr_t base = (uintptr_t)pointer;
    if (uvas_allocation_size(arena, base, &old) == 0 && old <= GIL_KEPT && size <= GIL_KEPT) { /* here, if that takes no waiting */
        if (size <= old && size > old / 2) {
            return pointer;
        }
        if (uvas_alloc_try(arena, size, 0, &base) == 0) {
            memcpy((void *)base, pointer, old < size ? old : size);
            (void)give(arena, (uintptr_t)pointer);
            return (void *)base;
        }
    }
    int rc;
    PyThreadState *thread = give_up();
    unsigned before = begin_to_ask();
    rc = uvas_realloc(arena, (uintptr_t)pointer, size, &base);
    end_to_ask(before);
    take_back(thread);
    return rc == 0 ? (void *)base : NULL;
}
