/* space.c: spaces and the devices that come and go; names, statistics, and the answers about addresses that need no lock. */
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "failure.h"
#include "limits.h"
#include "mirrors.h"
#include "nodes.h"
#include "registry.h"
#include "space.h"

/* ---- open and close ------------------------------------------------------------------------------------------------------------------------------ */

static int tag_space(struct uvas_space *space) {
    char name[UVAS_NAME_BYTES + 8];
    space->tag = -1;
    if ((space->flags & UVAS_UNTAGGED) || !uvas_vm_platform.has_tag) {
        return 0;
    }
    (void)snprintf(name, sizeof name, "uvas:%s", space->name);
    int fd = uvas_vm_tag(name);
    if (fd == -EMFILE || fd == -ENFILE) {
        return uvas_limits_descriptors(0, 0, fd);
    }
    if (fd < 0) {
        return uvas_fail_system(0, 0, "memfd_create", fd);
    }
    int rc = uvas_vm_identify(fd, &space->tag_file);
    if (rc < 0) {
        uvas_vm_close(fd);
        return uvas_fail_system(0, 0, "fstat", rc);
    }
    space->tag = fd;
    return 0;
}

static int describe_space(const struct uvas_space_options *options, struct uvas_space *space) {
    uintptr_t end = (uintptr_t)1 << uvas_vm_platform.address_bits;
    if (options->window_size && (options->window_base > end || options->window_size > end - options->window_base)) {
        return uvas_fail_invalid("the window [0x%lx, +0x%zx) reaches beyond the %u bits that addresses have here", options->window_base,
                                 options->window_size, uvas_vm_platform.address_bits);
    }
    if (options->backing & ~(uint32_t)(UVAS_BACKING_ANONYMOUS | UVAS_BACKING_MEMFD)) {
        return uvas_fail_invalid("0x%x is no backing of a space: ANONYMOUS, MEMFD or 0", options->backing);
    }
    (void)snprintf(space->name, sizeof space->name, "%s", options->name ? options->name : "uvas");
    space->any_window = options->window_size == 0;
    space->window_base = options->window_base;
    space->window_end = space->any_window ? (uintptr_t)1 << uvas_vm_platform.window_bits : options->window_base + options->window_size;
    space->backing_wanted = options->backing;
    space->flags = options->flags;
    space->attempts = options->attempts ? options->attempts : UVAS_DEFAULT_ATTEMPTS;
    return tag_space(space);
}

int uvas_space_open(const struct uvas_space_options *options, uvas_id *out) {
    const struct uvas_space_options defaults = {0};
    int rc = uvas_core_ready();
    if (rc < 0) {
        return rc;
    }
    uvas_registry_lock();
    struct uvas_space *space = uvas_slots_take(&uvas_space_slots);
    uvas_registry_unlock();
    if (!space) {
        return uvas_fail_memory(0, sizeof *space, "the host");
    }
    rc = describe_space(options ? options : &defaults, space);
    uvas_registry_lock();
    uvas_id id = 0;
    if (rc == 0) {
        id = uvas_slots_name(&uvas_space_slots, &space->slot);
        space->next = uvas_spaces;
        if (uvas_spaces) {
            uvas_spaces->previous = space;
        }
        uvas_spaces = space;
    } else {
        uvas_slots_give(&uvas_space_slots, &space->slot);
    }
    uvas_registry_unlock();
    if (rc == 0) {
        *out = id;
    }
    return rc;
}

/* Under the lock; the space is exclusive. */
static int leased(struct uvas_space *space) {
    if (space->tenants) {
        return uvas_fail_say(uvas_fail(UVAS_FAILURE_BUSY, -EBUSY), "space %s cannot close: arena %s takes its addresses of it, and is closed first",
                             space->name, space->tenants->name);
    }
    uvas_leases_drain();
    for (struct uvas_record *record = space->records; record; record = record->next) {
        if (record->leases) {
            struct uvas_failure *failure = uvas_fail(UVAS_FAILURE_BUSY, -EBUSY);
            failure->base = record->base;
            failure->size = record->size;
            return uvas_fail_say(failure, "space %s cannot close: [0x%lx, 0x%lx) is in use by arrays, calls or pin_host", space->name, record->base,
                                 record->base + record->size);
        }
    }
    return 0;
}

