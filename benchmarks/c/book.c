/* book.c: what the registry alone costs (target S1), and what a change of it takes. Built with the core's sources, as it looks behind uvas.h.
 *
 *   book RANGES PAGES   ranges of PAGES pages each
 */
#include "bench.h"
#include "registry.h"

int main(int argc, char **argv) {
    BENCH_NEED(argc == 3);
    size_t ranges = strtoul(argv[1], NULL, 10), size = strtoul(argv[2], NULL, 10) * 4096;
    uint64_t random = 1, began = bench_ns();
    size_t *order = malloc(ranges * sizeof *order);
    BENCH_NEED(order);
    for (size_t i = 0; i < ranges; i++) { /* in random order: the worst for memory */
        size_t j = bench_random(&random) % (i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    began = bench_ns();
    for (size_t i = 0; i < ranges; i++) {
        uintptr_t base = (order[i] + 1) * 2 * size;
        BENCH_NEED(uvas_registry_lock_for_insert() == 0);
        BENCH_NEED(uvas_registry_insert(base, base + size, i + 1, NULL) == 0);
        uvas_registry_unlock();
    }
    double each = (double)(bench_ns() - began) / (double)ranges;
    struct uvas_registry_stats stats;
    uvas_registry_lock();
    uvas_registry_stats(&stats);
    uvas_registry_unlock();
    printf("{\"id\": \"S1\", \"what\": \"registry, ranges of %zu bytes\", \"parameter\": %zu, \"ns\": %.1f, \"bytes\": %.1f}\n", size, ranges, each,
           (double)stats.node_bytes / (double)ranges);
    free(order);
    return 0;
}
