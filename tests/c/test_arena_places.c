/* test_arena_places.c: what uvas.h promises of where blocks lie: sizes, alignments, holes that are found and become one again.
 *
 *   test_arena_places [name of one test]
 */
#define _GNU_SOURCE
#include "blocks.h"

#define MANY 4096

/* Asked and got: at least as much, a multiple of 16, and above 128 bytes an eighth more at most. */
static void one_size(uvas_id arena, size_t size) {
    uintptr_t at = must_alloc(arena, size, 0);
    size_t got = usable(arena, at);
    CHECK(got >= size && got % 16 == 0);
    CHECK(got <= (size <= 128 ? (size + 15) / 16 * 16 : size + size / 8));
    CHECK(size <= SMALL_MAX || got % PAGE == 0);
    struct uvas_allocation found;
    CHECK_OK(uvas_find_allocation(at, &found));
    CHECK(found.base == at && found.size == got && found.arena == arena);
    write_pattern(at, got, size);
    verify_pattern(at, got, size);
    CHECK_OK(uvas_free(arena, at));
}

static void every_size(void) {
    struct scene scene = growing_scene(NULL);
    for (size_t size = 1; size <= 4200; size++) {
        one_size(scene.arena, size);
    }
    for (size_t power = 128; power <= 8 * MIB; power *= 2) {
        for (size_t step = 0; step < 16; step++) { /* every boundary of eight and more steps a doubling, and its neighbours */
            size_t size = power + power / 16 * step;
            one_size(scene.arena, size - 1);
            one_size(scene.arena, size);
            one_size(scene.arena, size + 1);
        }
    }
    in_order(&scene);
    end_scene(&scene);
}

static void every_alignment(void) {
    static const size_t sizes[] = {1, 16, 24, 100, 129, 1000, 4096, 5000, 65536, 65537, 100000, 3 * MIB};
    struct scene scene = fixed_scene(8 * GIB, NULL);
    uintptr_t held[sizeof sizes / sizeof *sizes * 2];
    for (size_t align = 1; align <= GIB; align *= 2) {
        size_t count = 0;
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            if (align >= 512 * MIB && i >= 3) {
                break; /* there are not more places in 8 GiB */
            }
            uintptr_t at = held[count++] = must_alloc(scene.arena, sizes[i], align);
            CHECK(usable(scene.arena, at) >= sizes[i]);
            write_pattern(at, sizes[i], align);
            CHECK_OK(uvas_alloc_zeroed(scene.arena, sizes[i], align, &held[count]));
            CHECK(held[count] % align == 0 && all_bytes_are(held[count], sizes[i], 0));
            count++;
        }
        in_order(&scene);
        CHECK(stats_of(scene.arena).used_bytes < 64 * MIB); /* an alignment is no size */
        for (size_t i = 0; i < count; i++) {
            verify_pattern(held[i], i % 2 ? 0 : sizes[i / 2], align);
            CHECK_OK(uvas_free(scene.arena, held[i]));
        }
    }
    end_scene(&scene);
}

/* Whatever the number of its pages, and again after it has been cut into small pieces. */
static void the_whole_reservation_as_one_block(void) {
    for (size_t pages = 1; pages <= 8192; pages = pages < 40 ? pages + 1 : pages * 2 + 1) {
        struct scene scene = fixed_scene(pages * PAGE, NULL);
        for (int round = 0; round < 3; round++) {
            uintptr_t whole = must_alloc(scene.arena, pages * PAGE, 0);
            CHECK(whole == scene.held.base && usable(scene.arena, whole) == pages * PAGE);
            write_pattern(whole, pages * PAGE, pages);
            refuses_to_alloc(scene.arena, 1, 0, -ENOSPC);
            in_order(&scene);
            CHECK_OK(uvas_free(scene.arena, whole));
            uintptr_t pieces[64];
            size_t count = 0;
            while (count < 64 && uvas_alloc(scene.arena, 1 + count * 977 % (pages * PAGE), 0, &pieces[count]) == 0) {
                count++;
            }
            CHECK(count > 0);
            while (count > 0) {
                CHECK_OK(uvas_free(scene.arena, pieces[--count]));
            }
        }
        end_scene(&scene);
    }
}

