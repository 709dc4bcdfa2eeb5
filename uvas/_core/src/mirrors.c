/* mirrors.c: life. Devices with memory of their own and reservations that they see come and go; memory is committed; the process forks.
 *
 * Everything that the pager uses is made here, before it is told of it, and freed here, after it has let go of it: it allocates nothing itself.
 */
#include "mirrors.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "failure.h"
#include "guard.h"
#include "limits.h"
#include "vm.h"

#define HOLD_LEAST_US 50u  /* measured: shorter ones let parties take a granule from each other faster than they can use it */
#define TABLE_STEP 64u     /* mirrors that the pager's tables grow by */

static pthread_t thread;
static uint32_t users; /* devices that have joined or are about to; under the registry's lock */
static uint32_t mirrors, tables_room; /* that there are or are about to be; that the pager's tables have room for. Under the registry's lock */
static bool changing;  /* somebody starts or stops the pager; under the registry's lock */

/* ---- the pager's thread: from the first device to the last ------------------------------------------------------------------------------ */

int uvas_mirrors_unsupported(int rc) {
    if (rc == -EPERM || rc == -EACCES) {
        return uvas_fail_unsupported("private device memory", "run as root or with CAP_SYS_PTRACE, set vm.unprivileged_userfaultfd = 1, or let the user open /dev/userfaultfd; "
                                     "memory=\"shared\" always works", "this process may not use userfaultfd");
    }
    return rc == -ENOSYS || rc == -EOPNOTSUPP || rc == -EINVAL
               ? uvas_fail_unsupported("private device memory", "Linux 5.19 or later, 6.8 for pinned pages; memory=\"shared\" always works",
                                       "this kernel's userfaultfd lacks what it takes")
           : rc == -EMFILE || rc == -ENFILE ? uvas_limits_descriptors(0, 0, rc)
           : rc == -ENOMEM                  ? uvas_fail_memory(0, 0, "the host")
                                            : uvas_fail_system(0, 0, "starting the pager", rc);
}

static void close_pager(void) {
    uvas_moves_close();
    uvas_vm_close(uvas_pager.watch);
    uvas_vm_close(uvas_pager.bell);
    uvas_vm_close(uvas_pager.faults);
    free(uvas_pager.mirrors);
    free(uvas_pager.numbered);
    uvas_pager = (struct uvas_pager){.faults = -1, .bell = -1, .watch = -1};
}

static int start_pager(void) {
    uvas_pager.faults = uvas_fault_open(false, &uvas_pager.features);
    int rc = uvas_pager.faults;
    rc = rc < 0 ? rc : (uvas_pager.bell = uvas_bell_open());
    rc = rc < 0 ? rc : (uvas_pager.watch = uvas_watch_open());
    rc = rc < 0 ? rc : uvas_watch_add(uvas_pager.watch, uvas_pager.bell, uvas_watched(NULL, UVAS_WATCHED_BELL));
    rc = rc < 0 ? rc : uvas_watch_add(uvas_pager.watch, uvas_pager.faults, uvas_watched(NULL, UVAS_WATCHED_FAULTS));
    rc = rc < 0 ? rc : uvas_moves_open(uvas_pager.faults, uvas_pager.features);
    rc = rc < 0 ? rc : uvas_guard_start();
    if (rc >= 0) {
        rc = uvas_thread_start(&thread, uvas_pager_main, NULL);
        if (rc < 0) {
            uvas_guard_stop();
        }
    }
    if (rc < 0) {
        close_pager();
    }
    return rc;
}

static void stop_pager(void) {
    struct uvas_errand stop = {.kind = UVAS_ASK_STOP};
    (void)uvas_ask(&stop);
    (void)pthread_join(thread, NULL);
    uvas_vm_close(uvas_pager.faults); /* who waits goes on: the mate may be one of them */
    uvas_pager.faults = -1;
    uvas_guard_stop();
    close_pager();
}

