/* _handler.c: NumPy asks an arena for the memory of its arrays (NumPy's enhancement proposal 49), without Python in between.
 *
 * NumPy takes a table of functions in a capsule, keeps the capsule in a context variable, and lets every array that it makes keep the capsule as well,
 * to free the array's memory with. The table's layout and the places of two functions in NumPy's own table are its stable interface; they are
 * written down here, so that building needs no NumPy. NumPy calls the functions with the GIL, which they keep, and give up where they would wait; or
 * without it.
 *
 * In a forked child the arena is the parent's: its blocks are left alone, and new ones come from an arena of the child's own, one a process, made by
 * whoever needs it first, with the limit of the arena for which it was needed. Both arenas' blocks may be freed through the same table.
 *
 * Limited API.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "uvas.h"

/* ---- what NumPy wants --------------------------------------------------------------------------------------------------------------------- */

#define CAPSULE "mem_handler"
#define SET_HANDLER 304 /* places in _ARRAY_API, fixed since NumPy 1.22 */
#define GET_HANDLER 305

struct numpy_functions {
    void *context;
    void *(*malloc)(void *context, size_t size);
    void *(*calloc)(void *context, size_t count, size_t size);
    void *(*realloc)(void *context, void *pointer, size_t size);
    void (*free)(void *context, void *pointer, size_t size);
};

struct numpy_handler {
    char name[127];
    uint8_t version;
    struct numpy_functions functions;
};

struct handler {
    struct numpy_handler numpy;
    uvas_id arena;
    unsigned generation; /* of the process whose it is */
    size_t limit; /* the arena's, for a forked child's; 0: none */
    PyObject *core;
};

#define GIL_KEPT ((size_t)256 << 10) /* bytes that are filled with zeros or copied without giving up the GIL, which may cost more than they do */

/* ---- the GIL ------------------------------------------------------------------------------------------------------------------------------ */

/* Not of the limited API, and there in every Python. Where it should be missing, the GIL is kept while we wait. */
extern int PyGILState_Check(void) __attribute__((weak));

/* NumPy calls without the GIL as well: when text is read into an array that grows, for one. */
static PyThreadState *give_up(void) {
    return PyGILState_Check && PyGILState_Check() ? PyEval_SaveThread() : NULL;
}

static void take_back(PyThreadState *thread) {
    if (thread) {
        PyEval_RestoreThread(thread);
    }
}

/* ---- the arena of a forked child ---------------------------------------------------------------------------------------------------------- */

struct own {
    unsigned generation; /* of the process whose it is */
    uvas_id space, arena;
    struct own *parent; /* what the parent had of the kind, or NULL */
};

/* How many forks lie between this process and the one that loaded the module. */
static atomic_uint generation;

/* At most one is of this process, and it is never closed: arrays may live in it to the end. */
static _Atomic(struct own *) latest_own;

static void after_fork_in_child(void) {
    atomic_fetch_add(&generation, 1);
}

static struct own *existing_own(void) {
    struct own *own = atomic_load_explicit(&latest_own, memory_order_acquire);
    return own && own->generation == atomic_load_explicit(&generation, memory_order_relaxed) ? own : NULL;
}

static int open_own(struct own *own, size_t limit) {
    struct uvas_space_options space = {.name = "uvas: forked"};
    struct uvas_arena_options arena = {.name = "forked", .limit = limit};
    int rc = uvas_space_open(&space, &own->space);
    if (rc < 0) {
        return rc;
    }
    arena.space = own->space;
    rc = uvas_arena_open(&arena, &own->arena);
    if (rc < 0) {
        (void)uvas_space_close(own->space);
    }
    return rc;
}

