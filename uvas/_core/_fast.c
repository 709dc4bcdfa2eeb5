/* _fast.c: the calls that keep the GIL.
 *
 * cffi gives the GIL up at every call, which is right for calls that may wait. These never do: they take no lock and make no system call
 * (uvas.h says so of each), and beside a busy Python thread getting the GIL back costs a hundred times what they do.
 *
 * Limited API, and no state of its own.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "uvas.h"

/* 1 with the address, 0 if the integer is no address (negative or too large: nothing is there), -1 with a TypeError set. */
static int as_address(PyObject *integer, uintptr_t *out) {
    PyObject *index = PyNumber_Index(integer);
    if (!index) {
        return -1;
    }
    size_t address = PyLong_AsSize_t(index);
    Py_DECREF(index);
    if (address == (size_t)-1 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError)) {
            return -1;
        }
        PyErr_Clear();
        return 0;
    }
    *out = address;
    return 1;
}

/* 1 with the id of what holds the address, 0 if nothing does, -1 with an exception set. */
static int id_at(PyObject *integer, uvas_id *out) {
    uintptr_t address;
    struct uvas_found found;
    int is_address = as_address(integer, &address);
    if (is_address <= 0) {
        return is_address;
    }
    if (uvas_find(address, &found) < 0) {
        return 0;
    }
    *out = found.id;
    return 1;
}

PyDoc_STRVAR(find_doc, "find($module, address, /)\n--\n\n"
                       "Return the id of the reservation or adoption that holds an address, 0 if there is none.");

static PyObject *find(PyObject *module, PyObject *address) {
    (void)module;
    uvas_id id = 0;
    return id_at(address, &id) < 0 ? NULL : PyLong_FromUnsignedLongLong(id);
}

PyDoc_STRVAR(lookup_doc, "lookup($module, address, table, /)\n--\n\n"
                         "Return the live object that table, {id: weak reference}, has for what holds an address, or None.");

static PyObject *lookup(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    (void)module;
    if (count != 2) {
        return PyErr_Format(PyExc_TypeError, "lookup() takes exactly 2 arguments (%zd given)", count);
    }
    if (!PyDict_Check(arguments[1])) {
        return PyErr_Format(PyExc_TypeError, "lookup() takes a dict of weak references, not %R", (PyObject *)Py_TYPE(arguments[1]));
    }
    uvas_id id;
    int found = id_at(arguments[0], &id);
    if (found <= 0) {
        return found < 0 ? NULL : Py_NewRef(Py_None);
    }
    PyObject *key = PyLong_FromUnsignedLongLong(id);
    if (!key) {
        return NULL;
    }
    /* A strong reference: where there is no GIL, another thread may take the entry out meanwhile. */
    PyObject *reference = PyObject_GetItem(arguments[1], key);
    Py_DECREF(key);
    if (!reference) {
        if (!PyErr_ExceptionMatches(PyExc_KeyError)) {
            return NULL;
        }
        PyErr_Clear(); /* somebody else's: another space's, or a C library's */
        Py_RETURN_NONE;
    }
    PyObject *object = PyObject_CallNoArgs(reference);
    Py_DECREF(reference);
    return object;
}

PyDoc_STRVAR(unlease_doc, "unlease($module, lease, /)\n--\n\n"
                          "End a lease; for finalizers. Return 0, or -ESTALE if it has ended.");

static PyObject *unlease(PyObject *module, PyObject *lease) {
    (void)module;
    unsigned long long id = PyLong_AsUnsignedLongLong(lease);
    if (id == (unsigned long long)-1 && PyErr_Occurred()) {
        return NULL;
    }
    return PyLong_FromLong(uvas_unlease(id));
}

PyDoc_STRVAR(find_allocation_doc, "find_allocation($module, address, /)\n--\n\n"
                                  "Return base, size and the arena's id of the live block that holds an address, or None.");

static PyObject *find_allocation(PyObject *module, PyObject *integer) {
    (void)module;
    uintptr_t address;
    struct uvas_allocation found;
    int is_address = as_address(integer, &address);
    if (is_address < 0) {
        return NULL;
    }
    if (!is_address || uvas_find_allocation(address, &found) < 0) {
        Py_RETURN_NONE;
    }
    return Py_BuildValue("KKK", (unsigned long long)found.base, (unsigned long long)found.size, (unsigned long long)found.arena);
}

PyDoc_STRVAR(held_doc, "held($module, address, /)\n--\n\n"
                       "Return base and size of the reservation that holds an address, or None; also of those that C made.");

static PyObject *held(PyObject *module, PyObject *integer) {
    (void)module;
    uintptr_t address;
    struct uvas_found found;
    int is_address = as_address(integer, &address);
    if (is_address < 0) {
        return NULL;
    }
    if (!is_address || uvas_find(address, &found) < 0 || found.kind != UVAS_RESERVATION) {
        Py_RETURN_NONE;
    }
    return Py_BuildValue("KK", (unsigned long long)found.base, (unsigned long long)found.size);
}

static PyMethodDef methods[] = {
    {"find", find, METH_O, find_doc},
    {"find_allocation", find_allocation, METH_O, find_allocation_doc},
    {"held", held, METH_O, held_doc},
    {"lookup", (PyCFunction)(void (*)(void))lookup, METH_FASTCALL, lookup_doc},
    {"unlease", unlease, METH_O, unlease_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "uvas._core._fast",
    .m_doc = "The calls that keep the GIL.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__fast(void) {
    return PyModuleDef_Init(&definition);
}
