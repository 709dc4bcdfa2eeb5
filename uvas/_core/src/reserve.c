/* reserve.c: the reserve protocol, and adoptions, which claim and publish with no act between.
 *
 * For each candidate of the search, at most `attempts` times:
 *
 *   1. claim    in the registry, hidden: cheap, and undone by one removal. Two threads of this process never act on one place
 *   2. act      outside every lock: a device that owns claims first, and what its claim leaves free of the range is filled; else the host's
 *               non-destructive mapping; then the devices that claim, all asked at the same time. Each step undoes itself when a later one fails
 *   3. publish  or un-claim
 *
 * A party that says "taken" sends the search elsewhere; whatever else it says is the caller's to know. Release (release.c) goes the other way.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "failure.h"
#include "limits.h"
#include "mirrors.h"
#include "registry.h"
#include "search.h"
#include "space.h"

#define SAME_PLACE_TRIES 4 /* where the kernel refused and nobody is seen there: the holder may just have left */

/* ---- the host's part --------------------------------------------------------------------------------------------------------------------------- */

static bool refuses_tag(int rc) {
    return rc == -EINVAL || rc == -EACCES || rc == -EPERM || rc == -ENODEV || rc == -EOPNOTSUPP;
}

UVAS_FLAT int hold(uintptr_t base, size_t size, int tag) {
    uintptr_t stray = 0;
    int rc = uvas_vm_reserve(base, size, tag, &stray);
    if (stray) {
        uvas_quarantine_stray(stray, size);
    }
    return rc;
}

int uvas_hold(uintptr_t base, size_t size, int tag) {
    return hold(base, size, tag);
}

UVAS_FLAT int map_held(struct uvas_record *record, uintptr_t base, size_t size) {
    int rc = hold(base, size, record->tagged ? record->space->tag : -1);
    if (record->tagged && refuses_tag(rc)) { /* this kernel maps no empty file, or not here */
        record->tagged = false;
        rc = hold(base, size, -1);
    }
    return rc;
}

/* 0; -EEXIST with the holder in *obstacle (size 0: nobody is seen there); else the failure is said. */
UVAS_FLAT int hold_on_host(struct uvas_record *record, struct uvas_obstacle *obstacle) {
    for (int tries = 0;; tries++) {
        int rc = map_held(record, record->base, record->size);
        if (rc == 0) {
            record->held_end = record->size;
            return 0;
        }
        if (rc != -EEXIST && rc != -ENOMEM && rc != UVAS_VM_MOVED) {
            return uvas_fail_system(record->base, record->size, "mmap", rc);
        }
        /* Looking chooses between words and between retry and error; it never chooses the mapping. */
        if (uvas_maps_describe(record->base, record->size, obstacle)) {
            return -EEXIST;
        }
        if (tries + 1 == SAME_PLACE_TRIES) {
            uvas_no_obstacle(obstacle);
            strcpy(obstacle->owner, rc == UVAS_VM_MOVED ? "moved by the kernel" : "somebody who came and went");
            return rc == -ENOMEM ? uvas_limits_explain(record->base, record->size) : -EEXIST;
        }
    }
}

static int note_fill(struct uvas_record *record, size_t start, size_t end) {
    if (record->fills.count == record->fills.capacity) {
        size_t capacity = 2 * record->fills.capacity + 8;
        struct uvas_piece_entry *list = calloc(capacity, sizeof *list);
        if (!list) {
            return uvas_fail_memory(record->base, record->size, "the host");
        }
        free(uvas_pieces_widen(&record->fills, list, capacity));
    }
    record->fills.list[record->fills.count++] = (struct uvas_piece_entry){.start = start, .end = end, .kind = 0};
    return 0;
}

/* After a driver's claim: what it occupies is noted as not ours; what it left free is taken, piece by piece, as anybody would. */
static int fill_around_driver(struct uvas_record *record, struct uvas_obstacle *obstacle) {
    record->owned = true;
    record->tagged = false; /* a range that a driver owns carries no tag */
    for (size_t at = 0; at < record->size;) {
        struct uvas_obstacle seen;
        uvas_no_obstacle(&seen);
        size_t start = record->size, end = record->size;
        if (uvas_maps_describe(record->base + at, record->size - at, &seen)) {
            start = seen.base > record->base + at ? seen.base - record->base : at;
            end = seen.base + seen.size - record->base;
            end = end < record->size ? end : record->size;
        }
        if (at < start) {
            int rc = map_held(record, record->base + at, start - at);
            if (rc != 0) {
                *obstacle = seen;
                strcpy(obstacle->owner, "somebody between the parts that the driver took");
                return rc == -ENOMEM || rc == -EEXIST || rc == UVAS_VM_MOVED ? -EEXIST : uvas_fail_system(record->base, record->size, "mmap", rc);
            }
            record->held_end = start;
        }
        int rc = start < end ? note_fill(record, start, end) : 0;
        if (rc < 0) {
            return rc;
        }
        at = end;
    }
    record->held_end = record->size;
    return 0;
}

