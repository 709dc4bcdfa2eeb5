/* test_arena.c: what uvas.h promises of blocks: sizes, alignments, holes, contents, answers to mistakes, whose a byte is, limits, growth, numbers.
 * What stands behind the addresses is test_arena_memory.c's, threads and fork are test_arena_threads.c's.
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

static void at_the_limit(void) {
    struct scene scene = growing_scene(&(struct uvas_arena_options){.limit = 64 * PAGE + 4095, .growth = 16 * MIB});
    uintptr_t at = must_alloc(scene.arena, 64 * PAGE, 0), blocks[MANY];
    char number[32];
    refuses_to_alloc(scene.arena, 1, 0, -ENOMEM);
    const struct uvas_failure *why = uvas_last_failure();
    CHECK(why->kind == UVAS_FAILURE_MEMORY && why->size == 1 && why->value / PAGE == 64);
    CHECK_OK(uvas_free(scene.arena, at));
    refuses_to_alloc(scene.arena, 65 * PAGE, 0, -ENOMEM);
    (void)snprintf(number, sizeof number, "%zu", 65 * PAGE);
    CHECK(why->size == 65 * PAGE && (strstr(why->text, number) || strstr(why->text, "260")));
    for (int round = 0; round < 4; round++) { /* what is freed is charged back: pages of slabs as well, whatever they had been */
        size_t size = round == 0 ? 16 : round == 1 ? 1000 : round == 2 ? 33000 : 70000, count = 0;
        while (uvas_alloc(scene.arena, size, 0, &blocks[count]) == 0 && ++count < MANY) {
            CHECK(stats_of(scene.arena).used_bytes <= 64 * PAGE);
        }
        CHECK(count == MANY || uvas_last_failure()->code == -ENOMEM);
        CHECK(count * size >= 32 * PAGE || count == MANY);
        while (count > 0) {
            CHECK_OK(uvas_free(scene.arena, blocks[--count]));
        }
        at = must_alloc(scene.arena, 64 * PAGE, 0);
        CHECK_OK(uvas_realloc(scene.arena, at, 60 * PAGE, &at));
        uintptr_t rest = must_alloc(scene.arena, 4 * PAGE, 0), got = UNTOUCHED;
        refused(uvas_realloc(scene.arena, at, 61 * PAGE, &got), -ENOMEM, got);
        CHECK_OK(uvas_free(scene.arena, rest));
        CHECK_OK(uvas_realloc(scene.arena, at, 64 * PAGE, &at));
        CHECK_OK(uvas_free(scene.arena, at));
        in_order(&scene);
    }
    CHECK(stats_of(scene.arena).peak_bytes == 64 * PAGE);
    end_scene(&scene);
}

struct helper {
    uvas_id arena;
    uintptr_t spare; /* to be freed when asked, 0: nothing */
    int answer;
    int calls;
    size_t asked;
};

static int help(void *context, size_t size) {
    struct helper *helper = context;
    helper->calls++;
    helper->asked = size;
    (void)stats_of(helper->arena); /* any call is allowed here */
    if (helper->spare) {
        CHECK_OK(uvas_free(helper->arena, helper->spare));
        helper->spare = 0;
    }
    return helper->answer;
}

