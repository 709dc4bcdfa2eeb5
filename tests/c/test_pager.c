/* test_pager.c: the protocol, seen from outside: every state of a granule among three parties, everything that can be done to it in that state, who has it
 * afterwards, what was moved for it, and that all see the bytes that were written last. Then advice, capacity, and the pins of user and kernel.
 *
 *   test_pager [name of one test]
 */
#define _GNU_SOURCE
#include "granules.h"

static const size_t granule_sizes[] = {4 * KIB, 64 * KIB, 512 * KIB};

/* ---- every state, every event ------------------------------------------------------------------------------------------------------------ */

struct state {
    uint32_t holders; /* more than one: each reads */
    uint32_t writer;  /* the party that wrote last; it reads with the others */
};

static const struct state states[] = {{0, 0}, {HOST, 0}, {FIRST, 1}, {SECOND, 2}, {HOST | FIRST, 0}, {HOST | FIRST, 1}, {FIRST | SECOND, 1}, {FIRST | SECOND, 2},
                                      {HOST | SECOND, 2}, {ALL, 0}, {ALL, 1}, {ALL, 2}};
#define STATES (sizeof states / sizeof *states)
#define PLACES 50u /* granules, used in turns */

enum event { READS, WRITES, WRITES_ALL, PREFETCHED, COPIED, DISCARDED, PINNED, EVENTS };
static const char *const event_names[EVENTS] = {"reads", "writes a word", "writes all", "gets it", "gets a copy", "discards", "pins"};

static void bring_into(struct scene *scene, uint32_t g, struct state state) {
    if (state.holders == 0) {
        CHECK_OK(uvas_discard(scene->held.id, g * scene->granule, scene->granule));
        forgotten(scene, g, g + 1);
    } else {
        put(scene, state.writer, g);
    }
    for (uint32_t party = 0; party < PARTIES; party++) {
        if (state.holders >> party & 1) {
            see(scene, party, g);
        }
    }
    must_be(scene, g, state.holders);
}

static void do_event(struct scene *scene, uint32_t g, enum event event, uint32_t party) {
    size_t offset = g * scene->granule;
    uint32_t once = event == COPIED ? UVAS_ADVISE_READ_MOSTLY : UVAS_ADVISE_NOTHING;
    struct uvas_pin pin;
    switch (event) {
    case READS:
        see(scene, party, g);
        break;
    case WRITES:
        touch(scene, party, g);
        break;
    case WRITES_ALL:
        put(scene, party, g);
        break;
    case DISCARDED:
        CHECK_OK(uvas_discard(scene->held.id, offset, scene->granule));
        forgotten(scene, g, g + 1);
        break;
    case PINNED:
        CHECK_OK(uvas_pin_host(scene->held.id, offset, scene->granule, &pin));
        must_be(scene, g, HOST);
        CHECK_OK(uvas_unpin_host(&pin));
        break;
    default:
        CHECK_OK(uvas_advise(scene->held.id, offset, scene->granule, once, 0));
        CHECK_OK(uvas_prefetch(scene->held.id, offset, scene->granule, scene->devices[party], NULL));
    }
}

static uint32_t expected(uint32_t holders, enum event event, uint32_t party) {
    uint32_t mine = 1u << party;
    return event == DISCARDED ? 0 : event == PINNED ? HOST : event == READS || event == COPIED ? holders | mine : mine;
}

/* A granule's bytes travel once, to who did not have them, from one who did. */
static void must_have_moved(const struct scene *scene, const struct uvas_movement *before, uint32_t holders, enum event event, uint32_t party) {
    struct uvas_movement now = movement_of(scene);
    uint32_t to = event == DISCARDED ? PARTIES : event == PINNED ? 0 : party;
    bool moves = holders != 0 && to < PARTIES && !(holders >> to & 1);
    uint64_t left = 0;
    for (uint32_t i = 0; i < now.count; i++) {
        bool gets = moves && now.parties[i].device == scene->devices[to];
        CHECK(now.parties[i].bytes_in - before->parties[i].bytes_in == (gets ? scene->granule : 0));
        left += now.parties[i].bytes_out - before->parties[i].bytes_out;
    }
    CHECK(left == (moves ? scene->granule : 0));
}

