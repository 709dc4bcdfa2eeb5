/* stress_space.c: threads that reserve, commit, write, verify, decommit and release in one small window, while others map and unmap there without
 * asking anybody. The oracle is the bytes: every page that anybody holds has its holder's mark in it, and nobody's mark ever changes.
 *
 *   stress_space [seconds = 2] [kernel = 0] [lacks = 0] [seed = 1] [ours = 8] [hostile = 4]
 *
 * The window lies where GCC's ThreadSanitizer lets programs have memory.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#define WINDOW_BASE UINT64_C(0x551000000000)
#define WINDOW_SIZE (UINT64_C(48) << 20)
#define THREADS_MAX 64
#define SLOTS 8 /* live reservations that all of our threads share: few, so that they meet */
#define LOOKS_PER_AUDIT 10000

static atomic_bool stop;
static double until;
static uvas_id space;
static size_t page;
static atomic_ulong reserved, refused, foreign, found, released_under_work, busy;

/* Shared reservations: any thread works in any slot's, so release meets commit, decommit and map_fd of the same one. */
static struct {
    pthread_mutex_t lock;
    struct uvas_reservation reservation;
} slots[SLOTS];

static bool over(void) {
    if (seconds_now() > until) {
        atomic_store(&stop, true);
    }
    return atomic_load(&stop);
}

static uint64_t mark_of(uintptr_t address, uint64_t owner) {
    return (address * UINT64_C(0x9E3779B97F4A7C15)) ^ owner;
}

/* Atomic, as ThreadSanitizer does not know that the kernel orders an unmap before the next map of the place. */
static void write_marks(uintptr_t base, size_t size, uint64_t owner) {
    for (uintptr_t at = base; at < base + size; at += page) {
        __atomic_store_n((uint64_t *)at, mark_of(at, owner), __ATOMIC_RELAXED);
    }
}

static void verify_marks(uintptr_t base, size_t size, uint64_t owner) {
    for (uintptr_t at = base; at < base + size; at += page) {
        CHECK(__atomic_load_n((uint64_t *)at, __ATOMIC_RELAXED) == mark_of(at, owner));
    }
}

static bool expected(int rc) {
    return rc == 0 || rc == -EEXIST || rc == -ENOSPC || rc == -EDQUOT || rc == -ENOMEM;
}

/* One reservation, alone: nobody else knows of it, so every byte must stay. */
static void private_round(uint64_t *random, uint64_t owner) {
    struct uvas_where where = {.name = "private"};
    struct uvas_reservation mine;
    struct uvas_found seen;
    size_t size = page * (1 + next_random(random) % 16);
    if (next_random(random) % 4 == 0) {
        where.at = WINDOW_BASE + next_random(random) % (WINDOW_SIZE / page - 16) * page;
    }
    int rc = uvas_reserve(space, size, &where, &mine);
    CHECK(expected(rc));
    if (rc < 0) {
        atomic_fetch_add(&refused, 1);
        return;
    }
    atomic_fetch_add(&reserved, 1);
    CHECK(mine.base >= WINDOW_BASE && mine.base + mine.size <= WINDOW_BASE + WINDOW_SIZE);
    CHECK(uvas_find(mine.base + size / 2, &seen) == 0 && seen.id == mine.id);
    CHECK_OK(uvas_commit(mine.id, 0, mine.size, UVAS_READ | UVAS_WRITE, next_random(random) % 2));
    write_marks(mine.base, mine.size, owner);
    verify_marks(mine.base, mine.size, owner);
    if (mine.size > page) {
        CHECK_OK(uvas_decommit(mine.id, 0, page));
        CHECK_OK(uvas_commit(mine.id, 0, page, UVAS_READ | UVAS_WRITE, 0));
        CHECK(__atomic_load_n((uint64_t *)mine.base, __ATOMIC_RELAXED) == 0);
        verify_marks(mine.base + page, mine.size - page, owner);
    }
    CHECK_OK(uvas_release(mine.id));
    CHECK(uvas_release(mine.id) == -ESTALE);
    CHECK(uvas_commit(mine.id, 0, page, UVAS_READ, 0) == -ESTALE);
}

