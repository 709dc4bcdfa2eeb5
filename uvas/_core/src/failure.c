/* failure.c: see failure.h. One record a thread; nobody else reads or writes it. It is made at the thread's first failure: the library is loaded late,
 * by dlopen, where the TLS that short ways want (arena.h) is a few hundred bytes for all, and a record has 4 KiB. */
#include "failure.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Thread_local struct uvas_failure *last; /* the thread's own, or the spare one; NULL: nothing has failed */
static const struct uvas_failure none;
static struct uvas_failure spare; /* of threads while there is no memory for one: better a record that others may change than none */
static pthread_key_t at_thread_end;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int has_key;

const struct uvas_failure *uvas_last_failure(void) {
    return last ? last : &none;
}

static void end_record(void *record) {
    last = NULL;
    free(record);
}

static void make_key(void) {
    has_key = pthread_key_create(&at_thread_end, end_record) == 0;
}

static struct uvas_failure *record(void) {
    if (!last || last == &spare) {
        (void)pthread_once(&once, make_key);
        struct uvas_failure *made = has_key ? calloc(1, sizeof *made) : NULL;
        if (made && pthread_setspecific(at_thread_end, made) != 0) {
            free(made);
            made = NULL;
        }
        last = made ? made : &spare;
    }
    return last;
}

struct uvas_failure *uvas_fail(uint32_t kind, int code) {
    /* All but the candidates, which are copied in by the search when there are any: 2 KiB need no clearing each time. */
    struct uvas_failure *failure = record();
    memset(failure, 0, offsetof(struct uvas_failure, tried));
    failure->kind = kind;
    failure->code = code;
    return failure;
}

static void vsay(struct uvas_failure *failure, const char *format, va_list arguments) {
    (void)vsnprintf(failure->text, sizeof failure->text, format, arguments);
}

int uvas_fail_say(struct uvas_failure *failure, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsay(failure, format, arguments);
    va_end(arguments);
    return failure->code;
}

static struct uvas_failure *fail_at(uint32_t kind, int code, uintptr_t base, size_t size) {
    struct uvas_failure *failure = uvas_fail(kind, code);
    failure->base = base;
    failure->size = size;
    return failure;
}

int uvas_fail_invalid(const char *format, ...) {
    struct uvas_failure *failure = uvas_fail(UVAS_FAILURE_INVALID, -EINVAL);
    va_list arguments;
    va_start(arguments, format);
    vsay(failure, format, arguments);
    va_end(arguments);
    return -EINVAL;
}

int uvas_fail_released(const char *noun, uvas_id id) {
    return uvas_fail_say(uvas_fail(UVAS_FAILURE_RELEASED, -ESTALE),
                         "%s 0x%llx is dead: it was released or closed, or belongs to the process that this one was forked from", noun,
                         (unsigned long long)id);
}

int uvas_fail_in_use(uintptr_t base, size_t size, const struct uvas_obstacle *obstacle) {
    struct uvas_failure *failure = fail_at(UVAS_FAILURE_IN_USE, -EEXIST, base, size);
    failure->other_base = obstacle->base;
    failure->other_size = obstacle->size;
    (void)snprintf(failure->owner, sizeof failure->owner, "%s", obstacle->owner);
    if (obstacle->size == 0) {
        return uvas_fail_say(failure, "[0x%lx, 0x%lx) is in use by %s", base, base + size, obstacle->owner);
    }
    return uvas_fail_say(failure, "[0x%lx, 0x%lx) is in use: [0x%lx, 0x%lx) is held by %s", base, base + size, obstacle->base,
                         obstacle->base + obstacle->size, obstacle->owner);
}

int uvas_fail_limit(uintptr_t base, size_t size, const char *limit, uint64_t value, const char *remedy) {
    struct uvas_failure *failure = fail_at(UVAS_FAILURE_LIMIT, -EDQUOT, base, size);
    failure->value = value;
    (void)snprintf(failure->what, sizeof failure->what, "%s", limit);
    (void)snprintf(failure->remedy, sizeof failure->remedy, "%s", remedy);
    if (size == 0 || base == 0) {
        return uvas_fail_say(failure, "%s of %llu is reached: %s", limit, (unsigned long long)value, remedy);
    }
    return uvas_fail_say(failure, "%s of %llu is reached at [0x%lx, 0x%lx): %s", limit, (unsigned long long)value, base, base + size, remedy);
}

int uvas_fail_memory(uintptr_t base, size_t size, const char *device) {
    struct uvas_failure *failure = fail_at(UVAS_FAILURE_MEMORY, -ENOMEM, base, size);
    (void)snprintf(failure->what, sizeof failure->what, "%s", device);
    if (base == 0) { /* no range has it: what is lacking is bookkeeping, or a device's memory as a whole */
        return uvas_fail_say(failure, "%s has no memory for %zu bytes", device, size);
    }
    return uvas_fail_say(failure, "%s has no memory for [0x%lx, 0x%lx), %zu bytes: the addresses are there, what should be behind them is not",
                         device, base, base + size, size);
}

int uvas_fail_device(uintptr_t base, size_t size, const char *device, const char *call, int code) {
    struct uvas_failure *failure = fail_at(UVAS_FAILURE_DEVICE, code, base, size);
    (void)snprintf(failure->what, sizeof failure->what, "%s", call);
    (void)snprintf(failure->owner, sizeof failure->owner, "%s", device);
    int answer = code <= -UVAS_UNRECOVERABLE ? code + UVAS_UNRECOVERABLE : code;
    return uvas_fail_say(failure, "device %s answered %d (%s) to %s of [0x%lx, 0x%lx)", device, answer, strerror(-answer), call, base, base + size);
}

int uvas_fail_system(uintptr_t base, size_t size, const char *call, int code) {
    struct uvas_failure *failure = fail_at(UVAS_FAILURE_SYSTEM, code, base, size);
    (void)snprintf(failure->what, sizeof failure->what, "%s", call);
    return uvas_fail_say(failure, "%s answered %d (%s) for [0x%lx, 0x%lx)", call, code, strerror(-code), base, base + size);
}

int uvas_fail_unsupported(const char *feature, const char *remedy, const char *format, ...) {
    struct uvas_failure *failure = uvas_fail(UVAS_FAILURE_UNSUPPORTED, -ENOTSUP);
    (void)snprintf(failure->what, sizeof failure->what, "%s", feature);
    (void)snprintf(failure->remedy, sizeof failure->remedy, "%s", remedy);
    va_list arguments;
    va_start(arguments, format);
    vsay(failure, format, arguments);
    va_end(arguments);
    return -ENOTSUP;
}
