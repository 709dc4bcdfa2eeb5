/* pager.c: the thread that serves faults. See pager.h.
 *
 * A fault is served at once, or *parked* with a time to look at it again: the granule is kept for its newest holder for a while yet, somebody asked for
 * it earlier, it is pinned, or there was no memory. Parked faults are looked at in the order in which they came. What is parked for long is told to the
 * watchdog.
 */
#include "pager.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "vm.h"

#define OWN_US 1000u        /* how long a thread that needs two granules has them for itself */
#define RETRY_LEAST_US 50u  /* after a refusal; doubles with each */
#define RETRY_MOST_US 800u
#define KEPT_MOST_US 100000u /* longer than any granule is kept: an older time is in the past, however the clock has wrapped */
#define READ_AT_ONCE 16u

struct uvas_pager uvas_pager = {.faults = -1, .bell = -1, .watch = -1};

struct parked {
    struct uvas_mirror *mirror;
    struct uvas_member *member;
    uintptr_t address;
    uint64_t since_ns;
    uint32_t granule, thread, due, tries;
    bool write, torn;
    int error;
};

static struct parked parked[UVAS_PARKED_MAX]; /* in the order of arrival */
static uint32_t parked_count;

/* ---- small questions ------------------------------------------------------------------------------------------------------------------ */

uint32_t uvas_now_us(void) {
    return (uint32_t)(uvas_clock_ns() / 1000);
}

static bool earlier(uint32_t a, uint32_t b) {
    return (int32_t)(a - b) < 0;
}

struct uvas_mirror *uvas_mirror_at(uintptr_t address) {
    uint32_t low = 0, high = uvas_pager.mirror_count;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (uvas_pager.mirrors[middle]->base <= address) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    struct uvas_mirror *found = low > 0 ? uvas_pager.mirrors[low - 1] : NULL;
    return found && address - found->base < found->size ? found : NULL;
}

bool uvas_within(const struct uvas_stretch *list, uint32_t granule) {
    while (list && (granule < list->first || granule >= list->end)) {
        list = list->next;
    }
    return list != NULL;
}

static int faults_of(const struct uvas_member *member) {
    return member->party == UVAS_HOST ? uvas_pager.faults : member->faults;
}

static void wake(const struct uvas_member *member, const struct uvas_mirror *mirror, uint32_t first, uint32_t end) {
    uint32_t shift = mirror->domain->shift;
    if (!member->dead) {
        (void)uvas_fault_wake(faults_of(member), mirror->base + ((size_t)first << shift), (size_t)(end - first) << shift);
    }
}

void uvas_wake(const struct uvas_mirror *mirror, uint32_t first, uint32_t end) {
    for (uint32_t party = 0; party < UVAS_PARTIES; party++) {
        const struct uvas_member *member = mirror->domain->members[party];
        if (member && (party == UVAS_HOST ? mirror->armed : mirror->stores[party].alias != NULL)) {
            wake(member, mirror, first, end);
        }
    }
}

static void keep(const struct uvas_extent *run, uint32_t for_us, uint32_t own) {
    uint32_t until = (uvas_now_us() + for_us) & ~1u;
    for (uint32_t i = 0; i < run->count; i++) {
        run->mirror->directory[run->first + i].until = until | own;
    }
}

void uvas_keep(const struct uvas_extent *run) {
    keep(run, run->mirror->domain->hold_us, 0);
}

/* ---- arming ---------------------------------------------------------------------------------------------------------------------------- */

/* The next stretch of granules with memory, from *at on. */
static bool committed_stretch(const struct uvas_mirror *mirror, uint32_t *first, uint32_t *end) {
    uint32_t at = *end;
    while (at < mirror->granules && !(mirror->blocks[at / UVAS_BLOCK_GRANULES] && uvas_granule_word(&mirror->directory[at]) & UVAS_COMMITTED)) {
        at = mirror->blocks[at / UVAS_BLOCK_GRANULES] ? at + 1 : (at / UVAS_BLOCK_GRANULES + 1) * UVAS_BLOCK_GRANULES;
    }
    *first = at;
    while (at < mirror->granules && mirror->blocks[at / UVAS_BLOCK_GRANULES] && uvas_granule_word(&mirror->directory[at]) & UVAS_COMMITTED) {
        at++;
    }
    *end = at;
    return *first < at;
}

