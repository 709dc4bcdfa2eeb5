/* maps.c: see maps.h. The text is read in blocks and cut into lines; a line longer than a block's rest is moved to its front. The block is on
 * the stack: who asks may be at max_map_count, where the heap does not grow. */
#include "maps.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK_BYTES ((size_t)16 << 10)
#define FIRST_SNAPSHOT ((size_t)512)

struct line {
    struct uvas_vma vma;
    const char *name; /* "" where the mapping has none */
};

/* Called for each line in ascending order; returns true to stop. */
typedef bool visit_line(void *context, const struct line *line);

static const char *hex(const char *text, uint64_t *out) {
    uint64_t value = 0;
    for (;; text++) {
        char c = *text;
        uint64_t digit = c >= '0' && c <= '9' ? (uint64_t)(c - '0') : c >= 'a' && c <= 'f' ? (uint64_t)(c - 'a') + 10 : 16;
        if (digit == 16) {
            *out = value;
            return text;
        }
        value = value << 4 | digit;
    }
}

static const char *decimal(const char *text, uint64_t *out) {
    for (*out = 0; *text >= '0' && *text <= '9'; text++) {
        *out = *out * 10 + (uint64_t)(*text - '0');
    }
    return text;
}

/* "start-end perms offset major:minor inode   name" */
static bool parse(const char *text, struct line *line) {
    uint64_t start, end, device_major, device_minor;
    text = hex(text, &start);
    if (*text++ != '-') {
        return false;
    }
    text = hex(text, &end);
    if (*text++ != ' ' || strlen(text) < 5) {
        return false;
    }
    line->vma.protection = (text[0] == 'r' ? UVAS_READ : 0u) | (text[1] == 'w' ? UVAS_WRITE : 0u) | (text[2] == 'x' ? UVAS_EXECUTE : 0u);
    line->vma.shared = text[3] == 's';
    text = hex(text + 5, &line->vma.offset);
    text = hex(text + (*text == ' '), &device_major);
    text = hex(text + (*text == ':'), &device_minor);
    text = decimal(text + (*text == ' '), &line->vma.inode);
    line->vma.start = start;
    line->vma.end = end;
    line->vma.device_major = (uint32_t)device_major;
    line->vma.device_minor = (uint32_t)device_minor;
    line->name = text + strspn(text, " ");
    return start < end;
}

static int scan_open(int fd, visit_line *visit, void *context) {
    char block[BLOCK_BYTES];
    size_t held = 0;
    for (;;) {
        long got = uvas_vm_read(fd, block + held, BLOCK_BYTES - 1 - held);
        if (got < 0) {
            return (int)got;
        }
        held += (size_t)got;
        block[held] = 0;
        char *from = block;
        for (char *newline; (newline = strchr(from, '\n')) != NULL; from = newline + 1) {
            struct line line;
            *newline = 0;
            if (parse(from, &line) && visit(context, &line)) {
                return 0;
            }
        }
        if (got == 0) {
            return 0;
        }
        held = (size_t)(block + held - from);
        memmove(block, from, held);
        if (held == BLOCK_BYTES - 1) { /* a path of many times PATH_MAX: it loses its middle, the line nothing else */
            held = BLOCK_BYTES / 2;
        }
    }
}

static int scan(visit_line *visit, void *context) {
    int fd = uvas_vm_open_maps();
    if (fd < 0) {
        return fd;
    }
    int rc = scan_open(fd, visit, context);
    uvas_vm_close(fd);
    return rc;
}

/* ---- snapshots ---------------------------------------------------------------------------------------------------------------------- */

static bool grow(struct uvas_maps *maps) {
    size_t capacity = maps->capacity ? 2 * maps->capacity : FIRST_SNAPSHOT;
    struct uvas_vma *list = realloc(maps->list, capacity * sizeof *list);
    if (list) {
        maps->list = list;
        maps->capacity = capacity;
    }
    return list != NULL;
}

static bool keep(void *context, const struct line *line) {
    struct uvas_maps *maps = context;
    if (maps->count == maps->capacity && !grow(maps)) {
        return true;
    }
    maps->list[maps->count++] = line->vma;
    return false;
}

int uvas_maps_snapshot(struct uvas_maps *maps) {
    if (!maps->list && !grow(maps)) {
        return -ENOMEM;
    }
    maps->count = 0;
    return scan(keep, maps);
}

int uvas_maps_open(struct uvas_maps *maps) {
    *maps = (struct uvas_maps){0};
    return uvas_vm_platform.has_procmap_query ? 0 : uvas_maps_snapshot(maps);
}

void uvas_maps_close(struct uvas_maps *maps) {
    free(maps->list);
    *maps = (struct uvas_maps){0};
}

int uvas_maps_next(const struct uvas_maps *maps, uintptr_t address, struct uvas_vma *out) {
    if (!maps->list) {
        return uvas_vm_query(address, out, NULL, 0);
    }
    size_t low = 0, high = maps->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (maps->list[middle].end > address) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    if (low == maps->count) {
        return 0;
    }
    *out = maps->list[low];
    return 1;
}

/* ---- explanations --------------------------------------------------------------------------------------------------------------------- */

struct wanted {
    uintptr_t address;
    struct uvas_vma vma;
    char name[160];
    bool found;
};

static bool covers_or_follows(void *context, const struct line *line) {
    struct wanted *wanted = context;
    if (line->vma.end <= wanted->address) {
        return false;
    }
    wanted->vma = line->vma;
    (void)snprintf(wanted->name, sizeof wanted->name, "%s", line->name);
    wanted->found = true;
    return true;
}

int uvas_maps_describe(uintptr_t base, size_t size, struct uvas_obstacle *out) {
    struct wanted wanted = {.address = base};
    int rc = uvas_vm_query(base, &wanted.vma, wanted.name, sizeof wanted.name);
    wanted.found = rc == 1;
    if (rc < 0) {
        (void)scan(covers_or_follows, &wanted);
    }
    if (!wanted.found || wanted.vma.start >= base + size) {
        return 0;
    }
    uint32_t protection = wanted.vma.protection;
    out->base = wanted.vma.start;
    out->size = wanted.vma.end - wanted.vma.start;
    (void)snprintf(out->owner, sizeof out->owner, "%lx-%lx %c%c%c%c %s", wanted.vma.start, wanted.vma.end,
                   protection & UVAS_READ ? 'r' : '-', protection & UVAS_WRITE ? 'w' : '-', protection & UVAS_EXECUTE ? 'x' : '-',
                   wanted.vma.shared ? 's' : 'p', wanted.name[0] ? wanted.name : "(anonymous memory)");
    return 1;
}

static bool count_line(void *context, const struct line *line) {
    (void)line;
    ++*(uint64_t *)context;
    return false;
}

uint64_t uvas_maps_count(void) {
    uint64_t count = 0;
    return scan(count_line, &count) < 0 ? 0 : count;
}
