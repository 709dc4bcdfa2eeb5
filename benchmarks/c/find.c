/* find.c: whose address is this? (target R4)
 *
 *   find ROUNDS RANGES [UMF.so]
 *
 * RANGES adoptions of 64 KiB to 2 MiB (nothing is mapped: a process may not have so many mappings), random interior addresses. The peers know the
 * same ranges: a binary search in a sorted array, a flat table of 2 MiB granules, and, where its library is given, UMF's umfPoolByPtr. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

#include "lookups.h"

/* ---- asking ------------------------------------------------------------------------------------------------------------------------------- */

#define QUESTION_LOOP(name, ask)                                                          \
    static double name##_independent(const uintptr_t *asked) {                            \
        uint64_t began = bench_ns(), sum = 0;                                             \
        for (size_t i = 0; i < QUESTIONS; i++) {                                          \
            sum += ask(asked[i]);                                                         \
        }                                                                                 \
        sink = sum;                                                                       \
        return (double)(bench_ns() - began) / (double)QUESTIONS;                          \
    }                                                                                     \
    static double name##_dependent(const uintptr_t *asked) { /* each waits for the last */ \
        uint64_t began = bench_ns(), none = zero, last = 0;                               \
        for (size_t i = 0; i < QUESTIONS; i++) {                                          \
            last = ask(asked[i] + (last & none));                                         \
        }                                                                                 \
        sink = last;                                                                      \
        return (double)(bench_ns() - began) / (double)QUESTIONS;                          \
    }

QUESTION_LOOP(uvas, by_uvas)
QUESTION_LOOP(binary_search, by_binary_search)
QUESTION_LOOP(granule, by_granule)
QUESTION_LOOP(umf, by_umf)

/* One thread that adopts and releases as fast as it can, elsewhere in the same tree. */
static atomic_bool stop;
static atomic_ulong changes;

static void *write_on(void *unused) {
    (void)unused;
    uint64_t random = 3;
    while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
        struct uvas_reservation held;
        uintptr_t base = BASE + bench_random(&random) % ranges * PLACE + PLACE / 2; /* between two ranges */
        BENCH_NEED(uvas_adopt(space, base, (size_t)1 << 16, "bench", &held) == 0 && uvas_release(held.id) == 0);
        atomic_fetch_add_explicit(&changes, 1, memory_order_relaxed);
    }
    return NULL;
}

/* The same without the changes: two threads may share a core, whatever they do. */
static void *burn(void *unused) {
    uint64_t random = 3;
    (void)unused;
    while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
        (void)bench_random(&random);
    }
    return NULL;
}

static double beside(void *(*work)(void *)) {
    pthread_t thread;
    atomic_store(&stop, false);
    BENCH_NEED(pthread_create(&thread, NULL, work, NULL) == 0);
    double ns = uvas_independent(questions);
    atomic_store(&stop, true);
    (void)pthread_join(thread, NULL);
    return ns;
}

int main(int argc, char **argv) {
    BENCH_NEED(argc >= 3);
    size_t rounds = strtoul(argv[1], NULL, 10);
    ranges = strtoul(argv[2], NULL, 10);
    BENCH_NEED(uvas_space_open(NULL, &space) == 0);
    make_ranges();
    for (size_t i = 0; i < QUESTIONS; i += 997) {
        BENCH_NEED(by_uvas(questions[i]) == by_binary_search(questions[i]) && by_uvas(questions[i]) == by_granule(questions[i]));
    }
    uintptr_t *umf_asked = argc > 3 ? umf_questions(argv[3]) : NULL;
    for (size_t i = 0; i < rounds; i++) {
        bench_say("R4", "uvas_find", ranges, uvas_independent(questions));
        bench_say("R4", "binary search", ranges, binary_search_independent(questions));
        bench_say("R4", "2 MiB granules", ranges, granule_independent(questions));
        bench_say("R4 dependent", "uvas_find", ranges, uvas_dependent(questions));
        bench_say("R4 dependent", "binary search", ranges, binary_search_dependent(questions));
        bench_say("R4 dependent", "2 MiB granules", ranges, granule_dependent(questions));
        if (umf_asked) {
            bench_say("R4", "umfPoolByPtr", ranges, umf_independent(umf_asked));
            bench_say("R4 dependent", "umfPoolByPtr", ranges, umf_dependent(umf_asked));
        }
        bench_say("R4", "uvas_find beside a busy thread", ranges, beside(burn));
        bench_say("R4", "uvas_find beside a writer", ranges, beside(write_on));
    }
    return atomic_load(&changes) > 0 ? 0 : 1;
}
