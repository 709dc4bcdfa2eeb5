/* vm_maps.c: what the kernel says is there: the mappings of this process, what of them is in memory, the heap's end, limits. Advice, never a
 * decision.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/resource.h>

#include "vm_call.h"

struct procmap_query_abi { /* struct procmap_query, Linux 6.11 */
    uint64_t size, query_flags, query_addr, vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
    uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
    uint64_t vma_name_addr, build_id_addr;
};
_Static_assert(sizeof(struct procmap_query_abi) == 104, "the kernel's layout");
#define QUERY_COMMAND _IOWR('f', 17, struct procmap_query_abi)
#define QUERY_COVERING_OR_NEXT 0x10u
#define QUERY_FLAG_SHARED 0x08u
#define RESIDENT_BATCH 16384 /* pages asked of mincore at once */
#define LEAST_PAGE 4096u

/* The descriptor of our maps, opened at the first question; -1: not open. Written by whoever opens it first (compare-and-swap, the loser
 * closes its own), by a reader that finds it closed behind our back, and by the child of a fork. */
static _Atomic int maps_fd = -1;

int uvas_vm_open_maps(void) {
    GATED(syscall(SYS_openat, AT_FDCWD, "/proc/self/maps", O_RDONLY | O_CLOEXEC));
}

static int maps_descriptor(void) {
    int fd = atomic_load_explicit(&maps_fd, memory_order_acquire);
    if (fd >= 0) {
        return fd;
    }
    int opened = uvas_vm_open_maps();
    if (opened < 0) {
        return opened;
    }
    int none = -1;
    if (atomic_compare_exchange_strong(&maps_fd, &none, opened)) {
        return opened;
    }
    uvas_vm_close(opened);
    return none;
}

void uvas_vm_forget(void) {
    uvas_vm_close(atomic_exchange(&maps_fd, -1));
}

static int query(uintptr_t address, struct procmap_query_abi *ask) {
    for (int tries = 0; tries < 2; tries++) {
        int fd = maps_descriptor();
        if (fd < 0) {
            return fd;
        }
        int refused = gate();
        if (refused) {
            return -refused;
        }
        ask->size = sizeof *ask;
        ask->query_flags = QUERY_COVERING_OR_NEXT;
        ask->query_addr = address;
        if (syscall(SYS_ioctl, fd, QUERY_COMMAND, ask) == 0) {
            return 1;
        }
        if (errno == ENOENT) {
            return 0;
        }
        if (errno != EBADF && errno != ENOTTY) {
            return errno == ENOSYS ? -ENOTSUP : -errno;
        }
        if (!uvas_vm_platform.has_procmap_query) { /* just being learnt: the descriptor is ours */
            uvas_vm_forget();
            return -ENOTSUP;
        }
        /* Closed behind our back (a daemon closes everything), perhaps somebody else's number by now: it is not ours to close. */
        atomic_compare_exchange_strong(&maps_fd, &fd, -1);
    }
    return -ENOTSUP;
}

int uvas_vm_query(uintptr_t address, struct uvas_vma *out, char *name, size_t name_size) {
    struct procmap_query_abi ask = {0};
    if (!uvas_vm_platform.has_procmap_query) {
        return -ENOTSUP;
    }
    if (name_size > 0) {
        name[0] = 0;
        ask.vma_name_addr = (uint64_t)(uintptr_t)name;
        ask.vma_name_size = (uint32_t)name_size;
    }
    int found = query(address, &ask);
    if (found == -ENAMETOOLONG && name_size > 0) {
        ask = (struct procmap_query_abi){0};
        found = query(address, &ask);
        (void)snprintf(name, name_size, "(a long name)");
    }
    if (found > 0) {
        *out = (struct uvas_vma){
            .start = ask.vma_start,
            .end = ask.vma_end,
            .protection = (uint32_t)(ask.vma_flags & (UVAS_READ | UVAS_WRITE | UVAS_EXECUTE)),
            .shared = (ask.vma_flags & QUERY_FLAG_SHARED) != 0,
            .offset = ask.vma_offset,
            .inode = ask.inode,
            .device_major = ask.dev_major,
            .device_minor = ask.dev_minor,
        };
    }
    return found;
}

bool uvas_vm_query_learn(void) {
    struct procmap_query_abi ask = {0};
    return query((uintptr_t)&ask, &ask) == 1;
}

int uvas_vm_resident(uintptr_t base, size_t size, uint64_t *bytes) {
    unsigned char pages[RESIDENT_BATCH];
    for (uint64_t found = 0; ; ) {
        size_t most = (size_t)RESIDENT_BATCH * LEAST_PAGE, part = size < most ? size : most; /* qemu-user answers in the host's pages, not in its own */
        if (syscall(SYS_mincore, base, part, pages) < 0) {
            return -errno;
        }
        for (size_t i = 0; i < part / PAGE; i++) {
            found += pages[i] & 1 ? PAGE : 0;
        }
        base += part;
        size -= part;
        if (size == 0) {
            *bytes = found;
            return 0;
        }
    }
}

uintptr_t uvas_vm_break(void) {
    return (uintptr_t)syscall(SYS_brk, 0);
}

uint64_t uvas_vm_limit(int resource) {
    struct rlimit limit;
    if (getrlimit((__rlimit_resource_t)resource, &limit) < 0 || limit.rlim_cur == RLIM_INFINITY) {
        return UINT64_MAX;
    }
    return limit.rlim_cur;
}
