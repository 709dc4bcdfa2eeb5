/* reserve.c: the reserve protocol, release, and what becomes of addresses that the kernel will not take back.
 *
 * For each candidate of the search, at most `attempts` times:
 *
 *   1. claim    in the registry, hidden: cheap, and undone by one removal. Two threads of this process never act on one place
 *   2. act      outside every lock: a device that owns claims first, and what its claim leaves free of the range is filled; else the host's
 *               non-destructive mapping; then the devices that claim, all asked at the same time. Each step undoes itself when a later one fails
 *   3. publish  or un-claim
 *
 * A party that says "taken" sends the search elsewhere; whatever else it says is the caller's to know. Release goes the other way: unfindable
 * first, un-claimed last, so that nobody of this process can be given the place while anything of it is still there.
 */
#include <assert.h>
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

/* Between a system call and the caller: each return after the kernel was entered is mispredicted, as it empties the stack of return addresses. */
#define FLAT static inline __attribute__((always_inline))
#define SAME_PLACE_TRIES 4 /* where the kernel refused and nobody is seen there: the holder may just have left */

/* ---- the quarantine: ranges released, still mapped ------------------------------------------------------------------------------------------- */

static struct uvas_record *quarantine;     /* under the lock */
static _Atomic uint32_t quarantine_length; /* written under the lock; read without, to pass by when there is none */

/* Unmaps what of a record is held by uvas's own mappings: all of it, but what was lost and what a driver occupies. From the top down, and what is
 * done is cut off, so that a second try never meets what is somebody else's by now. */
FLAT int unmap_held(struct uvas_record *record) {
    const struct uvas_pieces *parts = record->owned ? &record->fills : &record->pieces;
    size_t i = parts->count;
    while (record->held_end > 0) {
        while (i > 0 && (parts->list[i - 1].kind != 0 || parts->list[i - 1].start >= record->held_end)) {
            i--;
        }
        const struct uvas_piece_entry *foreign = i > 0 ? &parts->list[--i] : NULL;
        size_t start = foreign ? foreign->end : 0;
        if (start < record->held_end) {
            int rc = uvas_vm_unmap(record->base + start, record->held_end - start);
            if (rc < 0) {
                return rc;
            }
        }
        record->held_end = foreign ? foreign->start : 0;
    }
    return 0;
}

static void quarantine_add(struct uvas_record *record) { /* under the lock */
    record->state = UVAS_QUARANTINED;
    record->previous = NULL;
    record->next = quarantine;
    quarantine = record;
    quarantine_length++;
}

struct remains { /* of a record that was forgotten */
    struct uvas_piece_entry *pieces, *fills;
};

/* Under the lock: out of the registry, its id dead, its parts let go. The remains are to be buried. */
static struct remains forget_record(struct uvas_record *record) {
    struct remains remains = {record->pieces.list, record->fills.list};
    uvas_registry_remove(record->base, record->base + record->size);
    uvas_pieces_drop(&record->pieces);
    uvas_file_drop(record->file);
    uvas_slots_give(&uvas_record_slots, &record->slot);
    return remains;
}

/* Without the lock: to free and to close may ask the kernel. */
static void bury(struct remains remains) {
    free(remains.pieces);
    free(remains.fills);
    uvas_files_close();
}

void uvas_quarantine_sweep(void) {
    if (atomic_load_explicit(&quarantine_length, memory_order_relaxed) == 0) {
        return;
    }
    uvas_registry_lock();
    struct uvas_record *record = quarantine;
    if (record) {
        quarantine = record->next; /* ours alone from here on */
        quarantine_length--;
    }
    uvas_registry_unlock();
    if (record && unmap_held(record) == 0) {
        uvas_registry_lock();
        struct remains remains = forget_record(record);
        uvas_registry_unlock();
        bury(remains);
        uvas_quarantine_sweep();
    } else if (record) {
        uvas_registry_lock();
        quarantine_add(record);
        uvas_registry_unlock();
    }
}

void uvas_quarantine_forget(void) {
    quarantine = NULL;
    quarantine_length = 0;
}

uint64_t uvas_quarantine_bytes(void) {
    uint64_t bytes = 0;
    for (const struct uvas_record *record = quarantine; record; record = record->next) {
        bytes += record->held_end;
    }
    return bytes;
}

