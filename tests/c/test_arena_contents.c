/* test_arena_contents.c: what uvas.h promises of what is in blocks: zeros, and what was there before uvas_realloc.
 *
 *   test_arena_contents [name of one test]
 */
#define _GNU_SOURCE
#include "blocks.h"

static void zeroed_is_zero(void) {
    static const size_t sizes[] = {1, 16, 48, 129, 1000, 4096, 30000, 65536, 65537, 300000, 5 * MIB};
    struct scene scene = growing_scene(&(struct uvas_arena_options){.idle_ns = UINT64_MAX});
    for (int round = 0; round < 6; round++) {
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            uintptr_t blocks[40];
            size_t count = sizes[i] > MIB ? 3 : 40;
            for (size_t n = 0; n < count; n++) { /* fresh in the first round; in the others what was dirty, in part given back meanwhile */
                CHECK_OK(uvas_alloc_zeroed(scene.arena, sizes[i], n % 3 ? 0 : 64, &blocks[n]));
                size_t size = usable(scene.arena, blocks[n]);
                CHECK(all_bytes_are(blocks[n], size, 0));
                memset((void *)blocks[n], 0xa5, size);
            }
            for (size_t n = 0; n < count; n++) {
                CHECK(all_bytes_are(blocks[n], sizes[i], 0xa5));
                CHECK_OK(uvas_free(scene.arena, blocks[n]));
            }
            if (round % 3 == 2) {
                CHECK_OK(uvas_arena_trim(scene.arena, NULL));
            }
        }
        in_order(&scene);
    }
    end_scene(&scene);
}

/* Pages that were written through one block are not taken for fresh ones by a larger block over them. */
static void zeroed_over_pieces(void) {
    struct scene scene = fixed_scene(8 * MIB, &(struct uvas_arena_options){.idle_ns = UINT64_MAX});
    for (size_t written = 0; written < 8; written++) {
        uintptr_t pieces[8], whole;
        for (size_t i = 0; i < 8; i++) {
            pieces[i] = must_alloc(scene.arena, MIB, 0);
        }
        memset((void *)(pieces[written] + MIB - 8), 0x77, 8);
        for (size_t i = 0; i < 8; i++) {
            CHECK_OK(uvas_free(scene.arena, pieces[(i * 3 + written) % 8]));
        }
        CHECK_OK(uvas_alloc_zeroed(scene.arena, 8 * MIB, 0, &whole));
        CHECK(all_bytes_are(whole, 8 * MIB, 0));
        CHECK_OK(uvas_free(scene.arena, whole));
        CHECK_OK(uvas_arena_trim(scene.arena, NULL));
    }
    end_scene(&scene);
}

/* Nor where only some of the pages have been written before. */
static void zeroed_over_a_mix(void) {
    for (size_t first = 0; first < 4; first++) {
        struct scene scene = fixed_scene(8 * MIB, &(struct uvas_arena_options){.idle_ns = UINT64_MAX});
        uintptr_t before = first ? must_alloc(scene.arena, first * MIB, 0) : 0, whole;
        uintptr_t at = must_alloc(scene.arena, MIB, 0);
        memset((void *)at, 0x77, MIB);
        CHECK_OK(uvas_free(scene.arena, at));
        CHECK(!before || uvas_free(scene.arena, before) == 0);
        CHECK_OK(uvas_alloc_zeroed(scene.arena, 8 * MIB, 0, &whole));
        CHECK(all_bytes_are(whole, 8 * MIB, 0));
        CHECK_OK(uvas_free(scene.arena, whole));
        end_scene(&scene);
    }
}

static void realloc_keeps_contents(void) {
    static const size_t sizes[] = {24, 1, 16, 200, 128, 4096, 5000, 65536, 65537, 70000, 3 * MIB, 100 * KIB, 64 * KIB, 12 * MIB, 9, 300};
    struct scene scene = growing_scene(NULL);
    uintptr_t walls[16], at = must_alloc(scene.arena, 64, 0);
    size_t count = 0, written = usable(scene.arena, at);
    write_pattern(at, written, 0);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        uintptr_t from = at;
        walls[count++] = must_alloc(scene.arena, 80 * KIB, 0); /* now and then in the way */
        CHECK_OK(uvas_realloc(scene.arena, from, sizes[i], &at));
        verify_moved_pattern(at, from, written, sizes[i], i);
        if (at != from) { /* moved: the old place is no block any more */
            CHECK(uvas_free(scene.arena, from) == -EINVAL);
        }
        written = usable(scene.arena, at);
        CHECK(written >= sizes[i]);
        write_pattern(at, written, i + 1);
        in_order(&scene);
        CHECK(stats_of(scene.arena).live_blocks == count + 1);
    }
    CHECK_OK(uvas_free(scene.arena, at));
    while (count > 0) {
        CHECK_OK(uvas_free(scene.arena, walls[--count]));
    }
    end_scene(&scene);
}

