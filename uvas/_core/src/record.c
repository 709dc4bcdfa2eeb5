/* record.c: the records of reservations and adoptions: made, listed in their space, counted, published, poisoned, forgotten (space.h). Under the
 * lock, where nothing else is said.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "failure.h"
#include "space.h"

static void link_record(struct uvas_record *record) {
    struct uvas_space *space = record->space;
    record->previous = NULL;
    record->next = space->records;
    if (space->records) {
        space->records->previous = record;
    }
    space->records = record;
}

void uvas_record_unlink(struct uvas_record *record) {
    struct uvas_record **from = record->previous ? &record->previous->next : &record->space->records;
    *from = record->next;
    if (record->next) {
        record->next->previous = record->previous;
    }
}

int uvas_record_make(uvas_id space_id, uint32_t kind, size_t size, const char *name, struct uvas_record **out) {
    struct uvas_space *space = uvas_space_enter(space_id);
    if (!space) {
        return -ESTALE;
    }
    struct uvas_record *record = uvas_slots_take(&uvas_record_slots);
    if (!record) {
        uvas_space_leave(space);
        return -ENOMEM;
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

void uvas_record_publish(struct uvas_record *record) {
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

void uvas_record_strike(struct uvas_record *record) {
    struct uvas_space *space = record->space;
    uint64_t committed = 0;
    uvas_record_unlink(record);
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

void uvas_record_poison(struct uvas_record *record) {
    struct uvas_failure *failure = (struct uvas_failure *)(uintptr_t)uvas_last_failure();
    record->state = UVAS_POISONED;
    record->space->stats.poisoned_bytes += record->size;
    failure->poisoned = record->id;
    size_t said = strlen(failure->text);
    (void)snprintf(failure->text + said, sizeof failure->text - said, "; undoing failed too: [0x%lx, 0x%lx) is poisoned and never used again",
                   record->base, record->base + record->size);
}

void uvas_record_poison_live(struct uvas_record *record) {
    uvas_registry_set(record->base, record->base + record->size, record->id | UVAS_REGISTRY_HIDDEN);
    uvas_record_strike(record);
    uvas_record_poison(record);
}

struct uvas_remains uvas_record_forget(struct uvas_record *record) {
    struct uvas_remains remains = {record->pieces.list, record->fills.list};
    uvas_registry_remove(record->base, record->base + record->size);
    uvas_pieces_drop(&record->pieces);
    uvas_file_drop(record->file);
    uvas_slots_give(&uvas_record_slots, &record->slot);
    return remains;
}

void uvas_remains_bury(struct uvas_remains remains) {
    free(remains.pieces);
    free(remains.fills);
    uvas_files_close();
}