/* A mapping of ours that the kernel moved and would not take back. If even the note of it cannot be made, it stays mapped, by nobody's name. */
static void quarantine_stray(uintptr_t base, size_t size) {
    if (uvas_registry_lock_for_insert() < 0) {
        return;
    }
    struct uvas_record *record = uvas_slots_take(&uvas_record_slots);
    if (!record) {
        uvas_registry_unlock();
        return;
    }
    record->base = base;
    record->size = record->held_end = size;
    if (uvas_registry_insert(base, base + size, UVAS_REGISTRY_HIDDEN, NULL) == 0) {
        quarantine_add(record);
    } else {
        uvas_slots_give(&uvas_record_slots, &record->slot);
    }
    uvas_registry_unlock();
}

/* ---- the host's part ---------------------------------------------------------------------------------------------------------------------------- */

static bool refuses_tag(int rc) {
    return rc == -EINVAL || rc == -EACCES || rc == -EPERM || rc == -ENODEV || rc == -EOPNOTSUPP;
}

FLAT int hold(uintptr_t base, size_t size, int tag) {
    uintptr_t stray = 0;
    int rc = uvas_vm_reserve(base, size, tag, &stray);
    if (stray) {
        quarantine_stray(stray, size);
    }
    return rc;
}

int uvas_hold(uintptr_t base, size_t size, int tag) {
    return hold(base, size, tag);
}

FLAT int map_held(struct uvas_record *record, uintptr_t base, size_t size) {
    int rc = hold(base, size, record->tagged ? record->space->tag : -1);
    if (record->tagged && refuses_tag(rc)) { /* this kernel maps no empty file, or not here */
        record->tagged = false;
        rc = hold(base, size, -1);
    }
    return rc;
}

/* 0; -EEXIST with the holder in *obstacle (size 0: nobody is seen there); else the failure is said. */
FLAT int hold_on_host(struct uvas_record *record, struct uvas_obstacle *obstacle) {
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

/* Gives back what of the record the host holds. Where the kernel will not: true, and the record is to be put into quarantine. */
FLAT bool host_keeps(struct uvas_record *record) {
    if (record->held_end == 0 || unmap_held(record) == 0) {
        return false;
    }
    /* Not even that may succeed; the quarantine tries again. Memory is given back at once where it can be. */
    (void)uvas_vm_drop(record->base, record->held_end);
    if (record->file) {
        (void)uvas_vm_punch(record->file->fd, 0, record->size);
    }
    return true;
}

/* ---- one candidate --------------------------------------------------------------------------------------------------------------------------------- */

struct attempt {
    bool poisoned;  /* an undo failed on a device */
    bool kept;      /* an undo failed on the host: to the quarantine */
    bool on_host;   /* the last refusal was the host's: somebody's mapping is in the way */
};

/* Step 2. 0, or with everything undone: -EEXIST with *obstacle, or what is said. */
FLAT int act(struct uvas_record *record, struct uvas_obstacle *obstacle, struct attempt *attempt) {
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
        attempt->kept = host_keeps(record);
        attempt->poisoned |= !uvas_party_unclaim_owner(record);
        if (rc != -EEXIST) {
            *uvas_fail(said.kind, said.code) = said;
        }
    }
    return rc;
}

