/* touch.h: going through memory, as the bare pager's worker and uvas's do it: the same code, so that only what answers the faults differs. */
#ifndef UVAS_BENCH_TOUCH_H
#define UVAS_BENCH_TOUCH_H

#include "bench.h"

static inline int touch_compare(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static inline uint64_t touch_median(uint64_t *times, size_t count) {
    qsort(times, count, sizeof *times, touch_compare);
    return times[count / 2];
}

/* Write a word in each of `count` pages, `step` bytes apart, from the last one to the first (no stream of rising addresses), and return the median of
 * the times: what one fault takes. */
static inline uint64_t touch_faults(uintptr_t at, size_t count, size_t step) {
    uint64_t *times = malloc(count * sizeof *times);
    BENCH_NEED(times);
    for (size_t i = count; i-- > 0;) {
        volatile uint64_t *word = (volatile uint64_t *)(at + i * step);
        uint64_t began = bench_ns();
        *word = began;
        times[i] = bench_ns() - began;
    }
    uint64_t median = touch_median(times, count);
    free(times);
    return median;
}

enum touch_how { TOUCH_READ, TOUCH_WRITE, TOUCH_ADD };

/* A word in each `step` bytes, rising: nanoseconds for all. TOUCH_ADD reads first, as most code does: where reading makes a copy, that is two faults. */
static inline uint64_t touch_rising(uintptr_t at, size_t size, size_t step, enum touch_how how) {
    uint64_t began = bench_ns();
    for (size_t done = 0; done < size; done += step) {
        volatile uint64_t *word = (volatile uint64_t *)(at + done);
        uint64_t seen = how == TOUCH_WRITE ? done : *word;
        if (how != TOUCH_READ) {
            *word = seen + 1;
        }
    }
    return bench_ns() - began;
}

#define TOUCH_STRETCH ((size_t)4 << 20)

/* The same, stretch by stretch, for 1 MiB: the median of the stretches, so that a machine with other work to do disturbs few of them. */
static inline uint64_t touch_stretches(uintptr_t at, size_t size, size_t step, enum touch_how how) {
    size_t count = size / TOUCH_STRETCH;
    uint64_t *times = malloc(count * sizeof *times);
    BENCH_NEED(times && count);
    for (size_t i = 0; i < count; i++) {
        times[i] = touch_rising(at + i * TOUCH_STRETCH, TOUCH_STRETCH, step, how);
    }
    uint64_t median = touch_median(times, count) / (TOUCH_STRETCH >> 20);
    free(times);
    return median;
}

static inline uint64_t touch_random(uintptr_t at, size_t size, size_t count) {
    uint64_t chance = 7, began = bench_ns();
    for (size_t i = 0; i < count; i++) {
        *(volatile uint64_t *)(at + bench_random(&chance) % (size / 8) * 8) = i;
    }
    return bench_ns() - began;
}

static inline uint64_t touch_sum(uintptr_t at, size_t size) {
    uint64_t sum = 0;
    for (size_t done = 0; done < size; done += 8) {
        sum += *(const uint64_t *)(at + done);
    }
    return sum;
}

#endif
