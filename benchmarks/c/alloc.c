/* alloc.c: one allocator at one workload (targets A1 to A6, A9). Compiled once for each adapter, which it includes; what an adapter is stands in
 * ../allocators/malloc_like.h.
 *
 *   alloc about                       who this is, as JSON
 *   alloc LIBRARY KEY=VALUE...        one workload, by the keys of struct workload; one JSON object of what was measured
 *
 * Each run checks first, in a process of its own, that blocks are what they should be. Sizes are spread evenly over the octaves from `low` to `high`. Nothing here calls malloc
 * once the allocator is loaded: the peer may be the process's own. */
#define _GNU_SOURCE
#include "bench.h"

#include ADAPTER

#include "alloc_parts.h"

/* ---- timed: the loops ------------------------------------------------------------------------------------------------------------------- */

static inline void *alloc_and_touch(size_t size) {
    void *block = adapter_alloc(size);
    BENCH_NEED(block);
    touch_block(block, size);
    return block;
}

/* One operation: a block for a block. With one block alive it is alloc, then free, of the same block; else the one in a random place makes room. */
static inline void replace_one(struct worker *me) {
    uint64_t random = me->live == 1 ? me->random++ : bench_random(&me->random);
    size_t size = sizes[random % SIZES];
    if (me->live == 1) {
        adapter_free(alloc_and_touch(size));
        return;
    }
    void **slot = &me->slots[(random >> 32) * me->live >> 32];
    adapter_free(*slot);
    *slot = alloc_and_touch(size);
}

static void replace_many(struct worker *me, size_t operations) {
    uint64_t began = bench_ns();
    for (size_t i = 0; i < operations; i++) {
        replace_one(me);
    }
    me->ns = (double)(bench_ns() - began) / (double)operations;
}

static void replace_latency(struct worker *me, size_t operations, struct latency *into) {
    for (size_t i = 0; i < operations; i++) {
        uint64_t began = latency_now();
        replace_one(me);
        latency_add(into, began, latency_now());
    }
}

static void fill(struct worker *me) {
    for (size_t i = 0; i < me->live && me->live > 1; i++) {
        me->slots[i] = alloc_and_touch(sizes[bench_random(&me->random) % SIZES]);
    }
}

static void empty(struct worker *me) {
    for (size_t i = 0; i < me->live && me->live > 1; i++) {
        adapter_free(me->slots[i]);
    }
}

/* ---- replace: A1, A2, A3 ------------------------------------------------------------------------------------------------------------------ */

static void run_replace(void) {
    struct worker *me = worker_open(0);
    static double chunk[CHUNKS];
    static struct latency latency;
    fill(me);
    replace_many(me, work.operations / 10 + work.live); /* warm */
    for (size_t i = 0; i < CHUNKS; i++) {
        replace_many(me, work.operations / CHUNKS + 1);
        chunk[i] = me->ns;
    }
    latency_open(&latency);
    replace_latency(me, work.operations / 4 + 1, &latency);
    empty(me);
    say("ns", median(chunk, CHUNKS));
    say("p50_ns", latency_quantile(&latency, 0.5));
    say("p99_9_ns", latency_quantile(&latency, 0.999));
}

/* ---- scale: A5, the same by one thread and by two, in turn -------------------------------------------------------------------------------- */

static pthread_barrier_t gate;
static atomic_bool stop;

static void scale_once(struct worker *me) {
    double began = thread_ns();
    replace_many(me, work.operations / CHUNKS + 1);
    me->cpu_ns = (thread_ns() - began) / (double)(work.operations / CHUNKS + 1);
}

static void *scale_second(void *argument) {
    struct worker *me = argument;
    pin(me->index);
    fill(me);
    replace_many(me, work.operations / 10 + work.live);
    for (;;) {
        (void)pthread_barrier_wait(&gate);
        if (atomic_load(&stop)) {
            break;
        }
        scale_once(me);
        (void)pthread_barrier_wait(&gate);
    }
    empty(me);
    return NULL;
}

