/* party.c: asking the devices of a space, and undoing what was asked. No lock is held here; the list of parties cannot change while a call is at
 * work in the space. A device answers 0, or "taken" (-EEXIST, to a claim only), or "broken" (anything else), and broken outweighs taken: to go on
 * searching with a broken device would only hide it. */
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "failure.h"
#include "mirrors.h"
#include "vm.h"

bool uvas_party_claims(const struct uvas_party *party) {
    return party->device.placement == UVAS_CLAIMS;
}

static bool owns(const struct uvas_party *party) {
    return party->device.placement == UVAS_OWNS;
}

bool uvas_space_owner(const struct uvas_space *space) {
    return space->party_count > 0 && owns(space->parties[0]);
}

/* A device that could not undo what it had begun says so in its answer. */
static bool unrecoverable(int rc) {
    return rc <= -UVAS_UNRECOVERABLE;
}

bool uvas_party_whole(uvas_id reservation) {
    bool whole = false;
    uvas_registry_lock();
    const struct uvas_record *record = uvas_slots_get(&uvas_record_slots, reservation);
    for (uint32_t i = 0; record && i < record->space->party_count; i++) {
        const struct uvas_party *party = record->space->parties[i];
        whole |= owns(party) || party->device.placement == UVAS_REGISTERS;
    }
    uvas_registry_unlock();
    return whole;
}

static struct uvas_backing_info backing_of(const struct uvas_piece_entry *piece) {
    return (struct uvas_backing_info){.kind = piece->kind,
                                      .shared = piece->shared,
                                      .descriptor = piece->file ? piece->file->fd : -1,
                                      .offset = piece->offset};
}

/* ---- claims ------------------------------------------------------------------------------------------------------------------------------------- */

static int ask(struct uvas_party *party, const struct uvas_record *record, struct uvas_obstacle *obstacle) {
    struct uvas_obstacle seen = {0};
    int rc = party->device.claim(party->device.context, record->base, record->size, &seen);
    if (rc == -EEXIST) {
        *obstacle = seen;
        obstacle->owner[sizeof obstacle->owner - 1] = 0;
        if (!obstacle->owner[0]) {
            (void)snprintf(obstacle->owner, sizeof obstacle->owner, "device %s", party->name);
        }
    }
    return rc == 0 || rc == -EEXIST ? rc : uvas_fail_device(record->base, record->size, party->name, "claim", rc);
}

int uvas_party_claim_owner(struct uvas_record *record, struct uvas_obstacle *obstacle) {
    return uvas_space_owner(record->space) ? ask(record->space->parties[0], record, obstacle) : 0;
}

static bool unclaim(const struct uvas_party *party, const struct uvas_record *record) {
    return party->device.unclaim(party->device.context, record->base, record->size) == 0;
}

bool uvas_party_unclaim_owner(struct uvas_record *record) {
    return !uvas_space_owner(record->space) || unclaim(record->space->parties[0], record);
}

/* All are asked before the first answer is waited for. Every one that was started is also asked for its answer. */
int uvas_party_claim(struct uvas_record *record, struct uvas_obstacle *obstacle, bool *poisoned) {
    const struct uvas_space *space = record->space;
    bool claimed[UVAS_DEVICES_MAX] = {false};
    int outcome = 0;
    for (uint32_t i = 0; i < space->party_count; i++) {
        const struct uvas_device *device = &space->parties[i]->device;
        if (uvas_party_claims(space->parties[i]) && device->start_claim) {
            device->start_claim(device->context, record->base, record->size);
        }
    }
    for (uint32_t i = 0; i < space->party_count; i++) {
        struct uvas_party *party = space->parties[i];
        bool wanted = uvas_party_claims(party) && (outcome == 0 || party->device.start_claim);
        int rc = wanted ? ask(party, record, obstacle) : 0;
        claimed[i] = wanted && rc == 0;
        *poisoned |= unrecoverable(rc);
        outcome = rc != 0 && (outcome == 0 || outcome == -EEXIST) ? rc : outcome;
    }
    outcome = outcome == 0 ? uvas_mirrors_claim(record) : outcome;
    for (uint32_t i = space->party_count; outcome != 0 && i-- > 0;) {
        if (claimed[i] && !unclaim(space->parties[i], record)) {
            *poisoned = true;
        }
    }
    return outcome;
}

/* ---- what is committed ---------------------------------------------------------------------------------------------------------------------------- */

/* The kernel copies a pinned page for the child of a fork, or for its parent: private memory that is registered stays with this process. */
static bool pins(const struct uvas_party *party, const struct uvas_piece_entry *piece) {
    return party->device.placement == UVAS_REGISTERS && piece->kind == UVAS_BACKING_ANONYMOUS;
}

static bool pinned_by_others(const struct uvas_party *party, const struct uvas_record *record, const struct uvas_piece_entry *piece) {
    bool pinned = false;
    for (uint32_t i = 0; i < record->space->party_count; i++) {
        pinned |= record->space->parties[i] != party && pins(record->space->parties[i], piece);
    }
    return pinned;
}