/* ---- one candidate ----------------------------------------------------------------------------------------------------------------------------- */

struct attempt {
    bool poisoned;  /* an undo failed on a device */
    bool kept;      /* an undo failed on the host: to the quarantine */
    bool on_host;   /* the last refusal was the host's: somebody's mapping is in the way */
};

/* Step 2. 0, or with everything undone: -EEXIST with *obstacle, or what is said. */
UVAS_FLAT int act(struct uvas_record *record, struct uvas_obstacle *obstacle, struct attempt *attempt) {
    record->held_end = 0;
    record->tagged = record->space->tag >= 0;
    record->fills.count = 0;
    attempt->on_host = false;
    int rc = uvas_party_claim_owner(record, obstacle);
    if (rc != 0) {
        return rc;
    }
    rc = uvas_space_owner(record->space) ? fill_around_driver(record, obstacle) : hold_on_host(record, obstacle);
    attempt->on_host = rc != 0;
    if (rc == 0) {
        rc = uvas_party_claim(record, obstacle, &attempt->poisoned);
    }
    if (rc != 0) {
        struct uvas_failure said = *uvas_last_failure();
        attempt->kept = uvas_record_keeps(record);
        attempt->poisoned |= !uvas_party_unclaim_owner(record);
        if (rc != -EEXIST) {
            *uvas_fail(said.kind, said.code) = said;
        }
    }
    return rc;
}

/* Steps 1 to 3. 0; -EEXIST with *obstacle (from_registry: met in the registry); else said. The record is in the space's list while it acts. */
UVAS_FLAT int try_at(struct uvas_record *record, uintptr_t base, struct uvas_obstacle *obstacle, bool *from_registry, struct attempt *attempt) {
    struct uvas_space *space = record->space;
    struct uvas_entry taken;
    if (uvas_registry_lock_for_insert() < 0) {
        return uvas_limits_explain(base, record->size);
    }
    *from_registry = uvas_registry_insert(base, base + record->size, record->id | UVAS_REGISTRY_HIDDEN, &taken) < 0;
    space->stats.registry_conflicts += *from_registry;
    space->stats.attempts += !*from_registry;
    record->base = base;
    uvas_registry_unlock();
    if (*from_registry) {
        *obstacle = uvas_describe_entry(&taken);
        return -EEXIST;
    }
    int rc = act(record, obstacle, attempt);
    if (rc != 0 && !attempt->poisoned && !attempt->kept) {
        uvas_registry_lock();
        space->stats.conflicts += rc == -EEXIST;
        uvas_registry_remove(base, base + record->size);
        uvas_registry_unlock();
    }
    return rc;
}

/* ---- what is asked for ------------------------------------------------------------------------------------------------------------------------- */

struct demand {
    size_t size, align;
    uintptr_t at, low, high;
    bool any_window;
};

static bool power_of_two(size_t value) {
    return value != 0 && (value & (value - 1)) == 0;
}

static size_t largest(size_t a, size_t b) {
    return a > b ? a : b;
}

