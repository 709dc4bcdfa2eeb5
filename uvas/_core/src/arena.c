/* arena.c: arenas as wholes: opened, closed, trimmed, forked. */
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "arena.h"
#include "failure.h"
#include "space.h"
#include "vm.h"

#define IDLE_NS UINT64_C(10000000000)
#define GROWTH_LEAST UVAS_SPAN
#define FLAGS (UVAS_ARENA_BARE | UVAS_ARENA_GUARD | UVAS_ARENA_POISON | UVAS_ARENA_BIND)

struct entry { /* behind an id */
    struct uvas_slot slot;
    struct uvas_arena *arena;
};

static _Atomic(char *) entry_chunks[UVAS_SLOTS_CHUNKS_MAX];
static struct uvas_slots entries = {.record_bytes = sizeof(struct entry), .kind = UVAS_SLOT_ARENA, .chunks = entry_chunks};

static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER; /* before every door */
static struct uvas_arena *all;       /* under list_lock */
static struct uvas_arena *inherited; /* a forked child's; written before it has a second thread */

struct uvas_arena *uvas_arena_get(uvas_id id) {
    struct uvas_arena *arena = NULL;
    uvas_registry_lock();
    const struct entry *entry = uvas_slots_get(&entries, id);
    if (entry) {
        arena = entry->arena;
    }
    uvas_registry_unlock();
    if (!arena) {
        (void)uvas_fail_released("arena", id);
    }
    return arena;
}

struct uvas_arena *uvas_arena_inherited(uvas_id id) {
    struct uvas_arena *arena = inherited;
    while (arena && arena->id != id) {
        arena = arena->next;
    }
    return arena;
}

/* ---- open --------------------------------------------------------------------------------------------------------------------------------------- */

static int say_huge(void) {
    char text[64] = "", over[64] = "";
    (void)uvas_vm_read_file("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", text, sizeof text);
    (void)uvas_vm_read_file("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages", over, sizeof over);
    bool none = (text[0] == 0 || text[0] == '0') && (over[0] == 0 || over[0] == '0');
    return none ? uvas_fail_unsupported("huge pages", "sysctl vm.nr_hugepages=N sets N pages of 2 MiB aside; or use pages that are not",
                                        "no huge pages of 2 MiB are set aside on this machine")
                : 0;
}

static int say_transparent(void) {
    char text[64] = "";
    (void)uvas_vm_read_file("/sys/kernel/mm/transparent_hugepage/enabled", text, sizeof text);
    return text[0] == 0 || strstr(text, "[never]")
               ? uvas_fail_unsupported("transparent huge pages", "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
                                       "this kernel makes none: %s", text[0] ? text : "it was built without them")
               : 0;
}

static int say_node(uint32_t node) {
    char path[64], text[16];
    (void)snprintf(path, sizeof path, "/sys/devices/system/node/node%u/distance", node);
    return uvas_vm_read_file(path, text, sizeof text) <= 0
               ? uvas_fail_unsupported("binding to a NUMA node", "ls /sys/devices/system/node says which there are", "this machine has no node %u", node)
               : 0;
}

static int sound(const struct uvas_arena_options *options) {
    if (options->flags & ~(uint32_t)FLAGS || options->pages > UVAS_PAGES_HUGE) {
        return uvas_fail_invalid("flags 0x%x, pages %u: there is no such thing", options->flags, options->pages);
    }
    if ((options->flags & UVAS_ARENA_BARE) && (options->flags != UVAS_ARENA_BARE || options->pages)) {
        return uvas_fail_invalid("bare addresses have no memory to guard, poison, bind or make of huge pages");
    }
    if (options->limit && options->limit < uvas_page()) {
        return uvas_fail_invalid("a limit of 0x%zx bytes is less than a page of 0x%zx", options->limit, uvas_page());
    }
    if (!options->space == !options->reservation) {
        return uvas_fail_invalid("an arena is over a space or over a reservation: one of the two");
    }
    if ((options->flags & UVAS_ARENA_GUARD) && !uvas_vm_platform.has_guard) {
        return uvas_fail_unsupported("guard pages", "Linux 6.13", "this kernel has no MADV_GUARD_INSTALL");
    }
    int rc = options->pages == UVAS_PAGES_HUGE ? say_huge() : options->pages == UVAS_PAGES_TRANSPARENT ? say_transparent() : 0;
    return rc == 0 && (options->flags & UVAS_ARENA_BIND) ? say_node(options->node) : rc;
}

static void describe(struct uvas_arena *arena, const struct uvas_arena_options *options) {
    if (!arena->ready) {
        (void)pthread_mutex_init(&arena->door, NULL);
        (void)pthread_mutex_init(&arena->lock, NULL);
        (void)pthread_cond_init(&arena->moved, NULL);
        arena->ready = true;
    }
    (void)snprintf(arena->name, sizeof arena->name, "%s", options->name ? options->name : "arena");
    arena->space = options->space;
    arena->tenant.name = arena->name;
    arena->flags = options->flags;
    arena->pages = options->pages;
    arena->node = options->node;
    arena->growth = options->growth > GROWTH_LEAST ? options->growth : options->growth ? GROWTH_LEAST : UVAS_ARENA_GROWTH;
    arena->limit = options->limit & ~(uvas_page() - 1);
    arena->idle_ns = options->idle_ns ? options->idle_ns : IDLE_NS;
    arena->exhausted = options->exhausted;
    arena->context = options->context;
    arena->orphans.arena = arena->resting.arena = arena;
}

