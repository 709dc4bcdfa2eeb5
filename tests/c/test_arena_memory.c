/* test_arena_memory.c: what stands behind an arena's addresses: memory is committed as it is needed and given back, blocks are never touched,
 * bookkeeping is small, guards fault, poison shows, pages are as large and as near as was asked, a bare arena commits nothing.
 *
 *   test_arena_memory [name of one test]
 */
#define _GNU_SOURCE
#include "blocks.h"

#include <sys/mman.h>
#include <sys/syscall.h>

#define MANY 4096
#define HUGE_PAGES "/proc/sys/vm/nr_hugepages"

static void nap(void) { (void)nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL); }

/* ---- blocks are not touched ------------------------------------------------------------------------------------------------ */

static size_t some_size(size_t i) { return i % 16 == 0 ? 70000 + i : i % 5 == 0 ? 4096 : 1 + i * 37 % 3000; }

/* What nobody has written to is not there, however often it has been allocated, looked up and freed. */
static void memory_comes_with_the_first_write(void) {
    struct scene scene = fixed_scene(512 * MIB, &(struct uvas_arena_options){.idle_ns = UINT64_MAX});
    static uintptr_t held[MANY];
    for (int round = 0; round < 3; round++) {
        for (size_t i = 0; i < MANY; i++) {
            struct uvas_allocation found;
            held[i] = must_alloc(scene.arena, some_size(i), 0);
            CHECK_OK(uvas_find_allocation(held[i] + 5, &found));
        }
        struct uvas_arena_stats now = stats_of(scene.arena);
        CHECK(now.committed_bytes >= now.live_bytes && now.resident_bytes == 0);
        in_order(&scene);
        for (size_t i = 0; i < MANY; i++) {
            CHECK_OK(uvas_free(scene.arena, held[i * 5 % MANY]));
        }
        CHECK(stats_of(scene.arena).resident_bytes == 0);
    }
    end_scene(&scene);
}

static void protect_pieces(const struct scene *scene, uint32_t protection) {
    struct uvas_piece pieces[64];
    size_t count = 0, offset = 0;
    do {
        CHECK_OK(uvas_pieces(scene->held.id, offset, pieces, 64, &count));
        for (size_t i = 0; i < count; i++) {
            CHECK_OK(uvas_protect(scene->held.id, pieces[i].offset, pieces[i].size, protection));
            offset = pieces[i].offset + pieces[i].size;
        }
    } while (count == 64);
}

/* Nor is it read: with the memory out of reach all goes on as before. */
static void works_on_memory_out_of_reach(void) {
    struct scene scene = fixed_scene(512 * MIB, &(struct uvas_arena_options){.idle_ns = UINT64_MAX});
    static uintptr_t held[MANY];
    static size_t sizes[MANY];
    for (size_t i = 0; i < MANY; i++) {
        held[i] = must_alloc(scene.arena, some_size(i), 0);
        sizes[i] = usable(scene.arena, held[i]);
        write_pattern(held[i], sizes[i], i);
    }
    protect_pieces(&scene, UVAS_NONE);
    for (int round = 0; round < 2; round++) {
        for (size_t i = 0; i < MANY; i += 2) {
            struct uvas_allocation found;
            CHECK_OK(uvas_find_allocation(held[i] + sizes[i] - 1, &found));
            CHECK(found.base == held[i]);
            CHECK_OK(uvas_free(scene.arena, held[i]));
            CHECK(uvas_free(scene.arena, held[i]) == -EINVAL);
        }
        for (size_t i = 0; i < MANY; i += 2) {
            held[i] = must_alloc(scene.arena, some_size(i), 0);
            sizes[i] = usable(scene.arena, held[i]);
        }
        in_order(&scene);
    }
    protect_pieces(&scene, UVAS_READ | UVAS_WRITE);
    for (size_t i = 1; i < MANY; i += 2) {
        verify_pattern(held[i], sizes[i], i);
    }
    protect_pieces(&scene, UVAS_NONE);
    for (size_t i = 0; i < MANY; i++) {
        CHECK_OK(uvas_free(scene.arena, held[i]));
    }
    CHECK_OK(uvas_arena_trim(scene.arena, NULL));
    end_scene(&scene);
}

