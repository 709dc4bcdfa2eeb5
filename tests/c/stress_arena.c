/* stress_arena.c: threads that allocate, write, hand each other their blocks, free those of others, resize and look up, from signal handlers too,
 * in three arenas at once, while others trim, count and check, and threads end and begin. The oracle is the bytes: every block says whose it is,
 * where it lies, how large it is, and holds its pattern until it is freed; at the end nothing lives and the arenas close.
 *
 * A third of the time on a kernel without membarrier.
 *
 *   stress_arena [seconds = 2] [seed = 1] [threads = 6]
 */
#define _GNU_SOURCE
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/time.h>

#include "blocks.h"

#define THREADS_MAX 64
#define ARENAS 3
#define SLOTS 256 /* blocks on their way from one thread to another */
#define KEPT 48   /* blocks that a thread keeps at most */
#define ROUNDS_PER_THREAD 20000
#define FIXED_SIZE (16 * MIB)

enum { GROWS, FIXED, HARDENED }; /* the arenas: the first one cannot refuse, the second is too small for all, the third has guards and poison */

static struct scene scenes[ARENAS];
static _Atomic uintptr_t slots[SLOTS];
static atomic_bool stop;
static atomic_ulong allocated, refusals, handed_over, moved, kept_in_place, looked_up, in_handler, trims, ended;
static double until;
static uint64_t seed = 1;

static __thread volatile uintptr_t watched; /* a live block of this thread, for the signal handler */

/* The first two words of a block say what it is, all others follow from them. */
struct head {
    uint64_t what; /* size asked for << 16 | owner << 4 | arena */
    uint64_t sum;
};

static uint64_t sum_of(uintptr_t base, uint64_t what) { return word_of(base, what, 1); }

static size_t size_in(uint64_t what) { return (size_t)(what >> 16); }

static void write_block(uintptr_t base, uint64_t what) {
    struct head *head = (struct head *)base;
    uint64_t *words = (uint64_t *)base;
    size_t count = size_in(what) / 8;
    *head = (struct head){what, sum_of(base, what)};
    for (size_t i = next_word(1, count); i < count; i = next_word(i, count)) {
        words[i] = word_of(base, what, i);
    }
}

/* Its bytes are as they were written where it was `from`, as far as they are still there; returns what it is. */
static uint64_t verify_block(uintptr_t base, uintptr_t from, size_t left) {
    const struct head *head = (const struct head *)base;
    const uint64_t *words = (const uint64_t *)base;
    uint64_t what = head->what;
    CHECK(head->sum == sum_of(from, what) && (what & 15) < ARENAS);
    size_t count = size_in(what) / 8;
    for (size_t i = next_word(1, count); i < count && i < left / 8; i = next_word(i, count)) {
        CHECK(words[i] == word_of(from, what, i));
    }
    return what;
}

static size_t some_size(uint64_t *random) { /* at least a head; small ones often, a few larger than a span */
    uint64_t dice = next_random(random) % 100;
    return 16 + next_random(random) % (dice < 60 ? 500 : dice < 85 ? 5000 : dice < 95 ? 64 * KIB : dice < 99 ? 400 * KIB : 3 * MIB);
}

static void refusal(int rc, size_t arena) {
    CHECK(rc == -ENOSPC || rc == -ENOMEM);
    CHECK(arena == FIXED);
    atomic_fetch_add_explicit(&refusals, 1, memory_order_relaxed);
}

static uintptr_t make_block(uint64_t *random, uint64_t owner) {
    size_t arena = next_random(random) % ARENAS, size = some_size(random);
    size_t align = next_random(random) % 8 ? 0 : (size_t)16 << next_random(random) % 12;
    bool zeroed = next_random(random) % 8 == 0;
    uintptr_t at = UNTOUCHED;
    int rc = (zeroed ? uvas_alloc_zeroed : uvas_alloc)(scenes[arena].arena, size, align, &at);
    if (rc != 0) {
        refusal(rc, arena);
        return 0;
    }
    CHECK(at % (align ? align : 16) == 0);
    CHECK(!zeroed || all_bytes_are(at, size, 0));
    write_block(at, (uint64_t)size << 16 | owner << 4 | arena);
    atomic_fetch_add_explicit(&allocated, 1, memory_order_relaxed);
    return at;
}

static void end_block(uintptr_t at) {
    uint64_t what = verify_block(at, at, SIZE_MAX);
    CHECK(uvas_free(scenes[what & 15].arena, at + 8) == -EINVAL); /* no block begins there, whatever others do */
    CHECK_OK(uvas_free(scenes[what & 15].arena, at));
}

static uintptr_t resize_block(uintptr_t at, uint64_t *random) {
    uint64_t what = verify_block(at, at, SIZE_MAX);
    size_t size = next_random(random) % 2 ? some_size(random) : size_in(what) + size_in(what) / 4;
    uintptr_t to = UNTOUCHED;
    int rc = uvas_realloc(scenes[what & 15].arena, at, size, &to);
    if (rc != 0) {
        refusal(rc, what & 15);
        CHECK(verify_block(at, at, SIZE_MAX) == what);
        return at;
    }
    CHECK(verify_block(to, at, size) == what);
    write_block(to, (uint64_t)size << 16 | (what & 0xffff));
    atomic_fetch_add_explicit(to == at ? &kept_in_place : &moved, 1, memory_order_relaxed);
    return to;
}