/* The lock is not held while threads and descriptors are made; who comes meanwhile waits. */
static int use_pager(void) {
    uvas_registry_lock();
    while (changing) {
        uvas_registry_wait();
    }
    bool first = users++ == 0;
    changing = first;
    uvas_registry_unlock();
    int rc = first ? start_pager() : 0;
    if (first) {
        uvas_registry_lock();
        changing = false;
        users -= rc < 0;
        uvas_registry_wake();
        uvas_registry_unlock();
    }
    return rc < 0 ? uvas_mirrors_unsupported(rc) : 0;
}

static void leave_pager(void) {
    uvas_registry_lock();
    while (changing) {
        uvas_registry_wait();
    }
    bool last = --users == 0;
    changing = last;
    uvas_registry_unlock();
    if (last) {
        stop_pager();
        uvas_registry_lock();
        changing = false;
        uvas_registry_wake();
        uvas_registry_unlock();
    }
}

/* ---- devices ------------------------------------------------------------------------------------------------------------------------------- */

static uint32_t shift_of(size_t granule) {
    return (uint32_t)__builtin_ctzl(granule ? granule : UVAS_GRANULE_DEFAULT);
}

int uvas_mirrors_suit(const struct uvas_space *space, const struct uvas_device *device) {
    size_t granule = (size_t)1 << shift_of(device->granule);
    const char *name = device->name ? device->name : "(unnamed)";
    if (device->granule & (device->granule - 1) || granule < UVAS_GRANULE_LEAST || granule > UVAS_GRANULE_MOST || granule < uvas_vm_platform.page_size) {
        return uvas_fail_invalid("device %s has granules of 0x%zx bytes: a power of two from 0x%zx to 0x%zx, not less than a page, is possible", name,
                                 device->granule, UVAS_GRANULE_LEAST, UVAS_GRANULE_MOST);
    }
    if (device->granularity < granule || device->placement != UVAS_CLAIMS || !(device->backings & UVAS_BACKING_ANONYMOUS) || device->faults < 0) {
        return uvas_fail_invalid("device %s has memory of its own: it claims, lives with anonymous memory, lends a userfaultfd, and its granularity is its "
                                 "granule or a multiple", name);
    }
    if (device->capacity && device->capacity < granule) {
        return uvas_fail_invalid("device %s has room for %llu bytes, which is less than a granule of 0x%zx", name, (unsigned long long)device->capacity, granule);
    }
    for (uint32_t i = 0; space->domain && space->domain->shift != shift_of(device->granule) && i < space->party_count; i++) {
        if (space->parties[i]->member) {
            return uvas_fail_unsupported("granules of two sizes in one space", "give all private devices of a space the same granule",
                                         "device %s moves 0x%zx bytes at once, device %s 0x%zx", name, granule, space->parties[i]->name,
                                         (size_t)1 << space->domain->shift);
        }
    }
    return 0;
}

static void free_member(struct uvas_member *member) {
    if (member) {
        uvas_vm_close(member->faults);
        uvas_vm_close(member->process);
        uvas_residency_close(member->room);
        free(member);
    }
}

static struct uvas_member *make_member(const struct uvas_domain *domain, const struct uvas_party *party, int *rc) {
    struct uvas_member *member = calloc(1, sizeof *member);
    if (!member) {
        *rc = uvas_fail_memory(0, sizeof *member, "the host");
        return NULL;
    }
    member->capacity = party->device.capacity;
    member->faults = uvas_vm_duplicate(party->device.faults);
    member->process = party->device.process < 0 || member->faults < 0 ? -1 : uvas_vm_duplicate(party->device.process);
    (void)snprintf(member->name, sizeof member->name, "%s", party->name);
    *rc = member->faults < 0 ? member->faults : party->device.process >= 0 && member->process < 0 ? member->process : 0;
    *rc = *rc < 0 ? *rc : uvas_residency_open(member, party->device.identity, domain->shift);
    if (*rc < 0) {
        *rc = *rc == -EMFILE || *rc == -ENFILE ? uvas_limits_descriptors(0, 0, *rc)
              : *rc == -ENOMEM                 ? uvas_fail_memory(0, (size_t)member->capacity, "the host")
                                               : uvas_fail_system(0, 0, "taking over a userfaultfd", *rc);
        free_member(member);
        return NULL;
    }
    return member;
}