static void forget_space(struct uvas_space *space) { /* under the lock */
    *(space->previous ? &space->previous->next : &uvas_spaces) = space->next;
    if (space->next) {
        space->next->previous = space->previous;
    }
    for (uint32_t i = 0; i < space->party_count; i++) {
        uvas_slots_give(&uvas_party_slots, &space->parties[i]->slot);
    }
    uvas_slots_give(&uvas_space_slots, &space->slot);
    uvas_registry_wake(); /* who waited to come in finds it gone */
}

int uvas_space_close(uvas_id id) {
    int rc = uvas_core_ready();
    struct uvas_space *space = rc < 0 ? NULL : uvas_space_enter_alone(id);
    if (!space) {
        return rc < 0 ? rc : -ESTALE;
    }
    uvas_registry_lock();
    rc = leased(space);
    space->closing = rc == 0; /* no new leases from here on */
    while (rc == 0 && space->records) {
        struct uvas_record *record = space->records;
        record->state = UVAS_RELEASING;
        uvas_registry_set(record->base, record->base + record->size, record->id | UVAS_REGISTRY_HIDDEN);
        space->working++;
        uvas_registry_unlock();
        rc = uvas_record_release(record);
        uvas_registry_lock();
    }
    int tag = space->tag;
    for (uint32_t i = 0; rc == 0 && i < space->party_count; i++) { /* no reservation is left, so nothing comes home */
        if (space->parties[i]->member) {
            uvas_registry_unlock();
            (void)uvas_mirrors_part(space, space->parties[i]);
            uvas_registry_lock();
        }
    }
    if (rc == 0) {
        forget_space(space);
    } else {
        space->closing = space->exclusive = false;
        uvas_registry_wake();
    }
    uvas_registry_unlock();
    if (rc == 0) {
        uvas_vm_close(tag);
    }
    uvas_quarantine_sweep();
    return rc;
}

int uvas_space_let(uvas_id id, struct uvas_tenant *tenant) {
    uvas_registry_lock();
    struct uvas_space *space = uvas_slots_get(&uvas_space_slots, id);
    bool open = space && !space->closing;
    if (open) {
        tenant->previous = NULL;
        tenant->next = space->tenants;
        if (space->tenants) {
            space->tenants->previous = tenant;
        }
        space->tenants = tenant;
    }
    uvas_registry_unlock();
    return open ? 0 : uvas_fail_released("space", id);
}

void uvas_space_leave_tenant(uvas_id id, struct uvas_tenant *tenant) {
    uvas_registry_lock();
    struct uvas_space *space = uvas_slots_get(&uvas_space_slots, id);
    if (space) {
        *(tenant->previous ? &tenant->previous->next : &space->tenants) = tenant->next;
        if (tenant->next) {
            tenant->next->previous = tenant->previous;
        }
    }
    uvas_registry_unlock();
}

int uvas_space_stats(uvas_id id, struct uvas_space_stats *out) {
    struct uvas_space_stats stats = {0};
    uvas_registry_lock();
    struct uvas_space *space = uvas_slots_get(&uvas_space_slots, id);
    if (space) {
        stats = space->stats;
        stats.quarantined_bytes = uvas_quarantine_bytes();
    }
    uvas_registry_unlock();
    if (!space) {
        return uvas_fail_released("space", id);
    }
    *out = stats;
    return 0;
}

/* ---- devices ------------------------------------------------------------------------------------------------------------------------------------------ */

static int sound(const struct uvas_device *device) {
    bool claims = device->placement == UVAS_CLAIMS || device->placement == UVAS_OWNS;
    if (device->placement > UVAS_OWNS || (claims && !(device->claim && device->unclaim)) || !device->commit || !device->decommit || !device->protect) {
        return uvas_fail_invalid("device %s lacks a callback that its placement needs", device->name ? device->name : "(unnamed)");
    }
    if (device->granularity & (device->granularity - 1)) {
        return uvas_fail_invalid("the granularity 0x%zx of device %s is not a power of two", device->granularity, device->name);
    }
    return 0;
}

