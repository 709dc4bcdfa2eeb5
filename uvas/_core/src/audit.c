/* audit.c: what the kernel says against what the registry says; what can be healed; and the check of our own invariants.
 *
 * A library that unmaps, or maps over, part of a reservation behind our back leaves a hole or a stranger. Holes are taken back as any address is
 * acquired: by the non-destructive mapping, which fails if somebody has moved in. A stranger is marked lost: from then on no verb touches that part,
 * and release leaves it alone.
 *
 * Where nothing is committed the answer is exact: the tag's inode and offset tell. In committed anonymous memory a stranger's anonymous mapping with
 * the same protection merges with ours without a trace.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "change.h"
#include "failure.h"
#include "maps.h"
#include "registry.h"

#define LOOKS_THAT_AGREE 4
#define LOOKS_MAX 64 /* a stranger may come and go in a hole all the time */

/* ---- one part against the kernel ---------------------------------------------------------------------------------------------------------------- */

static bool same_file(const struct uvas_vma *vma, const struct uvas_file_id *file) {
    return vma->inode == file->inode && vma->device_major == file->device_major && vma->device_minor == file->device_minor;
}

/* 0: as it should be; else enum uvas_finding_kind. `address` is where the two overlap first. */
static uint32_t compare(const struct uvas_record *record, const struct uvas_piece_entry *part, const struct uvas_vma *vma, uintptr_t address) {
    uint64_t offset = vma->offset + (address - vma->start);
    if (uvas_piece_is_gap(part)) {
        bool ours = record->tagged ? same_file(vma, &record->space->tag_file) && offset == address : vma->inode == 0 && !vma->shared;
        bool untouched = vma->protection == UVAS_NONE;
        /* Without a tag, memory that can be used is not what uvas left there. */
        return ours && untouched ? 0 : ours && record->tagged ? UVAS_CHANGED : UVAS_FOREIGN;
    }
    if (part->guarded) {
        return 0; /* of ours by its place between marks that only we set; its protection means nothing under guards */
    }
    if (!part->file) {
        return vma->inode == 0 && !vma->shared && vma->protection == part->protection ? 0 : UVAS_FOREIGN;
    }
    /* By inode alone: the device number of a subvolume differs between fstat and maps. */
    uint64_t expected = (uint64_t)part->offset + (address - record->base - part->start);
    bool ours = vma->inode == part->file->id.inode && vma->shared == part->shared && offset == expected;
    return !ours ? UVAS_FOREIGN : vma->protection == part->protection ? 0 : UVAS_CHANGED;
}

struct look {
    struct uvas_record *record;
    const struct uvas_maps *maps;
    const struct uvas_piece_entry *part;
    uintptr_t start, end; /* what was found, cut to the part */
    uint32_t kind;
};

/* The first difference in the part at or after look->start: true with start, end and kind. */
static bool differs(struct look *look) {
    uintptr_t at = look->start, end = look->record->base + look->part->end;
    struct uvas_vma vma;
    while (at < end) {
        bool some = uvas_maps_next(look->maps, at, &vma) == 1 && vma.start < end;
        if (!some || vma.start > at) {
            look->start = at;
            look->end = some ? vma.start : end;
            look->kind = UVAS_HOLE;
            return true;
        }
        look->kind = compare(look->record, look->part, &vma, at);
        look->end = vma.end < end ? vma.end : end;
        if (look->kind) {
            look->start = at;
            return true;
        }
        at = look->end;
    }
    return false;
}

/* As differs; but what one snapshot says counts only if the next ones say it too: qemu-user's text shows gaps where something else changes. */
static bool differs_for_sure(struct look *look, struct uvas_maps *maps) {
    uintptr_t from = look->start;
    bool different = differs(look);
    for (int agreeing = 1, looks = 1; different && maps->list && agreeing < LOOKS_THAT_AGREE && looks < LOOKS_MAX; looks++) {
        struct look last = *look;
        if (uvas_maps_snapshot(maps) < 0) {
            break;
        }
        look->start = from;
        different = differs(look);
        agreeing = look->start == last.start && look->end == last.end && look->kind == last.kind ? agreeing + 1 : 1;
    }
    return different;
}

static bool a_drivers(const struct uvas_record *record, uintptr_t start) {
    size_t offset = start - record->base, i = uvas_pieces_after(&record->fills, offset);
    return record->owned && i < record->fills.count && record->fills.list[i].start <= offset;
}

/* ---- healing one difference ------------------------------------------------------------------------------------------------------------------------ */

