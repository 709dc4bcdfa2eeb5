/* moves.c: what directory.c says must happen, done to a run of granules.
 *
 * Each step that can fail has an undo, or leaves something that is true as well and cheaper than an undo: a reader that could have had a copy has the
 * granule alone, a device that was to lose it keeps a copy. Words are published before anybody is woken. All of this runs on the pager's thread.
 */
#include <assert.h>
#include <errno.h>

#include "pager.h"
#include "vm.h"

#define STAGING_BYTES (2 * UVAS_MOVE_BYTES)
#define MOVE_TRIES 64 /* of pages that the kernel had in its hands just then */

static struct {
    int faults;
    uint32_t features;
    char *memory, *staging; /* aligned to UVAS_MOVE_BYTES inside memory */
    int pages, bytes;       /* /proc/self/pagemap; /proc/self/mem */
    uintptr_t stuck;        /* the page that last answered EBUSY; 0: it was something else */
} our = {.faults = -1, .pages = -1, .bytes = -1};

/* ---- runs ------------------------------------------------------------------------------------------------------------------------- */

struct uvas_extent uvas_extent_from(struct uvas_mirror *mirror, uint32_t first, uint32_t most) {
    uint32_t word = uvas_granule_word(&mirror->directory[first]), count = 1;
    uint32_t at_once = (uint32_t)(UVAS_MOVE_BYTES >> mirror->domain->shift);
    most = most < at_once ? most : at_once;
    most = most < mirror->granules - first ? most : mirror->granules - first;
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
    return our.staging + (uvas_extent_base(run) & (UVAS_MOVE_BYTES - 1));
}

static void drop_staging(const struct uvas_extent *run) {
    (void)uvas_vm_drop((uintptr_t)staged(run), uvas_extent_bytes(run));
}

/* Whether the host has a page there, in RAM or swapped out. */
static bool present(uintptr_t address) {
    uint64_t entry = 0;
    (void)uvas_vm_read_at(our.pages, &entry, sizeof entry, (int64_t)(address / uvas_vm_platform.page_size * sizeof entry));
    return (entry >> 62) != 0;
}

/* A page that is in the middle of something else's move answers EEXIST although it has moved: the source tells. */
static long move_some(uintptr_t to, uintptr_t from, size_t size) {
    long moved = uvas_fault_move(our.faults, to, from, size);
    return moved == -EEXIST && !present(from) ? (long)uvas_vm_platform.page_size : moved;
}

/* What was taken goes back, by a copy where it will not move. Nothing else can have come there: who touches it waits for us. */
static int put_back(uintptr_t to, uintptr_t from, size_t size) {
    size_t page = uvas_vm_platform.page_size;
    int tries = 0;
    for (size_t done = 0; done < size;) {
        long put = move_some(to + done, from + done, size - done);
        if (put < 0 && put != -EAGAIN) {
            put = present(from + done) ? uvas_fault_copy(our.faults, to + done, (const void *)(from + done), page, false) : (long)page;
        }
        if (put < 0 && tries++ == MOVE_TRIES) {
            return (int)put;
        }
        done += put > 0 ? (size_t)put : 0;
    }
    return 0;
}

