/* limits.h: when the kernel says ENOMEM, which limit of this process has been reached? Measured, not guessed. */
#ifndef UVAS_LIMITS_H
#define UVAS_LIMITS_H

#include <stddef.h>
#include <stdint.h>

/* ENOMEM was answered for [base, base + size), where nobody is. Says LimitReached for a limit that is measured as reached (-EDQUOT), otherwise that
 * the host has no memory (-ENOMEM). Reads files of /proc: for failures only. */
int uvas_limits_explain(uintptr_t base, size_t size);

/* -EMFILE or -ENFILE was answered, for [base, base + size) or, with size 0, for nothing in particular. Says which limit that is (-EDQUOT). */
int uvas_limits_descriptors(uintptr_t base, size_t size, int rc);

#endif