static void each_event(struct scene *scene, uint32_t *g, enum event event) {
    bool anybodys = event == DISCARDED || event == PINNED;
    for (size_t s = 0; s < STATES; s++) {
        for (uint32_t party = 0; party < (anybodys ? 1 : PARTIES); party++, *g = (*g + 3) % PLACES) { /* apart: nothing is a stream */
            step("granules of 0x%zx: held by 0x%x, written by %u; party %u %s", scene->granule, states[s].holders, states[s].writer, party, event_names[event]);
            bring_into(scene, *g, states[s]);
            struct uvas_movement before = movement_of(scene);
            do_event(scene, *g, event, party);
            must_be(scene, *g, expected(states[s].holders, event, party));
            must_have_moved(scene, &before, states[s].holders, event, party);
        }
    }
}

static void every_event_in_every_state(void) {
    for (size_t i = 0; i < sizeof granule_sizes / sizeof *granule_sizes; i++) {
        struct scene scene;
        uint32_t g = 0;
        scene_open(&scene, granule_sizes[i], PLACES, CREW, 0);
        CHECK_OK(uvas_prefetch(scene.held.id, 0, scene.granule, scene.devices[1], NULL)); /* from now on its memory is watched */
        for (enum event event = READS; event < EVENTS; event++) {
            each_event(&scene, &g, event);
        }
        step("granules of 0x%zx: all of them afterwards", scene.granule);
        all_is_well(&scene);
        scene_close(&scene);
    }
}

/* What nobody has written reads as zeros for whoever looks first, and what one page of a granule holds is not lost for its other pages being holes. */
static void holes_are_zeros(void) {
    struct scene scene;
    scene_open(&scene, 64 * KIB, 16, CREW, 0);
    step("holes");
    for (uint32_t g = 0; g < 16; g += 2) { /* before anything is watched: one page of sixteen */
        uintptr_t at = address_of(&scene, g) + 5 * 4096;
        (void)must_do(0, &(struct order){.verb = STORE, .base = at, .value = g + 1});
    }
    for (uint32_t g = 0; g < 16; g++) {
        for (uint32_t turn = 0; turn < PARTIES; turn++) {
            uint32_t party = (g + turn) % PARTIES;
            for (uint32_t page = 0; page < 16; page++) {
                struct answer seen = party_do(party, &(struct order){.verb = LOAD, .base = address_of(&scene, g) + page * 4096});
                CHECK(seen.rc == 0 && seen.value == (page == 5 && g % 2 == 0 ? g + 1 : 0));
            }
        }
    }
    scene_close(&scene);
}

/* ---- prefetch and advice ------------------------------------------------------------------------------------------------------------------ */

static void prefetch_says_what_moved(void) {
    struct scene scene;
    struct uvas_moved moved;
    scene_open(&scene, 64 * KIB, 256, CREW, 0);
    for (uint32_t g = 0; g < 256; g++) {
        put(&scene, 0, g);
    }
    for (uint32_t round = 0; round < 6; round++) {
        uint32_t party = 2 - round % PARTIES;
        step("prefetch of 16 MiB to party %u", party);
        CHECK_OK(uvas_prefetch(scene.held.id, 0, scene.held.size, scene.devices[party], &moved));
        CHECK(moved.bytes == scene.held.size && moved.stayed_count == 0);
        CHECK_OK(uvas_prefetch(scene.held.id, 0, scene.held.size, scene.devices[party], &moved));
        CHECK(moved.bytes == 0);
        for (uint32_t g = 0; g < 256; g++) {
            must_be(&scene, g, 1u << party);
        }
        where_is_true(&scene);
        touch(&scene, (party + 1) % PARTIES, 37 * round + 3);
        CHECK_OK(uvas_prefetch(scene.held.id, 0, scene.held.size, scene.devices[party], &moved));
        CHECK(moved.bytes == scene.granule);
    }
    all_is_well(&scene);
    scene_close(&scene);
}

static void advice_is_taken(void) {
    struct scene scene;
    scene_open(&scene, 64 * KIB, 8, CREW, 0);
    for (uint32_t g = 0; g < 8; g++) {
        put(&scene, 0, g);
    }
    step("accessed by the second: it keeps a copy when the first gets it");
    CHECK_OK(uvas_prefetch(scene.held.id, 0, scene.granule, scene.devices[2], NULL));
    CHECK_OK(uvas_advise(scene.held.id, 0, scene.granule, UVAS_ADVISE_ACCESSED_BY, scene.devices[2]));
    CHECK_OK(uvas_prefetch(scene.held.id, 0, scene.granule, scene.devices[1], NULL));
    must_be(&scene, 0, FIRST | SECOND);
    step("advice taken back");
    CHECK_OK(uvas_advise(scene.held.id, 0, scene.granule, UVAS_ADVISE_NOTHING, 0));
    CHECK_OK(uvas_prefetch(scene.held.id, 0, scene.granule, scene.devices[1], NULL));
    must_be(&scene, 0, FIRST);
    CHECK(uvas_advise(scene.held.id, 0, scene.granule, 17, 0) == -EINVAL);
    CHECK(uvas_advise(scene.held.id, 0, scene.granule, UVAS_ADVISE_ACCESSED_BY, scene.held.id) < 0);
    all_is_well(&scene);
    scene_close(&scene);
}