static void asked_before_it_fails(void) {
    struct helper helper = {0};
    struct scene scene = fixed_scene(4 * MIB, &(struct uvas_arena_options){.exhausted = help, .context = &helper, .limit = 3 * MIB});
    static const size_t sizes[] = {MIB, 5 * MIB}; /* the limit is in the way, and the reservation would be */
    uintptr_t got = UNTOUCHED, held, pair[2] = {UNTOUCHED, UNTOUCHED};
    helper.arena = scene.arena;
    helper.spare = must_alloc(scene.arena, 3 * MIB, 0);
    CHECK(helper.calls == 0);
    helper.answer = 0;
    uintptr_t spare = helper.spare;
    helper.spare = 0;
    refused(uvas_alloc(scene.arena, MIB, 0, &got), -ENOMEM, got); /* nobody could help */
    CHECK(helper.calls == 1 && helper.asked == MIB);
    helper.answer = 1;
    refused(uvas_alloc(scene.arena, MIB, 0, &got), -ENOMEM, got); /* said so and did nothing: once more, and no third time */
    CHECK(helper.calls == 2);
    helper.spare = spare;
    CHECK_OK(uvas_alloc(scene.arena, MIB, 0, &got));
    CHECK(helper.calls == 3 && helper.spare == 0);
    CHECK_OK(uvas_free(scene.arena, got));
    held = must_alloc(scene.arena, 100 * KIB, 0);
    helper.spare = must_alloc(scene.arena, 2 * MIB, 0);
    CHECK_OK(uvas_realloc(scene.arena, held, 2 * MIB, &held));
    CHECK(helper.calls == 4 && helper.spare == 0);
    helper.spare = must_alloc(scene.arena, MIB, 0);
    CHECK_OK(uvas_alloc_zeroed(scene.arena, MIB, 0, &got));
    CHECK(helper.calls == 5);
    helper.spare = got;
    CHECK_OK(uvas_alloc_many(scene.arena, (size_t[]){512 * KIB, 512 * KIB}, 2, pair));
    CHECK(helper.calls == 6);
    CHECK(uvas_alloc_many(scene.arena, sizes, 2, pair) < 0 && helper.calls == 7);
    CHECK(uvas_alloc_try(scene.arena, 2 * MIB, 0, &got) == -EAGAIN && helper.calls == 7); /* nobody is asked by a try */
    CHECK_OK(uvas_free(scene.arena, pair[0]));
    CHECK_OK(uvas_free(scene.arena, pair[1]));
    CHECK_OK(uvas_free(scene.arena, held));
    helper.spare = must_alloc(scene.arena, 3 * MIB, 0); /* a small block is had in the same way */
    CHECK_OK(uvas_alloc(scene.arena, 100, 0, &got));
    CHECK(helper.calls == 8 && helper.spare == 0 && helper.asked == 100);
    CHECK_OK(uvas_free(scene.arena, got));
    held = must_alloc(scene.arena, 3 * MIB, 0);
    for (helper.answer = 0; helper.answer < 2; helper.answer++) {
        got = UNTOUCHED;
        refused(uvas_alloc(scene.arena, 100, 0, &got), -ENOMEM, got);
        CHECK(helper.calls == 9 + helper.answer);
    }
    CHECK_OK(uvas_free(scene.arena, held));
    end_scene(&scene);
}

static int help_itself(void *context, size_t size) { /* to a block of the same arena, which is full */
    struct helper *helper = context;
    uintptr_t got = UNTOUCHED;
    helper->calls++;
    refused(uvas_alloc(helper->arena, size, 0, &got), -ENOMEM, got);
    return helper->answer;
}

static void nobody_is_asked_on_behalf_of_who_is_asked(void) {
    struct helper helper = {0};
    struct scene scene = fixed_scene(4 * MIB, &(struct uvas_arena_options){.exhausted = help_itself, .context = &helper, .limit = MIB});
    uintptr_t got = UNTOUCHED;
    helper.arena = scene.arena;
    for (helper.answer = 0; helper.answer < 2; helper.answer++) {
        refused(uvas_alloc(scene.arena, 2 * MIB, 0, &got), -ENOMEM, got);
        CHECK(helper.calls == 1 + helper.answer); /* once each time, and again the next */
    }
    end_scene(&scene);
}

