/* search.h: where to try next. Everything here is advice: the kernel, the registry and the devices decide.
 *
 * A search runs over a window [low, high), cut with every party's. It knows obstacles of four sorts: what the registry holds, what the kernel
 * says is mapped (with 1 MiB of room below what is not ours: it may grow down, and the kernel does not say), places that are never chosen
 * (growth room of stack and heap, addresses that others take by habit), and what this search was refused.
 *
 *   1. below the place where the last search in this window ended: no question to the kernel if what lies above is ours
 *   2. in a window that the caller did not choose: below a fixed place far from where the kernel puts things
 *   3. the top of each hole, from the low end of the window upwards; when the holes are out and there were refusals (somebody may have been
 *      there and left), again, UVAS_SEARCH_ROUNDS times in all
 */
#ifndef UVAS_SEARCH_H
#define UVAS_SEARCH_H

#include <stdbool.h>

#include "maps.h"

#define UVAS_SEARCH_ROUNDS 3u
#define UVAS_SEARCH_QUERIES 512u /* questions to the kernel before the text of all maps is cheaper */
#define UVAS_SEARCH_SPREAD 4u    /* places tried before holes are walked from the low end */

struct uvas_search {
    uintptr_t low, high; /* the window; high is exclusive */
    size_t size, align;
    uintptr_t frontier;  /* where the last search ended, or 0 */
    uintptr_t quiet;     /* the address above which nobody was last seen who may grow down, or 0: not asked again while candidates end there */
    bool any_window;
    uint32_t stage, tries, spread, rounds, queries;
    uintptr_t position;  /* of the walk */
    struct uvas_maps maps;
    bool maps_open, maps_broken;
    struct uvas_range_list { /* refusals of this search */
        struct { uintptr_t start, end; } *list;
        size_t count, capacity;
    } refused;
    uint32_t unexplained; /* refusals in a row that nobody could explain */
};

/* The caller sets low, high, size, align, frontier, quiet and any_window in a zeroed search. */
/* The next candidate: 1, or 0: out of holes. */
int uvas_search_next(struct uvas_search *search, uintptr_t *candidate);
/* The candidate was refused; *obstacle (size 0: unknown) is in the way. on_host: it is the lowest mapping there of somebody else. */
void uvas_search_refused(struct uvas_search *search, uintptr_t candidate, const struct uvas_obstacle *obstacle, bool on_host);
void uvas_search_end(struct uvas_search *search);

/* "[stack] growth room" or "[heap] growth room" if [base, base + size) cuts into it, with the range; 0 otherwise. */
int uvas_search_growth_room(uintptr_t base, size_t size, struct uvas_obstacle *out);

/* What the stack's growth room is learnt from; once. */
void uvas_search_learn(void);

#endif
