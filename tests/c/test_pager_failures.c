/* test_pager_failures.c: every system call of the pager fails in turn, once and from then on for a while, and a worker is killed at every one of them.
 * Afterwards all is as it was or as it should be: every party sees what was written last, pages are where they are said to be, and nobody waits for ever.
 *
 *   test_pager_failures [name of one test]
 *
 * With UVAS_FULL in the environment every call fails with every error; otherwise each with one, in turns.
 *
 * Under a failure that lasts, a page can be between two places when neither will take it: then its bytes are lost, which whoever touches it is told.
 */
#define _GNU_SOURCE
#include "granules.h"

#include <stdatomic.h>

#define GRANULE (16 * KIB)
#define PLACES 10u
#define ROOM 6u          /* granules that a device has room for */
#define MOST_CALLS 150u  /* of one verb; longer ones are tried up to there */
#define LASTS_S 0.005    /* a failure that lasts: the pager has tried several times by then */

static const int errors[] = {ENOMEM, EBUSY, EAGAIN, EINVAL, EIO};
#define ERRORS (sizeof errors / sizeof *errors)

static uint64_t losses; /* granules that were given up, and it was told */

/* ---- verbs -------------------------------------------------------------------------------------------------------------------------------- */

static void pages_are_seen(struct scene *scene, uint32_t party) {
    for (uint32_t g = 0; g < PLACES; g++) {
        see(scene, party, g);
    }
}

static void pages_are_touched(struct scene *scene, uint32_t party) {
    for (uint32_t g = 0; g < PLACES; g++) {
        touch(scene, party, g);
    }
}

static void host_reads(struct scene *scene) { pages_are_seen(scene, 0); }
static void host_writes(struct scene *scene) { pages_are_touched(scene, 0); }
static void device_reads(struct scene *scene) { pages_are_seen(scene, 1); }
static void device_writes(struct scene *scene) { pages_are_touched(scene, 1); }
static void other_device_reads(struct scene *scene) { pages_are_seen(scene, 2); }
static void other_device_writes(struct scene *scene) { pages_are_touched(scene, 2); }

/* What a movement answers under a failure is not asked: whether it was all, some or nothing is seen. */
static void prefetched(const struct scene *scene, uint32_t party) {
    (void)uvas_prefetch(scene->held.id, 0, ROOM * GRANULE, scene->devices[party], NULL);
    (void)uvas_prefetch(scene->held.id, (PLACES - ROOM) * GRANULE, ROOM * GRANULE, scene->devices[party], NULL);
}

static void prefetch_there(struct scene *scene) { prefetched(scene, 1); }
static void prefetch_elsewhere(struct scene *scene) { prefetched(scene, 2); }
static void prefetch_home(struct scene *scene) { prefetched(scene, 0); }

static void prefetch_copies(struct scene *scene) {
    CHECK_OK(uvas_advise(scene->held.id, 0, PLACES * GRANULE, UVAS_ADVISE_READ_MOSTLY, 0));
    prefetched(scene, 1);
    CHECK_OK(uvas_advise(scene->held.id, 0, PLACES * GRANULE, UVAS_ADVISE_NOTHING, 0));
}

/* A discard that fails has forgotten some, or nothing; those that it was not asked for never. */
static void discard(struct scene *scene) {
    int rc = uvas_discard(scene->held.id, 0, PLACES / 2 * GRANULE);
    for (uint32_t tries = 0; rc < 0; tries++) {
        CHECK(tries < 1000);
        (void)usleep(1000);
        rc = uvas_discard(scene->held.id, 0, PLACES / 2 * GRANULE);
    }
    forgotten(scene, 0, PLACES / 2);
}

static void pin(struct scene *scene) {
    struct uvas_pin pin;
    if (uvas_pin_host(scene->held.id, 0, PLACES * GRANULE, &pin) == 0) {
        CHECK_OK(uvas_unpin_host(&pin));
    }
}

