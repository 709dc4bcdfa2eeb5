/* stress_pager.c: threads of the host and of two workers read, write and add to words all over memory that moves between them, twice as much as a device
 * has room for, while it is prefetched, advised, forked and read into by the disk, memory beside it comes and goes, and in the end a worker is killed.
 *
 *   stress_pager [seconds = 3] [seed = 1]
 *
 * The oracle is a board that all share and that does not move. A word has one writer, whose numbers grow: he notes on the board which he is about to write,
 * writes it, and notes that it is written. Whoever reads must find a number between what was written before he looked and what had been begun when he had
 * looked. Other words everybody adds to: additions begun and done are noted likewise.
 */
#define _GNU_SOURCE
#include "granules.h"

#include <stdatomic.h>

#define THREADS 6u /* of the host, and the lines of two workers */
#define WORDS 3072u
#define SHARED_WORDS 48u
#define LANDING 2048u /* where in each page the disk writes; words lie before it */
#define SECTOR 512u
#define PAGE ((size_t)4096)

struct board {
    _Atomic uint64_t stop;
    struct {
        _Atomic uint64_t begun, done;
    } words[WORDS + SHARED_WORDS];
    _Atomic uint64_t reads, writes, additions;
};
_Static_assert(sizeof(struct board) <= WORKER_BOARD, "the board has room for it");

static struct board *the_board(void) {
    return (struct board *)(void *)worker_board;
}

static struct scene scene;

/* ---- what everybody does ------------------------------------------------------------------------------------------------------------------ */

static _Atomic uint64_t *word_at(const struct order *order, uint32_t word) {
    uintptr_t page = word * (order->size / PAGE) / (WORDS + SHARED_WORDS);
    return (_Atomic uint64_t *)(order->base + page * PAGE + word * 56 % LANDING);
}

static bool reads(const struct order *order, uint32_t word) {
    uint64_t least = atomic_load(&the_board()->words[word].done);
    uint64_t seen = atomic_load_explicit(word_at(order, word), memory_order_acquire);
    uint64_t most = atomic_load(&the_board()->words[word].begun);
    if (seen < least || seen > most) {
        fprintf(stderr, "word %u at %p of thread %u: %lu where %lu were done before and %lu begun after\n", word, (void *)word_at(order, word), word % THREADS,
                seen, least, most);
    }
    return seen >= least && seen <= most;
}

static void writes(const struct order *order, uint32_t word) {
    uint64_t next = atomic_fetch_add(&the_board()->words[word].begun, 1) + 1;
    atomic_store_explicit(word_at(order, word), next, memory_order_release);
    atomic_store(&the_board()->words[word].done, next);
}

static void adds(const struct order *order, uint32_t word) {
    atomic_fetch_add(&the_board()->words[word].begun, 1);
    atomic_fetch_add_explicit(word_at(order, word), 1, memory_order_acq_rel);
    atomic_fetch_add(&the_board()->words[word].done, 1);
}

/* Until the board says stop. `value` is the thread's number, `count` the seed. Stays in one neighbourhood for a while. */
static int works(const struct order *order, struct answer *answer) {
    uint64_t random = order->count * 1000 + order->value + 1, counts[3] = {0};
    uint32_t near = 0;
    for (uint32_t i = 0; answer->rc == 0 && !atomic_load_explicit(&the_board()->stop, memory_order_relaxed); i++) {
        near = i % 64 == 0 ? (uint32_t)(next_random(&random) % WORDS) : near;
        uint32_t what = (uint32_t)(next_random(&random) % 16), word = (uint32_t)((near + next_random(&random) % 96) % WORDS);
        if (what < 9) {
            answer->rc = reads(order, what == 0 ? WORDS + word % SHARED_WORDS : word) ? 0 : -EILSEQ;
            counts[0]++;
        } else if (what < 15) {
            writes(order, word / THREADS * THREADS + (uint32_t)order->value);
            counts[1]++;
        } else {
            adds(order, WORDS + word % SHARED_WORDS);
            counts[2]++;
        }
    }
    atomic_fetch_add(&the_board()->reads, counts[0]);
    atomic_fetch_add(&the_board()->writes, counts[1]);
    atomic_fetch_add(&the_board()->additions, counts[2]);
    return answer->rc;
}

