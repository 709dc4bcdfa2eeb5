/* region.c: one reservation of an arena, and which run holds which of its pages.
 *
 * The map has a pointer for each page and one for each block of 8,192 pages. A run is found from each of its pages by one of three looks:
 *
 *   a slab     each of its pages points to it
 *   a hole     its first and its last page do (neighbours ask no others)
 *   a block    its pages up to the first multiple of 512, and each multiple of 512 after that; where it fills a block of pages, the block does,
 *              and nothing else. So a terabyte takes 30,000 stores and not 268 million
 *
 * Nothing is taken out of the map. A pointer that is there from earlier leads to a descriptor that was once a run's (metadata.c keeps it one), which
 * is asked whether it holds the address now. While a run lives nobody else writes at its pages, so all its own pointers are there. That makes looking
 * a matter of loads only, from any thread and from signal handlers.
 */
#include <assert.h>
#include <string.h>

#include "arena.h"
#include "vm.h"

#define GROUP ((size_t)512)  /* pages */
#define BLOCK ((size_t)8192) /* pages */
#define SMALLEST GROUP

static struct uvas_region *unused; /* under metadata's lock */

static size_t round_up(size_t value, size_t unit) {
    return (value + unit - 1) / unit * unit;
}

/* The tables one after another, each on its own cache lines; returns the bytes of all. */
static size_t lay_out(struct uvas_region *region, size_t pages, char *at) {
    size_t head = round_up(sizeof *region, 64), map = round_up(pages * sizeof *region->map, 64);
    size_t whole = round_up((pages / BLOCK + 1) * sizeof *region->whole, 64), touched = round_up(pages / 8 + 8, 64);
    if (at) {
        region->capacity = pages;
        region->map = (void *)(at + head);
        region->whole = (void *)(at + head + map);
        region->touched = (void *)(at + head + map + whole);
        region->spans = (void *)(at + head + map + whole + touched);
    }
    return head + map + whole + touched + round_up(pages * uvas_page() / UVAS_SPAN + 2, 64);
}

static size_t tables_bytes(const struct uvas_region *region) {
    return lay_out(NULL, region->capacity, NULL) - round_up(sizeof *region, 64);
}

void uvas_region_tables(const struct uvas_region *region, uintptr_t *from, uintptr_t *to) {
    *from = (uintptr_t)region / uvas_page() * uvas_page();
    *to = round_up((uintptr_t)region->map + tables_bytes(region), uvas_page());
}

struct uvas_region *uvas_region_take(size_t pages) {
    size_t capacity = SMALLEST;
    while (capacity < pages) {
        capacity *= 2;
    }
    uvas_metadata_lock();
    struct uvas_region **at = &unused;
    while (*at && (*at)->capacity != capacity) {
        at = &(*at)->link;
    }
    struct uvas_region *region = *at;
    if (region) {
        *at = region->link;
    }
    uvas_metadata_unlock();
    if (!region) {
        char *memory = uvas_vm_pages(round_up(lay_out(NULL, capacity, NULL), uvas_page()));
        region = (void *)memory;
        if (region) {
            (void)lay_out(region, capacity, memory);
        }
    }
    return region;
}

/* Its tables give their memory back and read as zeros again, also for who still looks into them. */
void uvas_region_give(struct uvas_region *region) {
    uintptr_t first = round_up((uintptr_t)region->map, uvas_page());
    uintptr_t end = (uintptr_t)region->map + tables_bytes(region), last = end / uvas_page() * uvas_page();
    if (first >= last || uvas_vm_drop(first, last - first) < 0) {
        first = last = end; /* by hand, all of it */
    }
    memset((void *)region->map, 0, first - (uintptr_t)region->map);
    memset((void *)last, 0, end - last);
    uvas_metadata_lock();
    region->link = unused;
    unused = region;
    uvas_metadata_unlock();
}

void uvas_run_place(struct uvas_run *run, struct uvas_region *region, uintptr_t base, size_t bytes) {
    uint32_t version = atomic_load_explicit(&run->version, memory_order_relaxed);
    atomic_store_explicit(&run->version, version + 1, memory_order_relaxed);
    atomic_store_explicit(&run->base, base, memory_order_release); /* not before the version */
    atomic_store_explicit(&run->bytes, bytes, memory_order_release);
    run->region = region;
    atomic_store_explicit(&run->version, version + 2, memory_order_release);
}

static bool holds(const struct uvas_run *run, uintptr_t address) {
    if (!run) {
        return false;
    }
    uint32_t version = atomic_load_explicit(&run->version, memory_order_acquire);
    uint32_t state = atomic_load_explicit(&run->state, memory_order_acquire);
    uintptr_t base = atomic_load_explicit(&run->base, memory_order_acquire);
    size_t bytes = atomic_load_explicit(&run->bytes, memory_order_acquire);
    return state != UVAS_RUN_NONE && !(version & 1) && address - base < bytes &&
           atomic_load_explicit(&run->version, memory_order_relaxed) == version;
}