/* A device reads granule after granule: more and more come at once, so there are fewer faults than granules. */
static void streams_are_fetched_ahead(void) {
    struct scene scene;
    scene_open(&scene, 4 * KIB, 2048, 1, 0);
    for (uint32_t g = 0; g < 2048; g++) {
        put(&scene, 0, g);
    }
    step("a stream");
    for (uint32_t g = 0; g < 2048; g++) {
        see(&scene, 1, g);
    }
    CHECK(traffic_of(&scene, 1).read_faults < 64);
    CHECK(traffic_of(&scene, 1).bytes_in == scene.held.size);
    all_is_well(&scene);
    scene_close(&scene);
}

/* ---- capacity ------------------------------------------------------------------------------------------------------------------------------ */

static void must_fit(const struct scene *scene, uint32_t capacity) {
    CHECK(traffic_of(scene, 1).resident_bytes <= capacity * scene->granule);
}

/* Modified data that a device has no room for goes home, and is read again from there. */
static void eviction_writes_back(void) {
    for (uint32_t capacity = 1; capacity <= 64; capacity *= 4) {
        struct scene scene;
        uint64_t random = capacity;
        scene_open(&scene, 16 * KIB, 128, CREW, capacity);
        step("a device with room for %u granules of 128", capacity);
        for (uint32_t i = 0; i < 600; i++) {
            uint32_t g = (uint32_t)(next_random(&random) % 128), party = (uint32_t)(next_random(&random) % 8) % 5;
            party = party > 2 ? 1 : party;
            if (next_random(&random) % 2) {
                touch(&scene, party, g);
            } else {
                see(&scene, party, g);
            }
            must_fit(&scene, capacity);
        }
        struct uvas_traffic device = traffic_of(&scene, 1);
        CHECK(device.evictions > 0 && device.capacity == capacity * scene.granule);
        all_is_well(&scene);
        CHECK(uvas_prefetch(scene.held.id, 0, (capacity + 1) * scene.granule, scene.devices[1], NULL) == -ENOMEM);
        CHECK_OK(uvas_prefetch(scene.held.id, 0, capacity * scene.granule, scene.devices[1], NULL));
        for (uint32_t g = 0; g < capacity; g++) {
            must_be(&scene, g, FIRST); /* nothing that it brought was pushed out by what it brought later */
        }
        all_is_well(&scene);
        scene_close(&scene);
    }
}

/* What a device prefers is not what leaves it, as long as other things can. */
static void preferred_stays(void) {
    struct scene scene;
    scene_open(&scene, 16 * KIB, 64, 1, 16);
    step("preferred");
    CHECK_OK(uvas_advise(scene.held.id, 0, 4 * scene.granule, UVAS_ADVISE_PREFERRED, scene.devices[1]));
    for (uint32_t g = 0; g < 64; g++) {
        put(&scene, 1, g);
    }
    for (uint32_t g = 0; g < 4; g++) {
        must_be(&scene, g, FIRST);
    }
    must_fit(&scene, 16);
    all_is_well(&scene);
    scene_close(&scene);
}

/* ---- pins ---------------------------------------------------------------------------------------------------------------------------------- */

