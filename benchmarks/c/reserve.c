/* reserve.c: reserving, choosing a hole, committing, against the bare system calls (targets R1, R3, R6).
 *
 *   reserve pairs ROUNDS COUNT     R1: reserve + release of 64 MiB; R6: commit + decommit of 64 KiB
 *   reserve hole ROUNDS VMAS       R3: a hole among VMAS mappings that are in the way
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <uvas.h>

#include "bench.h"

#define MIB ((size_t)1 << 20)
#define SIZE (64 * MIB)
#define PART ((size_t)64 << 10)
#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

static uintptr_t place; /* free, and far from what the kernel hands out */
static int tag;         /* as uvas tags: a sealed, empty memfd, one for all */

static uvas_id open_space(uint32_t flags, uint32_t backing) {
    uvas_id space;
    struct uvas_space_options options = {.flags = flags, .backing = backing};
    BENCH_NEED(uvas_space_open(&options, &space) == 0);
    return space;
}

/* ---- R1 ------------------------------------------------------------------------------------------------------------------------------- */

static void raw(size_t count, int fd) {
    int flags = MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED_NOREPLACE | (fd < 0 ? MAP_ANONYMOUS : 0);
    for (size_t i = 0; i < count; i++) {
        void *at = mmap((void *)place, SIZE, PROT_NONE, flags, fd, fd < 0 ? 0 : (off_t)place);
        BENCH_NEED(at == (void *)place && munmap(at, SIZE) == 0);
    }
}

static void reserve(size_t count, uvas_id space, uintptr_t at) {
    struct uvas_where where = {.at = at};
    for (size_t i = 0; i < count; i++) {
        struct uvas_reservation held;
        BENCH_NEED(uvas_reserve(space, SIZE, &where, &held) == 0 && uvas_release(held.id) == 0);
    }
}

/* ---- R6 ------------------------------------------------------------------------------------------------------------------------------- */

static void raw_commit(size_t count) { /* what uvas asks of the kernel: memory over the tag, the tag over memory */
    for (size_t i = 0; i < count; i++) {
        void *memory = mmap((void *)place, PART, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        void *held = mmap((void *)place, PART, PROT_NONE, MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED, tag, (off_t)place);
        BENCH_NEED(memory == (void *)place && held == (void *)place);
    }
}

static void commit(size_t count, uvas_id reservation) {
    for (size_t i = 0; i < count; i++) {
        BENCH_NEED(uvas_commit(reservation, 0, PART, UVAS_READ | UVAS_WRITE, 0) == 0 && uvas_decommit(reservation, 0, PART) == 0);
    }
}

#define SAMPLE(id, what, parameter, count, call)                                                  \
    do {                                                                                          \
        uint64_t began = bench_ns();                                                              \
        call;                                                                                     \
        bench_say(id, what, parameter, (double)(bench_ns() - began) / (double)(count));           \
    } while (0)

static void pairs(size_t rounds, size_t count) {
    uvas_id plain = open_space(UVAS_UNTAGGED, 0), tagged = open_space(0, 0);
    struct uvas_reservation held;
    for (size_t i = 0; i < rounds; i++) {
        SAMPLE("R1", "raw anonymous", 1, count, raw(count, -1));
        SAMPLE("R1", "uvas untagged, at", 1, count, reserve(count, plain, place));
        SAMPLE("R1", "uvas untagged, next", 1, count, reserve(count, plain, 0));
        SAMPLE("R1", "raw tagged", 1, count, raw(count, tag));
        SAMPLE("R1", "uvas tagged, at", 1, count, reserve(count, tagged, place));
        SAMPLE("R1", "uvas tagged, next", 1, count, reserve(count, tagged, 0));
        BENCH_NEED(mmap((void *)place, SIZE, PROT_NONE, MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED_NOREPLACE, tag, (off_t)place) == (void *)place);
        SAMPLE("R6", "raw", 1, count, raw_commit(count));
        BENCH_NEED(munmap((void *)place, SIZE) == 0);
        struct uvas_where where = {.at = place};
        BENCH_NEED(uvas_reserve(tagged, SIZE, &where, &held) == 0);
        SAMPLE("R6", "uvas", 1, count, commit(count, held.id));
        BENCH_NEED(uvas_release(held.id) == 0);
    }
}

/* ---- R3 ------------------------------------------------------------------------------------------------------------------------------- */

/* Neighbours of different protections do not merge: each is a mapping of its own. They crowd the place where uvas looks first, and lie below it. */
static void crowd(size_t vmas) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uvas_id space = open_space(UVAS_UNTAGGED, 0);
    struct uvas_reservation first;
    BENCH_NEED(uvas_reserve(space, SIZE, NULL, &first) == 0 && uvas_release(first.id) == 0);
    BENCH_NEED(uvas_space_close(space) == 0);
    char *base = (char *)(first.base + SIZE) - vmas * page;
    BENCH_NEED(mmap(base, vmas * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0) == base);
    for (size_t i = 0; i < vmas; i += 2) {
        BENCH_NEED(mprotect(base + i * page, page, PROT_READ) == 0);
    }
}

