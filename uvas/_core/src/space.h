/* space.h: the records behind the handles, and the rules for touching them. Private to the core's policy files:
 *
 *   core.c     once-only set-up, the gates through which every call enters, fork
 *   space.c    spaces: open, close, statistics, devices that come and go
 *   party.c    asking devices, and undoing what was asked
 *   record.c   reservations and adoptions as records
 *   reserve.c  the reserve protocol; adoptions
 *   release.c  release, retire, quarantine
 *   commit.c, decommit.c, map_fd.c: the verbs that change what lies behind a reservation, by way of change.c and host.c (change.h)
 *   pieces.c   what is committed where in one reservation
 *   lease.c    who uses the memory
 *   audit.c    audit, heal, check
 *   search.c   where to try next
 *   mirrors.c  devices with memory of their own (pager.h)
 *
 * One lock, registry.h's, guards every field below; it is never held over a system call, a callback or a touch of user memory. So work goes:
 * take the lock, look and mark, drop it, act, take it, publish. The marks are three:
 *
 *   space.working    calls at work in a space. attach, detach and close want none at work and let none in (space.exclusive)
 *   record.pins      operations inside a reservation. release first makes it unfindable and refuses new ones, then waits for these
 *   record.changes   sub-ranges under change. Overlapping changes wait for each other, disjoint ones run side by side; while a sub-range is
 *                    marked, its pieces are changed by nobody else
 *
 * Waiting is on one condition (uvas_registry_wait); whoever takes a mark away wakes all.
 */
#ifndef UVAS_SPACE_H
#define UVAS_SPACE_H

#include <stdbool.h>

#include "pieces.h"
#include "registry.h"
#include "slots.h"
#include "uvas.h"

#define UVAS_NAME_BYTES 64
#define UVAS_PROTECTIONS (UVAS_READ | UVAS_WRITE | UVAS_EXECUTE)
#define UVAS_REGISTRY_TRIES 16u /* times `attempts`: candidates that other threads of this process had claimed, which cost no system call */

enum uvas_state {
    UVAS_RESERVING,   /* claimed in the registry, hidden; one thread acts */
    UVAS_LIVE,
    UVAS_RELEASING,   /* hidden; waits for pins, then one thread acts */
    UVAS_QUARANTINED, /* released, but the kernel would not unmap: hidden, unmapped later */
    UVAS_POISONED,    /* an undo failed: hidden for ever */
};

struct uvas_change { /* on the stack of the thread that changes */
    size_t start, end;
    struct uvas_change *next;
};

struct uvas_region; /* arena.h */
bool uvas_region_guarded(const struct uvas_region *region); /* its arena puts guards between blocks */
struct uvas_mirror; /* pager.h, as are the next two: what devices with memory of their own need */
struct uvas_member;
struct uvas_domain;

struct uvas_lease {
    struct uvas_slot slot;
    struct uvas_record *record;
    size_t start, end;
    struct uvas_lease *next, *previous; /* in record->leases */
    struct uvas_lease *ended_next;      /* in the stack of ended ones; written by the one thread that ended it */
};

struct uvas_tenant { /* an arena that takes reservations of a space as it grows; the space stays as long as it is listed. Under the lock */
    const char *name;
    struct uvas_tenant *next, *previous; /* in space->tenants */
};

struct uvas_record { /* a reservation or an adoption */
    struct uvas_slot slot;
    uvas_id id; /* as slot.id while live; stays readable while it is quarantined or poisoned */
    uint32_t kind; /* enum uvas_kind */
    enum uvas_state state;
    bool retired; /* no new leases; release when the last is gone */
    bool tagged;  /* held by the space's tag; else by anonymous memory */
    bool stale;   /* the memfd may hold bytes of memory that was decommitted; set by a thread that has a part marked, never taken back */
    bool owned;   /* a device's driver occupies the range */
    struct uvas_space *space;
    uintptr_t base;
    size_t size;
    uint32_t pins;
    struct uvas_change *changes;
    struct uvas_lease *leases;
    size_t held_end;  /* uvas's own mappings lie below this offset: all of it, or what a release could not give back; its thread's alone */
    struct uvas_pieces pieces;
    struct uvas_pieces fills; /* owned: what the driver occupies, as parts of kind 0 */
    uint32_t room_wanted; /* entries that operations at work may yet add to pieces */
    struct uvas_file *file; /* the backing memfd, once there is one */
    _Atomic(struct uvas_region *) region; /* an arena's, or NULL. Written under the lock, read by anyone: regions are never freed */
    const char *arena; /* its name, or NULL */
    bool arena_alone;  /* which alone commits in it */
    struct uvas_mirror *mirror; /* NULL: no private device sees it. Made before it lives, or while the space is exclusive */
    struct uvas_record *next, *previous; /* in space->records, or in the quarantine */
    char name[UVAS_NAME_BYTES];
};