/* The space is entered, so its devices stay. Everything here is the caller's arithmetic: no system call. */
static int understand(const struct uvas_space *space, size_t size, const struct uvas_where *where, struct demand *out) {
    const struct uvas_where anywhere = {0};
    uintptr_t end = (uintptr_t)1 << uvas_vm_platform.address_bits;
    size_t unit = uvas_vm_platform.page_size;
    where = where ? where : &anywhere;
    if (size == 0) {
        return uvas_fail_invalid("the size is 0: a reservation has at least one byte");
    }
    if (size > end) {
        return uvas_fail_invalid("the size 0x%zx is beyond the %u bits that addresses have here", size, uvas_vm_platform.address_bits);
    }
    if (where->align && !power_of_two(where->align)) {
        return uvas_fail_invalid("the alignment 0x%zx is not a power of two", where->align);
    }
    *out = (struct demand){.at = where->at, .low = space->window_base, .high = space->window_end, .any_window = space->any_window};
    if (where->window_size) {
        if (where->window_base > end || where->window_size > end - where->window_base) {
            return uvas_fail_invalid("the window [0x%lx, +0x%zx) reaches beyond the %u bits that addresses have here", where->window_base,
                                     where->window_size, uvas_vm_platform.address_bits);
        }
        out->low = where->window_base;
        out->high = where->window_base + where->window_size;
        out->any_window = false;
    }
    for (uint32_t i = 0; i < space->party_count; i++) {
        const struct uvas_device *device = &space->parties[i]->device;
        unit = largest(unit, device->granularity);
        if (device->window_size) {
            out->low = largest(out->low, device->window_base);
            uintptr_t until = device->window_base + device->window_size;
            out->high = out->high < until ? out->high : until;
        }
    }
    out->size = (size + unit - 1) & ~(unit - 1);
    out->align = largest(unit, where->align);
    if (where->at) {
        bool outside = where->at >= end || out->size > end - where->at;
        if (where->at & (out->align - 1)) {
            return uvas_fail_invalid("the address 0x%lx is not a multiple of 0x%zx", where->at, out->align);
        }
        if (outside) {
            return uvas_fail_invalid("[0x%lx, +0x%zx) reaches beyond the %u bits that addresses have here", where->at, out->size,
                                     uvas_vm_platform.address_bits);
        }
        if (where->at < out->low || where->at + out->size > out->high) {
            return uvas_fail_invalid("[0x%lx, 0x%lx) is not inside the window [0x%lx, 0x%lx)", where->at, where->at + out->size, out->low,
                                     out->high);
        }
    } else {
        out->align = largest(out->align, uvas_vm_platform.shared_alignment); /* so that descriptors can be mapped there */
    }
    return 0;
}

/* ---- at one place, or searching ---------------------------------------------------------------------------------------------------------------- */

static int reserve_at(struct uvas_record *record, uintptr_t at, struct attempt *attempt) {
    struct uvas_obstacle obstacle;
    bool from_registry;
    uvas_no_obstacle(&obstacle);
    if (uvas_search_growth_room(at, record->size, &obstacle)) {
        return uvas_fail_in_use(at, record->size, &obstacle);
    }
    int rc = try_at(record, at, &obstacle, &from_registry, attempt);
    return rc == -EEXIST ? uvas_fail_in_use(at, record->size, &obstacle) : rc;
}

static int exhausted(const struct demand *demand, const struct uvas_tried *tried, uint32_t count, bool attempts_spent) {
    struct uvas_failure *failure = uvas_fail(UVAS_FAILURE_EXHAUSTED, -ENOSPC);
    failure->size = demand->size;
    failure->base = demand->low;
    failure->other_base = demand->low;
    failure->other_size = demand->high > demand->low ? demand->high - demand->low : 0;
    failure->tried_count = count;
    failure->tried_kept = count < UVAS_TRIED_MAX ? count : UVAS_TRIED_MAX;
    for (uint32_t i = 0; i < failure->tried_kept; i++) {
        failure->tried[i] = tried[(count - failure->tried_kept + i) % UVAS_TRIED_MAX];
    }
    return uvas_fail_say(failure, "no room for 0x%zx bytes, aligned to 0x%zx, in the window [0x%lx, 0x%lx): %s after %u candidates%s%s",
                         demand->size, demand->align, demand->low, demand->high,
                         attempts_spent ? "the attempts are spent" : "there is no further hole", count, count ? "; the last was refused by " : "",
                         count ? tried[(count - 1) % UVAS_TRIED_MAX].reason : "");
}

UVAS_FLAT int reserve_searching(struct uvas_record *record, const struct demand *demand, struct uvas_recent *recent, struct attempt *attempt) {
    struct uvas_tried tried[UVAS_TRIED_MAX];
    uint32_t count = 0, acted = 0;
    bool again = recent->low == demand->low && recent->high == demand->high;
    struct uvas_search search = {.low = demand->low, .high = demand->high, .size = demand->size, .align = demand->align,
                                 .frontier = again ? recent->frontier : 0, .quiet = again ? recent->quiet : 0, .any_window = demand->any_window};
    uintptr_t candidate;
    int rc = -ENOSPC;
    if (demand->high <= demand->low || demand->high - demand->low < demand->size) {
        return exhausted(demand, NULL, 0, false);
    }
    while (acted < record->space->attempts && count < UVAS_REGISTRY_TRIES * record->space->attempts && uvas_search_next(&search, &candidate)) {
        struct uvas_obstacle obstacle;
        bool from_registry;
        uvas_no_obstacle(&obstacle);
        rc = try_at(record, candidate, &obstacle, &from_registry, attempt);
        acted += !from_registry;
        if (rc != -EEXIST || attempt->poisoned || attempt->kept) {
            break;
        }
        struct uvas_tried *last = &tried[count++ % UVAS_TRIED_MAX];
        last->base = candidate;
        (void)snprintf(last->reason, sizeof last->reason, "%.71s", obstacle.owner);
        uvas_search_refused(&search, candidate, &obstacle, attempt->on_host && !from_registry);
        rc = -ENOSPC;
    }
    uvas_search_end(&search);
    *recent = (struct uvas_recent){demand->low, demand->high, record->base, search.quiet};
    return rc == -ENOSPC ? exhausted(demand, tried, count, acted >= record->space->attempts) : rc;
}

