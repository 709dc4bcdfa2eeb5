/* main.c: four threads allocate from one arena and free each other's blocks; and an arena of bare addresses, as a GPU runtime wants it. No Python in it.
 *
 *   cc -I"$(python -c 'import uvas; print(uvas.get_include())')" main.c "$(python -c 'import uvas; print(uvas.get_library())')" \
 *      -Wl,-rpath,"$(dirname "$(python -c 'import uvas; print(uvas.get_library())')")" -pthread -o c_arena && ./c_arena
 *
 * Each thread builds messages of random sizes and posts them to the next thread, which reads them and frees them: blocks go round, and every one comes
 * back to the thread whose slab it is from.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "uvas.h"

#define THREADS 4
#define MESSAGES 20000
#define SLOTS 256

struct message {
    size_t size;
    uint64_t sum; /* of the payload */
    unsigned char payload[];
};

static uvas_id arena;
static _Atomic(struct message *) posted[THREADS][SLOTS]; /* to each thread: put by the one before, taken by it */

static void must(int rc, const char *what) {
    if (rc < 0) {
        fprintf(stderr, "%s: %s\n", what, uvas_last_failure()->text);
        exit(EXIT_FAILURE);
    }
}

static uint64_t sum(const unsigned char *bytes, size_t count) {
    uint64_t total = 0;
    for (size_t i = 0; i < count; i++) {
        total += bytes[i] * (i + 1);
    }
    return total;
}

static struct message *compose(unsigned *seed) {
    size_t payload = (size_t)rand_r(seed) % (rand_r(seed) % 16 ? 500 : 100000);
    uintptr_t base;
    must(uvas_alloc(arena, sizeof(struct message) + payload, 0, &base), "alloc");
    struct message *message = (struct message *)base;
    message->size = payload;
    memset(message->payload, rand_r(seed), payload);
    message->sum = sum(message->payload, payload);
    return message;
}

static void receive(struct message *message) {
    if (message->sum != sum(message->payload, message->size)) {
        fprintf(stderr, "a message at %p is not what was posted\n", (void *)message);
        exit(EXIT_FAILURE);
    }
    must(uvas_free(arena, (uintptr_t)message), "free");
}

static void *work(void *number) {
    unsigned me = (unsigned)(uintptr_t)number, seed = me + 1;
    size_t sent = 0, received = 0;
    while (sent < MESSAGES || received < MESSAGES) {
        _Atomic(struct message *) *out = &posted[(me + 1) % THREADS][sent % SLOTS];
        if (sent < MESSAGES && !atomic_load_explicit(out, memory_order_relaxed)) {
            atomic_store_explicit(out, compose(&seed), memory_order_release);
            sent++;
        }
        struct message *in = atomic_exchange_explicit(&posted[me][received % SLOTS], NULL, memory_order_acquire);
        if (in) {
            receive(in);
            received++;
        } else if (sent - received >= SLOTS / 2 || sent == MESSAGES) {
            sched_yield();
        }
    }
    return NULL;
}

/* Addresses without memory: what is behind a block is the runtime's, here the pages of a descriptor, which several blocks may share. */
static void bare_addresses(uvas_id space) {
    struct uvas_reservation held;
    struct uvas_arena_options options = {.name = "bare", .flags = UVAS_ARENA_BARE};
    const size_t size = (size_t)2 << 20;
    uintptr_t first, second;
    FILE *file = tmpfile();
    must(uvas_reserve(space, (size_t)1 << 40, NULL, &held), "reserve a tebibyte");
    options.reservation = held.id;
    must(uvas_arena_open(&options, &arena), "open an arena of bare addresses");
    must(uvas_alloc(arena, size, size, &first), "alloc");
    must(uvas_alloc(arena, size, size, &second), "alloc");
    if (!file || fwrite("one memory, two addresses", 1, 25, file) != 25 || fflush(file) != 0) {
        exit(EXIT_FAILURE);
    }
    struct uvas_mapping mapping = {.descriptor = fileno(file), .sharing = UVAS_SHARED, .offset = first - held.base, .size = 4096,
                                   .protection = UVAS_READ | UVAS_WRITE};
    must(uvas_map_fd(held.id, &mapping), "map");
    mapping.offset = second - held.base;
    must(uvas_map_fd(held.id, &mapping), "map again");
    *(char *)first = 'O';
    printf("mapped at 0x%lx, and at 0x%lx: \"%.25s\"\n", first, second, (const char *)second);
    must(uvas_decommit(held.id, first - held.base, 4096), "unmap");
    must(uvas_decommit(held.id, second - held.base, 4096), "unmap");
    must(uvas_free(arena, first), "free");
    must(uvas_free(arena, second), "free");
    must(uvas_arena_close(arena), "close");
    must(uvas_release(held.id), "release");
    fclose(file);
}

int main(void) {
    struct uvas_arena_options options = {.name = "messages"};
    struct uvas_arena_stats stats;
    struct uvas_allocation found;
    pthread_t threads[THREADS];
    uintptr_t block;
    uvas_id space;

    must(uvas_space_open(NULL, &space), "open a space");
    options.space = space;
    must(uvas_arena_open(&options, &arena), "open an arena");
    for (uintptr_t i = 0; i < THREADS; i++) {
        pthread_create(&threads[i], NULL, work, (void *)i);
    }
    for (size_t i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
    }
    must(uvas_arena_check(arena), "check");
    must(uvas_arena_stats(arena, &stats), "stats");
    printf("%llu messages of %llu MiB went round, each freed by another thread; %llu live, at most %llu KiB were in use\n",
           (unsigned long long)stats.total_blocks, (unsigned long long)stats.total_bytes >> 20, (unsigned long long)stats.live_blocks,
           (unsigned long long)stats.peak_bytes >> 10);
    must(uvas_alloc(arena, 1000, 0, &block), "alloc");
    must(uvas_find_allocation(block + 999, &found), "find");
    must(uvas_free(arena, block), "free");
    if (found.base != block || uvas_free(arena, block) == 0 || stats.live_blocks != 0 || stats.total_blocks != THREADS * MESSAGES) {
        return EXIT_FAILURE;
    }
    printf("as it should be: %s\n", uvas_last_failure()->text);
    must(uvas_arena_close(arena), "close");
    bare_addresses(space);
    must(uvas_space_close(space), "close");
    return EXIT_SUCCESS;
}