static void publish(struct look *look, const struct uvas_piece_entry *is) { /* under the lock */
    struct uvas_record *record = look->record;
    struct uvas_space_stats *stats = &record->space->stats;
    stats->committed_bytes -= uvas_piece_committed(look->part) && !(is && is->kind) ? look->end - look->start : 0;
    stats->lost_bytes += is && !is->kind ? look->end - look->start : 0;
    uvas_pieces_set(&record->pieces, look->start - record->base, look->end - record->base, is);
}

static void off_devices(struct look *look) {
    struct uvas_piece_entry part = *look->part;
    bool ignored = false; /* a device that keeps it holds memory that nobody uses */
    part.start = look->start - look->record->base;
    part.end = look->end - look->record->base;
    if (uvas_piece_committed(look->part)) {
        (void)uvas_party_decommit(look->record, &part, &ignored);
    }
}

static void lose(struct look *look) {
    struct uvas_piece_entry lost = {.kind = 0};
    off_devices(look);
    uvas_registry_lock();
    publish(look, &lost);
    uvas_registry_unlock();
}

/* true: the hole is ours again, as held addresses or over its file. */
static bool take_back(struct look *look) {
    struct uvas_record *record = look->record;
    size_t size = look->end - look->start;
    if (uvas_hold(look->start, size, record->tagged ? record->space->tag : -1) < 0) {
        return false;
    }
    const struct uvas_piece_entry *part = look->part;
    if (uvas_piece_is_gap(part)) {
        return true;
    }
    if (part->file && uvas_piece_committed(part)) { /* its bytes are in the file */
        int64_t offset = part->offset + (int64_t)(look->start - record->base - part->start);
        enum uvas_vm_overlay_kind kind = part->shared ? UVAS_OVERLAY_SHARED : UVAS_OVERLAY_PRIVATE;
        if (uvas_vm_overlay(look->start, size, kind, part->protection, part->file->fd, offset) == 0) {
            return true;
        }
    }
    off_devices(look); /* the bytes are gone: held again, and a touch faults rather than reads zeros */
    uvas_registry_lock();
    publish(look, NULL);
    uvas_registry_unlock();
    return true;
}

/* ---- a reservation ------------------------------------------------------------------------------------------------------------------------------------- */

struct report {
    struct uvas_finding *list;
    size_t capacity, count;
    bool heal;
};

static void note(struct report *report, const struct look *look, bool healed) {
    if (report->count++ >= report->capacity) {
        return;
    }
    struct uvas_finding *finding = &report->list[report->count - 1];
    struct uvas_obstacle there = {0};
    *finding = (struct uvas_finding){.reservation = look->record->id, .base = look->start, .size = look->end - look->start, .kind = look->kind,
                                     .committed = uvas_piece_committed(look->part), .healed = healed};
    if (look->kind != UVAS_HOLE && uvas_maps_describe(look->start, 1, &there)) {
        memcpy(finding->owner, there.owner, sizeof finding->owner);
    }
}

/* Looks on from `offset`; at the first difference notes it, heals it if asked, and returns where to look on; record->size: done. One difference a
 * call, as healing changes the parts, for which a change has room once. */
static size_t inspect(struct uvas_record *record, size_t offset, struct report *report, struct uvas_maps *maps) {
    struct uvas_piece_entry part;
    uvas_registry_lock();
    size_t i = uvas_pieces_after(&record->pieces, offset);
    bool inside = i < record->pieces.count && record->pieces.list[i].start <= offset;
    if (inside) {
        part = record->pieces.list[i];
    } else {
        struct uvas_piece_entry gap[1];
        (void)uvas_pieces_plan(&record->pieces, offset, i < record->pieces.count ? record->pieces.list[i].start : record->size, gap);
        part = gap[0];
    }
    uvas_registry_unlock();
    struct look look = {.record = record, .maps = maps, .part = &part, .start = record->base + offset};
    if (part.kind == 0) {
        look.end = record->base + part.end;
        look.kind = UVAS_LOST;
        note(report, &look, false);
        return part.end;
    }
    if (part.kind == UVAS_BACKING_DRIVER || !differs_for_sure(&look, maps)) {
        return part.end;
    }
    if (a_drivers(record, look.start)) {
        size_t fill = uvas_pieces_after(&record->fills, look.start - record->base);
        size_t end = record->fills.list[fill].end;
        return end < part.end ? end : part.end;
    }
    bool healed = report->heal && look.kind == UVAS_HOLE && take_back(&look);
    note(report, &look, healed);
    if (report->heal && !healed && look.kind != UVAS_CHANGED) {
        lose(&look);
    }
    return look.end - record->base;
}

