/* blocks.h: what the tests of arenas share: scenes (a space, a reservation and an arena in it), blocks with a pattern in them, and numbers.
 *
 * All addresses lie where GCC's ThreadSanitizer lets programs have memory.
 */
#ifndef BLOCKS_H
#define BLOCKS_H

#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#define WINDOW_BASE UINT64_C(0x551000000000)
#define WINDOW_SIZE (UINT64_C(4) << 40)

#define PAGE ((size_t)sysconf(_SC_PAGESIZE))
#define KIB ((size_t)1 << 10)
#define MIB ((size_t)1 << 20)
#define GIB ((size_t)1 << 30)
#define SMALL_MAX ((size_t)256 << 10) /* larger blocks have pages of their own */
#define UNTOUCHED ((uintptr_t)0x5a5a5a5a) /* an out-parameter that no call has written to */

struct scene {
    uvas_id space;
    struct uvas_reservation held; /* of a scene in one fixed reservation */
    uvas_id arena;
};

/* An arena in a reservation of its own, which never grows. `options` may be NULL. */
static inline struct scene fixed_scene(size_t size, const struct uvas_arena_options *options) {
    struct scene scene = {0};
    struct uvas_space_options space = {.name = "fixed", .window_base = WINDOW_BASE, .window_size = WINDOW_SIZE};
    struct uvas_arena_options arena = options ? *options : (struct uvas_arena_options){0};
    struct uvas_where where = {.name = "held", .align = 2 * MIB};
    CHECK_OK(uvas_space_open(&space, &scene.space));
    CHECK_OK(uvas_reserve(scene.space, size, &where, &scene.held));
    arena.reservation = scene.held.id;
    CHECK_OK(uvas_arena_open(&arena, &scene.arena));
    return scene;
}

/* An arena that takes reservations from its space as it needs them. */
static inline struct scene growing_scene(const struct uvas_arena_options *options) {
    struct scene scene = {0};
    struct uvas_space_options space = {.name = "growing", .window_base = WINDOW_BASE, .window_size = WINDOW_SIZE};
    struct uvas_arena_options arena = options ? *options : (struct uvas_arena_options){0};
    CHECK_OK(uvas_space_open(&space, &scene.space));
    arena.space = scene.space;
    CHECK_OK(uvas_arena_open(&arena, &scene.arena));
    return scene;
}

static inline struct uvas_arena_stats stats_of(uvas_id arena) {
    struct uvas_arena_stats stats;
    CHECK_OK(uvas_arena_stats(arena, &stats));
    return stats;
}

/* What the numbers say of each other, whatever has been done before, while nobody works in the arena. */
static inline void numbers_agree(uvas_id arena, bool guarded) {
    struct uvas_arena_stats now = stats_of(arena);
    CHECK(now.live_blocks <= now.total_blocks && now.live_bytes <= now.total_bytes);
    CHECK((now.live_blocks == 0) == (now.live_bytes == 0));
    CHECK(now.live_bytes <= now.used_bytes && now.used_bytes <= now.peak_bytes);
    CHECK(now.cached_bytes <= now.used_bytes && now.live_bytes <= now.used_bytes - now.cached_bytes);
    CHECK(now.committed_bytes <= now.reserved_bytes && now.resident_bytes <= now.committed_bytes);
    CHECK((now.hole_bytes == 0) == (now.hole_count == 0) && now.largest_hole <= now.hole_bytes);
    CHECK((now.hole_count == 0) == (now.largest_hole == 0) && now.hole_bytes <= now.hole_count * now.largest_hole);
    CHECK(guarded ? now.used_bytes + now.hole_bytes <= now.reserved_bytes : now.used_bytes + now.hole_bytes == now.reserved_bytes);
    CHECK(now.used_bytes % PAGE == 0 && now.cached_bytes % PAGE == 0 && now.hole_bytes % PAGE == 0);
}

static inline void in_order(const struct scene *scene) {
    CHECK_OK(uvas_arena_check(scene->arena));
    CHECK_OK(uvas_check());
    numbers_agree(scene->arena, false);
}

/* Nothing may live in it any more; afterwards nothing of it is left. */
static inline void end_scene(struct scene *scene) {
    CHECK_OK(uvas_arena_check(scene->arena));
    CHECK(stats_of(scene->arena).live_blocks == 0);
    CHECK_OK(uvas_arena_close(scene->arena));
    CHECK(uvas_arena_close(scene->arena) == -ESTALE);
    if (scene->held.id) {
        CHECK_OK(uvas_release(scene->held.id));
    }
    struct uvas_space_stats left;
    CHECK_OK(uvas_space_stats(scene->space, &left));
    CHECK(left.reservations == 0 && left.reserved_bytes == 0 && left.committed_bytes == 0 && left.poisoned_bytes == 0);
    CHECK_OK(uvas_space_close(scene->space));
    CHECK_OK(uvas_check());
}