static struct order work_of(uint32_t thread, uint64_t seed) {
    return (struct order){.verb = SPECIAL, .base = scene.held.base, .size = scene.held.size, .value = thread, .count = seed};
}

static void *host_works(void *order) {
    struct answer answer = {0};
    CHECK(works(order, &answer) == 0);
    return NULL;
}

/* ---- what happens to the memory meanwhile ------------------------------------------------------------------------------------------------- */

static void move_some(uint64_t *random) {
    uint32_t first = (uint32_t)(next_random(random) % scene.granules), count = 1 + (uint32_t)(next_random(random) % (scene.granules / 4));
    count = count < scene.granules - first ? count : scene.granules - first;
    size_t offset = first * scene.granule, size = count * scene.granule;
    uint32_t party = (uint32_t)(next_random(random) % PARTIES);
    if (next_random(random) % 4 == 0) {
        CHECK_OK(uvas_advise(scene.held.id, offset, size, (uint32_t)(next_random(random) % 4), scene.devices[party]));
    }
    int rc = uvas_prefetch(scene.held.id, offset, size, scene.devices[party], NULL);
    CHECK(rc == 0 || rc == -EBUSY || rc == -ENOMEM || rc == -ESRCH);
}

/* Memory beside comes, is used by the host, is forgotten and goes. */
static void change_beside(struct uvas_reservation *beside) {
    uint64_t *words = (uint64_t *)beside->base;
    size_t each = scene.granule / sizeof *words;
    CHECK_OK(uvas_commit(beside->id, 0, beside->size, UVAS_READ | UVAS_WRITE, 0));
    for (size_t i = 0; i < 4; i++) {
        CHECK(words[i * each] == 0);
        words[i * each] = i + 1;
    }
    (void)uvas_prefetch(beside->id, 0, 2 * scene.granule, scene.devices[2], NULL);
    CHECK_OK(uvas_discard(beside->id, scene.granule, scene.granule));
    CHECK(words[0] == 1 && words[each] == 0 && words[2 * each] == 3);
    CHECK_OK(uvas_decommit(beside->id, 0, beside->size));
}

