/* latency.h: how long single operations take. A clock finer than bench_ns, whose own cost is measured and taken off, and a histogram whose buckets
 * are 1/64 of an octave wide. */
#ifndef UVAS_BENCH_LATENCY_H
#define UVAS_BENCH_LATENCY_H

#include "bench.h"

#if defined(__x86_64__)
static inline uint64_t latency_now(void) { /* not before what precedes it, and nothing that follows before it */
    uint32_t low, high;
    __asm__ volatile("lfence\n\trdtsc\n\tlfence" : "=a"(low), "=d"(high) : : "memory");
    return (uint64_t)high << 32 | low;
}
#else
#define latency_now bench_ns
#endif

#define LATENCY_FINE 6 /* bits within an octave */
#define LATENCY_BUCKETS ((64 - LATENCY_FINE) << LATENCY_FINE)

struct latency {
    uint64_t cost;     /* of the clock itself, in its ticks */
    double ns_of_tick; /* nanoseconds */
    uint64_t count;
    uint32_t buckets[LATENCY_BUCKETS];
};

static inline unsigned latency_bucket(uint64_t ticks) {
    if (ticks < (1u << LATENCY_FINE)) {
        return (unsigned)ticks;
    }
    unsigned octave = 63u - (unsigned)__builtin_clzll(ticks) - LATENCY_FINE;
    return ((octave + 1) << LATENCY_FINE) | ((unsigned)(ticks >> octave) & ((1u << LATENCY_FINE) - 1));
}

static inline uint64_t latency_ticks(unsigned bucket) {
    unsigned octave = bucket >> LATENCY_FINE, fine = bucket & ((1u << LATENCY_FINE) - 1);
    return octave == 0 ? fine : (uint64_t)((1u << LATENCY_FINE) | fine) << (octave - 1);
}

static inline void latency_add(struct latency *to, uint64_t began, uint64_t ended) {
    uint64_t ticks = ended - began;
    to->buckets[latency_bucket(ticks > to->cost ? ticks - to->cost : 0)]++;
    to->count++;
}

/* Nanoseconds that `part` of the operations do not exceed. */
static inline double latency_quantile(const struct latency *of, double part) {
    double wanted = part * (double)of->count, seen = 0;
    for (unsigned i = 0; i < LATENCY_BUCKETS; i++) {
        seen += of->buckets[i];
        if (seen >= wanted && of->buckets[i]) {
            return (double)latency_ticks(i) * of->ns_of_tick;
        }
    }
    return 0;
}

static inline void latency_open(struct latency *one) {
    *one = (struct latency){0};
    uint64_t ns = bench_ns(), ticks = latency_now();
    for (size_t i = 0; i < 100000; i++) { /* the clock around nothing */
        uint64_t began = latency_now();
        latency_add(one, began, latency_now());
    }
    while (bench_ns() - ns < 5000000) {
    }
    one->ns_of_tick = (double)(bench_ns() - ns) / (double)(latency_now() - ticks);
    double middle = latency_quantile(one, 0.5);
    *one = (struct latency){.cost = (uint64_t)(middle / one->ns_of_tick + 0.5), .ns_of_tick = one->ns_of_tick};
}

#endif