static void run_scale(void) {
    struct worker *first = worker_open(0), *second = worker_open(1);
    static double alone[CHUNKS], both[CHUNKS], cpu_alone[CHUNKS], cpu_both[CHUNKS];
    pthread_t thread;
    BENCH_NEED(pthread_barrier_init(&gate, NULL, 2) == 0 && pthread_create(&thread, NULL, scale_second, second) == 0);
    fill(first);
    replace_many(first, work.operations / 10 + work.live);
    for (size_t i = 0; i < CHUNKS; i++) {
        scale_once(first);
        alone[i] = first->ns;
        cpu_alone[i] = first->cpu_ns;
        (void)pthread_barrier_wait(&gate);
        scale_once(first);
        (void)pthread_barrier_wait(&gate);
        both[i] = (first->ns + second->ns) / 2;
        cpu_both[i] = (first->cpu_ns + second->cpu_ns) / 2;
    }
    atomic_store(&stop, true);
    (void)pthread_barrier_wait(&gate);
    (void)pthread_join(thread, NULL);
    empty(first);
    say("ns", median(both, CHUNKS));
    say("alone_ns", median(alone, CHUNKS));
    say("speedup", 2 * median(alone, CHUNKS) / median(both, CHUNKS));
    say("cpu_speedup", 2 * median(cpu_alone, CHUNKS) / median(cpu_both, CHUNKS)); /* as if nobody else had wanted the CPUs */
}

/* ---- pass: A4, one thread allocates and writes, the other reads and frees ------------------------------------------------------------------ */

struct passed {
    struct ring ring;
    size_t count;   /* a multiple of CHUNKS */
    bool allocates; /* else the same few blocks go round, which is what the ring alone costs */
    struct latency *latency_alloc, *latency_free; /* or NULL */
    uint64_t sum;
    double chunk[CHUNKS]; /* ns for a block, as they arrive */
};

static void *pass_consume(void *argument) {
    struct passed *passed = argument;
    size_t part = passed->count / CHUNKS;
    uint64_t sum = 0, began = bench_ns();
    pin(1);
    for (size_t i = 0; i < passed->count; i++) {
        void *block = ring_take(&passed->ring, i);
        sum += *(uint64_t *)block;
        if (passed->latency_free) {
            uint64_t freeing = latency_now();
            adapter_free(block);
            latency_add(passed->latency_free, freeing, latency_now());
        } else if (passed->allocates) {
            adapter_free(block);
        }
        if ((i + 1) % part == 0) {
            uint64_t now = bench_ns();
            passed->chunk[i / part] = (double)(now - began) / (double)part;
            began = now;
        }
    }
    passed->sum = sum;
    return NULL;
}

static void pass_produce(struct passed *passed) {
    static uint64_t same[2 * RING][8]; /* not taken again while it waits in the ring */
    for (size_t i = 0; i < passed->count; i++) {
        uint64_t began = passed->latency_alloc ? latency_now() : 0;
        uint64_t *block = passed->allocates ? adapter_alloc(sizes[i % SIZES]) : same[i % (2 * RING)];
        BENCH_NEED(block);
        if (passed->latency_alloc) {
            latency_add(passed->latency_alloc, began, latency_now());
        }
        *block = i;
        ring_put(&passed->ring, i, block);
    }
}

static double pass(struct passed *passed, size_t operations) {
    pthread_t thread;
    memset(&passed->ring, 0, sizeof passed->ring);
    passed->count = (operations / CHUNKS + 1) * CHUNKS;
    BENCH_NEED(pthread_create(&thread, NULL, pass_consume, passed) == 0);
    pass_produce(passed);
    BENCH_NEED(pthread_join(thread, NULL) == 0);
    BENCH_NEED(passed->sum == passed->count / 2 * (passed->count - 1)); /* every block arrived with what it was sent with */
    return median(passed->chunk, CHUNKS);
}

static void run_pass(void) {
    static struct latency allocs, frees;
    static struct passed passed;
    double ring = pass(&passed, work.operations / 4);
    passed.allocates = true;
    (void)pass(&passed, work.operations / 10);
    double ns = pass(&passed, work.operations);
    latency_open(&allocs);
    latency_open(&frees);
    passed.latency_alloc = &allocs;
    passed.latency_free = &frees;
    (void)pass(&passed, work.operations / 4);
    say("ns", ns);
    say("ring_ns", ring);
    say("alloc_p50_ns", latency_quantile(&allocs, 0.5));
    say("alloc_p99_9_ns", latency_quantile(&allocs, 0.999));
    say("free_p50_ns", latency_quantile(&frees, 0.5));
    say("free_p99_9_ns", latency_quantile(&frees, 0.999));
}

/* ---- memory: A6 ----------------------------------------------------------------------------------------------------------------------------- */

