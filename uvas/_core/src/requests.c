/* requests.c: how other threads ask the pager for something, and wait.
 *
 * A request lies on the stack of who asks and belongs to the pager until it is done. One lock guards the list and `done`; it is held for a few
 * instructions, never over a system call other than those of waiting and waking. Requests are worked on in turns, a part of each at a time, so that a
 * long one (a prefetch of gigabytes) does not keep a short one waiting, and faults are served in between.
 */
#include <errno.h>
#include <pthread.h>
#include <string.h>

#include "pager.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t answered = PTHREAD_COND_INITIALIZER; /* something is done, or a pause has ended */
static struct uvas_errand *asked, **asked_end = &asked;   /* under the lock */
static bool paused;                                        /* under the lock: set by the pager, taken back by who forked */
static struct uvas_waiting longest;                        /* under the lock */
static struct uvas_errand *at_work, **at_work_end = &at_work; /* the pager's */

int uvas_ask(struct uvas_errand *request) {
    request->done = false;
    request->next = NULL;
    pthread_mutex_lock(&lock);
    *asked_end = request;
    asked_end = &request->next;
    pthread_mutex_unlock(&lock);
    uvas_bell_ring(uvas_pager.bell);
    pthread_mutex_lock(&lock);
    while (!request->done) {
        pthread_cond_wait(&answered, &lock);
    }
    pthread_mutex_unlock(&lock);
    return request->rc;
}

static void take_over(void) {
    pthread_mutex_lock(&lock);
    if (asked) {
        *at_work_end = asked;
        at_work_end = asked_end;
        asked = NULL;
        asked_end = &asked;
    }
    pthread_mutex_unlock(&lock);
}

/* Who asked goes on. A pause keeps the pager here until the fork is over. */
static void finish(struct uvas_errand *request) {
    bool pause = request->kind == UVAS_ASK_PAUSE;
    pthread_mutex_lock(&lock);
    request->done = true;
    paused |= pause;
    pthread_cond_broadcast(&answered);
    while (pause && paused) {
        pthread_cond_wait(&answered, &lock);
    }
    pthread_mutex_unlock(&lock);
    uvas_pager.pausing &= !pause;
}

bool uvas_requests_work(bool *stop) {
    take_over();
    struct uvas_errand *request = at_work;
    if (!request) {
        return false;
    }
    at_work = request->next;
    at_work_end = at_work ? at_work_end : &at_work;
    request->next = NULL;
    if (!uvas_chore(request)) { /* to the end of the line */
        *at_work_end = request;
        at_work_end = &request->next;
        return true;
    }
    *stop = request->kind == UVAS_ASK_STOP;
    finish(request);
    return true;
}

void uvas_requests_resume(void) {
    pthread_mutex_lock(&lock);
    paused = false;
    pthread_cond_broadcast(&answered);
    pthread_mutex_unlock(&lock);
}

void uvas_requests_forget(void) {
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    answered = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    asked = at_work = NULL;
    asked_end = &asked;
    at_work_end = &at_work;
    paused = false;
    longest = (struct uvas_waiting){0};
}

void uvas_requests_waiting(const struct uvas_waiting *waiting) {
    pthread_mutex_lock(&lock);
    longest = *waiting;
    pthread_mutex_unlock(&lock);
}

struct uvas_waiting uvas_requests_longest(void) {
    pthread_mutex_lock(&lock);
    struct uvas_waiting seen = longest;
    pthread_mutex_unlock(&lock);
    return seen;
}