/* Whether what lives in the space can live on the device too. The space is exclusive. */
static int suits(const struct uvas_space *space, const struct uvas_party *party) {
    const struct uvas_device *device = &party->device;
    bool owns = device->placement == UVAS_OWNS;
    if (space->party_count == UVAS_DEVICES_MAX) {
        return uvas_fail_invalid("space %s has %u devices already", space->name, UVAS_DEVICES_MAX);
    }
    if (owns && (space->records || uvas_space_owner(space))) {
        return uvas_fail_unsupported("an owning device", "attach it first, to a space without reservations",
                                     "device %s takes addresses itself: it can be attached to an empty space without another such device only",
                                     party->name);
    }
    for (const struct uvas_record *record = space->records; record; record = record->next) {
        bool reachable = !device->window_size || (record->base >= device->window_base && record->base - device->window_base < device->window_size &&
                                                  record->size <= device->window_size - (record->base - device->window_base));
        bool aligned = !device->granularity || ((record->base | record->size) & (device->granularity - 1)) == 0;
        if (record->kind == UVAS_RESERVATION && !(reachable && aligned)) {
            return uvas_fail_unsupported("the device's window or granularity", "attach it before reserving", "device %s cannot address [0x%lx, 0x%lx)",
                                         party->name, record->base, record->base + record->size);
        }
        const struct uvas_region *region = atomic_load_explicit(&record->region, memory_order_relaxed);
        if (device->memory == UVAS_MEMORY_PRIVATE && region && uvas_region_guarded(region)) {
            return uvas_fail_unsupported("guards in memory that moves", "an arena without guards, or a device that shares the host's memory",
                                         "device %s has memory of its own, and an arena has guards in [0x%lx, 0x%lx)", party->name, record->base,
                                         record->base + record->size);
        }
        for (size_t i = 0; i < record->pieces.count; i++) {
            const struct uvas_piece_entry *piece = &record->pieces.list[i];
            if (uvas_piece_committed(piece) && (!(piece->kind & device->backings) || (piece->file && !piece->shared && uvas_party_claims(party)))) {
                return uvas_fail_unsupported("a common backing", "decommit it, or attach the device before committing",
                                             "device %s cannot live with what is committed at [0x%lx, 0x%lx)", party->name,
                                             record->base + piece->start, record->base + piece->end);
            }
        }
    }
    return 0;
}

static int bring_all(struct uvas_space *space, struct uvas_party *party) {
    bool poisoned = false;
    for (struct uvas_record *record = space->records; record; record = record->next) {
        int rc = record->kind == UVAS_RESERVATION ? uvas_party_bring(record, party, &poisoned) : 0;
        if (rc < 0) {
            struct uvas_failure said = *uvas_last_failure();
            for (struct uvas_record *undo = space->records; undo != record; undo = undo->next) {
                (void)(undo->kind == UVAS_RESERVATION ? uvas_party_leave(undo, party, &poisoned) : 0);
            }
            *uvas_fail(said.kind, said.code) = said; /* a device that keeps what it gave back is not attached: it hurts nobody but itself */
            return rc;
        }
    }
    return 0;
}

static void add_party(struct uvas_space *space, struct uvas_party *party) {
    uint32_t at = party->device.placement == UVAS_OWNS ? 0 : space->party_count;
    memmove(&space->parties[at + 1], &space->parties[at], (space->party_count - at) * sizeof *space->parties);
    space->parties[at] = party;
    space->party_count++;
}

static void remove_party(struct uvas_space *space, uint32_t at) {
    space->party_count--;
    memmove(&space->parties[at], &space->parties[at + 1], (space->party_count - at) * sizeof *space->parties);
}