static struct uvas_domain *make_domain(const struct uvas_space *space, size_t granule) {
    struct uvas_domain *domain = calloc(1, sizeof *domain);
    if (domain) {
        domain->shift = shift_of(granule);
        uint32_t by_size = (uint32_t)(1u << domain->shift) / 1024u;
        domain->hold_us = by_size > HOLD_LEAST_US ? by_size : HOLD_LEAST_US;
        domain->host = (struct uvas_member){.domain = domain, .faults = -1, .process = -1};
        (void)snprintf(domain->host.name, sizeof domain->host.name, "the host (space %.40s)", space->name);
        domain->members[UVAS_HOST] = &domain->host;
    }
    return domain;
}

static uint32_t free_party(const struct uvas_domain *domain) {
    uint32_t party = 1;
    while (party < UVAS_PARTIES && domain->members[party]) {
        party++;
    }
    return party;
}

int uvas_mirrors_join(struct uvas_space *space, struct uvas_party *party) {
    int rc = use_pager();
    if (rc < 0) {
        return rc;
    }
    struct uvas_domain *domain = space->domain ? space->domain : make_domain(space, party->device.granule);
    struct uvas_member *member = domain ? make_member(domain, party, &rc) : NULL;
    rc = domain ? rc : uvas_fail_memory(0, sizeof *domain, "the host");
    uint32_t number = domain ? free_party(domain) : UVAS_PARTIES;
    if (rc == 0 && number == UVAS_PARTIES) {
        rc = uvas_fail_unsupported("more private devices", "use two spaces", "space %s has %u devices with memory of their own already", space->name, UVAS_PARTIES - 1);
    }
    if (rc == 0) {
        member->domain = domain;
        member->party = number;
        struct uvas_errand join = {.kind = UVAS_ASK_JOIN, .member = member};
        rc = uvas_ask(&join);
        uvas_residency_close(join.spare);
        if (rc == -EEXIST) {
            rc = uvas_fail_invalid("device %s is in another space with another capacity or granule", party->name);
        } else if (rc == -E2BIG) {
            rc = uvas_fail_unsupported("more private devices", "detach some", "this process has %u devices with memory of their own already", UVAS_MEMBERS_MAX);
        } else if (rc < 0) {
            rc = uvas_fail_system(0, 0, "epoll_ctl", rc);
        }
    }
    if (rc < 0) {
        free_member(member);
        if (domain != space->domain) {
            free(domain);
        }
        leave_pager();
        return rc;
    }
    space->domain = domain;
    party->member = member;
    return 0;
}

static int leave(struct uvas_member *member, enum uvas_request_kind kind) {
    struct uvas_errand ask = {.kind = kind, .member = member};
    int rc = uvas_ask(&ask);
    if (rc == -EBUSY) {
        return uvas_fail_say(uvas_fail(UVAS_FAILURE_BUSY, -EBUSY), "memory of the space is pinned on the host: its last private device, %s, leaves when the pins have ended",
                             member->name);
    }
    return rc == -ENOMEM ? uvas_fail_memory(0, atomic_load_explicit(&member->resident, memory_order_relaxed), "the host")
           : rc < 0      ? uvas_fail_system(0, 0, "bringing a device's memory home", rc)
                         : 0;
}

int uvas_mirrors_home(struct uvas_party *party) {
    return leave(party->member, UVAS_ASK_HOME);
}

static void drop_store(struct uvas_mirror *mirror, uint32_t party) {
    struct uvas_store *store = &mirror->stores[party];
    if (store->alias) {
        (void)uvas_vm_unmap((uintptr_t)store->alias, mirror->size);
        uvas_vm_close(store->fd);
        if (store->marks) {
            (void)uvas_vm_unmap((uintptr_t)store->marks, store->marks_bytes);
        }
        *store = (struct uvas_store){.fd = -1};
    }
}