int uvas_arm(struct uvas_mirror *mirror) {
    uint32_t first = 0, end = 0, shift = mirror->domain->shift;
    int rc = 0;
    while (!mirror->armed && rc == 0 && committed_stretch(mirror, &first, &end)) {
        rc = uvas_fault_register(uvas_pager.faults, mirror->base + ((size_t)first << shift), (size_t)(end - first) << shift, false);
    }
    uint32_t failed = first;
    for (first = end = 0; rc < 0 && committed_stretch(mirror, &first, &end) && first < failed;) {
        (void)uvas_fault_unregister(uvas_pager.faults, mirror->base + ((size_t)first << shift), (size_t)(end - first) << shift);
    }
    mirror->armed = rc == 0;
    return rc;
}

/* ---- serving -------------------------------------------------------------------------------------------------------------------------------- */

/* Whoever takes the range away, or commits it, wakes who waits there. */
static bool somebody_elses(const struct parked *fault) {
    uint32_t word = uvas_granule_word(&fault->mirror->directory[fault->granule]);
    return !(word & UVAS_COMMITTED) || uvas_within(fault->mirror->suspended, fault->granule);
}

static bool asked_before(const struct parked *fault, const struct parked *until) {
    for (const struct parked *other = parked; other < until; other++) {
        if (other->mirror == fault->mirror && other->granule == fault->granule && other->member != fault->member) {
            return true;
        }
    }
    return false;
}

/* Others have it, and may keep it for now. */
static bool kept(const struct uvas_mirror *mirror, uint32_t granule, uint32_t party, bool torn, uint32_t now) {
    const struct uvas_granule *entry = &mirror->directory[granule];
    bool others = (uvas_holders(uvas_granule_word(entry)) & ~(1u << party)) != 0;
    bool held = entry->until - now < KEPT_MOST_US; /* wrapping: what was kept long ago is not kept for long */
    return others && held && !(torn && !(entry->until & 1));
}

/* From the fault's granule on, what goes with it. */
static struct uvas_extent with_it(const struct parked *fault, uint32_t most, uint32_t now) {
    struct uvas_extent run = uvas_extent_from(fault->mirror, fault->granule, most);
    bool device = fault->member->party != UVAS_HOST;
    uint32_t count = 1;
    while (count < run.count && !kept(fault->mirror, run.first + count, fault->member->party, false, now)) {
        count++;
    }
    run.count = count;
    while (device && run.count > 1 && fault->member->capacity && uvas_extent_bytes(&run) > fault->member->capacity / 8) {
        run.count /= 2; /* a stream does not push out all that the device has */
    }
    return run;
}

static int bring(struct uvas_member *member, const struct uvas_extent *run, bool write) {
    bool gains = member->party != UVAS_HOST && !(run->word >> member->party & 1);
    int rc = gains ? uvas_residency_room(member, run, NULL) : 0;
    return rc < 0 ? rc : uvas_move(run, member->party, write);
}

/* The thread's last granules, all for itself: it needs more than one at a time. */
static void bring_all(const struct parked *fault) {
    const struct uvas_history *history = uvas_streams_history(fault->member, fault->thread);
    uint32_t party = fault->member->party, now = uvas_now_us();
    uint64_t room = fault->member->capacity >> fault->mirror->domain->shift;
    for (uint32_t i = 0; i < 4 && (i < room || fault->member->capacity == 0); i++) { /* what comes last does not push out what came first */
        struct uvas_mirror *mirror = history->mirror[i];
        if (!mirror || !(uvas_granule_word(&mirror->directory[history->granule[i]]) & UVAS_COMMITTED) || uvas_within(mirror->suspended, history->granule[i])) {
            continue;
        }
        struct uvas_extent run = uvas_extent_from(mirror, history->granule[i], 1);
        bool has = (run.word >> party & 1) && (!fault->write || run.word & UVAS_MODIFIED);
        bool free = !(run.word & UVAS_BYTES_LOST) && !kept(mirror, run.first, party, true, now) && (party == UVAS_HOST || !uvas_within(mirror->pinned, run.first));
        if (has || (free && bring(fault->member, &run, fault->write) == 0)) {
            keep(&run, OWN_US, 1);
            wake(fault->member, mirror, run.first, run.first + 1);
        }
    }
}

