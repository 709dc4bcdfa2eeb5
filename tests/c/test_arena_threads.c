/* test_arena_threads.c: what uvas.h promises of arenas to programs with threads, and to their forked children: any thread frees any block, what
 * threads keep is nobody's loss, a thread that ends leaves nothing behind, a child's copies are its own.
 *
 *   test_arena_threads [name of one test]
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "blocks.h"

#define THREADS 4
#define MANY 2000

static const size_t sizes[] = {16, 48, 129, 1000, 4096, 30000, 65536, 65537, 300000, 3 * MIB};
#define SIZES (sizeof sizes / sizeof *sizes)

static struct scene scene;
static pthread_barrier_t meet;
static _Atomic uintptr_t handed;

static void wait_for_the_others(void) { (void)pthread_barrier_wait(&meet); }

static void start(pthread_t *threads, size_t count, void *(*body)(void *)) {
    for (size_t i = 0; i < count; i++) {
        CHECK(pthread_create(&threads[i], NULL, body, (void *)i) == 0);
    }
}

static void join(pthread_t *threads, size_t count) {
    for (size_t i = 0; i < count; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
}

/* ---- freed by another thread ------------------------------------------------------------------------------------------------ */

static void *frees_what_it_is_handed(void *unused) {
    (void)unused;
    for (size_t i = 0; i < SIZES * 2; i++) {
        wait_for_the_others();
        uintptr_t at = atomic_load(&handed);
        struct uvas_allocation found;
        CHECK_OK(uvas_find_allocation(at + sizes[i / 2] - 1, &found));
        CHECK(found.base == at && usable(scene.arena, at) == found.size);
        verify_pattern(at, found.size, i);
        if (i % 2) {
            CHECK_OK(uvas_realloc(scene.arena, at, sizes[i / 2] + 1, &at));
        }
        CHECK_OK(uvas_free(scene.arena, at));
        CHECK(uvas_free(scene.arena, at) == -EINVAL);
        CHECK(uvas_find_allocation(at, &found) == -ENOENT);
        wait_for_the_others();
    }
    return NULL;
}

static void freed_by_another_thread(void) {
    pthread_t thread;
    scene = growing_scene(NULL);
    (void)pthread_barrier_init(&meet, NULL, 2);
    start(&thread, 1, frees_what_it_is_handed);
    for (size_t i = 0; i < SIZES * 2; i++) {
        uintptr_t at = must_alloc(scene.arena, sizes[i / 2], 0);
        struct uvas_allocation found;
        size_t size = 0;
        write_pattern(at, usable(scene.arena, at), i);
        atomic_store(&handed, at);
        wait_for_the_others();
        wait_for_the_others();
        CHECK(uvas_free(scene.arena, at) == -EINVAL); /* before its owner has taken it back */
        CHECK(uvas_allocation_size(scene.arena, at, &size) == -EINVAL && uvas_find_allocation(at, &found) == -ENOENT);
        CHECK(stats_of(scene.arena).live_blocks == 0 && stats_of(scene.arena).live_bytes == 0);
        in_order(&scene);
    }
    join(&thread, 1);
    end_scene(&scene);
}

static uintptr_t batch[MANY];

static void *frees_batches(void *unused) {
    (void)unused;
    for (int round = 0; round < 40; round++) {
        wait_for_the_others();
        for (size_t i = 0; i < MANY; i++) {
            CHECK_OK(uvas_free(scene.arena, batch[i * 7 % MANY]));
        }
        wait_for_the_others();
    }
    return NULL;
}

