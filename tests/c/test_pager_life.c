/* test_pager_life.c: memory, devices, spaces and processes that come and go while pages are wherever they are. What is gone is gone for all, what stays
 * holds what it held, and nobody waits for ever.
 *
 *   test_pager_life [name of one test]
 */
#define _GNU_SOURCE
#include "granules.h"

#include <dirent.h>

#define PLACES 24u /* granules: six states, four times */
#define GRANULE (64 * KIB)

/* Granules everywhere: with each device, shared by all or by some, at home, nowhere. */
static void scatter(struct scene *scene) {
    for (uint32_t g = 0; g < scene->granules; g++) {
        if (g % 6 != 5) {
            put(scene, g % PARTIES, g);
        }
        for (uint32_t party = 0; g % 6 == 3 && party < PARTIES; party++) {
            see(scene, party, g);
        }
        if (g % 6 == 4) {
            see(scene, 2, g);
        }
    }
}

static void scattered_scene(struct scene *scene, size_t granule) {
    scene_open(scene, granule, PLACES, CREW, 0);
    scatter(scene);
}

static void must_be_out_of_reach(const struct scene *scene, uint32_t party, uint32_t g) {
    CHECK(party_do(party, &(struct order){.verb = LOAD, .base = address_of(scene, g)}).rc == -EFAULT);
}

/* ---- memory ------------------------------------------------------------------------------------------------------------------------------- */

static void decommit_takes_it_from_all(void) {
    for (size_t granule = 4 * KIB; granule <= 256 * KIB; granule *= 8) {
        struct scene scene;
        scattered_scene(&scene, granule);
        for (uint32_t round = 0; round < 3; round++) {
            uint32_t first = round * 5, end = first + PLACES / 2;
            step("granules of 0x%zx: decommit of half of them, round %u", granule, round);
            CHECK_OK(uvas_decommit(scene.held.id, first * granule, (end - first) * granule));
            forgotten(&scene, first, end);
            for (uint32_t g = first; g < end; g++) {
                must_be(&scene, g, 0);
                must_be_out_of_reach(&scene, g % PARTIES, g);
            }
            CHECK(uvas_prefetch(scene.held.id, first * granule, granule, scene.devices[1], NULL) == -EINVAL);
            for (uint32_t g = 0; g < PLACES; g++) {
                for (uint32_t party = 0; (g < first || g >= end) && party < PARTIES; party++) {
                    see(&scene, party, g);
                }
            }
            step("granules of 0x%zx: commit again, round %u", granule, round);
            CHECK_OK(uvas_commit(scene.held.id, 0, scene.held.size, UVAS_READ | UVAS_WRITE, 0));
            all_is_well(&scene);
            scatter(&scene);
        }
        all_is_well(&scene);
        scene_close(&scene);
    }
}

static void *host_fills(void *order) {
    int rc = job_done(order).rc;
    CHECK(rc == 0 || rc == -EFAULT);
    return NULL;
}

/* Who waits in a fault, or is about to, when the memory goes: it is told so by the kernel, as on any memory that goes, and does not wait for ever. */
static void memory_goes_under_its_users(void) {
    struct scene scene;
    scattered_scene(&scene, 4 * KIB);
    for (uint32_t round = 0; round < 200; round++) {
        pthread_t host;
        struct order fill = {.verb = FILL, .base = scene.held.base, .size = scene.held.size, .value = round + 1};
        step("memory goes under its users, round %u", round);
        for (uint32_t party = 1; party <= CREW; party++) {
            for (int line = 0; line < WORKER_LINES; line++) {
                worker_begin(&crew[party], line, &fill);
            }
        }
        CHECK(pthread_create(&host, NULL, host_fills, &fill) == 0);
        CHECK_OK(uvas_decommit(scene.held.id, (round % 7) * scene.granule, (1 + round % 13) * scene.granule));
        if (round % 3 == 0) {
            CHECK_OK(uvas_commit(scene.held.id, 0, scene.held.size, UVAS_READ | UVAS_WRITE, 0));
        }
        for (uint32_t party = 1; party <= CREW; party++) {
            for (int line = 0; line < WORKER_LINES; line++) {
                int rc = worker_finish(&crew[party], line).rc;
                CHECK(rc == 0 || rc == -EFAULT);
            }
        }
        CHECK(pthread_join(host, NULL) == 0);
        CHECK_OK(uvas_commit(scene.held.id, 0, scene.held.size, UVAS_READ | UVAS_WRITE, 0));
    }
    scatter(&scene);
    for (uint32_t g = 5; g < PLACES; g += 6) {
        put(&scene, 1, g);
    }
    all_is_well(&scene);
    scene_close(&scene);
}

