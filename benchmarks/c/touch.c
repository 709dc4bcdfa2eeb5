/* touch.c: what host and devices do with unified memory in benchmarks/move.py and contend.py: a library, called through uvas.CFunction. */
#define _GNU_SOURCE
#include <sched.h>

#include "touch.h"

#define API __attribute__((visibility("default")))

API uint64_t faults(uintptr_t at, uint64_t count, uint64_t step) {
    return touch_faults(at, count, step);
}

API uint64_t rising(uintptr_t at, uint64_t size, uint64_t step, uint64_t how) {
    return touch_rising(at, size, step, (enum touch_how)how);
}

API uint64_t at_random(uintptr_t at, uint64_t size, uint64_t count) {
    return touch_random(at, size, count);
}

API uint64_t stretches(uintptr_t at, uint64_t size, uint64_t step, uint64_t how) {
    return touch_stretches(at, size, step, (enum touch_how)how);
}

API uint64_t sum(uintptr_t at, uint64_t size) {
    return touch_sum(at, size);
}

/* Streaming: nanoseconds for adding one to all of it, a word at a time. */
API uint64_t stream(uintptr_t at, uint64_t size) {
    uint64_t began = bench_ns();
    for (uint64_t *word = (uint64_t *)at, *end = word + size / 8; word < end; word++) {
        *word += 1;
    }
    return bench_ns() - began;
}

/* ---- contention: from `begin` to `end` on the monotonic clock, as often as can be ------------------------------------------------------- */

static uint64_t longest_ns; /* between two of this party's, in its last call */

API uint64_t longest(void) {
    return longest_ns;
}

static inline uint64_t wait_until(uint64_t begin) {
    while (bench_ns() < begin) {
    }
    longest_ns = 0;
    return bench_ns();
}

static inline uint64_t note(uint64_t before) {
    uint64_t now = bench_ns();
    longest_ns = now - before > longest_ns ? now - before : longest_ns;
    return now;
}

/* Increments of one word. */
API uint64_t increment(uint64_t *word, uint64_t begin, uint64_t end) {
    uint64_t count = 0;
    for (uint64_t now = wait_until(begin); now < end; now = note(now)) {
        for (size_t i = 0; i < 16; i++, count++) { /* the clock is not what is measured */
            (void)__atomic_fetch_add(word, 1, __ATOMIC_SEQ_CST);
        }
    }
    return count;
}

/* One word counted up in turn: this party's turns are those in which it is even, or odd. Ends at `end`, or soon after the other has. Who waits yields: two
 * who spin on two processors keep the pager from either until the scheduler's next tick. */
API uint64_t in_turn(uint64_t *word, uint64_t odd, uint64_t begin, uint64_t end) {
    uint64_t count = 0;
    for (uint64_t now = wait_until(begin); now < end; now = note(now)) {
        uint64_t seen = __atomic_load_n(word, __ATOMIC_ACQUIRE);
        while ((seen & 1) != odd && bench_ns() < end) {
            (void)sched_yield();
            seen = __atomic_load_n(word, __ATOMIC_ACQUIRE);
        }
        if ((seen & 1) == odd) {
            __atomic_store_n(word, seen + 1, __ATOMIC_RELEASE);
            count++;
        }
    }
    return count;
}

/* Stores of eight bytes that lie on both sides of a border. */
API uint64_t straddle(uintptr_t border, uint64_t begin, uint64_t end) {
    struct {
        uint64_t word;
    } __attribute__((packed)) *both = (void *)(border - 4);
    uint64_t count = 0;
    for (uint64_t now = wait_until(begin); now < end; now = note(now)) {
        both->word = 0x0101010101010101u * (count & 0xff);
        __asm__ volatile("" : : : "memory");
        count++;
    }
    return count;
}