static int inspect_reservation(uvas_id id, struct report *report) {
    struct uvas_maps maps;
    size_t offset = 0, size = 0;
    int rc;
    do {
        struct uvas_change change;
        struct uvas_record *record;
        uvas_registry_lock();
        record = uvas_slots_get(&uvas_record_slots, id);
        size = record && record->state == UVAS_LIVE ? record->size : 0;
        uvas_registry_unlock();
        record = size ? uvas_change_begin(id, 0, size, UVAS_BESIDE_ALL, &change, &rc) : NULL;
        if (!record) {
            return 0; /* released meanwhile: nothing to say about it */
        }
        size_t seen = report->count;
        rc = uvas_maps_open(&maps); /* inside the change: what the parts say and what a snapshot says belong together */
        do {
            offset = rc == 0 ? inspect(record, offset, report, &maps) : size;
        } while (offset < size && !(report->heal && report->count > seen)); /* what was healed is seen by a fresh look only */
        uvas_maps_close(&maps);
        uvas_registry_lock();
        uvas_change_end(record, &change);
        uvas_registry_unlock();
    } while (offset < size);
    uvas_files_close();
    return rc < 0 ? uvas_fail_unsupported("/proc/self/maps", "mount /proc", "without it nobody can tell what is mapped") : 0;
}

static int inspect_space(uvas_id space_id, struct report *report, size_t *count) {
    uintptr_t address = 0;
    struct uvas_found found;
    struct uvas_space_stats ignored;
    int rc = uvas_core_ready();
    rc = rc < 0 ? rc : uvas_space_stats(space_id, &ignored); /* says so if it is dead */
    while (rc == 0 && uvas_next(address, &found) == 0) {
        uvas_id owner = 0;
        address = found.base + found.size;
        if (found.kind == UVAS_RESERVATION && uvas_space_of(found.id, &owner) == 0 && owner == space_id) {
            rc = inspect_reservation(found.id, report);
        }
    }
    if (rc == 0) {
        *count = report->count;
    }
    return rc;
}

int uvas_audit(uvas_id space, struct uvas_finding *out, size_t capacity, size_t *count) {
    struct report report = {.list = out, .capacity = capacity};
    return inspect_space(space, &report, count);
}

int uvas_heal(uvas_id space, struct uvas_finding *out, size_t capacity, size_t *count) {
    struct report report = {.list = out, .capacity = capacity, .heal = true};
    uvas_quarantine_sweep();
    return inspect_space(space, &report, count);
}

/* ---- our own invariants ---------------------------------------------------------------------------------------------------------------------------------- */

/* Under the lock. */
static const char *wrong_with(const struct uvas_space *space, const struct uvas_record *record) {
    struct uvas_entry entry;
    if (record->space != space) {
        return "is in the list of another space";
    }
    if (record->state == UVAS_RESERVING && record->base == 0) {
        return NULL; /* between two candidates */
    }
    bool booked = uvas_registry_next(record->base, &entry) && entry.base == record->base && entry.end == record->base + record->size;
    if (record->state == UVAS_LIVE && !booked) {
        return "is not in the registry with its range";
    }
    if (booked && record->state == UVAS_LIVE && entry.value != (record->id | (record->kind == UVAS_ADOPTION ? UVAS_REGISTRY_FOREIGN : 0))) {
        return "is in the registry under another id";
    }
    if (record->state == UVAS_LIVE && uvas_slots_get(&uvas_record_slots, record->id) != record) {
        return "is not what its id names";
    }
    if (uvas_pieces_check(&record->pieces, record->size) < 0) {
        return "has parts that overlap, are empty or should be one";
    }
    return record->pieces.capacity < record->pieces.count + record->room_wanted ? "has no room for the changes at work" : NULL;
}

int uvas_check(void) {
    char why[256] = "";
    int rc = uvas_core_ready();
    if (rc < 0) {
        return rc;
    }
    uvas_registry_lock();
    rc = uvas_registry_check(why, sizeof why);
    for (const struct uvas_space *space = uvas_spaces; rc == 0 && space; space = space->next) {
        uint64_t live = 0;
        for (const struct uvas_record *record = space->records; rc == 0 && record; record = record->next) {
            const char *wrong = wrong_with(space, record);
            live += record->kind == UVAS_RESERVATION && record->state != UVAS_RESERVING;
            if (wrong) {
                (void)snprintf(why, sizeof why, "[0x%lx, 0x%lx) %s", record->base, record->base + record->size, wrong);
                rc = -EINVAL;
            }
        }
        if (rc == 0 && live != space->stats.reservations) {
            (void)snprintf(why, sizeof why, "space %s counts %llu reservations and lists %llu", space->name,
                           (unsigned long long)space->stats.reservations, (unsigned long long)live);
            rc = -EINVAL;
        }
    }
    uvas_registry_unlock();
    return rc < 0 ? uvas_fail_invalid("%s", why) : 0;
}