/* Whether the device has a copy of its own of the part, rather than what the host has. */
static bool mirrored(const struct uvas_party *party, const struct uvas_piece_entry *piece) {
    return party->member && piece->kind == UVAS_BACKING_ANONYMOUS;
}

static int decommit_on(const struct uvas_party *party, const struct uvas_record *record, const struct uvas_piece_entry *piece) {
    uintptr_t base = record->base + piece->start;
    size_t size = piece->end - piece->start;
    int rc = party->device.decommit(party->device.context, base, size);
    if (rc == 0 && mirrored(party, piece)) {
        uvas_mirrors_unwatch(record, party, piece->start, piece->end);
    }
    if (rc == 0 && pins(party, piece) && !pinned_by_others(party, record, piece)) {
        (void)uvas_vm_inherit(base, size, true); /* it may stay on the host, if the device leaves */
    }
    return rc;
}

static int commit_on(const struct uvas_party *party, const struct uvas_record *record, const struct uvas_piece_entry *piece) {
    struct uvas_backing_info backing = backing_of(piece);
    uintptr_t base = record->base + piece->start;
    size_t size = piece->end - piece->start;
    bool own = mirrored(party, piece);
    if (own) {
        uvas_mirrors_backing(record, party, piece->start, &backing);
    }
    int rc = pins(party, piece) ? uvas_vm_inherit(base, size, false) : 0;
    rc = rc == 0 ? party->device.commit(party->device.context, base, size, &backing, piece->protection) : rc;
    if (rc != 0 && pins(party, piece) && !pinned_by_others(party, record, piece)) {
        (void)uvas_vm_inherit(base, size, true);
    }
    int watched = rc == 0 && own ? uvas_mirrors_watch(record, party, piece->start, piece->end) : 0;
    if (watched < 0 && decommit_on(party, record, piece) != 0) {
        watched -= UVAS_UNRECOVERABLE;
    }
    return rc != 0 ? rc : watched;
}

static int protect_on(const struct uvas_party *party, const struct uvas_record *record, const struct uvas_piece_entry *piece, uint32_t protection) {
    return party->device.protect(party->device.context, record->base + piece->start, piece->end - piece->start, protection);
}

int uvas_party_commit(struct uvas_record *record, const struct uvas_piece_entry *piece, bool *poisoned) {
    const struct uvas_space *space = record->space;
    for (uint32_t i = 0; i < space->party_count; i++) {
        int rc = commit_on(space->parties[i], record, piece);
        if (rc != 0) {
            const char *name = space->parties[i]->name;
            *poisoned |= unrecoverable(rc);
            while (i-- > 0) {
                *poisoned |= decommit_on(space->parties[i], record, piece) != 0;
            }
            return uvas_fail_device(record->base + piece->start, piece->end - piece->start, name, "commit", rc);
        }
    }
    int rc = record->mirror && piece->kind == UVAS_BACKING_ANONYMOUS ? uvas_mirrors_commit(record, piece->start, piece->end) : 0;
    for (uint32_t i = rc < 0 ? space->party_count : 0; i-- > 0;) {
        *poisoned |= decommit_on(space->parties[i], record, piece) != 0;
    }
    return rc;
}

int uvas_party_decommit(struct uvas_record *record, const struct uvas_piece_entry *piece, bool *poisoned) {
    const struct uvas_space *space = record->space;
    for (uint32_t i = 0; i < space->party_count; i++) {
        int rc = decommit_on(space->parties[i], record, piece);
        if (rc != 0) {
            const char *name = space->parties[i]->name;
            *poisoned |= unrecoverable(rc);
            while (i-- > 0) {
                *poisoned |= commit_on(space->parties[i], record, piece) != 0;
            }
            return uvas_fail_device(record->base + piece->start, piece->end - piece->start, name, "decommit", rc);
        }
    }
    return 0;
}

int uvas_party_protect(struct uvas_record *record, const struct uvas_piece_entry *piece, uint32_t protection, bool *poisoned) {
    const struct uvas_space *space = record->space;
    for (uint32_t i = 0; i < space->party_count; i++) {
        int rc = protect_on(space->parties[i], record, piece, protection);
        if (rc != 0) {
            const char *name = space->parties[i]->name;
            *poisoned |= unrecoverable(rc);
            while (i-- > 0) {
                *poisoned |= protect_on(space->parties[i], record, piece, piece->protection) != 0;
            }
            return uvas_fail_device(record->base + piece->start, piece->end - piece->start, name, "protect", rc);
        }
    }
    return 0;
}

/* ---- a whole reservation on one device ---------------------------------------------------------------------------------------------------------------- */

