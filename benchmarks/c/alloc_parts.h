/* alloc_parts.h: what alloc.c is made of besides its loops: the workload's keys, sizes, threads, what a process weighs, and the check that an
 * allocator hands out blocks at all. The adapter has been included before. */
#ifndef UVAS_BENCH_ALLOC_PARTS_H
#define UVAS_BENCH_ALLOC_PARTS_H

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench.h"
#include "latency.h"

#define SIZES 4096 /* a power of two */
#define CHUNKS 100 /* timed apart; the median counts, so that what else the machine does in some of them does not */
#define CHURN_SAMPLES 50
#define CHECKED 2000
#define RING 1024

/* ---- the workload --------------------------------------------------------------------------------------------------------------------------- */

enum touch {
    TOUCH_NONE,
    TOUCH_FIRST, /* the first 8 bytes */
    TOUCH_PAGES, /* a byte of each page */
    TOUCH_ALL,
};

static struct {
    const char *kind;
    size_t low, high;  /* bytes of a block */
    size_t live;       /* blocks at a time, for each thread */
    size_t operations; /* that are timed */
    size_t bytes;      /* to grow to */
    uint64_t seed;
    enum touch touch;
} work = {.kind = "none", .low = 16, .high = 16, .live = 1, .operations = 1, .seed = 1};

static size_t sizes[SIZES];

/* 2^x for 0 <= x < 1, to 1e-4: sizes need no more, and libm is not linked. */
static double exp2_part(double x) {
    return 1 + x * (0.69583 + x * (0.22606 + x * 0.07811));
}

static void make_sizes(void) {
    uint64_t random = work.seed;
    double low = (double)work.low, octaves = 0, span = (double)work.high / low;
    for (; span >= 2; span /= 2) {
        octaves++;
    }
    octaves += span - 1; /* exact at both ends of an octave */
    for (size_t i = 0; i < SIZES; i++) {
        double x = (double)(bench_random(&random) >> 11) * 0x1p-53 * octaves;
        double size = low * (double)(UINT64_C(1) << (unsigned)x) * exp2_part(x - (double)(unsigned)x);
        sizes[i] = size < low ? work.low : size > (double)work.high ? work.high : (size_t)size;
    }
}

static void read_workload(char **keys) {
    static const char *const touches[] = {"none", "first", "pages", "all"};
    for (; *keys; keys++) {
        char *value = strchr(*keys, '=');
        BENCH_NEED(value);
        size_t length = (size_t)(value++ - *keys), number = strtoull(value, NULL, 10);
        struct {
            const char *name;
            size_t *into;
        } numbers[] = {{"low", &work.low}, {"high", &work.high}, {"live", &work.live}, {"operations", &work.operations}, {"bytes", &work.bytes}};
        for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
            if (strncmp(*keys, numbers[i].name, length) == 0 && numbers[i].name[length] == 0) {
                *numbers[i].into = number;
            }
        }
        work.seed = strncmp(*keys, "seed=", 5) == 0 ? number : work.seed;
        work.kind = strncmp(*keys, "kind=", 5) == 0 ? value : work.kind;
        for (size_t i = 0; strncmp(*keys, "touch=", 6) == 0 && i < 4; i++) {
            work.touch = strcmp(value, touches[i]) == 0 ? (enum touch)i : work.touch;
        }
    }
    make_sizes();
}

/* ---- what is said -------------------------------------------------------------------------------------------------------------------------- */

static inline void say(const char *what, double value) {
    printf("\"%s\": %.4f, ", what, value);
}

static inline void say_at(const char *what, size_t index, double value) {
    printf("\"%s %zu\": %.4f, ", what, index, value);
}

