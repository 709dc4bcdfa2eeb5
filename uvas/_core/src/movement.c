/* movement.c: the public verbs of memory that moves. Each holds the reservation in place while it asks the pager. */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "failure.h"
#include "limits.h"
#include "mirrors.h"
#include "vm.h"

/* ---- ranges --------------------------------------------------------------------------------------------------------------------------- */

/* Pins a live reservation, so that it is not released meanwhile. NULL and it is said. */
static struct uvas_record *pin_record(uvas_id id, size_t offset, size_t size, int *rc) {
    struct uvas_record *record = NULL;
    *rc = uvas_core_ready();
    uvas_registry_lock();
    while (*rc == 0) {
        record = uvas_slots_get(&uvas_record_slots, id);
        if (!record || record->state != UVAS_LIVE || record->kind != UVAS_RESERVATION) {
            *rc = uvas_fail_released("reservation", id);
        } else if (size == 0 || offset > record->size || size > record->size - offset) {
            *rc = uvas_fail_invalid("[0x%zx, +0x%zx) is not inside the reservation's 0x%zx bytes at 0x%lx, or empty", offset, size, record->size, record->base);
        } else if (record->space->exclusive) {
            uvas_registry_wait();
        } else {
            record->pins++;
            record->space->working++;
            break;
        }
    }
    uvas_registry_unlock();
    return *rc == 0 ? record : NULL;
}

static void unpin_record(struct uvas_record *record) {
    uvas_registry_lock();
    record->pins--;
    uvas_space_leave(record->space);
    uvas_registry_wake();
    uvas_registry_unlock();
}

struct granules {
    uint32_t first, end;
};

static struct granules widened(const struct uvas_record *record, size_t offset, size_t size) {
    uint32_t shift = record->mirror->domain->shift;
    return (struct granules){(uint32_t)(offset >> shift), (uint32_t)((offset + size - 1) >> shift) + 1};
}

/* The part of [offset, offset + size) that is of one nature, from its beginning on. 0: it is not committed. Under no lock: copied out. */
static uint32_t nature(struct uvas_record *record, size_t offset, size_t end, size_t *until, uint32_t *protection) {
    uint32_t kind = 0;
    *until = end;
    uvas_registry_lock();
    size_t i = uvas_pieces_after(&record->pieces, offset);
    if (i < record->pieces.count) {
        const struct uvas_piece_entry *piece = &record->pieces.list[i];
        bool inside = piece->start <= offset;
        size_t edge = inside ? piece->end : piece->start;
        kind = inside && uvas_piece_committed(piece) ? piece->kind : 0;
        *protection = piece->protection;
        *until = edge < end ? edge : end;
    }
    uvas_registry_unlock();
    return kind;
}

/* All of it is memory of the kind that can move, and may be read. */
static int movable(struct uvas_record *record, size_t offset, size_t size) {
    size_t end = offset + size, until;
    for (; offset < end; offset = until) {
        uint32_t protection = UVAS_READ, kind = nature(record, offset, end, &until, &protection);
        uintptr_t base = record->base + offset;
        if (kind == 0) {
            return uvas_fail_invalid("[0x%lx, 0x%lx) is not committed: there is nothing to move", base, record->base + until);
        }
        if (protection == UVAS_NONE) {
            return uvas_fail_invalid("[0x%lx, 0x%lx) may not be accessed (protection none): it does not move", base, record->base + until);
        }
        if (kind == UVAS_BACKING_DESCRIPTOR) { /* other memory that all share has nowhere to move, which is no error */
            return uvas_fail_unsupported("moving a mapped descriptor", "copy it into committed memory", "[0x%lx, 0x%lx) maps a descriptor, which stays where it is",
                                         base, record->base + until);
        }
    }
    return 0;
}

