/* residency.c: what a device with a bound may hold, and what leaves it first.
 *
 * Nobody tells us when a device uses what it has: only faults are seen. So a granule that came for the first time is on *probation*, first in, first
 * out; one that came back soon after it had left (it is among the *ghosts*, or still in line) is *proven*. Probation gets a tenth of the device: a scan
 * over more than the device holds passes through that tenth and leaves what is proven alone. (S3-FIFO, Yang et al., SOSP 2023, with the fault that
 * comes again in the place of the reference bit.)
 *
 * Rings hold what came in order; what left meanwhile is found out when its turn comes. Two bits a granule say where it stands.
 */
#include <errno.h>
#include <string.h>

#include "pager.h"
#include "vm.h"

enum mark { NONE = 0, QUEUED = 1, AGAIN = 2, GHOST = 3 };

#define PROBATION_SHARE 10u /* a tenth */
#define RING_SLACK 1024u    /* entries beyond what can be resident: those that left before their turn */

/* ---- marks and rings ---------------------------------------------------------------------------------------------------------------- */

static enum mark mark_of(const struct uvas_mirror *mirror, uint32_t party, uint32_t granule) {
    return (enum mark)(mirror->stores[party].marks[granule / 4] >> granule % 4 * 2 & 3);
}

static void set_mark(struct uvas_mirror *mirror, uint32_t party, uint32_t granule, enum mark mark) {
    uint8_t *byte = &mirror->stores[party].marks[granule / 4];
    *byte = (uint8_t)((*byte & ~(3u << granule % 4 * 2)) | (uint32_t)mark << granule % 4 * 2);
}

static uint64_t entry_of(const struct uvas_mirror *mirror, uint32_t granule) {
    return (uint64_t)mirror->number << 32 | granule;
}

/* The mirror of an entry, or NULL: it has gone, or the device's store in it. */
static struct uvas_mirror *mirror_of(const struct uvas_member *member, uint64_t entry) {
    struct uvas_mirror *mirror = uvas_pager.numbered[entry >> 32];
    bool known = mirror && mirror->domain == member->domain && (uint32_t)entry < mirror->granules && mirror->stores[member->party].marks;
    return known ? mirror : NULL;
}

static void push(struct uvas_ring *ring, uint64_t entry) {
    uint32_t at = ring->first + ring->count;
    ring->entries[at < ring->size ? at : at - ring->size] = entry;
    ring->count++;
}

static uint64_t pop(struct uvas_ring *ring) {
    uint64_t entry = ring->entries[ring->first];
    ring->first = ring->first + 1 < ring->size ? ring->first + 1 : 0;
    ring->count--;
    return entry;
}

static bool resident(const struct uvas_member *member, const struct uvas_mirror *mirror, uint32_t granule) {
    return uvas_granule_word(&mirror->directory[granule]) >> member->party & 1;
}

/* Takes out what has left before its turn. What is there always fits: a granule is in one ring, once. */
static void sweep(struct uvas_member *member, struct uvas_ring *ring) {
    for (uint32_t left = ring->count; left > 0; left--) {
        uint64_t entry = pop(ring);
        struct uvas_mirror *mirror = mirror_of(member, entry);
        if (mirror && resident(member, mirror, (uint32_t)entry)) {
            push(ring, entry);
        } else if (mirror) {
            set_mark(mirror, member->party, (uint32_t)entry, NONE);
        }
    }
}

static void enqueue(struct uvas_member *member, struct uvas_ring *ring, struct uvas_mirror *mirror, uint32_t granule) {
    if (ring->count == ring->size) {
        sweep(member, ring);
    }
    if (ring->count < ring->size) {
        push(ring, entry_of(mirror, granule));
        set_mark(mirror, member->party, granule, QUEUED);
    }
}

static void remember(struct uvas_member *member, struct uvas_mirror *mirror, uint32_t granule) {
    struct uvas_ring *ghosts = &member->ghosts;
    if (ghosts->count == ghosts->size) {
        uint64_t oldest = pop(ghosts);
        struct uvas_mirror *its = mirror_of(member, oldest);
        if (its && mark_of(its, member->party, (uint32_t)oldest) == GHOST) {
            set_mark(its, member->party, (uint32_t)oldest, NONE);
        }
    }
    push(ghosts, entry_of(mirror, granule));
    set_mark(mirror, member->party, granule, GHOST);
}