/* ---- bookkeeping ----------------------------------------------------------------------------------------------------------- */

static size_t own_resident_bytes(void) {
    size_t size = 0, resident = 0;
    FILE *statm = fopen("/proc/self/statm", "r");
    CHECK(statm != NULL && fscanf(statm, "%zu %zu", &size, &resident) == 2);
    (void)fclose(statm);
    return resident * PAGE;
}

/* As the arena says and, since the blocks are never touched, as the kernel says of this process. */
static void bookkeeping_is_small(void) {
    static const struct {
        size_t size, count;
    } kinds[] = {{16, 1000000}, {64, 1000000}, {129, 400000}, {1000, 200000}, {2500, 100000}, {3000, 100000}, {4095, 100000}, {4096, 200000}, {4097, 200000},
                 {20000, 60000}, {65536, 20000}, {65537, 20000}, {300000, 5000}};
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        struct scene scene = growing_scene(&(struct uvas_arena_options){.idle_ns = UINT64_MAX});
        uintptr_t *held = malloc(kinds[k].count * sizeof *held);
        CHECK(held != NULL);
        memset(held, 1, kinds[k].count * sizeof *held);
        size_t before = own_resident_bytes();
        for (size_t i = 0; i < kinds[k].count; i++) {
            held[i] = must_alloc(scene.arena, kinds[k].size, 0);
        }
        size_t grown = own_resident_bytes() - before;
        struct uvas_arena_stats now = stats_of(scene.arena);
        CHECK(now.live_blocks == kinds[k].count);
        uint64_t most = kinds[k].size >= 4096 ? now.live_bytes * 15 / 1000 : 16 * now.live_blocks;
        printf("   %zu blocks of %zu: %.2f bytes each, %.3f %% (in RAM %.3f %%)\n", kinds[k].count, kinds[k].size,
               (double)now.metadata_bytes / (double)now.live_blocks, 100.0 * (double)now.metadata_bytes / (double)now.live_bytes,
               100.0 * (double)grown / (double)now.live_bytes);
        (void)fflush(stdout);
        CHECK(now.metadata_bytes <= most);
#ifndef __SANITIZE_ADDRESS__
#ifndef __SANITIZE_THREAD__
        CHECK(grown <= now.metadata_bytes + MIB); /* and it is the truth */
#endif
#endif
        for (size_t i = 0; i < kinds[k].count; i++) {
            CHECK_OK(uvas_free(scene.arena, held[i]));
        }
        free(held);
        end_scene(&scene);
    }
}

/* ---- giving back ----------------------------------------------------------------------------------------------------------- */

static void trim_gives_memory_back(void) {
    struct scene scene = fixed_scene(64 * MIB, &(struct uvas_arena_options){.idle_ns = UINT64_MAX});
    uintptr_t held[1000];
    for (int round = 0; round < 3; round++) {
        for (size_t i = 0; i < 1000; i++) {
            held[i] = must_alloc(scene.arena, i % 10 ? 1000 + i : 100000, 0);
            write_pattern(held[i], usable(scene.arena, held[i]), i);
        }
        struct uvas_arena_stats full = stats_of(scene.arena), now;
        CHECK(full.resident_bytes > 0 && full.committed_bytes == bytes_in_pieces(scene.held.id));
        for (size_t i = 0; i < 1000; i++) {
            CHECK_OK(uvas_free(scene.arena, held[i]));
        }
        uint64_t bytes = UNTOUCHED, committed = stats_of(scene.arena).committed_bytes;
        CHECK_OK(uvas_arena_trim(scene.arena, &bytes));
        now = stats_of(scene.arena);
        CHECK(bytes == committed && now.committed_bytes == 0 && now.resident_bytes == 0 && now.used_bytes == 0);
        CHECK(bytes_in_pieces(scene.held.id) == 0);
        CHECK(now.reserved_bytes == full.reserved_bytes && now.largest_hole == 64 * MIB); /* the addresses are still held */
        struct uvas_found found;
        CHECK_OK(uvas_find(scene.held.base, &found));
        CHECK(found.id == scene.held.id);
        CHECK_OK(uvas_arena_trim(scene.arena, &bytes));
        CHECK(bytes == 0);
        in_order(&scene);
    }
    end_scene(&scene);
}