/* Small blocks too: where there is one page, there is a block of one page and a block of one byte. */
static void a_hole_that_fits_exactly(void) {
    static const size_t holes[] = {112, 72, 88, 104, 80}; /* pages, of large blocks (as they are rounded), kept apart by others */
    struct scene scene = fixed_scene(64 * MIB, NULL);
    uintptr_t hole[5], wall[5], got;
    for (size_t i = 0; i < 5; i++) {
        hole[i] = must_alloc(scene.arena, holes[i] * PAGE, 0);
        wall[i] = must_alloc(scene.arena, 96 * PAGE, 0);
    }
    uintptr_t rest = must_alloc(scene.arena, stats_of(scene.arena).largest_hole, 0);
    for (size_t i = 0; i < 5; i++) {
        CHECK_OK(uvas_free(scene.arena, hole[i]));
    }
    refuses_to_alloc(scene.arena, 113 * PAGE, 0, -ENOSPC);
    for (size_t i = 0; i < 5; i++) { /* the best one each time, or a later one would not fit */
        size_t other = (i + 2) % 5;
        CHECK(must_alloc(scene.arena, holes[other] * PAGE, 0) == hole[other]);
    }
    refuses_to_alloc(scene.arena, 1, 0, -ENOSPC);
    in_order(&scene);
    CHECK_OK(uvas_free(scene.arena, hole[1]));
    for (size_t i = 0; i < 17; i++) {
        CHECK_OK(uvas_alloc(scene.arena, i % 2 ? 1 : PAGE, PAGE, &got));
        hole[1] = i == 0 ? got : hole[1];
        CHECK_OK(uvas_free(scene.arena, got));
    }
    CHECK_OK(uvas_free(scene.arena, hole[0]));
    CHECK_OK(uvas_free(scene.arena, hole[2]));
    CHECK_OK(uvas_free(scene.arena, hole[3]));
    CHECK_OK(uvas_free(scene.arena, hole[4]));
    for (size_t i = 0; i < 5; i++) {
        CHECK_OK(uvas_free(scene.arena, wall[i]));
    }
    size_t all_else = 64 * MIB - usable(scene.arena, rest);
    got = must_alloc(scene.arena, all_else, 0); /* all neighbours have become one again */
    refuses_to_alloc(scene.arena, 1, 0, -ENOSPC);
    CHECK_OK(uvas_free(scene.arena, rest));
    CHECK_OK(uvas_free(scene.arena, got));
    end_scene(&scene);
}

/* One page is left, and a block of any small class that fits in a page gets it. */
static void the_last_page(void) {
    size_t but_one = SMALL_MAX / PAGE; /* up to so many a block takes as many as it asks for */
    struct scene scene = fixed_scene((but_one + 1) * PAGE, NULL);
    uintptr_t most = must_alloc(scene.arena, but_one * PAGE, 0);
    for (size_t size = 1; size <= PAGE; size = size < 128 ? size + 16 : size + size / 8) {
        uintptr_t last = must_alloc(scene.arena, size, 0);
        CHECK(last / PAGE != most / PAGE && usable(scene.arena, last) >= size);
        refuses_to_alloc(scene.arena, PAGE, 0, -ENOSPC);
        CHECK_OK(uvas_free(scene.arena, last));
    }
    CHECK_OK(uvas_free(scene.arena, most));
    for (size_t pages = 1; pages <= 16 && pages < but_one; pages++) { /* and holes of more pages, blocks of as many */
        most = must_alloc(scene.arena, (but_one + 1 - pages) * PAGE, 0);
        uintptr_t last = must_alloc(scene.arena, pages * PAGE, 0);
        refuses_to_alloc(scene.arena, 1, 0, -ENOSPC);
        CHECK_OK(uvas_free(scene.arena, last));
        CHECK_OK(uvas_free(scene.arena, most));
    }
    end_scene(&scene);
}

/* A churn of all sizes against a table of what lives: no two blocks share a byte, every pattern stays. */
static void churn(void) {
    static struct {
        uintptr_t base;
        size_t size;
    } live[MANY];
    struct scene scene = fixed_scene(256 * MIB, &(struct uvas_arena_options){.idle_ns = 1000000});
    uint64_t random = 42, served = 0;
    for (int round = 0; round < 60000; round++) {
        size_t i = next_random(&random) % MANY;
        if (live[i].base) {
            verify_pattern(live[i].base, live[i].size, i);
            CHECK_OK(uvas_free(scene.arena, live[i].base));
            live[i].base = 0;
            continue;
        }
        size_t size = 1 + next_random(&random) % (UINT64_C(1) << (4 + next_random(&random) % 15));
        size_t align = (size_t)1 << next_random(&random) % (next_random(&random) % 8 ? 8 : 20);
        int rc = uvas_alloc(scene.arena, size, align, &live[i].base);
        CHECK(rc == 0 || rc == -ENOSPC);
        if (rc == 0) {
            served++;
            live[i].size = usable(scene.arena, live[i].base);
            CHECK(live[i].base % align == 0 && live[i].size >= size && live[i].base >= scene.held.base);
            CHECK(live[i].base - scene.held.base <= scene.held.size - live[i].size);
            write_pattern(live[i].base, live[i].size, i);
        }
        if (round % 5000 == 0) {
            in_order(&scene);
        }
    }
    CHECK(served > 20000);
    for (size_t i = 0; i < MANY; i++) {
        if (live[i].base) {
            verify_pattern(live[i].base, live[i].size, i);
            CHECK_OK(uvas_free(scene.arena, live[i].base));
        }
    }
    CHECK_OK(uvas_free(scene.arena, must_alloc(scene.arena, 256 * MIB, 0)));
    end_scene(&scene);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        TEST(every_size),
        TEST(every_alignment),
        TEST(the_whole_reservation_as_one_block),
        TEST(a_hole_that_fits_exactly),
        TEST(the_last_page),
        TEST(churn),
    };
    return run_tests(tests, sizeof tests / sizeof *tests, argc, argv);
}