static void nothing_goes_from_under_it(void) {
    struct scene scene = growing_scene(&(struct uvas_arena_options){.name = "tenant"});
    uvas_id second;
    CHECK(stats_of(scene.arena).regions == 0);
    CHECK(uvas_space_close(scene.space) == -EBUSY && strstr(uvas_last_failure()->text, "tenant")); /* before its first reservation as after it */
    CHECK_OK(uvas_arena_open(&(struct uvas_arena_options){.space = scene.space, .name = "second"}, &second));
    uintptr_t block = must_alloc(scene.arena, MIB, 0);
    CHECK_OK(uvas_free(scene.arena, block));
    CHECK_OK(uvas_arena_close(scene.arena));
    CHECK(uvas_space_close(scene.space) == -EBUSY && strstr(uvas_last_failure()->text, "second"));
    scene.arena = second;
    end_scene(&scene);
    CHECK(uvas_arena_open(&(struct uvas_arena_options){.space = scene.space}, &second) == -ESTALE);
    scene = fixed_scene(4 * MIB, &(struct uvas_arena_options){.name = "alone"});
    CHECK(uvas_commit(scene.held.id, 0, PAGE, UVAS_READ, 0) == -EBUSY && strstr(uvas_last_failure()->text, "alone"));
    block = must_alloc(scene.arena, MIB, 0);
    CHECK(uvas_commit(scene.held.id, 0, 4 * MIB, UVAS_READ | UVAS_WRITE, 0) == -EBUSY);
    CHECK(uvas_decommit(scene.held.id, 0, PAGE) == -EBUSY && strstr(uvas_last_failure()->text, "alone"));
    CHECK_OK(uvas_free(scene.arena, block));
    CHECK_OK(uvas_arena_close(scene.arena));
    CHECK_OK(uvas_commit(scene.held.id, 0, PAGE, UVAS_READ | UVAS_WRITE, 0)); /* it is the caller's again */
    struct uvas_arena_options bare = {.reservation = scene.held.id, .flags = UVAS_ARENA_BARE};
    CHECK_OK(uvas_decommit(scene.held.id, 0, PAGE));
    CHECK_OK(uvas_arena_open(&bare, &scene.arena));
    CHECK_OK(uvas_commit(scene.held.id, 0, PAGE, UVAS_READ | UVAS_WRITE, 0)); /* of bare addresses: by whoever likes */
    CHECK_OK(uvas_protect(scene.held.id, 0, PAGE, UVAS_READ));
    CHECK_OK(uvas_decommit(scene.held.id, 0, PAGE));
    end_scene(&scene);
}

static void grows_by_reservations(void) {
    struct scene scene = growing_scene(&(struct uvas_arena_options){.growth = 4 * MIB, .name = "grows"});
    uintptr_t blocks[64];
    struct uvas_space_stats held;
    for (int i = 0; i < 32; i++) {
        blocks[i] = must_alloc(scene.arena, MIB, 0);
        write_pattern(blocks[i], MIB, (uint64_t)i);
    }
    struct uvas_arena_stats now = stats_of(scene.arena);
    CHECK(now.regions >= 8 && now.reserved_bytes >= 32 * MIB && now.reserved_bytes <= 40 * MIB);
    blocks[32] = must_alloc(scene.arena, 100 * MIB, 0); /* more than it takes at once */
    blocks[33] = must_alloc(scene.arena, 16, GIB);
    blocks[34] = must_alloc(scene.arena, 6 * MIB, 64 * MIB);
    in_order(&scene);
    CHECK_OK(uvas_space_stats(scene.space, &held));
    now = stats_of(scene.arena);
    CHECK(held.reservations == now.regions && held.reserved_bytes == now.reserved_bytes && held.committed_bytes == now.committed_bytes);
    for (int i = 0; i < 35; i++) {
        verify_pattern(blocks[i], i < 32 ? MIB : 0, (uint64_t)i);
        struct uvas_allocation found;
        CHECK_OK(uvas_find_allocation(blocks[i], &found));
        CHECK(found.base == blocks[i] && found.arena == scene.arena);
        CHECK_OK(uvas_free(scene.arena, blocks[i]));
    }
    end_scene(&scene);
}

static void growth_ends_where_the_space_does(void) {
    struct uvas_space_options space = {.name = "narrow", .window_base = WINDOW_BASE, .window_size = 64 * MIB};
    struct uvas_arena_options options = {.growth = 0};
    struct scene scene = {0};
    uintptr_t blocks[64];
    size_t count = 0;
    CHECK_OK(uvas_space_open(&space, &scene.space));
    options.space = scene.space;
    CHECK_OK(uvas_arena_open(&options, &scene.arena)); /* 16 GiB are not to be had: less is taken */
    while (uvas_alloc(scene.arena, MIB, 0, &blocks[count]) == 0) {
        write_pattern(blocks[count], MIB, count);
        CHECK(++count <= 64);
    }
    CHECK(uvas_last_failure()->code == -ENOSPC && count >= 48);
    in_order(&scene);
    refuses_to_alloc(scene.arena, 65 * MIB, 0, -ENOSPC);
    while (count > 0) {
        count--;
        verify_pattern(blocks[count], MIB, count);
        CHECK_OK(uvas_free(scene.arena, blocks[count]));
    }
    end_scene(&scene);
}