/* Steps 1 to 3. 0; -EEXIST with *obstacle (from_registry: met in the registry); else said. The record is in the space's list while it acts. */
FLAT int try_at(struct uvas_record *record, uintptr_t base, struct uvas_obstacle *obstacle, bool *from_registry, struct attempt *attempt) {
    struct uvas_space *space = record->space;
    struct uvas_entry taken;
    if (uvas_registry_lock_for_insert() < 0) {
        return uvas_fail_memory(base, record->size, "the host");
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

/* ---- what is asked for ------------------------------------------------------------------------------------------------------------------------------- */

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

/* ---- at one place, or searching --------------------------------------------------------------------------------------------------------------------------- */

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

FLAT int reserve_searching(struct uvas_record *record, const struct demand *demand, struct uvas_recent *recent, struct attempt *attempt) {
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

/* ---- records ------------------------------------------------------------------------------------------------------------------------------------------------ */

static void link_record(struct uvas_record *record) { /* under the lock */
    struct uvas_space *space = record->space;
    record->previous = NULL;
    record->next = space->records;
    if (space->records) {
        space->records->previous = record;
    }
    space->records = record;
}

static void unlink_record(struct uvas_record *record) { /* under the lock */
    struct uvas_record **from = record->previous ? &record->previous->next : &record->space->records;
    *from = record->next;
    if (record->next) {
        record->next->previous = record->previous;
    }
}

/* Enters the space and puts a new record into its list. Under the lock, which it may drop and take again. */
static int make_record(uvas_id space_id, uint32_t kind, size_t size, const char *name, struct uvas_record **out) {
    struct uvas_space *space = uvas_space_enter(space_id);
    if (!space) {
        return -ESTALE;
    }
    struct uvas_record *record = uvas_slots_take(&uvas_record_slots);
    if (!record) {
        uvas_space_leave(space);
        return uvas_fail_memory(0, size, "the host");
    }
    record->kind = kind;
    record->state = UVAS_RESERVING;
    record->space = space;
    record->size = size;
    if (name) { /* the record is zeroed */
        (void)snprintf(record->name, sizeof record->name, "%s", name);
    }
    record->id = uvas_slots_name(&uvas_record_slots, &record->slot);
    link_record(record);
    *out = record;
    return 0;
}

/* Under the lock. */
static void publish(struct uvas_record *record) {
    struct uvas_space *space = record->space;
    bool adopted = record->kind == UVAS_ADOPTION;
    record->state = UVAS_LIVE;
    uvas_registry_set(record->base, record->base + record->size, record->id | (adopted ? UVAS_REGISTRY_FOREIGN : 0));
    space->stats.adoptions += adopted;
    space->stats.reservations += !adopted;
    space->stats.reserves += !adopted;
    space->stats.reserved_bytes += adopted ? 0 : record->size;
    uvas_space_leave(space);
}

/* Nothing was reserved; what could not be undone stays in the registry, hidden. */
static int give_up(struct uvas_record *record, const struct attempt *attempt, int rc) {
    struct uvas_space *space = record->space;
    bool gone = !attempt->poisoned && !attempt->kept;
    void *fills = gone ? record->fills.list : NULL; /* once its slot is given, the record is somebody else's */
    uvas_registry_lock();
    unlink_record(record);
    if (attempt->poisoned) {
        uvas_record_poison(record);
    } else if (attempt->kept) {
        quarantine_add(record);
    } else {
        uvas_slots_give(&uvas_record_slots, &record->slot);
    }
    uvas_space_leave(space);
    uvas_registry_unlock();
    free(fills);
    return rc;
}

void uvas_record_poison(struct uvas_record *record) {
    struct uvas_failure *failure = (struct uvas_failure *)(uintptr_t)uvas_last_failure();
    record->state = UVAS_POISONED;
    record->space->stats.poisoned_bytes += record->size;
    failure->poisoned = record->id;
    size_t said = strlen(failure->text);
    (void)snprintf(failure->text + said, sizeof failure->text - said, "; undoing failed too: [0x%lx, 0x%lx) is poisoned and never used again",
                   record->base, record->base + record->size);
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
    rc = make_record(space_id, UVAS_RESERVATION, size, where ? where->name : NULL, &record);
    struct uvas_recent recent = rc < 0 ? (struct uvas_recent){0} : record->space->recent;
    uvas_registry_unlock();
    if (rc < 0) {
        return rc;
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
    publish(record);
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
    rc = make_record(space_id, UVAS_ADOPTION, size, owner, &record);
    uvas_registry_unlock();
    if (rc < 0) {
        return rc;
    }
    const struct attempt nothing_done = {false, false, false};
    if (uvas_registry_lock_for_insert() < 0) {
        return give_up(record, &nothing_done, uvas_fail_memory(base, size, "the host"));
    }
    struct uvas_entry taken;
    record->base = base;
    rc = uvas_registry_insert(base, base + size, record->id | UVAS_REGISTRY_HIDDEN, &taken);
    struct uvas_reservation made = {.id = record->id, .base = base, .size = size};
    if (rc == 0) {
        publish(record);
    }
    uvas_registry_unlock();
    if (rc < 0) {
        struct uvas_obstacle obstacle = uvas_describe_entry(&taken);
        return give_up(record, &nothing_done, uvas_fail_in_use(base, size, &obstacle));
    }
    *out = made;
    return 0;
}

/* ---- release ---------------------------------------------------------------------------------------------------------------------------------------------------- */

/* Under the lock; the record is off its space's list. */
static void count_release(struct uvas_space *space, const struct uvas_record *record) {
    uint64_t committed = 0;
    for (size_t i = 0; i < record->pieces.count; i++) {
        const struct uvas_piece_entry *piece = &record->pieces.list[i];
        committed += uvas_piece_committed(piece) ? piece->end - piece->start : 0;
    }
    space->stats.committed_bytes -= committed;
    space->stats.adoptions -= record->kind == UVAS_ADOPTION;
    space->stats.reservations -= record->kind == UVAS_RESERVATION;
    space->stats.reserved_bytes -= record->kind == UVAS_RESERVATION ? record->size : 0;
    if (space->recent.frontier == record->base) { /* the next search starts where this one stood */
        space->recent.frontier = record->base + record->size;
    }
}

void uvas_record_poison_live(struct uvas_record *record) {
    uvas_registry_set(record->base, record->base + record->size, record->id | UVAS_REGISTRY_HIDDEN);
    unlink_record(record);
    count_release(record->space, record);
    uvas_record_poison(record);
}

FLAT int release_record(struct uvas_record *record) {
    struct uvas_space *space = record->space;
    bool poisoned = false, reservation = record->kind == UVAS_RESERVATION;
    int rc = reservation ? uvas_party_unclaim(record, &poisoned) : 0;
    if (rc < 0 && !poisoned) { /* as before: alive, findable */
        uvas_registry_lock();
        record->state = UVAS_LIVE;
        uvas_registry_set(record->base, record->base + record->size, record->id);
        uvas_registry_wake();
        uvas_space_leave(space);
        uvas_registry_unlock();
        return rc;
    }
    struct uvas_stretch all = {0};
    if (record->mirror) {
        uvas_mirrors_close(record, &all);
    }
    bool kept = reservation && !poisoned && host_keeps(record);
    uvas_mirrors_drop(record, &all);
    struct remains remains = {NULL, NULL};
    uvas_registry_lock();
    unlink_record(record);
    count_release(space, record);
    if (poisoned) {
        uvas_record_poison(record);
    } else if (kept) {
        quarantine_add(record);
    } else {
        remains = forget_record(record);
    }
    space->stats.releases += reservation && !poisoned;
    uvas_registry_wake();
    uvas_space_leave(space);
    uvas_registry_unlock();
    bury(remains);
    return rc;
}

/* Marks the reservation as being released, or says why not. Under the lock, which it may drop and take again. */
static struct uvas_record *begin_release(uvas_id id, bool retire, int *rc) {
    struct uvas_record *record;
    for (;;) {
        uvas_leases_drain();
        record = uvas_slots_get(&uvas_record_slots, id);
        if (!record || record->state != UVAS_LIVE) {
            *rc = uvas_fail_released("reservation", id);
            return NULL;
        }
        if (record->leases) {
            record->retired |= retire;
            struct uvas_failure *failure = uvas_fail(UVAS_FAILURE_BUSY, -EBUSY);
            failure->base = record->base;
            failure->size = record->size;
            *rc = uvas_fail_say(failure, "[0x%lx, 0x%lx) is in use by arrays or calls: their leases end first", record->base,
                                record->base + record->size);
            return NULL;
        }
        if (!record->space->exclusive) {
            break;
        }
        uvas_registry_wait();
    }
    record->space->working++;
    record->state = UVAS_RELEASING;
    uvas_registry_set(record->base, record->base + record->size, record->id | UVAS_REGISTRY_HIDDEN);
    while (record->pins > 0) {
        uvas_registry_wait();
    }
    *rc = 0;
    return record;
}

int uvas_record_release(struct uvas_record *record) {
    return release_record(record);
}

FLAT int release(uvas_id id, bool retire) {
    int rc = uvas_core_ready();
    if (rc < 0) {
        return rc;
    }
    uvas_registry_lock();
    struct uvas_record *record = begin_release(id, retire, &rc);
    uvas_registry_unlock();
    if (record) {
        rc = release_record(record);
    }
    uvas_quarantine_sweep();
    return rc;
}

int uvas_release(uvas_id reservation) {
    return release(reservation, false);
}

int uvas_retire(uvas_id reservation) {
    return release(reservation, true);
}