/* Works in a reservation that others may release at any moment: every call succeeds or says that it is gone. */
static void shared_round(uint64_t *random) {
    uint64_t slot = next_random(random) % SLOTS;
    (void)pthread_mutex_lock(&slots[slot].lock);
    struct uvas_reservation shared = slots[slot].reservation;
    (void)pthread_mutex_unlock(&slots[slot].lock);
    int rc = 0;
    uvas_id lease;
    switch (shared.id ? next_random(random) % 8 : 7) {
    case 0:
        rc = uvas_commit(shared.id, 0, shared.size, UVAS_READ | UVAS_WRITE, 0);
        break;
    case 1:
        rc = uvas_decommit(shared.id, page, page);
        break;
    case 2: {
        struct uvas_mapping zero = {.descriptor = 0, .sharing = UVAS_PRIVATE, .offset = 0, .size = page, .protection = UVAS_READ};
        int fd = memfd_create("stress", MFD_CLOEXEC);
        CHECK(fd >= 0 && ftruncate(fd, (off_t)page) == 0);
        zero.descriptor = fd;
        rc = uvas_map_fd(shared.id, &zero);
        (void)close(fd);
        break;
    }
    case 3:
        rc = uvas_protect(shared.id, 0, page, UVAS_READ);
        rc = rc == -EINVAL ? 0 : rc; /* not committed */
        break;
    case 4:
        rc = uvas_lease(shared.id, 0, page, &lease);
        if (rc == 0) {
            CHECK(uvas_release(shared.id) == -EBUSY);
            (void)__atomic_load_n((char *)shared.base, __ATOMIC_RELAXED); /* committed, and nobody can take it away under a lease */
            CHECK_OK(uvas_unlease(lease));
        }
        rc = rc == -EINVAL ? 0 : rc;
        break;
    case 5:
        rc = uvas_release(shared.id);
        break;
    default: {
        struct uvas_reservation fresh = {0};
        struct uvas_where where = {.name = "shared"};
        (void)pthread_mutex_lock(&slots[slot].lock);
        if (!slots[slot].reservation.id && uvas_reserve(space, 4 * page, &where, &fresh) == 0) {
            slots[slot].reservation = fresh;
        }
        (void)pthread_mutex_unlock(&slots[slot].lock);
        return;
    }
    }
    CHECK(rc == 0 || rc == -ESTALE || rc == -EBUSY || rc == -ENOMEM || rc == -EDQUOT);
    atomic_fetch_add(rc == -ESTALE ? &released_under_work : rc == -EBUSY ? &busy : &found, 1);
    if (rc == -ESTALE) {
        (void)pthread_mutex_lock(&slots[slot].lock);
        if (slots[slot].reservation.id == shared.id) {
            slots[slot].reservation.id = 0;
        }
        (void)pthread_mutex_unlock(&slots[slot].lock);
    }
}

static void *ours(void *argument) {
    uint64_t owner = (uint64_t)(uintptr_t)argument, random = owner * UINT64_C(0x9E3779B97F4A7C15) + 1;
    while (!over()) {
        if (next_random(&random) % 2) {
            private_round(&random, owner);
        } else {
            shared_round(&random);
        }
    }
    return NULL;
}

/* Takes any place of the window that is free, as a library would that knows nothing of us; marks it, looks again, gives it back. */
static void *hostile(void *argument) {
    uint64_t owner = (uint64_t)(uintptr_t)argument, random = owner * UINT64_C(0xD1B54A32D192ED03) + 1;
    while (!over()) {
        size_t size = page * (1 + next_random(&random) % 16);
        uintptr_t at = WINDOW_BASE + next_random(&random) % (WINDOW_SIZE / page - 16) * page;
        long got = syscall(SYS_mmap, at, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | NOREPLACE, -1, 0);
        if (got == (long)at) {
            write_marks(at, size, owner);
            sched_yield();
            verify_marks(at, size, owner);
            atomic_fetch_add(&foreign, 1);
        }
        if (got > 0) {
            CHECK(syscall(SYS_munmap, got, size) == 0);
        }
    }
    return NULL;
}

