/* test_order.c: what uvas.h promises of blocks in the order of streams: whose a freed block is, what goes back and when, sizes, the answer to
 * mistakes; and threads that allocate, write, read again and free, each on its own stream or all on one.
 *
 *   test_order
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <string.h>

#include "check.h"

#define MIB ((size_t)1 << 20)
#define THREADS 4
#define STEPS 20000
#define HELD 64

static _Thread_local intptr_t stream;

static intptr_t current(void) {
    return stream;
}

static int waited;
static uvas_id arena_waited_for;

static int wait_for_it(void *context, size_t size, uintptr_t *out) {
    waited++;
    int rc = uvas_alloc(arena_waited_for, size, 512, out);
    if (rc < 0) {
        (void)uvas_order_trim(*(struct uvas_order **)context, NULL);
        rc = uvas_alloc(arena_waited_for, size, 512, out);
    }
    return rc;
}

static uvas_id space, arena;

static struct uvas_order *open_order(size_t limit, struct uvas_order **context) {
    struct uvas_order *order = NULL;
    CHECK_OK(uvas_space_open(NULL, &space));
    CHECK_OK(uvas_arena_open(&(struct uvas_arena_options){.space = space, .limit = limit}, &arena));
    arena_waited_for = arena;
    struct uvas_order_options options = {.arena = arena, .current = current, .wait = context ? wait_for_it : NULL, .context = context};
    CHECK_OK(uvas_order_open(&options, &order));
    return order;
}

static void close_order(struct uvas_order *order) {
    CHECK_OK(uvas_order_close(order));
    CHECK_OK(uvas_arena_check(arena));
    CHECK_OK(uvas_arena_close(arena));
    CHECK_OK(uvas_space_close(space));
}

static struct uvas_order_stats stats_of(struct uvas_order *order) {
    struct uvas_order_stats stats;
    CHECK_OK(uvas_order_stats(order, &stats));
    return stats;
}

static void streams_keep_their_own(void) {
    struct uvas_order *order = open_order(0, NULL);
    stream = 1;
    void *first = uvas_order_malloc(order, 1000, 0);
    CHECK(first && (uintptr_t)first % 512 == 0);
    CHECK(uvas_order_close(order) == -EBUSY);
    stream = 2;
    uvas_order_free(order, first, 0); /* to the stream of its allocation, whatever is current */
    void *second = uvas_order_malloc(order, 1000, 0);
    CHECK(second != first);
    stream = 1;
    void *large = uvas_order_malloc(order, 3 * MIB, 0);
    CHECK(large && large != first);
    CHECK(uvas_order_malloc(order, 1024, 0) == first);
    uvas_order_free(order, first, 0);
    uvas_order_free(order, first, 0); /* no block of it any more */
    uvas_order_free(order, (void *)16, 0);
    struct uvas_order_stats stats = stats_of(order);
    CHECK(stats.live_blocks == 2 && stats.kept_blocks == 1 && stats.kept_bytes == 1024 && stats.live_bytes == 1024 + 3 * MIB);
    uint64_t bytes = 0;
    CHECK_OK(uvas_order_trim(order, &bytes));
    CHECK(bytes == 1024 && stats_of(order).kept_blocks == 0);
    uvas_order_free(order, second, 0);
    CHECK(uvas_order_close(order) == -EBUSY);
    uvas_order_free(order, large, 0);
    close_order(order);
}

static void *allocate_and_free(void *order) {
    stream = 2;
    void *block = uvas_order_malloc(order, 1000, 0);
    CHECK(block);
    uvas_order_free(order, block, 0);
    return block;
}

/* The number of a stream does not always tell it: the default one of each device is 0, and each thread has a stream of its own that is called 2. */
static void streams_of_one_number(void) {
    struct uvas_order *order = open_order(0, NULL);
    stream = 0;
    void *first = uvas_order_malloc(order, 1000, 0);
    uvas_order_free(order, first, 0);
    void *second = uvas_order_malloc(order, 1000, 1);
    CHECK(first && second && second != first);
    uvas_order_free(order, second, 0); /* it is device 1's, whoever frees it */
    CHECK(uvas_order_malloc(order, 1000, 0) == first && uvas_order_malloc(order, 1000, 1) == second);
    uvas_order_free(order, first, 0);
    uvas_order_free(order, second, 1);
    void *mine = allocate_and_free(order), *others[2];
    for (int i = 0; i < 2; i++) { /* one after the other: the second may well live where the first did */
        pthread_t thread;
        CHECK_OK(pthread_create(&thread, NULL, allocate_and_free, order));
        CHECK_OK(pthread_join(thread, &others[i]));
    }
    CHECK(others[0] != mine && others[1] != mine && others[0] != others[1]);
    CHECK(allocate_and_free(order) == mine && stats_of(order).kept_blocks == 5);
    close_order(order);
}

static void no_memory(void) {
    struct uvas_order *order = NULL;
    order = open_order(8 * MIB, &order);
    stream = 1;
    void *first = uvas_order_malloc(order, 6 * MIB, 0);
    CHECK(first);
    uvas_order_free(order, first, 0);
    stream = 2;
    waited = 0;
    void *second = uvas_order_malloc(order, 6 * MIB, 0); /* what the other stream has kept goes back first */
    CHECK(second && waited == 1);
    CHECK(!uvas_order_malloc(order, 6 * MIB, 0) && uvas_last_failure()->code == -ENOMEM);
    CHECK(!uvas_order_malloc(order, SIZE_MAX, 0));
    CHECK(stats_of(order).live_blocks == 1);
    uvas_order_free(order, second, 0);
    close_order(order);
    struct uvas_order *untouched = NULL;
    CHECK(uvas_order_open(&(struct uvas_order_options){.arena = 1}, &untouched) == -EINVAL && !untouched);
}

static struct uvas_order *shared;

static void *churn(void *argument) {
    uint64_t seed = (uintptr_t)argument + 1, values[HELD] = {0};
    uint64_t *blocks[HELD] = {0};
    stream = (uintptr_t)argument % 2 ? (intptr_t)argument : 7;
    for (int i = 0; i < STEPS; i++) {
        size_t slot = next_random(&seed) % HELD;
        if (blocks[slot]) {
            CHECK(*blocks[slot] == values[slot]);
            uvas_order_free(shared, blocks[slot], 0);
            blocks[slot] = NULL;
        } else {
            blocks[slot] = uvas_order_malloc(shared, 8 + next_random(&seed) % 30000, 0);
            CHECK(blocks[slot]);
            *blocks[slot] = values[slot] = next_random(&seed);
        }
        if (i % 4096 == 0) {
            CHECK_OK(uvas_order_trim(shared, NULL));
        }
    }
    for (size_t slot = 0; slot < HELD; slot++) {
        CHECK(!blocks[slot] || *blocks[slot] == values[slot]);
        uvas_order_free(shared, blocks[slot], 0);
    }
    return NULL;
}

static void threads(void) {
    shared = open_order(0, NULL);
    pthread_t workers[THREADS];
    for (uintptr_t i = 0; i < THREADS; i++) {
        CHECK_OK(pthread_create(&workers[i], NULL, churn, (void *)i));
    }
    for (int i = 0; i < THREADS; i++) {
        CHECK_OK(pthread_join(workers[i], NULL));
    }
    CHECK(stats_of(shared).live_blocks == 0);
    close_order(shared);
}

int main(void) {
    streams_keep_their_own();
    streams_of_one_number();
    no_memory();
    threads();
    puts("test_order: good");
    return 0;
}