/* Spans in which a block lives stay, with what is in it, and nothing else. */
static void trim_leaves_what_lives(void) {
    struct scene scene = fixed_scene(64 * MIB, &(struct uvas_arena_options){.idle_ns = UINT64_MAX});
    uintptr_t held[512];
    for (size_t i = 0; i < 512; i++) {
        held[i] = must_alloc(scene.arena, 128 * KIB, 0);
        write_pattern(held[i], 128 * KIB, i);
    }
    CHECK(bytes_in_pieces(scene.held.id) == 64 * MIB);
    for (size_t i = 0; i < 512; i++) {
        if (i % 64) { /* eight are left, each in another span of 2 MiB */
            CHECK_OK(uvas_free(scene.arena, held[i]));
        }
    }
    uint64_t bytes = 0;
    CHECK_OK(uvas_arena_trim(scene.arena, &bytes));
    CHECK(bytes == 63 * MIB && stats_of(scene.arena).resident_bytes == MIB); /* spans, and the pages beside those that live */
    CHECK(bytes_in_pieces(scene.held.id) == 16 * MIB && stats_of(scene.arena).committed_bytes == 16 * MIB);
    in_order(&scene);
    uintptr_t again;
    CHECK_OK(uvas_alloc_zeroed(scene.arena, 5 * MIB, 0, &again));
    CHECK(all_bytes_are(again, 5 * MIB, 0));
    CHECK_OK(uvas_free(scene.arena, again));
    for (size_t i = 0; i < 512; i += 64) {
        verify_pattern(held[i], 128 * KIB, i);
        CHECK_OK(uvas_free(scene.arena, held[i]));
    }
    end_scene(&scene);
}

/* Also what was committed in advance, behind blocks that live. */
static void trim_leaves_nothing_behind_holes(void) {
    struct scene scene = growing_scene(&(struct uvas_arena_options){.growth = 4 * GIB, .idle_ns = UINT64_MAX});
    uintptr_t held[300];
    for (size_t i = 0; i < 300; i++) {
        held[i] = must_alloc(scene.arena, MIB, 0);
        write_pattern(held[i], MIB, i);
    }
    CHECK_OK(uvas_arena_trim(scene.arena, NULL));
    CHECK(stats_of(scene.arena).committed_bytes == 300 * MIB && stats_of(scene.arena).resident_bytes <= 300 * MIB);
    for (size_t i = 0; i < 300; i++) {
        verify_pattern(held[i], MIB, i);
        CHECK_OK(uvas_free(scene.arena, held[i]));
    }
    end_scene(&scene);
}

static uint64_t committed_after_naps(uvas_id arena, uint64_t until, int naps) {
    uint64_t committed = stats_of(arena).committed_bytes;
    for (int i = 0; i < naps && committed > until; i++) {
        nap();
        uintptr_t at = must_alloc(arena, 64, 0), large = must_alloc(arena, 400 * KIB, 0); /* whoever next comes by */
        CHECK_OK(uvas_free(arena, at));
        CHECK_OK(uvas_free(arena, large));
        committed = stats_of(arena).committed_bytes;
    }
    return committed;
}

