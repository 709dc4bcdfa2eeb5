/* threads.c: one, two and eight threads at once: reserving (beside R1) and asking whose an address is (beside R4), each peer in the same run.
 *
 *   threads ROUNDS PAIRS [UMF.so]
 *
 * A sample is the time until all threads are done, for one operation of all that they did: with cores enough, n threads take an n-th of what one
 * takes, if they do not hinder each other.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdbool.h>
#include <string.h>

#include "lookups.h"

#define SIZE ((size_t)64 << 20)
#define RANGES 10000
#define THREADS_MAX 8
#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

struct work {
    const char *id, *what;
    void (*does)(size_t thread, size_t count);
    size_t count; /* operations of each thread */
};

struct worker {
    const struct work *work;
    size_t thread;
    pthread_barrier_t *start;
};

static uvas_id plain, tagged;
static uintptr_t raw_place; /* and a stretch of 64 GiB for each thread */
static uintptr_t *umf_asked;
static volatile uint64_t sinks[THREADS_MAX * 8];

/* ---- reserving ------------------------------------------------------------------------------------------------------------------------ */

static void raw(size_t thread, size_t count) {
    void *place = (void *)(raw_place + ((uintptr_t)thread << 36));
    for (size_t i = 0; i < count; i++) {
        void *at = mmap(place, SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
        BENCH_NEED(at == place && munmap(at, SIZE) == 0);
    }
}

static void reserve_in(uvas_id in, size_t count) {
    for (size_t i = 0; i < count; i++) {
        struct uvas_reservation held;
        BENCH_NEED(uvas_reserve(in, SIZE, NULL, &held) == 0 && uvas_release(held.id) == 0);
    }
}

static void reserve_plain(size_t thread, size_t count) {
    (void)thread;
    reserve_in(plain, count);
}

static void reserve_tagged(size_t thread, size_t count) {
    (void)thread;
    reserve_in(tagged, count);
}

static void *umf_provider;
static int (*umf_provider_alloc)(void *, size_t, size_t, void **);
static int (*umf_provider_free)(void *, void *, size_t);

static void reserve_umf(size_t thread, size_t count) {
    (void)thread;
    for (size_t i = 0; i < count; i++) {
        void *at;
        BENCH_NEED(umf_provider_alloc(umf_provider, SIZE, 0, &at) == 0 && umf_provider_free(umf_provider, at, SIZE) == 0);
    }
}

static void open_umf_provider(const char *path) {
    void *umf = dlopen(path, RTLD_NOW), *params;
    BENCH_NEED(umf);
    int (*params_create)(void **) = (int (*)(void **))dlsym(umf, "umfOsMemoryProviderParamsCreate");
    const void *(*ops)(void) = (const void *(*)(void))dlsym(umf, "umfOsMemoryProviderOps");
    int (*create)(const void *, const void *, void **) = (int (*)(const void *, const void *, void **))dlsym(umf, "umfMemoryProviderCreate");
    umf_provider_alloc = (int (*)(void *, size_t, size_t, void **))dlsym(umf, "umfMemoryProviderAlloc");
    umf_provider_free = (int (*)(void *, void *, size_t))dlsym(umf, "umfMemoryProviderFree");
    BENCH_NEED(params_create && ops && create && umf_provider_alloc && umf_provider_free);
    BENCH_NEED(params_create(&params) == 0 && create(ops(), params, &umf_provider) == 0);
}

/* ---- asking --------------------------------------------------------------------------------------------------------------------------- */

#define ASK(name, ask, asked)                                      \
    static void name(size_t thread, size_t count) {                \
        uint64_t sum = 0;                                          \
        for (size_t i = 0; i < count; i++) {                       \
            sum += ask((asked)[(i + thread * 4099) % QUESTIONS]);  \
        }                                                          \
        sinks[thread * 8] = sum;                                   \
    }

ASK(ask_uvas, by_uvas, questions)
ASK(ask_binary, by_binary_search, questions)
ASK(ask_umf, by_umf, umf_asked)

/* ---- together ------------------------------------------------------------------------------------------------------------------------- */

static void *work_on(void *argument) {
    const struct worker *worker = argument;
    (void)pthread_barrier_wait(worker->start);
    worker->work->does(worker->thread, worker->work->count);
    return NULL;
}

static void together(const struct work *work, size_t threads) {
    pthread_t each[THREADS_MAX];
    struct worker workers[THREADS_MAX];
    pthread_barrier_t start;
    BENCH_NEED(pthread_barrier_init(&start, NULL, (unsigned)threads + 1) == 0);
    for (size_t i = 0; i < threads; i++) {
        workers[i] = (struct worker){work, i, &start};
        BENCH_NEED(pthread_create(&each[i], NULL, work_on, &workers[i]) == 0);
    }
    uint64_t began = bench_ns();
    (void)pthread_barrier_wait(&start);
    for (size_t i = 0; i < threads; i++) {
        (void)pthread_join(each[i], NULL);
    }
    bench_say(work->id, work->what, threads, (double)(bench_ns() - began) / (double)(threads * work->count));
    (void)pthread_barrier_destroy(&start);
}

int main(int argc, char **argv) {
    BENCH_NEED(argc >= 3);
    size_t rounds = strtoul(argv[1], NULL, 10), pairs = strtoul(argv[2], NULL, 10), lookups = QUESTIONS / 4;
    struct uvas_space_options untagged = {.flags = UVAS_UNTAGGED};
    struct uvas_reservation held;
    BENCH_NEED(uvas_space_open(NULL, &space) == 0 && uvas_space_open(&untagged, &plain) == 0 && uvas_space_open(NULL, &tagged) == 0);
    BENCH_NEED(uvas_reserve(plain, SIZE, NULL, &held) == 0 && uvas_release(held.id) == 0);
    raw_place = held.base - ((uintptr_t)1 << 41);
    const struct work reserving[] = {
        {"R1 threads", "raw anonymous", raw, pairs},
        {"R1 threads", "uvas untagged", reserve_plain, pairs},
        {"R1 threads", "uvas tagged", reserve_tagged, pairs},
        {"R1 threads", "UMF's OS provider", reserve_umf, pairs},
    };
    const struct work asking[] = {
        {"R4 threads", "uvas_find", ask_uvas, lookups},
        {"R4 threads", "binary search", ask_binary, lookups},
        {"R4 threads", "umfPoolByPtr", ask_umf, lookups},
    };
    size_t with_umf = argc > 3;
    if (with_umf) {
        open_umf_provider(argv[3]);
    }
    for (size_t round = 0; round < rounds; round++) { /* before there are ranges: as R1 */
        for (size_t threads = 1; threads <= THREADS_MAX; threads = threads == 2 ? 8 : 2 * threads) {
            for (size_t i = 0; i < 3 + with_umf; i++) {
                together(&reserving[i], threads);
            }
        }
    }
    ranges = RANGES;
    make_ranges();
    umf_asked = with_umf ? umf_questions(argv[3]) : NULL;
    for (size_t round = 0; round < rounds; round++) {
        for (size_t threads = 1; threads <= THREADS_MAX; threads = threads == 2 ? 8 : 2 * threads) {
            for (size_t i = 0; i < 2 + with_umf; i++) {
                together(&asking[i], threads);
            }
        }
    }
    return 0;
}