/* The same question by reading /proc/self/maps and scanning for the first gap of SIZE above `low`. */
static uintptr_t hole_by_text(uintptr_t low, char *text, size_t capacity) {
    int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    size_t length = 0;
    ssize_t got;
    while ((got = read(fd, text + length, capacity - length)) > 0) {
        length += (size_t)got;
    }
    (void)close(fd);
    uintptr_t from = low;
    for (char *line = text, *end = text + length; line < end; line = memchr(line, '\n', (size_t)(end - line)) + 1) {
        char *rest;
        uintptr_t start = strtoul(line, &rest, 16), stop = strtoul(rest + 1, NULL, 16);
        if (start >= from && start - from >= SIZE) {
            return from;
        }
        from = stop > from ? stop : from;
    }
    return from;
}

static void hole(size_t rounds, size_t vmas) {
    size_t capacity = 16 * MIB, count = 200;
    char *text = malloc(capacity);
    BENCH_NEED(text);
    memset(text, 1, capacity);
    crowd(vmas);
    for (size_t round = 0; round < rounds; round++) {
        uint64_t raw_ns = 0, ours = 0;
        for (size_t i = 0; i < count; i++) { /* a new space each time: nothing is remembered of where the last search ended */
            uvas_id space = open_space(UVAS_UNTAGGED, 0);
            struct uvas_reservation held;
            uint64_t began = bench_ns();
            BENCH_NEED(uvas_reserve(space, SIZE, NULL, &held) == 0 && uvas_release(held.id) == 0);
            ours += bench_ns() - began;
            BENCH_NEED(uvas_space_close(space) == 0);
            began = bench_ns();
            void *at = mmap((void *)held.base, SIZE, PROT_NONE, MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED_NOREPLACE | MAP_ANONYMOUS, -1, 0);
            BENCH_NEED(at == (void *)held.base && munmap(at, SIZE) == 0);
            raw_ns += bench_ns() - began;
        }
        bench_say("R3", "uvas reserve + release", vmas, (double)ours / (double)count);
        bench_say("R3", "raw mmap + munmap", vmas, (double)raw_ns / (double)count);
        SAMPLE("R3", "the text of /proc/self/maps", vmas, 1, (void)hole_by_text(place, text, capacity));
    }
    free(text);
}

int main(int argc, char **argv) {
    BENCH_NEED(argc == 4);
    uvas_id space = open_space(UVAS_UNTAGGED, 0);
    struct uvas_reservation held;
    BENCH_NEED(uvas_reserve(space, 4 * SIZE, NULL, &held) == 0 && uvas_release(held.id) == 0 && uvas_space_close(space) == 0);
    place = held.base - ((uintptr_t)1 << 34);
    tag = memfd_create("raw", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    BENCH_NEED(tag >= 0 && fcntl(tag, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_WRITE | F_SEAL_SEAL) == 0);
    size_t rounds = strtoul(argv[2], NULL, 10), number = strtoul(argv[3], NULL, 10);
    if (strcmp(argv[1], "pairs") == 0) {
        pairs(rounds, number);
    } else {
        BENCH_NEED(strcmp(argv[1], "hole") == 0);
        hole(rounds, number);
    }
    return 0;
}
