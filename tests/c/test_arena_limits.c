/* test_arena_limits.c: what uvas.h promises of how far an arena goes: its limit, who is asked before a call fails, growth, and what stays while it lives.
 *
 *   test_arena_limits [name of one test]
 */
#define _GNU_SOURCE
#include "blocks.h"

#define MANY 4096

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

int main(int argc, char **argv) {
    static const struct test tests[] = {
        TEST(at_the_limit),
        TEST(asked_before_it_fails),
        TEST(nobody_is_asked_on_behalf_of_who_is_asked),
        TEST(nothing_goes_from_under_it),
        TEST(grows_by_reservations),
        TEST(growth_ends_where_the_space_does),
        TEST(a_fixed_arena_never_grows),
        TEST(close_under_a_live_block),
    };
    return run_tests(tests, sizeof tests / sizeof *tests, argc, argv);
}
