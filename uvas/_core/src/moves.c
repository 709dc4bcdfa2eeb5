/* moves.c: what directory.c says must happen, done to a run of granules.
 *
 * Each step that can fail has an undo, or leaves something that is true as well and cheaper than an undo: a reader that could have had a copy has the
 * granule alone, a device that was to lose it keeps a copy. Words are published before anybody is woken. All of this runs on the pager's thread.
 */
#include <assert.h>
#include <errno.h>

#include "guard.h"
#include "vm.h"

#define STAGING_BYTES (4 * UVAS_MOVE_BYTES) /* two rooms, used in turns: one is dropped while the other is filled */
#define SHARED_COPY ((size_t)512 << 10)     /* bytes from which on two threads are faster than one (measured: at 64 KiB they are not) */
#define MOVE_TRIES 64 /* of pages that the kernel had in its hands just then */

static struct {
    int faults;
    uint32_t features;
    char *memory, *staging; /* aligned to UVAS_MOVE_BYTES inside memory */
    uint32_t room;          /* the half of staging that is used next */
    int pages, bytes;       /* /proc/self/pagemap; /proc/self/mem */
    uintptr_t stuck;        /* the page that last answered EBUSY; 0: it was something else */
} our = {.faults = -1, .pages = -1, .bytes = -1};

/* ---- runs ------------------------------------------------------------------------------------------------------------------------- */

/* Granules from `first` on that lie all inside or all outside of each stretch. */
static uint32_t until_edge(const struct uvas_stretch *list, uint32_t first, uint32_t most) {
    for (; list; list = list->next) {
        uint32_t edge = first < list->first ? list->first : first < list->end ? list->end : UINT32_MAX;
        most = edge - first < most ? edge - first : most;
    }
    return most;
}

struct uvas_extent uvas_extent_from(struct uvas_mirror *mirror, uint32_t first, uint32_t most) {
    uint32_t word = uvas_granule_word(&mirror->directory[first]), count = 1;
    uint32_t at_once = (uint32_t)(UVAS_MOVE_BYTES >> mirror->domain->shift);
    most = most < at_once ? most : at_once;
    most = most < mirror->granules - first ? most : mirror->granules - first;
    most = until_edge(mirror->pinned, first, until_edge(mirror->suspended, first, most));
    while (count < most && uvas_granule_word(&mirror->directory[first + count]) == word) {
        count++;
    }
    return (struct uvas_extent){.mirror = mirror, .first = first, .count = count, .word = word};
}

void uvas_publish(const struct uvas_extent *run, uint32_t word) {
    for (uint32_t i = 0; i < run->count; i++) {
        atomic_store_explicit(&run->mirror->directory[run->first + i].word, word, memory_order_relaxed);
    }
}

/* ---- staging ---------------------------------------------------------------------------------------------------------------------- */

int uvas_moves_open(int host_faults, uint32_t features) {
    our.faults = host_faults;
    our.features = features;
    our.memory = uvas_vm_pages(STAGING_BYTES + UVAS_MOVE_BYTES);
    if (!our.memory) {
        return -ENOMEM;
    }
    our.staging = our.memory + (-(uintptr_t)our.memory & (UVAS_MOVE_BYTES - 1));
    int rc = uvas_vm_dont_fork(our.memory, STAGING_BYTES + UVAS_MOVE_BYTES);
    rc = rc < 0 ? rc : uvas_fault_register_staging(host_faults, (uintptr_t)our.staging, STAGING_BYTES);
    our.pages = rc < 0 ? rc : uvas_vm_open_pages();
    our.bytes = our.pages < 0 ? our.pages : uvas_vm_open_memory();
    if (our.bytes < 0) {
        rc = our.bytes;
        uvas_moves_close();
        return rc;
    }
    return 0;
}

void uvas_moves_close(void) {
    uvas_vm_close(our.pages);
    uvas_vm_close(our.bytes);
    our.pages = our.bytes = our.faults = -1;
    if (our.memory) {
        (void)uvas_vm_unmap((uintptr_t)our.memory, STAGING_BYTES + UVAS_MOVE_BYTES);
    }
    our.memory = our.staging = NULL;
}

void uvas_moves_forget(void) {
    our.memory = our.staging = NULL; /* not inherited */
    uvas_moves_close();
}