static void say_about(void) {
#ifdef ADAPTER_BOUND
    const char *bound = "true";
#else
    const char *bound = "false";
#endif
#ifdef ADAPTER_ALONE
    const char *alone = "true";
#else
    const char *alone = "false";
#endif
    printf("{\"name\": \"%s\", \"library\": \"%s\", \"package\": \"%s\", \"get\": \"%s\", \"bound\": %s, \"alone\": %s}\n", ADAPTER_NAME, ADAPTER_LIBRARY,
           ADAPTER_PACKAGE, ADAPTER_GET, bound, alone);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, size_t count) {
    qsort(values, count, sizeof *values, by_value); /* of this few, glibc sorts on the stack */
    return (values[(count - 1) / 2] + values[count / 2]) / 2;
}

static double mean(const double *values, size_t count) {
    double sum = 0;
    for (size_t i = 0; i < count; i++) {
        sum += values[i];
    }
    return sum / (double)count;
}

/* ---- threads and memory ---------------------------------------------------------------------------------------------------------------------- */

struct worker {
    unsigned index;
    uint64_t random;
    size_t live;
    void **slots;
    double ns, cpu_ns; /* an operation, of the last lot: by the clock on the wall, and by the time that the thread had */
    char apart[64];
};

/* Thread `index` to the index-th CPU of those that the process may use, from the last one down: interrupts like the first. */
static void pin(unsigned index) {
    static cpu_set_t may;
    if (CPU_COUNT(&may) == 0) {
        BENCH_NEED(sched_getaffinity(0, sizeof may, &may) == 0);
    }
    unsigned wanted = index % (unsigned)CPU_COUNT(&may);
    for (size_t cpu = CPU_SETSIZE; cpu-- > 0;) {
        if (CPU_ISSET(cpu, &may) && wanted-- == 0) {
            cpu_set_t only;
            CPU_ZERO(&only);
            CPU_SET(cpu, &only);
            BENCH_NEED(sched_setaffinity(0, sizeof only, &only) == 0);
            return;
        }
    }
}

/* Zeroed and present: it weighs the same before and after. */
static void *pages_for(size_t bytes) {
    void *memory = mmap(NULL, bytes + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    BENCH_NEED(memory != MAP_FAILED);
    return memory;
}

static struct worker *worker_open(unsigned index) {
    struct worker *me = pages_for(sizeof *me);
    *me = (struct worker){.index = index, .random = work.seed + index, .live = work.live};
    me->slots = pages_for(work.live * sizeof *me->slots);
    return me;
}

static inline double thread_ns(void) {
    struct timespec had;
    (void)clock_gettime(CLOCK_THREAD_CPUTIME_ID, &had);
    return (double)had.tv_sec * 1e9 + (double)had.tv_nsec;
}

static inline void touch_block(void *block, size_t size) {
    switch (work.touch) {
    case TOUCH_NONE:
        break;
    case TOUCH_FIRST:
        *(volatile uint64_t *)block = size;
        break;
    case TOUCH_PAGES:
        for (size_t i = 0; i < size; i += 4096) {
            ((volatile char *)block)[i] = 1;
        }
        break;
    case TOUCH_ALL:
        memset(block, 1, size);
        break;
    }
}

/* A number of kilobytes that the kernel tells, in bytes. */
static uint64_t told(const char *path, const char *key) {
    static char text[16384]; /* no stdio: it allocates */
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    BENCH_NEED(fd >= 0);
    ssize_t got = 0, length = 0;
    while ((got = read(fd, text + length, sizeof text - 1 - (size_t)length)) > 0) {
        length += got;
    }
    (void)close(fd);
    text[length] = 0;
    char *at = strstr(text, key);
    BENCH_NEED(at);
    return strtoull(at + strlen(key), NULL, 10) * 1024;
}

static uint64_t resident(void) { /* without what the kernel may take at any time (MADV_FREE) */
    return told("/proc/self/smaps_rollup", "\nRss:") - told("/proc/self/smaps_rollup", "\nLazyFree:");
}

static uint64_t peak_resident(void) {
    return told("/proc/self/status", "\nVmHWM:");
}

static void reset_peak(void) {
    int fd = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);
    BENCH_NEED(fd >= 0 && write(fd, "5", 1) == 1 && close(fd) == 0);
}