/* The child has every word as it was at one moment of the fork. */
static void fork_some(void) {
    static uint64_t done[WORDS];
    struct order all = work_of(0, 0);
    int status;
    for (uint32_t word = 0; word < WORDS; word++) {
        done[word] = atomic_load(&the_board()->words[word].done);
    }
    pid_t child = fork();
    if (child == 0) {
        uint32_t wrong = 0;
        for (uint32_t word = 0; word < WORDS; word++) {
            uint64_t seen = atomic_load(word_at(&all, word));
            wrong += seen < done[word] || seen > atomic_load(&the_board()->words[word].begun);
        }
        _exit(wrong ? 1 : 0);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static int disk = -1;
static unsigned char sectors[16][SECTOR];

/* -1: the file system cannot read without a cache between. */
static void open_disk(void) {
    char name[] = "stress_pager.XXXXXX";
    int fd = mkstemp(name);
    CHECK(fd >= 0);
    for (size_t i = 0; i < sizeof sectors; i++) {
        ((unsigned char *)sectors)[i] = (unsigned char)(i * 7 + i / SECTOR);
    }
    CHECK(write(fd, sectors, sizeof sectors) == (ssize_t)sizeof sectors && fsync(fd) == 0);
    (void)close(fd);
    disk = open(name, O_RDONLY | O_DIRECT | O_CLOEXEC);
    (void)unlink(name);
    if (disk < 0) {
        printf("   O_DIRECT is not tried: %s\n", strerror(errno));
    }
}

/* The disk writes into a page of which devices use other words: neither is lost. */
static void read_from_disk(uint64_t *random) {
    size_t sector = next_random(random) % 16;
    char *landing = (char *)scene.held.base + next_random(random) % (scene.held.size / PAGE) * PAGE + LANDING;
    ssize_t got = disk < 0 ? 0 : pread(disk, landing, SECTOR, (off_t)(sector * SECTOR));
    if (got < 0 && errno == EINVAL) {
        printf("   O_DIRECT is not tried: this disk's sectors are larger than %u bytes\n", SECTOR);
        disk = -1;
    } else if (disk >= 0) {
        CHECK(got == SECTOR && memcmp(landing, sectors[sector], SECTOR) == 0);
    }
}

static void disturb(double until, struct uvas_reservation *beside, uint64_t *random) {
    for (uint32_t i = 0; seconds_now() < until; i++) {
        step("granules of 0x%zx, disturbance %u", scene.granule, i);
        if (i % 16 == 7) {
            fork_some();
        } else if (i % 4 == 1 && !crew[1].dead) { /* nothing new for the dead */
            change_beside(beside);
        } else if (i % 4 == 2) {
            read_from_disk(random);
        } else {
            move_some(random);
        }
    }
}

/* ---- rounds ------------------------------------------------------------------------------------------------------------------------------- */

/* A thread of a worker that was killed may have begun one write more than it noted as done. */
static void all_words_are_right(void) {
    struct order all = work_of(0, 0);
    for (uint32_t word = 0; word < WORDS + SHARED_WORDS; word++) {
        uint64_t done = atomic_load(&the_board()->words[word].done), begun = atomic_load(&the_board()->words[word].begun);
        CHECK(reads(&all, word) && begun - done <= WORKER_LINES);
        CHECK(begun == done || word >= WORDS || word % THREADS / WORKER_LINES == 1);
    }
}

static void round_of(size_t granule, uint32_t granules, double seconds, uint64_t seed) {
    pthread_t threads[WORKER_LINES];
    struct order orders[THREADS];
    struct uvas_reservation beside;
    double began = seconds_now();
    uint64_t random = seed;
    memset(worker_board, 0, sizeof(struct board));
    scene_open(&scene, granule, granules, CREW, granules / 2);
    CHECK_OK(uvas_reserve(scene.space, 4 * granule, NULL, &beside));
    for (uint32_t thread = 0; thread < THREADS; thread++) {
        orders[thread] = work_of(thread, seed);
        if (thread < WORKER_LINES) {
            CHECK(pthread_create(&threads[thread], NULL, host_works, &orders[thread]) == 0);
        } else {
            worker_begin(&crew[thread / WORKER_LINES], (int)(thread % WORKER_LINES), &orders[thread]);
        }
    }
    disturb(began + seconds * 0.7, &beside, &random);
    worker_kill(&crew[1]);
    disturb(began + seconds, &beside, &random);
    step("granules of 0x%zx: the end", granule);
    atomic_store(&the_board()->stop, 1);
    for (uint32_t thread = 0; thread < THREADS; thread++) {
        if (thread < WORKER_LINES) {
            (void)pthread_join(threads[thread], NULL);
        } else {
            CHECK(worker_finish(&crew[thread / WORKER_LINES], (int)(thread % WORKER_LINES)).rc == (thread / WORKER_LINES == 1 ? -ESRCH : 0));
        }
    }
    all_words_are_right();
    struct uvas_traffic second = traffic_of(&scene, 2), host = traffic_of(&scene, 0);
    CHECK(the_board()->reads > 0 && the_board()->writes > 0 && the_board()->additions > 0 && second.bytes_in > 0 && host.bytes_in > 0);
    printf("   granules of 0x%zx: %lu reads, %lu writes, %lu additions; the host got %lu MiB, the second %lu MiB and gave up %lu granules\n", granule, the_board()->reads,
           the_board()->writes, the_board()->additions, host.bytes_in >> 20, second.bytes_in >> 20, second.evictions);
    scene_close(&scene);
}

int main(int count, char **arguments) {
    uint32_t features;
    worker_special = works;
    worker_main(count, arguments);
    if (uvas_private_memory(&features) == -ENOTSUP) {
        printf("skipped: %s; %s\n", uvas_last_failure()->text, uvas_last_failure()->remedy);
        return 0;
    }
    CHECK(signal(SIGALRM, tells) != SIG_ERR && signal(SIGABRT, tells) != SIG_ERR);
    double seconds = count > 1 ? strtod(arguments[1], NULL) : 3;
    uint64_t seed = count > 2 ? strtoull(arguments[2], NULL, 0) : 1;
    open_disk();
    for (double left = seconds; left > 0; left -= 9, seed++) { /* not too long in one scene: workers die at the end of each */
        double each = (left < 9 ? left : 9) / 3;
        round_of(4 * KIB, 512, each, seed);
        round_of(64 * KIB, 128, each, seed);
        round_of(2 * MIB, 16, each, seed);
    }
    crew_dismissed();
    printf("ok stress_pager\n");
    return 0;
}