static void what_is_idle_is_given_back(void) {
    static const uint64_t idle[] = {1000000, 200000000, UINT64_MAX};
    for (size_t k = 0; k < 3; k++) {
        struct scene scene = fixed_scene(128 * MIB, &(struct uvas_arena_options){.idle_ns = idle[k]});
        uintptr_t stays = must_alloc(scene.arena, 80 * KIB, 0), at = must_alloc(scene.arena, 100 * MIB, 0);
        write_pattern(stays, 80 * KIB, 1);
        write_pattern(at, 100 * MIB, 2);
        CHECK(stats_of(scene.arena).resident_bytes >= 100 * MIB);
        CHECK_OK(uvas_free(scene.arena, at));
        uint64_t left = committed_after_naps(scene.arena, 8 * MIB, idle[k] == UINT64_MAX ? 50 : 5000);
        CHECK(idle[k] == UINT64_MAX ? left >= 100 * MIB : left <= 8 * MIB);
        CHECK(idle[k] == UINT64_MAX || stats_of(scene.arena).resident_bytes <= 8 * MIB);
        verify_pattern(stays, 80 * KIB, 1);
        CHECK_OK(uvas_free(scene.arena, stays));
        in_order(&scene);
        end_scene(&scene);
    }
}

/* And not before: whatever is freed and allocated meanwhile. */
static void what_was_used_lately_stays(void) {
    struct scene scene = fixed_scene(256 * MIB, &(struct uvas_arena_options){.idle_ns = UINT64_C(60000000000)});
    uintptr_t held[128];
    for (size_t i = 0; i < 128; i++) {
        held[i] = must_alloc(scene.arena, MIB, 0);
        write_pattern(held[i], MIB, i);
    }
    for (size_t i = 0; i < 128; i++) { /* two that are a span, and then two elsewhere */
        CHECK_OK(uvas_free(scene.arena, held[(i / 2 * 22 + i % 2) % 128]));
        CHECK(stats_of(scene.arena).resident_bytes >= 128 * MIB / 2); /* the pages that were written */
    }
    uintptr_t again = must_alloc(scene.arena, 100 * KIB, 0);
    CHECK_OK(uvas_free(scene.arena, again));
    CHECK(stats_of(scene.arena).committed_bytes >= 128 * MIB);
    CHECK_OK(uvas_arena_trim(scene.arena, NULL));
    CHECK(stats_of(scene.arena).committed_bytes == 0);
    end_scene(&scene);
}

/* ---- bare addresses -------------------------------------------------------------------------------------------------------- */

static void a_bare_arena_commits_nothing(void) {
    struct scene scene = fixed_scene(64 * MIB, &(struct uvas_arena_options){.flags = UVAS_ARENA_BARE});
    uintptr_t held[200];
    for (int round = 0; round < 2; round++) {
        for (size_t i = 0; i < 200; i++) {
            held[i] = must_alloc(scene.arena, 1 + i * i * 5, i % 7 == 0 ? 64 * KIB : 0);
            struct uvas_allocation found;
            CHECK_OK(uvas_find_allocation(held[i], &found));
            CHECK(found.base == held[i] && found.arena == scene.arena);
        }
        CHECK(bytes_in_pieces(scene.held.id) == 0);
        CHECK(stats_of(scene.arena).committed_bytes == 0 && stats_of(scene.arena).resident_bytes == 0);
        in_order(&scene);
        for (size_t i = 0; i < 200; i++) {
            CHECK_OK(uvas_free(scene.arena, held[i]));
        }
        CHECK_OK(uvas_arena_trim(scene.arena, NULL));
        CHECK(bytes_in_pieces(scene.held.id) == 0);
    }
    end_scene(&scene);
}