int uvas_mirrors_part(struct uvas_space *space, struct uvas_party *party) {
    struct uvas_member *member = party->member;
    struct uvas_domain *domain = space->domain;
    int rc = leave(member, UVAS_ASK_LEAVE);
    if (rc < 0) {
        return rc;
    }
    for (struct uvas_record *record = space->records; record; record = record->next) {
        if (record->mirror) { /* nobody holds anything there any more, and the pager does not know the party */
            drop_store(record->mirror, member->party);
        }
    }
    free_member(member);
    party->member = NULL;
    bool last = true;
    for (uint32_t other = 1; other < UVAS_PARTIES; other++) {
        last &= !domain->members[other];
    }
    if (last) {
        for (struct uvas_record *record = space->records; record; record = record->next) {
            struct uvas_stretch none = {0};
            uvas_mirrors_drop(record, &none);
        }
        uvas_registry_lock();
        bool poisoned = domain->mirrors > 0; /* a reservation that is nobody's any more has one, and the pager may meet it */
        uvas_registry_unlock();
        if (!poisoned) {
            free(domain);
        }
        space->domain = NULL;
    }
    leave_pager();
    return 0;
}

/* ---- reservations ------------------------------------------------------------------------------------------------------------------------------- */

static size_t whole_pages(size_t bytes) {
    size_t page = uvas_vm_platform.page_size;
    return (bytes + page - 1) / page * page;
}

/* Directory, advice and blocks, one after the other: addresses only, until somebody writes there. */
static int lay_out(struct uvas_mirror *mirror) {
    size_t directory = whole_pages(mirror->granules * sizeof *mirror->directory), advice = whole_pages(mirror->granules * sizeof *mirror->advice);
    size_t blocks = whole_pages(mirror->granules / UVAS_BLOCK_GRANULES + 1);
    char *memory = uvas_vm_pages(directory + advice + blocks);
    if (!memory) {
        return -ENOMEM;
    }
    mirror->tables_bytes = directory + advice + blocks;
    mirror->directory = (void *)memory;
    mirror->advice = (void *)(memory + directory);
    mirror->blocks = (void *)(memory + directory + advice);
    return 0;
}

/* Tables with room for all mirrors there are, for the pager to use if its own are smaller. */
static void larger_tables(struct uvas_errand *add) {
    uvas_registry_lock();
    add->mirror->domain->mirrors++;
    tables_room = ++mirrors > tables_room ? 2 * mirrors + TABLE_STEP : tables_room;
    add->table_room = tables_room;
    uvas_registry_unlock();
    add->tables[0] = calloc(add->table_room, sizeof *add->tables[0]);
    add->tables[1] = calloc(add->table_room, sizeof *add->tables[1]);
}

static void one_mirror_less(struct uvas_domain *domain) {
    uvas_registry_lock();
    mirrors--;
    domain->mirrors--;
    uvas_registry_unlock();
}

static void free_mirror(struct uvas_mirror *mirror) {
    for (uint32_t party = 1; party < UVAS_PARTIES; party++) {
        drop_store(mirror, party);
    }
    if (mirror->directory) {
        (void)uvas_vm_unmap((uintptr_t)mirror->directory, mirror->tables_bytes);
    }
    free(mirror);
}

static int make_mirror(struct uvas_record *record) {
    struct uvas_domain *domain = record->space->domain;
    if (record->size >> domain->shift >= UINT32_MAX) {
        return uvas_fail_invalid("0x%zx bytes are more granules of 0x%zx than can be counted: reserve less at once, or use larger granules", record->size,
                                 (size_t)1 << domain->shift);
    }
    struct uvas_mirror *mirror = calloc(1, sizeof *mirror);
    struct uvas_errand add = {.kind = UVAS_ASK_ADD, .mirror = mirror};
    int rc = mirror ? 0 : -ENOMEM;
    if (rc == 0) {
        mirror->domain = domain;
        mirror->base = record->base;
        mirror->size = record->size;
        mirror->granules = (uint32_t)(record->size >> domain->shift);
        rc = lay_out(mirror);
    }
    if (rc == 0) {
        larger_tables(&add);
        rc = add.tables[0] && add.tables[1] && add.table_room <= UVAS_MIRRORS_MAX ? uvas_ask(&add) : -ENOMEM;
        free(add.tables[0]);
        free(add.tables[1]);
        if (rc < 0) {
            one_mirror_less(domain);
        }
    }
    if (rc < 0) {
        if (mirror) {
            free_mirror(mirror);
        }
        return uvas_fail_memory(record->base, record->size, "the host");
    }
    record->mirror = mirror;
    return 0;
}