int uvas_attach(uvas_id space_id, const struct uvas_device *device, uvas_id *out) {
    int rc = uvas_core_ready();
    rc = rc < 0 ? rc : sound(device);
    if (rc < 0) {
        return rc;
    }
    uvas_registry_lock();
    struct uvas_party *party = uvas_slots_take(&uvas_party_slots);
    uvas_registry_unlock();
    if (!party) {
        return uvas_fail_memory(0, sizeof *party, "the host");
    }
    party->device = *device;
    (void)snprintf(party->name, sizeof party->name, "%s", device->name ? device->name : "(unnamed)");
    party->device.name = party->name;
    struct uvas_space *space = uvas_space_enter_alone(space_id);
    rc = space ? suits(space, party) : -ESTALE;
    if (rc == 0) { /* together with those that are there, something must be left to commit */
        add_party(space, party);
        rc = uvas_space_backings(space, space->backing_wanted) ? 0 : -ENOTSUP;
        uint32_t at = party->device.placement == UVAS_OWNS ? 0 : space->party_count - 1;
        remove_party(space, at);
    }
    bool private = device->memory == UVAS_MEMORY_PRIVATE;
    rc = rc == 0 && private ? uvas_mirrors_suit(space, device) : rc;
    rc = rc == 0 && private ? uvas_mirrors_join(space, party) : rc;
    rc = rc == 0 ? bring_all(space, party) : rc;
    if (rc < 0 && party->member) {
        struct uvas_failure said = *uvas_last_failure();
        (void)uvas_mirrors_part(space, party);
        *uvas_fail(said.kind, said.code) = said;
    }
    uvas_registry_lock();
    uvas_id id = 0;
    if (rc == 0) {
        id = uvas_slots_name(&uvas_party_slots, &party->slot);
        add_party(space, party);
    } else {
        uvas_slots_give(&uvas_party_slots, &party->slot);
    }
    uvas_registry_unlock();
    if (space) {
        uvas_space_leave_alone(space);
    }
    if (rc == 0) {
        *out = id;
    }
    return rc;
}

/* Undoes a detach that stopped before `until`. What the device does not take back is poisoned: it would not mean the same there any more. */
static void bring_back(struct uvas_space *space, const struct uvas_record *until, struct uvas_party *party, const struct uvas_failure *said) {
    struct uvas_record *next;
    for (struct uvas_record *undo = space->records; undo != until; undo = next) {
        bool poisoned = false;
        next = undo->next;
        int rc = undo->kind == UVAS_RESERVATION ? uvas_party_bring(undo, party, &poisoned) : 0;
        *uvas_fail(said->kind, said->code) = *said;
        if (rc < 0 || poisoned) {
            uvas_registry_lock();
            uvas_record_poison_live(undo);
            uvas_registry_unlock();
        }
    }
}

static int leave_all(struct uvas_space *space, struct uvas_party *party) {
    bool poisoned = false;
    if (party->device.placement == UVAS_OWNS && space->records) {
        return uvas_fail_say(uvas_fail(UVAS_FAILURE_BUSY, -EBUSY), "device %s owns the addresses of space %s: release them first", party->name,
                             space->name);
    }
    for (struct uvas_record *record = space->records; record; record = record->next) {
        int rc = record->kind == UVAS_RESERVATION ? uvas_party_leave(record, party, &poisoned) : 0;
        if (rc < 0) {
            struct uvas_failure said = *uvas_last_failure();
            bring_back(space, record, party, &said);
            if (poisoned) { /* the one that failed half way, and could not be brought back */
                uvas_registry_lock();
                uvas_record_poison_live(record);
                uvas_registry_unlock();
            }
            return rc;
        }
    }
    return 0;
}

int uvas_detach(uvas_id space_id, uvas_id device) {
    int rc = uvas_core_ready();
    struct uvas_space *space = rc < 0 ? NULL : uvas_space_enter_alone(space_id);
    if (!space) {
        return rc < 0 ? rc : -ESTALE;
    }
    uint32_t at = 0;
    while (at < space->party_count && atomic_load_explicit(&space->parties[at]->slot.id, memory_order_relaxed) != device) {
        at++;
    }
    struct uvas_party *party = at < space->party_count ? space->parties[at] : NULL;
    rc = party ? 0 : uvas_fail_released("device", device);
    rc = rc == 0 && party->member ? uvas_mirrors_home(party) : rc; /* first: the host may have no room for it */
    rc = rc == 0 ? leave_all(space, party) : rc;
    if (rc == 0 && party->member && (rc = uvas_mirrors_part(space, party)) < 0) { /* it took more meanwhile, for which there is no room */
        struct uvas_failure said = *uvas_last_failure();
        bring_back(space, NULL, party, &said);
    }
    if (rc == 0) {
        uvas_registry_lock();
        remove_party(space, at);
        uvas_slots_give(&uvas_party_slots, &party->slot);
        uvas_registry_unlock();
    }
    uvas_space_leave_alone(space);
    return rc;
}