/* What others free comes back to the thread that allocates: the producer's memory does not grow. */
static void the_owner_gets_its_memory_back(void) {
    pthread_t thread;
    scene = growing_scene(&(struct uvas_arena_options){.idle_ns = UINT64_MAX});
    (void)pthread_barrier_init(&meet, NULL, 2);
    start(&thread, 1, frees_batches);
    uint64_t first_peak = 0;
    for (int round = 0; round < 40; round++) {
        for (size_t i = 0; i < MANY; i++) {
            batch[i] = must_alloc(scene.arena, i % 50 ? 1 + i % 2000 : 70000, 0);
            write_pattern(batch[i], 1 + i % 2000, i);
        }
        first_peak = round == 1 ? stats_of(scene.arena).peak_bytes : first_peak;
        wait_for_the_others();
        wait_for_the_others();
    }
    CHECK(stats_of(scene.arena).live_blocks == 0);
    CHECK(stats_of(scene.arena).peak_bytes <= first_peak * 3 / 2);
    in_order(&scene);
    join(&thread, 1);
    end_scene(&scene);
}

#define RING 16u
#define BLOCKS_IN_RING 100000u
#define SPIN 100u

static _Atomic uintptr_t ring[RING];

static void *frees_from_the_ring(void *unused) {
    (void)unused;
    for (size_t i = 0; i < BLOCKS_IN_RING; i++) {
        uintptr_t at;
        for (unsigned turns = 0; !(at = atomic_load_explicit(&ring[i % RING], memory_order_acquire)); turns++) {
            (void)(turns > SPIN && sched_yield());
        }
        atomic_store_explicit(&ring[i % RING], 0, memory_order_release);
        CHECK_OK(uvas_free(scene.arena, at));
    }
    return NULL;
}

/* The owner takes in what others free while they free it: nobody is told that a free was none, and none is lost. */
static void frees_meet_their_collector(void) {
    static const size_t of[] = {64 * KIB, 20000, 1000};
    for (size_t k = 0; k < 3; k++) {
        pthread_t thread;
        scene = growing_scene(NULL);
        start(&thread, 1, frees_from_the_ring);
        for (size_t i = 0; i < BLOCKS_IN_RING; i++) {
            uintptr_t at = must_alloc(scene.arena, of[k], 0);
            for (unsigned turns = 0; atomic_load_explicit(&ring[i % RING], memory_order_acquire); turns++) {
                (void)(turns > SPIN && sched_yield());
            }
            atomic_store_explicit(&ring[i % RING], at, memory_order_release);
        }
        join(&thread, 1);
        in_order(&scene);
        CHECK(stats_of(scene.arena).live_blocks == 0);
        end_scene(&scene);
    }
}

/* ---- double frees that race ------------------------------------------------------------------------------------------------- */

static _Atomic int answers[2];
static _Atomic uintptr_t given[2];
static atomic_bool over;

/* Has the calling thread take in what others free, without its handing out any of it: an alignment is for the slower ways, which look. */
static void takes_in(void) {
    CHECK_OK(uvas_free(scene.arena, must_alloc(scene.arena, 1000, 64)));
}

static void *frees_what_is_given(void *argument) {
    size_t me = (size_t)argument;
    while (!atomic_load(&over)) {
        uintptr_t at = atomic_load(&given[me]);
        if (at) {
            atomic_store(&answers[me], uvas_free(scene.arena, at));
            CHECK(uvas_free(scene.arena, at) == -EINVAL); /* it has been freed by then, by this thread or the other one */
            atomic_store(&given[me], 0);
        } else {
            (void)sched_yield();
        }
    }
    return NULL;
}

