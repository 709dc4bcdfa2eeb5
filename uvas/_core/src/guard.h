/* guard.h: the threads beside the pager; see guard.c. */
#ifndef UVAS_GUARD_H
#define UVAS_GUARD_H

#include "pager.h"

int uvas_guard_start(void);
void uvas_guard_stop(void);
void uvas_guard_forget(void); /* the child of a fork */

#endif