struct uvas_party { /* a device as attached; written under the lock while the space is exclusive, so readable by calls at work */
    struct uvas_slot slot;
    struct uvas_device device;
    struct uvas_member *member; /* it has memory of its own, or NULL */
    char name[UVAS_NAME_BYTES];
};

struct uvas_recent { /* where the last search in some window ended: the next one in the same window goes on below it */
    uintptr_t low, high, frontier;
    uintptr_t quiet; /* as in struct uvas_search */
};

struct uvas_space {
    struct uvas_slot slot;
    char name[UVAS_NAME_BYTES];
    uintptr_t window_base, window_end; /* the caller's, or all that is reachable */
    bool any_window;                   /* the caller named none */
    uint32_t backing_wanted;           /* 0: what the devices agree on */
    uint32_t flags, attempts;
    int tag; /* the sealed memfd, or -1 */
    struct uvas_file_id tag_file;
    uint32_t working;
    bool exclusive;
    bool closing; /* exclusive, and no lease is given any more */
    struct uvas_party *parties[UVAS_DEVICES_MAX]; /* in the order of attach; an owner first */
    uint32_t party_count;
    struct uvas_domain *domain; /* of its private devices, or NULL; written while it is exclusive */
    struct uvas_record *records;
    struct uvas_tenant *tenants;
    struct uvas_recent recent;
    struct uvas_space_stats stats;
    struct uvas_space *next, *previous; /* in the list of all */
};

/* -- core.c -- */

/* Before anything else in every public call: the platform is learnt, fork is handled, no other copy of this library holds the registry. */
int uvas_core_ready(void);

extern struct uvas_slots uvas_space_slots, uvas_record_slots, uvas_party_slots, uvas_lease_slots;
extern struct uvas_space *uvas_spaces; /* all that are open; under the lock */

/* Into a space, for a call that works beside others (under the lock, which waiting drops), or alone (takes the lock and drops it). NULL, with the
 * failure said: it is dead or closing. */
struct uvas_space *uvas_space_enter(uvas_id id);
void uvas_space_leave(struct uvas_space *space);
struct uvas_space *uvas_space_enter_alone(uvas_id id);
void uvas_space_leave_alone(struct uvas_space *space);

/* -- space.c -- */

/* An arena comes, which the space then outlives, and goes; takes the lock. 0, or it is said that the space is closed. */
int uvas_space_let(uvas_id id, struct uvas_tenant *tenant);
void uvas_space_leave_tenant(uvas_id id, struct uvas_tenant *tenant);

/* Who holds an entry of the registry, for a message. Takes the lock. */
struct uvas_obstacle uvas_describe_entry(const struct uvas_entry *entry);

/* -- party.c: every function acts without the lock, on a record that its caller has to itself. *poisoned is set where an undo failed. -- */

/* 0; -EEXIST with *obstacle: taken; anything else is said. */
int uvas_party_claim_owner(struct uvas_record *record, struct uvas_obstacle *obstacle);
int uvas_party_claim(struct uvas_record *record, struct uvas_obstacle *obstacle, bool *poisoned);
bool uvas_party_unclaim_owner(struct uvas_record *record);
/* The reservation is given back on every device, in reverse order; if one refuses, it is brought back on the others. */
int uvas_party_unclaim(struct uvas_record *record, bool *poisoned);
/* Claims and commits on one device what the reservation has; the other way round. */
int uvas_party_bring(struct uvas_record *record, struct uvas_party *party, bool *poisoned);
int uvas_party_leave(struct uvas_record *record, struct uvas_party *party, bool *poisoned);

int uvas_party_commit(struct uvas_record *record, const struct uvas_piece_entry *piece, bool *poisoned);
int uvas_party_decommit(struct uvas_record *record, const struct uvas_piece_entry *piece, bool *poisoned);
int uvas_party_protect(struct uvas_record *record, const struct uvas_piece_entry *piece, uint32_t protection, bool *poisoned);