static void audit(void) {
    struct uvas_finding found[1];
    size_t differences;
    CHECK_OK(uvas_check());
    CHECK_OK(uvas_audit(space, found, 1, &differences));
    if (differences) {
        fprintf(stderr, "[0x%lx, +0x%zx) kind %u committed %u: %s\n", found->base, found->size, found->kind, found->committed, found->owner);
    }
    CHECK(differences == 0);
}

/* Asks of addresses all the time, and now and then whether the book is in order and says what the kernel says. */
static void *looker(void *argument) {
    uint64_t random = (uint64_t)(uintptr_t)argument | 1;
    while (!over()) {
        struct uvas_found seen;
        uintptr_t at = WINDOW_BASE + next_random(&random) % WINDOW_SIZE;
        if (uvas_find(at, &seen) == 0) {
            CHECK(seen.base <= at && at - seen.base < seen.size);
        }
        if (next_random(&random) % LOOKS_PER_AUDIT == 0) {
            audit();
        }
    }
    return NULL;
}

static long mappings_in_window(void) {
    char line[512];
    long count = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    while (maps && fgets(line, sizeof line, maps)) {
        uintptr_t start = strtoul(line, NULL, 16);
        count += start >= WINDOW_BASE && start < WINDOW_BASE + WINDOW_SIZE;
    }
    if (maps) {
        (void)fclose(maps);
    }
    return count;
}

static uint64_t argument(int count, char **arguments, int index, uint64_t otherwise) {
    return count > index ? strtoull(arguments[index], NULL, 0) : otherwise;
}

int main(int count, char **arguments) {
    pthread_t threads[THREADS_MAX];
    uint32_t kernel = (uint32_t)argument(count, arguments, 2, 0), lacks = (uint32_t)argument(count, arguments, 3, 0);
    uint64_t seed = argument(count, arguments, 4, 1), our_count = argument(count, arguments, 5, 8), hostile_count = argument(count, arguments, 6, 4);
    struct uvas_platform platform;
    CHECK(our_count + hostile_count + 1 <= THREADS_MAX);
    CHECK_OK(uvas_test_kernel(kernel, lacks));
    CHECK_OK(uvas_platform(&platform));
    page = platform.page_size;
    struct uvas_space_options options = {.name = "stress", .window_base = WINDOW_BASE, .window_size = WINDOW_SIZE};
    CHECK_OK(uvas_space_open(&options, &space));
    until = seconds_now() + (count > 1 ? strtod(arguments[1], NULL) : 2);
    for (int i = 0; i < SLOTS; i++) {
        (void)pthread_mutex_init(&slots[i].lock, NULL);
    }
    uint64_t started = 0;
    for (uint64_t i = 0; i < our_count + hostile_count + 1; i++) {
        void *(*body)(void *) = i < our_count ? ours : i < our_count + hostile_count ? hostile : looker;
        CHECK(pthread_create(&threads[started++], NULL, body, (void *)(uintptr_t)(seed * 1000 + i + 1)) == 0);
    }
    for (uint64_t i = 0; i < started; i++) {
        (void)pthread_join(threads[i], NULL);
    }
    struct uvas_space_stats stats;
    audit();
    CHECK_OK(uvas_space_stats(space, &stats));
    CHECK_OK(uvas_space_close(space));
    CHECK(mappings_in_window() == 0);
    CHECK(atomic_load(&reserved) > 0 && (hostile_count == 0 || atomic_load(&foreign) > 0));
    printf("ok stress_space kernel %u lacks %u: %lu reserved, %lu refused, %.3f candidates each; %lu foreign; shared: %lu done, %lu gone, %lu busy\n",
           kernel, lacks, atomic_load(&reserved), atomic_load(&refused), (double)stats.attempts / (double)stats.reserves, atomic_load(&foreign),
           atomic_load(&found), atomic_load(&released_under_work), atomic_load(&busy));
    return 0;
}
