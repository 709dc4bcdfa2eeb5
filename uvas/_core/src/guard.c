/* guard.c: three threads beside the pager.
 *
 *   the mate      does one job at a time for it: the second half of a large copy, the dropping of staging while the pager goes on
 *   the unsharer  writes to pages that are shared with a child of fork, so that they are this process's alone and can move. That may be a fault, which
 *                 the pager has to serve: so it never waits for this one
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

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards ending, the sleep and who is asleep */
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static bool ending;
static pthread_t watchdog;

struct job {
    enum { COPY, DROP, UNSHARE } kind;
    int faults;
    uintptr_t to;
    const char *from;
    size_t size;
    int rc;
};

enum { IDLE, POSTED };

/* A thread with a mailbox. `state` is written by the pager (IDLE to POSTED) and by the thread (POSTED to IDLE); the job belongs to whose turn it is. */
static struct helper {
    pthread_t thread;
    _Atomic int state;
    bool asleep;
    struct job job;
} mate, unsharer;

static bool idle(const struct helper *helper) {
    return atomic_load_explicit(&helper->state, memory_order_acquire) == IDLE;
}

static void post(struct helper *helper, const struct job *wanted) {
    helper->job = *wanted;
    atomic_store_explicit(&helper->state, POSTED, memory_order_seq_cst);
    pthread_mutex_lock(&lock);
    if (helper->asleep) {
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&lock);
}

void uvas_mate_wait(void) {
    for (uint32_t spins = 0; !idle(&mate); spins++) {
        if (spins > SPINS) {
            uvas_vm_yield();
        }
    }
}

void uvas_mate_copy(int faults, uintptr_t to, const char *from, size_t size) {
    uvas_mate_wait();
    post(&mate, &(struct job){.kind = COPY, .faults = faults, .to = to, .from = from, .size = size});
}

int uvas_mate_copied(void) {
    uvas_mate_wait();
    return mate.job.rc;
}

void uvas_mate_drop(uintptr_t base, size_t size) {
    uvas_mate_wait();
    post(&mate, &(struct job){.kind = DROP, .to = base, .size = size});
}

void uvas_unshare(uintptr_t page) {
    if (idle(&unsharer)) {
        post(&unsharer, &(struct job){.kind = UNSHARE, .to = page, .size = uvas_vm_platform.page_size});
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

static bool comes_soon(const struct helper *helper) {
    for (uint32_t spins = 0; spins < SPINS && idle(helper); spins++) {
    }
    return !idle(helper);
}

static void *be_helper(void *which) {
    struct helper *helper = which;
    for (;;) {
        if (!comes_soon(helper)) {
            pthread_mutex_lock(&lock);
            helper->asleep = true;
            while (!ending && atomic_load_explicit(&helper->state, memory_order_seq_cst) == IDLE) {
                pthread_cond_wait(&changed, &lock);
            }
            helper->asleep = false;
            bool end = ending;
            pthread_mutex_unlock(&lock);
            if (end && idle(helper)) {
                return NULL;
            }
        }
        work(&helper->job);
        atomic_store_explicit(&helper->state, IDLE, memory_order_release);
    }
}

/* On its own stack, by write(2): whoever waits may hold the locks of stdio and malloc. */
static void complain(const struct uvas_waiting *waiting, uint64_t now) {
    char text[320];
    const char *why = waiting->error == UVAS_WAITS_FOR_PIN ? "pin_host has it on the host"
                      : waiting->error == -EBUSY           ? "the host's page is pinned, by I/O in flight say"
                      : waiting->error == -ENOMEM          ? "there is no memory for it"
                      : waiting->error != 0                ? "moving it fails"
                                                           : "others keep it";
    int error = waiting->error < 0 ? waiting->error : 0;
    int length = snprintf(text, sizeof text, "uvas: thread %u of %s has waited for %llu s for the page at 0x%lx: %s (%d)\n", waiting->thread, waiting->name,
                          (unsigned long long)((now - waiting->since_ns) / 1000000000u), waiting->address, why, error);
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

static void end_threads(pthread_t *const *threads, uint32_t count) {
    pthread_mutex_lock(&lock);
    ending = true;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    while (count-- > 0) {
        (void)pthread_join(*threads[count], NULL);
    }
}

static pthread_t *const all_threads[] = {&mate.thread, &unsharer.thread, &watchdog};

int uvas_guard_start(void) {
    ending = false;
    mate = unsharer = (struct helper){.state = IDLE};
    int rc = uvas_thread_start(&mate.thread, be_helper, &mate);
    if (rc < 0) {
        return rc;
    }
    rc = uvas_thread_start(&unsharer.thread, be_helper, &unsharer);
    if (rc == 0) {
        rc = uvas_thread_start(&watchdog, be_watchdog, NULL);
    } else {
        end_threads(all_threads, 1);
        return rc;
    }
    if (rc < 0) {
        end_threads(all_threads, 2);
    }
    return rc;
}

void uvas_guard_stop(void) {
    end_threads(all_threads, 3);
}

void uvas_guard_forget(void) {
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    changed = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
}
