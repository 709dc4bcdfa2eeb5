/* under.c: Under, one of NumPy's functions, run with the memory of one arena. */
#include "handler.h"

#include <structmember.h>

static PyObject *call_under(PyObject *capsule, PyObject *function, PyObject *arguments, PyObject *names) {
    PyObject *before = exchange(capsule);
    if (!before) {
        return NULL;
    }
    PyObject *result = PyObject_Call(function, arguments, names), *kind, *error, *trace;
    PyErr_Fetch(&kind, &error, &trace);
    PyObject *ours = exchange(before);
    Py_DECREF(before);
    if (!ours) { /* no memory for a context: worse than what the function said */
        Py_XDECREF(result);
        Py_XDECREF(kind);
        Py_XDECREF(error);
        Py_XDECREF(trace);
        return NULL;
    }
    Py_DECREF(ours);
    PyErr_Restore(kind, error, trace);
    return result;
}

typedef struct {
    PyObject_HEAD
    PyObject *function;
    PyObject *source; /* returns the capsule, at the first call of a process */
    _Atomic(PyObject *) capsule;
    _Atomic(PyObject *) run; /* the `run` of a context in which NumPy uses the capsule */
    PyObject *dict;
    int plain; /* takes a shape and a type */
} Under;

static PyObject *under_new(PyTypeObject *type, PyObject *arguments, PyObject *names) {
    PyObject *function, *source;
    int plain;
    if (names && PyDict_Size(names)) {
        return PyErr_Format(PyExc_TypeError, "Under() takes no keyword arguments");
    }
    if (!PyArg_ParseTuple(arguments, "OOp", &function, &source, &plain)) {
        return NULL;
    }
    Under *self = (Under *)PyType_GenericAlloc(type, 0);
    if (self) {
        self->function = Py_NewRef(function);
        self->source = Py_NewRef(source);
        self->plain = plain;
    }
    return (PyObject *)self;
}

static int under_traverse(Under *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE((PyObject *)self));
    Py_VISIT(self->function);
    Py_VISIT(self->source);
    Py_VISIT(self->dict);
    return 0;
}

static int under_clear(Under *self) {
    PyObject *capsule = atomic_exchange(&self->capsule, NULL), *run = atomic_exchange(&self->run, NULL);
    Py_XDECREF(capsule);
    Py_XDECREF(run);
    Py_CLEAR(self->function);
    Py_CLEAR(self->source);
    Py_CLEAR(self->dict);
    return 0;
}

static void under_dealloc(Under *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    freefunc end = (freefunc)PyType_GetSlot(type, Py_tp_free);
    PyObject_GC_UnTrack((PyObject *)self);
    (void)under_clear(self);
    end(self);
    Py_DECREF((PyObject *)type);
}

/* Keeps an object, or what another thread put there meanwhile. Takes the reference; returns a borrowed one. */
static PyObject *keep(_Atomic(PyObject *) *place, PyObject *object) {
    PyObject *none = NULL;
    if (!object || atomic_compare_exchange_strong(place, &none, object)) {
        return object;
    }
    Py_DECREF(object);
    return none;
}

/* The bound `run` of a new context in which NumPy uses the capsule. */
static PyObject *make_run(PyObject *capsule) {
    PyObject *module = PyImport_ImportModule("contextvars"), *context = NULL, *run = NULL, *before = NULL, *here = NULL;
    context = module ? PyObject_CallMethod(module, "Context", NULL) : NULL;
    run = context ? PyObject_GetAttrString(context, "run") : NULL;
    here = run ? PyImport_ImportModule("uvas._core._handler") : NULL;
    PyObject *function = here ? PyObject_GetAttrString(here, "set") : NULL;
    before = function ? PyObject_CallFunctionObjArgs(run, function, capsule, NULL) : NULL;
    if (!before) {
        Py_CLEAR(run);
    }
    Py_XDECREF(before);
    Py_XDECREF(function);
    Py_XDECREF(here);
    Py_XDECREF(context);
    Py_XDECREF(module);
    return run;
}