/* ---- coming and going --------------------------------------------------------------------------------------------------------------- */

int uvas_residency_open(struct uvas_member *member, uint32_t shift) {
    if (member->capacity == 0) {
        return 0;
    }
    uint64_t granules = (member->capacity >> shift) + 1;
    if (granules > UINT32_MAX / 4) {
        return -EINVAL;
    }
    uint32_t size = (uint32_t)granules + RING_SLACK;
    size_t bytes = ((size_t)2 * size + (size_t)granules) * sizeof(uint64_t), page = uvas_vm_platform.page_size;
    uint64_t *memory = uvas_vm_pages((bytes + page - 1) / page * page);
    if (!memory) {
        return -ENOMEM;
    }
    member->rings_bytes = (bytes + page - 1) / page * page;
    member->probation = (struct uvas_ring){.entries = memory, .size = size};
    member->proven = (struct uvas_ring){.entries = memory + size, .size = size};
    member->ghosts = (struct uvas_ring){.entries = memory + 2 * (size_t)size, .size = (uint32_t)granules};
    return 0;
}

void uvas_residency_close(struct uvas_member *member) {
    if (member->probation.entries) {
        (void)uvas_vm_unmap((uintptr_t)member->probation.entries, member->rings_bytes);
        member->probation.entries = NULL;
    }
}

void uvas_residency_came(struct uvas_member *member, const struct uvas_extent *run) {
    atomic_fetch_add_explicit(&member->resident, uvas_extent_bytes(run), memory_order_relaxed);
    for (uint32_t g = run->first; run->mirror->stores[member->party].marks && g < run->first + run->count; g++) {
        enum mark mark = mark_of(run->mirror, member->party, g);
        if (mark == QUEUED || mark == AGAIN) {
            set_mark(run->mirror, member->party, g, AGAIN);
        } else {
            enqueue(member, mark == GHOST ? &member->proven : &member->probation, run->mirror, g);
        }
    }
}

void uvas_residency_went(struct uvas_member *member, const struct uvas_extent *run) {
    atomic_fetch_sub_explicit(&member->resident, uvas_extent_bytes(run), memory_order_relaxed);
}

static void forget_in(struct uvas_ring *ring, uint32_t number) {
    for (uint32_t left = ring->count; left > 0; left--) {
        uint64_t entry = pop(ring);
        if (entry >> 32 != number) {
            push(ring, entry);
        }
    }
}

void uvas_residency_forget(struct uvas_member *member, const struct uvas_mirror *mirror) {
    if (member->capacity != 0) {
        forget_in(&member->probation, mirror->number);
        forget_in(&member->proven, mirror->number);
        forget_in(&member->ghosts, mirror->number);
    }
}

/* ---- evicting ----------------------------------------------------------------------------------------------------------------------- */

static bool inside(const struct uvas_extent *keep, const struct uvas_mirror *mirror, uint32_t granule) {
    return keep && keep->mirror == mirror && granule - keep->first < keep->count;
}

/* Whether it cannot leave just now: it is in use for who asks, is going away by itself, or its device is preferred for it and others can leave. */
static bool stays(const struct uvas_member *member, const struct uvas_mirror *mirror, uint32_t granule, const struct uvas_extent *want,
                  const struct uvas_extent *keep, bool spare) {
    uint32_t advice = atomic_load_explicit(&mirror->advice[granule], memory_order_relaxed);
    bool preferred = (advice & UVAS_ADVICE_PREFERRED) && (advice >> member->party & 1);
    return inside(want, mirror, granule) || inside(keep, mirror, granule) || uvas_within(mirror->suspended, granule) || (spare && preferred);
}

/* The ring whose turn it is: one that has entries which were not seen to stay. NULL: neither has. */
static struct uvas_ring *turn_of(struct uvas_member *member, const uint32_t stayed[2]) {
    bool first = member->probation.count > stayed[0], second = member->proven.count > stayed[1];
    bool full = member->probation.count > (uint32_t)(member->capacity >> member->domain->shift) / PROBATION_SHARE;
    return first && (full || !second) ? &member->probation : second ? &member->proven : NULL;
}