static void run_memory(void) {
    struct worker *me = worker_open(0);
    uint32_t *lengths = pages_for(me->live * sizeof *lengths);
    uint64_t live = 0, most = 0, base = resident();
    reset_peak();
    for (size_t i = 0; i < me->live + work.operations; i++) {
        uint64_t random = bench_random(&me->random);
        size_t slot = i < me->live ? i : (random >> 32) * me->live >> 32;
        if (me->slots[slot]) {
            adapter_free(me->slots[slot]);
            live -= lengths[slot];
        }
        lengths[slot] = (uint32_t)sizes[random % SIZES];
        me->slots[slot] = alloc_and_touch(lengths[slot]);
        live += lengths[slot];
        most = live > most ? live : most;
    }
    say("peak_over_live", (double)(peak_resident() - base) / (double)most);
    for (size_t i = 0; i < me->live; i++) {
        if (bench_random(&me->random) % 10) {
            adapter_free(me->slots[i]);
            live -= lengths[i];
            me->slots[i] = NULL;
        }
    }
    say("untrimmed_over_live", (double)(resident() - base) / (double)live);
#ifdef ADAPTER_TRIM
    adapter_trim();
#endif
    say("trimmed_over_live", (double)(resident() - base) / (double)live);
    for (size_t i = 0; i < me->live; i++) {
        if (me->slots[i]) {
            adapter_free(me->slots[i]);
        }
    }
}

/* ---- grow: from nothing to `bytes`, and back --------------------------------------------------------------------------------------------- */

static void run_grow(void) {
    size_t count = work.bytes / sizes[0];
    void **blocks = pages_for(count * sizeof *blocks);
    uint64_t base = resident(), began = bench_ns();
    for (size_t i = 0; i < count; i++) {
        blocks[i] = alloc_and_touch(sizes[0]);
    }
    uint64_t grown = bench_ns(), held = resident() - base, freeing = bench_ns();
    for (size_t i = 0; i < count; i++) {
        adapter_free(blocks[i]);
    }
    uint64_t freed = bench_ns();
    say("ns", (double)(grown - began + freed - freeing) / (double)count);
    say("alloc_ns", (double)(grown - began) / (double)count);
    say("free_ns", (double)(freed - freeing) / (double)count);
    say("overhead_percent", 100.0 * ((double)held - (work.touch == TOUCH_NONE ? 0.0 : (double)work.bytes)) / (double)work.bytes);
}

/* ---- churn: A9, half of the places full, and how much memory that takes as time goes by --------------------------------------------------- */

static void churn_many(struct worker *me, uint32_t *lengths, size_t operations, uint64_t *live) {
    for (size_t i = 0; i < operations; i++) {
        uint64_t random = bench_random(&me->random);
        size_t slot = (random >> 32) * me->live >> 32;
        if (me->slots[slot]) {
            adapter_free(me->slots[slot]);
            me->slots[slot] = NULL;
            *live -= lengths[slot];
        } else {
            lengths[slot] = (uint32_t)sizes[random % SIZES];
            me->slots[slot] = alloc_and_touch(lengths[slot]);
            *live += lengths[slot];
        }
    }
}

static void run_churn(void) {
    struct worker *me = worker_open(0);
    uint32_t *lengths = pages_for(me->live * sizeof *lengths);
    static double over_live[CHURN_SAMPLES], chunk[CHURN_SAMPLES];
    uint64_t live = 0, base = resident();
    for (size_t i = 0; i < CHURN_SAMPLES; i++) {
        uint64_t began = bench_ns();
        churn_many(me, lengths, work.operations / CHURN_SAMPLES, &live);
        chunk[i] = (double)(bench_ns() - began) / (double)(work.operations / CHURN_SAMPLES);
        over_live[i] = (double)(resident() - base) / (double)live;
        say_at("resident_over_live", i, over_live[i]);
#ifdef ADAPTER_HOLES
        uint64_t holes, largest;
        adapter_holes(&holes, &largest);
        say_at("hole_bytes", i, (double)holes);
        say_at("largest_hole", i, (double)largest);
#endif
    }
    say("ns", median(chunk, CHURN_SAMPLES));
    say("growth", mean(over_live + CHURN_SAMPLES - CHURN_SAMPLES / 10, CHURN_SAMPLES / 10) /
                      mean(over_live + CHURN_SAMPLES / 10, CHURN_SAMPLES / 10)); /* the last tenth over the second */
}

/* ---- the program ----------------------------------------------------------------------------------------------------------------------------- */

static const struct {
    const char *kind;
    void (*run)(void);
} kinds[] = {
    {"replace", run_replace}, {"scale", run_scale}, {"pass", run_pass}, {"memory", run_memory}, {"grow", run_grow}, {"churn", run_churn},
};

int main(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "about") == 0) {
        say_about();
        return 0;
    }
    BENCH_NEED(argc > 1);
    read_workload(argv + 2);
    pin(0);
    check_apart(argv[1]);
    const char *missing = adapter_open(argv[1]);
    if (missing) {
        printf("{\"missing\": \"%s\"}\n", missing);
        return 0;
    }
    printf("{");
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        if (strcmp(work.kind, kinds[i].kind) == 0) {
            kinds[i].run();
        }
    }
    printf("\"checked\": %d}\n", CHECKED);
    return 0;
}