/* The attached device with this id. The space has somebody at work in it, so it stays. */
static struct uvas_party *party_of(struct uvas_space *space, uvas_id device) {
    for (uint32_t i = 0; i < space->party_count; i++) {
        if (atomic_load_explicit(&space->parties[i]->slot.id, memory_order_relaxed) == device) {
            return space->parties[i];
        }
    }
    return NULL;
}

/* ---- prefetch -------------------------------------------------------------------------------------------------------------------------- */

static int tell_moved(const struct uvas_record *record, const struct uvas_errand *move, const char *target, struct uvas_moved *out) {
    uint32_t shift = record->mirror->domain->shift;
    struct uvas_moved moved = {.bytes = move->moved, .stayed_count = move->stayed_count, .why = move->why};
    for (uint32_t i = 0; i < move->stayed_count && i < UVAS_STAYED; i++) {
        moved.stayed[i] = (struct uvas_stays){.base = record->base + ((size_t)move->stayed[i].first << shift),
                                              .size = (size_t)(move->stayed[i].end - move->stayed[i].first) << shift};
    }
    if (out) {
        *out = moved;
    }
    if (move->rc == -ESRCH) {
        return uvas_fail_device(record->base, record->size, target, "prefetch", -ESRCH);
    }
    if (move->rc == -ENOMEM || move->rc == -ENOSPC) {
        return uvas_fail_memory(record->base + ((size_t)move->first << shift), (size_t)(move->end - move->first) << shift, target);
    }
    if (move->rc < 0) {
        return uvas_fail_system(record->base, record->size, "prefetch", move->rc);
    }
    if (move->stayed_count > 0) {
        struct uvas_failure *failure = uvas_fail(UVAS_FAILURE_BUSY, -EBUSY);
        failure->base = moved.stayed[0].base;
        failure->size = moved.stayed[0].size;
        return uvas_fail_say(failure, "%u ranges stayed where they were, the first [0x%lx, 0x%lx): %s", moved.stayed_count, failure->base,
                             failure->base + failure->size, move->why == -EBUSY ? "pinned, by I/O in flight or on purpose" : move->why == -EIO ? "lost" : "no memory");
    }
    return 0;
}

static int prefetch(struct uvas_record *record, size_t offset, size_t size, uvas_id device, bool advised, struct uvas_moved *out) {
    struct uvas_party *party = device ? party_of(record->space, device) : NULL;
    if (device && !party) {
        return uvas_fail_released("device", device);
    }
    int rc = movable(record, offset, size);
    if (rc < 0 || !record->mirror || (party && !party->member)) {
        return rc;
    }
    struct granules range = widened(record, offset, size);
    struct uvas_errand move = {.kind = UVAS_ASK_MOVE, .mirror = record->mirror, .party = party ? party->member->party : UVAS_HOST, .write = true, .advised = advised,
                                .first = range.first, .end = range.end, .from = range.first, .most = UINT32_MAX};
    size_t bytes = (size_t)(range.end - range.first) << record->mirror->domain->shift;
    bool fits = !party || !party->member->capacity || bytes <= party->member->capacity;
    move.rc = fits ? 0 : -ENOSPC;
    rc = fits ? uvas_ask(&move) : move.rc;
    rc = tell_moved(record, &move, party ? party->name : "the host", out);
    return rc == 0 ? 0 : rc == -ENOMEM && !fits ? uvas_fail_memory(record->base + offset, bytes, party->name) : rc;
}

int uvas_prefetch(uvas_id reservation, size_t offset, size_t size, uvas_id device, struct uvas_moved *out) {
    int rc;
    if (out) {
        *out = (struct uvas_moved){0};
    }
    struct uvas_record *record = pin_record(reservation, offset, size, &rc);
    if (record) {
        rc = prefetch(record, offset, size, device, true, out);
        unpin_record(record);
    }
    return rc;
}

/* ---- advice ------------------------------------------------------------------------------------------------------------------------------ */

