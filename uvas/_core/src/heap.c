/* heap.c: what each thread keeps for itself in an arena, and the door through which it goes.
 *
 * The door is a lock that costs its usual holder, the thread, two stores and a load: it says that it is inside, looks whether the door is shut, works,
 * and says that it is outside. Who wants a thread outside (to trim, check, count, close or fork) shuts the door, has every processor pass a barrier
 * (membarrier), and waits until nobody is inside: after the barrier either the thread has seen that the door is shut, or its being inside is seen.
 * This is Dekker's algorithm with one side's barrier moved to the other side; where the kernel has no membarrier both sides have theirs.
 *
 * A heap is its thread's for as long as the thread lives; in an arena that outlives the thread it stays, idle, for the next one. */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "arena.h"
#include "failure.h"
#include "vm.h"

#define ROOM_STEP 16u

static bool asymmetric; /* membarrier works; written once */

_Thread_local struct uvas_thread uvas_thread;

static pthread_key_t at_thread_end;

/* ---- the door -------------------------------------------------------------------------------------------------------------------------------- */

void uvas_doors_shut(struct uvas_arena *arena) {
    (void)pthread_mutex_lock(&arena->door);
    for (struct uvas_heap *heap = arena->heaps; heap; heap = heap->next) {
        atomic_store_explicit(&heap->open_to, UVAS_NO_ARENA, memory_order_seq_cst);
        atomic_store_explicit(&heap->shut, true, memory_order_seq_cst);
    }
    if (asymmetric && arena->heaps) {
        uvas_vm_barrier(); /* made with the door's lock held, as fork is: it asks nobody and takes microseconds */
    }
    for (struct uvas_heap *heap = arena->heaps; heap; heap = heap->next) {
        while (atomic_load_explicit(&heap->inside, memory_order_seq_cst)) {
            uvas_vm_yield(); /* a few hundred instructions, or until that thread runs again */
        }
    }
}

void uvas_door_unshut(struct uvas_heap *heap) {
    bool open = asymmetric && !heap->hardened;
    atomic_store_explicit(&heap->shut, false, memory_order_release);
    atomic_store_explicit(&heap->open_to, open ? atomic_load_explicit(&heap->arena_id, memory_order_relaxed) : UVAS_NO_ARENA, memory_order_release);
}

void uvas_doors_open(struct uvas_arena *arena) {
    for (struct uvas_heap *heap = arena->heaps; heap; heap = heap->next) {
        uvas_door_unshut(heap);
    }
    (void)pthread_mutex_unlock(&arena->door);
}

void uvas_heap_wait_at_door(struct uvas_heap *heap) {
    struct uvas_arena *arena = heap->arena;
    (void)pthread_mutex_lock(&arena->door);
    (void)pthread_mutex_unlock(&arena->door);
}

int uvas_heap_go_in(struct uvas_heap *heap, uvas_id id, bool wait) {
    if (uvas_heap_enter(heap, id)) {
        return 0;
    }
    while (!uvas_heap_enter_fenced(heap)) {
        if (!wait) {
            return -EAGAIN;
        }
        uvas_heap_wait_at_door(heap);
    }
    if (atomic_load_explicit(&heap->arena_id, memory_order_relaxed) != id) {
        uvas_heap_leave(heap);
        return wait ? uvas_fail_released("arena", id) : -EAGAIN;
    }
    return 0;
}

/* ---- a heap's beginning and end ------------------------------------------------------------------------------------------------------------------ */

static bool widen(uint32_t index) {
    if (index < uvas_thread.count) {
        return true;
    }
    uint32_t count = index + ROOM_STEP;
    struct uvas_heap **list = realloc(uvas_thread.list, count * sizeof *list);
    if (!list) {
        return false;
    }
    memset(list + uvas_thread.count, 0, (count - uvas_thread.count) * sizeof *list);
    uvas_thread.list = list;
    uvas_thread.count = count;
    (void)pthread_setspecific(at_thread_end, &uvas_thread);
    return true;
}

/* An idle heap of the arena, or `fresh`; under the door. */
static struct uvas_heap *settle(struct uvas_arena *arena, struct uvas_heap *fresh) {
    struct uvas_heap *heap = arena->heaps;
    while (heap && !heap->idle) {
        heap = heap->next;
    }
    if (!heap) {
        heap = fresh;
        memset((char *)heap + offsetof(struct uvas_heap, large_blocks), 0, sizeof *heap - offsetof(struct uvas_heap, large_blocks));
        for (uint32_t class = 0; class < UVAS_CLASSES; class++) {
            heap->bins[class].most = uvas_bin_most(class);
        }
        heap->arena = arena;
        heap->near_bytes = 0;
        heap->bare = (arena->flags & UVAS_ARENA_BARE) != 0;
        heap->hardened = arena->flags & (UVAS_ARENA_GUARD | UVAS_ARENA_POISON);
        heap->previous = NULL;
        heap->next = arena->heaps;
        if (heap->next) {
            heap->next->previous = heap;
        }
        arena->heaps = heap;
        atomic_store_explicit(&heap->arena_id, arena->id, memory_order_relaxed);
        uvas_door_unshut(heap);
    }
    heap->idle = false;
    return heap;
}

