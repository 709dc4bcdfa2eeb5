/* vm.c: addresses taken and given back, and the memory in them; the only use of the destructive MAP_FIXED. See vm.h, and vm_call.h for how a
 * system call is made.
 */
#define _GNU_SOURCE
#include <assert.h>

#include "vm_call.h"

_Static_assert(UVAS_READ == PROT_READ && UVAS_WRITE == PROT_WRITE && UVAS_EXECUTE == PROT_EXEC, "protections are passed through");

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#define DONTNEED_LOCKED 24 /* MADV_DONTNEED_LOCKED, Linux 5.18 */
#define MBIND_BIND 2 /* MPOL_BIND */
#define NODES_MAX 1024 /* the most that kernels are built for */

/* ---- addresses --------------------------------------------------------------------------------------------------------------------------------- */

int uvas_vm_reserve(uintptr_t base, size_t size, int tag, uintptr_t *stray) {
    assert(base != 0 && size != 0 && base % PAGE == 0 && size % PAGE == 0);
    int flags = MAP_PRIVATE | MAP_NORESERVE | uvas_vm_exact_flag();
    if (tag < 0) {
        return uvas_vm_map_exactly(base, size, PROT_NONE, flags | MAP_ANONYMOUS, -1, 0, stray);
    }
    return uvas_vm_map_exactly(base, size, PROT_NONE, flags, tag, (int64_t)base, stray);
}

int uvas_vm_unmap(uintptr_t base, size_t size) {
    GATED(syscall(SYS_munmap, base, size));
}

int uvas_vm_overlay(uintptr_t base, size_t size, enum uvas_vm_overlay_kind kind, uint32_t protection, int fd, int64_t offset) {
    assert(base != 0 && size != 0 && base % PAGE == 0 && size % PAGE == 0);
    int flags = MAP_FIXED;
    switch (kind) {
    case UVAS_OVERLAY_HELD:
        flags |= MAP_PRIVATE | MAP_NORESERVE | (fd < 0 ? MAP_ANONYMOUS : 0);
        protection = UVAS_NONE;
        offset = fd < 0 ? 0 : (int64_t)base;
        break;
    case UVAS_OVERLAY_ANONYMOUS:
        flags |= MAP_PRIVATE | MAP_ANONYMOUS;
        fd = -1;
        offset = 0;
        break;
    case UVAS_OVERLAY_SHARED:
        flags |= MAP_SHARED;
        break;
    case UVAS_OVERLAY_PRIVATE:
        flags |= MAP_PRIVATE;
        break;
    }
    long at = uvas_vm_map(base, size, (int)protection, flags, fd, offset);
    assert(at < 0 || (uintptr_t)at == base);
    return at < 0 ? (int)at : 0;
}

int uvas_vm_try(size_t size, enum uvas_vm_overlay_kind kind, uint32_t protection, int fd, int64_t offset) {
    assert(fd >= 0 && (kind == UVAS_OVERLAY_SHARED || kind == UVAS_OVERLAY_PRIVATE));
    long at = uvas_vm_map(0, size, (int)protection, kind == UVAS_OVERLAY_SHARED ? MAP_SHARED : MAP_PRIVATE, fd, offset);
    return at < 0 ? (int)at : uvas_vm_unmap((uintptr_t)at, size);
}

/* ---- memory ------------------------------------------------------------------------------------------------------------------------------------ */

int uvas_vm_protect(uintptr_t base, size_t size, uint32_t protection) {
    GATED(syscall(SYS_mprotect, base, size, protection));
}

int uvas_vm_drop(uintptr_t base, size_t size) {
    GATED(syscall(SYS_madvise, base, size, MADV_DONTNEED));
}

int uvas_vm_drop_surely(uintptr_t base, size_t size) {
    long rc = syscall(SYS_madvise, base, size, MADV_DONTNEED);
    rc = rc < 0 && errno == EINVAL ? syscall(SYS_madvise, base, size, DONTNEED_LOCKED) : rc;
    return rc < 0 ? -errno : 0;
}

int uvas_vm_guard(uintptr_t base, size_t size) {
    if (!uvas_vm_platform.has_guard) {
        return -ENOTSUP;
    }
    GATED(syscall(SYS_madvise, base, size, GUARD_INSTALL));
}

int uvas_vm_unguard(uintptr_t base, size_t size) {
    GATED(syscall(SYS_madvise, base, size, GUARD_REMOVE));
}

int uvas_vm_inherit(uintptr_t base, size_t size, bool inherited) {
    GATED(syscall(SYS_madvise, base, size, inherited ? MADV_DOFORK : MADV_DONTFORK));
}

int uvas_vm_populate(uintptr_t base, size_t size, uint32_t protection) {
    int advice = protection & UVAS_WRITE ? MADV_POPULATE_WRITE : MADV_POPULATE_READ;
    int refused = gate();
    if (refused) {
        return -refused;
    }
    if (protection == UVAS_NONE || syscall(SYS_madvise, base, size, advice) == 0 || errno == EINVAL) {
        return 0; /* before 5.14: pages come when touched, which is what commit promises */
    }
    return errno == EFAULT || errno == EHWPOISON ? -ENOMEM : -errno;
}

int uvas_vm_advise_huge(uintptr_t base, size_t size) {
    GATED(syscall(SYS_madvise, base, size, MADV_HUGEPAGE));
}

int uvas_vm_bind(uintptr_t base, size_t size, uint32_t node) {
    unsigned long nodes[NODES_MAX / (8 * sizeof(long))] = {0};
    if (node >= NODES_MAX) {
        return -EINVAL;
    }
    nodes[node / (8 * sizeof(long))] = 1UL << node % (8 * sizeof(long));
    GATED(syscall(SYS_mbind, base, size, MBIND_BIND, nodes, NODES_MAX + 1, 0));
}

/* ---- our own bookkeeping ----------------------------------------------------------------------------------------------------------------------- */

void *uvas_vm_pages(size_t size_bytes) {
    if (gate()) {
        return NULL;
    }
    long at = uvas_vm_map_native(0, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at < 0 ? NULL : (void *)at;
}

int uvas_vm_dont_fork(void *at, size_t size_bytes) {
    GATED(syscall(SYS_madvise, at, size_bytes, MADV_DONTFORK));
}

void *uvas_vm_alias(int fd, size_t size_bytes) {
    long at = uvas_vm_map(0, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (at < 0) {
        return NULL;
    }
    if (uvas_vm_dont_fork((void *)at, size_bytes) < 0) {
        (void)syscall(SYS_munmap, at, size_bytes);
        return NULL;
    }
    (void)syscall(SYS_madvise, at, size_bytes, MADV_SEQUENTIAL); /* that we read a page here says nothing of its use: no page is moved up for it, as it goes */
    return (void *)at;
}

void *uvas_vm_huge_pages(size_t size_bytes) {
    size_t spare = UVAS_VM_HUGE_PAGE;
    char *memory = uvas_vm_pages(size_bytes + spare);
    if (!memory) {
        return NULL;
    }
    size_t before = -(uintptr_t)memory & (UVAS_VM_HUGE_PAGE - 1);
    if (before > 0) {
        (void)syscall(SYS_munmap, memory, before);
    }
    memory += before;
    if (spare > before) {
        (void)syscall(SYS_munmap, memory + size_bytes, spare - before);
    }
    (void)syscall(SYS_madvise, memory, size_bytes, MADV_HUGEPAGE); /* where the kernel will not, they are small pages */
    return memory;
}