static void put_off(struct parked *fault, uint32_t now, int error) {
    uint32_t wait = RETRY_LEAST_US << (fault->tries < 4 ? fault->tries : 4);
    fault->due = now + (wait < RETRY_MOST_US ? wait : RETRY_MOST_US);
    fault->tries++;
    fault->error = error;
}

/* Served: true. Otherwise it has a time to be looked at again. */
static bool serve(struct parked *fault, const struct parked *queue_end, uint32_t now) {
    struct uvas_mirror *mirror = fault->mirror;
    struct uvas_member *member = fault->member;
    uint32_t party = member->party;
    if (member->dead || somebody_elses(fault)) {
        return true;
    }
    int rc = party != UVAS_HOST ? uvas_arm(mirror) : 0;
    struct uvas_extent run = uvas_extent_from(mirror, fault->granule, 1);
    if (rc < 0) {
        put_off(fault, now, rc);
        return false;
    }
    if ((run.word & UVAS_BYTES_LOST) || uvas_directory_next(run.word, party, fault->write).steps == 0) {
        rc = uvas_move_repair(mirror, fault->granule, party, fault->address);
        if (rc < 0) {
            put_off(fault, now, rc);
            return false;
        }
        wake(member, mirror, run.first, run.first + 1);
        return true;
    }
    if (kept(mirror, fault->granule, party, fault->torn, now)) {
        fault->due = mirror->directory[fault->granule].until;
        return false;
    }
    bool pinned = party != UVAS_HOST && uvas_within(mirror->pinned, fault->granule);
    bool stays = pinned || (party != UVAS_HOST && uvas_pager.pausing);
    if (stays || (!fault->torn && asked_before(fault, queue_end))) {
        put_off(fault, now, pinned ? UVAS_WAITS_FOR_PIN : 0);
        return false;
    }
    run = with_it(fault, uvas_streams_window(member, mirror, fault->granule), now);
    rc = bring(member, &run, fault->write);
    if (rc < 0 && run.count > 1) {
        run = uvas_extent_from(mirror, fault->granule, 1);
        rc = bring(member, &run, fault->write);
    }
    if (rc == -EBUSY && uvas_move_stuck()) {
        uvas_unshare(uvas_move_stuck());
    }
    if (rc < 0) {
        put_off(fault, now, rc);
        return false;
    }
    uvas_keep(&run);
    if (fault->torn) {
        bring_all(fault);
    }
    wake(member, mirror, run.first, run.first + run.count);
    return true;
}

static void park(const struct parked *fault) {
    if (parked_count < UVAS_PARKED_MAX) {
        parked[parked_count++] = *fault;
    } else {
        wake(fault->member, fault->mirror, fault->granule, fault->granule + 1); /* it comes again */
    }
}

static void arrive(struct uvas_member *member, const struct uvas_fault *seen) {
    struct uvas_mirror *mirror = uvas_mirror_at(seen->address);
    if (!mirror || (member && mirror->domain != member->domain)) {
        return; /* released, and woken by who does that */
    }
    member = member ? member : &mirror->domain->host;
    uint32_t now = uvas_now_us(), granule = (uint32_t)((seen->address - mirror->base) >> mirror->domain->shift);
    struct parked fault = {.mirror = mirror, .member = member, .address = seen->address & ~(uvas_vm_platform.page_size - 1), .granule = granule,
                           .thread = seen->thread, .write = (seen->kind & (UVAS_FAULT_WRITE | UVAS_FAULT_PROTECTED)) != 0, .since_ns = uvas_clock_ns()};
    atomic_fetch_add_explicit(fault.write ? &member->write_faults : &member->read_faults, 1, memory_order_relaxed);
    fault.torn = uvas_streams_torn(member, seen->thread, mirror, granule, now);
    if (!serve(&fault, parked + parked_count, now)) {
        park(&fault);
    }
}

static void read_faults(struct uvas_member *member, int fd) {
    struct uvas_fault seen[READ_AT_ONCE];
    long count = uvas_fault_read(fd, seen, READ_AT_ONCE);
    for (long i = 0; i < count; i++) {
        arrive(member, &seen[i]);
    }
}

