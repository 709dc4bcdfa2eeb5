/* pieces.h: what is committed where in one reservation: a sorted array of disjoint parts, each of one nature. What lies between them is
 * reserved only. Neighbours of one nature are one part. Search O(log n), change O(n) moves of 48 bytes (n is bounded by max_map_count,
 * as each part is a mapping). */
#ifndef UVAS_PIECES_H
#define UVAS_PIECES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "registry.h"
#include "vm.h"

struct uvas_file { /* a descriptor that parts of a reservation share */
    int fd;
    uint32_t references; /* under the core's lock */
    struct uvas_file_id id;
    struct uvas_file *next; /* among those to be closed; under the core's lock */
};

/* Owns fd from here on. NULL: no memory, and fd is closed. */
struct uvas_file *uvas_file_make(int fd, const struct uvas_file_id *id);
/* Lets go; under the lock. The last one puts the file among those that uvas_files_close closes, without the lock. */
void uvas_file_drop(struct uvas_file *file);
void uvas_files_close(void);
/* The child of a fork: nothing is left to close. Under the lock. */
void uvas_files_forget(void);

struct uvas_piece_entry {
    size_t start, end; /* offsets in the reservation */
    uint32_t kind;     /* enum uvas_backing; 0: lost to somebody else */
    uint32_t protection;
    bool shared;
    bool guarded;  /* pages gone and guards up, for want of a mapping: counts as not committed */
    bool stays;    /* in a plan of decommit only: guards went up in place of the held addresses */
    int64_t offset; /* of `start` in the file */
    struct uvas_file *file; /* NULL: anonymous or a driver's */
};

struct uvas_pieces {
    struct uvas_piece_entry *list;
    size_t count, capacity;
};

/* Room for `count` entries in a larger array, made by the caller outside the lock; returns the old array for the caller to free. */
struct uvas_piece_entry *uvas_pieces_widen(struct uvas_pieces *pieces, struct uvas_piece_entry *list, size_t capacity);
/* Index of the first entry that ends after `offset`; pieces->count if none. */
size_t uvas_pieces_after(const struct uvas_pieces *pieces, size_t offset);
/* Makes [start, end) what `piece` says (its start and end are ignored), or nothing if NULL, and takes and drops references to files.
 * Needs room for two entries more; cannot fail. Under the lock. */
void uvas_pieces_set(struct uvas_pieces *pieces, size_t start, size_t end, const struct uvas_piece_entry *piece);
/* A file of these parts that maps as `file` does, with one more reference, instead of `file`, which is let go; else `file`. Many parts of one file
 * need one descriptor, and neighbours are one part. O(n), under the lock. */
struct uvas_file *uvas_pieces_share(const struct uvas_pieces *pieces, struct uvas_file *file);
/* Lets go of everything. Under the lock; the caller frees the list. */
void uvas_pieces_drop(struct uvas_pieces *pieces);
/* Whether every byte of [start, end) is committed (neither lost nor guarded). */
bool uvas_pieces_cover(const struct uvas_pieces *pieces, size_t start, size_t end);
/* Whether that part counts as committed. */
bool uvas_piece_committed(const struct uvas_piece_entry *piece);
/* Copies the parts of [start, end), cut to it, with what lies between them as gaps; returns how many. `out` has room for
 * 2 * pieces->count + 1. */
size_t uvas_pieces_plan(const struct uvas_pieces *pieces, size_t start, size_t end, struct uvas_piece_entry *out);
bool uvas_piece_is_gap(const struct uvas_piece_entry *piece);
/* 0 or -EINVAL: order, disjointness, no empty or mergeable neighbours. */
int uvas_pieces_check(const struct uvas_pieces *pieces, size_t size);

#endif
