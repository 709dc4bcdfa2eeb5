/* host.c: what the host maps behind held addresses: memory put there and taken away (change.h). On what a driver maps nothing is done here.
 */
#include <errno.h>

#include "change.h"
#include "failure.h"
#include "limits.h"
#include "maps.h"

int uvas_host_hold(const struct uvas_plan *plan, const struct uvas_piece_entry *part) {
    int tag = plan->record->tagged ? plan->record->space->tag : -1;
    return uvas_vm_overlay(uvas_part_base(plan, part), uvas_part_size(part), UVAS_OVERLAY_HELD, UVAS_NONE, tag, 0);
}

static enum uvas_vm_overlay_kind overlay_of(const struct uvas_piece_entry *part) {
    return !part->file ? UVAS_OVERLAY_ANONYMOUS : part->shared ? UVAS_OVERLAY_SHARED : UVAS_OVERLAY_PRIVATE;
}

/* After a mapping that failed half way: holds again what the kernel unmapped. false: somebody was quicker. */
static bool hold_again(const struct uvas_plan *plan, const struct uvas_piece_entry *part) {
    int tag = plan->record->tagged ? plan->record->space->tag : -1;
    uintptr_t at = uvas_part_base(plan, part), end = at + uvas_part_size(part);
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

int uvas_host_map(const struct uvas_plan *plan, const struct uvas_piece_entry *part, bool *poisoned) {
    if (part->kind == UVAS_BACKING_DRIVER) {
        return 0;
    }
    int fd = part->file ? part->file->fd : -1;
    int rc = uvas_vm_overlay(uvas_part_base(plan, part), uvas_part_size(part), overlay_of(part), part->protection, fd, part->offset);
    if (rc < 0 && part->file && !hold_again(plan, part)) {
        *poisoned = true;
    }
    return rc;
}

int uvas_host_fail(const struct uvas_plan *plan, const struct uvas_piece_entry *part, const char *call, int rc) {
    return rc == -ENOMEM || rc == -EAGAIN ? uvas_limits_explain(uvas_part_base(plan, part), uvas_part_size(part))
                                          : uvas_fail_system(uvas_part_base(plan, part), uvas_part_size(part), call, rc);
}

int uvas_host_try(const struct uvas_piece_entry *part) {
    return uvas_vm_try(uvas_part_size(part), overlay_of(part), part->protection, part->file->fd, part->offset);
}

int uvas_host_put(const struct uvas_plan *plan, const struct uvas_piece_entry *was, const struct uvas_piece_entry *is, bool *poisoned) {
    if (is->kind == UVAS_BACKING_DRIVER) {
        return 0;
    }
    if (is->kind == UVAS_BACKING_MEMFD && plan->record->stale) {
        int rc = uvas_vm_punch(is->file->fd, is->offset, uvas_part_size(is));
        if (rc < 0) {
            return uvas_fail_system(uvas_part_base(plan, is), uvas_part_size(is), "fallocate(PUNCH_HOLE)", rc);
        }
    }
    if (!was->guarded) {
        int rc = uvas_host_map(plan, is, poisoned);
        return rc < 0 ? uvas_host_fail(plan, is, "mmap", rc) : 0;
    }
    int rc = uvas_vm_unguard(uvas_part_base(plan, is), uvas_part_size(is));
    if (rc == 0 && was->protection != is->protection) {
        rc = uvas_vm_protect(uvas_part_base(plan, is), uvas_part_size(is), is->protection);
        if (rc < 0) {
            (void)uvas_vm_guard(uvas_part_base(plan, is), uvas_part_size(is));
        }
    }
    return rc < 0 ? uvas_host_fail(plan, is, "madvise(MADV_GUARD_REMOVE)", rc) : 0;
}

int uvas_host_take(const struct uvas_plan *plan, const struct uvas_piece_entry *was, const struct uvas_piece_entry *is) {
    int rc = 0;
    if (is->kind != UVAS_BACKING_DRIVER && was->guarded) {
        rc = was->protection != is->protection ? uvas_vm_protect(uvas_part_base(plan, is), uvas_part_size(is), was->protection) : 0;
        rc = rc < 0 ? rc : uvas_vm_guard(uvas_part_base(plan, is), uvas_part_size(is));
    } else if (is->kind != UVAS_BACKING_DRIVER) {
        rc = uvas_host_hold(plan, is);
    }
    if (rc == 0 && is->kind == UVAS_BACKING_MEMFD) { /* pages that populate brought */
        rc = uvas_vm_punch(is->file->fd, is->offset, uvas_part_size(is));
    }
    return rc;
}


int uvas_host_punch(const struct uvas_plan *plan) {
    int rc = 0;
    for (size_t i = 0; rc == 0 && i < plan->count; i++) {
        const struct uvas_piece_entry *part = &plan->parts[i];
        if (part->kind == UVAS_BACKING_MEMFD && uvas_piece_committed(part)) {
            rc = uvas_vm_punch(part->file->fd, part->offset, uvas_part_size(part));
            rc = rc < 0 ? uvas_fail_system(uvas_part_base(plan, part), uvas_part_size(part), "fallocate(PUNCH_HOLE)", rc) : 0;
        }
    }
    return rc;
}