/* The child's own arena, or 0 where there is no memory for one. Two threads may make one each: then one of the two goes again. */
static uvas_id own_arena(size_t limit) {
    struct own *own = existing_own();
    if (own) {
        return own->arena;
    }
    own = calloc(1, sizeof *own);
    if (!own) {
        return 0;
    }
    int rc;
    PyThreadState *thread = give_up();
    rc = open_own(own, limit);
    take_back(thread);
    if (rc < 0) {
        free(own);
        return 0;
    }
    own->generation = atomic_load(&generation);
    struct own *before = atomic_load(&latest_own);
    do {
        if (before && before->generation == own->generation) { /* another thread was first */
            PyThreadState *thread = give_up();
            (void)uvas_arena_close(own->arena);
            (void)uvas_space_close(own->space);
            take_back(thread);
            free(own);
            return before->arena;
        }
        own->parent = before;
    } while (!atomic_compare_exchange_weak(&latest_own, &before, own));
    return own->arena;
}

static int is_forked(const struct handler *handler) {
    return __builtin_expect(handler->generation != atomic_load_explicit(&generation, memory_order_relaxed), 0);
}

/* The arena to ask for new blocks; 0: there is none. */
static uvas_id arena_of(const struct handler *handler) {
    return is_forked(handler) ? own_arena(handler->limit) : handler->arena;
}

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

static void *handler_malloc(void *context, size_t size) {
    return take(arena_of(context), size ? size : 1);
}

static void *handler_calloc(void *context, size_t count, size_t element) {
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

/* Whether a block is an ancestor's, in a forked child, which leaves it alone; *size: its bytes. */
static int inherited(const struct handler *handler, uintptr_t base, size_t *size) {
    if (!is_forked(handler)) {
        return 0;
    }
    struct own *own = existing_own();
    if (own && uvas_allocation_size(own->arena, base, size) == 0) {
        return 0;
    }
    if (uvas_allocation_size(handler->arena, base, size) == 0) {
        return 1;
    }
    for (own = atomic_load(&latest_own); own; own = own->parent) { /* of a process between */
        if (uvas_allocation_size(own->arena, base, size) == 0) {
            return 1;
        }
    }
    *size = 0;
    return 1;
}

static void handler_free(void *context, void *pointer, size_t size) {
    struct handler *handler = context;
    size_t bytes;
    (void)size; /* what NumPy says it was is not always what it asked for */
    if (pointer && !inherited(handler, (uintptr_t)pointer, &bytes) && give(arena_of(handler), (uintptr_t)pointer) < 0) {
        (void)fprintf(stderr, "uvas: NumPy freed %p, which is no live block of its arena\n", pointer);
    }
}

static void *handler_realloc(void *context, void *pointer, size_t size) {
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
static PyObject *exchange(PyObject *capsule) {
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

/* ---- Under: one of NumPy's functions, run with the memory of one arena -------------------------------------------------------------------- */

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

static PyType_Spec under_spec = {"uvas._core._handler.Under", sizeof(Under), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, under_slots};

/* ---- the module --------------------------------------------------------------------------------------------------------------------------- */

static PyMethodDef methods[] = {
    {"make", make, METH_VARARGS, make_doc},
    {"set", set, METH_O, set_doc},
    {"asks", asks, METH_O, asks_doc},
    {"tell", tell, METH_VARARGS, tell_doc},
    {"get", get, METH_NOARGS, get_doc},
    {NULL, NULL, 0, NULL},
};

static atomic_flag watching = ATOMIC_FLAG_INIT;

static int execute(PyObject *module) {
    if (!atomic_flag_test_and_set(&watching) && pthread_atfork(NULL, NULL, after_fork_in_child) != 0) {
        PyErr_NoMemory();
        return -1;
    }
    PyObject *type = PyType_FromSpec(&under_spec);
    int rc = type ? PyModule_AddType(module, (PyTypeObject *)type) : -1;
    Py_XDECREF(type);
    return rc;
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
    .m_name = "uvas._core._handler",
    .m_doc = "NumPy asks an arena for the memory of its arrays.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__handler(void) {
    return PyModuleDef_Init(&definition);
}
