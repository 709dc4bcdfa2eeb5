/* bench.h: what the C benchmarks share: a clock, and one JSON line for each sample.
 *
 * A benchmark runs its variants in turn, round after round, so that a slow second on the machine falls on all of them. The medians are taken by
 * the Python harness. */
#ifndef UVAS_BENCH_H
#define UVAS_BENCH_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static inline uint64_t bench_ns(void) {
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline uint64_t bench_processor_ns(void) { /* that this thread had */
    struct timespec now;
    (void)clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Whether the condition holds, or the benchmark measures nothing and ends. */
#define BENCH_NEED(condition)                                                          \
    do {                                                                               \
        if (!(condition)) {                                                            \
            (void)fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);      \
            exit(1);                                                                   \
        }                                                                              \
    } while (0)

/* One sample: `ns` for each of `count` operations. `parameter` is what the row is about: VMAs in the way, ranges in the book, threads. */
static inline void bench_say(const char *id, const char *what, uint64_t parameter, double ns) {
    printf("{\"id\": \"%s\", \"what\": \"%s\", \"parameter\": %llu, \"ns\": %.2f}\n", id, what, (unsigned long long)parameter, ns);
    (void)fflush(stdout);
}

static inline uint64_t bench_random(uint64_t *state) { /* splitmix64 (Steele, Lea, Flood 2014) */
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

#endif