/* What commit puts behind addresses, given the devices: one enum uvas_backing, or 0 and it is said that they agree on nothing. */
uint32_t uvas_space_backings(const struct uvas_space *space, uint32_t wanted);
/* Whether a device of the reservation's space takes memory back only as it was committed: at once. Takes the lock. */
bool uvas_party_whole(uvas_id reservation);
bool uvas_party_claims(const struct uvas_party *party); /* has a table of its own: claim and unclaim are called */
bool uvas_space_owner(const struct uvas_space *space);  /* its first device takes addresses itself */

/* -- reserve.c -- */

/* Holds addresses with mappings of ours if nobody is there: uvas_vm_reserve, and what the kernel moved and would not take back is noted. */
int uvas_hold(uintptr_t base, size_t size, int tag);

/* -- record.c: under the lock -- */

/* Enters the space and puts a new record into its list. The lock may be dropped and taken again. -ENOMEM is not said: why takes files. */
int uvas_record_make(uvas_id space_id, uint32_t kind, size_t size, const char *name, struct uvas_record **out);
void uvas_record_publish(struct uvas_record *record); /* it is what was asked for: lives, is found and counted; its space is left */
void uvas_record_unlink(struct uvas_record *record);  /* off its space's list */
void uvas_record_strike(struct uvas_record *record);  /* and no longer counted */
/* An undo failed: never used again, and the failure that is being said names it. */
void uvas_record_poison(struct uvas_record *record);      /* off its space's list already */
void uvas_record_poison_live(struct uvas_record *record);

struct uvas_remains { /* of a record that was forgotten */
    struct uvas_piece_entry *pieces, *fills;
};
/* Out of the registry, its id dead, its parts let go. The remains are to be buried. */
struct uvas_remains uvas_record_forget(struct uvas_record *record);
void uvas_remains_bury(struct uvas_remains remains); /* without the lock: to free and to close may ask the kernel */

/* -- release.c -- */

/* The record is RELEASING, without pins: ends it. Its space was entered, and is left. */
int uvas_record_release(struct uvas_record *record);
/* Gives back what of the record the host holds. Where the kernel will not: true, and the record is to be put into quarantine. */
bool uvas_record_keeps(struct uvas_record *record);
void uvas_quarantine_add(struct uvas_record *record); /* under the lock */
/* A mapping of ours that the kernel moved and would not take back. If even the note of it cannot be made, it stays mapped, by nobody's name. */
void uvas_quarantine_stray(uintptr_t base, size_t size);
void uvas_quarantine_sweep(void); /* tries again to give back what the kernel would not take */
uint64_t uvas_quarantine_bytes(void); /* under the lock */
void uvas_quarantine_forget(void); /* the child of a fork; under the lock */

/* -- commit.c, decommit.c and map_fd.c: for arenas -- */

/* decommit and map_fd for who holds the lease himself, and sees to it that nobody uses the memory. */
int uvas_decommit_leased(uvas_id reservation, size_t offset, size_t size);
/* Memory gone, zeros when it is touched again: all of it is committed, ANONYMOUS or MEMFD. 0 or -errno; nothing is said. */
int uvas_empty_leased(uvas_id reservation, size_t offset, size_t size);
/* The same where it may be written over instead: pages that a device has registered do not go. */
int uvas_zero_leased(uvas_id reservation, size_t offset, size_t size);
int uvas_map_fd_leased(uvas_id reservation, const struct uvas_mapping *mapping);
/* commit for the arena that alone commits there: memory to be read and written. */
int uvas_commit_leased(uvas_id reservation, size_t offset, size_t size);

/* -- lease.c -- */

/* An arena's: the reservation, on which nobody else has a lease and in which nothing is committed, stays until it ends. all: nobody else works in
 * it either. uvas_find_allocation finds the region by it. `name` lives as long as the lease. */
int uvas_lease_region(uvas_id reservation, bool all, struct uvas_region *region, const char *name, uvas_id *out);
void uvas_unlease_region(uvas_id reservation, uvas_id lease);
bool uvas_reservation_moves(uvas_id reservation); /* a device with memory of its own sees it. Takes the lock */
/* The arena's region that holds an address, or NULL. No lock. */
struct uvas_region *uvas_region_at(uintptr_t address);

void uvas_leases_drain(void); /* under the lock: takes off those that have ended */
void uvas_leases_forget(void); /* the child of a fork; under the lock */
bool uvas_leases_overlap(const struct uvas_record *record, size_t start, size_t end); /* under the lock, drained */
/* Says that leases stand in the way: -EBUSY. Under the lock. */
int uvas_leases_busy(const struct uvas_record *record, size_t offset, size_t size);

#endif
