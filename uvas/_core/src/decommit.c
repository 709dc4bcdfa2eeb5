/* decommit.c: memory given back while the addresses stay held: decommit, and an arena's memory that is emptied in place (change.h).
 */
#include <errno.h>
#include <string.h>

#include "change.h"
#include "failure.h"
#include "limits.h"
#include "mirrors.h"

/* ---- devices ----------------------------------------------------------------------------------------------------------------------------------- */

/* What a driver maps cannot be brought back with its contents by anybody but the driver: it is asked once, for all that is committed. */
static int decommit_owned(struct uvas_plan *plan, bool *poisoned) {
    struct uvas_piece_entry all = {.kind = UVAS_BACKING_DRIVER};
    for (size_t i = 0; i < plan->count; i++) {
        if (uvas_piece_committed(&plan->parts[i])) {
            all.start = all.end ? all.start : plan->parts[i].start;
            all.end = plan->parts[i].end;
        }
    }
    return all.end ? uvas_party_decommit(plan->record, &all, poisoned) : 0;
}

int uvas_decommit_devices(struct uvas_plan *plan, size_t *done, bool *poisoned) {
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

void uvas_recommit_devices(struct uvas_plan *plan, size_t done, bool *poisoned) {
    struct uvas_failure said = *uvas_last_failure();
    while (done-- > 0 && !*poisoned) { /* once an undo has failed, more of it helps nobody */
        if (uvas_piece_committed(&plan->parts[done])) {
            *poisoned |= uvas_party_commit(plan->record, &plan->parts[done], poisoned) < 0;
        }
    }
    *uvas_fail(said.kind, said.code) = said;
}

/* ---- decommit ---------------------------------------------------------------------------------------------------------------------------------- */

/* Whether the host has something mapped over the held addresses there, of ours. */
static bool on_host(const struct uvas_piece_entry *part) {
    return part->kind != 0 && !uvas_piece_is_gap(part) && part->kind != UVAS_BACKING_DRIVER;
}

/* The end of the run of parts from `first` on that one mapping can take back at once: what is lost or a driver's is never touched. */
static size_t run_end(const struct uvas_plan *plan, size_t first) {
    size_t i = first;
    while (i < plan->count && plan->parts[i].kind != 0 && plan->parts[i].kind != UVAS_BACKING_DRIVER) {
        i++;
    }
    return i;
}

/* No mapping left to split: the pages go, and guards keep everybody out, without one. */
static int guard_run(struct uvas_plan *plan, size_t first, size_t last) {
    for (size_t i = first; i < last; i++) {
        bool memory = on_host(&plan->parts[i]) && !plan->parts[i].guarded;
        int rc = memory ? uvas_vm_guard(uvas_part_base(plan, &plan->parts[i]), uvas_part_size(&plan->parts[i])) : 0;
        if (rc < 0) {
            return rc;
        }
    }
    for (size_t i = first; i < last; i++) {
        plan->parts[i].stays = on_host(&plan->parts[i]);
    }
    return 0;
}

static int hold_run(struct uvas_plan *plan, size_t first, size_t last) {
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
    int rc = uvas_host_hold(plan, &run);
    if (rc == -ENOMEM) {
        return guard_run(plan, first, last) < 0 ? uvas_limits_explain(uvas_part_base(plan, &run), uvas_part_size(&run)) : 0;
    }
    return rc < 0 ? uvas_fail_system(uvas_part_base(plan, &run), uvas_part_size(&run), "mmap", rc) : 0;
}

static void remap(struct uvas_plan *plan, bool *poisoned) {
    for (size_t i = 0; i < plan->count && !*poisoned; i++) {
        const struct uvas_piece_entry *part = &plan->parts[i];
        if (on_host(part) && !part->guarded && !part->stays) {
            *poisoned |= uvas_host_map(plan, part, poisoned) < 0;
        } else if (part->stays && !part->guarded) {
            *poisoned |= uvas_vm_unguard(uvas_part_base(plan, part), uvas_part_size(part)) < 0;
        }
    }
}

static bool loses_nothing(const struct uvas_plan *plan) { /* when its mappings are taken away and put back */
    for (size_t i = 0; i < plan->count; i++) {
        if (on_host(&plan->parts[i]) && !plan->parts[i].shared) {
            return false;
        }
    }
    return true;
}

static int decommit(uvas_id reservation, size_t offset, size_t size, enum uvas_tolerance beside) {
    struct uvas_change change;
    struct uvas_plan plan;
    bool poisoned = false;
    size_t devices = 0;
    int rc;
    struct uvas_record *record = uvas_change_begin(reservation, offset, size, beside, &change, &rc);
    if (!record) {
        return rc;
    }
    rc = uvas_plan_make(record, &change, &plan);
    rc = rc == 0 ? uvas_decommit_devices(&plan, &devices, &poisoned) : rc;
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
        rc = uvas_host_punch(&plan);
        if (rc < 0 && reversible) {
            remap(&plan, &poisoned);
        } else if (rc < 0) { /* private contents are gone: what is left in the file goes before it is mapped again */
            rc = 0;
            record->stale = true;
        }
    }
    uvas_mirrors_settle(record, &going, rc == 0);
    if (rc < 0) {
        uvas_recommit_devices(&plan, devices, &poisoned);
        return uvas_plan_fail(&plan, &change, poisoned, rc);
    }
    uvas_registry_lock();
    for (size_t i = 0; i < plan.count; i++) {
        if (on_host(&plan.parts[i]) || plan.parts[i].kind == UVAS_BACKING_DRIVER) {
            struct uvas_piece_entry guarded = plan.parts[i];
            guarded.guarded = true;
            guarded.stays = false;
            uvas_plan_publish(&plan, &plan.parts[i], plan.parts[i].stays ? &guarded : NULL);
        }
    }
    uvas_change_end(record, &change);
    uvas_registry_unlock();
    uvas_plan_drop(&plan);
    uvas_files_close();
    return 0;
}

