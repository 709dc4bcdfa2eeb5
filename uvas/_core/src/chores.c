/* chores.c: doing what a request asks, a part at a time. Runs on the pager's thread.
 *
 * What takes long (moving, bringing home) does at most UVAS_MOVE_BYTES and comes back for more; what is quick is done at once.
 */
#include <errno.h>
#include <string.h>

#include "pager.h"
#include "vm.h"

#define UNSHARE_TRIES 8u    /* of pages that answer EBUSY, each after another thread had a go at ending a sharing */
#define UNSHARE_WAIT_NS 100000

/* ---- members, mirrors, stores ------------------------------------------------------------------------------------------------------------ */

static int join(struct uvas_errand *request) {
    struct uvas_member *member = request->member;
    if (uvas_pager.member_count == UVAS_MEMBERS_MAX) {
        return -E2BIG;
    }
    int rc = uvas_watch_add(uvas_pager.watch, member->faults, uvas_watched(member, UVAS_WATCHED_FAULTS));
    rc = rc < 0 || member->process < 0 ? rc : uvas_watch_add(uvas_pager.watch, member->process, uvas_watched(member, UVAS_WATCHED_PROCESS));
    if (rc < 0) {
        uvas_watch_remove(uvas_pager.watch, member->faults);
        return rc;
    }
    request->spare = uvas_residency_join(member, &rc);
    if (rc < 0) {
        uvas_unwatch(member);
        return rc;
    }
    uvas_pager.members[uvas_pager.member_count++] = member;
    member->domain->members[member->party] = member;
    return 0;
}

static void part(struct uvas_member *member) {
    uvas_unwatch(member);
    uint32_t at = 0;
    while (at < uvas_pager.member_count && uvas_pager.members[at] != member) {
        at++;
    }
    if (at < uvas_pager.member_count) {
        uvas_pager.members[at] = uvas_pager.members[--uvas_pager.member_count];
    }
    uvas_residency_part(member);
    member->domain->members[member->party] = NULL;
    uvas_unpark(NULL, member);
}

static void add(struct uvas_errand *request) {
    struct uvas_mirror *mirror = request->mirror;
    if (request->table_room > uvas_pager.mirror_room) {
        struct uvas_mirror **old[2] = {uvas_pager.mirrors, uvas_pager.numbered};
        for (uint32_t i = 0; i < uvas_pager.mirror_room; i++) {
            request->tables[0][i] = uvas_pager.mirrors[i];
            request->tables[1][i] = uvas_pager.numbered[i];
        }
        uvas_pager.mirrors = request->tables[0];
        uvas_pager.numbered = request->tables[1];
        uvas_pager.mirror_room = request->table_room;
        request->tables[0] = old[0];
        request->tables[1] = old[1];
    }
    uint32_t at = uvas_pager.mirror_count++, number = 0;
    while (at > 0 && uvas_pager.mirrors[at - 1]->base > mirror->base) {
        uvas_pager.mirrors[at] = uvas_pager.mirrors[at - 1];
        at--;
    }
    uvas_pager.mirrors[at] = mirror;
    while (uvas_pager.numbered[number]) {
        number++;
    }
    uvas_pager.numbered[number] = mirror;
    mirror->number = number;
}

/* Memory that lives on without devices is watched no more: what was protected may be written, what is not there is the kernel's to fill. */
static void disarm(struct uvas_mirror *mirror) {
    for (uint32_t g = 0; mirror->armed && g < mirror->granules;) {
        if (!mirror->blocks[g / UVAS_BLOCK_GRANULES]) {
            g = (g / UVAS_BLOCK_GRANULES + 1) * UVAS_BLOCK_GRANULES;
            continue;
        }
        struct uvas_extent run = uvas_extent_from(mirror, g, mirror->granules - g);
        if (run.word & UVAS_COMMITTED) {
            (void)uvas_fault_unregister(uvas_pager.faults, uvas_extent_base(&run), uvas_extent_bytes(&run));
        }
        g += run.count;
    }
}