/* Freed twice, one after the other or at once, while the owner takes it in: a second free is seen as one, and none frees the block's next life. */
static void the_owner_takes_in_what_is_freed_twice(void) {
    pthread_t threads[2];
    scene = growing_scene(NULL);
    atomic_store(&over, false);
    start(threads, 2, frees_what_is_given);
    uintptr_t keeps = must_alloc(scene.arena, 64, 0);
    for (size_t round = 0; round < 20000; round++) {
        uintptr_t at = must_alloc(scene.arena, 64, 0), other = must_alloc(scene.arena, 64, 0);
        atomic_store(&answers[0], 0);
        atomic_store(&answers[1], 0);
        atomic_store(&given[0], at);
        atomic_store(&given[1], round % 2 ? at : other);
        while (atomic_load(&given[0]) || atomic_load(&given[1])) {
            takes_in();
        }
        CHECK(atomic_load(&answers[0]) == 0 || (round % 2 && atomic_load(&answers[1]) == 0));
        CHECK(round % 2 || atomic_load(&answers[1]) == 0);
        if (round % 2) {
            CHECK_OK(uvas_free(scene.arena, other));
        }
        uintptr_t one = must_alloc(scene.arena, 64, 0), two = must_alloc(scene.arena, 64, 0);
        takes_in();
        uintptr_t three = must_alloc(scene.arena, 64, 0);
        CHECK(one != two && one != three && two != three && one != keeps && two != keeps && three != keeps);
        CHECK_OK(uvas_free(scene.arena, one));
        CHECK_OK(uvas_free(scene.arena, two));
        CHECK_OK(uvas_free(scene.arena, three));
    }
    atomic_store(&over, true);
    join(threads, 2);
    CHECK_OK(uvas_free(scene.arena, keeps));
    in_order(&scene);
    end_scene(&scene);
}

static void *frees_at_the_same_time(void *argument) {
    for (int round = 0; round < 3000; round++) {
        wait_for_the_others();
        atomic_store(&answers[(size_t)argument], uvas_free(scene.arena, atomic_load(&handed)));
        wait_for_the_others();
    }
    return NULL;
}

/* One of the two is told so; the block is free once, and given out once afterwards. */
static void two_free_the_same_block(void) {
    pthread_t threads[2];
    scene = growing_scene(NULL);
    (void)pthread_barrier_init(&meet, NULL, 3);
    start(threads, 2, frees_at_the_same_time);
    for (int round = 0; round < 3000; round++) {
        size_t size = sizes[(size_t)round % SIZES];
        uintptr_t keeps = must_alloc(scene.arena, size, 0);
        atomic_store(&handed, must_alloc(scene.arena, size, 0));
        wait_for_the_others();
        wait_for_the_others();
        int a = atomic_load(&answers[0]), b = atomic_load(&answers[1]);
        CHECK((a == 0 && b == -EINVAL) || (a == -EINVAL && b == 0));
        uintptr_t one = must_alloc(scene.arena, size, 0), two = must_alloc(scene.arena, size, 0);
        CHECK(one != two && one != keeps && two != keeps);
        CHECK_OK(uvas_free(scene.arena, one));
        CHECK_OK(uvas_free(scene.arena, two));
        CHECK_OK(uvas_free(scene.arena, keeps));
        if (round % 100 == 0) {
            in_order(&scene);
            CHECK(stats_of(scene.arena).live_blocks == 0);
        }
    }
    join(threads, 2);
    in_order(&scene);
    CHECK_OK(uvas_arena_trim(scene.arena, NULL));
    CHECK(stats_of(scene.arena).live_blocks == 0);
    end_scene(&scene);
}

/* One of the two is the thread that allocated it: both may be told 0. The block is free once, and given out once afterwards. */
static void the_owner_and_another_free_the_same_block(void) {
    pthread_t thread;
    scene = growing_scene(NULL);
    (void)pthread_barrier_init(&meet, NULL, 2);
    start(&thread, 1, frees_at_the_same_time);
    for (int round = 0; round < 3000; round++) {
        size_t size = sizes[(size_t)round % SIZES];
        uintptr_t keeps = must_alloc(scene.arena, size, 0), block = must_alloc(scene.arena, size, 0);
        atomic_store(&handed, block);
        wait_for_the_others();
        int mine = uvas_free(scene.arena, block);
        wait_for_the_others();
        int other = atomic_load(&answers[0]);
        CHECK((mine == 0 || mine == -EINVAL) && (other == 0 || other == -EINVAL) && (mine == 0 || other == 0));
        uintptr_t one = must_alloc(scene.arena, size, 0), two = must_alloc(scene.arena, size, 0);
        CHECK(one != two && one != keeps && two != keeps);
        CHECK_OK(uvas_free(scene.arena, one));
        CHECK_OK(uvas_free(scene.arena, two));
        CHECK_OK(uvas_free(scene.arena, keeps));
        if (round % 100 == 0) {
            in_order(&scene);
            CHECK(stats_of(scene.arena).live_blocks == 0);
        }
    }
    join(&thread, 1);
    in_order(&scene);
    end_scene(&scene);
}