static uint32_t advised(uint32_t was, uint32_t advice, uint32_t party) {
    uint32_t bit = 1u << party;
    switch (advice) {
    case UVAS_ADVISE_READ_MOSTLY:
        return was | UVAS_ADVICE_READ_MOSTLY;
    case UVAS_ADVISE_ACCESSED_BY:
        return was & UVAS_ADVICE_PREFERRED ? was : was | bit;
    case UVAS_ADVISE_PREFERRED:
        return (was & UVAS_ADVICE_READ_MOSTLY) | (party == UVAS_HOST ? UVAS_ADVICE_PREFERRED_HOST : UVAS_ADVICE_PREFERRED | bit);
    default:
        return 0;
    }
}

int uvas_advise(uvas_id reservation, size_t offset, size_t size, uint32_t advice, uvas_id device) {
    int rc;
    if (advice > UVAS_ADVISE_ACCESSED_BY) {
        return uvas_fail_invalid("%u is no advice", advice);
    }
    struct uvas_record *record = pin_record(reservation, offset, size, &rc);
    if (!record) {
        return rc;
    }
    struct uvas_party *party = device ? party_of(record->space, device) : NULL;
    if (device && !party) {
        rc = uvas_fail_released("device", device);
    } else if (record->mirror && !(party && !party->member)) {
        struct granules range = widened(record, offset, size);
        for (uint32_t g = range.first; g < range.end; g++) {
            uint32_t was = atomic_load_explicit(&record->mirror->advice[g], memory_order_relaxed);
            uint32_t is = advised(was, advice, party ? party->member->party : UVAS_HOST);
            if (is != was) {
                atomic_store_explicit(&record->mirror->advice[g], is, memory_order_relaxed);
            }
        }
    }
    unpin_record(record);
    return rc;
}

/* ---- where ------------------------------------------------------------------------------------------------------------------------------- */

static uint32_t protection_flags(uint32_t protection) {
    return protection == UVAS_NONE ? UVAS_PAGE_PROTECTED : protection & UVAS_WRITE ? 0u : (uint32_t)UVAS_PAGE_READ_ONLY;
}

/* Who has a page of memory that moves. The directory knows of granules; of the host's pages the kernel knows which are there. */
static uint32_t page_word(const struct uvas_record *record, size_t offset, bool present) {
    uint32_t word = uvas_granule_word(&record->mirror->directory[offset >> record->mirror->domain->shift]);
    uint32_t holders = uvas_holders(word) & ~(present ? 0u : (uint32_t)UVAS_PAGE_HOST);
    return holders | (word & UVAS_BYTES_LOST ? (uint32_t)UVAS_PAGE_LOST : 0u) | (holders & (holders - 1) ? (uint32_t)UVAS_PAGE_DUPLICATED : 0u);
}

#define PAGES_AT_ONCE 512u

static int where_private(struct uvas_record *record, int pages, size_t offset, size_t end, uint32_t flags, uint32_t *out) {
    uint64_t entries[PAGES_AT_ONCE];
    size_t page = uvas_vm_platform.page_size;
    while (offset < end) {
        size_t count = (end - offset + page - 1) / page < PAGES_AT_ONCE ? (end - offset + page - 1) / page : PAGES_AT_ONCE;
        long got = uvas_vm_read_at(pages, entries, count * sizeof *entries, (int64_t)((record->base + offset) / page * sizeof *entries));
        if (got < (long)(count * sizeof *entries)) {
            return got < 0 ? (int)got : -EIO;
        }
        for (size_t i = 0; i < count; i++, offset += page) {
            bool there = entries[i] >> 62 != 0;
            *out++ = (record->mirror ? page_word(record, offset, there) : there ? (uint32_t)UVAS_PAGE_HOST : 0u) | flags;
        }
    }
    return 0;
}

/* Of a file that others write as well the host's page table knows only what the host has touched: the file itself is asked what it holds. Ours alone:
 * the question moves the descriptor's position. */