static void release_under_its_users(void) {
    for (uint32_t round = 0; round < 50; round++) {
        struct scene scene;
        struct uvas_found found;
        struct uvas_where where = {.name = "again"};
        step("release under its users, round %u", round);
        scattered_scene(&scene, 4 * KIB);
        for (uint32_t party = 1; party <= CREW; party++) {
            worker_begin(&crew[party], 0, &(struct order){.verb = FILL, .base = scene.held.base, .size = scene.held.size, .value = 1});
        }
        CHECK_OK(uvas_release(scene.held.id));
        for (uint32_t party = 1; party <= CREW; party++) {
            int rc = worker_finish(&crew[party], 0).rc;
            CHECK(rc == 0 || rc == -EFAULT);
        }
        CHECK(uvas_find(scene.held.base, &found) == -ENOENT);
        where.at = scene.held.base;
        CHECK_OK(uvas_reserve(scene.space, scene.held.size, &where, &scene.held));
        CHECK_OK(uvas_commit(scene.held.id, 0, scene.held.size, UVAS_READ | UVAS_WRITE, 0));
        forgotten(&scene, 0, PLACES);
        all_is_well(&scene); /* zeros */
        scene_close(&scene);
    }
}

/* Read-only memory moves as well, in both directions, and nobody may write there; afterwards all may. */
static void protection_holds_for_all(void) {
    struct scene scene;
    uint32_t words[1];
    scattered_scene(&scene, GRANULE);
    step("read-only");
    CHECK_OK(uvas_protect(scene.held.id, 0, scene.held.size, UVAS_READ));
    CHECK_OK(uvas_where(scene.held.id, 0, 4096, words));
    CHECK(words[0] & UVAS_PAGE_READ_ONLY);
    for (uint32_t g = 0; g < PLACES; g++) {
        for (uint32_t party = 0; party < PARTIES; party++) {
            CHECK(party_do(party, &(struct order){.verb = STORE, .base = address_of(&scene, g)}).rc == -EFAULT);
        }
    }
    for (uint32_t round = 0; round < 2 * PARTIES; round++) {
        CHECK_OK(uvas_prefetch(scene.held.id, 0, scene.held.size, scene.devices[round % PARTIES], NULL));
        for (uint32_t g = 0; g < PLACES; g++) {
            see(&scene, (round + g) % PARTIES, g);
        }
    }
    step("no access");
    CHECK_OK(uvas_protect(scene.held.id, 0, scene.held.size, UVAS_NONE));
    for (uint32_t party = 0; party < PARTIES; party++) {
        must_be_out_of_reach(&scene, party, party);
    }
    CHECK(uvas_prefetch(scene.held.id, 0, scene.held.size, scene.devices[1], NULL) == -EINVAL);
    step("all access again");
    CHECK_OK(uvas_protect(scene.held.id, 0, scene.held.size, UVAS_READ | UVAS_WRITE));
    all_is_well(&scene);
    scatter(&scene);
    all_is_well(&scene);
    scene_close(&scene);
}

/* System calls meet memory that is elsewhere; locked memory is no different. */
static void the_kernel_reads_and_writes_it(void) {
    struct scene scene;
    int ends[2];
    static char bytes[4096];
    scattered_scene(&scene, 4 * KIB);
    CHECK(pipe(ends) == 0);
    for (uint32_t round = 0; round < 4; round++) {
        for (uint32_t g = 0; g < PLACES; g++) {
            step("write(2) and read(2) of granule %u", g);
            put(&scene, 1 + g % CREW, g);
            CHECK(write(ends[1], (void *)address_of(&scene, g), 4096) == 4096);
            put(&scene, 2 - g % CREW, g);
            uint64_t version = scene.versions[g];
            CHECK(read(ends[0], bytes, 4096) == 4096 && *(uint64_t *)(void *)bytes == pattern(address_of(&scene, g), version - 1));
            CHECK(write(ends[1], bytes, 4096) == 4096 && read(ends[0], (void *)address_of(&scene, g), 4096) == 4096);
            scene.versions[g] = scene.tails[g] = version - 1;
            see(&scene, 1, g);
        }
        step("locked memory");
        if (round == 1 && mlock((void *)scene.held.base, scene.held.size) < 0) {
            printf("locked memory is not tried: mlock: %s\n", strerror(errno));
        }
    }
    all_is_well(&scene);
    (void)close(ends[0]);
    (void)close(ends[1]);
    scene_close(&scene);
}

