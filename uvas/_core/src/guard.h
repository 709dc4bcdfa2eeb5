/* guard.h: the threads beside the pager; see guard.c. */
#ifndef UVAS_GUARD_H
#define UVAS_GUARD_H

#include "pager.h"

/* The mate's jobs, one after the other. It takes a share in a copy or a move from when it is awake on, if it is not at something else (false), and has
 * left it after uvas_mate_rest, which waits for a part or a piece at most. */
bool uvas_mate_copy(struct uvas_shared_copy *copy);
bool uvas_mate_move(struct uvas_shared_move *move);
void uvas_mate_rest(void);
void uvas_mate_drop(uintptr_t base, size_t size); /* waits for the job before */
void uvas_mate_wait(void);

int uvas_guard_start(void);
void uvas_guard_stop(void);
void uvas_guard_forget(void); /* the child of a fork */

#endif
