/* guard.c: two threads beside the pager.
 *
 *   the mate      writes to pages that are shared with a child of fork, so that they are this process's alone and can move. On the pager's own thread
 *                 that could be a fault, for which it would wait for itself
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

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards all of this */
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static uintptr_t wanted; /* the page to be written to; 0: none */
static bool ending;
static pthread_t mate, watchdog;

void uvas_unshare(uintptr_t page) {
    pthread_mutex_lock(&lock);
    wanted = wanted ? wanted : page;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void *be_mate(void *nothing) {
    pthread_mutex_lock(&lock);
    while (!ending) {
        uintptr_t page = wanted;
        if (!page) {
            pthread_cond_wait(&changed, &lock);
            continue;
        }
        pthread_mutex_unlock(&lock);
        (void)uvas_vm_populate(page, uvas_vm_platform.page_size, UVAS_WRITE);
        pthread_mutex_lock(&lock);
        wanted = 0;
    }
    pthread_mutex_unlock(&lock);
    return nothing;
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
    ending = false;
    wanted = 0;
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