/* ---- reservations and adoptions ---------------------------------------------------------------------------------------------------------------- */

/* Nothing was reserved; what could not be undone stays in the registry, hidden. */
static int give_up(struct uvas_record *record, const struct attempt *attempt, int rc) {
    struct uvas_space *space = record->space;
    bool gone = !attempt->poisoned && !attempt->kept;
    void *fills = gone ? record->fills.list : NULL; /* once its slot is given, the record is somebody else's */
    uvas_registry_lock();
    uvas_record_unlink(record);
    if (attempt->poisoned) {
        uvas_record_poison(record);
    } else if (attempt->kept) {
        uvas_quarantine_add(record);
    } else {
        uvas_slots_give(&uvas_record_slots, &record->slot);
    }
    uvas_space_leave(space);
    uvas_registry_unlock();
    free(fills);
    return rc;
}

int uvas_reserve(uvas_id space_id, size_t size, const struct uvas_where *where, struct uvas_reservation *out) {
    struct demand demand;
    struct attempt attempt = {false, false, false};
    int rc = uvas_core_ready();
    if (rc < 0) {
        return rc;
    }
    uvas_quarantine_sweep();
    struct uvas_record *record;
    uvas_registry_lock();
    rc = uvas_record_make(space_id, UVAS_RESERVATION, size, where ? where->name : NULL, &record);
    struct uvas_recent recent = rc < 0 ? (struct uvas_recent){0} : record->space->recent;
    uvas_registry_unlock();
    if (rc < 0) {
        return rc == -ENOMEM ? uvas_limits_explain(0, size) : rc;
    }
    rc = understand(record->space, size, where, &demand);
    if (rc == 0) {
        record->size = demand.size;
        rc = demand.at ? reserve_at(record, demand.at, &attempt) : reserve_searching(record, &demand, &recent, &attempt);
    }
    if (rc < 0) {
        return give_up(record, &attempt, rc);
    }
    struct uvas_reservation made = {.id = record->id, .base = record->base, .size = record->size};
    uvas_registry_lock();
    if (!demand.at) {
        record->space->recent = recent;
    }
    uvas_record_publish(record);
    uvas_registry_unlock();
    *out = made;
    return 0;
}

int uvas_adopt(uvas_id space_id, uintptr_t base, size_t size, const char *owner, struct uvas_reservation *out) {
    int rc = uvas_core_ready();
    if (rc < 0) {
        return rc;
    }
    uintptr_t end = (uintptr_t)1 << uvas_vm_platform.address_bits;
    size_t page = uvas_vm_platform.page_size;
    if (base == 0 || size == 0 || (base | size) & (page - 1) || base >= end || size > end - base) {
        return uvas_fail_invalid("[0x%lx, +0x%zx) cannot be adopted: base and size are multiples of 0x%zx, not 0, inside %u bits", base, size,
                                 page, uvas_vm_platform.address_bits);
    }
    struct uvas_record *record;
    uvas_registry_lock();
    rc = uvas_record_make(space_id, UVAS_ADOPTION, size, owner, &record);
    uvas_registry_unlock();
    if (rc < 0) {
        return rc == -ENOMEM ? uvas_limits_explain(base, size) : rc;
    }
    const struct attempt nothing_done = {false, false, false};
    if (uvas_registry_lock_for_insert() < 0) {
        return give_up(record, &nothing_done, uvas_limits_explain(base, size));
    }
    struct uvas_entry taken;
    record->base = base;
    rc = uvas_registry_insert(base, base + size, record->id | UVAS_REGISTRY_HIDDEN, &taken);
    struct uvas_reservation made = {.id = record->id, .base = base, .size = size};
    if (rc == 0) {
        uvas_record_publish(record);
    }
    uvas_registry_unlock();
    if (rc < 0) {
        struct uvas_obstacle obstacle = uvas_describe_entry(&taken);
        return give_up(record, &nothing_done, uvas_fail_in_use(base, size, &obstacle));
    }
    *out = made;
    return 0;
}
