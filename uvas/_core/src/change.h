/* change.h: a change of what lies behind held addresses. Shared by the verbs that make one:
 *
 *   change.c    a change begins and ends: pins, marks, plans
 *   host.c      what the host maps there
 *   commit.c    commit, protect
 *   decommit.c  decommit, and memory emptied in place
 *   map_fd.c    map_fd
 *
 * Every verb goes the same way: pin the reservation and mark the sub-range (uvas_change_begin), copy what is there into a *plan*, act part by part
 * outside the lock with an undo for each step, publish the new parts, unmark. While it is marked nobody else changes the sub-range, so the plan stays
 * true. The destructive mapping of vm.c is called in host.c and in audit.c only, on ranges so marked.
 *
 * Order within a verb: what can be undone first, what cannot last. Overlaying private memory loses its contents; so does punching a hole.
 */
#ifndef UVAS_CHANGE_H
#define UVAS_CHANGE_H

#include "space.h"

/* -- change.c -- */

enum uvas_tolerance { /* beside whom a change may happen */
    UVAS_BESIDE_NOBODY, /* it takes memory away: no lease there */
    UVAS_BESIDE_ARRAYS, /* it brings memory: any lease, but no arena that alone commits there, which believes that fresh pages are zero */
    UVAS_BESIDE_ALL,    /* who uses the memory is the caller's to know */
};

/* Pins a live reservation and marks a part of it; waits for changes that overlap. NULL: said. The lock is free before and after. */
struct uvas_record *uvas_change_begin(uvas_id id, size_t offset, size_t size, enum uvas_tolerance beside, struct uvas_change *change, int *rc);
void uvas_change_end(struct uvas_record *record, struct uvas_change *change); /* under the lock */

struct uvas_plan {
    struct uvas_record *record;
    struct uvas_piece_entry *parts; /* of the marked range, gaps included, in order */
    size_t count;
    struct uvas_piece_entry few[8]; /* nearly always enough */
};

/* Copies what is marked. 0, or it is said that there is no memory. */
int uvas_plan_make(struct uvas_record *record, const struct uvas_change *change, struct uvas_plan *plan);
void uvas_plan_drop(struct uvas_plan *plan);
/* Under the lock: the part is from now on what it says (NULL: held, without memory). Statistics follow. */
void uvas_plan_publish(const struct uvas_plan *plan, const struct uvas_piece_entry *was, const struct uvas_piece_entry *is);
/* Poisons if an undo failed, publishes otherwise nothing; ends the change either way, and gives back rc. */
int uvas_plan_fail(struct uvas_plan *plan, struct uvas_change *change, bool poisoned, int rc);
/* Says that somebody else has taken the part. */
int uvas_plan_refuse_lost(const struct uvas_plan *plan, const struct uvas_piece_entry *part);

static inline size_t uvas_part_size(const struct uvas_piece_entry *part) {
    return part->end - part->start;
}

static inline uintptr_t uvas_part_base(const struct uvas_plan *plan, const struct uvas_piece_entry *part) {
    return plan->record->base + part->start;
}

/* -- host.c: on a part that is marked. 0 or -errno; nothing is said unless it says so -- */

int uvas_host_hold(const struct uvas_plan *plan, const struct uvas_piece_entry *part); /* no memory any more, in one atomic mapping */
/* Maps what the part says; nothing for what a driver maps. */
int uvas_host_map(const struct uvas_plan *plan, const struct uvas_piece_entry *part, bool *poisoned);
int uvas_host_try(const struct uvas_piece_entry *part); /* whether its file would be mapped */
/* Memory where none was: a mapping over the held addresses, or, where guards went up for want of one, the guards taken down. What fails is said. */
int uvas_host_put(const struct uvas_plan *plan, const struct uvas_piece_entry *was, const struct uvas_piece_entry *is, bool *poisoned);
/* Undoes uvas_host_put; what was written meanwhile is nobody's. */
int uvas_host_take(const struct uvas_plan *plan, const struct uvas_piece_entry *was, const struct uvas_piece_entry *is);
/* The holes are punched last: nothing brings their contents back. If one cannot be, which is said, those before it are gone, the mappings are as they
 * were. */
int uvas_host_punch(const struct uvas_plan *plan);
/* Says which call failed on that part, and for which limit if it was one. */
int uvas_host_fail(const struct uvas_plan *plan, const struct uvas_piece_entry *part, const char *call, int rc);

/* -- decommit.c -- */

/* Devices first: they can be brought back. *done: the parts that are off the devices. */
int uvas_decommit_devices(struct uvas_plan *plan, size_t *done, bool *poisoned);
void uvas_recommit_devices(struct uvas_plan *plan, size_t done, bool *poisoned);

#endif
