/* test_arena.c: what uvas.h promises of the calls of an arena: answers to mistakes, whose a byte is, many blocks at once, tries, numbers.
 * Where blocks lie is test_arena_places.c's, what is in them test_arena_contents.c's, limits and growth are test_arena_limits.c's, what stands
 * behind the addresses is test_arena_memory.c's, threads and fork are test_arena_threads.c's.
 *
 *   test_arena [name of one test]
 */
#define _GNU_SOURCE
#include "blocks.h"

#define MANY 4096

static void mistakes_in_options(void) {
    uvas_id space, got = UNTOUCHED;
    struct uvas_reservation held;
    CHECK_OK(uvas_space_open(&(struct uvas_space_options){.name = "mistakes"}, &space));
    CHECK_OK(uvas_reserve(space, MIB, NULL, &held));
    struct uvas_arena_options nowhere = {.name = "nowhere"}, unknown_pages = {.reservation = held.id, .pages = 9},
                              unknown_flag = {.reservation = held.id, .flags = UINT32_C(1) << 31}, dead_space = {.space = UINT64_C(1) << 60},
                              dead_reservation = {.reservation = UINT64_C(1) << 60}, not_a_reservation = {.reservation = space};
    refused(uvas_arena_open(&nowhere, &got), -EINVAL, got);
    refused(uvas_arena_open(&unknown_pages, &got), -EINVAL, got);
    refused(uvas_arena_open(&unknown_flag, &got), -EINVAL, got);
    refused(uvas_arena_open(&dead_space, &got), -ESTALE, got);
    refused(uvas_arena_open(&dead_reservation, &got), -ESTALE, got);
    CHECK(uvas_arena_open(&not_a_reservation, &got) < 0 && got == UNTOUCHED);
    CHECK_OK(uvas_release(held.id));
    CHECK_OK(uvas_space_close(space));
}

static void mistakes_in_requests(void) {
    struct scene scene = fixed_scene(16 * MIB, NULL);
    struct uvas_arena_stats before = stats_of(scene.arena);
    refuses_to_alloc(scene.arena, 0, 0, -EINVAL);
    refuses_to_alloc(scene.arena, 64, 48, -EINVAL);
    refuses_to_alloc(scene.arena, 64, 2 * GIB, -EINVAL);
    refuses_to_alloc(scene.arena, 17 * MIB, 0, -ENOSPC);
    refuses_to_alloc(scene.arena, (size_t)1 << 46, 0, -ENOSPC);
    for (size_t more = SIZE_MAX; more >> 57; more /= 2) { /* than there are addresses */
        refuses_to_alloc(scene.arena, more, more % 3 ? 0 : GIB, -EINVAL);
    }
    refuses_to_alloc(scene.arena + 1000000, 64, 0, -ESTALE);
    refuses_to_alloc(0, 64, 0, -ESTALE);
    struct uvas_arena_stats after = stats_of(scene.arena);
    CHECK(after.live_blocks == before.live_blocks && after.total_blocks == before.total_blocks && after.used_bytes == before.used_bytes);
    for (size_t align = 1; align <= 16; align *= 2) {
        CHECK_OK(uvas_free(scene.arena, must_alloc(scene.arena, 24, align)));
    }
    in_order(&scene);
    end_scene(&scene);
}

/* The same answer from free, free_try, realloc and allocation_size; nothing changes. */
static void not_a_block(uvas_id arena, uintptr_t address) {
    struct uvas_arena_stats before = stats_of(arena), after;
    uintptr_t got = UNTOUCHED;
    size_t size = UNTOUCHED;
    CHECK(uvas_free(arena, address) == -EINVAL);
    CHECK(uvas_last_failure()->kind == UVAS_FAILURE_INVALID && uvas_last_failure()->text[0] != '\0');
    CHECK(uvas_free_try(arena, address) == -EINVAL);
    refused(uvas_realloc(arena, address, 64, &got), -EINVAL, got);
    refused(uvas_allocation_size(arena, address, &size), -EINVAL, size);
    after = stats_of(arena);
    CHECK(after.live_blocks == before.live_blocks && after.live_bytes == before.live_bytes && after.total_blocks == before.total_blocks);
}

