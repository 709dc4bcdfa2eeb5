/* lease.c: who uses the memory. A lease is ended without a lock, by finalizers and signal handlers: the one thread whose compare-and-swap takes
 * the id away pushes the lease onto a stack, and whoever next looks at leases under the lock takes the whole stack off. The slots are type-stable,
 * so an id of long ago is compared with what is there now, and ids are never used twice. */
#include <errno.h>

#include "failure.h"
#include "space.h"

/* Ended, not yet taken off their reservations. Pushed by anyone (release), taken whole under the lock (acquire): no ABA, as nobody pops one. */
static _Atomic(struct uvas_lease *) ended;

int uvas_unlease(uvas_id id) {
    struct uvas_lease *lease = uvas_slots_get(&uvas_lease_slots, id);
    uint64_t expected = id;
    if (!lease || !atomic_compare_exchange_strong(&lease->slot.id, &expected, 0)) {
        return -ESTALE;
    }
    struct uvas_lease *top = atomic_load_explicit(&ended, memory_order_relaxed);
    do {
        lease->ended_next = top;
    } while (!atomic_compare_exchange_weak_explicit(&ended, &top, lease, memory_order_release, memory_order_relaxed));
    return 0;
}

void uvas_leases_drain(void) {
    if (!atomic_load_explicit(&ended, memory_order_relaxed)) {
        return;
    }
    struct uvas_lease *lease = atomic_exchange_explicit(&ended, NULL, memory_order_acquire), *next;
    for (; lease; lease = next) {
        next = lease->ended_next;
        *(lease->previous ? &lease->previous->next : &lease->record->leases) = lease->next;
        if (lease->next) {
            lease->next->previous = lease->previous;
        }
        uvas_slots_give(&uvas_lease_slots, &lease->slot);
    }
}

void uvas_leases_forget(void) {
    atomic_store_explicit(&ended, NULL, memory_order_relaxed);
    uvas_slots_forget(&uvas_lease_slots);
}

bool uvas_leases_overlap(const struct uvas_record *record, size_t start, size_t end) {
    for (const struct uvas_lease *lease = record->leases; lease; lease = lease->next) {
        if (lease->start < end && start < lease->end) {
            return true;
        }
    }
    return false;
}

/* Under the lock, which it drops while a change of the range is at work. 0 or what is said. */
static bool holds_memory(const struct uvas_pieces *pieces) {
    size_t i = 0;
    while (i < pieces->count && pieces->list[i].guarded) { /* decommitted without a mapping to spare: the next commit takes the guards away */
        i++;
    }
    return i < pieces->count;
}

static int lease_on(uvas_id id, size_t offset, size_t size, struct uvas_lease *lease, struct uvas_region *region, const char *name) {
    struct uvas_record *record;
    struct uvas_change *change;
    do {
        record = uvas_slots_get(&uvas_record_slots, id);
        if (!record || record->state != UVAS_LIVE || record->retired || record->space->closing ||
            record->kind != UVAS_RESERVATION) {
            return uvas_fail_released("reservation", id);
        }
        if (offset > record->size || size > record->size - offset) {
            return uvas_fail_invalid("[0x%zx, +0x%zx) is not inside the reservation's 0x%zx bytes", offset, size, record->size);
        }
        for (change = record->changes; change && !(change->start < offset + size && offset < change->end); change = change->next) {
        }
        if (change) {
            uvas_registry_wait();
        }
    } while (change);
    if (region && (record->leases || holds_memory(&record->pieces))) {
        return uvas_fail_say(uvas_fail(UVAS_FAILURE_BUSY, -EBUSY), "the reservation at 0x%lx is in use: an arena wants one for itself", record->base);
    }
    if (region) {
        record->arena = name;
        record->arena_alone = size != 0;
        size = size ? record->size : 0;
        atomic_store_explicit(&record->region, region, memory_order_release);
    } else if (!uvas_pieces_cover(&record->pieces, offset, offset + size)) {
        return uvas_fail_invalid("[0x%lx, 0x%lx) is not committed, or not all of it: commit it first", record->base + offset,
                                 record->base + offset + size);
    }
    lease->record = record;
    lease->start = offset;
    lease->end = offset + size;
    lease->next = record->leases;
    if (record->leases) {
        record->leases->previous = lease;
    }
    record->leases = lease;
    return 0;
}

static int lease_for(uvas_id reservation, size_t offset, size_t size, struct uvas_region *region, const char *name, uvas_id *out) {
    int rc = uvas_core_ready();
    if (rc < 0) {
        return rc;
    }
    uvas_id id = 0;
    uvas_registry_lock();
    uvas_leases_drain();
    struct uvas_lease *lease = uvas_slots_take(&uvas_lease_slots);
    if (!lease) {
        uvas_registry_unlock();
        return uvas_fail_memory(0, sizeof *lease, "the host");
    }
    rc = lease_on(reservation, offset, size, lease, region, name);
    if (rc == 0) {
        id = uvas_slots_name(&uvas_lease_slots, &lease->slot);
    } else {
        uvas_slots_give(&uvas_lease_slots, &lease->slot);
    }
    uvas_registry_unlock();
    if (rc == 0) {
        *out = id;
    }
    return rc;
}

int uvas_lease(uvas_id reservation, size_t offset, size_t size, uvas_id *out) {
    return lease_for(reservation, offset, size, NULL, NULL, out);
}

/* ---- an arena's ---------------------------------------------------------------------------------------------------------------------------------- */

int uvas_lease_region(uvas_id reservation, bool all, struct uvas_region *region, const char *name, uvas_id *out) {
    return lease_for(reservation, 0, all ? 1 : 0, region, name, out); /* an empty lease keeps the reservation, and nothing in it */
}

void uvas_unlease_region(uvas_id reservation, uvas_id lease) {
    uvas_registry_lock();
    struct uvas_record *record = uvas_slots_get(&uvas_record_slots, reservation);
    if (record) {
        atomic_store_explicit(&record->region, NULL, memory_order_release);
        record->arena = NULL;
        record->arena_alone = false;
    }
    uvas_registry_unlock();
    (void)uvas_unlease(lease);
}

struct uvas_region *uvas_region_at(uintptr_t address) {
    struct uvas_entry entry;
    if (!uvas_registry_find(address, &entry)) {
        return NULL;
    }
    struct uvas_record *record = uvas_slots_get(&uvas_record_slots, entry.value & ~(UVAS_REGISTRY_HIDDEN | UVAS_REGISTRY_FOREIGN));
    return record ? atomic_load_explicit(&record->region, memory_order_acquire) : NULL;
}

bool uvas_reservation_moves(uvas_id reservation) {
    uvas_registry_lock();
    const struct uvas_record *record = uvas_slots_get(&uvas_record_slots, reservation);
    bool moves = record && record->mirror;
    uvas_registry_unlock();
    return moves;
}

int uvas_leases_busy(const struct uvas_record *record, size_t offset, size_t size) {
    struct uvas_failure *failure = uvas_fail(UVAS_FAILURE_BUSY, -EBUSY);
    uintptr_t base = record->base + offset;
    failure->base = base;
    failure->size = size;
    if (record->arena) {
        return uvas_fail_say(failure, "[0x%lx, 0x%lx) is in use: arena %s lives there, and is closed first", base, base + size, record->arena);
    }
    return uvas_fail_say(failure, "[0x%lx, 0x%lx) is in use by arrays, calls or pin_host: their leases end first", base, base + size);
}
