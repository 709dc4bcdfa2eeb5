/* release.c: addresses given back: release, retire, and the quarantine of what the kernel will not take.
 *
 * The reserve protocol backwards: unfindable first, un-claimed last, so that nobody of this process can be given the place while anything of it is
 * still there. A range that cannot be unmapped (at max_map_count, where that would split a mapping) keeps its addresses, hidden, until it can.
 */
#include "failure.h"
#include "mirrors.h"
#include "space.h"

/* ---- the host's part --------------------------------------------------------------------------------------------------------------------------- */

/* Unmaps what of a record is held by uvas's own mappings: all of it, but what was lost and what a driver occupies. From the top down, and what is
 * done is cut off, so that a second try never meets what is somebody else's by now. */
UVAS_FLAT int unmap_held(struct uvas_record *record) {
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

UVAS_FLAT bool keeps(struct uvas_record *record) {
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

bool uvas_record_keeps(struct uvas_record *record) {
    return keeps(record);
}

/* ---- the quarantine: ranges released, still mapped --------------------------------------------------------------------------------------------- */

static struct uvas_record *quarantine;     /* under the lock */
static _Atomic uint32_t quarantine_length; /* written under the lock; read without, to pass by when there is none */

void uvas_quarantine_add(struct uvas_record *record) {
    record->state = UVAS_QUARANTINED;
    record->previous = NULL;
    record->next = quarantine;
    quarantine = record;
    quarantine_length++;
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
        struct uvas_remains remains = uvas_record_forget(record);
        uvas_registry_unlock();
        uvas_remains_bury(remains);
        uvas_quarantine_sweep();
    } else if (record) {
        uvas_registry_lock();
        uvas_quarantine_add(record);
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

void uvas_quarantine_stray(uintptr_t base, size_t size) {
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
        uvas_quarantine_add(record);
    } else {
        uvas_slots_give(&uvas_record_slots, &record->slot);
    }
    uvas_registry_unlock();
}

/* ---- release ----------------------------------------------------------------------------------------------------------------------------------- */

UVAS_FLAT int release_record(struct uvas_record *record) {
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
    bool kept = reservation && !poisoned && keeps(record);
    uvas_mirrors_drop(record, &all);
    struct uvas_remains remains = {NULL, NULL};
    uvas_registry_lock();
    uvas_record_strike(record);
    if (poisoned) {
        uvas_record_poison(record);
    } else if (kept) {
        uvas_quarantine_add(record);
    } else {
        remains = uvas_record_forget(record);
    }
    space->stats.releases += reservation && !poisoned;
    uvas_registry_wake();
    uvas_space_leave(space);
    uvas_registry_unlock();
    uvas_remains_bury(remains);
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
            *rc = uvas_leases_busy(record, 0, record->size);
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

UVAS_FLAT int release(uvas_id id, bool retire) {
    int rc = uvas_core_ready();
    if (rc < 0) {
        return rc;
    }
    uvas_registry_lock();
    struct uvas_record *record = begin_release(id, retire, &rc);
    uvas_registry_unlock();
    if (record) {
        rc = uvas_record_release(record);
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