/* ---- devices ------------------------------------------------------------------------------------------------------------------------------ */

static void detach(struct scene *scene, uint32_t party) {
    CHECK_OK(uvas_detach(scene->space, scene->devices[party]));
    scene->devices[party] = 0;
}

static void devices_come_and_go(void) {
    struct scene scene;
    uint32_t bit;
    scattered_scene(&scene, GRANULE);
    for (uint32_t round = 0; round < 6; round++) {
        uint32_t party = 1 + round % CREW;
        uvas_id was = scene.devices[party];
        step("device %u goes", party);
        detach(&scene, party);
        CHECK(uvas_page_bit(scene.space, was, &bit) < 0 && uvas_prefetch(scene.held.id, 0, scene.granule, was, NULL) == -ESTALE);
        for (uint32_t g = 0; g < PLACES; g++) {
            CHECK(!(where_is(&scene, g) & 1u << party));
            must_be_out_of_reach(&scene, party, g);
        }
        all_is_well(&scene);
        step("device %u comes", party);
        attach(&scene, party, 0);
        all_is_well(&scene);
        scatter(&scene);
    }
    step("both go, the host's memory is as any other");
    detach(&scene, 1);
    detach(&scene, 2);
    for (uint32_t g = 0; g < PLACES; g++) {
        see(&scene, 0, g);
        touch(&scene, 0, g);
        see(&scene, 0, g);
    }
    attach(&scene, 1, 0);
    attach(&scene, 2, 0);
    all_is_well(&scene);
    scene_close(&scene);
}

/* What one space's devices do is no other's affair, and what is left of a space without devices is served while the pager works for others. */
static void spaces_are_apart(void) {
    struct scene scene;
    struct uvas_space_options options = {.name = "other", .window_base = WINDOW_BASE + WINDOW_SIZE, .window_size = WINDOW_SIZE};
    struct uvas_reservation held;
    uvas_id other, device;
    step("two spaces");
    scene_open(&scene, GRANULE, PLACES, 1, 0);
    crew_alive(CREW);
    CHECK_OK(uvas_space_open(&options, &other));
    struct uvas_device second = worker_device(&crew[2], 4 * KIB, 0);
    CHECK_OK(uvas_attach(other, &second, &device));
    CHECK_OK(uvas_reserve(other, MIB, NULL, &held));
    CHECK_OK(uvas_commit(held.id, 0, MIB, UVAS_READ | UVAS_WRITE, 0));
    (void)must_do(2, &(struct order){.verb = FILL, .base = held.base, .size = MIB / 2, .value = 7});
    (void)must_do(0, &(struct order){.verb = VERIFY, .base = held.base, .size = MIB / 4, .value = 7});
    for (uint32_t g = 0; g < PLACES; g++) {
        put(&scene, g % 2, g);
    }
    must_be_out_of_reach(&scene, 2, 0);
    CHECK(uvas_prefetch(held.id, 0, MIB, scene.devices[1], NULL) == -ESTALE);
    CHECK_OK(uvas_detach(other, device));
    step("a space without devices");
    (void)must_do(0, &(struct order){.verb = VERIFY, .base = held.base, .size = MIB / 2, .value = 7});
    (void)must_do(0, &(struct order){.verb = FILL, .base = held.base, .size = MIB, .value = 8});
    all_is_well(&scene);
    CHECK_OK(uvas_space_close(other));
    all_is_well(&scene);
    scene_close(&scene);
}

static void demands_on_devices(void) {
    struct scene scene;
    uvas_id device;
    step("devices that do not suit");
    scene_open(&scene, GRANULE, 4, 1, 0);
    crew_alive(CREW);
    struct uvas_device second = worker_device(&crew[2], GRANULE, 0), wrong = second;
    wrong.granule = 4 * KIB;
    CHECK(uvas_attach(scene.space, &wrong, &device) == -ENOTSUP); /* granules of two sizes */
    wrong.granule = 3 * 4096;
    CHECK(uvas_attach(scene.space, &wrong, &device) == -EINVAL);
    wrong = second;
    wrong.granularity = 4096;
    CHECK(uvas_attach(scene.space, &wrong, &device) == -EINVAL);
    wrong = second;
    wrong.capacity = 4096;
    CHECK(uvas_attach(scene.space, &wrong, &device) == -EINVAL);
    wrong = second;
    wrong.faults = -1;
    CHECK(uvas_attach(scene.space, &wrong, &device) == -EINVAL);
    CHECK(uvas_commit(scene.held.id, 4096, GRANULE, UVAS_READ, 0) == -EINVAL);
    CHECK(uvas_decommit(scene.held.id, 0, 4096) == -EINVAL);
    all_is_well(&scene);
    scene_close(&scene);
}