static void free_of_what_is_no_block(void) {
    static const size_t sizes[] = {1, 16, 40, 129, 1000, 4096, 5000, 65536, 65537, 3 * MIB};
    struct scene scene = fixed_scene(256 * MIB, NULL), other = growing_scene(NULL);
    uintptr_t elsewhere = must_alloc(other.arena, 500, 0), large_elsewhere = must_alloc(other.arena, MIB, 0);
    int on_stack = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        uintptr_t at = must_alloc(scene.arena, sizes[i], 0), again = must_alloc(scene.arena, sizes[i], 0);
        size_t size = usable(scene.arena, at);
        for (size_t inside = 1; inside < size; inside = inside < 64 ? inside + 1 : inside * 2) {
            not_a_block(scene.arena, at + inside);
        }
        not_a_block(scene.arena, at + size - 1);
        CHECK_OK(uvas_free(scene.arena, at));
        not_a_block(scene.arena, at);
        CHECK_OK(uvas_free(scene.arena, again));
        not_a_block(scene.arena, again);
        not_a_block(scene.arena, at);
        CHECK_OK(uvas_arena_trim(scene.arena, NULL));
        not_a_block(scene.arena, at);
    }
    uintptr_t at = must_alloc(scene.arena, 48, 0);
    uintptr_t strangers[] = {0, 1, 16, PAGE, UINTPTR_MAX, UINTPTR_MAX - 15, (uintptr_t)&on_stack, (uintptr_t)&free_of_what_is_no_block,
                             scene.held.base + scene.held.size - PAGE, scene.held.base + scene.held.size, scene.held.base - 16,
                             (uintptr_t)1 << 47, (uintptr_t)1 << 63, at + 48, at + 96, at + 4800, elsewhere, large_elsewhere};
    for (size_t i = 0; i < sizeof strangers / sizeof *strangers; i++) {
        not_a_block(scene.arena, strangers[i]);
    }
    CHECK(uvas_free(scene.arena + 1000000, at) == -ESTALE);
    in_order(&scene);
    CHECK_OK(uvas_free(scene.arena, at));
    CHECK_OK(uvas_free(other.arena, elsewhere));
    CHECK_OK(uvas_free(other.arena, large_elsewhere));
    end_scene(&other);
    end_scene(&scene);
}

static void finds(uvas_id arena, uintptr_t base, size_t size) {
    size_t places[] = {0, 1, 7, size / 2, size / 3, size - 8, size - 1};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        struct uvas_allocation found = {0};
        CHECK_OK(uvas_find_allocation(base + places[i], &found));
        CHECK(found.base == base && found.size == size && found.arena == arena);
    }
}

/* Of an arena's addresses, with a block there or not, and of no others. */
static void find_of_the_arena(void) {
    struct scene scene = growing_scene(NULL), other = fixed_scene(MIB, NULL);
    uvas_id found = 0;
    uintptr_t block = must_alloc(scene.arena, 100, 0);
    struct uvas_found reservation;
    CHECK_OK(uvas_find(block, &reservation));
    for (size_t i = 0; i < 2; i++) {
        CHECK_OK(uvas_find_arena(i ? reservation.base + reservation.size - 1 : block, &found));
        CHECK(found == scene.arena);
    }
    CHECK_OK(uvas_free(scene.arena, block));
    CHECK_OK(uvas_find_arena(block, &found));
    CHECK(uvas_find_arena((uintptr_t)&found, &found) == -ENOENT);
    end_scene(&other);
    end_scene(&scene);
    CHECK(uvas_find_arena(block, &found) == -ENOENT);
}

static void finds_nothing(uintptr_t address) {
    struct uvas_allocation found = {.base = UNTOUCHED}, as_before = found;
    uint32_t kind = uvas_last_failure()->kind;
    CHECK(uvas_find_allocation(address, &found) == -ENOENT);
    CHECK(memcmp(&found, &as_before, sizeof found) == 0);
    CHECK(uvas_last_failure()->kind == kind);
}