/* While the host holds it pinned a device waits; nobody else does, and it goes on afterwards. */
static void who_wants_what_is_pinned_waits(void) {
    struct scene scene;
    struct uvas_pin pin;
    struct uvas_moved moved;
    scene_open(&scene, 64 * KIB, 8, CREW, 0);
    for (uint32_t g = 0; g < 8; g++) {
        put(&scene, 1, g);
    }
    CHECK_OK(uvas_pin_host(scene.held.id, 2 * scene.granule, 2 * scene.granule, &pin));
    step("a device wants what is pinned");
    uint64_t awaited = ++last_version;
    worker_begin(&crew[1], 0, &(struct order){.verb = STORE, .base = tail_of(&scene, 2), .value = pattern(tail_of(&scene, 2), awaited)});
    worker_begin(&crew[1], 1, &(struct order){.verb = VERIFY, .base = address_of(&scene, 4), .size = scene.granule, .value = scene.versions[4]});
    CHECK(worker_finish(&crew[1], 1).rc == 0); /* what is not pinned goes on */
    see(&scene, 0, 2);
    touch(&scene, 0, 3);
    CHECK(!worker_ended(&crew[1], 0, 20));
    CHECK(uvas_prefetch(scene.held.id, 0, scene.held.size, scene.devices[2], &moved) == -EBUSY);
    CHECK(moved.stayed_count == 1 && moved.stayed[0].base == address_of(&scene, 2) && moved.stayed[0].size == 2 * scene.granule && moved.why == -EBUSY);
    must_be(&scene, 2, HOST);
    CHECK(uvas_decommit(scene.held.id, 2 * scene.granule, scene.granule) == -EBUSY && uvas_release(scene.held.id) == -EBUSY);
    CHECK(strstr(uvas_last_failure()->text, "pin_host"));
    step("a pin that fails leaves what it was given");
    struct uvas_pin untouched, other;
    memset(&untouched, 0x5a, sizeof untouched);
    other = untouched;
    CHECK_OK(uvas_protect(scene.held.id, 6 * scene.granule, scene.granule, UVAS_NONE));
    CHECK(uvas_pin_host(scene.held.id, 6 * scene.granule, scene.granule, &other) == -EINVAL && memcmp(&other, &untouched, sizeof other) == 0);
    CHECK(uvas_pin_host(scene.held.id, scene.held.size, 1, &other) == -EINVAL && memcmp(&other, &untouched, sizeof other) == 0);
    CHECK_OK(uvas_protect(scene.held.id, 6 * scene.granule, scene.granule, UVAS_READ | UVAS_WRITE));
    step("it gets it when it is pinned no more");
    CHECK_OK(uvas_unpin_host(&pin));
    CHECK(uvas_unpin_host(&pin) == -EINVAL);
    CHECK(worker_finish(&crew[1], 0).rc == 0);
    scene.tails[2] = awaited;
    must_be(&scene, 2, FIRST);
    all_is_well(&scene);
    scene_close(&scene);
}

#define IO_URING_SETUP 425
#define IO_URING_REGISTER 427

/* Pages that the kernel holds for I/O do not move; a device that wants one waits, and what the I/O writes is seen. -1: no io_uring here. */
static int pinned_by_kernel(uintptr_t base, size_t size) {
    uint8_t parameters[120] = {0};
    struct iovec buffer = {.iov_base = (void *)base, .iov_len = size};
    int ring = (int)syscall(IO_URING_SETUP, 1, parameters);
    if (ring >= 0 && syscall(IO_URING_REGISTER, ring, 0, &buffer, 1) < 0) {
        (void)close(ring);
        ring = -1;
    }
    return ring;
}

static void what_the_kernel_pins_stays(void) {
    struct scene scene;
    struct uvas_moved moved;
    uint32_t features;
    scene_open(&scene, 64 * KIB, 8, 1, 0);
    for (uint32_t g = 0; g < 8; g++) {
        put(&scene, 0, g);
    }
    CHECK_OK(uvas_private_memory(&features));
    int ring = features & UVAS_PRIVATE_PINNED ? pinned_by_kernel(address_of(&scene, 3) + 8192, 4096) : -1;
    if (ring < 0) {
        printf("skipped what_the_kernel_pins_stays: no io_uring (%s), or a kernel that cannot move pages\n", strerror(errno));
        scene_close(&scene);
        return;
    }
    step("one page of eight granules is pinned by the kernel");
    CHECK(uvas_prefetch(scene.held.id, 0, scene.held.size, scene.devices[1], &moved) == -EBUSY);
    CHECK(moved.stayed_count == 1 && moved.stayed[0].base == address_of(&scene, 3) && moved.stayed[0].size == scene.granule && moved.why == -EBUSY);
    must_be(&scene, 3, HOST);
    must_be(&scene, 4, FIRST);
    worker_begin(&crew[1], 0, &(struct order){.verb = VERIFY, .base = address_of(&scene, 3), .size = WORD, .value = scene.versions[3]});
    CHECK(!worker_ended(&crew[1], 0, 20));
    touch(&scene, 0, 3);
    (void)close(ring);
    step("pinned no more");
    struct answer seen = worker_finish(&crew[1], 0);
    CHECK(seen.rc == 0 && seen.value == 0);
    all_is_well(&scene);
    scene_close(&scene);
}