static void descriptors_are_mapped_into_bare_blocks(void) {
    struct scene scene = fixed_scene(64 * MIB, &(struct uvas_arena_options){.flags = UVAS_ARENA_BARE});
    int fd = memfd_create("device", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)MIB) == 0);
    uintptr_t before = must_alloc(scene.arena, MIB, 0), at = must_alloc(scene.arena, MIB, 0), after = must_alloc(scene.arena, MIB, 0);
    struct uvas_mapping mapping = {.descriptor = fd, .sharing = UVAS_SHARED, .offset = at - scene.held.base, .size = MIB,
                                   .protection = UVAS_READ | UVAS_WRITE};
    CHECK_OK(uvas_map_fd(scene.held.id, &mapping));
    write_pattern(at, MIB, 1);
    uint64_t word = 0;
    CHECK(pread(fd, &word, 8, 8192) == 8 && word == word_of(at, 1, 1024));
    CHECK(bytes_in_pieces(scene.held.id) == MIB);
    CHECK_OK(uvas_free(scene.arena, before));
    CHECK_OK(uvas_free(scene.arena, after));
    CHECK_OK(uvas_arena_trim(scene.arena, NULL)); /* what the caller has mapped is the caller's */
    verify_pattern(at, MIB, 1);
    CHECK_OK(uvas_arena_check(scene.arena));
    CHECK_OK(uvas_decommit(scene.held.id, at - scene.held.base, MIB));
    CHECK_OK(uvas_free(scene.arena, at));
    (void)close(fd);
    end_scene(&scene);
}

/* ---- guards and poison ----------------------------------------------------------------------------------------------------- */

static void write_a_byte(void *address) {
    *(volatile char *)address = 1;
}

static void quiet_write(void *address) { /* without a sanitizer's report */
    (void)signal(SIGSEGV, SIG_DFL);
    (void)signal(SIGBUS, SIG_DFL);
    write_a_byte(address);
}

static bool faults(uintptr_t address) {
    int status = in_child(quiet_write, (void *)address);
    CHECK(ended_well(status) || (WIFSIGNALED(status) && (WTERMSIG(status) == SIGSEGV || WTERMSIG(status) == SIGBUS)));
    return !ended_well(status);
}

static void guards_fault(void) {
    struct scene scene = fixed_scene(64 * MIB, &(struct uvas_arena_options){.flags = UVAS_ARENA_GUARD, .idle_ns = UINT64_MAX});
    uintptr_t held[100], got;
    for (int round = 0; round < 3; round++) { /* over fresh pages, over used ones, over those given back */
        for (size_t i = 0; i < 100; i++) {
            held[i] = must_alloc(scene.arena, 70 * KIB + i * 1000, 0);
            write_pattern(held[i], usable(scene.arena, held[i]), i);
        }
        CHECK(mappings_in(scene.held.base, scene.held.size) <= 8); /* committed at different times, with huge pages and without, and what is not yet */
        for (size_t i = 0; i < 100; i++) {
            CHECK(i % 20 || (faults(held[i] + usable(scene.arena, held[i])) && !faults(held[i] + usable(scene.arena, held[i]) - 1)));
            verify_pattern(held[i], usable(scene.arena, held[i]), i);
        }
        CHECK_OK(uvas_arena_check(scene.arena));
        numbers_agree(scene.arena, true);
        for (size_t i = 0; i < 100; i++) {
            CHECK_OK(uvas_free(scene.arena, held[i * 7 % 100]));
        }
        if (round == 1) {
            CHECK_OK(uvas_arena_trim(scene.arena, NULL));
        }
        got = must_alloc(scene.arena, 32 * MIB, 0); /* over where guards had been: none is left */
        write_pattern(got, 32 * MIB, 1);
        verify_pattern(got, 32 * MIB, 1);
        CHECK(faults(got + 32 * MIB));
        CHECK_OK(uvas_realloc(scene.arena, got, 16 * MIB, &got)); /* the guard moves with the end, down and up */
        CHECK(faults(got + usable(scene.arena, got)));
        CHECK_OK(uvas_realloc(scene.arena, got, 24 * MIB, &got));
        write_pattern(got, 24 * MIB, 1);
        CHECK(faults(got + usable(scene.arena, got)));
        CHECK_OK(uvas_free(scene.arena, got));
        for (size_t i = 0; i < 100; i++) { /* slabs over them as well */
            held[i] = must_alloc(scene.arena, 30000, 0);
            write_pattern(held[i], 30000, i);
        }
        for (size_t i = 0; i < 100; i++) {
            CHECK_OK(uvas_free(scene.arena, held[i]));
        }
        CHECK_OK(uvas_alloc_zeroed(scene.arena, 40 * MIB, 0, &got));
        CHECK(all_bytes_are(got, 40 * MIB, 0));
        CHECK_OK(uvas_free(scene.arena, got));
    }
    end_scene(&scene);
}