static inline uintptr_t must_alloc(uvas_id arena, size_t size, size_t align) {
    uintptr_t got = UNTOUCHED;
    CHECK_OK(uvas_alloc(arena, size, align, &got));
    CHECK(got != 0 && got % (align > 16 ? align : 16) == 0);
    return got;
}

static inline size_t usable(uvas_id arena, uintptr_t address) {
    size_t size = 0;
    CHECK_OK(uvas_allocation_size(arena, address, &size));
    return size;
}

/* A call that must fail with `code`, has written nothing to *out, and tells it in the thread's last failure. */
static inline void refused(int code, int expected, uintptr_t out) {
    CHECK(code == expected);
    CHECK(out == UNTOUCHED);
    CHECK(uvas_last_failure()->code == expected && uvas_last_failure()->text[0] != '\0');
}

static inline void refuses_to_alloc(uvas_id arena, size_t size, size_t align, int expected) {
    uintptr_t got = UNTOUCHED;
    int rc = uvas_alloc(arena, size, align, &got);
    refused(rc, expected, got);
    rc = uvas_alloc_zeroed(arena, size, align, &got);
    refused(rc, expected, got);
}

/* The pattern of a block: a function of address, owner and position. */
static inline uint64_t word_of(uintptr_t base, uint64_t owner, size_t i) {
    return (base * UINT64_C(0x9E3779B97F4A7C15)) ^ (owner << 20) ^ (i * UINT64_C(0xD1B54A32D192ED03));
}

/* Every word of small blocks, first and last words and one a page of large ones. */
static inline size_t next_word(size_t i, size_t words) {
    size_t next = i + (words > 1024 ? PAGE / 8 : 1);
    return i < words - 1 && next >= words ? words - 1 : next;
}

static inline void write_pattern(uintptr_t base, size_t size, uint64_t owner) {
    uint64_t *words = (uint64_t *)base;
    for (size_t i = 0; i < size / 8; i = next_word(i, size / 8)) {
        words[i] = word_of(base, owner, i);
    }
}

/* `from`: where the block was when the pattern was written; only the first `size` bytes. */
static inline void verify_moved_pattern(uintptr_t base, uintptr_t from, size_t written, size_t size, uint64_t owner) {
    const uint64_t *words = (const uint64_t *)base;
    for (size_t i = 0; i < written / 8 && i < size / 8; i = next_word(i, written / 8)) {
        CHECK(words[i] == word_of(from, owner, i));
    }
}

static inline void verify_pattern(uintptr_t base, size_t size, uint64_t owner) {
    verify_moved_pattern(base, base, size, size, owner);
}

static inline bool all_bytes_are(uintptr_t base, size_t size, unsigned char value) {
    const unsigned char *bytes = (const unsigned char *)base;
    return size == 0 || (bytes[0] == value && memcmp(bytes, bytes + 1, size - 1) == 0);
}

/* Bytes behind a reservation, as uvas has them in its book. */
static inline size_t bytes_in_pieces(uvas_id reservation) {
    struct uvas_piece pieces[64];
    size_t count = 0, offset = 0, bytes = 0;
    do {
        CHECK_OK(uvas_pieces(reservation, offset, pieces, 64, &count));
        for (size_t i = 0; i < count; i++) {
            bytes += pieces[i].guarded ? 0 : pieces[i].size;
            offset = pieces[i].offset + pieces[i].size;
        }
    } while (count == 64);
    return bytes;
}

/* Lines of /proc/self/maps in [base, base + size). */
static inline long mappings_in(uintptr_t base, size_t size) {
    char line[512];
    long count = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    CHECK(maps != NULL);
    while (fgets(line, sizeof line, maps)) {
        uintptr_t start = strtoul(line, NULL, 16);
        count += start >= base && start - base < size;
    }
    (void)fclose(maps);
    return count;
}

/* Runs it in a forked child, at most 60 s, and returns how it ended (see wait(2)). */
static inline int in_child(void (*body)(void *), void *argument) {
    int status = 0;
    (void)fflush(NULL);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        (void)alarm(60);
        body(argument);
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child);
    return status;
}

static inline bool ended_well(int status) { return WIFEXITED(status) && WEXITSTATUS(status) == 0; }

#endif