static void find_of_every_byte(void) {
    static uintptr_t base[MANY];
    static size_t size[MANY];
    struct scene scenes[2] = {fixed_scene(512 * MIB, NULL), growing_scene(NULL)};
    uint64_t random = 7;
    for (size_t i = 0; i < MANY; i++) {
        size_t asked = 1 + next_random(&random) % (i % 8 == 0 ? 200000 : i % 2 ? 5000 : 128);
        base[i] = must_alloc(scenes[i % 2].arena, asked, i % 16 == 0 ? PAGE : 0);
        size[i] = usable(scenes[i % 2].arena, base[i]);
    }
    for (size_t i = 0; i < MANY; i++) {
        finds(scenes[i % 2].arena, base[i], size[i]);
    }
    for (size_t i = 0; i < MANY; i += 3) {
        CHECK_OK(uvas_free(scenes[i % 2].arena, base[i]));
    }
    for (size_t i = 0; i < MANY; i++) {
        if (i % 3) {
            finds(scenes[i % 2].arena, base[i], size[i]);
        } else {
            finds_nothing(base[i]);
            finds_nothing(base[i] + size[i] - 1);
        }
    }
    for (size_t i = 0; i < MANY; i++) {
        if (i % 3) {
            CHECK_OK(uvas_free(scenes[i % 2].arena, base[i]));
            finds_nothing(base[i] + size[i] / 2);
        }
    }
    uintptr_t strangers[] = {0, 1, UINTPTR_MAX, (uintptr_t)&random, scenes[0].held.base, scenes[0].held.base + 512 * MIB, (uintptr_t)1 << 63};
    for (size_t i = 0; i < sizeof strangers / sizeof *strangers; i++) {
        finds_nothing(strangers[i]);
    }
    uintptr_t last = must_alloc(scenes[0].arena, MIB, 0);
    finds(scenes[0].arena, last, MIB);
    CHECK_OK(uvas_free(scenes[0].arena, last));
    end_scene(&scenes[0]);
    end_scene(&scenes[1]);
    finds_nothing(last);
}

static void many_at_once(void) {
    static size_t sizes[MANY];
    static uintptr_t got[MANY];
    struct scene scene = fixed_scene(64 * MIB, NULL);
    for (size_t i = 0; i < MANY; i++) {
        sizes[i] = i % 100 == 99 ? 70000 + i : 1 + i * 37 % 3000;
    }
    CHECK_OK(uvas_alloc_many(scene.arena, sizes, MANY, got));
    CHECK(stats_of(scene.arena).live_blocks == MANY);
    for (size_t i = 0; i < MANY; i++) {
        CHECK(got[i] % 16 == 0 && usable(scene.arena, got[i]) >= sizes[i]);
        write_pattern(got[i], usable(scene.arena, got[i]), i);
    }
    for (size_t i = 0; i < MANY; i++) {
        verify_pattern(got[i], usable(scene.arena, got[i]), i);
        CHECK_OK(uvas_free(scene.arena, got[i]));
    }
    for (size_t bad = 0; bad < MANY; bad += MANY - 1) { /* none, whichever of them cannot be had */
        for (int zero = 0; zero < 2; zero++) {
            size_t good = sizes[bad];
            sizes[bad] = zero ? 0 : 65 * MIB;
            CHECK(uvas_alloc_many(scene.arena, sizes, MANY, got) == (zero ? -EINVAL : -ENOSPC));
            sizes[bad] = good;
            struct uvas_arena_stats after = stats_of(scene.arena);
            CHECK(after.live_blocks == 0 && after.live_bytes == 0);
        }
    }
    CHECK_OK(uvas_alloc_many(scene.arena, sizes, 0, got));
    in_order(&scene);
    uintptr_t whole = must_alloc(scene.arena, 64 * MIB, 0); /* nor has anything been left behind */
    CHECK_OK(uvas_free(scene.arena, whole));
    end_scene(&scene);
}