static void take_off(struct uvas_mirror *mirror, bool lives_on) {
    if (lives_on) {
        disarm(mirror);
    }
    uint32_t at = 0;
    while (uvas_pager.mirrors[at] != mirror) {
        at++;
    }
    memmove(&uvas_pager.mirrors[at], &uvas_pager.mirrors[at + 1], (--uvas_pager.mirror_count - at) * sizeof *uvas_pager.mirrors);
    for (uint32_t party = 0; party < UVAS_PARTIES; party++) {
        struct uvas_member *member = mirror->domain->members[party];
        if (member) {
            uvas_residency_forget(member, mirror);
            uvas_streams_forget(member, mirror);
        }
    }
    uvas_unpark(mirror, NULL);
    uvas_pager.numbered[mirror->number] = NULL;
}

/* ---- memory that comes and goes ---------------------------------------------------------------------------------------------------------------- */

static struct uvas_extent all_of(struct uvas_mirror *mirror, uint32_t first, uint32_t end) {
    return (struct uvas_extent){.mirror = mirror, .first = first, .count = end - first};
}

/* Memory of the host's that is there again after all (a decommit that failed) keeps its words: devices may hold it. */
static int commit(struct uvas_errand *request) {
    struct uvas_mirror *mirror = request->mirror;
    struct uvas_extent run = all_of(mirror, request->first, request->end);
    bool fresh = !(uvas_granule_word(&mirror->directory[request->first]) & UVAS_COMMITTED);
    int rc = fresh && mirror->armed ? uvas_fault_register(uvas_pager.faults, uvas_extent_base(&run), uvas_extent_bytes(&run), false) : 0;
    for (uint32_t party = 1; fresh && party < UVAS_PARTIES; party++) { /* a worker that touched it too early has put a page there */
        if (mirror->stores[party].alias) {
            mirror->stores[party].stale |= uvas_vm_punch(mirror->stores[party].fd, (int64_t)uvas_extent_offset(&run), uvas_extent_bytes(&run)) < 0;
        }
    }
    if (rc == 0 && fresh) {
        uvas_publish(&run, UVAS_COMMITTED | (mirror->armed ? 0u : UVAS_MODIFIED | 1u << UVAS_HOST));
        memset(&mirror->blocks[run.first / UVAS_BLOCK_GRANULES], 1, (request->end - 1) / UVAS_BLOCK_GRANULES - run.first / UVAS_BLOCK_GRANULES + 1);
    }
    uvas_wake(mirror, request->first, request->end); /* a device may have been quicker than we */
    return rc;
}

static void link_stretch(struct uvas_stretch **list, struct uvas_stretch *stretch) {
    stretch->next = *list;
    *list = stretch;
}

/* What is not in the list has gone with a mirror before this one. */
static void unlink_stretch(struct uvas_stretch **list, struct uvas_stretch *stretch) {
    while (*list && *list != stretch) {
        list = &(*list)->next;
    }
    *list = *list ? stretch->next : NULL;
}

/* The host's mapping is gone, and the devices': so is all that they held. */
static void forget(struct uvas_mirror *mirror, uint32_t first, uint32_t end) {
    for (uint32_t g = first; g < end;) {
        struct uvas_extent run = uvas_extent_from(mirror, g, end - g);
        uint32_t holders = uvas_holders(run.word);
        for (uint32_t party = 1; holders >> party != 0; party++) {
            if (holders >> party & 1) {
                uvas_residency_went(mirror->domain->members[party], &run);
            }
        }
        g += run.count;
    }
    struct uvas_extent whole = all_of(mirror, first, end);
    for (uint32_t party = 1; party < UVAS_PARTIES; party++) {
        struct uvas_store *store = &mirror->stores[party];
        if (store->alias) { /* one call for all of it */
            store->stale |= uvas_vm_punch(store->fd, (int64_t)uvas_extent_offset(&whole), uvas_extent_bytes(&whole)) < 0;
        }
    }
    uvas_publish(&whole, 0);
}

