/* main.c: a runtime in C that matches ranges with a device of its own. No Python in it.
 *
 *   cc -I"$(python -c 'import uvas; print(uvas.get_include())')" main.c "$(python -c 'import uvas; print(uvas.get_library())')" \
 *      -Wl,-rpath,"$(dirname "$(python -c 'import uvas; print(uvas.get_library())')")" -o c_runtime && ./c_runtime
 *
 * The device is a table of claims with one range that its firmware keeps: it refuses that, and uvas looks elsewhere until both agree.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "uvas.h"

#define WINDOW_BASE UINT64_C(0x2c0100000000)
#define WINDOW_SIZE (UINT64_C(64) << 20)
#define FIRMWARE_BASE (WINDOW_BASE + WINDOW_SIZE / 2)
#define CLAIMS_MAX 16

struct device {
    struct { uintptr_t base; size_t size; } claims[CLAIMS_MAX];
    size_t count, refusals, committed_bytes;
};

static void must(int rc, const char *what) {
    if (rc < 0) {
        fprintf(stderr, "%s: %s\n", what, uvas_last_failure()->text);
        exit(EXIT_FAILURE);
    }
}

static int claim(void *context, uintptr_t base, size_t size, struct uvas_obstacle *obstacle) {
    struct device *device = context;
    if (base + size > FIRMWARE_BASE) {
        obstacle->base = FIRMWARE_BASE; /* the next candidate is looked for beyond it */
        obstacle->size = WINDOW_SIZE / 2;
        strcpy(obstacle->owner, "the firmware of c_runtime's device");
        device->refusals++;
        return -EEXIST;
    }
    if (device->count == CLAIMS_MAX) {
        return -ENOMEM; /* broken, not taken: reserve gives up and says so */
    }
    device->claims[device->count].base = base;
    device->claims[device->count++].size = size;
    return 0;
}

static int unclaim(void *context, uintptr_t base, size_t size) {
    struct device *device = context;
    for (size_t i = 0; i < device->count; i++) {
        if (device->claims[i].base == base && device->claims[i].size == size) {
            device->claims[i] = device->claims[--device->count];
            return 0;
        }
    }
    return -EINVAL;
}

static int commit(void *context, uintptr_t base, size_t size, const struct uvas_backing_info *backing, uint32_t protection) {
    (void)base, (void)backing, (void)protection;
    ((struct device *)context)->committed_bytes += size;
    return 0;
}

static int decommit(void *context, uintptr_t base, size_t size) {
    (void)base;
    ((struct device *)context)->committed_bytes -= size;
    return 0;
}

static int protect(void *context, uintptr_t base, size_t size, uint32_t protection) {
    (void)context, (void)base, (void)size, (void)protection;
    return 0;
}

int main(void) {
    struct device mine = {0};
    struct uvas_device description = {.name = "c_runtime", .placement = UVAS_CLAIMS, .backings = UVAS_BACKING_ANONYMOUS, .context = &mine,
                                      .claim = claim, .unclaim = unclaim, .commit = commit, .decommit = decommit, .protect = protect};
    struct uvas_space_options options = {.name = "c_runtime", .window_base = WINDOW_BASE, .window_size = WINDOW_SIZE};
    struct uvas_where where = {.name = "queue"};
    struct uvas_reservation queue;
    struct uvas_found found;
    uvas_id space, device;

    must(uvas_space_open(&options, &space), "open");
    must(uvas_attach(space, &description, &device), "attach");
    must(uvas_reserve(space, 1 << 20, &where, &queue), "reserve");
    must(uvas_commit(queue.id, 0, 1 << 16, UVAS_READ | UVAS_WRITE, 0), "commit");
    memset((void *)queue.base, 1, 1 << 16);
    printf("host and device agree on [0x%lx, 0x%lx) after %zu refusals; %zu bytes committed on both\n", queue.base, queue.base + queue.size,
           mine.refusals, mine.committed_bytes);
    if (uvas_find(queue.base + 12345, &found) < 0 || found.id != queue.id || mine.count != 1 || mine.refusals == 0) {
        return EXIT_FAILURE;
    }
    where.at = queue.base + 4096;
    if (uvas_reserve(space, 4096, &where, &queue) != -EEXIST) {
        return EXIT_FAILURE;
    }
    printf("as it should be: %s\n", uvas_last_failure()->text);
    must(uvas_space_close(space), "close");
    return mine.count == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