static int where_in_memfd(const struct uvas_record *record, size_t offset, size_t end, uint32_t flags, uint32_t *out) {
    size_t page = uvas_vm_platform.page_size;
    int64_t data = 0, hole = 0;
    for (; offset < end; offset += page) {
        int rc = (int64_t)offset < hole ? 0 : uvas_vm_next_data(record->file->fd, (int64_t)offset, &data, &hole);
        if (rc < 0) {
            return rc;
        }
        *out++ = ((int64_t)offset >= data ? (uint32_t)UVAS_PAGE_HOST : 0u) | flags;
    }
    return 0;
}

/* A descriptor of the caller's stays where it is, whoever touches it. */
static void where_descriptor(size_t offset, size_t end, uint32_t flags, uint32_t *out) {
    for (; offset < end; offset += uvas_vm_platform.page_size) {
        *out++ = UVAS_PAGE_HOST | flags;
    }
}

static int where_part(struct uvas_record *record, uint32_t kind, int pages, size_t offset, size_t end, uint32_t flags, uint32_t *out) {
    if (kind == UVAS_BACKING_DESCRIPTOR) {
        where_descriptor(offset, end, flags, out);
        return 0;
    }
    return kind == UVAS_BACKING_MEMFD ? where_in_memfd(record, offset, end, flags, out) : where_private(record, pages, offset, end, flags, out);
}

static int where_all(struct uvas_record *record, int pages, size_t offset, size_t size, uint32_t *out) {
    size_t page = uvas_vm_platform.page_size, end = offset + size, until;
    int rc = 0;
    for (; rc == 0 && offset < end; offset = until) {
        uint32_t protection = UVAS_READ, kind = nature(record, offset, end, &until, &protection);
        size_t count = (until - offset + page - 1) / page;
        if (kind == 0) {
            memset(out, 0, count * sizeof *out);
        } else {
            rc = where_part(record, kind, pages, offset, until, protection_flags(protection), out);
        }
        out += count;
    }
    return rc;
}

int uvas_where(uvas_id reservation, size_t offset, size_t size, uint32_t *out) {
    int rc;
    if (offset & (uvas_vm_platform.page_size - 1) || size & (uvas_vm_platform.page_size - 1)) {
        return uvas_fail_invalid("[0x%zx, +0x%zx) is not of whole pages", offset, size);
    }
    struct uvas_record *record = pin_record(reservation, offset, size, &rc);
    if (!record) {
        return rc;
    }
    int pages = uvas_vm_open_pages();
    rc = pages < 0 ? pages : where_all(record, pages, offset, size, out);
    uvas_vm_close(pages);
    unpin_record(record);
    return rc == -EMFILE || rc == -ENFILE ? uvas_limits_descriptors(0, 0, rc)
           : rc < 0                       ? uvas_fail_system(0, 0, "asking the kernel which pages are there", rc)
                                          : 0;
}

int uvas_page_bit(uvas_id space_id, uvas_id device, uint32_t *out) {
    uvas_registry_lock();
    struct uvas_space *space = uvas_space_enter(space_id);
    struct uvas_party *party = space ? party_of(space, device) : NULL;
    uint32_t bit = party && party->member ? 1u << party->member->party : 0u;
    if (space) {
        uvas_space_leave(space);
    }
    uvas_registry_unlock();
    if (!space || !party) {
        return space ? uvas_fail_released("device", device) : -ESTALE;
    }
    *out = bit;
    return 0;
}

/* ---- discard, pin ------------------------------------------------------------------------------------------------------------------------- */

int uvas_discard(uvas_id reservation, size_t offset, size_t size) {
    int rc;
    struct uvas_record *record = pin_record(reservation, offset, size, &rc);
    if (!record) {
        return rc;
    }
    size_t unit = record->mirror ? uvas_mirrors_unit(record) : uvas_vm_platform.page_size;
    unpin_record(record);
    size_t first = (offset + unit - 1) / unit * unit, end = (offset + size) / unit * unit;
    rc = first < end ? uvas_zero_leased(reservation, first, end - first) : 0;
    return rc == -ENOTSUP ? uvas_fail_unsupported("discarding this memory", "discard what was committed, and no descriptor", "[0x%zx, +0x%zx) is not all committed memory", offset, size)
           : rc == -ESTALE || rc == -EINVAL ? rc
           : rc < 0                         ? uvas_fail_system(0, 0, "discard", rc)
                                            : 0;
}

