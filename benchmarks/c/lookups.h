/* lookups.h: the ranges that find.c and threads.c ask about, and the ways to ask. */
#ifndef UVAS_BENCH_LOOKUPS_H
#define UVAS_BENCH_LOOKUPS_H

#include <dlfcn.h>
#include <sys/mman.h>

#include <uvas.h>

#include "bench.h"

#define BASE UINT64_C(0x100000000000)
#define PLACE ((uintptr_t)4 << 20) /* each range lies in one of its own */
#define GRANULE_BITS 21
#define QUESTIONS ((size_t)1 << 20)

static size_t ranges;
static struct {
    uintptr_t base, end;
} *book; /* ascending */
static uintptr_t *questions;
static uint32_t *granules; /* 1 + the index of the range that starts in or reaches into it */
static volatile uint64_t zero, sink;

static uvas_id space;

static void make_ranges(void) {
    uint64_t random = 1;
    book = malloc(ranges * sizeof *book);
    questions = malloc(QUESTIONS * sizeof *questions);
    granules = calloc((ranges * PLACE >> GRANULE_BITS) + 1, sizeof *granules);
    BENCH_NEED(book && questions && granules);
    for (size_t i = 0; i < ranges; i++) {
        size_t size = ((bench_random(&random) % 32) + 1) << 16;
        book[i].base = BASE + i * PLACE; /* granule-aligned and at most a granule long: the table's best case */
        book[i].end = book[i].base + size;
        granules[(book[i].base - BASE) >> GRANULE_BITS] = (uint32_t)i + 1;
        struct uvas_reservation held;
        BENCH_NEED(uvas_adopt(space, book[i].base, size, "bench", &held) == 0);
    }
    for (size_t i = 0; i < QUESTIONS; i++) {
        size_t at = bench_random(&random) % ranges;
        questions[i] = book[at].base + bench_random(&random) % (book[at].end - book[at].base);
    }
}

/* ---- the ways to ask: the base of the range, or 0 ------------------------------------------------------------------------------------- */

static uintptr_t by_uvas(uintptr_t address) {
    struct uvas_found found;
    return uvas_find(address, &found) == 0 ? found.base : 0;
}

static uintptr_t by_binary_search(uintptr_t address) {
    size_t at = 0, left = ranges;
    while (left > 1) { /* without a branch that depends on what is read */
        size_t half = left / 2;
        at = book[at + half].base <= address ? at + half : at;
        left -= half;
    }
    return address >= book[at].base && address < book[at].end ? book[at].base : 0;
}

static inline uintptr_t by_granule(uintptr_t address) {
    uint32_t at = granules[(address - BASE) >> GRANULE_BITS];
    return at && address < book[at - 1].end ? book[at - 1].base : 0;
}

/* ---- UMF --------------------------------------------------------------------------------------------------------------------------------- */

static int (*umf_by_pointer)(const void *, void **);

static uintptr_t by_umf(uintptr_t address) {
    void *pool;
    return umf_by_pointer((const void *)address, &pool) == 0 ? (uintptr_t)pool : 0;
}

/* As many blocks of 4 KiB in its tracker, from a pool over memory that nobody touches. Its questions are its own addresses. */
static uintptr_t *umf_questions(const char *path) {
    void *umf = dlopen(path, RTLD_NOW);
    BENCH_NEED(umf);
    int (*params_create)(void *, size_t, void **) = (int (*)(void *, size_t, void **))dlsym(umf, "umfFixedMemoryProviderParamsCreate");
    const void *(*provider_ops)(void) = (const void *(*)(void))dlsym(umf, "umfFixedMemoryProviderOps");
    const void *(*pool_ops)(void) = (const void *(*)(void))dlsym(umf, "umfProxyPoolOps");
    int (*provider_create)(const void *, const void *, void **) = (int (*)(const void *, const void *, void **))dlsym(umf, "umfMemoryProviderCreate");
    int (*pool_create)(const void *, void *, const void *, uint32_t, void **) =
        (int (*)(const void *, void *, const void *, uint32_t, void **))dlsym(umf, "umfPoolCreate");
    void *(*pool_malloc)(void *, size_t) = (void *(*)(void *, size_t))dlsym(umf, "umfPoolMalloc");
    umf_by_pointer = (int (*)(const void *, void **))dlsym(umf, "umfPoolByPtr");
    BENCH_NEED(params_create && provider_ops && pool_ops && provider_create && pool_create && pool_malloc && umf_by_pointer);
    size_t size = ranges * 4096 + ((size_t)64 << 20);
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    void *params, *provider, *pool;
    BENCH_NEED(memory != MAP_FAILED && params_create(memory, size, &params) == 0 && provider_create(provider_ops(), params, &provider) == 0);
    BENCH_NEED(pool_create(pool_ops(), provider, NULL, 0, &pool) == 0);
    uintptr_t *blocks = malloc(ranges * sizeof *blocks), *asked = malloc(QUESTIONS * sizeof *asked);
    BENCH_NEED(blocks && asked);
    uint64_t random = 2;
    for (size_t i = 0; i < ranges; i++) {
        blocks[i] = (uintptr_t)pool_malloc(pool, 4096);
        BENCH_NEED(blocks[i]);
    }
    for (size_t i = 0; i < QUESTIONS; i++) {
        asked[i] = blocks[bench_random(&random) % ranges] + bench_random(&random) % 4096;
    }
    free(blocks);
    return asked;
}

#endif
