/* lock.c: the core's one lock, and the one condition on which its threads wait (registry.h). It is held for a few loads and stores at a time, never
 * over a system call, a callback or a touch of user memory, so one is enough for all spaces.
 */
#include <pthread.h>

#include "tree.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;

void uvas_registry_lock(void) {
    (void)pthread_mutex_lock(&lock);
}

void uvas_registry_unlock(void) {
    (void)pthread_mutex_unlock(&lock);
}

void uvas_registry_wait(void) {
    (void)pthread_cond_wait(&condition, &lock);
}

void uvas_registry_wake(void) {
    (void)pthread_cond_broadcast(&condition);
}

void uvas_lock_forget(void) {
    condition = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
}