/* ---- one thread to another ------------------------------------------------------------------------------------------------------------------- */

struct ring { /* a place holds a block, or nothing; each thread keeps its own count */
    _Atomic(void *) places[RING];
};

static inline void ring_wait(size_t *tries) {
    if (++*tries % 1024 == 0) {
        (void)sched_yield(); /* the other may want this CPU */
    }
}

static inline void ring_put(struct ring *ring, size_t index, void *block) {
    size_t tries = 0;
    while (atomic_load_explicit(&ring->places[index % RING], memory_order_acquire)) {
        ring_wait(&tries);
    }
    atomic_store_explicit(&ring->places[index % RING], block, memory_order_release);
}

static inline void *ring_take(struct ring *ring, size_t index) {
    size_t tries = 0;
    void *block;
    while (!(block = atomic_load_explicit(&ring->places[index % RING], memory_order_acquire))) {
        ring_wait(&tries);
    }
    atomic_store_explicit(&ring->places[index % RING], NULL, memory_order_release);
    return block;
}

/* ---- blocks are blocks ------------------------------------------------------------------------------------------------------------------------ */

static void fill_pattern(void *block, size_t size, uint64_t pattern) {
    unsigned char *bytes = block;
    for (size_t i = 0; i < size; i++) {
        bytes[i] = (unsigned char)(bench_random(&pattern));
        i += i >= 4096 ? 511 : 0; /* long ones in samples */
    }
    bytes[size - 1] = (unsigned char)pattern;
}

static void need_pattern(const void *block, size_t size, uint64_t pattern) {
    const unsigned char *bytes = block;
    for (size_t i = 0; i < size; i++) {
        unsigned char wanted = (unsigned char)(bench_random(&pattern));
        BENCH_NEED(bytes[i] == wanted || i == size - 1);
        i += i >= 4096 ? 511 : 0;
    }
    BENCH_NEED(bytes[size - 1] == (unsigned char)pattern);
}

/* Many at a time, each with its own pattern to its last usable byte, which nobody else's write may change. */
static void check_blocks(void) {
    static void *blocks[CHECKED];
    static size_t usable[CHECKED];
    size_t count = work.high * CHECKED > ((size_t)256 << 20) ? ((size_t)256 << 20) / work.high : CHECKED;
    for (size_t round = 0; round < 2; round++) {
        for (size_t i = 0; i < count; i++) {
            size_t size = sizes[(i + round * 7) % SIZES];
            blocks[i] = adapter_alloc(size);
            BENCH_NEED(blocks[i] && (uintptr_t)blocks[i] % (size < 16 ? 8 : 16) == 0);
            usable[i] = size;
#ifdef ADAPTER_USABLE
            usable[i] = adapter_usable(blocks[i]);
            BENCH_NEED(usable[i] >= size);
#endif
            fill_pattern(blocks[i], usable[i], i);
        }
        for (size_t i = count; i-- > 0;) {
            need_pattern(blocks[i], usable[i], i);
            adapter_free(blocks[i]);
        }
    }
#ifdef ADAPTER_ALIGNED
    for (size_t align = 16; align <= ((size_t)1 << 21); align *= 2) {
        void *block = adapter_aligned(align, align);
        BENCH_NEED(block && (uintptr_t)block % align == 0);
        fill_pattern(block, align, align);
        need_pattern(block, align, align);
        adapter_free(block);
    }
#endif
}

/* In a child, so that the allocator is as new afterwards. A library that cannot be had is left to the parent to tell. */
static void check_apart(const char *library) {
    pid_t child = fork();
    BENCH_NEED(child >= 0);
    if (child == 0) {
        if (!adapter_open(library)) {
            check_blocks();
        }
        _exit(0);
    }
    int status = 0;
    BENCH_NEED(waitpid(child, &status, 0) == child);
    BENCH_NEED(WIFEXITED(status) && WEXITSTATUS(status) == 0); /* blocks were what they should be */
}

#endif
