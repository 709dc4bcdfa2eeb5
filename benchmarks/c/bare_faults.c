/* bare_faults.c: what one fault of 4 KiB takes when nothing but the kernel and a handler is in the way (targets H1, H4): the handler on the
 * faulting thread's CPU, on another one, and there spinning; and what faults of other sizes take when a worker goes through host memory.
 *
 *   bare_faults ROUNDS TOUCHES faults|granules
 */
#define _GNU_SOURCE
#include "bare.h"

#define SIZE ((size_t)64 << 20)

/* What the handler does about a fault. */
enum deed { FILL, MIGRATE };

static struct {
    struct bare pair;
    enum deed deed;
    size_t granule;
    int cpu; /* the handler's */
    bool spinning;
} bench;

/* ---- the handler ---------------------------------------------------------------------------------------------------------------------- */

static void host_page(uintptr_t at) {
    const struct bare *b = &bench.pair;
    size_t offset = at - b->base;
    if (bench.deed == FILL) {
        bare_zero(b->host, at, BARE_PAGE);
        return;
    }
    bare_protect(b->worker, at, bench.granule, true);
    bare_copy(b->host, at, b->alias + offset, bench.granule);
    bare_punch(b, offset, bench.granule);
}

static void worker_page(uintptr_t at) {
    const struct bare *b = &bench.pair;
    size_t offset = at - b->base;
    if (bench.deed == FILL) {
        bare_continue(b->worker, at, bench.granule);
        return;
    }
    bare_move(b, b->staging + offset, at, bench.granule);
    bare_write(b, offset, b->staging + offset, bench.granule);
    bare_drop(b->staging + offset, bench.granule);
    bare_continue(b->worker, at, bench.granule);
}

static void *handle(void *faults) {
    int uffd = *(const int *)faults;
    bool host = uffd == bench.pair.host;
    bare_pin(bench.cpu);
    BENCH_NEED(fcntl(uffd, F_SETFL, bench.spinning ? O_NONBLOCK : 0) == 0);
    while (true) { /* until it is cancelled, in read or here */
        struct uffd_msg message;
        if (read(uffd, &message, sizeof message) == sizeof message) {
            (host ? host_page : worker_page)((uintptr_t)message.arg.pagefault.address & ~(bench.granule - 1));
        } else {
            pthread_testcancel();
        }
    }
    return NULL;
}

static uint64_t with_handler(int *uffd, uint64_t (*work)(size_t), size_t argument) {
    pthread_t handler;
    BENCH_NEED(pthread_create(&handler, NULL, handle, uffd) == 0);
    uint64_t answer = work(argument);
    BENCH_NEED(pthread_cancel(handler) == 0 && pthread_join(handler, NULL) == 0);
    return answer;
}

/* ---- what is measured ----------------------------------------------------------------------------------------------------------------- */

static int faulting;

static uint64_t on_host(size_t faults) {
    bare_pin(faulting);
    return touch_faults(bench.pair.base, faults, BARE_PAGE);
}

static uint64_t on_worker(size_t faults) {
    return bare_ask(&bench.pair, (struct bare_work){.order = BARE_FAULTS, .cpu = faulting, .count = faults});
}

static uint64_t sequential(size_t size) {
    return bare_ask(&bench.pair, (struct bare_work){.order = BARE_RISING, .cpu = faulting, .size = size});
}

static uint64_t at_random(size_t count) {
    return bare_ask(&bench.pair, (struct bare_work){.order = BARE_RANDOM, .cpu = faulting, .size = SIZE, .count = count});
}

static void everything_on_host(size_t size) {
    bare_punch(&bench.pair, 0, SIZE);
    bare_drop(bench.pair.base, SIZE);
    for (size_t done = 0; done < size; done += 16 * BARE_PAGE) {
        bare_zero(bench.pair.host, bench.pair.base + done, 16 * BARE_PAGE);
    }
    for (size_t done = 0; done < size; done += BARE_PAGE) {
        *(volatile uint64_t *)(bench.pair.base + done) = done; /* a page of its own, not the page of zeros */
    }
}