int uvas_decommit(uvas_id reservation, size_t offset, size_t size) {
    return decommit(reservation, offset, size, UVAS_BESIDE_NOBODY);
}

int uvas_decommit_leased(uvas_id reservation, size_t offset, size_t size) {
    return decommit(reservation, offset, size, UVAS_BESIDE_ALL);
}

/* ---- empty: an arena's memory that nobody uses ------------------------------------------------------------------------------------------------- */

/* Pages that a device has registered must stay the ones that it sees: they are written over, where somebody asks for it. */
static int empty_part(const struct uvas_plan *plan, const struct uvas_piece_entry *part, bool pinned, bool write) {
    bool memory = uvas_piece_committed(part) && (part->kind == UVAS_BACKING_MEMFD || part->kind == UVAS_BACKING_ANONYMOUS);
    if (!memory || (pinned && !(write && part->protection & UVAS_WRITE))) {
        return -ENOTSUP;
    }
    if (pinned) {
        memset((void *)uvas_part_base(plan, part), 0, uvas_part_size(part));
        return 0;
    }
    if (part->kind == UVAS_BACKING_MEMFD) {
        return uvas_vm_punch(part->file->fd, part->offset, uvas_part_size(part));
    }
    return plan->record->mirror ? uvas_mirrors_discard(plan->record, part->start, part->end)
                                : uvas_vm_drop(uvas_part_base(plan, part), uvas_part_size(part));
}

static int empty(uvas_id reservation, size_t offset, size_t size, bool write) {
    struct uvas_change change;
    struct uvas_plan plan;
    int rc;
    bool pinned = uvas_party_whole(reservation);
    struct uvas_record *record = uvas_change_begin(reservation, offset, size, UVAS_BESIDE_ALL, &change, &rc);
    if (!record) {
        return rc;
    }
    rc = uvas_plan_make(record, &change, &plan);
    for (size_t i = 0; rc == 0 && i < plan.count; i++) {
        rc = empty_part(&plan, &plan.parts[i], pinned, write);
    }
    return uvas_plan_fail(&plan, &change, false, rc); /* which only ends it: contents that nobody uses are no change */
}

int uvas_empty_leased(uvas_id reservation, size_t offset, size_t size) {
    return empty(reservation, offset, size, false);
}

int uvas_zero_leased(uvas_id reservation, size_t offset, size_t size) {
    return empty(reservation, offset, size, true);
}
