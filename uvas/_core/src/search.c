/* search.c: see search.h. */
#include "search.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/resource.h>

#include "registry.h"

#define MIB ((uintptr_t)1 << 20)
#define GIB ((uintptr_t)1 << 30)
#define TIB ((uintptr_t)1 << 40)

#define ROOM_BELOW_FOREIGN MIB       /* PROCMAP_QUERY does not tell that a mapping grows down; 1 MiB is the kernel's stack_guard_gap */
#define STACK_ROOM_LEAST (8 * MIB)   /* the usual RLIMIT_STACK */
#define STACK_ROOM_UNLIMITED (128 * MIB) /* what the kernel keeps free below the stack whatever the limit (mm/util.c, MIN_GAP) */
#define HEAP_ROOM GIB
#define LOWEST ((uintptr_t)64 << 10) /* vm.mmap_min_addr as distributions set it */
#define QUICK_HOPS 4u                /* per place, before the whole window is walked */
#define FRONTIER_TRIES 8u            /* other threads that went below the frontier before us */
#define FIRST_STEP ((uintptr_t)64 << 10) /* refusals that nobody explains: step over so much, then twice that ... */
#define LAST_STEP GIB

struct span {
    uintptr_t start, end;
};

/* Addresses that others take by habit, without asking (FACTS: seen in NVIDIA's driver and in Go's runtime). Sanitizers take theirs before
 * main: there the kernel refuses. */
static const struct span by_habit[] = {
    {UINT64_C(0x200000000), UINT64_C(0x1600000000)},     /* CUDA */
    {UINT64_C(0xc000000000), UINT64_C(0xd000000000)},    /* Go's first heap arenas */
};

/* Learnt once, before any search (core.c). */
static uintptr_t stack_top;
static uintptr_t heap_start;

void uvas_search_learn(void) {
    struct uvas_obstacle stack = {0};
    uintptr_t inside = (uintptr_t)getauxval(AT_RANDOM); /* the kernel puts these 16 bytes on the main stack */
    if (inside && uvas_maps_describe(inside, 1, &stack)) {
        stack_top = stack.base + stack.size;
    }
    heap_start = uvas_vm_break();
}

/* ---- places that are never chosen ------------------------------------------------------------------------------------------------------- */

static struct span stack_room(void) {
    uint64_t limit = uvas_vm_limit(RLIMIT_STACK);
    uintptr_t room = limit == UINT64_MAX ? STACK_ROOM_UNLIMITED : limit < STACK_ROOM_LEAST ? STACK_ROOM_LEAST : limit;
    return (struct span){stack_top > room ? stack_top - room : 0, stack_top};
}

static struct span heap_room(void) {
    uintptr_t page = uvas_vm_platform.page_size;
    uintptr_t end_of_heap = (uvas_vm_break() + page - 1) & ~(page - 1);
    uint64_t limit = uvas_vm_limit(RLIMIT_DATA);
    uintptr_t room = limit < HEAP_ROOM ? limit & ~(page - 1) : HEAP_ROOM;
    struct uvas_obstacle next = {0};
    if (end_of_heap && uvas_maps_describe(end_of_heap, room ? room : page, &next)) {
        room = next.base > end_of_heap ? next.base - end_of_heap : 0;
    }
    return (struct span){end_of_heap, end_of_heap + room};
}

static bool overlaps(struct span a, uintptr_t start, uintptr_t end) {
    return a.start < end && start < a.end;
}

/* The rooms move as the program runs, so they are asked for each time, but only near where they can be. */
static struct span growth_room(uintptr_t start, uintptr_t end, const char **whose) {
    struct span none = {0, 0};
    if (stack_top && overlaps((struct span){stack_top > TIB ? stack_top - TIB : 0, stack_top}, start, end)) {
        struct span room = stack_room();
        if (overlaps(room, start, end)) {
            *whose = "[stack] growth room";
            return room;
        }
    }
    if (heap_start && overlaps((struct span){heap_start, heap_start + TIB}, start, end)) {
        struct span room = heap_room();
        if (overlaps(room, start, end)) {
            *whose = "[heap] growth room";
            return room;
        }
    }
    return none;
}

int uvas_search_growth_room(uintptr_t base, size_t size, struct uvas_obstacle *out) {
    const char *whose = NULL;
    struct span room = growth_room(base, base + size, &whose);
    if (!whose) {
        return 0;
    }
    *out = (struct uvas_obstacle){.base = room.start, .size = room.end - room.start};
    strcpy(out->owner, whose);
    return 1;
}

/* ---- obstacles that need no question to the kernel ------------------------------------------------------------------------------------------ */