/* What was tried is either done or has changed nothing, the last failure included; and where everything is at hand it is done. */
static void only_if_it_takes_no_system_call(void) {
    static const size_t sizes[] = {16, 64, 1000, 4096, 65536, 80000};
    struct scene scene = growing_scene(NULL);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        uintptr_t got = UNTOUCHED, blocks[8];
        struct uvas_arena_stats before = stats_of(scene.arena);
        uint32_t kind = uvas_last_failure()->kind;
        uvas_test_fail(0, 0, 0);
        int rc = uvas_alloc_try(scene.arena, sizes[i], 0, &got);
        CHECK(uvas_test_calls() == 0);
        CHECK(rc == 0 ? got % 16 == 0 : rc == -EAGAIN && got == UNTOUCHED && uvas_last_failure()->kind == kind);
        CHECK(stats_of(scene.arena).live_blocks == before.live_blocks + (rc == 0));
        if (rc == 0) {
            CHECK_OK(uvas_free(scene.arena, got));
        }
        for (size_t n = 0; n < 8; n++) {
            blocks[n] = must_alloc(scene.arena, sizes[i], 0);
        }
        for (size_t n = 0; n < 7; n++) {
            CHECK_OK(uvas_free(scene.arena, blocks[n]));
        }
        uvas_test_fail(0, 0, 0);
        CHECK_OK(uvas_alloc_try(scene.arena, sizes[i], 0, &got));
        CHECK(usable(scene.arena, got) >= sizes[i]);
        CHECK_OK(uvas_free_try(scene.arena, got));
        memset((void *)blocks[6], 1, sizes[i]); /* free: what is handed out next may have held anything */
        uintptr_t zeros;
        CHECK_OK(uvas_alloc_zeroed_try(scene.arena, sizes[i], 0, &zeros));
        CHECK(((unsigned char *)zeros)[0] == 0 && memcmp((void *)zeros, (char *)zeros + 1, sizes[i] - 1) == 0);
        CHECK_OK(uvas_free_try(scene.arena, zeros));
        CHECK(uvas_test_calls() == 0);
        CHECK(uvas_free_try(scene.arena, got) == -EINVAL);
        CHECK_OK(uvas_free(scene.arena, blocks[7]));
        CHECK(uvas_alloc_try(scene.arena, 0, 0, &got) == -EINVAL);
    }
    end_scene(&scene);
}

static void numbers_tell_what_is_there(void) {
    struct scene scene = growing_scene(NULL);
    struct uvas_arena_stats now = stats_of(scene.arena);
    uint64_t blocks = 0, bytes = 0, was = 0;
    uintptr_t held[200];
    CHECK(now.live_blocks == 0 && now.total_blocks == 0 && now.used_bytes == 0 && now.cached_bytes == 0 && now.committed_bytes == 0);
    for (size_t i = 0; i < 200; i++) {
        held[i] = must_alloc(scene.arena, 1 + i * i * 11, 0);
        bytes += usable(scene.arena, held[i]);
        now = stats_of(scene.arena);
        CHECK(now.live_blocks == ++blocks && now.total_blocks == blocks && now.live_bytes == bytes && now.total_bytes == bytes);
        numbers_agree(scene.arena, false);
    }
    CHECK(now.threads == 1);
    CHECK(now.committed_bytes >= now.live_bytes && now.metadata_bytes > 0);
    uint64_t peak = now.peak_bytes;
    for (size_t i = 0; i < 200; i++) {
        bytes -= usable(scene.arena, held[i]);
        CHECK_OK(uvas_free(scene.arena, held[i]));
        now = stats_of(scene.arena);
        CHECK(now.live_blocks == --blocks && now.live_bytes == bytes && now.total_blocks == 200);
        numbers_agree(scene.arena, false);
    }
    CHECK(now.peak_bytes == peak);
    CHECK_OK(uvas_arena_trim(scene.arena, NULL));
    now = stats_of(scene.arena);
    CHECK(now.used_bytes == 0 && now.cached_bytes == 0 && now.hole_count == now.regions);
    CHECK_OK(uvas_arena_peak(scene.arena, 0, &was));
    CHECK(was == peak && stats_of(scene.arena).peak_bytes == 0);
    CHECK_OK(uvas_arena_peak(scene.arena, 12345 * PAGE, &was));
    CHECK(was == 0 && stats_of(scene.arena).peak_bytes == 12345 * PAGE);
    CHECK_OK(uvas_arena_peak(scene.arena, 0, NULL));
    uintptr_t at = must_alloc(scene.arena, MIB, 0);
    CHECK(stats_of(scene.arena).peak_bytes == MIB);
    CHECK_OK(uvas_arena_peak(scene.arena, PAGE, &was));
    CHECK(was == MIB && stats_of(scene.arena).peak_bytes == MIB);
    CHECK_OK(uvas_free(scene.arena, at));
    end_scene(&scene);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        TEST(mistakes_in_options),
        TEST(mistakes_in_requests),
        TEST(free_of_what_is_no_block),
        TEST(find_of_every_byte),
        TEST(find_of_the_arena),
        TEST(many_at_once),
        TEST(only_if_it_takes_no_system_call),
        TEST(numbers_tell_what_is_there),
    };
    return run_tests(tests, sizeof tests / sizeof *tests, argc, argv);
}