/* Where a run's pages lie in staging: at the same place within 2 MiB, so that huge pages stay whole. */
static char *staged(const struct uvas_extent *run) {
    return our.staging + our.room * (STAGING_BYTES / 2) + (uvas_extent_base(run) & (UVAS_MOVE_BYTES - 1));
}

/* The next run uses the other room, which was dropped before this one: the mate does one job after the other, and is waited for before the next. */
static void drop_staging(const struct uvas_extent *run) {
    if (uvas_extent_bytes(run) < SHARED_COPY) {
        (void)uvas_vm_drop_surely((uintptr_t)staged(run), uvas_extent_bytes(run));
    } else {
        uvas_mate_drop((uintptr_t)staged(run), uvas_extent_bytes(run));
        our.room ^= 1;
    }
}

/* Whether the host has a page there, in RAM or swapped out: 1, 0, or -errno. */
static int present(uintptr_t address) {
    uint64_t entry = 0;
    long got = uvas_vm_read_at(our.pages, &entry, sizeof entry, (int64_t)(address / uvas_vm_platform.page_size * sizeof entry));
    return got < 0 ? (int)got : got < (long)sizeof entry ? -EIO : (entry >> 62) != 0;
}

/* A page that is in the middle of something else's move answers EEXIST although it has moved: the source tells. */
static long move_some(uintptr_t to, uintptr_t from, size_t size) {
    long moved = uvas_fault_move(our.faults, to, from, size);
    return moved == -EEXIST && present(from) == 0 ? (long)uvas_vm_platform.page_size : moved;
}

/* What was taken goes back, by a copy where it will not move. Nothing else can have come there: who touches it waits for us. */
static int put_back(uintptr_t to, uintptr_t from, size_t size) {
    size_t page = uvas_vm_platform.page_size;
    int tries = 0;
    for (size_t done = 0; done < size;) {
        long put = move_some(to + done, from + done, size - done);
        if (put < 0 && put != -EAGAIN) {
            int there = present(from + done);
            put = there > 0 ? uvas_fault_copy(our.faults, to + done, (const void *)(from + done), page, false) : there < 0 ? there : (long)page;
            if (there > 0 && put > 0) { /* a copy leaves its page here, where the next run's would go */
                (void)uvas_vm_drop_surely(from + done, page);
            }
        }
        if (put < 0 && tries++ == MOVE_TRIES) {
            return (int)put;
        }
        done += put > 0 ? (size_t)put : 0;
    }
    return 0;
}

/* Moves pages, all of them or none; *lost: some are in neither place now. */
static int take_pages(uintptr_t to, uintptr_t from, size_t size, bool *lost) {
    int tries = 0;
    for (size_t done = 0; done < size;) {
        long moved = move_some(to + done, from + done, size - done);
        if (moved == -EAGAIN && tries++ < MOVE_TRIES) {
            continue;
        }
        if (moved < 0) {
            our.stuck = moved == -EBUSY ? from + done : 0;
            *lost = put_back(from, to, done) < 0;
            return (int)moved;
        }
        done += (size_t)moved;
    }
    return 0;
}

uintptr_t uvas_move_stuck(void) {
    return our.stuck;
}

/* Where pages cannot be moved (no write permission; a kernel without MOVE): they are protected and copied, and stay. Writes that are in flight into
 * pinned pages are lost with this, which is why it is not the first choice. Only pages that are there are read: a hole would make us wait for us. */
static int copy_out(const struct uvas_extent *run) {
    size_t page = uvas_vm_platform.page_size;
    int rc = uvas_fault_protect(our.faults, uvas_extent_base(run), uvas_extent_bytes(run));
    for (size_t at = 0; rc == 0 && at < uvas_extent_bytes(run); at += page) {
        rc = present(uvas_extent_base(run) + at);
        if (rc > 0) {
            long got = uvas_vm_read_at(our.bytes, staged(run) + at, page, (int64_t)(uvas_extent_base(run) + at));
            rc = got < 0 ? (int)got : got < (long)page ? -EIO : 0;
        }
    }
    if (rc < 0) {
        drop_staging(run);
        (void)uvas_fault_unprotect(our.faults, uvas_extent_base(run), uvas_extent_bytes(run));
    }
    return rc;
}

/* What was taken could not be put back: the first party to touch it is told. */
static int lost_in_staging(const struct uvas_extent *run) {
    drop_staging(run);
    uvas_publish(run, (run->word & ~(UVAS_PARTY_BITS | UVAS_MODIFIED)) | UVAS_BYTES_LOST);
    (void)uvas_vm_drop_surely(uvas_extent_base(run), uvas_extent_bytes(run));
    return -EIO;
}