/* The lowest known obstacle that ends above `from` and starts below `until`; start = until where there is none. */
static struct span known_obstacle(const struct uvas_search *search, uintptr_t from, uintptr_t until) {
    struct span lowest = {until, until};
    struct uvas_entry entry;
    if (uvas_registry_next(from, &entry) && entry.base < lowest.start) {
        lowest = (struct span){entry.base, entry.end};
    }
    for (size_t i = 0; i < sizeof by_habit / sizeof *by_habit; i++) {
        if (by_habit[i].end > from && by_habit[i].start < lowest.start) {
            lowest = by_habit[i];
        }
    }
    for (size_t i = 0; i < search->refused.count; i++) {
        if (search->refused.list[i].end > from && search->refused.list[i].start < lowest.start) {
            lowest = (struct span){search->refused.list[i].start, search->refused.list[i].end};
        }
    }
    return lowest;
}

/* ---- what the kernel says --------------------------------------------------------------------------------------------------------------------- */

static bool next_mapping(struct uvas_search *search, uintptr_t address, struct uvas_vma *out) {
    if (!search->maps_open) {
        search->maps_broken = uvas_maps_open(&search->maps) < 0; /* no /proc: the kernel's refusals are all we learn */
        search->maps_open = true;
    }
    if (++search->queries == UVAS_SEARCH_QUERIES && !search->maps_broken) {
        (void)uvas_maps_snapshot(&search->maps);
    }
    return !search->maps_broken && uvas_maps_next(&search->maps, address, out) == 1;
}

/* Whether all that is mapped in the first MiB from `end` is ours. */
static bool quiet_above(struct uvas_search *search, uintptr_t end) {
    uintptr_t at = end, until = end + ROOM_BELOW_FOREIGN;
    while (at < until) {
        struct uvas_entry entry;
        struct uvas_vma vma;
        if (uvas_registry_next(at, &entry) && entry.base <= at && !(entry.value & UVAS_REGISTRY_FOREIGN)) {
            at = entry.end;
            continue;
        }
        return !next_mapping(search, at, &vma) || vma.start >= until;
    }
    return true;
}

static uintptr_t align_down(uintptr_t address, size_t align) {
    return address & ~((uintptr_t)align - 1);
}

static uintptr_t align_up(uintptr_t address, size_t align) {
    return address > UINTPTR_MAX - align ? UINTPTR_MAX & ~((uintptr_t)align - 1) : align_down(address + align - 1, align);
}

/* The top of a place of `size` that ends at or below `top` and starts at or above `from`: its base, or 0. */
static uintptr_t fit(const struct uvas_search *search, uintptr_t from, uintptr_t top) {
    if (top <= from || top - from < search->size) {
        return 0;
    }
    uintptr_t base = align_down(top - search->size, search->align);
    return base >= from ? base : 0;
}

/* One step of the walk from *position: 1 with a candidate, 0 with *position moved on. */
static int step(struct uvas_search *search, uintptr_t *position, uintptr_t *candidate) {
    uintptr_t from = align_up(*position, search->align);
    struct span known = known_obstacle(search, from, search->high);
    struct uvas_vma vma;
    if (!fit(search, from, known.start)) {
        *position = known.end; /* no room before it: no need to ask */
        return 0;
    }
    uintptr_t top = known.start, beyond = known.end;
    if (next_mapping(search, from, &vma) && vma.start < top + ROOM_BELOW_FOREIGN) {
        struct uvas_entry entry;
        bool ours = uvas_registry_next(vma.start, &entry) && entry.base <= vma.start && !(entry.value & UVAS_REGISTRY_FOREIGN);
        uintptr_t room = ours ? 0 : ROOM_BELOW_FOREIGN;
        uintptr_t below = vma.start > from + room ? vma.start - room : from;
        if (below < top) {
            top = below;
            beyond = vma.end;
        }
    }
    *candidate = fit(search, from, top);
    const char *whose;
    struct span room = *candidate ? growth_room(*candidate, *candidate + search->size, &whose) : (struct span){0, 0};
    if (room.end) {
        *candidate = fit(search, from, room.start);
        beyond = *candidate ? beyond : room.end;
    }
    *position = *candidate ? from : beyond;
    return *candidate != 0;
}

static int walk(struct uvas_search *search, uintptr_t *position, uint32_t hops, uintptr_t *candidate) {
    while (*position < search->high && hops-- > 0) {
        uintptr_t before = *position;
        if (step(search, position, candidate)) {
            return 1;
        }
        if (*position <= before) { /* an alignment that wraps: nothing is above */
            *position = search->high;
        }
    }
    return 0;
}

/* ---- the stages ------------------------------------------------------------------------------------------------------------------------------------ */