/* Moves pages, all of them or none. */
static int take_pages(uintptr_t to, uintptr_t from, size_t size) {
    int tries = 0;
    for (size_t done = 0; done < size;) {
        long moved = move_some(to + done, from + done, size - done);
        if (moved == -EAGAIN && tries++ < MOVE_TRIES) {
            continue;
        }
        if (moved < 0) {
            our.stuck = moved == -EBUSY ? from + done : 0;
            return put_back(from, to, done) < 0 ? -EIO : (int)moved;
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
        if (present(uvas_extent_base(run) + at)) {
            long got = uvas_vm_read_at(our.bytes, staged(run) + at, page, (int64_t)(uvas_extent_base(run) + at));
            rc = got < 0 ? (int)got : got < (long)page ? -EFAULT : 0;
        }
    }
    if (rc < 0) {
        drop_staging(run);
        (void)uvas_fault_unprotect(our.faults, uvas_extent_base(run), uvas_extent_bytes(run));
    }
    return rc;
}

static int take(const struct uvas_extent *run, bool *copied) {
    *copied = false;
    int rc = our.features & UVAS_FAULT_MOVES ? take_pages((uintptr_t)staged(run), uvas_extent_base(run), uvas_extent_bytes(run)) : -EINVAL;
    if (rc == -EINVAL || (rc == -EBUSY && !(run->word & UVAS_MODIFIED))) { /* what nobody may write has no write in flight */
        *copied = true;
        rc = copy_out(run);
    }
    return rc;
}

static void give_back(const struct uvas_extent *run, bool copied) {
    if (copied) {
        drop_staging(run);
        (void)uvas_fault_unprotect(our.faults, uvas_extent_base(run), uvas_extent_bytes(run));
    } else {
        (void)put_back(uvas_extent_base(run), (uintptr_t)staged(run), uvas_extent_bytes(run));
    }
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

static int protect(const struct uvas_extent *run, uint32_t party) {
    struct uvas_member *member = member_of(run, party);
    int rc = member->dead ? 0 : uvas_fault_protect(member->faults, uvas_extent_base(run), uvas_extent_bytes(run));
    return gone(rc) ? 0 : rc;
}

static int unprotect(const struct uvas_extent *run, uint32_t party) {
    struct uvas_member *member = member_of(run, party);
    int rc = member->dead ? 0 : uvas_fault_unprotect(party == UVAS_HOST ? our.faults : member->faults, uvas_extent_base(run), uvas_extent_bytes(run));
    return gone(rc) ? 0 : rc;
}

/* Bytes into a device's memory, which nobody can reach yet. */
static int write_store(const struct uvas_extent *run, uint32_t party, const char *from) {
    for (size_t done = 0; done < uvas_extent_bytes(run);) {
        long put = uvas_vm_write_at(run->mirror->stores[party].fd, from + done, uvas_extent_bytes(run) - done, (int64_t)(uvas_extent_offset(run) + done));
        if (put <= 0) {
            return put == 0 || put == -ENOSPC ? -ENOMEM : (int)put;
        }
        done += (size_t)put;
    }
    return 0;
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

/* Bytes into the host's memory, write-protected. */
static int copy_in(const struct uvas_extent *run, const char *from) {
    for (size_t done = 0; done < uvas_extent_bytes(run);) {
        long put = uvas_fault_copy(our.faults, uvas_extent_base(run) + done, from + done, uvas_extent_bytes(run) - done, true);
        if (put == -EAGAIN) {
            continue;
        }
        if (put < 0 && put != -EEXIST) {
            return (int)put;
        }
        done += put > 0 ? (size_t)put : uvas_vm_platform.page_size;
    }
    return 0;
}

static void drop_host(const struct uvas_extent *run) {
    (void)uvas_vm_drop(uvas_extent_base(run), uvas_extent_bytes(run));
}

/* ---- moving ---------------------------------------------------------------------------------------------------------------------------- */

static int fill_zero(const struct uvas_extent *run, uint32_t party) {
    if (party != UVAS_HOST) {
        const struct uvas_store *store = &run->mirror->stores[party];
        int rc = store->stale ? uvas_vm_punch(store->fd, (int64_t)uvas_extent_offset(run), uvas_extent_bytes(run)) : 0;
        return rc < 0 ? rc : uvas_vm_allocate(store->fd, (int64_t)uvas_extent_offset(run), uvas_extent_bytes(run));
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

/* The source could not be read, or the new holder not be filled: as it was. */
static int undo_fill(const struct uvas_extent *run, uint32_t party, const struct uvas_transition *next, bool copied, int rc) {
    if (party == UVAS_HOST) {
        drop_host(run);
    } else {
        (void)uvas_vm_punch(run->mirror->stores[party].fd, (int64_t)uvas_extent_offset(run), uvas_extent_bytes(run));
    }
    if (next->steps & UVAS_STEP_TAKE) {
        give_back(run, copied);
        uvas_publish(run, (run->word & ~UVAS_PARTY_BITS) | UVAS_MODIFIED | 1u << UVAS_HOST); /* moving takes protection away */
    } else if (next->steps & UVAS_STEP_PROTECT) {
        (void)unprotect(run, next->source);
    }
    return rc;
}

/* All others lose theirs. Returns those who did not (punching failed): they keep a copy that is true, as nobody has written yet. */
static uint32_t drop_others(const struct uvas_extent *run, uint32_t drops) {
    uint32_t left = 0;
    if (drops & 1) {
        drop_host(run);
    }
    for (uint32_t party = 1; drops >> party != 0; party++) {
        left |= (drops >> party & 1) && punch(run, party) < 0 ? 1u << party : 0u;
    }
    return left;
}

/* The new holder is full and out of everybody's reach. */
static int hand_over(const struct uvas_extent *run, uint32_t party, bool write, struct uvas_transition *next, bool copied) {
    if ((next->steps & UVAS_STEP_KEEP) && copy_in(run, staged(run)) < 0) { /* where pages stayed it fills the holes */
        drop_host(run); /* no room on the host for a copy: the device has it alone */
        next->after = (next->after & ~UVAS_PARTY_BITS) | 1u << party | UVAS_MODIFIED;
        write = true;
    }
    if ((next->steps & UVAS_STEP_TAKE)) {
        if (copied && write) {
            drop_host(run);
        }
        drop_staging(run);
    }
    uint32_t left = next->steps & UVAS_STEP_DROP ? drop_others(run, next->drops) : 0;
    if (left) { /* nobody may write while somebody else reads */
        next->after = (next->after & ~UVAS_MODIFIED) | left;
        write = false;
    }
    int rc = left ? -EAGAIN : 0;
    uvas_publish(run, next->after);
    if (party != UVAS_HOST) {
        int mapped = next->steps & UVAS_STEP_MAP ? map(run, party, !write) : write ? unprotect(run, party) : 0;
        return rc < 0 ? rc : mapped == -ENOMEM ? 0 : mapped; /* what is not mapped is a fault, which finds it there */
    }
    return rc == 0 && write ? unprotect(run, UVAS_HOST) : rc;
}

/* Whether a device's memory cannot be read (it broke): asked again, by another call, before anything is given up. */
static bool unreadable(const struct uvas_extent *run, uint32_t party) {
    size_t page = uvas_vm_platform.page_size;
    bool bad = false;
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
            (void)punch(run, party);
        }
    }
    uvas_publish(run, (run->word & ~(UVAS_PARTY_BITS | UVAS_MODIFIED)) | UVAS_LOST);
    return -EIO;
}

static int bring(const struct uvas_extent *run, uint32_t party, bool write, struct uvas_transition *next) {
    bool copied = false;
    int rc = next->steps & UVAS_STEP_TAKE ? take(run, &copied) : next->steps & UVAS_STEP_PROTECT ? protect(run, next->source) : 0;
    if (rc < 0) {
        return rc;
    }
    const char *from = next->steps & UVAS_STEP_TAKE ? staged(run) : alias_of(run, next->source);
    rc = party == UVAS_HOST ? copy_in(run, from) : write_store(run, party, from);
    if (rc < 0) {
        rc = undo_fill(run, party, next, copied, rc);
        bool broken = (rc == -EFAULT || rc == -EHWPOISON || rc == -EIO) && uvas_holders(run->word) == 1u << next->source && next->source != UVAS_HOST;
        return broken && unreadable(run, next->source) ? lose(run) : rc;
    }
    if (party != UVAS_HOST) {
        uvas_residency_came(member_of(run, party), run);
    }
    count(run, next->source, party);
    return hand_over(run, party, write, next, copied);
}

int uvas_move(const struct uvas_extent *run, uint32_t party, bool write) {
    struct uvas_transition next = uvas_directory_next(run->word, party, write);
    assert(run->word & UVAS_COMMITTED && !(run->word & UVAS_LOST));
    if (next.steps & UVAS_STEP_FILL) {
        return bring(run, party, write, &next);
    }
    if (next.steps & UVAS_STEP_ZERO) {
        int rc = fill_zero(run, party);
        if (rc < 0) {
            return party == UVAS_HOST ? rc : undo_fill(run, party, &next, false, rc);
        }
        if (party != UVAS_HOST) {
            uvas_residency_came(member_of(run, party), run);
        }
        write = true;
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

int uvas_move_discard(const struct uvas_extent *run) {
    uint32_t holders = uvas_holders(run->word), left = 0;
    int rc = 0;
    for (uint32_t party = 1; party < UVAS_PARTIES; party++) {
        int punched = holders >> party & 1 ? punch(run, party) : 0;
        left |= punched < 0 ? 1u << party : 0u;
        rc = punched < 0 ? punched : rc;
    }
    drop_host(run); /* and marks of what was lost */
    uint32_t host = run->mirror->armed ? 0u : UVAS_MODIFIED | 1u << UVAS_HOST; /* holes in the host's memory are zeros as well */
    uvas_publish(run, (run->word & ~(UVAS_PARTY_BITS | UVAS_MODIFIED | UVAS_LOST)) | left | host);
    return rc;
}

/* The host has the granule, and a page of it is not there, or is protected still. The rest is filled as well: it is the next that somebody touches. */
static void repair_host(struct uvas_extent *run) {
    uint32_t devices = uvas_holders(run->word) & ~1u;
    if (devices) { /* others read: the same bytes, protected */
        (void)copy_in(run, alias_of(run, (uint32_t)__builtin_ctz(devices)));
        return;
    }
    uvas_publish(run, run->word | UVAS_MODIFIED);
    (void)fill_zero(run, UVAS_HOST);
    (void)unprotect(run, UVAS_HOST);
}

void uvas_move_repair(struct uvas_mirror *mirror, uint32_t granule, uint32_t party, uintptr_t address) {
    struct uvas_extent run = uvas_extent_from(mirror, granule, 1);
    bool writable = (run.word & UVAS_MODIFIED) != 0;
    if (run.word & UVAS_LOST) {
        (void)uvas_fault_poison(party == UVAS_HOST ? our.faults : member_of(&run, party)->faults, address, uvas_vm_platform.page_size);
    } else if (party == UVAS_HOST) {
        repair_host(&run);
    } else {
        (void)map(&run, party, !writable);
        if (writable) {
            (void)unprotect(&run, party);
        }
    }
}