static int take(const struct uvas_extent *run, bool *copied) {
    bool lost = false;
    *copied = false;
    int rc = our.features & UVAS_FAULT_MOVES ? take_pages((uintptr_t)staged(run), uvas_extent_base(run), uvas_extent_bytes(run), &lost) : -EINVAL;
    if (lost) {
        return lost_in_staging(run);
    }
    bool parted = rc == -EINVAL && run->count > 1 && (our.features & UVAS_FAULT_MOVES); /* perhaps by a border of two mappings: granule by granule then */
    if ((rc == -EINVAL && !parted) || (rc == -EBUSY && !(run->word & UVAS_MODIFIED))) { /* what nobody may write has no write in flight */
        *copied = true;
        rc = copy_out(run);
    }
    if (rc < 0) { /* what had moved and came back is protected no more; only the host has it */
        uvas_publish(run, run->word | UVAS_MODIFIED);
    }
    return rc;
}

static int give_back(const struct uvas_extent *run, bool copied) {
    uvas_publish(run, run->word | UVAS_MODIFIED);
    if (copied) {
        drop_staging(run);
        (void)uvas_fault_unprotect(our.faults, uvas_extent_base(run), uvas_extent_bytes(run));
        return 0;
    }
    int rc = put_back(uvas_extent_base(run), (uintptr_t)staged(run), uvas_extent_bytes(run));
    return rc < 0 ? lost_in_staging(run) : 0;
}

/* ---- one party's memory ------------------------------------------------------------------------------------------------------------------ */

static struct uvas_member *member_of(const struct uvas_extent *run, uint32_t party) {
    return run->mirror->domain->members[party];
}

static char *alias_of(const struct uvas_extent *run, uint32_t party) {
    return run->mirror->stores[party].alias + uvas_extent_offset(run);
}

/* What a device's own page tables answer when its process has ended, or has let go of the mapping: nothing of it reaches the memory any more. */
static bool gone(long rc) {
    return rc == -ESRCH || rc == -ENOENT;
}

/* A call that stops at the first page which is not watched any more (a worker lets go of a part) is made granule by granule. */
static int protect(const struct uvas_extent *run, uint32_t party) {
    struct uvas_member *member = member_of(run, party);
    if (member->dead) {
        return 0;
    }
    int rc = uvas_fault_protect(member->faults, uvas_extent_base(run), uvas_extent_bytes(run));
    size_t granule = (size_t)1 << run->mirror->domain->shift;
    for (size_t at = 0; rc == -ENOENT && run->count > 1 && at < uvas_extent_bytes(run); at += granule) {
        int one = uvas_fault_protect(member->faults, uvas_extent_base(run) + at, granule);
        if (one < 0 && !gone(one)) {
            return one;
        }
    }
    return gone(rc) ? 0 : rc;
}

static int unprotect(const struct uvas_extent *run, uint32_t party) {
    struct uvas_member *member = member_of(run, party);
    int rc = member->dead ? 0 : uvas_fault_unprotect(party == UVAS_HOST ? our.faults : member->faults, uvas_extent_base(run), uvas_extent_bytes(run));
    return gone(rc) ? 0 : rc;
}

static int punch(const struct uvas_extent *run, uint32_t party) {
    int rc = uvas_vm_punch(run->mirror->stores[party].fd, (int64_t)uvas_extent_offset(run), uvas_extent_bytes(run));
    if (rc == 0) {
        uvas_residency_went(member_of(run, party), run);
    }
    return rc;
}

/* Pages that the file has, mapped in the worker. One that is mapped already keeps its protection: whoever grants more asks for that. */
static int map(const struct uvas_extent *run, uint32_t party, bool protected) {
    struct uvas_member *member = member_of(run, party);
    for (size_t done = 0; !member->dead && done < uvas_extent_bytes(run);) {
        long mapped = uvas_fault_map(member->faults, uvas_extent_base(run) + done, uvas_extent_bytes(run) - done, protected);
        if (gone(mapped)) {
            break;
        }
        if (mapped < 0 && mapped != -EEXIST && mapped != -EAGAIN) {
            return (int)mapped;
        }
        done += mapped > 0 ? (size_t)mapped : mapped == -EEXIST ? uvas_vm_platform.page_size : 0;
    }
    return 0;
}