static void guards_where_the_kernel_has_none(void) {
    CHECK_OK(uvas_test_kernel(UVAS_KERNEL_NATIVE, UVAS_LACK_GUARD));
    uvas_id space, got = UNTOUCHED;
    CHECK_OK(uvas_space_open(&(struct uvas_space_options){.name = "guardless"}, &space));
    struct uvas_arena_options options = {.space = space, .flags = UVAS_ARENA_GUARD};
    refused(uvas_arena_open(&options, &got), -ENOTSUP, got);
    CHECK(uvas_last_failure()->kind == UVAS_FAILURE_UNSUPPORTED && uvas_last_failure()->remedy[0] != '\0');
    options.flags = 0; /* all else works there */
    CHECK_OK(uvas_arena_open(&options, &got));
    uintptr_t at = must_alloc(got, 3 * MIB, 0);
    write_pattern(at, 3 * MIB, 1);
    CHECK_OK(uvas_free(got, at));
    CHECK_OK(uvas_arena_trim(got, NULL));
    CHECK_OK(uvas_arena_close(got));
    CHECK_OK(uvas_space_close(space));
    CHECK_OK(uvas_test_kernel(UVAS_KERNEL_NATIVE, 0));
}

static void poison_shows(void) {
    static const size_t sizes[] = {16, 100, 1000, 4096, 40000, 65536, 65537, 300000};
    struct scene scene = fixed_scene(64 * MIB, &(struct uvas_arena_options){.flags = UVAS_ARENA_POISON, .idle_ns = UINT64_MAX});
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        uintptr_t keeps_the_slab = must_alloc(scene.arena, sizes[i], 0), at = must_alloc(scene.arena, sizes[i], 0), next;
        size_t size = usable(scene.arena, at);
        write_pattern(keeps_the_slab, size, 1);
        memset((void *)at, 0x11, size);
        CHECK_OK(uvas_free(scene.arena, at));
        CHECK(all_bytes_are(at, size, 0xdf));
        verify_pattern(keeps_the_slab, size, 1);
        CHECK_OK(uvas_alloc_zeroed(scene.arena, sizes[i], 0, &next));
        CHECK(all_bytes_are(next, size, 0));
        CHECK_OK(uvas_free(scene.arena, next));
        CHECK_OK(uvas_free(scene.arena, keeps_the_slab));
        CHECK(uvas_free(scene.arena, at) == -EINVAL);
    }
    end_scene(&scene);
}

/* ---- what the memory is made of -------------------------------------------------------------------------------------------- */

/* A number of the mapping that holds an address, of /proc/self/smaps; or whether its VmFlags have a word: 1 or 0. -1: no such line. */
static long in_smaps(uintptr_t address, const char *key, const char *flag) {
    char line[1024];
    bool inside = false;
    long value = -1;
    FILE *smaps = fopen("/proc/self/smaps", "r");
    CHECK(smaps != NULL);
    while (value < 0 && fgets(line, sizeof line, smaps)) {
        uintptr_t start, end;
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2) {
            inside = start <= address && address < end;
        } else if (inside && strncmp(line, key, strlen(key)) == 0) {
            value = flag ? strstr(line, flag) != NULL : strtol(line + strlen(key), NULL, 10);
        }
    }
    (void)fclose(smaps);
    return value;
}