static void realloc_in_place(void) {
    struct scene scene = fixed_scene(64 * MIB, NULL);
    uintptr_t at = must_alloc(scene.arena, 400 * KIB, 0), next, got;
    CHECK_OK(uvas_realloc(scene.arena, at, 10 * MIB, &got)); /* nobody is behind it */
    CHECK(got == at && usable(scene.arena, at) == 10 * MIB);
    write_pattern(at, 10 * MIB, 1);
    CHECK_OK(uvas_realloc(scene.arena, at, 5 * MIB, &got)); /* shrinks */
    CHECK(got == at && usable(scene.arena, at) == 5 * MIB);
    verify_moved_pattern(at, at, 10 * MIB, 5 * MIB, 1);
    next = must_alloc(scene.arena, 5 * MIB, 0); /* in the pages that were given back */
    CHECK(next == at + 5 * MIB);
    write_pattern(next, 5 * MIB, 2);
    CHECK_OK(uvas_free(scene.arena, next));
    CHECK_OK(uvas_realloc(scene.arena, at, 64 * MIB, &got)); /* the freed neighbour, and all the rest: the whole reservation */
    CHECK(got == at && usable(scene.arena, at) == 64 * MIB);
    verify_moved_pattern(at, at, 10 * MIB, 5 * MIB, 1);
    in_order(&scene);
    CHECK_OK(uvas_realloc(scene.arena, at, 64 * MIB - 1, &got)); /* as many pages as before */
    CHECK(got == at);
    CHECK_OK(uvas_realloc(scene.arena, at, 70 * KIB, &got));
    CHECK(got == at);
    next = must_alloc(scene.arena, 70 * KIB, 0);
    CHECK(next == at + 72 * KIB);
    CHECK_OK(uvas_realloc(scene.arena, at, 200 * KIB, &got)); /* somebody is behind it: moved */
    CHECK(got != at);
    verify_moved_pattern(got, at, 10 * MIB, 70 * KIB, 1);
    CHECK_OK(uvas_free(scene.arena, next));
    CHECK_OK(uvas_free(scene.arena, got));
    at = must_alloc(scene.arena, 100, 0);
    CHECK_OK(uvas_realloc(scene.arena, at, usable(scene.arena, at), &got)); /* a small block within its class */
    CHECK(got == at);
    CHECK_OK(uvas_free(scene.arena, at));
    end_scene(&scene);
}

static void realloc_that_fails(void) {
    struct scene scene = fixed_scene(4 * MIB, NULL);
    uintptr_t small = must_alloc(scene.arena, 200, 0), large = must_alloc(scene.arena, MIB, 0), got = UNTOUCHED;
    size_t size = usable(scene.arena, small);
    write_pattern(small, size, 1);
    write_pattern(large, MIB, 2);
    struct uvas_arena_stats before = stats_of(scene.arena);
    uintptr_t blocks[] = {small, large};
    for (int i = 0; i < 2; i++) {
        refused(uvas_realloc(scene.arena, blocks[i], 5 * MIB, &got), -ENOSPC, got);
        refused(uvas_realloc(scene.arena, blocks[i], SIZE_MAX, &got), -EINVAL, got);
        refused(uvas_realloc(scene.arena, blocks[i], 0, &got), -EINVAL, got);
    }
    refused(uvas_realloc(scene.arena, small + 16, 10, &got), -EINVAL, got);
    refused(uvas_realloc(scene.arena, large + PAGE, 10, &got), -EINVAL, got);
    refused(uvas_realloc(scene.arena, 0, 10, &got), -EINVAL, got);
    struct uvas_arena_stats after = stats_of(scene.arena);
    CHECK(after.live_blocks == 2 && after.live_bytes == before.live_bytes && after.total_blocks == before.total_blocks);
    CHECK(usable(scene.arena, small) == size && usable(scene.arena, large) == MIB);
    verify_pattern(small, size, 1);
    verify_pattern(large, MIB, 2);
    in_order(&scene);
    CHECK_OK(uvas_free(scene.arena, small));
    CHECK_OK(uvas_free(scene.arena, large));
    refused(uvas_realloc(scene.arena, large, 10, &got), -EINVAL, got);
    end_scene(&scene);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        TEST(zeroed_is_zero),
        TEST(zeroed_over_pieces),
        TEST(zeroed_over_a_mix),
        TEST(realloc_keeps_contents),
        TEST(realloc_in_place),
        TEST(realloc_that_fails),
    };
    return run_tests(tests, sizeof tests / sizeof *tests, argc, argv);
}