/* No call goes across mappings, which protection may have parted: smaller ones then. */
int uvas_copy_protected(int faults, uintptr_t to, const char *from, size_t size) {
    size_t page = uvas_vm_platform.page_size, most = size;
    for (size_t done = 0; done < size;) {
        size_t part = size - done < most ? size - done : most;
        long put = uvas_fault_copy(faults, to + done, from + done, part, true);
        if (put == -ENOENT && part > page) {
            most = part / 2 & ~(page - 1);
            continue;
        }
        if (put < 0 && put != -EEXIST && put != -EAGAIN) {
            return (int)put;
        }
        most = put > 0 ? 2 * part : most;
        done += put > 0 ? (size_t)put : put == -EEXIST ? page : 0;
    }
    return 0;
}

/* Of a device that does not hold the run: what a punch left there when memory was decommitted would pass for the bytes that are to come. */
static int forget_stale(const struct uvas_extent *run, uint32_t party) {
    const struct uvas_store *store = &run->mirror->stores[party];
    return store->stale ? uvas_vm_punch(store->fd, (int64_t)uvas_extent_offset(run), uvas_extent_bytes(run)) : 0;
}

/* What could not go is stale. */
static void punch_surely(const struct uvas_extent *run, uint32_t party) {
    struct uvas_store *store = &run->mirror->stores[party];
    store->stale |= uvas_vm_punch_surely(store->fd, (int64_t)uvas_extent_offset(run), uvas_extent_bytes(run)) < 0;
}

/* Large copies are shared with the mate. */
static int copy_in(const struct uvas_extent *run, uint32_t party, const char *from) {
    int faults = party == UVAS_HOST ? our.faults : member_of(run, party)->faults;
    int refused = party == UVAS_HOST ? 0 : forget_stale(run, party);
    if (refused < 0) {
        return refused;
    }
    size_t size = uvas_extent_bytes(run), half = size < SHARED_COPY ? 0 : size / 2 & ~(uvas_vm_platform.page_size - 1);
    uintptr_t to = uvas_extent_base(run);
    if (half) {
        uvas_mate_copy(faults, to + size - half, from + size - half, half);
    }
    int rc = uvas_copy_protected(faults, to, from, size - half);
    int other = half ? uvas_mate_copied() : 0;
    return rc < 0 ? rc : other;
}

static int drop_host(const struct uvas_extent *run) {
    int refused = uvas_vm_gate();
    return refused ? -refused : uvas_vm_drop_surely(uvas_extent_base(run), uvas_extent_bytes(run));
}

/* ---- moving ---------------------------------------------------------------------------------------------------------------------------- */

static int fill_zero(const struct uvas_extent *run, uint32_t party) {
    if (party != UVAS_HOST) {
        int rc = forget_stale(run, party);
        return rc < 0 ? rc : uvas_vm_allocate(run->mirror->stores[party].fd, (int64_t)uvas_extent_offset(run), uvas_extent_bytes(run));
    }
    for (size_t done = 0; done < uvas_extent_bytes(run);) {
        long put = uvas_fault_zero(our.faults, uvas_extent_base(run) + done, uvas_extent_bytes(run) - done);
        if (put < 0 && put != -EEXIST && put != -EAGAIN) {
            return gone(put) ? 0 : (int)put;
        }
        done += put > 0 ? (size_t)put : put == -EEXIST ? uvas_vm_platform.page_size : 0;
    }
    return 0;
}

static void count(const struct uvas_extent *run, uint32_t from, uint32_t to) {
    atomic_fetch_add_explicit(&member_of(run, from)->bytes_out, uvas_extent_bytes(run), memory_order_relaxed);
    atomic_fetch_add_explicit(&member_of(run, to)->bytes_in, uvas_extent_bytes(run), memory_order_relaxed);
}

/* The source could not be read, or the new holder not be filled: what it got goes, and what was taken goes back. */
static int undo_fill(const struct uvas_extent *run, uint32_t party, const struct uvas_transition *next, bool copied, int rc) {
    if (party == UVAS_HOST) {
        (void)uvas_vm_drop_surely(uvas_extent_base(run), uvas_extent_bytes(run));
    } else {
        punch_surely(run, party);
    }
    if (next->steps & UVAS_STEP_TAKE) {
        int back = give_back(run, copied);
        rc = back < 0 ? back : rc;
    } else if (next->steps & UVAS_STEP_PROTECT) {
        (void)unprotect(run, next->source);
    }
    return rc;
}