/* Adds the one reservation that it has. */
static int settle_in(struct uvas_arena *arena, uvas_id reservation) {
    uintptr_t base = 0;
    size_t size = 0;
    uvas_registry_lock();
    const struct uvas_record *record = uvas_slots_get(&uvas_record_slots, reservation);
    if (record && record->kind == UVAS_RESERVATION) {
        base = record->base;
        size = record->size;
    }
    uvas_registry_unlock();
    return size ? uvas_arena_add_region(arena, reservation, base, size, false) : uvas_fail_released("reservation", reservation);
}

/* Nothing of the arena is in use any more: it can be another one. */
static void reset(struct uvas_arena *arena) {
    arena->id = 0; /* its locks stay what they are */
    arena->heaps = NULL;
    struct uvas_heap *nobodys[] = {&arena->orphans, &arena->resting}; /* but for what others may still push onto their stacks */
    for (size_t i = 0; i < 2; i++) {
        memset((char *)nobodys[i] + offsetof(struct uvas_heap, large_blocks), 0, sizeof **nobodys - offsetof(struct uvas_heap, large_blocks));
    }
    memset(&arena->holes, 0, sizeof arena->holes);
    arena->stuck = NULL;
    atomic_store_explicit(&arena->region_count, 0, memory_order_relaxed);
    for (uint32_t i = 0; i < UVAS_REGIONS_MAX; i++) {
        atomic_store_explicit(&arena->regions[i], NULL, memory_order_relaxed);
    }
    arena->growing = false;
    arena->used_bytes = arena->peak_bytes = arena->committed_bytes = arena->reserved_bytes = 0;
    arena->ended_blocks = arena->ended_bytes = 0;
}

static void end(struct uvas_arena *arena) {
    reset(arena);
    uvas_metadata_give(UVAS_METADATA_ARENA, arena);
}

int uvas_arena_open(const struct uvas_arena_options *options, uvas_id *out) {
    int rc = uvas_core_ready();
    rc = rc == 0 ? sound(options) : rc;
    if (rc < 0) {
        return rc;
    }
    struct uvas_arena *arena = uvas_metadata_take(UVAS_METADATA_ARENA, true);
    uvas_registry_lock();
    struct entry *entry = arena ? uvas_slots_take(&entries) : NULL;
    uvas_registry_unlock();
    if (!entry) {
        if (arena) {
            uvas_metadata_give(UVAS_METADATA_ARENA, arena);
        }
        return uvas_fail_memory(0, sizeof *arena, "the host");
    }
    describe(arena, options);
    entry->arena = arena;
    uvas_registry_lock();
    uvas_id id = uvas_slots_name(&entries, &entry->slot);
    uvas_registry_unlock();
    arena->id = id; /* nobody knows it yet */
    rc = options->reservation ? settle_in(arena, options->reservation) : uvas_space_let(arena->space, &arena->tenant);
    if (rc < 0) {
        uvas_registry_lock();
        uvas_slots_give(&entries, &entry->slot);
        uvas_registry_unlock();
        end(arena);
        return rc;
    }
    (void)pthread_mutex_lock(&list_lock);
    arena->previous = NULL;
    arena->next = all;
    if (all) {
        all->previous = arena;
    }
    all = arena;
    (void)pthread_mutex_unlock(&list_lock);
    *out = id;
    return 0;
}

/* ---- close ------------------------------------------------------------------------------------------------------------------------------------------------ */

/* Doors shut, under the lock; opens them. The heaps are their threads' still, and belong to no arena. */
static void detach_heaps(struct uvas_arena *arena) {
    struct uvas_heap *heap = arena->heaps, *next;
    arena->id = 0;
    arena->heaps = NULL;
    for (; heap; heap = next) {
        next = heap->next;
        heap->next = heap->previous = NULL;
        atomic_store_explicit(&heap->arena_id, UVAS_NO_ARENA, memory_order_relaxed);
        bool idle = heap->idle;
        heap->idle = false;
        uvas_door_unshut(heap);
        if (idle) {
            uvas_metadata_give(UVAS_METADATA_HEAP, heap);
        }
    }
}

/* Nobody gives memory back, which may call devices: that is waited for with the doors open. Then every thread is outside, and the lock held. */
static void shut_when_quiet(struct uvas_arena *arena) {
    for (bool quiet = false; !quiet;) {
        (void)pthread_mutex_lock(&arena->lock);
        while (arena->giving) {
            (void)pthread_cond_wait(&arena->moved, &arena->lock);
        }
        (void)pthread_mutex_unlock(&arena->lock);
        uvas_doors_shut(arena);
        (void)pthread_mutex_lock(&arena->lock);
        quiet = arena->giving == 0;
        if (!quiet) {
            (void)pthread_mutex_unlock(&arena->lock);
            uvas_doors_open(arena);
        }
    }
}

