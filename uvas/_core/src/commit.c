/* commit.c: memory behind addresses that are held, and its protection: commit, protect, and what is there (change.h).
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "change.h"
#include "failure.h"
#include "limits.h"
#include "mirrors.h"

/* ---- what a part becomes ----------------------------------------------------------------------------------------------------------------------- */

/* The memfd of the reservation, made at its first need. Several threads may: the first one's stays. */
static struct uvas_file *backing_file(struct uvas_record *record) {
    uvas_registry_lock();
    struct uvas_file *file = record->file;
    uvas_registry_unlock();
    if (file) {
        return file;
    }
    char name[2 * UVAS_NAME_BYTES + 8];
    struct uvas_file_id id;
    (void)snprintf(name, sizeof name, "uvas:%s/%s", record->space->name, record->name);
    int fd = uvas_vm_memfd(name, record->size);
    int rc = fd < 0 ? fd : uvas_vm_identify(fd, &id);
    if (rc < 0) {
        uvas_vm_close(fd);
        bool descriptors = rc == -EMFILE || rc == -ENFILE;
        (void)(descriptors ? uvas_limits_descriptors(record->base, record->size, rc)
                           : uvas_fail_system(record->base, record->size, "memfd_create", rc));
        return NULL;
    }
    file = uvas_file_make(fd, &id);
    if (!file) {
        (void)uvas_fail_memory(record->base, record->size, "the host");
        return NULL;
    }
    uvas_registry_lock();
    if (record->file) {
        uvas_file_drop(file);
    } else {
        record->file = file;
    }
    file = record->file;
    uvas_registry_unlock();
    uvas_files_close();
    return file;
}

/* What a gap becomes. 0 as kind: said. */
static struct uvas_piece_entry fresh_part(struct uvas_record *record, const struct uvas_piece_entry *gap, uint32_t protection) {
    struct uvas_piece_entry part = {.start = gap->start, .end = gap->end, .protection = protection};
    uint32_t kind = uvas_space_backings(record->space, record->space->backing_wanted);
    if (kind == UVAS_BACKING_MEMFD) {
        if (record->base & (uvas_vm_platform.shared_alignment - 1)) {
            (void)uvas_fail_invalid("the reservation at 0x%lx cannot hold shared memory: this machine maps it at multiples of 0x%zx only", record->base,
                                    uvas_vm_platform.shared_alignment);
            return part;
        }
        part.file = backing_file(record);
        part.shared = true;
        part.offset = (int64_t)gap->start;
        kind = part.file ? kind : 0;
    }
    part.kind = kind;
    return part;
}

/* Another protection of what is committed. Devices that register can have what the host has, not more: so they are the first to lose and the last
 * to gain. 0, or as before and said. */
static int protect_part(const struct uvas_plan *plan, const struct uvas_piece_entry *part, uint32_t from, uint32_t to, bool *poisoned) {
    bool on_host = part->kind != UVAS_BACKING_DRIVER, loses = (from & ~to) != 0;
    struct uvas_piece_entry before = *part;
    before.protection = from;
    int rc = loses ? uvas_party_protect(plan->record, &before, to, poisoned) : 0;
    if (rc < 0) {
        return rc;
    }
    rc = on_host ? uvas_vm_protect(uvas_part_base(plan, part), uvas_part_size(part), to) : 0;
    if (rc < 0) {
        rc = uvas_host_fail(plan, part, "mprotect", rc);
        struct uvas_failure said = *uvas_last_failure();
        before.protection = to;
        *poisoned |= loses && uvas_party_protect(plan->record, &before, from, poisoned) < 0;
        *uvas_fail(said.kind, said.code) = said;
        return rc;
    }
    rc = loses ? 0 : uvas_party_protect(plan->record, &before, to, poisoned);
    if (rc < 0 && on_host) {
        *poisoned |= uvas_vm_protect(uvas_part_base(plan, part), uvas_part_size(part), from) < 0;
    }
    return rc;
}

/* One part of a plan: from `was` to `is`, on the host and then on the devices. */
static int commit_part(const struct uvas_plan *plan, const struct uvas_piece_entry *was, const struct uvas_piece_entry *is, bool *poisoned) {
    if (uvas_piece_committed(was)) { /* keeps its contents, gets the protection */
        return was->protection == is->protection ? 0 : protect_part(plan, was, was->protection, is->protection, poisoned);
    }
    int rc = uvas_host_put(plan, was, is, poisoned);
    if (rc < 0) {
        return rc;
    }
    rc = uvas_party_commit(plan->record, is, poisoned);
    if (rc < 0) {
        *poisoned |= uvas_host_take(plan, was, is) < 0;
    }
    return rc;
}

static void uncommit_part(const struct uvas_plan *plan, const struct uvas_piece_entry *was, const struct uvas_piece_entry *is, bool *poisoned) {
    struct uvas_record *record = plan->record;
    if (!uvas_piece_committed(was)) {
        struct uvas_stretch going;
        *poisoned |= uvas_party_decommit(record, is, poisoned) < 0;
        uvas_mirrors_suspend(record, is->start, is->end, &going);
        *poisoned |= uvas_host_take(plan, was, is) < 0;
        uvas_mirrors_settle(record, &going, true);
    } else if (was->protection != is->protection) {
        *poisoned |= protect_part(plan, was, is->protection, was->protection, poisoned) < 0;
    }
}

/* ---- commit and protect ------------------------------------------------------------------------------------------------------------------------ */