static int make_store(struct uvas_record *record, struct uvas_party *party) {
    struct uvas_mirror *mirror = record->mirror;
    struct uvas_store store = {.fd = -1};
    char name[2 * UVAS_NAME_BYTES + 8];
    (void)snprintf(name, sizeof name, "uvas:%s/%s", party->name, record->name);
    store.fd = uvas_vm_memfd(name, record->size);
    int rc = store.fd < 0 ? store.fd : 0;
    store.alias = rc < 0 ? NULL : uvas_vm_alias(store.fd, record->size);
    rc = rc < 0 ? rc : store.alias ? 0 : -ENOMEM;
    if (rc == 0 && party->member->capacity) {
        store.marks_bytes = whole_pages(mirror->granules / 4 + 1);
        store.marks = uvas_vm_pages(store.marks_bytes);
        rc = store.marks ? 0 : -ENOMEM;
    }
    if (rc < 0) {
        if (store.alias) {
            (void)uvas_vm_unmap((uintptr_t)store.alias, record->size);
        }
        uvas_vm_close(store.fd);
        return rc == -EMFILE || rc == -ENFILE ? uvas_limits_descriptors(record->base, record->size, rc)
               : rc == -ENOMEM                ? uvas_limits_explain(record->base, record->size)
                                              : uvas_fail_system(record->base, record->size, "memfd_create", rc);
    }
    struct uvas_errand add = {.kind = UVAS_ASK_STORE, .mirror = mirror, .party = party->member->party, .store = store};
    return uvas_ask(&add);
}

int uvas_mirrors_claim_one(struct uvas_record *record, struct uvas_party *party) {
    bool fresh = !record->mirror;
    int rc = fresh ? make_mirror(record) : 0;
    rc = rc < 0 || record->mirror->stores[party->member->party].alias ? rc : make_store(record, party);
    if (rc < 0 && fresh && record->mirror) {
        struct uvas_failure said = *uvas_last_failure();
        struct uvas_stretch none = {0};
        uvas_mirrors_drop(record, &none);
        *uvas_fail(said.kind, said.code) = said;
    }
    return rc;
}

int uvas_mirrors_claim(struct uvas_record *record) {
    const struct uvas_space *space = record->space;
    int rc = 0;
    for (uint32_t i = 0; space->domain && rc == 0 && i < space->party_count; i++) {
        rc = space->parties[i]->member ? uvas_mirrors_claim_one(record, space->parties[i]) : 0;
    }
    if (rc < 0 && record->mirror) {
        struct uvas_failure said = *uvas_last_failure();
        struct uvas_stretch none = {0};
        uvas_mirrors_drop(record, &none);
        *uvas_fail(said.kind, said.code) = said;
    }
    return rc;
}

void uvas_mirrors_close(struct uvas_record *record, struct uvas_stretch *stretch) {
    uvas_mirrors_suspend(record, 0, record->size, stretch);
}

void uvas_mirrors_drop(struct uvas_record *record, struct uvas_stretch *stretch) {
    if (record->mirror) {
        if (stretch->end) {
            uvas_mirrors_settle(record, stretch, true);
        }
        struct uvas_errand remove = {.kind = UVAS_ASK_REMOVE, .mirror = record->mirror, .write = stretch->end == 0};
        (void)uvas_ask(&remove);
        one_mirror_less(record->mirror->domain);
        free_mirror(record->mirror);
        record->mirror = NULL;
    }
}

/* ---- memory in them -------------------------------------------------------------------------------------------------------------------------------- */

void uvas_mirrors_backing(const struct uvas_record *record, const struct uvas_party *party, size_t start, struct uvas_backing_info *backing) {
    backing->shared = 1;
    backing->descriptor = record->mirror->stores[party->member->party].fd;
    backing->offset = (int64_t)start;
}

int uvas_mirrors_watch(const struct uvas_record *record, const struct uvas_party *party, size_t start, size_t end) {
    return uvas_fault_register(party->member->faults, record->base + start, end - start, true);
}