/* ---- moving ---------------------------------------------------------------------------------------------------------------------------------- */

static void stayed(struct uvas_errand *request, uint32_t first, uint32_t count, int why) {
    struct uvas_stretch *last = request->stayed_count > 0 ? &request->stayed[(request->stayed_count < UVAS_STAYED_MAX ? request->stayed_count : UVAS_STAYED_MAX) - 1] : NULL;
    if (last && last->end == first) {
        last->end = first + count;
    } else {
        if (request->stayed_count < UVAS_STAYED_MAX) {
            request->stayed[request->stayed_count] = (struct uvas_stretch){.first = first, .end = first + count};
        }
        request->stayed_count++;
    }
    request->why = why;
    request->first = first + count;
    request->tries = 0;
}

/* Whoever was advised to have a copy gets one; with READ_MOSTLY everybody keeps his. */
static bool duplicates(const struct uvas_errand *request, const struct uvas_extent *run) {
    uint32_t advice = atomic_load_explicit(&run->mirror->advice[run->first], memory_order_relaxed);
    bool accessed = !(advice & UVAS_ADVICE_PREFERRED) && (advice & UVAS_ADVICE_ACCESSED & ~(1u << request->party)) != 0;
    return (advice & UVAS_ADVICE_READ_MOSTLY) || accessed;
}

static int move_run(struct uvas_errand *request, const struct uvas_extent *run, bool write) {
    struct uvas_member *member = run->mirror->domain->members[request->party];
    struct uvas_extent range = all_of(request->mirror, request->from, request->end);
    bool gains = request->party != UVAS_HOST && !(run->word >> request->party & 1);
    int rc = gains ? uvas_residency_room(member, run, &range) : 0;
    rc = rc < 0 ? rc : uvas_move(run, request->party, write);
    if (rc == 0) {
        request->moved += gains || request->party == UVAS_HOST ? uvas_extent_bytes(run) : 0;
        uvas_keep(run);
    }
    return rc;
}

/* A run that will not go as a whole goes in halves, a granule that will not go alone is tried for a while. */
static void refused(struct uvas_errand *request, const struct uvas_extent *run, int rc) {
    if (run->count > 1) {
        request->most = run->count / 2;
    } else if ((rc == -EBUSY || rc == -EAGAIN) && request->tries++ < UNSHARE_TRIES) {
        if (rc == -EBUSY && uvas_move_stuck()) {
            uvas_unshare(uvas_move_stuck());
        }
        uvas_pause_ns(UNSHARE_WAIT_NS);
    } else {
        stayed(request, run->first, 1, rc);
    }
}

static bool move_some(struct uvas_errand *request) {
    struct uvas_mirror *mirror = request->mirror;
    struct uvas_member *member = mirror->domain->members[request->party];
    if (!member || member->dead) {
        request->rc = -ESRCH;
        return true;
    }
    if (!mirror->armed && (request->rc = uvas_arm(mirror)) < 0) {
        return true;
    }
    if (uvas_pager.pausing && request->party != UVAS_HOST) {
        return false;
    }
    for (size_t bytes = 0; request->first < request->end && bytes < UVAS_MOVE_BYTES && request->rc == 0;) {
        uint32_t left = request->end - request->first;
        struct uvas_extent run = uvas_extent_from(mirror, request->first, left < request->most ? left : request->most);
        bool write = request->write && !(request->advised && duplicates(request, &run));
        if (uvas_within(mirror->suspended, run.first)) {
            return false; /* whoever takes it away will be done soon */
        }
        if (!(run.word & UVAS_COMMITTED) || (run.word & UVAS_BYTES_LOST) || (request->party != UVAS_HOST && uvas_within(mirror->pinned, run.first))) {
            stayed(request, run.first, run.count, run.word & UVAS_BYTES_LOST ? -EIO : run.word & UVAS_COMMITTED ? -EBUSY : -ENOMEM);
            continue;
        }
        if (uvas_directory_next(run.word, request->party, write).steps == 0) {
            request->first += run.count;
            bytes += uvas_extent_bytes(&run) / 64; /* looking is not free */
            continue;
        }
        int rc = move_run(request, &run, write);
        if (rc < 0) {
            if (rc == -ESRCH || (rc == -ENOMEM && run.count == 1)) { /* its process has ended, which is heard of a moment later */
                request->rc = rc;
                break;
            }
            refused(request, &run, rc);
            return false;
        }
        request->first += run.count;
        request->tries = 0;
        request->most = 2 * run.count > request->most ? 2 * run.count : request->most;
        bytes += uvas_extent_bytes(&run);
    }
    return request->first >= request->end || request->rc != 0;
}