static void transparent_huge_pages_are_asked_for(void) {
    for (uint32_t pages = UVAS_PAGES_ANY; pages <= UVAS_PAGES_TRANSPARENT; pages++) {
        struct scene scene = growing_scene(&(struct uvas_arena_options){.pages = pages});
        uintptr_t small = must_alloc(scene.arena, 100, 0), middle = must_alloc(scene.arena, 3 * MIB, 0), at = must_alloc(scene.arena, 12 * MIB, 0);
        write_pattern(at, 12 * MIB, 1);
        CHECK(in_smaps(at + 4 * MIB, "VmFlags:", " hg") == 1); /* for large blocks in any case */
        CHECK(in_smaps(small, "VmFlags:", " hg") == (pages == UVAS_PAGES_TRANSPARENT));
        CHECK(in_smaps(middle, "VmFlags:", " hg") == (pages == UVAS_PAGES_TRANSPARENT));
        CHECK_OK(uvas_free(scene.arena, at));
        CHECK_OK(uvas_arena_trim(scene.arena, NULL));
        at = must_alloc(scene.arena, 12 * MIB, 0);
        CHECK(in_smaps(at + 4 * MIB, "VmFlags:", " hg") == 1);
        CHECK_OK(uvas_free(scene.arena, at));
        CHECK_OK(uvas_free(scene.arena, middle));
        CHECK_OK(uvas_free(scene.arena, small));
        end_scene(&scene);
    }
}

static long huge_pages(void) {
    long count = -1;
    FILE *file = fopen(HUGE_PAGES, "r");
    if (file) {
        CHECK(fscanf(file, "%ld", &count) == 1);
        (void)fclose(file);
    }
    return count;
}

static bool set_huge_pages(long count) {
    FILE *file = fopen(HUGE_PAGES, "w");
    if (!file) {
        return false;
    }
    (void)fprintf(file, "%ld\n", count);
    return fclose(file) == 0 && huge_pages() == count;
}

static int open_with(uint32_t flags, uint32_t pages, uint32_t node, struct scene *scene) {
    struct uvas_space_options space = {.name = "special", .window_base = WINDOW_BASE, .window_size = WINDOW_SIZE};
    *scene = (struct scene){0};
    scene->arena = UNTOUCHED;
    CHECK_OK(uvas_space_open(&space, &scene->space));
    struct uvas_arena_options options = {.space = scene->space, .flags = flags, .pages = pages, .node = node, .growth = 64 * MIB};
    return uvas_arena_open(&options, &scene->arena);
}

static void refused_with_a_remedy(struct scene *scene, int rc) {
    refused(rc, -ENOTSUP, scene->arena);
    CHECK(uvas_last_failure()->kind == UVAS_FAILURE_UNSUPPORTED);
    CHECK(uvas_last_failure()->what[0] != '\0' && uvas_last_failure()->remedy[0] != '\0');
    CHECK_OK(uvas_space_close(scene->space));
}

static void lives_in_huge_pages(void *unused) {
    (void)unused;
    struct scene scene;
    CHECK_OK(open_with(0, UVAS_PAGES_HUGE, 0, &scene));
    uintptr_t at = must_alloc(scene.arena, 3 * MIB, 0), small = must_alloc(scene.arena, 100, 0), got = UNTOUCHED;
    write_pattern(at, 3 * MIB, 1);
    write_pattern(small, 100, 2);
    verify_pattern(at, 3 * MIB, 1);
    CHECK(in_smaps(at, "KernelPageSize:", NULL) == 2048 && in_smaps(small, "KernelPageSize:", NULL) == 2048);
    CHECK(stats_of(scene.arena).committed_bytes % (2 * MIB) == 0);
    int rc = uvas_alloc(scene.arena, 32 * MIB, 0, &got); /* there are not so many */
    CHECK((rc == -ENOMEM || rc == -EDQUOT) && got == UNTOUCHED);
    in_order(&scene);
    CHECK_OK(uvas_free(scene.arena, at));
    CHECK_OK(uvas_arena_trim(scene.arena, NULL));
    CHECK_OK(uvas_alloc_zeroed(scene.arena, 5 * MIB, 0, &at));
    CHECK(all_bytes_are(at, 5 * MIB, 0));
    CHECK_OK(uvas_free(scene.arena, at));
    CHECK_OK(uvas_free(scene.arena, small));
    end_scene(&scene);
}