/* A thread's old heap is of another arena now gone, or of none: it is used again. */
struct uvas_heap *uvas_heap_of(uvas_id id, bool may_wait, int *rc) {
    uint32_t index = (uint32_t)id & UVAS_ARENA_INDEX;
    struct uvas_heap *heap = index < uvas_thread.count ? uvas_thread.list[index] : NULL;
    if (heap && atomic_load_explicit(&heap->arena_id, memory_order_relaxed) == id) {
        uvas_thread.last = heap;
        return heap;
    }
    struct uvas_arena *arena = uvas_arena_get(id);
    if (!arena) {
        *rc = -ESTALE;
        return NULL;
    }
    if (!widen(index)) {
        *rc = may_wait ? uvas_fail_memory(0, sizeof *heap, "the host") : -EAGAIN;
        return NULL;
    }
    struct uvas_heap *fresh = uvas_thread.list[index];
    bool own = fresh != NULL; /* detached by a close */
    fresh = own ? fresh : uvas_metadata_take(UVAS_METADATA_HEAP, may_wait);
    if (!fresh || (may_wait ? pthread_mutex_lock(&arena->door) : pthread_mutex_trylock(&arena->door)) != 0) {
        if (fresh && !own) {
            uvas_metadata_give(UVAS_METADATA_HEAP, fresh);
        }
        *rc = may_wait ? uvas_fail_memory(0, sizeof *fresh, "the host") : -EAGAIN;
        return NULL;
    }
    bool alive = arena->id == id;
    heap = alive ? settle(arena, fresh) : NULL;
    (void)pthread_mutex_unlock(&arena->door);
    if (heap != fresh) {
        uvas_thread.last = uvas_thread.list[index] = NULL;
        uvas_metadata_give(UVAS_METADATA_HEAP, fresh);
    }
    if (!heap) {
        *rc = uvas_fail_released("arena", id);
        return NULL;
    }
    uvas_thread.list[index] = uvas_thread.last = heap;
    return heap;
}

void uvas_heap_empty(struct uvas_heap *heap) {
    struct uvas_arena *arena = heap->arena;
    struct uvas_heap *orphans = &arena->orphans;
    for (uint32_t i = 0; i < UVAS_KEPT_RUNS; i++) {
        if (heap->kept[i]) {
            (void)uvas_pages_give(arena, heap->kept[i], NULL);
            heap->kept[i] = NULL;
            heap->kept_sizes[i] = 0;
        }
    }
    heap->kept_bytes = 0;
    uvas_heap_gather(heap);
    uvas_heap_sweep(heap);
    for (uint32_t class = 0; class < UVAS_CLASSES; class++) {
        struct uvas_bin *bin = &heap->bins[class];
        struct uvas_slab *next;
        uvas_bin_forget(heap, bin);
        for (struct uvas_slab *slab = bin->free; slab; slab = next) {
            next = slab->next;
            if (!slab->used) {
                uvas_slab_unlist(&bin->free, slab);
                uvas_slab_end(arena, slab);
            } else if (heap != orphans) {
                uvas_slab_unlist(&bin->free, slab);
                uvas_slab_list(uvas_slab_has_room(slab) ? &orphans->bins[class].free : &orphans->bins[class].full, slab);
                slab->used |= uvas_slab_has_room(slab) ? 0 : UVAS_SLAB_UNLISTED;
                atomic_store_explicit(&slab->run.owner, orphans, memory_order_release);
            }
        }
        while (heap != orphans && bin->full) {
            struct uvas_slab *slab = bin->full;
            uvas_slab_unlist(&bin->full, slab);
            uvas_slab_list(&orphans->bins[class].full, slab);
            atomic_store_explicit(&slab->run.owner, orphans, memory_order_release);
        }
    }
}

void uvas_heap_count(struct uvas_heap *heap) {
    struct uvas_arena *arena = heap->arena;
    arena->ended_blocks += heap->large_blocks;
    arena->ended_bytes += heap->large_bytes;
    heap->large_blocks = heap->large_bytes = 0;
    for (uint32_t class = 0; class < UVAS_CLASSES; class++) {
        arena->ended_blocks += heap->bins[class].allocated;
        arena->ended_bytes += heap->bins[class].allocated * uvas_class_bytes(class);
        heap->bins[class].allocated = 0;
    }
}

/* The thread ends: what it keeps goes to the arena, unless that was closed meanwhile. */
static void leave(struct uvas_heap *heap) {
    struct uvas_arena *arena = heap->arena;
    (void)pthread_mutex_lock(&arena->door); /* arenas are never freed, and a closed one has this lock still */
    bool attached = atomic_load_explicit(&heap->arena_id, memory_order_relaxed) != UVAS_NO_ARENA;
    if (attached) {
        (void)pthread_mutex_lock(&arena->lock);
        uvas_heap_empty(heap);
        uvas_heap_count(heap);
        (void)pthread_mutex_unlock(&arena->lock);
        heap->idle = true;
    }
    (void)pthread_mutex_unlock(&arena->door);
    if (!attached) {
        uvas_metadata_give(UVAS_METADATA_HEAP, heap);
    }
}

static void end_thread(void *ignored) {
    (void)ignored;
    for (uint32_t i = 0; i < uvas_thread.count; i++) {
        if (uvas_thread.list[i]) {
            leave(uvas_thread.list[i]);
        }
    }
    free(uvas_thread.list);
    uvas_thread = (struct uvas_thread){0};
}

void uvas_heaps_forget(void) {
    uvas_thread = (struct uvas_thread){0}; /* the parent's; a page or so is lost to the child */
    asymmetric = uvas_vm_barrier_learn() == 0;
}

int uvas_heaps_ready(void) {
    uvas_classes_learn();
    uvas_page_shift = (uint32_t)__builtin_ctzll(uvas_vm_platform.page_size);
    asymmetric = uvas_vm_barrier_learn() == 0;
    return -pthread_key_create(&at_thread_end, end_thread);
}
