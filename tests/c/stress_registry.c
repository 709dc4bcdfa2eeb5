/* stress_registry.c: lookups without a lock, beside threads that insert, hide and remove, and from a signal handler that interrupts a writer.
 *
 *   stress_registry [seconds = 2] [writers = 2] [readers = 3] [seed = 1]
 *
 * Every value tells its range: what a lookup returns must agree with itself and hold the address. Some ranges are always there and must always be
 * found; some places are always free.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "check.h"
#include "registry.h"

#define PAGE ((uintptr_t)4096)
#define PLACES 20000 /* of 16 pages each; one in four is always taken, one in four always free, the others come and go */
#define THREADS_MAX 32

static atomic_bool stop;
static double until;
static atomic_ulong lookups, changes, signals;
static atomic_ulong lately; /* the place that some writer is at: half of the lookups go there, where nodes are fresh. Relaxed, so that it orders nothing */
static _Thread_local uint64_t handler_random;

static bool over(void) {
    if (seconds_now() > until) {
        atomic_store(&stop, true);
    }
    return atomic_load(&stop);
}

static uintptr_t place_base(uint64_t place) {
    return (place + 1) * 16 * PAGE;
}

static uint64_t value_of(uintptr_t base, uintptr_t end) {
    return (base / PAGE) << 16 | (end - base) / PAGE;
}

static void look(uint64_t *random) {
    struct uvas_entry seen;
    uint64_t place = next_random(random) % PLACES;
    if (next_random(random) % 2) {
        place = (atomic_load_explicit(&lately, memory_order_relaxed) + place % 8) % PLACES;
    }
    uintptr_t address = place_base(place) + next_random(random) % (16 * PAGE);
    int found = uvas_registry_find(address, &seen);
    if (found) {
        CHECK(seen.base <= address && address < seen.end);
        CHECK(seen.value == value_of(seen.base, seen.end));
        CHECK(place % 4 != 1);
    }
    CHECK(found || place % 4 != 0 || address >= place_base(place) + 8 * PAGE);
    if (uvas_registry_next(address, &seen)) {
        CHECK(seen.end > address && (seen.value & ~UVAS_REGISTRY_HIDDEN) == value_of(seen.base, seen.end));
        CHECK(seen.base <= place_base((place / 4 + 1) * 4) || place / 4 * 4 + 4 >= PLACES); /* not beyond the next that is always there */
    }
    if (uvas_registry_previous(address, &seen)) {
        CHECK(seen.base < address && (seen.value & ~UVAS_REGISTRY_HIDDEN) == value_of(seen.base, seen.end));
    }
}

static void on_signal(int number) {
    (void)number;
    look(&handler_random);
    atomic_fetch_add_explicit(&signals, 1, memory_order_relaxed);
}

static void insert(uint64_t place, uintptr_t pages) {
    uintptr_t base = place_base(place), end = base + pages * PAGE;
    CHECK_OK(uvas_registry_lock_for_insert());
    if (uvas_registry_insert(base, end, value_of(base, end) | UVAS_REGISTRY_HIDDEN, NULL) == 0) {
        uvas_registry_set(base, end, value_of(base, end));
    }
    uvas_registry_unlock();
}

static void remove_place(uint64_t place) {
    struct uvas_entry there;
    uvas_registry_lock();
    if (uvas_registry_next(place_base(place), &there) && there.base == place_base(place)) {
        uvas_registry_set(there.base, there.end, there.value | UVAS_REGISTRY_HIDDEN);
        uvas_registry_remove(there.base, there.end);
    }
    uvas_registry_unlock();
}

static void *writer(void *argument) {
    uint64_t random = (uint64_t)(uintptr_t)argument * 2 + 1;
    handler_random = random;
    while (!over()) {
        uint64_t first = next_random(&random) % PLACES, many = next_random(&random) % 400; /* grows and shrinks in stretches */
        bool grow = next_random(&random) % 2;
        for (uint64_t place = first; place < first + many && place < PLACES; place++) {
            if (place % 4 >= 2) {
                atomic_store_explicit(&lately, place, memory_order_relaxed);
                grow ? insert(place, 1 + next_random(&random) % 16) : remove_place(place);
                atomic_fetch_add_explicit(&changes, 1, memory_order_relaxed);
            }
        }
    }
    return NULL;
}

static void *reader(void *argument) {
    uint64_t random = (uint64_t)(uintptr_t)argument * 2 + 1, count = 0;
    while (!over()) {
        for (int i = 0; i < 100; i++, count++) {
            look(&random);
        }
    }
    atomic_fetch_add(&lookups, count);
    return NULL;
}

int main(int argc, char **argv) {
    pthread_t threads[THREADS_MAX];
    double seconds = argc > 1 ? strtod(argv[1], NULL) : 2;
    uint64_t writers = argc > 2 ? strtoull(argv[2], NULL, 0) : 2, readers = argc > 3 ? strtoull(argv[3], NULL, 0) : 3;
    uint64_t seed = argc > 4 ? strtoull(argv[4], NULL, 0) : 1;
    CHECK(writers > 0 && writers + readers <= THREADS_MAX);
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    CHECK_OK(sigaction(SIGUSR1, &action, NULL));
    for (uint64_t place = 0; place < PLACES; place += 4) {
        insert(place, 8);
    }
    until = seconds_now() + seconds;
    for (uint64_t i = 0; i < writers + readers; i++) {
        CHECK(pthread_create(&threads[i], NULL, i < writers ? writer : reader, (void *)(uintptr_t)(seed * 1000 + i)) == 0);
    }
    while (!over()) {
        for (uint64_t i = 0; i < writers; i++) {
            (void)pthread_kill(threads[i], SIGUSR1);
        }
        struct timespec pause = {0, 200000};
        (void)nanosleep(&pause, NULL);
    }
    for (uint64_t i = 0; i < writers + readers; i++) {
        (void)pthread_join(threads[i], NULL);
    }
    char why[256];
    uvas_registry_lock();
    CHECK_OK(uvas_registry_check(why, sizeof why));
    uvas_registry_unlock();
    CHECK(atomic_load(&changes) > 0 && atomic_load(&signals) > 0 && (readers == 0 || atomic_load(&lookups) > 0));
    printf("ok stress_registry: %lu rounds of lookups beside %lu changes, %lu from signal handlers\n", atomic_load(&lookups), atomic_load(&changes),
           atomic_load(&signals));
    return 0;
}
