/* granules.h: what the tests of the pager share: a space with two workers that have memory of their own, a reservation in it, and an oracle that knows
 * which bytes every granule of it must hold, whoever looks.
 *
 * A granule holds the pattern of its *version*; its last word that of its *tail*, so that a party which writes one word must keep the others.
 * Party 0 is the host, 1 and 2 are the workers.
 */
#ifndef GRANULES_H
#define GRANULES_H

#include <stdarg.h>

#include "worker.h"

#define CREW 2u
#define PARTIES (CREW + 1)
#define GRANULES_MAX 4096u
#define HOST 1u /* bits of where */
#define FIRST 2u
#define SECOND 4u
#define ALL (HOST | FIRST | SECOND)

struct scene {
    uvas_id space, devices[PARTIES]; /* by party; the host is 0 */
    struct uvas_reservation held;
    size_t granule;
    uint32_t granules;
    uint64_t versions[GRANULES_MAX], tails[GRANULES_MAX];
};

static struct worker crew[PARTIES]; /* crew[0] is nobody */
static uint64_t last_version;
static uint32_t mortal; /* the party that may be killed at any moment; 0: none */
static bool may_lose;   /* bytes may be lost, as long as it is told */

/* ---- a test that hangs says where --------------------------------------------------------------------------------------------------------- */

#define STEP_S 20 /* no step takes as long */

static char doing[256];

__attribute__((format(printf, 1, 2))) static inline void step(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(doing, sizeof doing, format, arguments);
    va_end(arguments);
    (void)alarm(STEP_S);
}

/* What it was at, for a person: it hangs (SIGALRM), or something is not so (SIGABRT). */
static inline void tells(int signal) {
    const char *what = signal == SIGALRM ? "hangs: " : "at: ";
    (void)!write(2, what, strlen(what));
    (void)!write(2, doing, strlen(doing));
    (void)!write(2, "\n", 1);
    _exit(1);
}

/* ---- scenes ------------------------------------------------------------------------------------------------------------------------------- */

static inline void crew_alive(uint32_t devices) {
    static const char *const names[PARTIES] = {"nobody", "first", "second"};
    for (uint32_t party = 1; party <= devices; party++) {
        if (crew[party].dead) {
            worker_end(&crew[party]);
        }
        if (crew[party].dead || crew[party].pid == 0) {
            worker_start(&crew[party], names[party]);
        }
    }
}

static inline void crew_dismissed(void) {
    for (uint32_t party = 1; party <= CREW; party++) {
        if (crew[party].pid) {
            worker_end(&crew[party]);
        }
    }
}

static inline void attach(struct scene *scene, uint32_t party, size_t capacity) {
    struct uvas_device device = worker_device(&crew[party], scene->granule, capacity);
    uint32_t bit = 0;
    CHECK_OK(uvas_attach(scene->space, &device, &scene->devices[party]));
    CHECK_OK(uvas_page_bit(scene->space, scene->devices[party], &bit));
    CHECK(bit == 1u << party);
}

/* All committed, nothing touched. `capacity` in granules; 0: no bound. */
static inline void scene_open(struct scene *scene, size_t granule, uint32_t granules, uint32_t devices, uint32_t capacity) {
    struct uvas_space_options options = {.name = "pager", .window_base = WINDOW_BASE, .window_size = WINDOW_SIZE};
    struct uvas_where where = {.name = "held", .align = 2 * MIB};
    CHECK(granules <= GRANULES_MAX);
    memset(scene, 0, sizeof *scene);
    scene->granule = granule;
    scene->granules = granules;
    CHECK_OK(uvas_space_open(&options, &scene->space));
    crew_alive(devices);
    for (uint32_t party = 1; party <= devices; party++) {
        attach(scene, party, capacity * granule);
    }
    CHECK_OK(uvas_reserve(scene->space, granules * granule, &where, &scene->held));
    CHECK_OK(uvas_commit(scene->held.id, 0, granules * granule, UVAS_READ | UVAS_WRITE, 0));
}

static inline void scene_close(struct scene *scene) {
    CHECK_OK(uvas_check());
    CHECK_OK(uvas_space_close(scene->space));
}

static inline uintptr_t address_of(const struct scene *scene, uint32_t granule) {
    return scene->held.base + granule * scene->granule;
}

static inline uintptr_t tail_of(const struct scene *scene, uint32_t granule) {
    return address_of(scene, granule + 1) - WORD;
}

/* ---- accesses ------------------------------------------------------------------------------------------------------------------------------ */

static inline struct answer party_do(uint32_t party, const struct order *order) {
    return party == 0 ? job_done(order) : worker_do(&crew[party], order);
}

/* Done; or not, where that may be: its worker may be killed in the middle, or the bytes were given up under a failure that lasts. */
static inline bool must_do(uint32_t party, const struct order *order) {
    struct answer answer = party_do(party, order);
    bool right = answer.rc == 0 && (order->verb != VERIFY || answer.value == 0);
    bool excused = (answer.rc == -ESRCH && party == mortal) || (answer.rc == -EIO && may_lose);
    if (!right && !excused) {
        fprintf(stderr, "%s: party %u, verb %u at [0x%lx, +0x%zx): rc %d, %lu words are wrong, the first at 0x%lx\n", doing, party, order->verb, order->base,
                order->size, answer.rc, answer.value, answer.base);
    }
    CHECK(right || excused);
    return right;
}

/* All of it is written anew. */
static inline void put(struct scene *scene, uint32_t party, uint32_t granule) {
    scene->versions[granule] = scene->tails[granule] = ++last_version;
    (void)must_do(party, &(struct order){.verb = FILL, .base = address_of(scene, granule), .size = scene->granule, .value = last_version});
}

