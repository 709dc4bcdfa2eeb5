/* check.h: what the C tests share: a check that tells where it failed, MAP_FIXED_NOREPLACE where libc lacks it, a seeded random source, time, and a list of tests. */
#ifndef CHECK_H
#define CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "uvas.h"

#ifdef __alpha__
#define NOREPLACE 0x200000
#else
#define NOREPLACE 0x100000
#endif

#define CHECK(condition)                                                                                              \
    do {                                                                                                              \
        if (!(condition)) {                                                                                           \
            fprintf(stderr, "%s:%d: not so: %s (last failure: %s)\n", __FILE__, __LINE__, #condition, uvas_last_failure()->text); \
            abort();                                                                                                  \
        }                                                                                                             \
    } while (0)

#define CHECK_OK(call) CHECK((call) == 0)

static inline uint64_t next_random(uint64_t *state) { /* xorshift64*: Vigna 2016 */
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * UINT64_C(0x2545F4914F6CDD1D);
}

static inline double seconds_now(void) {
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

struct test {
    const char *name;
    void (*run)(void);
};

#define TEST(function) {#function, function}

/* All of them, or the one whose name is the first argument. What main returns. */
static inline int run_tests(const struct test *tests, size_t count, int argc, char **argv) {
    for (size_t i = 0; i < count; i++) {
        if (argc < 2 || strcmp(argv[1], tests[i].name) == 0) {
            tests[i].run();
            printf("ok %s\n", tests[i].name);
            (void)fflush(stdout);
        }
    }
    return 0;
}

#endif