struct uvas_run *uvas_region_find(const struct uvas_region *region, uintptr_t address) {
    size_t page = (address - atomic_load_explicit(&region->base, memory_order_relaxed)) >> uvas_page_shift;
    if (page >= region->capacity) {
        return NULL; /* it has another base since the caller looked */
    }
    struct uvas_run *run = atomic_load_explicit(&region->map[page], memory_order_acquire);
    if (!holds(run, address)) {
        run = atomic_load_explicit(&region->map[page & ~(GROUP - 1)], memory_order_acquire);
    }
    if (!holds(run, address)) {
        run = atomic_load_explicit(&region->whole[page / BLOCK], memory_order_acquire);
    }
    return holds(run, address) ? run : NULL;
}

static void set(struct uvas_region *region, size_t page, struct uvas_run *run) {
    atomic_store_explicit(&region->map[page], run, memory_order_release);
}

/* Pages [first, end) of one block of pages, which they do not fill. */
static void mark_part(struct uvas_region *region, size_t first, size_t end, struct uvas_run *run, enum uvas_run_state state) {
    if (state == UVAS_RUN_SLAB) {
        for (size_t page = first; page < end; page++) {
            set(region, page, run);
        }
        return;
    }
    size_t group = state == UVAS_RUN_HOLE ? end : round_up(first, GROUP);
    set(region, first, run);
    set(region, end - 1, run);
    for (size_t page = first; state != UVAS_RUN_HOLE && page < end && page < group; page++) {
        set(region, page, run);
    }
    for (size_t page = group; page < end; page += GROUP) {
        set(region, page, run);
    }
}

static void mark_blocks(struct uvas_region *region, size_t first, size_t end, struct uvas_run *run, enum uvas_run_state state) {
    while (first < end) {
        size_t block_end = (first / BLOCK + 1) * BLOCK, until = end < block_end ? end : block_end;
        if (until - first == BLOCK && state != UVAS_RUN_SLAB) {
            atomic_store_explicit(&region->whole[first / BLOCK], run, memory_order_release);
        } else {
            mark_part(region, first, until, run, state);
        }
        first = until;
    }
}

void uvas_region_mark(struct uvas_region *region, struct uvas_run *run, enum uvas_run_state state) {
    size_t first = (uvas_run_base(run) - atomic_load_explicit(&region->base, memory_order_relaxed)) >> uvas_page_shift;
    size_t end = first + (uvas_run_bytes(run) >> uvas_page_shift);
    assert(end > first && end <= region->capacity);
    if (state != UVAS_RUN_HOLE || end - first <= BLOCK) {
        mark_blocks(region, first, end, run, state);
        return;
    }
    size_t after_first = (first / BLOCK + 1) * BLOCK, last = (end - 1) / BLOCK * BLOCK; /* a hole's ends are what neighbours ask for */
    mark_blocks(region, first, after_first, run, state);
    mark_blocks(region, last, end, run, state);
}

/* ---- which pages may hold other bytes than zeros ------------------------------------------------------------------------------------ */

/* The bits of [first, end) that are in the word of `first`. */
static uint64_t mask_of(size_t first, size_t end) {
    uint64_t from = ~UINT64_C(0) << first % 64;
    return end - first / 64 * 64 < 64 ? from & ~(~UINT64_C(0) << end % 64) : from;
}

static void change(struct uvas_region *region, uintptr_t base, size_t bytes, bool touched) {
    size_t first = (base - atomic_load_explicit(&region->base, memory_order_relaxed)) >> uvas_page_shift;
    size_t end = first + (bytes >> uvas_page_shift);
    for (; first < end; first = (first / 64 + 1) * 64) {
        uint64_t mask = mask_of(first, end), *word = &region->touched[first / 64];
        *word = touched ? *word | mask : *word & ~mask;
    }
}

void uvas_region_touch(struct uvas_region *region, uintptr_t base, size_t bytes) {
    change(region, base, bytes, true);
}

void uvas_region_untouch(struct uvas_region *region, uintptr_t base, size_t bytes) {
    change(region, base, bytes, false);
}

bool uvas_region_touched(const struct uvas_region *region, uintptr_t base, uintptr_t end, uintptr_t *until) {
    uintptr_t origin = atomic_load_explicit(&region->base, memory_order_relaxed);
    size_t page = (base - origin) >> uvas_page_shift, last = (end - origin) >> uvas_page_shift;
    bool touched = region->touched[page / 64] >> page % 64 & 1;
    while (page < last) {
        uint64_t other = touched ? ~region->touched[page / 64] : region->touched[page / 64];
        other &= mask_of(page, last);
        if (other) {
            page = page / 64 * 64 + (size_t)__builtin_ctzll(other);
            break;
        }
        page = (page / 64 + 1) * 64;
    }
    *until = page < last ? origin + (page << uvas_page_shift) : end;
    return touched;
}

bool uvas_region_guarded(const struct uvas_region *region) {
    return (region->arena->flags & UVAS_ARENA_GUARD) != 0;
}