static void everything_on_worker(size_t size) {
    bare_punch(&bench.pair, 0, SIZE);
    bare_drop(bench.pair.base, SIZE);
    BENCH_NEED(fallocate(bench.pair.memfd, 0, 0, (off_t)size) == 0);
    bare_continue(bench.pair.worker, bench.pair.base, size);
}

static void faults_of(const char *placement, size_t faults) {
    char what[96];
    size_t size = faults * BARE_PAGE;
    bench.granule = BARE_PAGE;
    bench.deed = FILL;
    bare_drop(bench.pair.base, SIZE);
    (void)snprintf(what, sizeof what, "bare: host, a page of zeros, %s", placement);
    bench_say("H1", what, BARE_PAGE, (double)with_handler(&bench.pair.host, on_host, faults));
    bare_punch(&bench.pair, 0, SIZE);
    BENCH_NEED(fallocate(bench.pair.memfd, 0, 0, (off_t)size) == 0);
    (void)snprintf(what, sizeof what, "bare: worker, a page that is there, %s", placement);
    bench_say("H1", what, BARE_PAGE, (double)with_handler(&bench.pair.worker, on_worker, faults));
    bench.deed = MIGRATE;
    everything_on_host(size);
    (void)snprintf(what, sizeof what, "bare: worker, from the host, %s", placement);
    bench_say("H1", what, BARE_PAGE, (double)with_handler(&bench.pair.worker, on_worker, faults));
    everything_on_worker(size);
    (void)snprintf(what, sizeof what, "bare: host, from the worker, %s", placement);
    bench_say("H1", what, BARE_PAGE, (double)with_handler(&bench.pair.host, on_host, faults));
}

static void granules_of(size_t touches) {
    char what[96];
    static const size_t granules[] = {BARE_PAGE, 16 << 10, 64 << 10, 256 << 10, 2 << 20};
    for (size_t i = 0; i < sizeof granules / sizeof *granules; i++) {
        bench.granule = granules[i];
        bench.deed = MIGRATE;
        size_t size = bench.granule == BARE_PAGE ? SIZE / 8 : SIZE;
        everything_on_host(size);
        bench_say("H4", "bare: a worker writes it all", bench.granule, (double)with_handler(&bench.pair.worker, sequential, size));
        for (size_t times = touches; times <= touches * 8; times *= 8) {
            everything_on_host(SIZE);
            (void)snprintf(what, sizeof what, "bare: a worker at random in 64 MiB, %zu touches", times);
            bench_say("H4 random", what, bench.granule, (double)with_handler(&bench.pair.worker, at_random, times) / (double)times);
        }
    }
}

int main(int argc, char **argv) {
    BENCH_NEED(argc == 4);
    size_t rounds = strtoul(argv[1], NULL, 10), touches = strtoul(argv[2], NULL, 10);
    bool granules = strcmp(argv[3], "granules") == 0;
    bare_open(&bench.pair, SIZE);
    const struct {
        const char *name;
        int faulting, handling;
        bool spinning;
    } placements[] = {{"anywhere", BARE_ANY, BARE_ANY, false}, {"same CPU", 0, 0, false}, {"other CPU", 1, 0, false}, {"spinning", 1, 0, true}};
    for (size_t round = 0; round < rounds; round++) {
        for (size_t i = 0; i < 4 && !granules; i++) {
            faulting = placements[i].faulting;
            bench.cpu = placements[i].handling;
            bench.spinning = placements[i].spinning;
            faults_of(placements[i].name, touches);
        }
        if (granules) {
            faulting = bench.cpu = BARE_ANY;
            bench.spinning = false;
            granules_of(touches);
        }
    }
    bare_close(&bench.pair);
    return 0;
}