static void huge_pages_or_a_remedy(void) {
    long before = huge_pages();
    struct scene scene;
    if (before <= 0) {
        refused_with_a_remedy(&scene, open_with(0, UVAS_PAGES_HUGE, 0, &scene));
    }
    if (before == 0 && set_huge_pages(8)) {
        int status = in_child(lives_in_huge_pages, NULL); /* so that they are given back whatever happens */
        CHECK(set_huge_pages(0));
        CHECK(ended_well(status));
    } else {
        printf("   huge pages cannot be set aside here: only the refusal has been seen\n");
        (void)(before == 0 && set_huge_pages(0));
    }
}

static void bound_to_a_node_or_a_remedy(void) {
    struct scene scene;
    refused_with_a_remedy(&scene, open_with(UVAS_ARENA_BIND, 0, 1000, &scene));
    refused_with_a_remedy(&scene, open_with(UVAS_ARENA_BIND, 0, UINT32_MAX, &scene));
    long mode = -1;
    if (syscall(SYS_get_mempolicy, &mode, NULL, 0, NULL, 0) < 0) { /* a kernel without NUMA */
        refused_with_a_remedy(&scene, open_with(UVAS_ARENA_BIND, 0, 0, &scene));
        return;
    }
    CHECK_OK(open_with(UVAS_ARENA_BIND, 0, 0, &scene));
    uintptr_t at = must_alloc(scene.arena, 3 * MIB, 0);
    unsigned long nodes[16] = {0};
    int policy = -1;
    CHECK(syscall(SYS_get_mempolicy, &policy, nodes, sizeof nodes * 8, at, 2 /* MPOL_F_ADDR */) == 0);
    CHECK(policy == 2 /* MPOL_BIND */ && nodes[0] == 1);
    write_pattern(at, 3 * MIB, 1);
    CHECK_OK(uvas_free(scene.arena, at));
    end_scene(&scene);
}

/* ---- closing --------------------------------------------------------------------------------------------------------------- */

/* The caller's reservation is the caller's again, with nothing left in it, for another arena to live in. */
static void one_arena_after_another(void) {
    struct scene scene = fixed_scene(16 * MIB, NULL);
    for (int round = 0; round < 3; round++) {
        uintptr_t at = must_alloc(scene.arena, 5 * MIB, 0), small = must_alloc(scene.arena, 100, 0);
        write_pattern(at, 5 * MIB, 1);
        CHECK_OK(uvas_free(scene.arena, small));
        CHECK_OK(uvas_free(scene.arena, at));
        CHECK_OK(uvas_arena_close(scene.arena));
        CHECK(bytes_in_pieces(scene.held.id) == 0);
        struct uvas_arena_options options = {.reservation = scene.held.id};
        CHECK_OK(uvas_arena_open(&options, &scene.arena));
    }
    end_scene(&scene);
}

int main(int argc, char **argv) {
    static const struct test tests[] = {
        TEST(memory_comes_with_the_first_write),
        TEST(works_on_memory_out_of_reach),
        TEST(bookkeeping_is_small),
        TEST(trim_gives_memory_back),
        TEST(trim_leaves_what_lives),
        TEST(trim_leaves_nothing_behind_holes),
        TEST(what_is_idle_is_given_back),
        TEST(what_was_used_lately_stays),
        TEST(a_bare_arena_commits_nothing),
        TEST(descriptors_are_mapped_into_bare_blocks),
        TEST(guards_fault),
        TEST(guards_where_the_kernel_has_none),
        TEST(poison_shows),
        TEST(transparent_huge_pages_are_asked_for),
        TEST(huge_pages_or_a_remedy),
        TEST(bound_to_a_node_or_a_remedy),
        TEST(one_arena_after_another),
    };
    return run_tests(tests, sizeof tests / sizeof *tests, argc, argv);
}
