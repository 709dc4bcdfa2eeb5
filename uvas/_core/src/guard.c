/* guard.c: two threads beside the pager.
 *
 *   the mate      does one job at a time for it: the second half of a large copy, the dropping of staging while the pager goes on, and the writing to
 *                 pages that are shared with a child of fork, so that they are this process's alone and can move. That last could be a fault, for which
 *                 the pager's own thread would wait for itself
 *   the watchdog  says on stderr which fault nobody has answered for long: a hang that has a name
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <time.h>

#include "guard.h"
#include "vm.h"

#define LONG_NS 10000000000ull /* ten seconds: longer than anything here takes, shorter than patience */
#define LOOK_S 1

#define SPINS 2000 /* looks at the mailbox before sleeping: a batch's jobs follow each other within microseconds */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards ending, asleep and the sleep */
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static bool ending, asleep;
static pthread_t mate, watchdog;

/* The mailbox. `state` is written by the pager (IDLE to POSTED, release) and by the mate (POSTED to IDLE, release); the job belongs to whose turn it is. */
enum { IDLE, POSTED };
static _Atomic int state;
static struct job {
    enum { COPY, DROP, UNSHARE } kind;
    int faults;
    uintptr_t to;
    const char *from;
    size_t size;
    int rc;
} job;

static void pause_a_moment(void) { /* nothing that a processor would need to be told */
    __asm__ volatile("" ::: "memory");
}

static void post(const struct job *wanted) {
    job = *wanted;
    atomic_store_explicit(&state, POSTED, memory_order_seq_cst);
    pthread_mutex_lock(&lock);
    if (asleep) {
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&lock);
}

static bool idle(void) {
    return atomic_load_explicit(&state, memory_order_acquire) == IDLE;
}

void uvas_mate_wait(void) {
    for (uint32_t spins = 0; !idle(); spins++) {
        if (spins > SPINS) {
            uvas_vm_yield();
        } else {
            pause_a_moment();
        }
    }
}

void uvas_mate_copy(int faults, uintptr_t to, const char *from, size_t size) {
    uvas_mate_wait();
    post(&(struct job){.kind = COPY, .faults = faults, .to = to, .from = from, .size = size});
}

int uvas_mate_copied(void) {
    uvas_mate_wait();
    return job.rc;
}

void uvas_mate_drop(uintptr_t base, size_t size) {
    uvas_mate_wait();
    post(&(struct job){.kind = DROP, .to = base, .size = size});
}

void uvas_unshare(uintptr_t page) {
    if (idle()) {
        post(&(struct job){.kind = UNSHARE, .to = page, .size = uvas_vm_platform.page_size});
    }
}

static void work(struct job *on) {
    switch (on->kind) {
    case COPY:
        on->rc = uvas_copy_protected(on->faults, on->to, on->from, on->size);
        break;
    case DROP:
        (void)uvas_vm_drop_surely(on->to, on->size);
        break;
    case UNSHARE:
        (void)uvas_vm_populate(on->to, on->size, UVAS_WRITE);
        break;
    }
}

static bool comes_soon(void) {
    for (uint32_t spins = 0; spins < SPINS && idle(); spins++) {
        pause_a_moment();
    }
    return !idle();
}

static void *be_mate(void *nothing) {
    for (;;) {
        if (!comes_soon()) {
            pthread_mutex_lock(&lock);
            asleep = true;
            while (!ending && atomic_load_explicit(&state, memory_order_seq_cst) == IDLE) {
                pthread_cond_wait(&changed, &lock);
            }
            asleep = false;
            bool end = ending;
            pthread_mutex_unlock(&lock);
            if (end && idle()) {
                return nothing;
            }
        }
        work(&job);
        atomic_store_explicit(&state, IDLE, memory_order_release);
    }
}

/* On its own stack, by write(2): whoever waits may hold the locks of stdio and malloc. */
static void complain(const struct uvas_waiting *waiting, uint64_t now) {
    char text[320];
    const char *why = waiting->error == -EBUSY    ? "the host's page is pinned, by I/O in flight say"
                      : waiting->error == -ENOMEM ? "there is no memory for it"
                      : waiting->error != 0       ? "moving it fails"
                                                  : "others keep it";
    int length = snprintf(text, sizeof text, "uvas: thread %u of %s has waited for %llu s for the page at 0x%lx: %s (%d)\n", waiting->thread, waiting->name,
                          (unsigned long long)((now - waiting->since_ns) / 1000000000u), waiting->address, why, waiting->error);
    uvas_say(text, (size_t)length);
}

static void complain_of_pager(uint64_t since, uint64_t now) {
    char text[128];
    int length = snprintf(text, sizeof text, "uvas: the pager has been at one thing for %llu s\n", (unsigned long long)((now - since) / 1000000000u));
    uvas_say(text, (size_t)length);
}

static void *be_watchdog(void *nothing) {
    uint64_t said = 0;
    pthread_mutex_lock(&lock);
    while (!ending) {
        struct timespec until;
        (void)clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += LOOK_S;
        (void)pthread_cond_timedwait(&changed, &lock, &until);
        pthread_mutex_unlock(&lock);
        struct uvas_waiting waiting = uvas_requests_longest();
        uint64_t now = uvas_clock_ns(), since = atomic_load_explicit(&uvas_pager.busy_since_ns, memory_order_relaxed);
        if (now - said > LONG_NS && waiting.since_ns && now - waiting.since_ns > LONG_NS) {
            complain(&waiting, now);
            said = now;
        } else if (now - said > LONG_NS && since && now > since && now - since > LONG_NS) {
            complain_of_pager(since, now);
            said = now;
        }
        pthread_mutex_lock(&lock);
    }
    pthread_mutex_unlock(&lock);
    return nothing;
}

int uvas_guard_start(void) {
    ending = asleep = false;
    atomic_store(&state, IDLE);
    int rc = uvas_thread_start(&mate, be_mate, NULL);
    if (rc == 0) {
        rc = uvas_thread_start(&watchdog, be_watchdog, NULL);
        if (rc < 0) {
            pthread_mutex_lock(&lock);
            ending = true;
            pthread_cond_broadcast(&changed);
            pthread_mutex_unlock(&lock);
            (void)pthread_join(mate, NULL);
        }
    }
    return rc;
}

void uvas_guard_stop(void) {
    pthread_mutex_lock(&lock);
    ending = true;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    (void)pthread_join(mate, NULL);
    (void)pthread_join(watchdog, NULL);
}

void uvas_guard_forget(void) {
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    changed = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
}