int uvas_party_bring(struct uvas_record *record, struct uvas_party *party, bool *poisoned) {
    struct uvas_obstacle obstacle = {0};
    bool claims = uvas_party_claims(party);
    if (claims && party->device.start_claim) {
        party->device.start_claim(party->device.context, record->base, record->size);
    }
    int rc = claims ? ask(party, record, &obstacle) : 0;
    if (rc == -EEXIST) {
        return uvas_fail_in_use(record->base, record->size, &obstacle);
    }
    if (rc == 0 && party->member && (rc = uvas_mirrors_claim_one(record, party)) < 0) {
        *poisoned |= !unclaim(party, record);
        return rc;
    }
    for (size_t i = 0; rc == 0 && i < record->pieces.count; i++) {
        const struct uvas_piece_entry *piece = &record->pieces.list[i];
        int answer = uvas_piece_committed(piece) ? commit_on(party, record, piece) : 0;
        if (answer == 0 && uvas_piece_committed(piece) && mirrored(party, piece)) {
            answer = uvas_mirrors_commit(record, piece->start, piece->end); /* where the directory knows it already, nothing changes */
        }
        if (answer != 0) {
            rc = uvas_fail_device(record->base + piece->start, piece->end - piece->start, party->name, "commit", answer);
            *poisoned |= unrecoverable(answer);
            bool undone = claims ? unclaim(party, record) : true;
            while (!claims && i-- > 0) {
                undone &= !uvas_piece_committed(&record->pieces.list[i]) || decommit_on(party, record, &record->pieces.list[i]) == 0;
            }
            *poisoned |= !undone;
        }
    }
    return rc;
}

/* One device gives the reservation back: its claim with all that is in it, or, where it has no claim, each part. */
int uvas_party_leave(struct uvas_record *record, struct uvas_party *party, bool *poisoned) {
    int rc = 0;
    bool claims = uvas_party_claims(party) || owns(party);
    if (claims) {
        rc = party->device.unclaim(party->device.context, record->base, record->size);
    }
    for (size_t i = 0; rc == 0 && !claims && i < record->pieces.count; i++) {
        const struct uvas_piece_entry *piece = &record->pieces.list[i];
        rc = uvas_piece_committed(piece) ? decommit_on(party, record, piece) : 0;
        while (rc != 0 && i-- > 0) {
            piece = &record->pieces.list[i];
            *poisoned |= uvas_piece_committed(piece) && commit_on(party, record, piece) != 0;
        }
    }
    *poisoned |= unrecoverable(rc);
    return rc == 0 ? 0 : uvas_fail_device(record->base, record->size, party->name, "unclaim", rc);
}

/* An owner's mappings take with them what those have who follow. */
int uvas_party_unclaim(struct uvas_record *record, bool *poisoned) {
    const struct uvas_space *space = record->space;
    for (uint32_t i = space->party_count; i-- > 0;) {
        bool follows = uvas_space_owner(space) && space->parties[i]->device.placement == UVAS_FOLLOWS;
        int rc = follows ? 0 : uvas_party_leave(record, space->parties[i], poisoned);
        if (rc != 0) {
            struct uvas_failure first = *uvas_last_failure();
            for (uint32_t back = i + 1; back < space->party_count; back++) {
                follows = uvas_space_owner(space) && space->parties[back]->device.placement == UVAS_FOLLOWS;
                *poisoned |= !follows && uvas_party_bring(record, space->parties[back], poisoned) != 0;
            }
            *uvas_fail(first.kind, first.code) = first;
            return rc;
        }
    }
    return 0;
}

/* ---- what they agree on --------------------------------------------------------------------------------------------------------------------------------- */

static const char *backing_name(uint32_t kind) {
    return kind == UVAS_BACKING_ANONYMOUS ? "anonymous" : kind == UVAS_BACKING_MEMFD ? "memfd" : kind == UVAS_BACKING_DRIVER ? "driver" : "anonymous or memfd";
}

uint32_t uvas_space_backings(const struct uvas_space *space, uint32_t wanted) {
    uint32_t possible = uvas_space_owner(space) ? UVAS_BACKING_DRIVER : UVAS_BACKING_ANONYMOUS | UVAS_BACKING_MEMFD;
    const char *narrowed_by = uvas_space_owner(space) ? space->parties[0]->name : "this space";
    possible &= wanted ? wanted : UINT32_MAX;
    for (uint32_t i = 0; i < space->party_count; i++) {
        const struct uvas_party *party = space->parties[i];
        uint32_t both = possible & party->device.backings;
        if (!both) {
            (void)uvas_fail_unsupported("a common backing", "use devices that share one, or two spaces",
                                        "device %s cannot live with the %s memory that %s needs", party->name, backing_name(possible), narrowed_by);
            return 0;
        }
        narrowed_by = both != possible ? party->name : narrowed_by;
        possible = both;
    }
    if (!possible) {
        (void)uvas_fail_unsupported("a common backing", "let the space choose its backing", "%s maps memory of its driver's only", narrowed_by);
    }
    return possible & (uint32_t)-(int32_t)possible; /* the lowest bit: anonymous before memfd */
}