/* The next granule to leave, out of its ring; with `spare` what is preferred stays. false: none can. */
static bool choose(struct uvas_member *member, const struct uvas_extent *want, const struct uvas_extent *keep, bool spare, struct uvas_mirror **mirror,
                   uint32_t *granule) {
    uint32_t stayed[2] = {0, 0};
    for (struct uvas_ring *ring; (ring = turn_of(member, stayed)) != NULL;) {
        uint64_t entry = pop(ring);
        *mirror = mirror_of(member, entry);
        *granule = (uint32_t)entry;
        if (!*mirror) {
            continue;
        }
        enum mark mark = mark_of(*mirror, member->party, *granule);
        if (!resident(member, *mirror, *granule)) {
            set_mark(*mirror, member->party, *granule, NONE);
        } else if (mark == AGAIN) {
            enqueue(member, &member->proven, *mirror, *granule);
        } else if (stays(member, *mirror, *granule, want, keep, spare)) {
            enqueue(member, ring, *mirror, *granule);
            stayed[ring == &member->proven]++;
        } else {
            if (ring == &member->probation) {
                remember(member, *mirror, *granule);
            } else {
                set_mark(*mirror, member->party, *granule, NONE);
            }
            return true;
        }
    }
    return false;
}

/* Out of the front of the ring that `granule` came from, while they are its neighbours, with the same word: they leave together. */
static struct uvas_extent gather(struct uvas_member *member, struct uvas_mirror *mirror, uint32_t granule, const struct uvas_extent *want,
                              const struct uvas_extent *keep) {
    struct uvas_extent run = {.mirror = mirror, .first = granule, .count = 1, .word = uvas_granule_word(&mirror->directory[granule])};
    uint32_t most = (uint32_t)(UVAS_MOVE_BYTES >> mirror->domain->shift);
    struct uvas_ring *ring = mark_of(mirror, member->party, granule) == GHOST ? &member->probation : &member->proven;
    while (run.count < most && ring->count > 0 && ring->entries[ring->first] == entry_of(mirror, granule + run.count) &&
           granule + run.count < mirror->granules && uvas_granule_word(&mirror->directory[granule + run.count]) == run.word &&
           mark_of(mirror, member->party, granule + run.count) == QUEUED && !stays(member, mirror, granule + run.count, want, keep, true)) {
        (void)pop(ring);
        if (ring == &member->probation) {
            remember(member, mirror, granule + run.count);
        } else {
            set_mark(mirror, member->party, granule + run.count, NONE);
        }
        run.count++;
    }
    return run;
}

static int evict(struct uvas_member *member, const struct uvas_extent *run) {
    bool elsewhere = (uvas_holders(run->word) & ~(1u << member->party)) != 0;
    int rc = elsewhere ? uvas_move_drop(run, member->party) : uvas_move(run, UVAS_HOST, true);
    if (rc == 0) {
        atomic_fetch_add_explicit(&member->evictions, run->count, memory_order_relaxed);
    } else {
        for (uint32_t i = 0; i < run->count; i++) {
            enqueue(member, &member->proven, run->mirror, run->first + i);
        }
    }
    return rc;
}

int uvas_residency_room(struct uvas_member *member, const struct uvas_extent *run, const struct uvas_extent *keep) {
    if (member->capacity == 0) {
        return 0;
    }
    if (uvas_extent_bytes(run) > member->capacity) {
        return -ENOSPC;
    }
    while (atomic_load_explicit(&member->resident, memory_order_relaxed) + uvas_extent_bytes(run) > member->capacity) {
        struct uvas_mirror *mirror;
        uint32_t granule;
        if (!choose(member, run, keep, true, &mirror, &granule) && !choose(member, run, keep, false, &mirror, &granule)) {
            return -ENOMEM;
        }
        struct uvas_extent victims = gather(member, mirror, granule, run, keep);
        int rc = evict(member, &victims);
        if (rc < 0) {
            return rc == -EIO ? rc : -ENOMEM;
        }
    }
    return 0;
}
