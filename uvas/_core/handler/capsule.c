/* capsule.c: the capsule with the functions, and NumPy's own two functions that set the capsule in use and get it. */
#include "handler.h"

#include <string.h>

#define CAPSULE "mem_handler"
#define SET_HANDLER 304 /* places in _ARRAY_API, fixed since NumPy 1.22 */
#define GET_HANDLER 305

/* ---- the capsule -------------------------------------------------------------------------------------------------------------------------- */

/* The last array, or the last context, has gone. */
static void end_handler(PyObject *capsule) {
    struct numpy_handler *numpy = PyCapsule_GetPointer(capsule, CAPSULE);
    struct handler *handler = numpy ? numpy->functions.context : NULL;
    if (handler) {
        PyObject *kind, *error, *trace;
        PyErr_Fetch(&kind, &error, &trace);
        PyObject *done = PyObject_CallMethod(handler->core, "use", "i", -1);
        if (!done) {
            PyErr_Clear();
        }
        Py_XDECREF(done);
        Py_DECREF(handler->core);
        PyMem_Free(handler);
        PyErr_Restore(kind, error, trace);
    }
}

PyDoc_STRVAR(make_doc, "make($module, core, id, limit, /)\n--\n\nReturn a capsule that NumPy takes: its memory comes from the open arena `core` with this handle, "
             "and in a forked child from one with this limit (0: none).");

static PyObject *make(PyObject *module, PyObject *arguments) {
    (void)module;
    PyObject *core;
    unsigned long long id, limit;
    if (!PyArg_ParseTuple(arguments, "OKK", &core, &id, &limit)) {
        return NULL;
    }
    struct handler *handler = PyMem_Calloc(1, sizeof *handler);
    if (!handler) {
        return PyErr_NoMemory();
    }
    handler->arena = id;
    handler->limit = limit;
    handler->generation = atomic_load(&generation);
    handler->core = Py_NewRef(core);
    memcpy(handler->numpy.name, "uvas", sizeof "uvas");
    handler->numpy.version = 1;
    handler->numpy.functions = (struct numpy_functions){handler, handler_malloc, handler_calloc, handler_realloc, handler_free};
    PyObject *used = PyObject_CallMethod(core, "use", "i", 1);
    Py_XDECREF(used);
    PyObject *capsule = used ? PyCapsule_New(&handler->numpy, CAPSULE, end_handler) : NULL;
    if (!capsule) {
        if (used) {
            Py_XDECREF(PyObject_CallMethod(core, "use", "i", -1));
        }
        Py_DECREF(core);
        PyMem_Free(handler);
    }
    return capsule;
}

/* ---- NumPy's table ------------------------------------------------------------------------------------------------------------------------ */

typedef PyObject *(*set_function)(PyObject *capsule);
typedef PyObject *(*get_function)(void);

static void **numpy_table(void) {
    static void **_Atomic known;
    void **table = atomic_load_explicit(&known, memory_order_acquire);
    if (table) {
        return table;
    }
    PyObject *numpy = PyImport_ImportModule("numpy._core._multiarray_umath");
    PyObject *capsule = numpy ? PyObject_GetAttrString(numpy, "_ARRAY_API") : NULL;
    table = capsule ? PyCapsule_GetPointer(capsule, NULL) : NULL;
    Py_XDECREF(capsule);
    Py_XDECREF(numpy); /* NumPy is never unloaded */
    atomic_store_explicit(&known, table, memory_order_release);
    return table;
}

/* The capsule that was in use, or NULL with an exception set. A function's address is kept as a pointer to data in the table. */
PyObject *exchange(PyObject *capsule) {
    set_function set;
    void **table = numpy_table();
    if (!table) {
        return NULL;
    }
    memcpy(&set, &table[SET_HANDLER], sizeof set);
    return set(capsule);
}

PyDoc_STRVAR(set_doc, "set($module, capsule, /)\n--\n\nLet NumPy use this capsule in the current context; return the one that it used.");

static PyObject *set(PyObject *module, PyObject *capsule) {
    (void)module;
    return exchange(capsule);
}

PyDoc_STRVAR(get_doc, "get($module, /)\n--\n\nReturn the capsule that NumPy uses in the current context.");

static PyObject *get(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    get_function function;
    void **table = numpy_table();
    if (!table) {
        return NULL;
    }
    memcpy(&function, &table[GET_HANDLER], sizeof function);
    return function();
}

PyMethodDef capsule_methods[] = {
    {"make", make, METH_VARARGS, make_doc},
    {"set", set, METH_O, set_doc},
    {"get", get, METH_NOARGS, get_doc},
    {NULL, NULL, 0, NULL},
};
