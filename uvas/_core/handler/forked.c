/* forked.c: the arena of a forked child, and whose blocks are whose. */
#include "handler.h"

#include <pthread.h>
#include <stdlib.h>

struct own {
    unsigned generation; /* of the process whose it is */
    uvas_id space, arena;
    struct own *parent; /* what the parent had of the kind, or NULL */
};

atomic_uint generation;

/* At most one is of this process, and it is never closed: arrays may live in it to the end. */
static _Atomic(struct own *) latest_own;

static void after_fork_in_child(void) {
    atomic_fetch_add(&generation, 1);
}

static atomic_flag watching = ATOMIC_FLAG_INIT;

int watch_forks(void) {
    return atomic_flag_test_and_set(&watching) ? 0 : pthread_atfork(NULL, NULL, after_fork_in_child);
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
uvas_id own_arena(size_t limit) {
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
            thread = give_up();
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

int is_ancestors(const struct handler *handler, uintptr_t base, size_t *size) {
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