/* Looks at the parked again whose time has come. Nanoseconds until the next one's; -1: there is none. */
static int64_t serve_parked(void) {
    uint32_t left = 0, now = uvas_now_us(), soonest = 0;
    for (uint32_t i = 0; i < parked_count; i++) {
        struct parked fault = parked[i];
        if (!earlier(now, fault.due) && serve(&fault, parked + left, now)) {
            continue;
        }
        soonest = left == 0 || earlier(fault.due, soonest) ? fault.due : soonest;
        parked[left++] = fault;
    }
    parked_count = left;
    return left == 0 ? -1 : earlier(now, soonest) ? (int64_t)(soonest - now) * 1000 : 0;
}

void uvas_unpark(const struct uvas_mirror *mirror, const struct uvas_member *member) {
    uint32_t left = 0;
    for (uint32_t i = 0; i < parked_count; i++) {
        if (parked[i].mirror != mirror && parked[i].member != member) {
            parked[left++] = parked[i];
        }
    }
    parked_count = left;
}

/* ---- the loop -------------------------------------------------------------------------------------------------------------------------------- */

static void tell_watchdog(void) {
    struct uvas_waiting waiting = {0};
    if (parked_count > 0) {
        waiting = (struct uvas_waiting){.address = parked[0].address, .since_ns = parked[0].since_ns, .thread = parked[0].thread, .error = parked[0].error};
        memcpy(waiting.name, parked[0].member->name, sizeof waiting.name);
    }
    uvas_requests_waiting(&waiting);
}

void uvas_unwatch(const struct uvas_member *member) {
    if (!member->dead) {
        uvas_watch_remove(uvas_pager.watch, member->faults);
        uvas_watch_remove(uvas_pager.watch, member->process);
    }
}

void uvas_pager_died(struct uvas_member *member) {
    uvas_unwatch(member);
    member->dead = true;
    member->recovered = false;
    member->recovering_at = 0;
    member->recovering_first = 0;
}

/* A part of it for each. What will not come home now (no memory) is tried again, pass after pass: until then it is where it was, and can be read.
 * Nanoseconds until there is more to do; -1: there is none. */
static int64_t recover_some(void) {
    int64_t next = -1;
    for (uint32_t i = 0; i < uvas_pager.member_count; i++) {
        struct uvas_member *member = uvas_pager.members[i];
        if (!member->dead || member->recovered) {
            continue;
        }
        int rc = uvas_bring_home(member, true, &member->recovering_at, &member->recovering_first);
        member->unrecovered |= rc < 0;
        if (rc > 0) {
            member->recovered = !member->unrecovered;
            next = member->recovered || next == 0 ? next : RETRY_MOST_US * 1000;
            member->unrecovered = false;
            member->recovering_at = 0;
            member->recovering_first = 0;
        } else {
            next = 0;
        }
    }
    return next;
}

static int64_t sooner(int64_t a, int64_t b) {
    return a < 0 ? b : b < 0 || a < b ? a : b;
}

static bool look(const uint64_t *ready, uint32_t count) {
    bool rung = false;
    for (uint32_t i = 0; i < count; i++) {
        struct uvas_member *member = (void *)(uintptr_t)(ready[i] & ~(uint64_t)3); /* NOLINT: what uvas_watched made */
        if ((ready[i] & 3) == UVAS_WATCHED_PROCESS) {
            uvas_pager_died(member);
        } else if ((ready[i] & 3) == UVAS_WATCHED_BELL) {
            uvas_bell_hush(uvas_pager.bell);
            rung = true;
        } else if (!member || !member->dead) {
            read_faults(member, member ? member->faults : uvas_pager.faults);
        }
    }
    return rung;
}

void *uvas_pager_main(void *nothing) {
    bool asked = false, stop = false;
    int64_t next = -1;
    uvas_wait_exactly();
    parked_count = 0;
    while (!stop) {
        uint64_t ready[READ_AT_ONCE];
        uint32_t count = uvas_watch_wait(uvas_pager.watch, ready, READ_AT_ONCE, asked ? 0 : next);
        uint64_t began = uvas_clock_ns();
        atomic_store_explicit(&uvas_pager.busy_since_ns, began, memory_order_relaxed);
        asked |= look(ready, count);
        next = serve_parked();
        asked = asked && uvas_requests_work(&stop);
        next = sooner(next, recover_some());
        tell_watchdog();
        atomic_store_explicit(&uvas_pager.busy_since_ns, 0, memory_order_relaxed);
        atomic_fetch_add_explicit(&uvas_pager.busy_ns, uvas_clock_ns() - began, memory_order_relaxed);
    }
    return nothing;
}