/* ---- fork --------------------------------------------------------------------------------------------------------------------------------- */

static void must_end_well(pid_t child) {
    int status = 0;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* 0: every granule holds what it must. For a child, which says it by its exit code. */
static int contents_differ(const struct scene *scene) {
    int wrong = 0;
    for (uint32_t g = 0; g < scene->granules; g++) {
        struct answer all = job_done(&(struct order){.verb = VERIFY, .base = address_of(scene, g), .size = scene->granule - WORD, .value = scene->versions[g]});
        struct answer tail = job_done(&(struct order){.verb = VERIFY, .base = tail_of(scene, g), .size = WORD, .value = scene->tails[g]});
        if (all.rc < 0 || tail.rc < 0 || all.value != 0 || tail.value != 0) {
            fprintf(stderr, "%s: granule %u: rc %d, %d; %lu and %lu words are wrong\n", doing, g, all.rc, tail.rc, all.value, tail.value);
            wrong++;
        }
    }
    return wrong;
}

static void a_child_has_all_of_it(void) {
    struct scene scene;
    scattered_scene(&scene, GRANULE);
    for (uint32_t round = 0; round < 20; round++) {
        int gate[2];
        char go;
        step("fork, round %u", round);
        CHECK(pipe(gate) == 0);
        pid_t child = fork();
        if (child == 0) { /* first and once more, when the parent has gone on: what is the child's does not change */
            int wrong = contents_differ(&scene);
            wrong += read(gate[0], &go, 1) != 1;
            _exit(wrong + contents_differ(&scene) ? 1 : 0);
        }
        for (uint32_t g = 0; g < PLACES; g++) {
            touch(&scene, (g + round) % PARTIES, g); /* pages that are shared with a child do not move just so */
        }
        CHECK(write(gate[1], "", 1) == 1);
        must_end_well(child);
        (void)close(gate[0]);
        (void)close(gate[1]);
        all_is_well(&scene);
    }
    scene_close(&scene);
}

/* Devices write all the time: whatever the child sees, it is not nothing. */
static void a_child_of_a_busy_parent(void) {
    struct scene scene;
    scene_open(&scene, 4 * KIB, GRANULES_MAX, CREW, 0);
    for (uint32_t g = 0; g < GRANULES_MAX; g++) {
        put(&scene, 1 + g % CREW, g);
    }
    for (uint32_t round = 0; round < 15; round++) {
        step("fork while devices write, round %u", round);
        for (uint32_t party = 1; party <= CREW; party++) {
            worker_begin(&crew[party], 0, &(struct order){.verb = FILL, .base = scene.held.base, .size = scene.held.size, .value = last_version + party});
        }
        pid_t child = fork();
        if (child == 0) {
            int zeros = 0;
            for (uint32_t g = 0; g < GRANULES_MAX; g++) {
                zeros += job_done(&(struct order){.verb = LOAD, .base = address_of(&scene, g)}).value == 0;
            }
            _exit(zeros ? 1 : 0);
        }
        must_end_well(child);
        for (uint32_t party = 1; party <= CREW; party++) {
            CHECK(worker_finish(&crew[party], 0).rc == 0);
        }
        last_version += CREW;
    }
    scene_close(&scene);
}

/* ---- death -------------------------------------------------------------------------------------------------------------------------------- */

static void must_come_home(const struct scene *scene, uint32_t dead) {
    for (uint32_t g = 0; g < scene->granules;) {
        g += !(where_is(scene, g) & dead); /* not yet: look again. The alarm ends it */
    }
}

/* Everything that the dead held alone is on the host, in whatever way they held it. */
static void the_dead_take_nothing_along(void) {
    for (size_t granule = 4 * KIB; granule <= 256 * KIB; granule *= 8) {
        for (uint32_t dying = FIRST; dying <= (FIRST | SECOND); dying += FIRST) {
            struct scene scene;
            scattered_scene(&scene, granule);
            for (uint32_t g = 4; g < PLACES; g += 6) { /* devices read, and the host does not */
                put(&scene, 1, g);
                see(&scene, 2, g);
            }
            step("granules of 0x%zx: death of 0x%x", granule, dying);
            for (uint32_t party = 1; party <= CREW; party++) {
                if (dying >> party & 1) {
                    worker_kill(&crew[party]);
                }
            }
            for (uint32_t g = 0; g < PLACES; g++) {
                see(&scene, 0, g);
            }
            must_come_home(&scene, dying);
            all_is_well(&scene);
            for (uint32_t party = 1; party <= CREW; party++) {
                if (crew[party].dead) {
                    CHECK(uvas_prefetch(scene.held.id, 0, granule, scene.devices[party], NULL) == -ESRCH);
                    detach(&scene, party);
                }
            }
            step("granules of 0x%zx: others come in place of 0x%x", granule, dying);
            crew_alive(CREW);
            for (uint32_t party = 1; party <= CREW; party++) {
                if (!scene.devices[party]) {
                    attach(&scene, party, 0);
                }
            }
            scatter(&scene);
            all_is_well(&scene);
            scene_close(&scene);
        }
    }
}

/* A device dies while it adds: what it had added is there, and everybody else's additions. */
static void death_at_work(void) {
    for (uint32_t round = 0; round < 20; round++) {
        struct scene scene;
        uint64_t before = 0;
        step("death at work, round %u", round);
        scene_open(&scene, 4 * KIB, 2, CREW, 0);
        struct order add = {.verb = ADD, .base = address_of(&scene, 0), .count = UINT64_MAX};
        worker_begin(&crew[1], 0, &add);
        worker_begin(&crew[2], 0, &(struct order){.verb = ADD, .base = add.base, .count = 1000});
        while (before < 500) {
            before = __atomic_load_n((uint64_t *)add.base, __ATOMIC_RELAXED);
        }
        worker_kill(&crew[1]);
        CHECK(worker_finish(&crew[1], 0).rc == -ESRCH && worker_finish(&crew[2], 0).rc == 0);
        uint64_t after = __atomic_load_n((uint64_t *)add.base, __ATOMIC_RELAXED);
        CHECK(after >= before);
        (void)must_do(2, &(struct order){.verb = ADD, .base = add.base, .count = 1000});
        CHECK(__atomic_load_n((uint64_t *)add.base, __ATOMIC_RELAXED) == after + 1000);
        scene_close(&scene);
    }
}

/* ---- nothing is left ---------------------------------------------------------------------------------------------------------------------- */

static size_t entries_of(const char *path) {
    size_t count = 0;
    DIR *directory = opendir(path);
    CHECK(directory != NULL);
    while (readdir(directory)) {
        count++;
    }
    (void)closedir(directory);
    return count;
}

static void nothing_is_left(void) {
    struct scene scene;
    crew_alive(CREW);
    size_t descriptors = entries_of("/proc/self/fd"), threads = entries_of("/proc/self/task");
    for (uint32_t round = 0; round < 10; round++) {
        step("spaces that come and go, round %u", round);
        scattered_scene(&scene, GRANULE);
        scene_close(&scene); /* with everything where it is */
        CHECK(entries_of("/proc/self/fd") == descriptors);
    }
    for (uint32_t round = 0; entries_of("/proc/self/task") != threads; round++) { /* a joined thread is in /proc for a moment yet */
        CHECK(round < 1000);
        (void)usleep(1000);
    }
}

int main(int count, char **arguments) {
    static const struct test tests[] = {
        {"decommit_takes_it_from_all", decommit_takes_it_from_all},
        {"memory_goes_under_its_users", memory_goes_under_its_users},
        {"release_under_its_users", release_under_its_users},
        {"protection_holds_for_all", protection_holds_for_all},
        {"the_kernel_reads_and_writes_it", the_kernel_reads_and_writes_it},
        {"devices_come_and_go", devices_come_and_go},
        {"spaces_are_apart", spaces_are_apart},
        {"demands_on_devices", demands_on_devices},
        {"a_child_has_all_of_it", a_child_has_all_of_it},
        {"a_child_of_a_busy_parent", a_child_of_a_busy_parent},
        {"the_dead_take_nothing_along", the_dead_take_nothing_along},
        {"death_at_work", death_at_work},
        {"nothing_is_left", nothing_is_left},
    };
    return run_with_a_crew(count, arguments, tests, sizeof tests / sizeof *tests);
}