/* ---- whose address is this? ------------------------------------------------------------------------------------------------------------------------------ */

#define FLAGS (UVAS_REGISTRY_HIDDEN | UVAS_REGISTRY_FOREIGN)

static void tell(const struct uvas_entry *entry, struct uvas_found *out) {
    out->id = entry->value & ~FLAGS;
    out->base = entry->base;
    out->size = entry->end - entry->base;
    out->kind = entry->value & UVAS_REGISTRY_FOREIGN ? UVAS_ADOPTION : UVAS_RESERVATION;
}

static __attribute__((noinline)) int find_in_doubt(uintptr_t address, struct uvas_found *out) {
    struct uvas_entry entry;
    if (!uvas_registry_find(address, &entry)) {
        return -ENOENT;
    }
    tell(&entry, out);
    return 0;
}

int uvas_find(uintptr_t address, struct uvas_found *out) {
    struct uvas_entry entry;
    if (!uvas_book_holds(address, &entry)) {
        return find_in_doubt(address, out);
    }
    tell(&entry, out);
    return 0;
}

int uvas_next(uintptr_t address, struct uvas_found *out) {
    struct uvas_entry entry;
    while (uvas_registry_next(address, &entry)) {
        if (!(entry.value & UVAS_REGISTRY_HIDDEN)) {
            tell(&entry, out);
            return 0;
        }
        address = entry.end;
    }
    return -ENOENT;
}

int uvas_name(uvas_id id, char *out, size_t capacity) {
    char name[UVAS_NAME_BYTES];
    uvas_registry_lock();
    const struct uvas_record *record = uvas_slots_get(&uvas_record_slots, id);
    const struct uvas_space *space = record ? NULL : uvas_slots_get(&uvas_space_slots, id);
    const struct uvas_party *party = record || space ? NULL : uvas_slots_get(&uvas_party_slots, id);
    const char *found = record ? record->name : space ? space->name : party ? party->name : NULL;
    if (found) {
        memcpy(name, found, sizeof name);
    }
    uvas_registry_unlock();
    if (!found) {
        return uvas_fail_released("object", id);
    }
    (void)snprintf(out, capacity, "%s", name);
    return 0;
}

int uvas_space_of(uvas_id id, uvas_id *out) {
    uvas_registry_lock();
    const struct uvas_record *record = uvas_slots_get(&uvas_record_slots, id);
    uvas_id space = record ? atomic_load_explicit(&record->space->slot.id, memory_order_relaxed) : 0;
    uvas_registry_unlock();
    if (!record) {
        return uvas_fail_released("reservation", id);
    }
    *out = space;
    return 0;
}

struct uvas_obstacle uvas_describe_entry(const struct uvas_entry *entry) {
    struct uvas_obstacle out = {.base = entry->base, .size = entry->end - entry->base};
    char name[UVAS_NAME_BYTES] = "", space_name[UVAS_NAME_BYTES] = "";
    const char *noun = entry->value & UVAS_REGISTRY_FOREIGN ? "what was adopted as" : "reservation";
    uvas_registry_lock();
    const struct uvas_record *record = uvas_slots_get(&uvas_record_slots, entry->value & ~FLAGS);
    if (record) {
        memcpy(name, record->name, sizeof name);
        memcpy(space_name, record->space->name, sizeof space_name);
        noun = record->state == UVAS_POISONED ? "poisoned reservation" : record->state == UVAS_QUARANTINED ? "released reservation" : noun;
    }
    uvas_registry_unlock();
    (void)snprintf(out.owner, sizeof out.owner, "%s \"%s\" of uvas space \"%s\"", noun, name[0] ? name : "(unnamed)", space_name);
    return out;
}
