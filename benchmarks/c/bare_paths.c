/* bare_paths.c: how fast pages move between a host and a worker when nothing but the kernel is in the way (target H2): each way that the system
 * calls allow, in batches, by one thread and by two; and what the single steps take.
 *
 *   bare_paths ROUNDS MEBIBYTES ways|steps
 *
 * A sample is the time for 1 MiB, by the median of stretches of TOUCH_STRETCH; its parameter is the batch, in bytes. Of two threads at work the rates
 * are added. Of one thread a second sample, "processor", is what it had of its processor, all stretches together.
 */
#define _GNU_SOURCE
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "bare.h"

static struct bare pair;

/* One way: what is done with one batch. `spare` is a batch of host memory that the thread has written to before: recycled. */
typedef void way(size_t offset, size_t size, uintptr_t spare);

/* memcpy past the caches. */
static void copy_streaming(uintptr_t to, uintptr_t from, size_t size) {
#if defined(__x86_64__)
    __m128i *out = (__m128i *)to;
    const __m128i *in = (const __m128i *)from;
    for (size_t i = 0; i < size / sizeof *in; i += 4) {
        __m128i a = _mm_load_si128(in + i), b = _mm_load_si128(in + i + 1), c = _mm_load_si128(in + i + 2), d = _mm_load_si128(in + i + 3);
        _mm_stream_si128(out + i, a);
        _mm_stream_si128(out + i + 1, b);
        _mm_stream_si128(out + i + 2, c);
        _mm_stream_si128(out + i + 3, d);
    }
    _mm_sfence();
#else
    memcpy((void *)to, (const void *)from, size);
#endif
}

/* ---- to the worker -------------------------------------------------------------------------------------------------------------------- */

static void out_by_write(size_t offset, size_t size, uintptr_t spare) {
    (void)spare;
    bare_move(&pair, pair.staging + offset, pair.base + offset, size);
    bare_write(&pair, offset, pair.staging + offset, size);
    bare_continue(pair.worker, pair.base + offset, size);
    bare_drop(pair.staging + offset, size);
}

static void out_by_copy(size_t offset, size_t size, uintptr_t spare) {
    (void)spare;
    bare_move(&pair, pair.staging + offset, pair.base + offset, size);
    bare_copy(pair.worker, pair.base + offset, pair.staging + offset, size);
    bare_drop(pair.staging + offset, size);
}

static void write_alone(size_t offset, size_t size, uintptr_t spare) {
    (void)spare;
    bare_write(&pair, offset, pair.base + offset, size);
}

static void copy_alone(size_t offset, size_t size, uintptr_t spare) {
    (void)spare;
    bare_copy(pair.worker, pair.base + offset, pair.base + offset, size);
}

static void continue_alone(size_t offset, size_t size, uintptr_t spare) {
    (void)spare;
    bare_continue(pair.worker, pair.base + offset, size);
}

/* ---- to the host ---------------------------------------------------------------------------------------------------------------------- */

static void back_by_copy(size_t offset, size_t size, uintptr_t spare) {
    (void)spare;
    bare_protect(pair.worker, pair.base + offset, size, true);
    bare_copy(pair.host, pair.base + offset, pair.alias + offset, size);
    bare_punch(&pair, offset, size);
}

static void back_by_read(size_t offset, size_t size, uintptr_t spare) {
    (void)spare;
    bare_protect(pair.worker, pair.base + offset, size, true);
    bare_read(&pair, offset, pair.staging + offset, size);
    bare_move(&pair, pair.base + offset, pair.staging + offset, size);
    bare_punch(&pair, offset, size);
}

static void back_by_memcpy(size_t offset, size_t size, uintptr_t spare) {
    (void)spare;
    bare_protect(pair.worker, pair.base + offset, size, true);
    memcpy((void *)(pair.staging + offset), (const void *)(pair.alias + offset), size);
    bare_move(&pair, pair.base + offset, pair.staging + offset, size);
    bare_punch(&pair, offset, size);
}

static void back_by_streaming(size_t offset, size_t size, uintptr_t spare) {
    (void)spare;
    bare_protect(pair.worker, pair.base + offset, size, true);
    copy_streaming(pair.staging + offset, pair.alias + offset, size);
    bare_move(&pair, pair.base + offset, pair.staging + offset, size);
    bare_punch(&pair, offset, size);
}

