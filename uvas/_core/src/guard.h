/* guard.h: the threads beside the pager; see guard.c. */
#ifndef UVAS_GUARD_H
#define UVAS_GUARD_H

#include "pager.h"

/* The mate's jobs, one after the other; each waits for the one before. What uvas_mate_copy began, uvas_mate_copied ends: 0 or -errno. */
void uvas_mate_copy(int faults, uintptr_t to, const char *from, size_t size);
int uvas_mate_copied(void);
void uvas_mate_drop(uintptr_t base, size_t size);
void uvas_mate_wait(void);

int uvas_guard_start(void);
void uvas_guard_stop(void);
void uvas_guard_forget(void); /* the child of a fork */

#endif