/* The child is not asked: what it lacks nobody can tell it. */
static void forks(struct scene *scene) {
    int status;
    pid_t child = fork();
    if (child == 0) {
        _exit(0);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
    touch(scene, 1, 2);
    touch(scene, 2, 3);
}

struct movement {
    const char *name;
    void (*run)(struct scene *scene);
};

static const struct movement movements[] = {
    {"the host reads", host_reads},
    {"the host writes", host_writes},
    {"a device reads", device_reads},
    {"a device writes", device_writes},
    {"prefetch to a device", prefetch_there},
    {"prefetch to the host", prefetch_home},
    {"prefetch of copies", prefetch_copies},
    {"discard", discard},
    {"pin", pin},
    {"fork", forks},
    {"another device reads", other_device_reads},
    {"another device writes", other_device_writes},
    {"prefetch to another device", prefetch_elsewhere},
};
#define MOVEMENTS (sizeof movements / sizeof *movements)

/* ---- failing ------------------------------------------------------------------------------------------------------------------------------ */

static pthread_mutex_t knob = PTHREAD_MUTEX_INITIALIZER; /* guards the next four, and uvas_test_fail */
static uint64_t struck_at;
static bool lasting, struck;
static double since;
static atomic_bool over;

static void fail_from(uint64_t k, int error, bool lasts) {
    (void)pthread_mutex_lock(&knob);
    struck = false;
    struck_at = k;
    lasting = lasts;
    since = seconds_now();
    uvas_test_fail(k, error, lasts);
    (void)pthread_mutex_unlock(&knob);
}

/* Whether the k-th call was come to. */
static bool fail_no_more(double patience_s) {
    (void)pthread_mutex_lock(&knob);
    if (patience_s == 0 || (lasting && seconds_now() - since > patience_s)) {
        struck |= uvas_test_calls() >= struck_at;
        lasting = false;
        uvas_test_fail(0, 0, 0);
    }
    bool met = struck;
    (void)pthread_mutex_unlock(&knob);
    return met;
}

/* Who waits in a fault goes on when the failure is over, which somebody else must see to. */
static void *ends_failures(void *nothing) {
    while (!atomic_load(&over)) {
        (void)fail_no_more(LASTS_S);
        (void)usleep(500);
    }
    return nothing;
}

/* Shared, modified here and there, nowhere. */
static void scatter(struct scene *scene) {
    CHECK_OK(uvas_discard(scene->held.id, (PLACES - 1) * GRANULE, GRANULE));
    forgotten(scene, PLACES - 1, PLACES);
    for (uint32_t g = 0; g < PLACES - 1; g++) {
        put(scene, g % PARTIES, g);
        if (g >= 3) {
            see(scene, (g + 1) % PARTIES, g);
        }
        if (g >= 6) {
            see(scene, (g + 2) % PARTIES, g);
        }
    }
}

/* What was lost is said to be so by all, until it is discarded. */
static void losses_are_told(struct scene *scene) {
    for (uint32_t g = 0; g < scene->granules; g++) {
        if (where_is(scene, g) & UVAS_PAGE_LOST) {
            struct uvas_moved moved;
            CHECK(may_lose && where_is(scene, g) == UVAS_PAGE_LOST);
            for (uint32_t party = 0; party < PARTIES && (party == 0 || scene->devices[party]); party++) {
                CHECK(party_do(party, &(struct order){.verb = LOAD, .base = address_of(scene, g)}).rc == -EIO);
            }
            CHECK(uvas_prefetch(scene->held.id, g * scene->granule, scene->granule, scene->devices[1], &moved) == -EBUSY && moved.why == -EIO);
            CHECK_OK(uvas_discard(scene->held.id, g * scene->granule, scene->granule));
            forgotten(scene, g, g + 1);
            losses++;
        }
    }
}

static size_t errors_tried(void) {
    return getenv("UVAS_FULL") ? ERRORS : 1;
}

/* Until the verb is done before its k-th call. */
static void each_call_fails(struct scene *scene, const struct movement *movement, size_t first, bool lasts) {
    bool met = true;
    for (uint64_t k = 1; met && k <= MOST_CALLS; k += k < 40 ? 1 : 7) {
        int error = errors[(first + k) % ERRORS];
        step("%s: call %lu fails with %s%s", movement->name, k, strerror(error), lasts ? ", and all after it" : "");
        scatter(scene);
        may_lose = lasts;
        fail_from(k, error, lasts);
        movement->run(scene);
        met = fail_no_more(0);
        losses_are_told(scene);
        may_lose = false;
        all_is_well(scene);
    }
}

static void moving_fails(bool lasts) {
    struct scene scene;
    pthread_t ender;
    atomic_store(&over, false);
    CHECK(pthread_create(&ender, NULL, ends_failures, NULL) == 0);
    scene_open(&scene, GRANULE, PLACES, CREW, ROOM);
    for (size_t i = 0; i < MOVEMENTS; i++) {
        bool undone = movements[i].run == forks; /* pages that are shared with a child do not move: there is most to be undone */
        for (size_t e = 0; e < (undone ? ERRORS : errors_tried()); e++) {
            each_call_fails(&scene, &movements[i], i + e, lasts);
        }
    }
    scene_close(&scene);
    atomic_store(&over, true);
    (void)pthread_join(ender, NULL);
}

static void moving_fails_once(void) {
    moving_fails(false);
    CHECK(losses == 0);
}

static void moving_fails_for_a_while(void) {
    moving_fails(true);
    printf("   %lu granules were lost, and it was told\n", losses);
    CHECK(losses > 0);
}

/* ---- large moves, which two threads share --------------------------------------------------------------------------------------------------- */

#define LARGE_GRANULE (64 * KIB)
#define LARGE 40u /* granules: more than move at once */

/* All of it, from one party to another. What answers 0 has moved all. */
static void a_large_move_fails(struct scene *scene, uint32_t from, uint32_t to, bool lasts) {
    bool met = true;
    for (uint64_t k = 1; met && k <= MOST_CALLS; k += k < 16 ? 1 : 5) {
        int error = errors[k % ERRORS];
        step("a large move from %u to %u: call %lu fails with %s%s", from, to, k, strerror(error), lasts ? ", and all after it" : "");
        for (uint32_t g = 0; g < LARGE; g++) {
            put(scene, from, g);
        }
        may_lose = lasts;
        fail_from(k, error, lasts);
        int rc = uvas_prefetch(scene->held.id, 0, LARGE * LARGE_GRANULE, scene->devices[to], NULL);
        met = fail_no_more(0);
        for (uint32_t g = 0; rc == 0 && g < LARGE; g++) {
            must_be(scene, g, 1u << to);
        }
        losses_are_told(scene);
        may_lose = false;
        all_is_well(scene);
    }
}

static void large_moves_fail(void) {
    struct scene scene;
    pthread_t ender;
    atomic_store(&over, false);
    CHECK(pthread_create(&ender, NULL, ends_failures, NULL) == 0);
    scene_open(&scene, LARGE_GRANULE, LARGE, CREW, 0);
    for (uint32_t lasts = 0; lasts < 2; lasts++) {
        a_large_move_fails(&scene, 0, 1, lasts);
        a_large_move_fails(&scene, 1, 0, lasts);
        a_large_move_fails(&scene, 1, 2, lasts);
    }
    scene_close(&scene);
    atomic_store(&over, true);
    (void)pthread_join(ender, NULL);
}

/* ---- life ---------------------------------------------------------------------------------------------------------------------------------- */

static int decommits(struct scene *scene) { return uvas_decommit(scene->held.id, 2 * GRANULE, 5 * GRANULE); }
static int releases(struct scene *scene) { return uvas_release(scene->held.id); }
static int detaches(struct scene *scene) { return uvas_detach(scene->space, scene->devices[2]); }

static int protects(struct scene *scene) {
    int rc = uvas_protect(scene->held.id, 0, PLACES / 2 * GRANULE, UVAS_READ);
    return rc < 0 ? rc : uvas_protect(scene->held.id, 0, PLACES / 2 * GRANULE, UVAS_READ | UVAS_WRITE);
}

static int commits(struct scene *scene) {
    struct uvas_reservation more;
    int rc = uvas_reserve(scene->space, 4 * GRANULE, NULL, &more);
    return rc < 0 ? rc : uvas_commit(more.id, 0, 2 * GRANULE, UVAS_READ | UVAS_WRITE, 0);
}

static int attaches(struct scene *scene) {
    struct uvas_device device = worker_device(&crew[2], GRANULE, 0);
    return uvas_attach(scene->space, &device, &scene->devices[2]);
}

struct turn { /* a verb of life: all or nothing */
    const char *name;
    int (*run)(struct scene *scene);
    uint32_t devices; /* there before */
};

static const struct turn turns[] = {{"decommit", decommits, 2}, {"release", releases, 2}, {"detach", detaches, 2}, {"protect", protects, 2}, {"commit", commits, 2}, {"attach", attaches, 1}};
#define TURNS (sizeof turns / sizeof *turns)

static void contents_after(struct scene *scene, const struct turn *turn, int rc) {
    scene->devices[2] = turn->run == detaches && rc == 0 ? 0 : scene->devices[2];
    if (turn->run == releases) {
        return;
    }
    losses_are_told(scene);
    may_lose = false;
    if (turn->run == decommits && rc == 0) {
        for (uint32_t g = 0; g < PLACES; g++) {
            if (g < 2 || g >= 7) {
                see(scene, g % PARTIES, g);
            } else {
                CHECK(where_is(scene, g) == 0);
            }
        }
    } else {
        CHECK(turn->run != attaches || (rc == 0) == (scene->devices[2] != 0));
        all_is_well(scene);
    }
}

/* A failure that lasts can make the undo fail as well; then the reservation is said to be poisoned, and no more is asked of it. */
static void a_turn_fails(const struct turn *turn, size_t first, bool lasts) {
    static const int possible[] = {ENOMEM, EINVAL, EIO}; /* none of these calls answers the others */
    bool met = true;
    for (uint64_t k = 1; met && k <= MOST_CALLS; k += k < 30 ? 1 : 5) {
        int error = possible[(first + k) % 3];
        struct scene scene;
        struct uvas_space_stats stats;
        scene_open(&scene, GRANULE, PLACES, turn->devices, 0);
        for (uint32_t g = 0; g < PLACES; g++) {
            put(&scene, g % (turn->devices + 1), g);
            see(&scene, (g + g / 3) % (turn->devices + 1), g);
        }
        step("%s: call %lu fails with %s%s", turn->name, k, strerror(error), lasts ? ", and all after it" : "");
        fail_from(k, error, lasts); /* nobody need end it: no thread waits in a fault */
        may_lose = lasts;
        int rc = turn->run(&scene);
        met = fail_no_more(0);
        CHECK(rc == 0 || (uvas_last_failure()->code == rc && uvas_last_failure()->text[0]));
        CHECK_OK(uvas_space_stats(scene.space, &stats));
        if (!stats.poisoned_bytes && !(lasts && rc < 0 && uvas_last_failure()->poisoned)) {
            contents_after(&scene, turn, rc);
        }
        may_lose = false;
        CHECK_OK(uvas_check());
        (void)uvas_space_close(scene.space);
    }
}

static void life_fails(void) {
    for (size_t i = 0; i < TURNS; i++) {
        for (size_t e = 0; e < (errors_tried() < 3 ? errors_tried() : 3); e++) {
            a_turn_fails(&turns[i], e, false);
            a_turn_fails(&turns[i], e, true);
        }
    }
}

/* ---- death -------------------------------------------------------------------------------------------------------------------------------- */

/* Kills the first worker when the pager comes to its k-th call. */
static void *kills(void *k) {
    while (uvas_test_calls() < (uintptr_t)k && !atomic_load(&over)) {
    }
    (void)kill(crew[1].pid, SIGKILL);
    return NULL;
}

static void death_at_each_call(void) {
    for (size_t i = 0; i < MOVEMENTS; i++) {
        uint64_t calls = MOST_CALLS;
        for (uint64_t k = 1; k <= calls; k += getenv("UVAS_FULL") ? 1 : k < 20 ? 2 : 7) {
            struct scene scene;
            pthread_t killer;
            step("%s: death of a worker at call %lu", movements[i].name, k);
            scene_open(&scene, GRANULE, PLACES, CREW, ROOM);
            scatter(&scene);
            mortal = 1;
            atomic_store(&over, false);
            uvas_test_fail(UINT64_MAX, EIO, 0); /* only counts */
            CHECK(pthread_create(&killer, NULL, kills, (void *)(uintptr_t)k) == 0);
            movements[i].run(&scene);
            calls = uvas_test_calls();
            atomic_store(&over, true);
            (void)pthread_join(killer, NULL);
            uvas_test_fail(0, 0, 0);
            worker_kill(&crew[1]);
            mortal = 0;
            pages_are_seen(&scene, 0);
            pages_are_seen(&scene, 2);
            for (uint32_t g = 0; g < PLACES;) {
                g += !(where_is(&scene, g) & FIRST);
            }
            all_is_well(&scene);
            scene_close(&scene);
        }
    }
}

/* ---- what a failed punch leaves ---------------------------------------------------------------------------------------------------------- */

/* How many calls it makes; the k-th fails. It is done in the end. */
static uint64_t done_in_spite(const struct scene *scene, uint64_t k, int (*verb)(const struct scene *)) {
    fail_from(k, EIO, false);
    int rc = verb(scene);
    uint64_t calls = uvas_test_calls();
    (void)fail_no_more(0);
    if (rc < 0) {
        CHECK_OK(verb(scene));
    }
    return calls;
}

static int third_goes(const struct scene *scene) { return uvas_decommit(scene->held.id, 2 * GRANULE, GRANULE); }
static int third_comes(const struct scene *scene) { return uvas_commit(scene->held.id, 2 * GRANULE, GRANULE, UVAS_READ | UVAS_WRITE, 0); }

/* A device's old bytes stay in its file where decommit and the next commit cannot punch: never what it sees. */
static void old_bytes_under(bool zeros) {
    struct scene scene;
    scene_open(&scene, GRANULE, PLACES, 1, ROOM);
    put(&scene, 1, 2);
    uint64_t going = done_in_spite(&scene, UINT64_MAX, third_goes), coming = done_in_spite(&scene, UINT64_MAX, third_comes);
    for (uint64_t k = 1; k <= going; k++) {
        for (uint64_t j = 1; j <= coming; j++) {
            step("old bytes: call %lu of decommit, call %lu of commit", k, j);
            put(&scene, 1, 2);
            (void)done_in_spite(&scene, k, third_goes);
            (void)done_in_spite(&scene, j, third_comes);
            forgotten(&scene, 2, 3);
            if (zeros) {
                see(&scene, 1, 2);
            } else {
                put(&scene, 0, 2);
            }
            CHECK_OK(uvas_prefetch(scene.held.id, 2 * GRANULE, GRANULE, scene.devices[1], NULL));
            see(&scene, 1, 2);
            see(&scene, 0, 2);
        }
    }
    all_is_well(&scene);
    scene_close(&scene);
}

static void old_bytes_are_not_seen(void) {
    old_bytes_under(true);
    old_bytes_under(false);
}

int main(int count, char **arguments) {
    static const struct test tests[] = {
        {"moving_fails_once", moving_fails_once},
        {"moving_fails_for_a_while", moving_fails_for_a_while},
        {"large_moves_fail", large_moves_fail},
        {"life_fails", life_fails},
        {"old_bytes_are_not_seen", old_bytes_are_not_seen},
        {"death_at_each_call", death_at_each_call},
    };
    return run_with_a_crew(count, arguments, tests, sizeof tests / sizeof *tests);
}