static void look_up(uintptr_t at, uint64_t *random) {
    uint64_t what = verify_block(at, at, 16);
    struct uvas_allocation found;
    size_t usable_size = 0;
    CHECK_OK(uvas_find_allocation(at + next_random(random) % size_in(what), &found));
    CHECK(found.base == at && found.size >= size_in(what) && found.arena == scenes[what & 15].arena);
    CHECK_OK(uvas_allocation_size(found.arena, at, &usable_size));
    CHECK(usable_size == found.size);
    uintptr_t other = atomic_load(&slots[next_random(random) % SLOTS]); /* may be freed at any moment, and be something else */
    if (other && uvas_find_allocation(other + 3, &found) == 0) {
        CHECK(found.base <= other + 3 && other + 3 - found.base < found.size);
    }
    atomic_fetch_add_explicit(&looked_up, 1, memory_order_relaxed);
}

static void many_blocks(uint64_t *random) {
    size_t sizes[40], arena = next_random(random) % ARENAS, count = 1 + next_random(random) % 40;
    uintptr_t got[40];
    for (size_t i = 0; i < count; i++) {
        sizes[i] = 16 + next_random(random) % (i % 10 == 9 ? 100000 : 1000);
    }
    int rc = uvas_alloc_many(scenes[arena].arena, sizes, count, got);
    if (rc != 0) {
        refusal(rc, arena);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        write_block(got[i], (uint64_t)sizes[i] << 16 | arena);
    }
    for (size_t i = 0; i < count; i++) {
        end_block(got[i]);
    }
}

/* Leaves one block for somebody, and takes what somebody has left. */
static uintptr_t swap_block(uintptr_t at, uint64_t *random) {
    uintptr_t taken = atomic_exchange_explicit(&slots[next_random(random) % SLOTS], at, memory_order_acq_rel);
    if (taken) {
        (void)verify_block(taken, taken, SIZE_MAX);
        atomic_fetch_add_explicit(&handed_over, 1, memory_order_relaxed);
    }
    return taken;
}

static void *worker(void *argument) {
    uint64_t owner = (uint64_t)(uintptr_t)argument, random = (owner + 1) * UINT64_C(0x9E3779B97F4A7C15) ^ seed;
    uint64_t rounds = next_random(&random) % ROUNDS_PER_THREAD;
    uintptr_t kept[KEPT] = {0}, mine = 0;
    while (mine == 0) {
        mine = make_block(&random, owner & 0xfff);
    }
    watched = mine;
    for (uint64_t round = 0; round < rounds && !atomic_load_explicit(&stop, memory_order_relaxed); round++) {
        uintptr_t *one = &kept[next_random(&random) % KEPT];
        uint64_t dice = next_random(&random) % 16;
        if (*one == 0) {
            *one = make_block(&random, owner & 0xfff);
        } else if (dice < 6) {
            end_block(*one);
            *one = 0;
        } else if (dice < 11) {
            *one = swap_block(*one, &random);
        } else if (dice < 13) {
            *one = resize_block(*one, &random);
        } else if (dice < 15) {
            look_up(*one, &random);
        } else {
            many_blocks(&random);
        }
    }
    watched = 0;
    atomic_signal_fence(memory_order_seq_cst);
    end_block(mine);
    for (size_t i = 0; i < KEPT; i++) { /* some of it goes to others, who free it when this thread is gone */
        kept[i] = kept[i] && i % 2 ? swap_block(kept[i], &random) : kept[i];
        if (kept[i]) {
            end_block(kept[i]);
        }
    }
    atomic_fetch_add(&ended, 1);
    return NULL;
}

static void handler(int number) {
    (void)number;
    uintptr_t at = watched;
    struct uvas_allocation found;
    if (at) {
        int rc = uvas_find_allocation(at + 15, &found);
        if (rc != 0 || found.base != at) {
            abort();
        }
        atomic_fetch_add_explicit(&in_handler, 1, memory_order_relaxed);
    }
}

/* Trims, counts and checks beside all others. */
static void *keeper(void *argument) {
    uint64_t random = (uint64_t)(uintptr_t)argument | 1;
    while (!atomic_load(&stop)) {
        uvas_id arena = scenes[next_random(&random) % ARENAS].arena;
        struct uvas_arena_stats now;
        switch (next_random(&random) % 4) {
        case 0:
            CHECK_OK(uvas_arena_trim(arena, NULL));
            atomic_fetch_add(&trims, 1);
            break;
        case 1:
            CHECK_OK(uvas_arena_check(arena));
            CHECK_OK(uvas_check());
            break;
        case 2:
            CHECK(uvas_arena_close(arena) == -EBUSY); /* a pinned block lives in each */
            break;
        default:
            now = stats_of(arena);
            CHECK(now.live_bytes <= now.used_bytes && now.cached_bytes <= now.used_bytes && now.used_bytes <= now.reserved_bytes);
        }
        (void)nanosleep(&(struct timespec){.tv_nsec = (long)(next_random(&random) % 2000000)}, NULL);
    }
    return NULL;
}