/* ---- what threads keep ------------------------------------------------------------------------------------------------------ */

static void *keeps_something(void *argument) {
    uintptr_t held[64];
    for (int round = 0; round < 3; round++) {
        for (size_t i = 0; i < 64; i++) {
            held[i] = must_alloc(scene.arena, i % 4 == 0 ? 70000 + 4096 * ((size_t)argument + i % 8) : sizes[i % 7], 0);
            write_pattern(held[i], 16, i);
        }
        for (size_t i = 0; i < 64; i++) {
            CHECK_OK(uvas_free(scene.arena, held[i]));
        }
        wait_for_the_others(); /* main looks, and takes all of it */
        wait_for_the_others();
    }
    return NULL;
}

static void takes_all(size_t size, uint64_t round) {
    struct uvas_arena_stats now = stats_of(scene.arena);
    CHECK(now.live_blocks == 0 && now.cached_bytes == now.used_bytes && now.threads <= THREADS + 1);
    CHECK_OK(uvas_arena_check(scene.arena));
    uintptr_t whole = must_alloc(scene.arena, size, 0);
    write_pattern(whole, size, round);
    CHECK(stats_of(scene.arena).cached_bytes == 0);
    in_order(&scene);
    CHECK_OK(uvas_free(scene.arena, whole));
}

static void what_threads_keep(const struct uvas_arena_options *options, size_t size) {
    pthread_t threads[THREADS];
    scene = fixed_scene(32 * MIB, options);
    (void)pthread_barrier_init(&meet, NULL, THREADS + 1);
    start(threads, THREADS, keeps_something);
    for (uint64_t round = 0; round < 3; round++) {
        wait_for_the_others();
        if (round == 2) { /* or trim takes it */
            CHECK_OK(uvas_arena_trim(scene.arena, NULL));
            CHECK(stats_of(scene.arena).cached_bytes == 0 && stats_of(scene.arena).used_bytes == 0);
            CHECK(stats_of(scene.arena).committed_bytes == 0);
        }
        takes_all(size, round);
        wait_for_the_others();
    }
    join(threads, THREADS);
    end_scene(&scene);
}

static void what_threads_keep_is_no_obstacle(void) { what_threads_keep(NULL, 32 * MIB); }

static void what_threads_keep_is_charged_back(void) {
    what_threads_keep(&(struct uvas_arena_options){.limit = 24 * MIB}, 24 * MIB);
}

/* However much a thread frees, it keeps little. */
static void *frees_much(void *unused) {
    (void)unused;
    static uintptr_t held[4000];
    for (size_t i = 0; i < 4000; i++) {
        held[i] = must_alloc(scene.arena, i % 2 ? 100000 : 4096, 0);
    }
    for (size_t i = 0; i < 4000; i++) {
        CHECK_OK(uvas_free(scene.arena, held[i]));
    }
    wait_for_the_others();
    wait_for_the_others();
    return NULL;
}

static void what_threads_keep_is_bounded(void) {
    pthread_t thread;
    scene = growing_scene(&(struct uvas_arena_options){.idle_ns = UINT64_MAX});
    (void)pthread_barrier_init(&meet, NULL, 2);
    start(&thread, 1, frees_much);
    wait_for_the_others();
    struct uvas_arena_stats now = stats_of(scene.arena);
    CHECK(now.live_blocks == 0 && now.peak_bytes >= 200 * MIB && now.cached_bytes <= now.peak_bytes / 8);
    wait_for_the_others();
    join(&thread, 1);
    end_scene(&scene);
}