static void a_fixed_arena_never_grows(void) {
    struct scene scene = fixed_scene(8 * MIB, NULL);
    uintptr_t blocks[128];
    size_t count = 0;
    struct uvas_space_stats space;
    while (uvas_alloc(scene.arena, 80 * KIB, 0, &blocks[count]) == 0) {
        count++;
    }
    CHECK(uvas_last_failure()->code == -ENOSPC && uvas_last_failure()->kind == UVAS_FAILURE_EXHAUSTED);
    CHECK(count == 8 * MIB / (80 * KIB));
    CHECK_OK(uvas_space_stats(scene.space, &space));
    CHECK(space.reservations == 1 && stats_of(scene.arena).regions == 1 && stats_of(scene.arena).reserved_bytes == 8 * MIB);
    CHECK(uvas_arena_close(scene.arena) == -EBUSY);
    while (count > 0) {
        CHECK_OK(uvas_free(scene.arena, blocks[--count]));
    }
    end_scene(&scene);
}

static void close_under_a_live_block(void) {
    static const size_t sizes[] = {16, 4096, 65536, 3 * MIB};
    for (size_t i = 0; i < 4; i++) {
        struct scene scene = i % 2 ? fixed_scene(16 * MIB, NULL) : growing_scene(NULL);
        uintptr_t at = must_alloc(scene.arena, sizes[i], 0), other;
        write_pattern(at, sizes[i], i);
        for (int round = 0; round < 2; round++) {
            CHECK(uvas_arena_close(scene.arena) == -EBUSY);
            CHECK(uvas_last_failure()->kind == UVAS_FAILURE_BUSY && uvas_last_failure()->text[0] != '\0');
            in_order(&scene);
            CHECK(stats_of(scene.arena).live_blocks == 1);
            verify_pattern(at, sizes[i], i);
            other = must_alloc(scene.arena, sizes[i], 0);
            CHECK_OK(uvas_free(scene.arena, other));
        }
        CHECK_OK(uvas_free(scene.arena, at));
        uvas_id arena = scene.arena;
        struct uvas_arena_stats stats;
        end_scene(&scene);
        refuses_to_alloc(arena, 16, 0, -ESTALE);
        CHECK(uvas_free(arena, at) == -ESTALE && uvas_arena_stats(arena, &stats) == -ESTALE && uvas_arena_trim(arena, NULL) == -ESTALE);
        CHECK(uvas_arena_check(arena) == -ESTALE && uvas_arena_peak(arena, 0, NULL) == -ESTALE && uvas_free_try(arena, at) == -ESTALE);
    }
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
        TEST(mistakes_in_options),
        TEST(mistakes_in_requests),
        TEST(every_size),
        TEST(every_alignment),
        TEST(the_whole_reservation_as_one_block),
        TEST(a_hole_that_fits_exactly),
        TEST(the_last_page),
        TEST(zeroed_is_zero),
        TEST(zeroed_over_pieces),
        TEST(zeroed_over_a_mix),
        TEST(realloc_keeps_contents),
        TEST(realloc_in_place),
        TEST(realloc_that_fails),
        TEST(free_of_what_is_no_block),
        TEST(find_of_every_byte),
        TEST(find_of_the_arena),
        TEST(many_at_once),
        TEST(at_the_limit),
        TEST(asked_before_it_fails),
        TEST(nobody_is_asked_on_behalf_of_who_is_asked),
        TEST(nothing_goes_from_under_it),
        TEST(grows_by_reservations),
        TEST(growth_ends_where_the_space_does),
        TEST(a_fixed_arena_never_grows),
        TEST(close_under_a_live_block),
        TEST(only_if_it_takes_no_system_call),
        TEST(numbers_tell_what_is_there),
        TEST(churn),
    };
    return run_tests(tests, sizeof tests / sizeof *tests, argc, argv);
}