static void copy_back_alone(size_t offset, size_t size, uintptr_t spare) {
    (void)spare;
    bare_copy(pair.host, pair.base + offset, pair.alias + offset, size);
}

static void read_alone(size_t offset, size_t size, uintptr_t spare) {
    bare_read(&pair, offset, spare, size);
}

static void protect_alone(size_t offset, size_t size, uintptr_t spare) {
    (void)spare;
    bare_protect(pair.worker, pair.base + offset, size, true);
}

static void punch_alone(size_t offset, size_t size, uintptr_t spare) {
    (void)spare;
    bare_punch(&pair, offset, size);
}

static void move_alone(size_t offset, size_t size, uintptr_t spare) {
    (void)spare;
    bare_move(&pair, pair.staging + offset, pair.base + offset, size);
}

static void drop_alone(size_t offset, size_t size, uintptr_t spare) {
    (void)spare;
    bare_drop(pair.base + offset, size);
}

static void memcpy_alone(size_t offset, size_t size, uintptr_t spare) {
    (void)spare;
    memcpy((void *)(pair.staging + offset), (const void *)(pair.base + offset), size);
}

static void streaming_alone(size_t offset, size_t size, uintptr_t spare) {
    (void)spare;
    copy_streaming(pair.staging + offset, pair.base + offset, size);
}

/* ---- what has to be where before ------------------------------------------------------------------------------------------------------- */

static void fill(uintptr_t at) {
    for (size_t done = 0; done < pair.size; done += 8) {
        *(uint64_t *)(at + done) = done * 3;
    }
}

static void empty(void) {
    bare_punch(&pair, 0, pair.size);
    bare_drop(pair.base, pair.size);
    bare_drop(pair.staging, pair.size);
}

static void on_host(void) {
    empty();
    bare_zero(pair.host, pair.base, pair.size);
    fill(pair.base);
}

static void on_both(void) { /* and not mapped in the worker */
    on_host();
    bare_write(&pair, 0, pair.base, pair.size);
}

static void on_worker(void) {
    on_both();
    bare_continue(pair.worker, pair.base, pair.size);
    bare_drop(pair.base, pair.size);
}

static void on_worker_recycling(void) {
    on_worker();
    fill(pair.staging);
}

static void host_recycling(void) {
    on_host();
    fill(pair.staging);
}

/* ---- one way, by some threads --------------------------------------------------------------------------------------------------------- */

struct share {
    way *way;
    size_t begin, end, batch;
    int cpu;
    pthread_barrier_t *start;
    uint64_t median, processor; /* of a stretch; of all of them */
};