int uvas_arena_close(uvas_id id) {
    int rc = uvas_core_ready();
    struct uvas_arena *arena = rc < 0 ? NULL : uvas_arena_get(id);
    if (!arena) {
        return rc < 0 ? rc : -ESTALE;
    }
    shut_when_quiet(arena);
    bool alive = arena->id == id;
    uint64_t blocks = alive ? uvas_arena_in_use(arena) : 0;
    if (!alive || blocks || arena->growing) {
        (void)pthread_mutex_unlock(&arena->lock);
        uvas_doors_open(arena);
        return !alive ? uvas_fail_released("arena", id)
                      : uvas_fail_say(uvas_fail(UVAS_FAILURE_BUSY, -EBUSY), "arena %s cannot close: %llu %s in it", arena->name,
                                      (unsigned long long)blocks, blocks == 1 ? "block lives" : "blocks live");
    }
    for (struct uvas_heap *heap = arena->heaps; heap; heap = heap->next) {
        uvas_heap_empty(heap);
    }
    if (!arena->emptying) {
        uvas_heap_gather(&arena->resting); /* who had read that a slab rests may have pushed it there after it was taken back */
    }
    uvas_heap_empty(&arena->orphans);
    detach_heaps(arena);
    (void)pthread_mutex_unlock(&arena->lock);
    (void)pthread_mutex_unlock(&arena->door);
    uvas_registry_lock();
    struct entry *entry = uvas_slots_get(&entries, id);
    uvas_slots_give(&entries, &entry->slot);
    uvas_registry_unlock();
    (void)pthread_mutex_lock(&list_lock);
    *(arena->previous ? &arena->previous->next : &all) = arena->next;
    if (arena->next) {
        arena->next->previous = arena->previous;
    }
    (void)pthread_mutex_unlock(&list_lock);
    uint32_t count = atomic_load_explicit(&arena->region_count, memory_order_relaxed);
    for (uint32_t i = 0; i < count; i++) {
        int dropped = uvas_arena_drop_region(arena, atomic_load_explicit(&arena->regions[i], memory_order_relaxed));
        rc = dropped < 0 ? dropped : rc;
    }
    if (arena->space) {
        uvas_space_leave_tenant(arena->space, &arena->tenant);
    }
    end(arena);
    return rc;
}

/* ---- trim              -------------------------------------------------------------------------------------------------------------------------------------- */

int uvas_arena_trim(uvas_id id, uint64_t *bytes) {
    struct uvas_arena *arena = uvas_arena_get(id);
    if (!arena) {
        return -ESTALE;
    }
    uvas_trim_guards(arena);
    uvas_pages_collect(arena);
    uint64_t given = uvas_trim_holes(arena, UINT64_MAX, SIZE_MAX) + uvas_trim_pages(arena) + uvas_trim_slabs(arena);
    if (bytes) {
        *bytes = given;
    }
    return 0;
}

int uvas_arena_peak(uvas_id id, uint64_t floor, uint64_t *was) {
    struct uvas_arena *arena = uvas_arena_get(id);
    if (!arena) {
        return -ESTALE;
    }
    (void)pthread_mutex_lock(&arena->lock);
    uint64_t peak = arena->peak_bytes;
    arena->peak_bytes = arena->used_bytes > floor ? arena->used_bytes : floor;
    (void)pthread_mutex_unlock(&arena->lock);
    if (was) {
        *was = peak;
    }
    return 0;
}

/* ---- fork ---------------------------------------------------------------------------------------------------------------------------------------------------- */

void uvas_arenas_before_fork(void) {
    (void)pthread_mutex_lock(&list_lock);
    for (struct uvas_arena *arena = all; arena; arena = arena->next) {
        uvas_doors_shut(arena);
        (void)pthread_mutex_lock(&arena->lock);
    }
    uvas_metadata_lock();
}

static void go_on(void) {
    uvas_metadata_unlock();
    for (struct uvas_arena *arena = all; arena; arena = arena->next) {
        (void)pthread_mutex_unlock(&arena->lock);
        uvas_doors_open(arena);
    }
}

void uvas_arenas_after_fork_in_parent(void) {
    go_on();
    (void)pthread_mutex_unlock(&list_lock);
}

/* The parent's arenas are dead here, and what they knew stays readable: how large a block is, say. */
void uvas_arenas_after_fork_in_child(void) {
    go_on();
    struct uvas_arena *last = all;
    while (last && last->next) {
        last = last->next;
    }
    if (last) {
        last->next = inherited;
        inherited = all;
        all = NULL;
    }
    uvas_slots_forget(&entries);
    uvas_heaps_forget();
    uvas_metadata_forget_arenas();
    (void)pthread_mutex_unlock(&list_lock);
}