/* A call that runs nobody's code but NumPy's, and that does not ask for anything else that a context may hold, may run in a context of ours: entering
 * it costs a tenth of changing the variable twice. That is a shape of plain integers, and a type given as a string or a class. */
static int is_plain(PyObject *arguments, PyObject *names) {
    Py_ssize_t count = PyTuple_Size(arguments);
    if (names || count < 1 || count > 2) {
        return 0;
    }
    PyObject *shape = PyTuple_GetItem(arguments, 0);
    if (PyTuple_CheckExact(shape)) {
        for (Py_ssize_t i = PyTuple_Size(shape); i-- > 0;) {
            if (!PyLong_CheckExact(PyTuple_GetItem(shape, i))) {
                return 0;
            }
        }
    } else if (!PyLong_CheckExact(shape)) {
        return 0;
    }
    return count == 1 || PyUnicode_CheckExact(PyTuple_GetItem(arguments, 1));
}

static PyObject *under_call(Under *self, PyObject *arguments, PyObject *names) {
    PyObject *capsule = atomic_load_explicit(&self->capsule, memory_order_acquire);
    if (!capsule && !(capsule = keep(&self->capsule, PyObject_CallNoArgs(self->source)))) {
        return NULL;
    }
#ifndef Py_GIL_DISABLED
    if (self->plain && is_plain(arguments, names)) {
        PyObject *run = atomic_load_explicit(&self->run, memory_order_acquire);
        if (!run && !(run = keep(&self->run, make_run(capsule)))) {
            return NULL;
        }
        PyObject *second = PyTuple_Size(arguments) == 2 ? PyTuple_GetItem(arguments, 1) : NULL;
        PyObject *result = PyObject_CallFunctionObjArgs(run, self->function, PyTuple_GetItem(arguments, 0), second, NULL);
        if (result || !PyErr_ExceptionMatches(PyExc_RuntimeError)) {
            return result;
        }
        PyErr_Clear(); /* another thread is in that context, waiting for memory; or NumPy says so once more */
    }
#endif
    return call_under(capsule, self->function, arguments, names);
}

static PyObject *under_repr(Under *self) {
    return PyUnicode_FromFormat("<%R in unified memory>", self->function);
}

static PyObject *under_reduce(Under *self, PyObject *unused) {
    (void)unused;
    return PyObject_GetAttrString((PyObject *)self, "__name__"); /* as pickle has it: a global of that name */
}

PyDoc_STRVAR(under_begin_anew_doc, "begin_anew($self, /)\n--\n\nAsk source() for a capsule again, as a forked child does.");

/* What the parent had is kept: the call that forks may be under it. */
static PyObject *under_begin_anew(Under *self, PyObject *unused) {
    (void)unused;
    atomic_store(&self->capsule, NULL);
    atomic_store(&self->run, NULL);
    Py_RETURN_NONE;
}

static PyMethodDef under_methods[] = {
    {"begin_anew", (PyCFunction)under_begin_anew, METH_NOARGS, under_begin_anew_doc},
    {"__reduce__", (PyCFunction)under_reduce, METH_NOARGS, "Pickle by name."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef under_members[] = {
    {"__dictoffset__", T_PYSSIZET, offsetof(Under, dict), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(under_doc, "Under(function, source, plain, /)\n--\n\n"
                        "A function that is called while NumPy uses the capsule that source() returns, once a process. plain: it takes a shape and a type.");

static PyGetSetDef under_getset[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot under_slots[] = {
    {Py_tp_doc, (void *)under_doc},         {Py_tp_new, (void *)under_new},         {Py_tp_dealloc, (void *)under_dealloc},
    {Py_tp_traverse, (void *)under_traverse}, {Py_tp_clear, (void *)under_clear},   {Py_tp_call, (void *)under_call},
    {Py_tp_methods, (void *)under_methods}, {Py_tp_members, (void *)under_members}, {Py_tp_getset, (void *)under_getset},
    {Py_tp_repr, (void *)under_repr},
    {0, NULL},
};

PyType_Spec under_spec = {"uvas._core._handler.Under", sizeof(Under), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, under_slots};
