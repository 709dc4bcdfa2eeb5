/* pieces.c: see pieces.h. */
#include "pieces.h"

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define GAP UINT32_MAX /* as `kind`: nothing is committed there */

/* ---- files ---------------------------------------------------------------------------------------------------------------------------- */

/* Let go by all, still open. Written under the core's lock; read without, to pass by when there is none. */
static struct uvas_file *_Atomic doomed;

struct uvas_file *uvas_file_make(int fd, const struct uvas_file_id *id) {
    struct uvas_file *file = malloc(sizeof *file);
    if (!file) {
        uvas_vm_close(fd);
        return NULL;
    }
    *file = (struct uvas_file){.fd = fd, .references = 1, .id = *id};
    return file;
}

void uvas_file_drop(struct uvas_file *file) {
    if (file && --file->references == 0) {
        file->next = doomed;
        doomed = file;
    }
}

static struct uvas_file *take_doomed(void) {
    uvas_registry_lock();
    struct uvas_file *first = doomed;
    doomed = NULL;
    uvas_registry_unlock();
    return first;
}

void uvas_files_close(void) {
    if (!atomic_load_explicit(&doomed, memory_order_relaxed)) {
        return;
    }
    for (struct uvas_file *file = take_doomed(), *next; file; file = next) {
        next = file->next;
        uvas_vm_close(file->fd);
        free(file);
    }
}

void uvas_files_forget(void) {
    doomed = NULL;
}

static bool maps_alike(const struct uvas_file *a, const struct uvas_file *b) {
    return a->id.regular && b->id.regular && a->id.inode == b->id.inode && a->id.device_major == b->id.device_major &&
           a->id.device_minor == b->id.device_minor && a->id.access == b->id.access && a->id.access >= 0;
}

struct uvas_file *uvas_pieces_share(const struct uvas_pieces *pieces, struct uvas_file *file) {
    for (size_t i = 0; i < pieces->count; i++) {
        struct uvas_file *there = pieces->list[i].file;
        if (there && there != file && maps_alike(there, file)) {
            there->references++;
            uvas_file_drop(file);
            return there;
        }
    }
    return file;
}

/* ---- parts ---------------------------------------------------------------------------------------------------------------------------- */

struct uvas_piece_entry *uvas_pieces_widen(struct uvas_pieces *pieces, struct uvas_piece_entry *list, size_t capacity) {
    assert(capacity >= pieces->count);
    struct uvas_piece_entry *old = pieces->list;
    if (pieces->count) {
        memcpy(list, old, pieces->count * sizeof *list);
    }
    pieces->list = list;
    pieces->capacity = capacity;
    return old;
}