/* ---- home -------------------------------------------------------------------------------------------------------------------------------------- */

static int bring_run_home(struct uvas_member *member, const struct uvas_extent *run, bool leaves) {
    uint32_t holders = uvas_holders(run->word);
    if (!leaves) { /* devices alone may share it: it is enough that the host has a copy, and needed */
        return holders & 1u << UVAS_HOST ? 0 : uvas_move(run, UVAS_HOST, false);
    }
    return holders == 1u << member->party ? uvas_move(run, UVAS_HOST, true) : uvas_move_drop(run, member->party);
}

/* The first mirror at `base` or above, of this member's, or NULL. */
static struct uvas_mirror *mirror_from(const struct uvas_member *member, uintptr_t base) {
    for (uint32_t i = 0; i < uvas_pager.mirror_count; i++) {
        struct uvas_mirror *mirror = uvas_pager.mirrors[i];
        if (mirror->base >= base && mirror->domain == member->domain && mirror->stores[member->party].alias) {
            return mirror;
        }
    }
    return NULL;
}

/* The next part of one mirror. As uvas_bring_home; *bytes: how much it was. */
static int bring_part_home(struct uvas_member *member, struct uvas_mirror *mirror, bool leaves, uint32_t *first, size_t *bytes) {
    while (*first < mirror->granules && *bytes < UVAS_MOVE_BYTES) {
        uint32_t left = UVAS_BLOCK_GRANULES - *first % UVAS_BLOCK_GRANULES;
        if (!mirror->blocks[*first / UVAS_BLOCK_GRANULES]) {
            *first += left;
            continue;
        }
        struct uvas_extent run = uvas_extent_from(mirror, *first, left);
        bool has = (run.word >> member->party & 1) != 0;
        if (has && uvas_within(mirror->suspended, run.first)) {
            return 0; /* whoever takes it away will be done soon */
        }
        int rc = has ? bring_run_home(member, &run, leaves) : 0;
        *first += run.count;
        *bytes += has ? uvas_extent_bytes(&run) : 0;
        if (rc < 0 && uvas_granule_word(&mirror->directory[run.first]) >> member->party & 1) { /* otherwise it is lost, and is told so */
            return rc;
        }
    }
    return *first >= mirror->granules;
}

int uvas_bring_home(struct uvas_member *member, bool leaves, uintptr_t *at, uint32_t *first) {
    struct uvas_mirror *mirror;
    for (size_t bytes = 0; (mirror = mirror_from(member, *at)) != NULL;) {
        *first = mirror->base == *at ? *first : 0; /* the one that it was at has gone */
        *at = mirror->base;
        int rc = bring_part_home(member, mirror, leaves, first, &bytes);
        if (rc <= 0) {
            return rc;
        }
        *at = mirror->base + 1;
        *first = 0;
    }
    return 1;
}

/* Pins live with the mirrors, and those go with the last device. */
static bool pinned_somewhere(const struct uvas_member *member) {
    bool pinned = false, last = true;
    for (uint32_t party = 1; party < UVAS_PARTIES; party++) {
        last &= party == member->party || !member->domain->members[party];
    }
    for (uint32_t i = 0; last && i < uvas_pager.mirror_count; i++) {
        pinned |= uvas_pager.mirrors[i]->domain == member->domain && uvas_pager.mirrors[i]->pinned;
    }
    return pinned;
}

