/* handler.h: NumPy asks an arena for the memory of its arrays (NumPy's enhancement proposal 49), without Python in between: the extension module
 * _handler. From the ground up:
 *
 *   forked.c      the arena of a forked child
 *   functions.c   what NumPy calls for memory, and what becomes of what an arena's callback raises meanwhile
 *   capsule.c     the capsule with these functions, and NumPy's own functions that take it
 *   under.c       Under: one of NumPy's functions, run with the memory of one arena
 *   module.c      the module
 *
 * NumPy takes a table of functions in a capsule, keeps the capsule in a context variable, and lets every array that it makes keep the capsule as well,
 * to free the array's memory with. The table's layout and the places of two functions in NumPy's own table are its stable interface; they are
 * written down here and in capsule.c, so that building needs no NumPy. NumPy calls the functions with the GIL, which they keep, and give up where they
 * would wait; or without it.
 *
 * In a forked child the arena is the parent's: its blocks are left alone, and new ones come from an arena of the child's own, one a process, made by
 * whoever needs it first, with the limit of the arena for which it was needed. Both arenas' blocks may be freed through the same table.
 *
 * Limited API.
 *
 * Private to the module's files, which are compiled with hidden visibility.
 */
#ifndef UVAS_HANDLER_H
#define UVAS_HANDLER_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "uvas.h"

/* -- what NumPy wants -- */

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

/* -- the GIL -- */

/* Not of the limited API, and there in every Python. Where it should be missing, the GIL is kept while we wait. */
extern int PyGILState_Check(void) __attribute__((weak));

/* NumPy calls without the GIL as well: when text is read into an array that grows, for one. */
static inline PyThreadState *give_up(void) {
    return PyGILState_Check && PyGILState_Check() ? PyEval_SaveThread() : NULL;
}

static inline void take_back(PyThreadState *thread) {
    if (thread) {
        PyEval_RestoreThread(thread);
    }
}

/* -- forked.c -- */

/* How many forks lie between this process and the one that loaded the module. Only a forked child writes it, before fork returns there. */
extern atomic_uint generation;

/* Counts them from here on, once a process, however often it is called. 0, or an error number. */
int watch_forks(void);

/* The child's own arena, or 0 where there is no memory for one. */
uvas_id own_arena(size_t limit);

static inline int is_forked(const struct handler *handler) {
    return (int)__builtin_expect(handler->generation != atomic_load_explicit(&generation, memory_order_relaxed), 0);
}

/* The arena to ask for new blocks; 0: there is none. */
static inline uvas_id arena_of(const struct handler *handler) {
    return is_forked(handler) ? own_arena(handler->limit) : handler->arena;
}

/* Of a forked child: whether a block is not of its own arena; *size: its bytes, 0 where nobody has it. */
int is_ancestors(const struct handler *handler, uintptr_t base, size_t *size);

/* Whether a block is an ancestor's, in a forked child, which leaves it alone; *size: its bytes. */
static inline int inherited(const struct handler *handler, uintptr_t base, size_t *size) {
    return is_forked(handler) && is_ancestors(handler, base, size);
}

/* -- functions.c -- */

void *handler_malloc(void *context, size_t size);
void *handler_calloc(void *context, size_t count, size_t element);
void *handler_realloc(void *context, void *pointer, size_t size);
void handler_free(void *context, void *pointer, size_t size);

extern PyMethodDef asking_methods[];

/* -- capsule.c -- */

/* Lets NumPy use a capsule in the current context. The one that was in use, or NULL with an exception set. */
PyObject *exchange(PyObject *capsule);

extern PyMethodDef capsule_methods[];

/* -- under.c -- */

extern PyType_Spec under_spec;

#endif
