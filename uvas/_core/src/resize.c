/* resize.c: a block gets another size: in place where its slab's blocks or the hole behind it allow, else by moving. */
#include <errno.h>
#include <string.h>

#include "arena.h"
#include "failure.h"
#include "vm.h"

static int move(struct uvas_arena *arena, uvas_id id, uintptr_t address, size_t old_bytes, size_t size, uintptr_t *out) {
    if (arena->flags & UVAS_ARENA_BARE) {
        return uvas_fail_unsupported("moving a block of bare addresses", "allocate another one, and map there what is behind this one",
                                     "the block at 0x%lx cannot have %zu bytes where it is, and the arena has nothing to copy", address, size);
    }
    uintptr_t moved;
    int rc = uvas_alloc(id, size, 0, &moved);
    if (rc < 0) {
        return rc;
    }
    memcpy((void *)moved, (const void *)address, old_bytes < size ? old_bytes : size);
    rc = uvas_free(id, address);
    if (rc < 0) {
        struct uvas_failure said = *uvas_last_failure();
        (void)uvas_free(id, moved);
        *uvas_fail(said.kind, said.code) = said;
        return rc;
    }
    *out = moved;
    return 0;
}

int uvas_realloc(uvas_id id, uintptr_t address, size_t size, uintptr_t *out) {
    struct uvas_arena *arena = uvas_arena_get(id);
    struct uvas_region *region = arena ? uvas_arena_region(arena, address) : NULL;
    struct uvas_run *run;
    uintptr_t base;
    size_t bytes;
    if (!arena) {
        return -ESTALE;
    }
    if (size == 0 || size >> uvas_vm_platform.address_bits) {
        return uvas_fail_invalid("a block cannot have 0x%zx bytes", size);
    }
    if (!region || !uvas_block_locate(region, address, &run, &base, &bytes) || base != address) {
        return uvas_block_not_live(address);
    }
    bool small = uvas_run_state(run) == UVAS_RUN_SLAB, guarded = atomic_load_explicit(&run->guard, memory_order_relaxed) != 0;
    bool stays = small ? size <= bytes && size > bytes / 2 : uvas_block_pages(size) == bytes || uvas_block_steps(size) == bytes;
    bool in_place = !stays && !small && !guarded && !(arena->flags & UVAS_ARENA_GUARD); /* a large one that becomes a small one moves, unless there is no room */
    if (in_place && size > UVAS_SMALL_MAX) {
        stays = uvas_pages_resize(arena, run, uvas_block_pages(size)) == 0;
    }
    if (!stays) {
        int rc = move(arena, id, address, bytes, size, out);
        if (rc == 0 || !in_place || (rc != -ENOMEM && rc != -ENOSPC)) {
            return rc;
        }
        if (uvas_pages_resize(arena, run, uvas_block_pages(size)) < 0) { /* what threads kept was called in: it may have been behind the block, or in the limit */
            return rc;
        }
    }
    *out = address;
    return 0;
}