static bool leave(struct uvas_errand *request) {
    if (pinned_somewhere(request->member)) {
        request->rc = -EBUSY;
        return true;
    }
    int rc = uvas_bring_home(request->member, true, &request->at, &request->first);
    if (rc > 0 && request->kind == UVAS_ASK_LEAVE) {
        part(request->member);
    }
    request->rc = rc < 0 ? rc : 0;
    return rc != 0;
}

/* For every device one after the other; what cannot come home is named by nobody, as the child cannot be told. It reads zeros there. */
static bool pause_some(struct uvas_errand *request) {
    if (!uvas_pager.pausing) { /* also: another fork has ended meanwhile, and devices took back what had come home for this one */
        request->party = 0;
        request->at = 0;
        request->first = 0;
        uvas_pager.pausing = true;
    }
    if (request->party >= uvas_pager.member_count) {
        return true;
    }
    int rc = uvas_bring_home(uvas_pager.members[request->party], false, &request->at, &request->first);
    if (rc > 0) {
        request->party++;
        request->at = 0;
        request->first = 0;
    }
    return false;
}

/* ---- all of them ---------------------------------------------------------------------------------------------------------------------------------- */

static void discard(struct uvas_errand *request) {
    for (uint32_t g = request->first; g < request->end;) {
        struct uvas_extent run = uvas_extent_from(request->mirror, g, request->end - g);
        int rc = run.word & UVAS_COMMITTED ? uvas_move_discard(&run) : 0;
        request->rc = request->rc < 0 ? request->rc : rc;
        g += run.count;
    }
    uvas_wake(request->mirror, request->first, request->end);
}

static int pin(struct uvas_errand *request) {
    struct uvas_mirror *mirror = request->mirror;
    for (uint32_t g = request->first; mirror->armed && g < request->end; g++) {
        if (uvas_directory_next(uvas_granule_word(&mirror->directory[g]), UVAS_HOST, true).steps != 0) {
            return -EAGAIN; /* a device was quicker: it is to be brought home once more */
        }
    }
    *request->stretch = (struct uvas_stretch){.first = request->first, .end = request->end}; /* the caller's, who sees it written only if it is pinned */
    link_stretch(&mirror->pinned, request->stretch);
    return 0;
}

bool uvas_chore(struct uvas_errand *request) {
    struct uvas_mirror *mirror = request->mirror;
    struct uvas_stretch *stretch = request->stretch;
    switch (request->kind) {
    case UVAS_ASK_JOIN:
        request->rc = join(request);
        return true;
    case UVAS_ASK_HOME:
    case UVAS_ASK_LEAVE:
        return leave(request);
    case UVAS_ASK_ADD:
        add(request);
        return true;
    case UVAS_ASK_REMOVE:
        take_off(mirror, request->write);
        return true;
    case UVAS_ASK_STORE:
        mirror->stores[request->party] = request->store;
        return true;
    case UVAS_ASK_COMMIT:
        request->rc = commit(request);
        return true;
    case UVAS_ASK_SUSPEND:
        link_stretch(&mirror->suspended, stretch);
        return true;
    case UVAS_ASK_FORGET:
        forget(mirror, stretch->first, stretch->end);
        /* fall through */
    case UVAS_ASK_RESUME:
        unlink_stretch(&mirror->suspended, stretch);
        uvas_wake(mirror, stretch->first, stretch->end);
        return true;
    case UVAS_ASK_MOVE:
        return move_some(request);
    case UVAS_ASK_DISCARD:
        discard(request);
        return true;
    case UVAS_ASK_PIN:
        request->rc = pin(request);
        return true;
    case UVAS_ASK_UNPIN:
        unlink_stretch(&mirror->pinned, stretch);
        return true;
    case UVAS_ASK_PAUSE:
        return pause_some(request);
    case UVAS_ASK_STOP:
        return true;
    }
    return true;
}