struct pin {
    struct uvas_stretch stretch;
    uvas_id lease;
    uvas_id reservation; /* 0: nothing there moves */
};
_Static_assert(sizeof(struct pin) <= sizeof(struct uvas_pin), "what is public has room for it");

#define PIN_TRIES 100 /* a device may take it again before it is pinned */

static int pin_moving(struct uvas_record *record, size_t offset, size_t size, struct pin *held) {
    struct granules range = widened(record, offset, size);
    struct uvas_errand pinning = {.kind = UVAS_ASK_PIN, .mirror = record->mirror, .stretch = &held->stretch, .first = range.first, .end = range.end};
    int rc = -EAGAIN;
    for (int tries = 0; rc == -EAGAIN && tries < PIN_TRIES; tries++) {
        rc = prefetch(record, offset, size, 0, false, NULL);
        rc = rc < 0 ? rc : uvas_ask(&pinning);
    }
    return rc == -EAGAIN ? uvas_fail_system(record->base + offset, size, "pinning: devices take it again and again", -EBUSY) : rc;
}

int uvas_pin_host(uvas_id reservation, size_t offset, size_t size, struct uvas_pin *out) {
    struct pin *held = (struct pin *)out; /* not written unless it is pinned */
    uvas_id lease = 0;
    int rc = uvas_lease(reservation, offset, size, &lease);
    struct uvas_record *record = rc < 0 ? NULL : pin_record(reservation, offset, size, &rc);
    if (!record) {
        (void)uvas_unlease(lease);
        return rc;
    }
    bool moves = record->mirror != NULL;
    rc = moves ? pin_moving(record, offset, size, held) : 0;
    unpin_record(record);
    if (rc < 0) {
        (void)uvas_unlease(lease);
        return rc;
    }
    held->lease = lease;
    held->reservation = moves ? reservation : 0;
    return 0;
}

int uvas_unpin_host(struct uvas_pin *out) {
    struct pin *held = (struct pin *)out;
    if (!held->lease) {
        return uvas_fail_invalid("this pin is not in use");
    }
    int rc;
    struct uvas_record *record = held->reservation ? pin_record(held->reservation, 0, 1, &rc) : NULL; /* the lease has kept it */
    if (record && record->mirror) { /* its last private device may have gone meanwhile */
        struct uvas_errand unpin = {.kind = UVAS_ASK_UNPIN, .mirror = record->mirror, .stretch = &held->stretch};
        (void)uvas_ask(&unpin);
    }
    if (record) {
        unpin_record(record);
    }
    (void)uvas_unlease(held->lease);
    memset(out, 0, sizeof *out);
    return 0;
}

/* ---- counters ---------------------------------------------------------------------------------------------------------------------------- */

static struct uvas_traffic traffic_of(const struct uvas_member *member, uvas_id device) {
    return (struct uvas_traffic){
        .device = device,
        .read_faults = atomic_load_explicit(&member->read_faults, memory_order_relaxed),
        .write_faults = atomic_load_explicit(&member->write_faults, memory_order_relaxed),
        .bytes_in = atomic_load_explicit(&member->bytes_in, memory_order_relaxed),
        .bytes_out = atomic_load_explicit(&member->bytes_out, memory_order_relaxed),
        .resident_bytes = atomic_load_explicit(&member->resident, memory_order_relaxed),
        .capacity = member->capacity,
        .evictions = atomic_load_explicit(&member->evictions, memory_order_relaxed),
    };
}

static uint64_t in_ram(const void *tables, size_t bytes) {
    uint64_t found = 0;
    return tables && uvas_vm_resident((uintptr_t)tables, bytes, &found) == 0 ? found : 0;
}