/* One word of it is written: the others stay. Whether somebody who was killed has written is to be seen. */
static inline void touch(struct scene *scene, uint32_t party, uint32_t granule) {
    uint64_t value = pattern(tail_of(scene, granule), ++last_version);
    bool done = must_do(party, &(struct order){.verb = STORE, .base = tail_of(scene, granule), .value = value});
    if (done || (party == mortal && party_do(0, &(struct order){.verb = LOAD, .base = tail_of(scene, granule)}).value == value)) {
        scene->tails[granule] = last_version;
    }
}

static inline void see(struct scene *scene, uint32_t party, uint32_t granule) {
    (void)must_do(party, &(struct order){.verb = VERIFY, .base = address_of(scene, granule), .size = scene->granule - WORD, .value = scene->versions[granule]});
    (void)must_do(party, &(struct order){.verb = VERIFY, .base = tail_of(scene, granule), .size = WORD, .value = scene->tails[granule]});
}

static inline void forgotten(struct scene *scene, uint32_t first, uint32_t end) {
    for (; first < end; first++) {
        scene->versions[first] = scene->tails[first] = 0;
    }
}

/* ---- where ---------------------------------------------------------------------------------------------------------------------------------- */

/* Of a granule whose pages are all in the same place. */
static inline uint32_t where_is(const struct scene *scene, uint32_t granule) {
    static uint32_t words[2 * MIB / 4096];
    CHECK_OK(uvas_where(scene->held.id, granule * scene->granule, scene->granule, words));
    for (size_t i = 1; i < scene->granule / 4096; i++) {
        CHECK(words[i] == words[0]);
    }
    CHECK(((words[0] & UVAS_PAGE_DUPLICATED) != 0) == ((words[0] & ALL & ((words[0] & ALL) - 1)) != 0));
    return words[0] & ~(uint32_t)UVAS_PAGE_DUPLICATED;
}

static inline void must_be(const struct scene *scene, uint32_t granule, uint32_t word) {
    if (where_is(scene, granule) != word) {
        fprintf(stderr, "%s: granule %u is in 0x%x and not in 0x%x\n", doing, granule, where_is(scene, granule), word);
    }
    CHECK(where_is(scene, granule) == word);
}

static inline struct uvas_movement movement_of(const struct scene *scene) {
    struct uvas_movement now;
    CHECK_OK(uvas_movement(scene->space, &now));
    return now;
}

/* The counters of a party. */
static inline struct uvas_traffic traffic_of(const struct scene *scene, uint32_t party) {
    struct uvas_movement now = movement_of(scene);
    for (uint32_t i = 0; i < now.count; i++) {
        if (now.parties[i].device == scene->devices[party]) {
            return now.parties[i];
        }
    }
    return (struct uvas_traffic){0};
}

/* The party reads all that it is said to have. Returns how many bytes were moved to it for that, or from it meanwhile. */
static inline uint64_t moved_for(struct scene *scene, uint32_t party) {
    uint64_t held = 0;
    struct uvas_traffic before = traffic_of(scene, party);
    for (uint32_t g = 0; g < scene->granules; g++) {
        if (where_is(scene, g) >> party & 1) {
            see(scene, party, g);
            held += scene->granule;
        }
    }
    struct uvas_traffic now = traffic_of(scene, party);
    uint64_t moved = now.bytes_in - before.bytes_in;
    uint64_t lost = party == 0 || now.resident_bytes >= before.resident_bytes ? 0 : before.resident_bytes - now.resident_bytes;
    CHECK(party == 0 || moved + lost > 0 || now.resident_bytes == held);
    return moved + lost;
}

/* What a party is said to have it reads without anything being moved; and each device has as many bytes as it is said to have. Looked at twice: the
 * pager's helper, which ends the sharing of a page with a child of fork by writing there, may be late. */
static inline void where_is_true(struct scene *scene) {
    for (uint32_t party = 0; party < PARTIES; party++) {
        if (party == 0 || (scene->devices[party] && !crew[party].dead)) {
            CHECK(moved_for(scene, party) == 0 || moved_for(scene, party) == 0);
        }
    }
}

/* Whoever looks sees what was written last; and it is where it is said to be, before and after. */
static inline void all_is_well(struct scene *scene) {
    where_is_true(scene);
    for (uint32_t g = 0; g < scene->granules; g++) {
        for (uint32_t party = 0; party < PARTIES; party++) {
            if (party == 0 || (scene->devices[party] && !crew[party].dead)) {
                see(scene, party, g);
            }
        }
    }
    where_is_true(scene);
    CHECK_OK(uvas_check());
}

/* As run_tests, with a crew: the program is also its workers, and each test says when it began, for the alarm. */
static inline int run_with_a_crew(int count, char **arguments, const struct test *tests, size_t tests_count) {
    uint32_t features;
    worker_main(count, arguments);
    if (uvas_private_memory(&features) == -ENOTSUP) {
        printf("skipped: %s; %s\n", uvas_last_failure()->text, uvas_last_failure()->remedy);
        return 0;
    }
    for (size_t i = 0; i < tests_count; i++) {
        if (count < 2 || strcmp(arguments[1], tests[i].name) == 0) {
            double began = seconds_now();
            CHECK(signal(SIGALRM, tells) != SIG_ERR && signal(SIGABRT, tells) != SIG_ERR);
            step("%s", tests[i].name);
            tests[i].run();
            printf("ok %s %.1f s\n", tests[i].name, seconds_now() - began);
            (void)fflush(stdout);
        }
    }
    (void)alarm(0);
    crew_dismissed();
    return 0;
}

#endif
