/* change.c: a change begins and ends: the reservation pinned, a part of it marked, what is there planned, what becomes of it published (change.h).
 */
#include "change.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "failure.h"
#include "mirrors.h"

#define ROOM_STEP 8u

/* ---- pins and marks ---------------------------------------------------------------------------------------------------------------------------- */

static bool changing(const struct uvas_record *record, size_t start, size_t end) {
    const struct uvas_change *change = record->changes;
    while (change && !(change->start < end && start < change->end)) {
        change = change->next;
    }
    return change != NULL;
}

static int aligned_inside(const struct uvas_record *record, size_t offset, size_t size) {
    size_t unit = record->mirror ? uvas_mirrors_unit(record) : uvas_vm_platform.page_size;
    if (size == 0 || (offset | size) & (unit - 1)) {
        return uvas_fail_invalid("[0x%zx, +0x%zx) of the reservation at 0x%lx: offset and size are multiples of 0x%zx, the size is not 0", offset,
                                 size, record->base, unit);
    }
    if (offset > record->size || size > record->size - offset) {
        return uvas_fail_invalid("[0x%zx, +0x%zx) is not inside the reservation's 0x%zx bytes at 0x%lx", offset, size, record->size, record->base);
    }
    return 0;
}

/* Room in the pieces for all that operations at work may add. Drops the lock to allocate; true: the caller looks again. */
static bool widened(struct uvas_record *record, int *rc) {
    size_t wanted = record->pieces.count + record->room_wanted + 2;
    if (wanted <= record->pieces.capacity) {
        return false;
    }
    size_t capacity = 2 * wanted + ROOM_STEP;
    record->pins++; /* or it could be gone when we are back */
    uvas_registry_unlock();
    struct uvas_piece_entry *list = malloc(capacity * sizeof *list), *old = list;
    uvas_registry_lock();
    if (list && capacity >= record->pieces.count) {
        old = uvas_pieces_widen(&record->pieces, list, capacity);
    }
    record->pins--;
    uvas_registry_wake();
    *rc = list ? 0 : uvas_fail_memory(record->base, record->size, "the host");
    uvas_registry_unlock();
    free(old);
    uvas_registry_lock();
    return true;
}

struct uvas_record *uvas_change_begin(uvas_id id, size_t offset, size_t size, enum uvas_tolerance beside, struct uvas_change *change, int *rc) {
    struct uvas_record *record = NULL;
    *rc = uvas_core_ready();
    uvas_registry_lock();
    while (*rc == 0) {
        record = uvas_slots_get(&uvas_record_slots, id);
        if (!record || record->state != UVAS_LIVE || record->kind != UVAS_RESERVATION) {
            *rc = uvas_fail_released("reservation", id);
        } else if ((*rc = aligned_inside(record, offset, size)) < 0) {
            break;
        } else if (record->space->exclusive || changing(record, offset, offset + size)) {
            uvas_registry_wait();
        } else if (!widened(record, rc)) {
            uvas_leases_drain();
            if ((beside == UVAS_BESIDE_NOBODY && uvas_leases_overlap(record, offset, offset + size)) ||
                (beside == UVAS_BESIDE_ARRAYS && record->arena_alone)) {
                *rc = uvas_leases_busy(record, offset, size);
                break;
            }
            *change = (struct uvas_change){.start = offset, .end = offset + size, .next = record->changes};
            record->changes = change;
            record->room_wanted += 2;
            record->pins++;
            record->space->working++;
            break;
        }
    }
    uvas_registry_unlock();
    return *rc == 0 ? record : NULL;
}

void uvas_change_end(struct uvas_record *record, struct uvas_change *change) {
    struct uvas_change **at = &record->changes;
    while (*at != change) {
        at = &(*at)->next;
    }
    *at = change->next;
    record->room_wanted -= 2;
    record->pins--;
    uvas_space_leave(record->space);
    uvas_registry_wake();
}

/* ---- plans ------------------------------------------------------------------------------------------------------------------------------------- */

int uvas_plan_make(struct uvas_record *record, const struct uvas_change *change, struct uvas_plan *plan) {
    plan->record = record;
    plan->parts = plan->few;
    plan->count = 0;
    size_t room = sizeof plan->few / sizeof *plan->few, needed;
    for (;;) {
        uvas_registry_lock();
        needed = 2 * record->pieces.count + 1; /* other parts of the reservation may change meanwhile */
        if (needed <= room) {
            plan->count = uvas_pieces_plan(&record->pieces, change->start, change->end, plan->parts);
            uvas_registry_unlock();
            return 0;
        }
        uvas_registry_unlock();
        struct uvas_piece_entry *parts = realloc(plan->parts == plan->few ? NULL : plan->parts, 2 * needed * sizeof *parts);
        if (!parts) {
            return uvas_fail_memory(record->base + change->start, change->end - change->start, "the host");
        }
        plan->parts = parts;
        room = 2 * needed;
    }
}

void uvas_plan_drop(struct uvas_plan *plan) {
    if (plan->parts != plan->few) {
        free(plan->parts);
    }
}

void uvas_plan_publish(const struct uvas_plan *plan, const struct uvas_piece_entry *was, const struct uvas_piece_entry *is) {
    uint64_t *committed = &plan->record->space->stats.committed_bytes;
    *committed -= uvas_piece_committed(was) ? uvas_part_size(was) : 0;
    *committed += is && uvas_piece_committed(is) ? uvas_part_size(was) : 0;
    uvas_pieces_set(&plan->record->pieces, was->start, was->end, is);
}

int uvas_plan_fail(struct uvas_plan *plan, struct uvas_change *change, bool poisoned, int rc) {
    struct uvas_failure said = *uvas_last_failure();
    uvas_plan_drop(plan);
    uvas_registry_lock();
    uvas_change_end(plan->record, change);
    if (poisoned && plan->record->state == UVAS_LIVE) {
        struct uvas_record *record = plan->record;
        *uvas_fail(said.kind, said.code) = said;
        uvas_record_poison_live(record);
    }
    uvas_registry_unlock();
    uvas_files_close();
    return rc;
}

int uvas_plan_refuse_lost(const struct uvas_plan *plan, const struct uvas_piece_entry *part) {
    struct uvas_obstacle taker = {.base = uvas_part_base(plan, part), .size = uvas_part_size(part)};
    strcpy(taker.owner, "somebody who took it from this reservation; heal marked it lost");
    return uvas_fail_in_use(uvas_part_base(plan, part), uvas_part_size(part), &taker);
}