/* A thread knows the blocks that it freed first, one in each of many slabs; then those slabs have nothing else in them. */
static void what_was_freed_first_keeps_no_slab(void) {
    enum { SIZE = 1024, IN_A_SLAB = 64, SLABS = 16 };
    static uintptr_t blocks[SLABS * IN_A_SLAB];
    scene = growing_scene(&(struct uvas_arena_options){.idle_ns = UINT64_MAX});
    for (size_t i = 0; i < SLABS * IN_A_SLAB; i++) {
        blocks[i] = must_alloc(scene.arena, SIZE, 0);
    }
    for (size_t slab = 0; slab < SLABS - 1; slab++) {
        CHECK_OK(uvas_free(scene.arena, blocks[slab * IN_A_SLAB]));
    }
    CHECK_OK(uvas_arena_check(scene.arena));
    for (size_t i = 0; i < SLABS * IN_A_SLAB; i++) {
        if (i % IN_A_SLAB || i / IN_A_SLAB == SLABS - 1) {
            CHECK_OK(uvas_free(scene.arena, blocks[i]));
        }
    }
    struct uvas_arena_stats now = stats_of(scene.arena);
    CHECK(now.live_blocks == 0 && now.used_bytes <= 2 * SIZE * IN_A_SLAB);
    CHECK_OK(uvas_arena_check(scene.arena));
    end_scene(&scene);
}

/* ---- threads that end ------------------------------------------------------------------------------------------------------- */

static void *leaves_blocks(void *argument) {
    for (size_t i = 0; i < 100; i++) {
        size_t n = (size_t)argument * 100 + i;
        batch[n] = must_alloc(scene.arena, i % 10 ? 1 + i * 40 : 70000, 0);
        write_pattern(batch[n], usable(scene.arena, batch[n]), n);
        CHECK_OK(uvas_free(scene.arena, must_alloc(scene.arena, 200 + i * 1000, 0)));
    }
    return NULL;
}

static void a_thread_that_ends(void) {
    struct uvas_platform platform;
    CHECK_OK(uvas_platform(&platform));
    pthread_t threads[THREADS];
    scene = growing_scene(&(struct uvas_arena_options){.idle_ns = UINT64_MAX});
    for (int round = 0; round < 100; round++) {
        start(threads, THREADS, leaves_blocks);
        join(threads, THREADS);
        struct uvas_arena_stats now = stats_of(scene.arena);
        CHECK(now.live_blocks == THREADS * 100 && now.threads <= 1); /* main, which frees */
        for (size_t n = 0; n < THREADS * 100; n++) {
            verify_pattern(batch[n], usable(scene.arena, batch[n]), n);
            CHECK_OK(uvas_free(scene.arena, batch[n]));
            CHECK(uvas_free(scene.arena, batch[n]) == -EINVAL);
        }
        now = stats_of(scene.arena);
        CHECK(now.live_blocks == 0);
        CHECK(now.peak_bytes <= 64 * MIB); /* rounds that lose something pass that soon */
        CHECK(!platform.has_procmap_query || now.metadata_bytes <= 2 * MIB); /* what is in RAM emulated kernels do not know */
        if (round % 10 == 0) {
            in_order(&scene);
        }
    }
    CHECK_OK(uvas_arena_trim(scene.arena, NULL));
    struct uvas_arena_stats now = stats_of(scene.arena);
    CHECK(now.used_bytes == 0 && now.committed_bytes == 0 && now.cached_bytes == 0);
    end_scene(&scene);
}

static void *leaves_nothing(void *unused) {
    (void)unused;
    uintptr_t held[100];
    for (size_t i = 0; i < 100; i++) {
        held[i] = must_alloc(scene.arena, i % 10 ? 1 + i * 40 : 70000, 0);
    }
    for (size_t i = 0; i < 100; i++) {
        CHECK_OK(uvas_free(scene.arena, held[i]));
    }
    return NULL;
}