/* Directly below `top`, if nothing known is there and what lies above leaves us in peace. */
static int below(struct uvas_search *search, uintptr_t top, uintptr_t *candidate) {
    for (uint32_t tries = 0; tries < FRONTIER_TRIES; tries++) {
        uintptr_t base = fit(search, search->low, top);
        if (!base) {
            return 0;
        }
        uintptr_t end = base + search->size;
        struct span known = known_obstacle(search, base, end);
        if (known.start == end) {
            const char *whose = NULL;
            (void)growth_room(base, end, &whose);
            if (whose || (end != search->quiet && !quiet_above(search, end))) {
                return 0;
            }
            search->quiet = end;
            *candidate = base;
            return 1;
        }
        top = known.start;
    }
    return 0;
}

/* Far from the binary and its heap (2/3 of the space), from the stack and what mmap hands out (its top), from what is mapped low by habit. */
static uintptr_t far_from_all(void) {
    return ((uintptr_t)3 << uvas_vm_platform.window_bits) / 8;
}

/* Numerators of 1/2, 1/4, 3/4: places to look at before a crowded window is walked from its low end. */
static uintptr_t spread_place(const struct uvas_search *search) {
    static const uintptr_t quarters[UVAS_SEARCH_SPREAD] = {0, 2, 1, 3};
    return search->low + (search->high - search->low) / 4 * quarters[search->spread];
}

static bool forget_refusals(struct uvas_search *search) {
    bool some = search->refused.count > 0;
    search->refused.count = 0;
    return some;
}

enum { STAGE_FRONTIER, STAGE_FAR, STAGE_SPREAD, STAGE_WALK };

int uvas_search_next(struct uvas_search *search, uintptr_t *candidate) {
    assert(search->low < search->high && search->size > 0);
    if (search->low < LOWEST) {
        search->low = LOWEST;
    }
    for (; search->stage < STAGE_SPREAD; search->stage++, search->tries = 0) {
        uintptr_t top = search->stage == STAGE_FRONTIER ? search->frontier : search->any_window ? far_from_all() : 0;
        bool inside = top > search->low && top <= search->high;
        if (inside && search->tries++ < FRONTIER_TRIES && below(search, top, candidate)) {
            return 1; /* refused there, the next is below it */
        }
    }
    for (; search->stage == STAGE_SPREAD; search->spread++) {
        if (search->spread == UVAS_SEARCH_SPREAD) {
            search->stage++;
            break;
        }
        uintptr_t position = spread_place(search);
        if (walk(search, &position, QUICK_HOPS, candidate)) {
            return 1;
        }
    }
    do {
        if (search->position < search->low) {
            search->position = search->low;
        }
        if (walk(search, &search->position, UINT32_MAX, candidate)) {
            return 1;
        }
        search->position = 0;
    } while (forget_refusals(search) && ++search->rounds < UVAS_SEARCH_ROUNDS);
    return 0;
}

static bool widen(struct uvas_search *search) {
    if (search->refused.count < search->refused.capacity) {
        return true;
    }
    size_t capacity = search->refused.capacity ? 2 * search->refused.capacity : 16;
    void *list = realloc(search->refused.list, capacity * sizeof *search->refused.list);
    if (list) {
        search->refused.list = list;
        search->refused.capacity = capacity;
    }
    return list != NULL;
}

void uvas_search_refused(struct uvas_search *search, uintptr_t candidate, const struct uvas_obstacle *obstacle, bool on_host) {
    uintptr_t start = obstacle->base, end = obstacle->base + obstacle->size;
    bool explained = obstacle->size != 0 && start < candidate + search->size && candidate < end;
    if (!explained) {
        uintptr_t pace = FIRST_STEP << (search->unexplained < 14 ? search->unexplained : 14);
        pace = pace < LAST_STEP ? pace : LAST_STEP;
        start = align_down(candidate, pace);
        end = align_up(candidate + search->size, pace);
    }
    search->unexplained = explained ? 0 : search->unexplained + 1;
    if (explained && on_host) {
        start = start > ROOM_BELOW_FOREIGN ? start - ROOM_BELOW_FOREIGN : 0;
        search->quiet = start >= candidate ? start : search->quiet; /* between the two is nothing, or it would have been the lowest */
    }
    if (search->stage <= STAGE_SPREAD && search->spread < UVAS_SEARCH_SPREAD) {
        search->spread += search->stage == STAGE_SPREAD; /* the next place, rather than the next hole here */
    }
    if (widen(search)) {
        search->refused.list[search->refused.count].start = start;
        search->refused.list[search->refused.count++].end = end;
    } else {
        search->stage = STAGE_WALK; /* no memory to remember it: at least do not come here again */
        search->position = end;
    }
}

void uvas_search_end(struct uvas_search *search) {
    if (search->maps_open) {
        uvas_maps_close(&search->maps);
    }
    free(search->refused.list);
    search->refused.list = NULL;
}