size_t uvas_pieces_after(const struct uvas_pieces *pieces, size_t offset) {
    size_t low = 0, high = pieces->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (pieces->list[middle].end > offset) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

static struct uvas_piece_entry cut(const struct uvas_piece_entry *piece, size_t start, size_t end) {
    struct uvas_piece_entry part = *piece;
    assert(piece->start <= start && start < end && end <= piece->end);
    part.offset += piece->file ? (int64_t)(start - piece->start) : 0;
    part.start = start;
    part.end = end;
    return part;
}

static bool continues(const struct uvas_piece_entry *a, const struct uvas_piece_entry *b) {
    return a->end == b->start && a->kind == b->kind && a->protection == b->protection && a->shared == b->shared && a->guarded == b->guarded &&
           a->file == b->file && (!a->file || a->offset + (int64_t)(a->end - a->start) == b->offset);
}

/* Appends, or lets the last entry grow; keeps the reference that comes with the part. */
static size_t append(struct uvas_piece_entry *to, size_t count, const struct uvas_piece_entry *part) {
    if (count > 0 && continues(&to[count - 1], part)) {
        to[count - 1].end = part->end;
        uvas_file_drop(part->file);
        return count;
    }
    to[count] = *part;
    return count + 1;
}

static void hold(struct uvas_piece_entry *part) {
    if (part->file) {
        part->file->references++;
    }
}

void uvas_pieces_set(struct uvas_pieces *pieces, size_t start, size_t end, const struct uvas_piece_entry *piece) {
    assert(start < end && pieces->count + 2 <= pieces->capacity);
    size_t first = uvas_pieces_after(pieces, start), last = uvas_pieces_after(pieces, end - 1);
    struct uvas_piece_entry middle[5]; /* the neighbours before and after, what is left of the first and last, and the new one */
    size_t count = 0, from = first, to = last;
    last += last < pieces->count && pieces->list[last].start < end; /* one past the last that is touched */
    if (from > 0) {
        count = append(middle, count, &pieces->list[--from]);
    }
    if (first < last && pieces->list[first].start < start) {
        struct uvas_piece_entry left = cut(&pieces->list[first], pieces->list[first].start, start);
        hold(&left);
        count = append(middle, count, &left);
    }
    if (piece) {
        struct uvas_piece_entry fresh = *piece;
        fresh.start = start;
        fresh.end = end;
        hold(&fresh);
        count = append(middle, count, &fresh);
    }
    if (first < last && pieces->list[last - 1].end > end) {
        struct uvas_piece_entry right = cut(&pieces->list[last - 1], end, pieces->list[last - 1].end);
        hold(&right);
        count = append(middle, count, &right);
    }
    for (size_t i = first; i < last; i++) {
        uvas_file_drop(pieces->list[i].file);
    }
    to = last;
    if (to < pieces->count) {
        count = append(middle, count, &pieces->list[to++]);
    }
    memmove(pieces->list + from + count, pieces->list + to, (pieces->count - to) * sizeof *middle);
    memcpy(pieces->list + from, middle, count * sizeof *middle);
    pieces->count = pieces->count - (to - from) + count;
    assert(pieces->count <= pieces->capacity);
}

void uvas_pieces_drop(struct uvas_pieces *pieces) {
    for (size_t i = 0; i < pieces->count; i++) {
        uvas_file_drop(pieces->list[i].file);
    }
    pieces->count = 0;
}

bool uvas_piece_committed(const struct uvas_piece_entry *piece) {
    return piece->kind != 0 && piece->kind != GAP && !piece->guarded;
}

bool uvas_piece_is_gap(const struct uvas_piece_entry *piece) {
    return piece->kind == GAP;
}

bool uvas_pieces_cover(const struct uvas_pieces *pieces, size_t start, size_t end) {
    for (size_t i = uvas_pieces_after(pieces, start); start < end; i++) {
        if (i == pieces->count || pieces->list[i].start > start || !uvas_piece_committed(&pieces->list[i])) {
            return false;
        }
        start = pieces->list[i].end;
    }
    return true;
}

size_t uvas_pieces_plan(const struct uvas_pieces *pieces, size_t start, size_t end, struct uvas_piece_entry *out) {
    size_t count = 0;
    for (size_t i = uvas_pieces_after(pieces, start); start < end; i++) {
        size_t until = i < pieces->count && pieces->list[i].start < end ? pieces->list[i].start : end;
        if (start < until) {
            out[count++] = (struct uvas_piece_entry){.start = start, .end = until, .kind = GAP};
            start = until;
        }
        if (start < end) {
            until = pieces->list[i].end < end ? pieces->list[i].end : end;
            out[count++] = cut(&pieces->list[i], start, until);
            start = until;
        }
    }
    return count;
}

int uvas_pieces_check(const struct uvas_pieces *pieces, size_t size) {
    for (size_t i = 0; i < pieces->count; i++) {
        const struct uvas_piece_entry *piece = &pieces->list[i];
        bool wrong = piece->start >= piece->end || piece->end > size || piece->kind == GAP || (piece->file && piece->file->references == 0);
        wrong = wrong || (i > 0 && (pieces->list[i - 1].end > piece->start || continues(&pieces->list[i - 1], piece)));
        if (wrong) {
            return -EINVAL;
        }
    }
    return 0;
}