static void a_thread_that_ends_keeps_nothing(void) {
    pthread_t threads[THREADS];
    scene = fixed_scene(64 * MIB, &(struct uvas_arena_options){.idle_ns = UINT64_MAX});
    for (int round = 0; round < 20; round++) {
        start(threads, THREADS, leaves_nothing);
        join(threads, THREADS);
        struct uvas_arena_stats now = stats_of(scene.arena);
        CHECK(now.live_blocks == 0 && now.cached_bytes == 0 && now.used_bytes == 0 && now.threads == 0);
    }
    end_scene(&scene);
}

/* Threads outlive arenas and arenas threads, in any order; neither remembers the other. */
static void *uses_each_arena(void *unused) {
    (void)unused;
    for (int round = 0; round < 300; round++) {
        wait_for_the_others();
        (void)leaves_nothing(NULL);
        wait_for_the_others();
    }
    return NULL;
}

static void arenas_that_end_before_threads(void) {
    pthread_t threads[THREADS];
    (void)pthread_barrier_init(&meet, NULL, THREADS + 1);
    start(threads, THREADS, uses_each_arena);
    for (int round = 0; round < 300; round++) {
        scene = growing_scene(&(struct uvas_arena_options){.growth = 64 * MIB});
        wait_for_the_others();
        if (round % 2) {
            (void)leaves_nothing(NULL);
        }
        wait_for_the_others();
        CHECK(stats_of(scene.arena).live_blocks == 0);
        end_scene(&scene);
    }
    join(threads, THREADS);
    scene = growing_scene(NULL); /* what those threads had kept was gone before them */
    CHECK(stats_of(scene.arena).threads == 0);
    end_scene(&scene);
}

/* ---- fork ------------------------------------------------------------------------------------------------------------------- */

static uintptr_t parents[SIZES];

static void works_on_its_own(void) {
    struct scene own = growing_scene(NULL);
    uintptr_t held[200];
    for (size_t i = 0; i < 200; i++) {
        held[i] = must_alloc(own.arena, 1 + i * i * 7, 0);
        write_pattern(held[i], usable(own.arena, held[i]), i);
    }
    for (size_t i = 0; i < 200; i++) {
        verify_pattern(held[i], usable(own.arena, held[i]), i);
        CHECK_OK(uvas_free(own.arena, held[i]));
    }
    CHECK(uvas_free(own.arena, held[0]) == -EINVAL);
    CHECK_OK(uvas_arena_trim(own.arena, NULL));
    in_order(&own);
    end_scene(&own);
}

static void inherits(void *unused) {
    (void)unused;
    struct uvas_arena_stats stats;
    for (size_t i = 0; i < SIZES; i++) {
        CHECK(usable(scene.arena, parents[i]) >= sizes[i]);
        verify_pattern(parents[i], usable(scene.arena, parents[i]), i);
        CHECK_OK(uvas_free(scene.arena, parents[i])); /* left alone, */
        CHECK_OK(uvas_free(scene.arena, parents[i])); /* as often as it is asked for */
        CHECK(usable(scene.arena, parents[i]) >= sizes[i]);
        verify_pattern(parents[i], usable(scene.arena, parents[i]), i);
        write_pattern(parents[i], usable(scene.arena, parents[i]), 1000 + i); /* seen by this child only */
    }
    refuses_to_alloc(scene.arena, 64, 0, -ESTALE);
    CHECK(uvas_arena_stats(scene.arena, &stats) == -ESTALE && uvas_arena_trim(scene.arena, NULL) == -ESTALE);
    CHECK(uvas_arena_close(scene.arena) == -ESTALE && uvas_arena_check(scene.arena) == -ESTALE);
    works_on_its_own();
    for (size_t i = 0; i < SIZES; i++) { /* what it has allocated since lies elsewhere */
        verify_pattern(parents[i], usable(scene.arena, parents[i]), 1000 + i);
    }
}