/* All others lose theirs. Returns those who did not: they keep a copy that is true, as nobody has written yet. */
static uint32_t drop_others(const struct uvas_extent *run, uint32_t drops) {
    uint32_t left = (drops & 1) && drop_host(run) < 0 ? 1u : 0u;
    for (uint32_t party = 1; drops >> party != 0; party++) {
        left |= (drops >> party & 1) && punch(run, party) < 0 ? 1u << party : 0u;
    }
    return left;
}

/* The new holder has its copy. */
static int hand_over(const struct uvas_extent *run, uint32_t party, bool write, struct uvas_transition *next, bool copied) {
    uint32_t left = next->steps & UVAS_STEP_DROP ? drop_others(run, next->drops) : 0;
    if (copied && write) {
        left |= drop_host(run) < 0 ? 1u : 0u;
    }
    if ((next->steps & UVAS_STEP_KEEP) && copy_in(run, UVAS_HOST, staged(run)) < 0) { /* where pages stayed it fills the holes */
        (void)uvas_vm_drop_surely(uvas_extent_base(run), uvas_extent_bytes(run)); /* no room on the host for a copy: the device has it alone */
        next->after &= ~1u;
    }
    if (next->steps & UVAS_STEP_TAKE) {
        drop_staging(run);
    }
    if (left) { /* nobody may write while somebody else reads */
        next->after = (next->after & ~UVAS_MODIFIED) | left;
        write = false;
    }
    uvas_publish(run, next->after);
    if (party != UVAS_HOST && !(run->word >> party & 1)) {
        uvas_residency_came(member_of(run, party), run);
    }
    int rc = next->steps & UVAS_STEP_MAP ? map(run, party, false) : 0;
    rc = rc == 0 && write && (next->steps & UVAS_STEP_UNPROTECT) ? unprotect(run, party) : rc;
    return left ? -EAGAIN : rc == -ENOMEM ? 0 : rc; /* what is not mapped is a fault, which finds it there */
}

/* Whether a device's memory cannot be read (it broke): asked again, by another call, before anything is given up. */
static bool unreadable(const struct uvas_extent *run, uint32_t party) {
    size_t page = uvas_vm_platform.page_size;
    bool bad = false;
    uvas_mate_wait(); /* it may be dropping what lies there */
    for (size_t at = 0; !bad && at < uvas_extent_bytes(run); at += page) {
        bad = uvas_vm_read_at(run->mirror->stores[party].fd, our.staging, page, (int64_t)(uvas_extent_offset(run) + at)) != (long)page;
    }
    (void)uvas_vm_drop((uintptr_t)our.staging, page);
    return bad;
}

/* The source's bytes are not to be had: whoever touches them is told. */
static int lose(const struct uvas_extent *run) {
    for (uint32_t party = 1; party < UVAS_PARTIES; party++) {
        if (run->word >> party & 1) {
            punch_surely(run, party);
            uvas_residency_went(member_of(run, party), run);
        }
    }
    uvas_publish(run, (run->word & ~(UVAS_PARTY_BITS | UVAS_MODIFIED)) | UVAS_BYTES_LOST);
    return -EIO;
}

static int bring(const struct uvas_extent *run, uint32_t party, bool write, struct uvas_transition *next) {
    bool copied = false;
    int rc = next->steps & UVAS_STEP_TAKE ? take(run, &copied) : next->steps & UVAS_STEP_PROTECT ? protect(run, next->source) : 0;
    if (rc < 0) {
        return rc;
    }
    rc = copy_in(run, party, next->steps & UVAS_STEP_TAKE ? staged(run) : alias_of(run, next->source));
    if (rc < 0) {
        rc = undo_fill(run, party, next, copied, rc);
        bool broken = (rc == -EFAULT || rc == -EHWPOISON || rc == -EIO) && uvas_holders(run->word) == 1u << next->source && next->source != UVAS_HOST;
        return broken && unreadable(run, next->source) ? lose(run) : rc;
    }
    count(run, next->source, party);
    return hand_over(run, party, write, next, copied);
}

