/* failure.h: how the core says what went wrong. Each function fills the calling thread's record (uvas_last_failure) and returns the code
 * that the public call shall answer, so that `return uvas_fail_...(...)` is the whole of it. */
#ifndef UVAS_FAILURE_H
#define UVAS_FAILURE_H

#include "uvas.h"

/* A fresh record of this kind; the caller fills fields and the sentence. */
struct uvas_failure *uvas_fail(uint32_t kind, int code);
/* Formats the sentence; returns the record's code. */
__attribute__((format(printf, 2, 3))) int uvas_fail_say(struct uvas_failure *failure, const char *format, ...);

__attribute__((format(printf, 1, 2))) int uvas_fail_invalid(const char *format, ...);
int uvas_fail_released(const char *noun, uvas_id id);
int uvas_fail_in_use(uintptr_t base, size_t size, const struct uvas_obstacle *obstacle);
int uvas_fail_limit(uintptr_t base, size_t size, const char *limit, uint64_t value, const char *remedy);
int uvas_fail_memory(uintptr_t base, size_t size, const char *device);
int uvas_fail_device(uintptr_t base, size_t size, const char *device, const char *call, int code);
int uvas_fail_system(uintptr_t base, size_t size, const char *call, int code);
__attribute__((format(printf, 3, 4))) int uvas_fail_unsupported(const char *feature, const char *remedy, const char *format, ...);

#endif