static void a_child_leaves_its_parents_blocks_alone(void) {
    for (int fixed = 0; fixed < 2; fixed++) {
        scene = fixed ? fixed_scene(64 * MIB, NULL) : growing_scene(NULL);
        for (size_t i = 0; i < SIZES; i++) {
            parents[i] = must_alloc(scene.arena, sizes[i], 0);
            write_pattern(parents[i], usable(scene.arena, parents[i]), i);
        }
        CHECK(ended_well(in_child(inherits, NULL)));
        in_order(&scene);
        CHECK(stats_of(scene.arena).live_blocks == SIZES);
        for (size_t i = 0; i < SIZES; i++) {
            verify_pattern(parents[i], usable(scene.arena, parents[i]), i);
            CHECK_OK(uvas_free(scene.arena, parents[i]));
        }
        end_scene(&scene);
    }
}

static void *works_meanwhile(void *argument) {
    uint64_t random = (uint64_t)(uintptr_t)argument + 1;
    uintptr_t held[32] = {0};
    while (!atomic_load(&over)) {
        size_t i = next_random(&random) % 32;
        if (held[i]) {
            CHECK_OK(uvas_free(scene.arena, held[i]));
            held[i] = 0;
        } else {
            held[i] = must_alloc(scene.arena, 1 + next_random(&random) % (next_random(&random) % 8 ? 3000 : 300000), 0);
        }
        if (next_random(&random) % 1000 == 0) {
            CHECK_OK(uvas_arena_trim(scene.arena, NULL));
        }
    }
    for (size_t i = 0; i < 32; i++) {
        CHECK(held[i] == 0 || uvas_free(scene.arena, held[i]) == 0);
    }
    return NULL;
}

static void starts_anew(void *unused) {
    (void)unused;
    CHECK_OK(uvas_check());
    for (size_t i = 0; i < SIZES; i++) {
        CHECK(usable(scene.arena, parents[i]) >= sizes[i]);
        verify_pattern(parents[i], usable(scene.arena, parents[i]), i);
        CHECK_OK(uvas_free(scene.arena, parents[i]));
    }
    works_on_its_own();
}

/* At any moment of their work: no lock stays taken in the child, and nothing is half done there. */
static void fork_while_threads_work(void) {
    pthread_t threads[THREADS];
    scene = growing_scene(&(struct uvas_arena_options){.idle_ns = 1000000});
    for (size_t i = 0; i < SIZES; i++) {
        parents[i] = must_alloc(scene.arena, sizes[i], 0);
        write_pattern(parents[i], usable(scene.arena, parents[i]), i);
    }
    atomic_store(&over, false);
    start(threads, THREADS, works_meanwhile);
    for (int round = 0; round < 30; round++) {
        CHECK(ended_well(in_child(starts_anew, NULL)));
    }
    atomic_store(&over, true);
    join(threads, THREADS);
    in_order(&scene);
    for (size_t i = 0; i < SIZES; i++) {
        verify_pattern(parents[i], usable(scene.arena, parents[i]), i);
        CHECK_OK(uvas_free(scene.arena, parents[i]));
    }
    end_scene(&scene);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        TEST(freed_by_another_thread),
        TEST(the_owner_gets_its_memory_back),
        TEST(frees_meet_their_collector),
        TEST(the_owner_takes_in_what_is_freed_twice),
        TEST(two_free_the_same_block),
        TEST(the_owner_and_another_free_the_same_block),
        TEST(what_threads_keep_is_no_obstacle),
        TEST(what_threads_keep_is_charged_back),
        TEST(what_threads_keep_is_bounded),
        TEST(what_was_freed_first_keeps_no_slab),
        TEST(a_thread_that_ends),
        TEST(a_thread_that_ends_keeps_nothing),
        TEST(arenas_that_end_before_threads),
        TEST(a_child_leaves_its_parents_blocks_alone),
        TEST(fork_while_threads_work),
    };
    return run_tests(tests, sizeof tests / sizeof *tests, argc, argv);
}
