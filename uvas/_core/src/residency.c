/* residency.c: what a device with a bound may hold, and what leaves it first.
 *
 * Nobody tells us when a device uses what it has: only faults are seen. So a granule that came for the first time is on *probation*, first in, first
 * out; one that came back soon after it had left (it is among the *ghosts*, or still in line) is *proven*. Probation gets a tenth of the device: a scan
 * over more than the device holds passes through that tenth and leaves what is proven alone. (S3-FIFO, Yang et al., SOSP 2023, with the fault that
 * comes again in the place of the reference bit.)
 *
 * A device that is in several spaces has one room for all of them: what a space wants may push out what another has.
 *
 * Rings hold what came in order; what left meanwhile is found out when its turn comes. Two bits a granule say where it stands.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "pager.h"
#include "vm.h"

enum mark { NONE = 0, QUEUED = 1, AGAIN = 2, GHOST = 3 };

#define PROBATION_SHARE 10u /* a tenth */
#define RUN_SHARE 8u        /* an eighth of the device leaves at once, at most */
#define RING_SLACK 1024u    /* entries beyond what can be resident: those that left before their turn */

/* ---- marks and rings ---------------------------------------------------------------------------------------------------------------- */

static enum mark mark_of(const struct uvas_mirror *mirror, uint32_t party, uint32_t granule) {
    return (enum mark)(mirror->stores[party].marks[granule / 4] >> granule % 4 * 2 & 3);
}

static void set_mark(struct uvas_mirror *mirror, uint32_t party, uint32_t granule, enum mark mark) {
    uint8_t *byte = &mirror->stores[party].marks[granule / 4];
    *byte = (uint8_t)((*byte & ~(3u << granule % 4 * 2)) | (uint32_t)mark << granule % 4 * 2);
}

/* An entry of a ring: party, mirror, granule. */
static uint64_t entry_of(const struct uvas_member *member, const struct uvas_mirror *mirror, uint32_t granule) {
    return (uint64_t)member->party << 56 | (uint64_t)mirror->number << 32 | granule;
}

static uint32_t number_of(uint64_t entry) {
    return (uint32_t)(entry >> 32) & (UVAS_MIRRORS_MAX - 1);
}