/* ---- one word, one store ------------------------------------------------------------------------------------------------------------------- */

/* Atomic additions by all, on words of one granule: exact. */
static void additions_are_exact(void) {
    for (size_t i = 0; i < sizeof granule_sizes / sizeof *granule_sizes; i++) {
        struct scene scene;
        scene_open(&scene, granule_sizes[i], 2, CREW, 0);
        step("additions in a granule of 0x%zx", scene.granule);
        struct order add = {.verb = ADD, .base = address_of(&scene, 1), .count = 20000};
        for (uint32_t party = 1; party <= CREW; party++) {
            for (int line = 0; line < WORKER_LINES; line++) {
                worker_begin(&crew[party], line, &add);
            }
        }
        (void)must_do(0, &add);
        for (uint32_t party = 1; party <= CREW; party++) {
            for (int line = 0; line < WORKER_LINES; line++) {
                CHECK(worker_finish(&crew[party], line).rc == 0);
            }
        }
        CHECK(party_do(0, &(struct order){.verb = LOAD, .base = add.base}).value == 5 * add.count);
        scene_close(&scene);
    }
}

static uint64_t moves_of(const struct scene *scene) {
    uint64_t moves = 0;
    for (uint32_t party = 0; party < PARTIES; party++) {
        moves += traffic_of(scene, party).bytes_in / scene->granule;
    }
    return moves;
}

/* However many want it, a granule stays where it came for the time that its size is worth: a microsecond for each KiB. */
static void grants_are_kept(void) {
    struct scene scene;
    scene_open(&scene, 2 * MIB, 2, CREW, 0);
    put(&scene, 0, 1);
    for (uint32_t round = 0; round < 20; round++) {
        step("all want a large granule, round %u", round);
        struct order add = {.verb = ADD, .base = address_of(&scene, 1), .count = 2000000};
        uint64_t before = moves_of(&scene);
        double began = seconds_now();
        worker_begin(&crew[1], 0, &add);
        worker_begin(&crew[2], 0, &add);
        (void)must_do(0, &add);
        CHECK(worker_finish(&crew[1], 0).rc == 0 && worker_finish(&crew[2], 0).rc == 0);
        double moves = (double)(moves_of(&scene) - before), spent_us = (seconds_now() - began) * 1e6;
        CHECK(moves >= 1 && (moves - 1) * (double)(scene.granule / KIB) <= spent_us);
    }
    scene_close(&scene);
}

static void all_at_once(const struct order *order) {
    for (uint32_t party = 1; party <= CREW; party++) {
        for (int line = 0; line < WORKER_LINES; line++) {
            worker_begin(&crew[party], line, order);
        }
    }
    (void)must_do(0, order);
    for (uint32_t party = 1; party <= CREW; party++) {
        for (int line = 0; line < WORKER_LINES; line++) {
            CHECK(worker_finish(&crew[party], line).rc == 0);
        }
    }
}

/* Instructions that need two granules, by all at once: everybody gets on. */
static void who_needs_two_granules_gets_on(void) {
    struct scene scene;
    scene_open(&scene, 4 * KIB, 64, CREW, 0);
    step("stores across the border of two granules");
    all_at_once(&(struct order){.verb = ACROSS, .base = address_of(&scene, 2) - 4, .count = 1000000, .value = UINT64_C(0x0000000100000001)});
    step("words copied between two granules");
    all_at_once(&(struct order){.verb = COPY_WORD, .base = address_of(&scene, 7), .size = 40 * scene.granule, .count = 1000000});
    scene_close(&scene);
}

int main(int count, char **arguments) {
    static const struct test tests[] = {
        {"every_event_in_every_state", every_event_in_every_state},
        {"holes_are_zeros", holes_are_zeros},
        {"prefetch_says_what_moved", prefetch_says_what_moved},
        {"advice_is_taken", advice_is_taken},
        {"streams_are_fetched_ahead", streams_are_fetched_ahead},
        {"eviction_writes_back", eviction_writes_back},
        {"preferred_stays", preferred_stays},
        {"who_wants_what_is_pinned_waits", who_wants_what_is_pinned_waits},
        {"what_the_kernel_pins_stays", what_the_kernel_pins_stays},
        {"additions_are_exact", additions_are_exact},
        {"grants_are_kept", grants_are_kept},
        {"who_needs_two_granules_gets_on", who_needs_two_granules_gets_on},
    };
    return run_with_a_crew(count, arguments, tests, sizeof tests / sizeof *tests);
}
