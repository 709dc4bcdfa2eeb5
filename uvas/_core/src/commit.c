/* commit.c: memory behind addresses that are held: commit, decommit, protect, map_fd.
 *
 * Every verb goes the same way: pin the reservation and mark the sub-range (uvas_change_begin), copy what is there into a *plan*, act part by part
 * outside the lock with an undo for each step, publish the new parts, unmark. While it is marked nobody else changes the sub-range, so the plan stays
 * true. The destructive mapping of vm.c is called here and in audit.c only, on ranges so marked.
 *
 * Order within a verb: what can be undone first, what cannot last. Overlaying private memory loses its contents; so does punching a hole.
 */
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "failure.h"
#include "limits.h"
#include "maps.h"
#include "mirrors.h"
#include "registry.h"
#include "space.h"

#define ROOM_STEP 8u
#define PROTECTIONS (UVAS_READ | UVAS_WRITE | UVAS_EXECUTE)

/* ---- pins and marks ----------------------------------------------------------------------------------------------------------------------------- */

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

static int busy(const struct uvas_record *record, size_t offset, size_t size) {
    struct uvas_failure *failure = uvas_fail(UVAS_FAILURE_BUSY, -EBUSY);
    failure->base = record->base + offset;
    failure->size = size;
    return uvas_fail_say(failure, "[0x%lx, 0x%lx) is in use by arrays or calls: their leases end first", failure->base, failure->base + size);
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

struct uvas_record *uvas_change_begin(uvas_id id, size_t offset, size_t size, bool under_lease, struct uvas_change *change, int *rc) {
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
            if (!under_lease && uvas_leases_overlap(record, offset, offset + size)) {
                *rc = busy(record, offset, size);
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

/* ---- plans ------------------------------------------------------------------------------------------------------------------------------------------- */

struct plan {
    struct uvas_record *record;
    struct uvas_piece_entry *parts; /* of the marked range, gaps included, in order */
    size_t count;
    struct uvas_piece_entry few[8]; /* nearly always enough */
};

static int make_plan(struct uvas_record *record, const struct uvas_change *change, struct plan *plan) {
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

static void drop_plan(struct plan *plan) {
    if (plan->parts != plan->few) {
        free(plan->parts);
    }
}

static size_t length(const struct uvas_piece_entry *part) {
    return part->end - part->start;
}

static uintptr_t where(const struct plan *plan, const struct uvas_piece_entry *part) {
    return plan->record->base + part->start;
}

/* Under the lock: the part is from now on what it says. Statistics follow. */
static void publish(const struct plan *plan, const struct uvas_piece_entry *was, const struct uvas_piece_entry *is) {
    uint64_t *committed = &plan->record->space->stats.committed_bytes;
    *committed -= uvas_piece_committed(was) ? length(was) : 0;
    *committed += is && uvas_piece_committed(is) ? length(was) : 0;
    uvas_pieces_set(&plan->record->pieces, was->start, was->end, is);
}

/* Poisons if an undo failed, publishes otherwise nothing; ends the change either way. */
static int end_failed(struct plan *plan, struct uvas_change *change, bool poisoned, int rc) {
    struct uvas_failure said = *uvas_last_failure();
    drop_plan(plan);
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

/* ---- the host's mappings --------------------------------------------------------------------------------------------------------------------------------- */

static int hold(const struct plan *plan, const struct uvas_piece_entry *part) {
    int tag = plan->record->tagged ? plan->record->space->tag : -1;
    return uvas_vm_overlay(where(plan, part), length(part), UVAS_OVERLAY_HELD, UVAS_NONE, tag, 0);
}

static enum uvas_vm_overlay_kind overlay_of(const struct uvas_piece_entry *part) {
    return !part->file ? UVAS_OVERLAY_ANONYMOUS : part->shared ? UVAS_OVERLAY_SHARED : UVAS_OVERLAY_PRIVATE;
}

/* After a mapping that failed half way: holds again what the kernel unmapped. false: somebody was quicker. */
static bool hold_again(const struct plan *plan, const struct uvas_piece_entry *part) {
    int tag = plan->record->tagged ? plan->record->space->tag : -1;
    uintptr_t at = where(plan, part), end = at + length(part);
    bool held = true;
    while (at < end) {
        struct uvas_obstacle there;
        uvas_no_obstacle(&there);
        bool some = uvas_maps_describe(at, end - at, &there) != 0;
        uintptr_t until = some ? there.base : end;
        if (at < until) {
            held &= uvas_hold(at, until - at, tag) == 0;
        }
        at = some ? there.base + there.size : end;
    }
    return held;
}

/* Maps what the part says; nothing for what a driver maps. */
static int map_part(const struct plan *plan, const struct uvas_piece_entry *part, bool *poisoned) {
    if (part->kind == UVAS_BACKING_DRIVER) {
        return 0;
    }
    int rc = uvas_vm_overlay(where(plan, part), length(part), overlay_of(part), part->protection, part->file ? part->file->fd : -1, part->offset);
    if (rc < 0 && part->file && !hold_again(plan, part)) {
        *poisoned = true;
    }
    return rc;
}

static int say_mmap(const struct plan *plan, const struct uvas_piece_entry *part, const char *call, int rc) {
    return rc == -ENOMEM || rc == -EAGAIN ? uvas_limits_explain(where(plan, part), length(part))
                                          : uvas_fail_system(where(plan, part), length(part), call, rc);
}

/* ---- commit ------------------------------------------------------------------------------------------------------------------------------------------------ */

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

static int refuse_lost(const struct plan *plan, const struct uvas_piece_entry *part) {
    struct uvas_obstacle taker = {.base = where(plan, part), .size = length(part)};
    strcpy(taker.owner, "somebody who took it from this reservation; heal marked it lost");
    return uvas_fail_in_use(where(plan, part), length(part), &taker);
}

/* Memory where none was: a mapping over the held addresses, or, where guards went up for want of one, the guards taken down. */
static int put_memory(const struct plan *plan, const struct uvas_piece_entry *was, const struct uvas_piece_entry *is, bool *poisoned) {
    if (is->kind == UVAS_BACKING_DRIVER) {
        return 0;
    }
    if (is->kind == UVAS_BACKING_MEMFD && plan->record->stale) {
        int rc = uvas_vm_punch(is->file->fd, is->offset, length(is));
        if (rc < 0) {
            return uvas_fail_system(where(plan, is), length(is), "fallocate(PUNCH_HOLE)", rc);
        }
    }
    if (!was->guarded) {
        int rc = map_part(plan, is, poisoned);
        return rc < 0 ? say_mmap(plan, is, "mmap", rc) : 0;
    }
    int rc = uvas_vm_unguard(where(plan, is), length(is));
    if (rc == 0 && was->protection != is->protection) {
        rc = uvas_vm_protect(where(plan, is), length(is), is->protection);
        if (rc < 0) {
            (void)uvas_vm_guard(where(plan, is), length(is));
        }
    }
    return rc < 0 ? say_mmap(plan, is, "madvise(MADV_GUARD_REMOVE)", rc) : 0;
}

/* Undoes put_memory; what was written meanwhile is nobody's. */
static int take_memory(const struct plan *plan, const struct uvas_piece_entry *was, const struct uvas_piece_entry *is) {
    int rc = 0;
    if (is->kind != UVAS_BACKING_DRIVER && was->guarded) {
        rc = was->protection != is->protection ? uvas_vm_protect(where(plan, is), length(is), was->protection) : 0;
        rc = rc < 0 ? rc : uvas_vm_guard(where(plan, is), length(is));
    } else if (is->kind != UVAS_BACKING_DRIVER) {
        rc = hold(plan, is);
    }
    if (rc == 0 && is->kind == UVAS_BACKING_MEMFD) { /* pages that populate brought */
        rc = uvas_vm_punch(is->file->fd, is->offset, length(is));
    }
    return rc;
}

/* Another protection of what is committed. Devices that register can have what the host has, not more: so they are the first to lose and the last
 * to gain. 0, or as before and said. */
static int protect_part(const struct plan *plan, const struct uvas_piece_entry *part, uint32_t from, uint32_t to, bool *poisoned) {
    bool on_host = part->kind != UVAS_BACKING_DRIVER, loses = (from & ~to) != 0;
    struct uvas_piece_entry before = *part;
    before.protection = from;
    int rc = loses ? uvas_party_protect(plan->record, &before, to, poisoned) : 0;
    if (rc < 0) {
        return rc;
    }
    rc = on_host ? uvas_vm_protect(where(plan, part), length(part), to) : 0;
    if (rc < 0) {
        rc = say_mmap(plan, part, "mprotect", rc);
        struct uvas_failure said = *uvas_last_failure();
        before.protection = to;
        *poisoned |= loses && uvas_party_protect(plan->record, &before, from, poisoned) < 0;
        *uvas_fail(said.kind, said.code) = said;
        return rc;
    }
    rc = loses ? 0 : uvas_party_protect(plan->record, &before, to, poisoned);
    if (rc < 0 && on_host) {
        *poisoned |= uvas_vm_protect(where(plan, part), length(part), from) < 0;
    }
    return rc;
}

/* One part of a plan: from `was` to `is`, on the host and then on the devices. */
static int commit_part(const struct plan *plan, const struct uvas_piece_entry *was, const struct uvas_piece_entry *is, bool *poisoned) {
    if (uvas_piece_committed(was)) { /* keeps its contents, gets the protection */
        return was->protection == is->protection ? 0 : protect_part(plan, was, was->protection, is->protection, poisoned);
    }
    int rc = put_memory(plan, was, is, poisoned);
    if (rc < 0) {
        return rc;
    }
    rc = uvas_party_commit(plan->record, is, poisoned);
    if (rc < 0) {
        *poisoned |= take_memory(plan, was, is) < 0;
    }
    return rc;
}

static void uncommit_part(const struct plan *plan, const struct uvas_piece_entry *was, const struct uvas_piece_entry *is, bool *poisoned) {
    struct uvas_record *record = plan->record;
    if (!uvas_piece_committed(was)) {
        struct uvas_stretch going;
        *poisoned |= uvas_party_decommit(record, is, poisoned) < 0;
        uvas_mirrors_suspend(record, is->start, is->end, &going);
        *poisoned |= take_memory(plan, was, is) < 0;
        uvas_mirrors_settle(record, &going, true);
    } else if (was->protection != is->protection) {
        *poisoned |= protect_part(plan, was, is->protection, was->protection, poisoned) < 0;
    }
}

static int commit_all(struct plan *plan, struct uvas_piece_entry *become, uint32_t flags, bool *poisoned) {
    int rc = 0;
    size_t done = 0;
    for (; rc == 0 && done < plan->count; done++) {
        rc = plan->parts[done].kind == 0 ? refuse_lost(plan, &plan->parts[done]) : commit_part(plan, &plan->parts[done], &become[done], poisoned);
    }
    if (rc < 0) {
        done--; /* the one that failed has undone itself */
    }
    for (size_t i = 0; rc == 0 && (flags & UVAS_POPULATE) && i < plan->count; i++) {
        rc = become[i].kind == UVAS_BACKING_DRIVER ? 0 : uvas_vm_populate(where(plan, &become[i]), length(&become[i]), become[i].protection);
        rc = rc < 0 ? say_mmap(plan, &become[i], "madvise(MADV_POPULATE)", rc) : 0;
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

int uvas_commit(uvas_id reservation, size_t offset, size_t size, uint32_t protection, uint32_t flags) {
    struct uvas_change change;
    struct plan plan;
    bool poisoned = false;
    int rc;
    if (protection & ~(uint32_t)PROTECTIONS) {
        return uvas_fail_invalid("0x%x is no protection", protection);
    }
    struct uvas_record *record = uvas_change_begin(reservation, offset, size, true, &change, &rc);
    if (!record) {
        return rc;
    }
    rc = make_plan(record, &change, &plan);
    struct uvas_piece_entry *become = rc < 0 ? NULL : malloc((plan.count + 1) * sizeof *become);
    if (rc == 0 && !become) {
        rc = uvas_fail_memory(record->base + offset, size, "the host");
    }
    for (size_t i = 0; rc == 0 && i < plan.count; i++) {
        become[i] = plan.parts[i];
        become[i].protection = protection;
        become[i].guarded = false;
        if (uvas_piece_is_gap(&plan.parts[i])) {
            become[i] = fresh_part(record, &plan.parts[i], protection);
            rc = become[i].kind ? 0 : uvas_last_failure()->code;
        }
    }
    rc = rc == 0 ? commit_all(&plan, become, flags, &poisoned) : rc;
    if (rc < 0) {
        free(become);
        return end_failed(&plan, &change, poisoned, rc);
    }
    uvas_registry_lock();
    for (size_t i = 0; i < plan.count; i++) {
        publish(&plan, &plan.parts[i], &become[i]);
    }
    uvas_change_end(record, &change);
    uvas_registry_unlock();
    drop_plan(&plan);
    free(become);
    return 0;
}

/* ---- decommit ----------------------------------------------------------------------------------------------------------------------------------------------- */

/* Whether the host has something mapped over the held addresses there, of ours. */
static bool on_host(const struct uvas_piece_entry *part) {
    return part->kind != 0 && !uvas_piece_is_gap(part) && part->kind != UVAS_BACKING_DRIVER;
}

/* The end of the run of parts from `first` on that one mapping can take back at once: what is lost or a driver's is never touched. */
static size_t run_end(const struct plan *plan, size_t first) {
    size_t i = first;
    while (i < plan->count && plan->parts[i].kind != 0 && plan->parts[i].kind != UVAS_BACKING_DRIVER) {
        i++;
    }
    return i;
}

/* No mapping left to split: the pages go, and guards keep everybody out, without one. */
static int guard_run(struct plan *plan, size_t first, size_t last) {
    for (size_t i = first; i < last; i++) {
        bool memory = on_host(&plan->parts[i]) && !plan->parts[i].guarded;
        int rc = memory ? uvas_vm_guard(where(plan, &plan->parts[i]), length(&plan->parts[i])) : 0;
        if (rc < 0) {
            return rc;
        }
    }
    for (size_t i = first; i < last; i++) {
        plan->parts[i].stays = on_host(&plan->parts[i]);
    }
    return 0;
}

static int hold_run(struct plan *plan, size_t first, size_t last) {
    while (first < last && !on_host(&plan->parts[first])) {
        first++;
    }
    while (last > first && !on_host(&plan->parts[last - 1])) {
        last--;
    }
    if (first == last) {
        return 0;
    }
    struct uvas_piece_entry run = {.start = plan->parts[first].start, .end = plan->parts[last - 1].end};
    int rc = hold(plan, &run);
    if (rc == -ENOMEM) {
        return guard_run(plan, first, last) < 0 ? uvas_limits_explain(where(plan, &run), length(&run)) : 0;
    }
    return rc < 0 ? uvas_fail_system(where(plan, &run), length(&run), "mmap", rc) : 0;
}

/* What a driver maps cannot be brought back with its contents by anybody but the driver: it is asked once, for all that is committed. */
static int decommit_owned(struct plan *plan, bool *poisoned) {
    struct uvas_piece_entry all = {.kind = UVAS_BACKING_DRIVER};
    for (size_t i = 0; i < plan->count; i++) {
        if (uvas_piece_committed(&plan->parts[i])) {
            all.start = all.end ? all.start : plan->parts[i].start;
            all.end = plan->parts[i].end;
        }
    }
    return all.end ? uvas_party_decommit(plan->record, &all, poisoned) : 0;
}

/* Devices first: they can be brought back. *done: the parts that are off the devices. */
static int decommit_devices(struct plan *plan, size_t *done, bool *poisoned) {
    int rc = 0;
    if (plan->record->owned) {
        *done = 0;
        return decommit_owned(plan, poisoned);
    }
    for (*done = 0; rc == 0 && *done < plan->count; ++*done) {
        rc = uvas_piece_committed(&plan->parts[*done]) ? uvas_party_decommit(plan->record, &plan->parts[*done], poisoned) : 0;
    }
    *done -= rc < 0;
    return rc;
}

static void recommit_devices(struct plan *plan, size_t done, bool *poisoned) {
    struct uvas_failure said = *uvas_last_failure();
    while (done-- > 0 && !*poisoned) { /* once an undo has failed, more of it helps nobody */
        if (uvas_piece_committed(&plan->parts[done])) {
            *poisoned |= uvas_party_commit(plan->record, &plan->parts[done], poisoned) < 0;
        }
    }
    *uvas_fail(said.kind, said.code) = said;
}

/* The holes are punched last: nothing brings their contents back. If one cannot be, those before it are gone, the mappings are as they were. */
static int punch(const struct plan *plan) {
    int rc = 0;
    for (size_t i = 0; rc == 0 && i < plan->count; i++) {
        const struct uvas_piece_entry *part = &plan->parts[i];
        if (part->kind == UVAS_BACKING_MEMFD && uvas_piece_committed(part)) {
            rc = uvas_vm_punch(part->file->fd, part->offset, length(part));
            rc = rc < 0 ? uvas_fail_system(where(plan, part), length(part), "fallocate(PUNCH_HOLE)", rc) : 0;
        }
    }
    return rc;
}

static void remap(struct plan *plan, bool *poisoned) {
    for (size_t i = 0; i < plan->count && !*poisoned; i++) {
        const struct uvas_piece_entry *part = &plan->parts[i];
        if (on_host(part) && !part->guarded && !part->stays) {
            *poisoned |= map_part(plan, part, poisoned) < 0;
        } else if (part->stays && !part->guarded) {
            *poisoned |= uvas_vm_unguard(where(plan, part), length(part)) < 0;
        }
    }
}

static bool loses_nothing(const struct plan *plan) { /* when its mappings are taken away and put back */
    for (size_t i = 0; i < plan->count; i++) {
        if (on_host(&plan->parts[i]) && !plan->parts[i].shared) {
            return false;
        }
    }
    return true;
}

static int decommit(uvas_id reservation, size_t offset, size_t size, bool under_lease) {
    struct uvas_change change;
    struct plan plan;
    bool poisoned = false;
    size_t devices = 0;
    int rc;
    struct uvas_record *record = uvas_change_begin(reservation, offset, size, under_lease, &change, &rc);
    if (!record) {
        return rc;
    }
    rc = make_plan(record, &change, &plan);
    rc = rc == 0 ? decommit_devices(&plan, &devices, &poisoned) : rc;
    bool reversible = loses_nothing(&plan);
    struct uvas_stretch going = {0};
    if (rc == 0) {
        uvas_mirrors_suspend(record, change.start, change.end, &going);
    }
    for (size_t first = 0; rc == 0 && first < plan.count; first++) {
        size_t last = run_end(&plan, first);
        rc = first < last ? hold_run(&plan, first, last) : 0;
        first = last;
    }
    if (rc == 0) {
        rc = punch(&plan);
        if (rc < 0 && reversible) {
            remap(&plan, &poisoned);
        } else if (rc < 0) { /* private contents are gone: what is left in the file goes before it is mapped again */
            rc = 0;
            record->stale = true;
        }
    }
    uvas_mirrors_settle(record, &going, rc == 0);
    if (rc < 0) {
        recommit_devices(&plan, devices, &poisoned);
        return end_failed(&plan, &change, poisoned, rc);
    }
    uvas_registry_lock();
    for (size_t i = 0; i < plan.count; i++) {
        if (on_host(&plan.parts[i]) || plan.parts[i].kind == UVAS_BACKING_DRIVER) {
            struct uvas_piece_entry guarded = plan.parts[i];
            guarded.guarded = true;
            guarded.stays = false;
            publish(&plan, &plan.parts[i], plan.parts[i].stays ? &guarded : NULL);
        }
    }
    uvas_change_end(record, &change);
    uvas_registry_unlock();
    drop_plan(&plan);
    uvas_files_close();
    return 0;
}

int uvas_decommit(uvas_id reservation, size_t offset, size_t size) {
    return decommit(reservation, offset, size, false);
}

int uvas_decommit_leased(uvas_id reservation, size_t offset, size_t size) {
    return decommit(reservation, offset, size, true);
}

/* ---- empty: an arena's memory that nobody uses -------------------------------------------------------------------------------------------------------------- */

/* Pages that a device has registered must stay the ones that it sees: they are written over, where somebody asks for it. */
static int empty_part(const struct plan *plan, const struct uvas_piece_entry *part, bool pinned, bool write) {
    bool memory = uvas_piece_committed(part) && (part->kind == UVAS_BACKING_MEMFD || part->kind == UVAS_BACKING_ANONYMOUS);
    if (!memory || (pinned && !(write && part->protection & UVAS_WRITE))) {
        return -ENOTSUP;
    }
    if (pinned) {
        memset((void *)where(plan, part), 0, length(part));
        return 0;
    }
    if (part->kind == UVAS_BACKING_MEMFD) {
        return uvas_vm_punch(part->file->fd, part->offset, length(part));
    }
    return plan->record->mirror ? uvas_mirrors_discard(plan->record, part->start, part->end) : uvas_vm_drop(where(plan, part), length(part));
}

static int empty(uvas_id reservation, size_t offset, size_t size, bool write) {
    struct uvas_change change;
    struct plan plan;
    int rc;
    bool pinned = uvas_party_whole(reservation);
    struct uvas_record *record = uvas_change_begin(reservation, offset, size, true, &change, &rc);
    if (!record) {
        return rc;
    }
    rc = make_plan(record, &change, &plan);
    for (size_t i = 0; rc == 0 && i < plan.count; i++) {
        rc = empty_part(&plan, &plan.parts[i], pinned, write);
    }
    return end_failed(&plan, &change, false, rc); /* which only ends it: contents that nobody uses are no change */
}

int uvas_empty_leased(uvas_id reservation, size_t offset, size_t size) {
    return empty(reservation, offset, size, false);
}

int uvas_zero_leased(uvas_id reservation, size_t offset, size_t size) {
    return empty(reservation, offset, size, true);
}

/* ---- protect ----------------------------------------------------------------------------------------------------------------------------------------------- */

int uvas_protect(uvas_id reservation, size_t offset, size_t size, uint32_t protection) {
    struct uvas_change change;
    struct plan plan;
    bool poisoned = false;
    int rc;
    if (protection & ~(uint32_t)PROTECTIONS) {
        return uvas_fail_invalid("0x%x is no protection", protection);
    }
    struct uvas_record *record = uvas_change_begin(reservation, offset, size, true, &change, &rc);
    if (!record) {
        return rc;
    }
    rc = make_plan(record, &change, &plan);
    for (size_t i = 0; rc == 0 && i < plan.count; i++) {
        if (!uvas_piece_committed(&plan.parts[i])) {
            rc = uvas_fail_invalid("[0x%lx, 0x%lx) is not committed: there is nothing to protect", where(&plan, &plan.parts[i]),
                                   where(&plan, &plan.parts[i]) + length(&plan.parts[i]));
        }
    }
    size_t done = 0;
    for (; rc == 0 && done < plan.count; done++) {
        struct uvas_piece_entry is = plan.parts[done];
        is.protection = protection;
        rc = commit_part(&plan, &plan.parts[done], &is, &poisoned);
    }
    if (rc < 0) {
        struct uvas_failure said = *uvas_last_failure();
        for (done -= done > 0; done-- > 0 && !poisoned;) {
            struct uvas_piece_entry is = plan.parts[done];
            is.protection = protection;
            uncommit_part(&plan, &plan.parts[done], &is, &poisoned);
        }
        *uvas_fail(said.kind, said.code) = said;
        return end_failed(&plan, &change, poisoned, rc);
    }
    uvas_registry_lock();
    for (size_t i = 0; i < plan.count; i++) {
        struct uvas_piece_entry is = plan.parts[i];
        is.protection = protection;
        publish(&plan, &plan.parts[i], &is);
    }
    uvas_change_end(record, &change);
    uvas_registry_unlock();
    drop_plan(&plan);
    return 0;
}

/* ---- map_fd ------------------------------------------------------------------------------------------------------------------------------------------------ */

static int check_mapping(const struct uvas_record *record, const struct uvas_mapping *mapping, const struct uvas_file *file) {
    size_t unit = file->id.block_size;
    uintptr_t base = record->base + mapping->offset;
    bool shared = mapping->sharing == UVAS_SHARED;
    if (mapping->descriptor_offset < 0 || (uint64_t)mapping->descriptor_offset & (unit - 1) || base & (unit - 1)) {
        return uvas_fail_invalid("descriptor offset 0x%llx at address 0x%lx: this file is mapped in units of 0x%zx bytes",
                                 (unsigned long long)mapping->descriptor_offset, base, unit);
    }
    if (shared && (base - (uintptr_t)mapping->descriptor_offset) & (uvas_vm_platform.shared_alignment - 1)) {
        return uvas_fail_invalid("address 0x%lx with descriptor offset 0x%llx: this machine maps shared memory where the two differ by multiples of 0x%zx",
                                 base, (unsigned long long)mapping->descriptor_offset, uvas_vm_platform.shared_alignment);
    }
    for (uint32_t i = 0; i < record->space->party_count; i++) {
        const struct uvas_party *party = record->space->parties[i];
        if (!(party->device.backings & UVAS_BACKING_DESCRIPTOR) || (!shared && uvas_party_claims(party))) {
            return uvas_fail_unsupported(shared ? "descriptors" : "private descriptors", "map it in a space without that device",
                                         "device %s cannot map %s descriptor at [0x%lx, +0x%zx)", party->name, shared ? "a shared" : "a private", base,
                                         mapping->size);
        }
    }
    return 0;
}

static int map_over(struct plan *plan, const struct uvas_piece_entry *fresh, bool *poisoned) {
    size_t devices = 0;
    int rc = uvas_vm_try(length(fresh), overlay_of(fresh), fresh->protection, fresh->file->fd, fresh->offset);
    if (rc < 0) { /* what the file refuses it refuses where nothing can be lost */
        return say_mmap(plan, fresh, "mmap", rc);
    }
    rc = decommit_devices(plan, &devices, poisoned);
    if (rc < 0) {
        recommit_devices(plan, devices, poisoned);
        return rc;
    }
    struct uvas_stretch going;
    uvas_mirrors_suspend(plan->record, fresh->start, fresh->end, &going);
    rc = uvas_party_commit(plan->record, fresh, poisoned);
    if (rc == 0) {
        rc = map_part(plan, fresh, poisoned); /* last: private contents under it are gone with it */
        if (rc < 0) {
            rc = say_mmap(plan, fresh, "mmap", rc);
            struct uvas_failure said = *uvas_last_failure();
            *poisoned |= uvas_party_decommit(plan->record, fresh, poisoned) < 0;
            *uvas_fail(said.kind, said.code) = said;
        }
    }
    uvas_mirrors_settle(plan->record, &going, rc == 0);
    if (rc < 0) {
        recommit_devices(plan, devices, poisoned);
        return rc;
    }
    if (punch(plan) < 0) { /* memory that no mapping reaches: given back before it is mapped again, or by release */
        plan->record->stale = true;
    }
    return 0;
}

static struct uvas_file *adopt_descriptor(int fd, int *rc) {
    struct uvas_file_id id;
    int own = uvas_vm_duplicate(fd);
    *rc = own < 0 ? own : uvas_vm_identify(own, &id);
    if (*rc < 0) {
        uvas_vm_close(own);
        *rc = *rc == -EMFILE ? uvas_limits_descriptors(0, 0, *rc)
                             : uvas_fail_system(0, 0, "dup", *rc);
        return NULL;
    }
    struct uvas_file *file = uvas_file_make(own, &id);
    *rc = file ? 0 : uvas_fail_memory(0, sizeof *file, "the host");
    return file;
}

static void let_go(struct uvas_file *file) {
    uvas_registry_lock();
    uvas_file_drop(file);
    uvas_registry_unlock();
    uvas_files_close();
}

static int map_descriptor(uvas_id reservation, const struct uvas_mapping *mapping, bool under_lease) {
    struct uvas_change change;
    struct plan plan = {0};
    bool poisoned = false;
    int rc = uvas_core_ready();
    if (rc == 0 && (mapping->protection & ~(uint32_t)PROTECTIONS || mapping->sharing > UVAS_SHARED)) {
        return uvas_fail_invalid("protection 0x%x, sharing %u: there is no such thing", mapping->protection, mapping->sharing);
    }
    struct uvas_file *file = rc < 0 ? NULL : adopt_descriptor(mapping->descriptor, &rc);
    if (!file) {
        return rc;
    }
    size_t unit = file->id.block_size, size = mapping->size > SIZE_MAX - unit ? mapping->size : (mapping->size + unit - 1) & ~(unit - 1);
    struct uvas_record *record = uvas_change_begin(reservation, mapping->offset, size, under_lease, &change, &rc);
    if (!record) {
        let_go(file);
        return rc;
    }
    uvas_registry_lock();
    file = uvas_pieces_share(&record->pieces, file);
    uvas_registry_unlock();
    struct uvas_piece_entry fresh = {.start = mapping->offset, .end = mapping->offset + size, .kind = UVAS_BACKING_DESCRIPTOR,
                                     .protection = mapping->protection, .shared = mapping->sharing == UVAS_SHARED,
                                     .offset = mapping->descriptor_offset, .file = file};
    rc = check_mapping(record, mapping, file);
    rc = rc == 0 ? make_plan(record, &change, &plan) : rc;
    plan.record = record;
    plan.parts = plan.parts ? plan.parts : plan.few;
    for (size_t i = 0; rc == 0 && i < plan.count; i++) {
        rc = plan.parts[i].kind == 0 ? refuse_lost(&plan, &plan.parts[i]) : 0;
        if (plan.parts[i].kind == UVAS_BACKING_DRIVER || record->owned) {
            rc = uvas_fail_unsupported("descriptors", "map it in another space", "[0x%lx, +0x%zx) belongs to a device's driver",
                                       record->base + change.start, size);
        }
    }
    rc = rc == 0 ? map_over(&plan, &fresh, &poisoned) : rc;
    if (rc < 0) {
        rc = end_failed(&plan, &change, poisoned, rc);
        let_go(file);
        return rc;
    }
    uvas_registry_lock();
    uint64_t *committed = &record->space->stats.committed_bytes;
    for (size_t i = 0; i < plan.count; i++) {
        *committed -= uvas_piece_committed(&plan.parts[i]) ? length(&plan.parts[i]) : 0;
    }
    *committed += size;
    uvas_pieces_set(&record->pieces, change.start, change.end, &fresh);
    uvas_change_end(record, &change);
    uvas_registry_unlock();
    drop_plan(&plan);
    let_go(file);
    return 0;
}

int uvas_map_fd(uvas_id reservation, const struct uvas_mapping *mapping) {
    return map_descriptor(reservation, mapping, false);
}

int uvas_map_fd_leased(uvas_id reservation, const struct uvas_mapping *mapping) {
    return map_descriptor(reservation, mapping, true);
}

/* ---- what is there --------------------------------------------------------------------------------------------------------------------------------------------- */

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
            batch[found++] = (struct uvas_piece){.offset = part->start, .size = length(part), .kind = part->kind, .protection = part->protection,
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