/* Of the tables as many bytes as there are; the space has somebody at work, so they stay. Takes no lock. */
static uint64_t metadata_bytes(struct uvas_space *space) {
    uint64_t bytes = sizeof *space->domain;
    for (uint32_t i = 0; i < space->party_count; i++) {
        const struct uvas_member *member = space->parties[i]->member;
        const struct uvas_room *room = member ? member->room : NULL;
        bytes += member ? sizeof *member : 0;
        bytes += room ? sizeof *room + in_ram(room->probation.entries, room->rings_bytes) : 0;
    }
    uvas_registry_lock();
    size_t count = 0;
    struct uvas_record *record = space->records;
    while (record) {
        const struct uvas_mirror *mirror = record->kind == UVAS_RESERVATION && record->state == UVAS_LIVE ? record->mirror : NULL;
        struct uvas_record *next = record->next;
        if (mirror) {
            record->pins++;
            uvas_registry_unlock();
            bytes += sizeof *mirror + in_ram(mirror->directory, mirror->tables_bytes);
            for (uint32_t party = 1; party < UVAS_PARTIES; party++) {
                bytes += in_ram(mirror->stores[party].marks, mirror->stores[party].marks_bytes);
            }
            uvas_registry_lock();
            next = record->next;
            record->pins--;
            uvas_registry_wake();
            count++;
        }
        record = next;
    }
    uvas_registry_unlock();
    return bytes;
}

int uvas_movement(uvas_id space_id, struct uvas_movement *out) {
    uvas_registry_lock();
    struct uvas_space *space = uvas_space_enter(space_id);
    uvas_registry_unlock();
    if (!space) {
        return -ESTALE;
    }
    struct uvas_movement seen = {0};
    if (space->domain) {
        seen.pager_ns = atomic_load_explicit(&uvas_pager.busy_ns, memory_order_relaxed);
        seen.granule = (uint64_t)1 << space->domain->shift;
        seen.metadata_bytes = metadata_bytes(space);
        seen.parties[seen.count++] = traffic_of(&space->domain->host, 0);
        for (uint32_t i = 0; i < space->party_count; i++) {
            if (space->parties[i]->member) {
                seen.parties[seen.count++] = traffic_of(space->parties[i]->member, atomic_load_explicit(&space->parties[i]->slot.id, memory_order_relaxed));
            }
        }
    }
    uvas_registry_lock();
    uvas_space_leave(space);
    uvas_registry_unlock();
    *out = seen;
    return 0;
}

/* ---- what is possible here -------------------------------------------------------------------------------------------------------------- */

static uint32_t public_features(uint32_t features) {
    return (features & UVAS_FAULT_MOVES ? (uint32_t)UVAS_PRIVATE_PINNED : 0u) | (features & UVAS_FAULT_POISONS ? (uint32_t)UVAS_PRIVATE_POISON : 0u) |
           (features & UVAS_FAULT_USER_ONLY ? (uint32_t)UVAS_PRIVATE_USER_ONLY : 0u);
}

int uvas_private_memory(uint32_t *features) {
    uint32_t host, worker;
    int rc = uvas_core_ready();
    int fd = rc < 0 ? rc : uvas_fault_open(false, &host);
    int other = fd < 0 ? fd : uvas_fault_open(true, &worker);
    uvas_vm_close(fd);
    uvas_vm_close(other);
    if (rc < 0) {
        return rc;
    }
    if (other < 0) {
        return uvas_mirrors_unsupported(other);
    }
    *features = public_features(host);
    return 0;
}

int uvas_lend_faults(int32_t *out, uint32_t *features) {
    uint32_t found;
    int rc = uvas_core_ready();
    int fd = rc < 0 ? rc : uvas_fault_open(true, &found);
    if (fd < 0) {
        return rc < 0 ? rc : uvas_mirrors_unsupported(fd);
    }
    *out = fd;
    *features = public_features(found);
    return 0;
}