static void open_arenas(uintptr_t *pinned) {
    scenes[GROWS] = growing_scene(&(struct uvas_arena_options){.growth = 256 * MIB, .idle_ns = 5000000});
    scenes[FIXED] = fixed_scene(FIXED_SIZE, &(struct uvas_arena_options){.limit = FIXED_SIZE / 2, .idle_ns = 1000000});
    struct uvas_platform platform;
    CHECK_OK(uvas_platform(&platform));
    scenes[HARDENED] = growing_scene(&(struct uvas_arena_options){.flags = (platform.has_guard ? UVAS_ARENA_GUARD : 0u) | UVAS_ARENA_POISON});
    for (size_t i = 0; i < ARENAS; i++) { /* whatever happens, the keeper cannot close it */
        pinned[i] = must_alloc(scenes[i].arena, 100, 0);
        write_block(pinned[i], UINT64_C(100) << 16 | i);
    }
}

static void close_arenas(const uintptr_t *pinned) {
    for (size_t i = 0; i < SLOTS; i++) {
        uintptr_t left = atomic_exchange(&slots[i], 0);
        if (left) {
            end_block(left);
        }
    }
    for (size_t i = 0; i < ARENAS; i++) {
        end_block(pinned[i]);
        CHECK_OK(uvas_arena_check(scenes[i].arena));
        numbers_agree(scenes[i].arena, i == HARDENED);
        struct uvas_arena_stats now = stats_of(scenes[i].arena);
        CHECK(now.live_blocks == 0 && now.threads <= 1); /* this one */
        end_scene(&scenes[i]);
    }
}

static void set_timer(long interval_us) {
    struct itimerval timer = {{0, (suseconds_t)interval_us}, {0, (suseconds_t)interval_us}};
    CHECK(setitimer(ITIMER_PROF, &timer, NULL) == 0);
}

static void run(double seconds, size_t workers, const char *kernel) {
    pthread_t threads[THREADS_MAX], keepers[2];
    uintptr_t pinned[ARENAS], started = 0;
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
    until = seconds_now() + seconds;
    open_arenas(pinned);
    CHECK(sigaction(SIGPROF, &action, NULL) == 0);
    set_timer(1000);
    for (size_t i = 0; i < 2; i++) {
        CHECK(pthread_create(&keepers[i], NULL, keeper, (void *)(uintptr_t)(seed * 100 + i * 2 + 1)) == 0);
    }
    for (size_t i = 0; i < workers; i++) {
        CHECK(pthread_create(&threads[i], NULL, worker, (void *)started++) == 0);
    }
    for (size_t i = 0; seconds_now() < until; i = (i + 1) % workers) { /* whoever ends is followed by another */
        CHECK(pthread_join(threads[i], NULL) == 0);
        CHECK(pthread_create(&threads[i], NULL, worker, (void *)started++) == 0);
    }
    atomic_store(&stop, true);
    for (size_t i = 0; i < workers; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
    for (size_t i = 0; i < 2; i++) {
        CHECK(pthread_join(keepers[i], NULL) == 0);
    }
    set_timer(0);
    close_arenas(pinned);
    CHECK(atomic_load(&allocated) > 0 && atomic_load(&handed_over) > 0 && atomic_load(&looked_up) > 0 && atomic_load(&trims) > 0);
    CHECK(atomic_load(&moved) > 0 && atomic_load(&kept_in_place) > 0);
    printf("ok stress_arena%s: %lu blocks, %lu refused, %lu handed over, %lu moved, %lu grown in place, %lu looked up, %lu in a handler, %lu trims, "
           "%lu threads\n",
           kernel, atomic_load(&allocated), atomic_load(&refusals), atomic_load(&handed_over), atomic_load(&moved), atomic_load(&kept_in_place),
           atomic_load(&looked_up), atomic_load(&in_handler), atomic_load(&trims), atomic_load(&ended));
}

/* From here on this process's kernel has no membarrier. false: it cannot be told so. */
static bool without_membarrier(void) {
    struct sock_filter program[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
                                    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_membarrier, 0, 1),
                                    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    struct sock_fprog filter = {.len = sizeof program / sizeof *program, .filter = program};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

int main(int count, char **arguments) {
    double seconds = count > 1 ? strtod(arguments[1], NULL) : 2;
    size_t workers = count > 3 ? strtoull(arguments[3], NULL, 0) : 6;
    int status = 0;
    seed = count > 2 ? strtoull(arguments[2], NULL, 0) : 1;
    CHECK(workers > 0 && workers <= THREADS_MAX);
    pid_t child = fork(); /* before this process has learnt what its kernel has */
    CHECK(child >= 0);
    if (child == 0) {
        if (without_membarrier()) {
            run(seconds / 3, workers, " without membarrier");
        } else {
            printf("   membarrier cannot be taken away here\n");
        }
        exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child && ended_well(status));
    run(seconds - seconds / 3, workers, "");
    return 0;
}