static int commit_all(struct uvas_plan *plan, struct uvas_piece_entry *become, uint32_t flags, bool *poisoned) {
    int rc = 0;
    size_t done = 0;
    for (; rc == 0 && done < plan->count; done++) {
        const struct uvas_piece_entry *was = &plan->parts[done];
        rc = was->kind == 0 ? uvas_plan_refuse_lost(plan, was) : commit_part(plan, was, &become[done], poisoned);
    }
    if (rc < 0) {
        done--; /* the one that failed has undone itself */
    }
    for (size_t i = 0; rc == 0 && (flags & UVAS_POPULATE) && i < plan->count; i++) {
        const struct uvas_piece_entry *is = &become[i];
        rc = is->kind == UVAS_BACKING_DRIVER ? 0 : uvas_vm_populate(uvas_part_base(plan, is), uvas_part_size(is), is->protection);
        rc = rc < 0 ? uvas_host_fail(plan, is, "madvise(MADV_POPULATE)", rc) : 0;
    }
    if (rc < 0) {
        struct uvas_failure said = *uvas_last_failure();
        while (done-- > 0 && !*poisoned) {
            uncommit_part(plan, &plan->parts[done], &become[done], poisoned);
        }
        *uvas_fail(said.kind, said.code) = said;
    }
    return rc;
}

/* What a part is to become. 0, or it is said why it cannot. */
typedef int part_becomes(struct uvas_plan *plan, const struct uvas_piece_entry *was, uint32_t protection, struct uvas_piece_entry *is);

/* The whole of a verb that gives every part of a range memory, or a protection. */
static inline int change_all(uvas_id reservation, size_t offset, size_t size, uint32_t protection, uint32_t flags, enum uvas_tolerance beside,
                             part_becomes *becomes) {
    struct uvas_change change;
    struct uvas_plan plan;
    bool poisoned = false;
    int rc;
    if (protection & ~(uint32_t)UVAS_PROTECTIONS) {
        return uvas_fail_invalid("0x%x is no protection", protection);
    }
    struct uvas_record *record = uvas_change_begin(reservation, offset, size, beside, &change, &rc);
    if (!record) {
        return rc;
    }
    rc = uvas_plan_make(record, &change, &plan);
    struct uvas_piece_entry *become = rc < 0 ? NULL : malloc((plan.count + 1) * sizeof *become);
    if (rc == 0 && !become) {
        rc = uvas_fail_memory(record->base + offset, size, "the host");
    }
    for (size_t i = 0; rc == 0 && i < plan.count; i++) {
        rc = becomes(&plan, &plan.parts[i], protection, &become[i]);
    }
    rc = rc == 0 ? commit_all(&plan, become, flags, &poisoned) : rc;
    if (rc < 0) {
        free(become);
        return uvas_plan_fail(&plan, &change, poisoned, rc);
    }
    uvas_registry_lock();
    for (size_t i = 0; i < plan.count; i++) {
        uvas_plan_publish(&plan, &plan.parts[i], &become[i]);
    }
    uvas_change_end(record, &change);
    uvas_registry_unlock();
    uvas_plan_drop(&plan);
    free(become);
    return 0;
}

static int committed(struct uvas_plan *plan, const struct uvas_piece_entry *was, uint32_t protection, struct uvas_piece_entry *is) {
    if (uvas_piece_is_gap(was)) {
        *is = fresh_part(plan->record, was, protection);
        return is->kind ? 0 : uvas_last_failure()->code;
    }
    *is = *was;
    is->protection = protection;
    is->guarded = false;
    return 0;
}

int uvas_commit(uvas_id reservation, size_t offset, size_t size, uint32_t protection, uint32_t flags) {
    return change_all(reservation, offset, size, protection, flags, UVAS_BESIDE_ARRAYS, committed);
}

int uvas_commit_leased(uvas_id reservation, size_t offset, size_t size) {
    return change_all(reservation, offset, size, UVAS_READ | UVAS_WRITE, 0, UVAS_BESIDE_ALL, committed);
}

static int protected(struct uvas_plan *plan, const struct uvas_piece_entry *was, uint32_t protection, struct uvas_piece_entry *is) {
    if (!uvas_piece_committed(was)) {
        uintptr_t base = uvas_part_base(plan, was);
        return uvas_fail_invalid("[0x%lx, 0x%lx) is not committed: there is nothing to protect", base, base + uvas_part_size(was));
    }
    *is = *was;
    is->protection = protection;
    return 0;
}

int uvas_protect(uvas_id reservation, size_t offset, size_t size, uint32_t protection) {
    return change_all(reservation, offset, size, protection, 0, UVAS_BESIDE_ALL, protected);
}

/* ---- what is there ----------------------------------------------------------------------------------------------------------------------------- */

int uvas_pieces(uvas_id reservation, size_t offset, struct uvas_piece *out, size_t capacity, size_t *count) {
    enum { BATCH = 64 };
    struct uvas_piece batch[BATCH]; /* copied out after the lock is dropped: `out` is the caller's memory */
    size_t filled = 0, found;
    do {
        found = 0;
        uvas_registry_lock();
        const struct uvas_record *record = uvas_slots_get(&uvas_record_slots, reservation);
        bool dead = !record || record->state != UVAS_LIVE;
        for (size_t i = dead ? 0 : uvas_pieces_after(&record->pieces, offset); !dead && i < record->pieces.count && found < BATCH; i++) {
            const struct uvas_piece_entry *part = &record->pieces.list[i];
            batch[found++] = (struct uvas_piece){.offset = part->start, .size = uvas_part_size(part), .kind = part->kind, .protection = part->protection,
                                                 .shared = part->shared, .guarded = part->guarded, .descriptor_offset = part->offset};
            offset = part->end;
        }
        uvas_registry_unlock();
        if (dead) {
            return uvas_fail_released("reservation", reservation);
        }
        for (size_t i = 0; i < found && filled < capacity; i++) {
            out[filled++] = batch[i];
        }
    } while (found == BATCH && filled < capacity);
    *count = filled;
    return 0;
}