int uvas_move(const struct uvas_extent *run, uint32_t party, bool write) {
    struct uvas_transition next = uvas_directory_next(run->word, party, write);
    assert(run->word & UVAS_COMMITTED && !(run->word & UVAS_BYTES_LOST));
    if (next.steps & UVAS_STEP_FILL) {
        return bring(run, party, write, &next);
    }
    if (next.steps & UVAS_STEP_ZERO) {
        int rc = fill_zero(run, party);
        if (rc < 0 && party == UVAS_HOST) {
            uvas_publish(run, next.after); /* some of it is there, and may be written; the rest are holes, which read as zeros */
        }
        if (rc < 0) {
            return party == UVAS_HOST ? rc : undo_fill(run, party, &next, false, rc);
        }
    }
    return next.steps ? hand_over(run, party, write, &next, false) : 0;
}

/* ---- without moving ------------------------------------------------------------------------------------------------------------------------ */

int uvas_move_drop(const struct uvas_extent *run, uint32_t party) {
    int rc = punch(run, party);
    if (rc == 0) {
        uvas_publish(run, run->word & ~(1u << party | UVAS_MODIFIED));
    }
    return rc;
}

/* The marks that a device's pages are broken give way to a copy only, which goes as soon as it is there. */
static void forget_broken(const struct uvas_extent *run) {
    uvas_mate_wait();
    for (uint32_t party = 1; party < UVAS_PARTIES; party++) {
        const struct uvas_store *store = &run->mirror->stores[party];
        struct uvas_member *member = member_of(run, party);
        if (store->alias && member && !member->dead) {
            (void)uvas_copy_protected(member->faults, uvas_extent_base(run), staged(run), uvas_extent_bytes(run));
            punch_surely(run, party);
        }
    }
    (void)uvas_vm_drop_surely((uintptr_t)staged(run), uvas_extent_bytes(run));
}

int uvas_move_discard(const struct uvas_extent *run) {
    uint32_t holders = uvas_holders(run->word), word = run->word;
    int rc = 0;
    for (uint32_t party = 1; party < UVAS_PARTIES; party++) {
        int punched = holders >> party & 1 ? punch(run, party) : 0;
        rc = punched < 0 ? punched : rc;
        word &= (holders >> party & 1) && punched == 0 ? ~(1u << party) : UINT32_MAX;
    }
    rc = rc < 0 ? rc : drop_host(run); /* and marks of what was lost */
    if (rc == 0 && word & UVAS_BYTES_LOST) {
        forget_broken(run);
    }
    if (rc == 0) {
        word = (word & ~(UVAS_PARTY_BITS | UVAS_MODIFIED | UVAS_BYTES_LOST)) | (run->mirror->armed ? 0u : UVAS_MODIFIED | 1u << UVAS_HOST);
    }
    uvas_publish(run, word);
    return rc;
}

/* The host has the granule, and a page of it is not there, or is protected still. The rest is filled as well: it is the next that somebody touches. */
static int repair_host(struct uvas_extent *run) {
    uint32_t devices = uvas_holders(run->word) & ~1u;
    if (devices) { /* others read: the same bytes, protected */
        return copy_in(run, UVAS_HOST, alias_of(run, (uint32_t)__builtin_ctz(devices)));
    }
    uvas_publish(run, run->word | UVAS_MODIFIED);
    int rc = fill_zero(run, UVAS_HOST);
    return rc < 0 ? rc : unprotect(run, UVAS_HOST);
}

/* A mark of protection that outlived its page is in the way of the mark that the page is broken. */
static int poison(const struct uvas_extent *run, uint32_t party, uintptr_t address) {
    int faults = party == UVAS_HOST ? our.faults : member_of(run, party)->faults;
    size_t page = uvas_vm_platform.page_size;
    long rc = uvas_fault_poison(faults, address, page);
    if (rc == -EEXIST) {
        (void)uvas_fault_unprotect(faults, address, page);
        rc = uvas_fault_poison(faults, address, page);
    }
    return rc < 0 && rc != -EEXIST && !gone(rc) ? (int)rc : 0;
}

int uvas_move_repair(struct uvas_mirror *mirror, uint32_t granule, uint32_t party, uintptr_t address) {
    struct uvas_extent run = uvas_extent_from(mirror, granule, 1);
    bool writable = (run.word & UVAS_MODIFIED) != 0;
    if (run.word & UVAS_BYTES_LOST) {
        return poison(&run, party, address);
    }
    if (party == UVAS_HOST) {
        return repair_host(&run);
    }
    int rc = map(&run, party, !writable);
    return rc == 0 && writable ? unprotect(&run, party) : rc;
}
