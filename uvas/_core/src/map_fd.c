/* map_fd.c: the bytes behind somebody's descriptor, at addresses that are held (change.h).
 */
#include <errno.h>

#include "change.h"
#include "failure.h"
#include "limits.h"
#include "mirrors.h"

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

static int map_over(struct uvas_plan *plan, const struct uvas_piece_entry *fresh, bool *poisoned) {
    size_t devices = 0;
    int rc = uvas_host_try(fresh);
    if (rc < 0) { /* what the file refuses it refuses where nothing can be lost */
        return uvas_host_fail(plan, fresh, "mmap", rc);
    }
    rc = uvas_decommit_devices(plan, &devices, poisoned);
    if (rc < 0) {
        uvas_recommit_devices(plan, devices, poisoned);
        return rc;
    }
    struct uvas_stretch going;
    uvas_mirrors_suspend(plan->record, fresh->start, fresh->end, &going);
    rc = uvas_party_commit(plan->record, fresh, poisoned);
    if (rc == 0) {
        rc = uvas_host_map(plan, fresh, poisoned); /* last: private contents under it are gone with it */
        if (rc < 0) {
            rc = uvas_host_fail(plan, fresh, "mmap", rc);
            struct uvas_failure said = *uvas_last_failure();
            *poisoned |= uvas_party_decommit(plan->record, fresh, poisoned) < 0;
            *uvas_fail(said.kind, said.code) = said;
        }
    }
    uvas_mirrors_settle(plan->record, &going, rc == 0);
    if (rc < 0) {
        uvas_recommit_devices(plan, devices, poisoned);
        return rc;
    }
    if (uvas_host_punch(plan) < 0) { /* memory that no mapping reaches: given back before it is mapped again, or by release */
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

static int map_descriptor(uvas_id reservation, const struct uvas_mapping *mapping, enum uvas_tolerance beside) {
    struct uvas_change change;
    struct uvas_plan plan = {0};
    bool poisoned = false;
    int rc = uvas_core_ready();
    if (rc == 0 && (mapping->protection & ~(uint32_t)UVAS_PROTECTIONS || mapping->sharing > UVAS_SHARED)) {
        return uvas_fail_invalid("protection 0x%x, sharing %u: there is no such thing", mapping->protection, mapping->sharing);
    }
    struct uvas_file *file = rc < 0 ? NULL : adopt_descriptor(mapping->descriptor, &rc);
    if (!file) {
        return rc;
    }
    size_t unit = file->id.block_size, size = mapping->size > SIZE_MAX - unit ? mapping->size : (mapping->size + unit - 1) & ~(unit - 1);
    struct uvas_record *record = uvas_change_begin(reservation, mapping->offset, size, beside, &change, &rc);
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
    rc = rc == 0 ? uvas_plan_make(record, &change, &plan) : rc;
    plan.record = record;
    plan.parts = plan.parts ? plan.parts : plan.few;
    for (size_t i = 0; rc == 0 && i < plan.count; i++) {
        rc = plan.parts[i].kind == 0 ? uvas_plan_refuse_lost(&plan, &plan.parts[i]) : 0;
        if (plan.parts[i].kind == UVAS_BACKING_DRIVER || record->owned) {
            rc = uvas_fail_unsupported("descriptors", "map it in another space", "[0x%lx, +0x%zx) belongs to a device's driver",
                                       record->base + change.start, size);
        }
    }
    rc = rc == 0 ? map_over(&plan, &fresh, &poisoned) : rc;
    if (rc < 0) {
        rc = uvas_plan_fail(&plan, &change, poisoned, rc);
        let_go(file);
        return rc;
    }
    uvas_registry_lock();
    uint64_t *committed = &record->space->stats.committed_bytes;
    for (size_t i = 0; i < plan.count; i++) {
        *committed -= uvas_piece_committed(&plan.parts[i]) ? uvas_part_size(&plan.parts[i]) : 0;
    }
    *committed += size;
    uvas_pieces_set(&record->pieces, change.start, change.end, &fresh);
    uvas_change_end(record, &change);
    uvas_registry_unlock();
    uvas_plan_drop(&plan);
    let_go(file);
    return 0;
}

int uvas_map_fd(uvas_id reservation, const struct uvas_mapping *mapping) {
    return map_descriptor(reservation, mapping, UVAS_BESIDE_NOBODY);
}

int uvas_map_fd_leased(uvas_id reservation, const struct uvas_mapping *mapping) {
    return map_descriptor(reservation, mapping, UVAS_BESIDE_ALL);
}