/* The mirror of an entry, and who the device is there; NULL: the mirror has gone, or the device from it. */
static struct uvas_mirror *mirror_of(const struct uvas_room *room, uint64_t entry, struct uvas_member **member) {
    struct uvas_mirror *mirror = uvas_pager.numbered[number_of(entry)];
    *member = mirror ? mirror->domain->members[entry >> 56] : NULL;
    bool known = *member && (*member)->room == room && (uint32_t)entry < mirror->granules && mirror->stores[entry >> 56].marks;
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
static void sweep(struct uvas_room *room, struct uvas_ring *ring) {
    for (uint32_t left = ring->count; left > 0; left--) {
        uint64_t entry = pop(ring);
        struct uvas_member *member;
        struct uvas_mirror *mirror = mirror_of(room, entry, &member);
        if (mirror && resident(member, mirror, (uint32_t)entry)) {
            push(ring, entry);
        } else if (mirror) {
            set_mark(mirror, member->party, (uint32_t)entry, NONE);
        }
    }
}

static void enqueue(struct uvas_member *member, struct uvas_ring *ring, struct uvas_mirror *mirror, uint32_t granule) {
    if (ring->count == ring->size) {
        sweep(member->room, ring);
    }
    if (ring->count < ring->size) {
        push(ring, entry_of(member, mirror, granule));
        set_mark(mirror, member->party, granule, QUEUED);
    }
}

static void remember(struct uvas_member *member, struct uvas_mirror *mirror, uint32_t granule) {
    struct uvas_ring *ghosts = &member->room->ghosts;
    if (ghosts->count == ghosts->size) {
        uint64_t oldest = pop(ghosts);
        struct uvas_member *who;
        struct uvas_mirror *its = mirror_of(member->room, oldest, &who);
        if (its && mark_of(its, who->party, (uint32_t)oldest) == GHOST) {
            set_mark(its, who->party, (uint32_t)oldest, NONE);
        }
    }
    push(ghosts, entry_of(member, mirror, granule));
    set_mark(mirror, member->party, granule, GHOST);
}

/* ---- coming and going --------------------------------------------------------------------------------------------------------------- */

int uvas_residency_open(struct uvas_member *member, const void *memory, uint32_t shift) {
    if (member->capacity == 0) {
        return 0;
    }
    uint64_t granules = (member->capacity >> shift) + 1;
    if (granules > UINT32_MAX / 4) {
        return -EINVAL;
    }
    uint32_t size = (uint32_t)granules + RING_SLACK;
    size_t bytes = ((size_t)2 * size + (size_t)granules) * sizeof(uint64_t), page = uvas_vm_platform.page_size;
    size_t whole = (bytes + page - 1) / page * page;
    struct uvas_room *room = malloc(sizeof *room);
    uint64_t *rings = room ? uvas_vm_pages(whole) : NULL;
    if (!rings) {
        free(room);
        return -ENOMEM;
    }
    *room = (struct uvas_room){
        .memory = memory,
        .capacity = member->capacity,
        .shift = shift,
        .members = 1,
        .probation = {.entries = rings, .size = size},
        .proven = {.entries = rings + size, .size = size},
        .ghosts = {.entries = rings + 2 * (size_t)size, .size = (uint32_t)granules},
        .rings_bytes = whole,
    };
    member->room = room;
    return 0;
}

void uvas_residency_close(struct uvas_room *room) {
    if (room) {
        (void)uvas_vm_unmap((uintptr_t)room->probation.entries, room->rings_bytes);
        free(room);
    }
}

struct uvas_room *uvas_residency_join(struct uvas_member *member, int *rc) {
    struct uvas_room *own = member->room;
    *rc = 0;
    for (uint32_t i = 0; own && own->memory && i < uvas_pager.member_count; i++) {
        struct uvas_room *there = uvas_pager.members[i]->room;
        if (there && there->memory == own->memory) {
            bool agree = there->capacity == own->capacity && there->shift == own->shift;
            *rc = agree ? 0 : -EEXIST;
            member->room = agree ? there : own;
            there->members += agree;
            return agree ? own : NULL;
        }
    }
    return NULL;
}

static void forget_in(struct uvas_ring *ring, uint32_t number) {
    for (uint32_t left = ring->count; left > 0; left--) {
        uint64_t entry = pop(ring);
        if (number_of(entry) != number) {
            push(ring, entry);
        }
    }
}

void uvas_residency_forget(struct uvas_member *member, const struct uvas_mirror *mirror) {
    if (member->room) {
        forget_in(&member->room->probation, mirror->number);
        forget_in(&member->room->proven, mirror->number);
        forget_in(&member->room->ghosts, mirror->number);
    }
}

void uvas_residency_part(struct uvas_member *member) {
    if (!member->room || --member->room->members == 0) {
        return;
    }
    for (uint32_t i = 0; i < uvas_pager.mirror_count; i++) {
        if (uvas_pager.mirrors[i]->domain == member->domain) {
            uvas_residency_forget(member, uvas_pager.mirrors[i]);
        }
    }
    member->room = NULL;
}

void uvas_residency_came(struct uvas_member *member, const struct uvas_extent *run) {
    atomic_fetch_add_explicit(&member->resident, uvas_extent_bytes(run), memory_order_relaxed);
    if (!member->room) {
        return;
    }
    member->room->resident += uvas_extent_bytes(run);
    for (uint32_t g = run->first; g < run->first + run->count; g++) {
        enum mark mark = mark_of(run->mirror, member->party, g);
        if (mark == QUEUED || mark == AGAIN) {
            set_mark(run->mirror, member->party, g, AGAIN);
        } else {
            enqueue(member, mark == GHOST ? &member->room->proven : &member->room->probation, run->mirror, g);
        }
    }
}

void uvas_residency_went(struct uvas_member *member, const struct uvas_extent *run) {
    atomic_fetch_sub_explicit(&member->resident, uvas_extent_bytes(run), memory_order_relaxed);
    if (member->room) {
        member->room->resident -= uvas_extent_bytes(run);
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
static struct uvas_ring *turn_of(struct uvas_room *room, const uint32_t stayed[2]) {
    bool first = room->probation.count > stayed[0], second = room->proven.count > stayed[1];
    bool full = room->probation.count > (uint32_t)(room->capacity >> room->shift) / PROBATION_SHARE;
    return first && (full || !second) ? &room->probation : second ? &room->proven : NULL;
}

/* The next granule to leave, out of its ring, of whichever space; with `spare` what is preferred stays. Returns who the device is there; NULL: none can. */
static struct uvas_member *choose(struct uvas_room *room, const struct uvas_extent *want, const struct uvas_extent *keep, bool spare,
                                  struct uvas_mirror **mirror, uint32_t *granule) {
    uint32_t stayed[2] = {0, 0};
    for (struct uvas_ring *ring; (ring = turn_of(room, stayed)) != NULL;) {
        uint64_t entry = pop(ring);
        struct uvas_member *member;
        *mirror = mirror_of(room, entry, &member);
        *granule = (uint32_t)entry;
        if (!*mirror) {
            continue;
        }
        enum mark mark = mark_of(*mirror, member->party, *granule);
        if (!resident(member, *mirror, *granule)) {
            set_mark(*mirror, member->party, *granule, NONE);
        } else if (mark == AGAIN) {
            enqueue(member, &room->proven, *mirror, *granule);
        } else if (stays(member, *mirror, *granule, want, keep, spare)) {
            enqueue(member, ring, *mirror, *granule);
            stayed[ring == &room->proven]++;
        } else {
            if (ring == &room->probation) {
                remember(member, *mirror, *granule);
            } else {
                set_mark(*mirror, member->party, *granule, NONE);
            }
            return member;
        }
    }
    return NULL;
}

/* Out of the front of the ring that `granule` came from, while they are its neighbours, with the same word: they leave together. */
static struct uvas_extent gather(struct uvas_member *member, struct uvas_mirror *mirror, uint32_t granule, const struct uvas_extent *want,
                              const struct uvas_extent *keep) {
    struct uvas_extent run = {.mirror = mirror, .first = granule, .count = 1, .word = uvas_granule_word(&mirror->directory[granule])};
    uint64_t share = member->room->capacity / RUN_SHARE, bytes = share < UVAS_MOVE_BYTES ? share : UVAS_MOVE_BYTES;
    uint32_t most = (uint32_t)(bytes >> mirror->domain->shift);
    struct uvas_ring *ring = mark_of(mirror, member->party, granule) == GHOST ? &member->room->probation : &member->room->proven;
    while (run.count < most && ring->count > 0 && ring->entries[ring->first] == entry_of(member, mirror, granule + run.count) &&
           granule + run.count < mirror->granules && uvas_granule_word(&mirror->directory[granule + run.count]) == run.word &&
           mark_of(mirror, member->party, granule + run.count) == QUEUED && !stays(member, mirror, granule + run.count, want, keep, true)) {
        (void)pop(ring);
        if (ring == &member->room->probation) {
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
            enqueue(member, &member->room->proven, run->mirror, run->first + i);
        }
    }
    return rc;
}

int uvas_residency_room(struct uvas_member *member, const struct uvas_extent *run, const struct uvas_extent *keep) {
    struct uvas_room *room = member->room;
    if (!room) {
        return 0;
    }
    if (uvas_extent_bytes(run) > room->capacity) {
        return -ENOSPC;
    }
    while (room->resident + uvas_extent_bytes(run) > room->capacity) {
        struct uvas_mirror *mirror;
        uint32_t granule;
        struct uvas_member *leaver = choose(room, run, keep, true, &mirror, &granule);
        leaver = leaver ? leaver : choose(room, run, keep, false, &mirror, &granule);
        if (!leaver) {
            return -ENOMEM;
        }
        struct uvas_extent victims = gather(leaver, mirror, granule, run, keep);
        int rc = evict(leaver, &victims);
        if (rc < 0) {
            return rc == -EIO ? rc : -ENOMEM;
        }
    }
    return 0;
}