void uvas_mirrors_unwatch(const struct uvas_record *record, const struct uvas_party *party, size_t start, size_t end) {
    (void)uvas_fault_wake(party->member->faults, record->base + start, end - start);
}

static uint32_t granule_of(const struct uvas_record *record, size_t offset) {
    return (uint32_t)(offset >> record->mirror->domain->shift);
}

int uvas_mirrors_commit(struct uvas_record *record, size_t start, size_t end) {
    struct uvas_errand commit = {.kind = UVAS_ASK_COMMIT, .mirror = record->mirror, .first = granule_of(record, start), .end = granule_of(record, end)};
    int rc = uvas_ask(&commit);
    return rc == -ENOMEM ? uvas_limits_explain(record->base + start, end - start)
           : rc < 0      ? uvas_fail_system(record->base + start, end - start, "ioctl(UFFDIO_REGISTER)", rc)
                         : 0;
}

void uvas_mirrors_suspend(struct uvas_record *record, size_t start, size_t end, struct uvas_stretch *stretch) {
    *stretch = (struct uvas_stretch){0};
    if (record->mirror) {
        *stretch = (struct uvas_stretch){.first = granule_of(record, start), .end = granule_of(record, end)};
        struct uvas_errand suspend = {.kind = UVAS_ASK_SUSPEND, .mirror = record->mirror, .stretch = stretch};
        (void)uvas_ask(&suspend);
    }
}

void uvas_mirrors_settle(struct uvas_record *record, struct uvas_stretch *stretch, bool gone) {
    if (record->mirror && stretch->end) {
        struct uvas_errand settle = {.kind = gone ? UVAS_ASK_FORGET : UVAS_ASK_RESUME, .mirror = record->mirror, .stretch = stretch};
        (void)uvas_ask(&settle);
    }
}

int uvas_mirrors_discard(struct uvas_record *record, size_t start, size_t end) {
    struct uvas_errand discard = {.kind = UVAS_ASK_DISCARD, .mirror = record->mirror, .first = granule_of(record, start), .end = granule_of(record, end)};
    return uvas_ask(&discard);
}

size_t uvas_mirrors_unit(const struct uvas_record *record) {
    return (size_t)1 << record->mirror->domain->shift;
}

/* ---- fork ---------------------------------------------------------------------------------------------------------------------------------------------- */

static bool pausing; /* the thread that forks, from before to after */

void uvas_mirrors_before_fork(void) {
    uvas_registry_lock();
    while (changing) {
        uvas_registry_wait();
    }
    bool there = users > 0;
    users += there; /* it stays until the fork is over */
    uvas_registry_unlock();
    if (there) {
        struct uvas_errand pause = {.kind = UVAS_ASK_PAUSE};
        (void)uvas_ask(&pause);
        pausing = true;
    }
}

void uvas_mirrors_after_fork_in_parent(void) {
    if (pausing) {
        pausing = false;
        uvas_requests_resume();
        leave_pager();
    }
}

/* Its threads are the parent's. What it watched is the child's own memory now, which nobody watches. */
void uvas_mirrors_after_fork_in_child(void) {
    for (uint32_t i = 0; i < uvas_pager.member_count; i++) {
        uvas_vm_close(uvas_pager.members[i]->faults);
        uvas_vm_close(uvas_pager.members[i]->process);
    }
    for (uint32_t i = 0; i < uvas_pager.mirror_count; i++) {
        for (uint32_t party = 1; party < UVAS_PARTIES; party++) {
            if (uvas_pager.mirrors[i]->stores[party].alias) {
                uvas_vm_close(uvas_pager.mirrors[i]->stores[party].fd);
            }
        }
    }
    uvas_moves_forget();
    uvas_vm_close(uvas_pager.watch);
    uvas_vm_close(uvas_pager.bell);
    uvas_vm_close(uvas_pager.faults);
    uvas_pager = (struct uvas_pager){.faults = -1, .bell = -1, .watch = -1};
    uvas_requests_forget();
    uvas_guard_forget();
    users = mirrors = tables_room = 0;
    changing = pausing = false;
}