static void *go(void *argument) {
    struct share *share = argument;
    bare_pin(share->cpu);
    void *spare = mmap(NULL, share->batch, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    BENCH_NEED(spare != MAP_FAILED);
    size_t count = (share->end - share->begin) / TOUCH_STRETCH;
    uint64_t *times = malloc(count * sizeof *times);
    BENCH_NEED(times && count);
    (void)pthread_barrier_wait(share->start);
    uint64_t before = bench_processor_ns();
    for (size_t i = 0; i < count; i++) {
        uint64_t began = bench_ns();
        for (size_t done = 0; done < TOUCH_STRETCH; done += share->batch) {
            share->way(share->begin + i * TOUCH_STRETCH + done, share->batch, (uintptr_t)spare);
        }
        times[i] = bench_ns() - began;
    }
    share->processor = bench_processor_ns() - before;
    share->median = touch_median(times, count);
    free(times);
    BENCH_NEED(munmap(spare, share->batch) == 0);
    return NULL;
}

static double by_threads(way *one, size_t batch, size_t threads, double *processor) {
    pthread_t each[2];
    struct share shares[2];
    pthread_barrier_t start;
    size_t part = pair.size / threads;
    BENCH_NEED(pthread_barrier_init(&start, NULL, (unsigned)threads) == 0);
    for (size_t i = 0; i < threads; i++) {
        shares[i] = (struct share){one, i * part, (i + 1) * part, batch, (int)i, &start, 0, 0};
        BENCH_NEED(pthread_create(&each[i], NULL, go, &shares[i]) == 0);
    }
    double stretches_a_ns = 0;
    *processor = 0;
    for (size_t i = 0; i < threads; i++) {
        (void)pthread_join(each[i], NULL);
        stretches_a_ns += 1 / (double)shares[i].median;
        *processor += (double)shares[i].processor / (double)(pair.size >> 20);
    }
    (void)pthread_barrier_destroy(&start);
    return 1 / stretches_a_ns / (double)(TOUCH_STRETCH >> 20);
}

/* Where the bytes are afterwards, for those ways that bring them somewhere. */
enum arrives { NOWHERE, AT_WORKER, AT_HOST };

static const struct path {
    const char *id, *what;
    void (*before)(void);
    way *way;
    enum arrives arrives;
    size_t threads;
} paths[] = {
    {"H2 out", "bare: MOVE, pwrite, CONTINUE, drop", on_host, out_by_write, AT_WORKER, 2},
    {"H2 out", "bare: MOVE, COPY, drop", on_host, out_by_copy, AT_WORKER, 2},
    {"H2 back", "bare: protect, COPY, punch", on_worker, back_by_copy, AT_HOST, 2},
    {"H2 recycled", "bare: protect, pread into recycled, MOVE, punch", on_worker_recycling, back_by_read, AT_HOST, 2},
    {"H2 recycled", "bare: protect, memcpy into recycled, MOVE, punch", on_worker_recycling, back_by_memcpy, AT_HOST, 2},
    {"H2 recycled", "bare: protect, streaming copy into recycled, MOVE, punch", on_worker_recycling, back_by_streaming, AT_HOST, 2},
    {"H2 step", "pwrite, fresh", on_host, write_alone, NOWHERE, 2},
    {"H2 step", "pwrite, pages there", on_both, write_alone, NOWHERE, 1},
    {"H2 step", "COPY to the worker, fresh", on_host, copy_alone, AT_WORKER, 2},
    {"H2 step", "CONTINUE", on_both, continue_alone, AT_WORKER, 1},
    {"H2 step", "COPY to the host, fresh", on_worker, copy_back_alone, AT_HOST, 2},
    {"H2 step", "pread into one recycled batch", on_worker, read_alone, NOWHERE, 1},
    {"H2 step", "WRITEPROTECT", on_worker, protect_alone, NOWHERE, 1},
    {"H2 step", "punch a hole", on_worker, punch_alone, NOWHERE, 2},
    {"H2 step", "MOVE", on_host, move_alone, NOWHERE, 2},
    {"H2 step", "DONTNEED", on_host, drop_alone, NOWHERE, 2},
    {"H2 recycled", "memcpy, both warm", host_recycling, memcpy_alone, NOWHERE, 2},
    {"H2 recycled", "streaming copy, both warm", host_recycling, streaming_alone, NOWHERE, 2},
};

static void measure(const struct path *path, size_t batch, size_t threads, uint64_t right) {
    char what[96];
    path->before();
    (void)snprintf(what, sizeof what, "%s%s", path->what, threads == 2 ? ", two threads" : "");
    double processor, ns = by_threads(path->way, batch, threads, &processor);
    bench_say(path->id, what, batch, ns);
    if (threads == 1) {
        char id[32];
        (void)snprintf(id, sizeof id, "%s, processor", path->id);
        bench_say(id, what, batch, processor);
    }
    if (path->arrives == AT_WORKER) {
        BENCH_NEED(bare_ask(&pair, (struct bare_work){.order = BARE_SUM, .size = pair.size}) == right);
    } else if (path->arrives == AT_HOST) {
        BENCH_NEED(touch_sum(pair.base, pair.size) == right);
    }
}

int main(int argc, char **argv) {
    BENCH_NEED(argc == 4);
    size_t rounds = strtoul(argv[1], NULL, 10), batches[] = {(size_t)64 << 10, (size_t)512 << 10, (size_t)2 << 20};
    bool steps = strcmp(argv[3], "steps") == 0;
    bare_open(&pair, strtoul(argv[2], NULL, 10) << 20);
    on_host();
    uint64_t right = touch_sum(pair.base, pair.size);
    for (size_t round = 0; round < rounds; round++) {
        for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
            bool step = strcmp(paths[i].id, "H2 step") == 0;
            for (size_t j = steps ? 0 : 1; step == steps && j < sizeof batches / sizeof *batches; j++) {
                for (size_t threads = 1; threads <= paths[i].threads; threads++) {
                    measure(&paths[i], batches[j], threads, right);
                }
            }
        }
    }
    bare_close(&pair);
    return 0;
}
