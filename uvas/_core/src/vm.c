/* vm.c: the only system calls of uvas, and the only use of the destructive MAP_FIXED.
 *
 * Everything goes through syscall(2): libc's wrappers are intercepted by sanitizers, and GCC 12's ThreadSanitizer turns an mmap that it does
 * not like into one at address 0. Every call that can fail first passes `gate`, the fault knob of the tests; every mmap passes `map`, where
 * the tests' other kernels are imitated. Both are always compiled in, off by default, and cost one predictable branch.
 *
 * The constants that older headers lack are the kernel's ABI (include/uapi/linux), given here by value.
 */
#define _GNU_SOURCE
#include "vm.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

_Static_assert(sizeof(uintptr_t) == 8 && sizeof(long) == 8, "uvas knows 64-bit Linux only");
_Static_assert(UVAS_READ == PROT_READ && UVAS_WRITE == PROT_WRITE && UVAS_EXECUTE == PROT_EXEC, "protections are passed through");

#ifdef __alpha__
#define NOREPLACE 0x200000
#else
#define NOREPLACE 0x100000
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#define GUARD_INSTALL 102 /* MADV_GUARD_INSTALL, Linux 6.13 */
#define GUARD_REMOVE 103
#define DONTNEED_LOCKED 24 /* MADV_DONTNEED_LOCKED, Linux 5.18 */
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_membarrier
#define SYS_membarrier (-1)
#endif
#define BARRIER_PRIVATE 8 /* MEMBARRIER_CMD_PRIVATE_EXPEDITED, Linux 4.14 */
#define BARRIER_REGISTER_PRIVATE 16
#define MBIND_BIND 2 /* MPOL_BIND */
#define MEMFD_HUGE_2MB (21U << 26)
#define HUGETLBFS_MAGIC_NUMBER 0x958458f6

struct procmap_query_abi { /* struct procmap_query, Linux 6.11 */
    uint64_t size, query_flags, query_addr, vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
    uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
    uint64_t vma_name_addr, build_id_addr;
};
_Static_assert(sizeof(struct procmap_query_abi) == 104, "the kernel's layout");
#define QUERY_COMMAND _IOWR('f', 17, struct procmap_query_abi)
#define QUERY_COVERING_OR_NEXT 0x10u
#define QUERY_FLAG_SHARED 0x08u

#define PAGE (uvas_vm_platform.page_size)
#define STRAY_TRIES 3      /* to give back a mapping that landed elsewhere */
#define PROBE_TRIES 8      /* of one property of the kernel, where another thread may be in the way */
#define SHARED_ALIGN_MAX ((size_t)4 << 20) /* parisc's SHMLBA, the largest known */
#define NODES_MAX 1024       /* the most that kernels are built for */
#define RESIDENT_BATCH 16384 /* pages asked of mincore at once */
#define LEAST_PAGE 4096u
#define PARENT_POLL_MS 50  /* where pidfd_open is lacking */

struct uvas_platform uvas_vm_platform;

/* ---- the fault knob: written by tests, read by every call of every thread -------------------------------------------------- */

static struct {
    _Atomic uint32_t armed;    /* 0: `gate` costs one branch. Relaxed: tests order their threads themselves */
    _Atomic uint64_t countdown; /* calls left until the first failure; any thread decrements */
    _Atomic uint64_t calls;
    _Atomic int32_t error;
    _Atomic uint32_t lasting;
} knob;

/* The kernel that is imitated and what it lacks: written by uvas_test_kernel while no reservation lives, read by every call, relaxed. */
static _Atomic uint32_t imitated;
static _Atomic uint32_t lacking;

void uvas_test_fail(uint64_t k, int32_t error, uint32_t lasting) {
    atomic_store_explicit(&knob.armed, 0, memory_order_seq_cst);
    atomic_store(&knob.error, error);
    atomic_store(&knob.lasting, lasting);
    atomic_store(&knob.countdown, k);
    atomic_store(&knob.calls, 0);
    atomic_store_explicit(&knob.armed, 1, memory_order_seq_cst);
}

uint64_t uvas_test_calls(void) {
    return atomic_load(&knob.calls);
}

static int gate_armed(void) {
    atomic_fetch_add(&knob.calls, 1);
    uint64_t left = atomic_load(&knob.countdown);
    while (left != 0) { /* 0: nothing to fail */
        uint64_t next = left > 1 ? left - 1 : (atomic_load(&knob.lasting) ? 1 : 0);
        if (atomic_compare_exchange_weak(&knob.countdown, &left, next)) {
            return left == 1 ? atomic_load(&knob.error) : 0;
        }
    }
    return 0;
}

/* 0, or the error that the next system call shall answer. */
static inline int gate(void) {
    if (__builtin_expect(atomic_load_explicit(&knob.armed, memory_order_acquire) != 0, 0)) {
        return gate_armed();
    }
    return 0;
}

int uvas_vm_gate(void) {
    return gate();
}

#define GATED(call)                              \
    do {                                         \
        int refused = gate();                    \
        if (refused) {                           \
            return -refused;                     \
        }                                        \
        long answer = (call);                    \
        return answer < 0 ? -errno : (int)answer; \
    } while (0)

/* ---- mmap, and other kernels' ways with it ------------------------------------------------------------------------------------- */

/* Between a system call and the caller: each return after the kernel was entered is mispredicted, as it empties the stack of return addresses. */
#define FLAT static inline __attribute__((always_inline))

FLAT long map_native(uintptr_t base, size_t size, int protection, int flags, int fd, int64_t offset) {
    long at = syscall(SYS_mmap, base, size, protection, flags, fd, offset);
    return at == -1 ? -errno : at;
}

/* 4.17 asked only whether something covers the first page, and then went on as the destructive flag does. The imitation clobbers too:
 * that is the point, and uvas, which has probed for it, must never get here. */
static long map_partial_bug(uintptr_t base, size_t size, int protection, int flags, int fd, int64_t offset) {
    long first = map_native(base, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | NOREPLACE, -1, 0);
    if (first < 0) {
        return first;
    }
    (void)syscall(SYS_munmap, base, size);
    return map_native(base, size, protection, flags, fd, offset);
}

static long map_imitated(uint32_t kernel, uintptr_t base, size_t size, int protection, int flags, int fd, int64_t offset) {
    bool exact = (flags & NOREPLACE) != 0;
    bool placed_by_colour = (fd >= 0 || (flags & MAP_SHARED)) && ((base - (uintptr_t)offset) & (SHARED_ALIGN_MAX - 1)) != 0;
    switch (kernel) {
    case UVAS_KERNEL_ENOMEM: {
        long at = map_native(base, size, protection, flags, fd, offset);
        return exact && at == -EEXIST ? -ENOMEM : at;
    }
    case UVAS_KERNEL_HINT:
        return map_native(base, size, protection, flags & ~NOREPLACE, fd, offset);
    case UVAS_KERNEL_HINT_FUSSY: /* moves from every odd 2 MiB, free or not */
        return map_native(exact && ((base >> 21) & 1) ? 0 : base, size, protection, flags & ~NOREPLACE, fd, offset);
    case UVAS_KERNEL_PARTIAL:
        return exact ? map_partial_bug(base, size, protection, flags, fd, offset) : map_native(base, size, protection, flags, fd, offset);
    case UVAS_KERNEL_REFUSED:
        return exact ? -EOPNOTSUPP : map_native(base, size, protection, flags, fd, offset);
    case UVAS_KERNEL_ALIGNS:
        if (placed_by_colour && !exact && base != 0) { /* the destructive one */
            return (flags & MAP_SHARED) ? -EINVAL : map_native(base, size, protection, flags, fd, offset);
        }
        if (placed_by_colour && exact) {
            return map_native(0, size, protection, flags & ~NOREPLACE, fd, offset);
        }
        return map_native(base, size, protection, flags, fd, offset);
    default:
        return map_native(base, size, protection, flags, fd, offset);
    }
}

FLAT long map(uintptr_t base, size_t size, int protection, int flags, int fd, int64_t offset) {
    int refused = gate();
    if (refused) {
        return -refused;
    }
    uint32_t kernel = atomic_load_explicit(&imitated, memory_order_relaxed);
    if (__builtin_expect(kernel > UVAS_KERNEL_NOREPLACE, 0)) {
        return map_imitated(kernel, base, size, protection, flags, fd, offset);
    }
    return map_native(base, size, protection, flags, fd, offset);
}

/* ---- addresses ----------------------------------------------------------------------------------------------------------------- */

/* Maps at base or nowhere. The kernel's answer is compared with the request whatever it promised. */
FLAT int map_exactly(uintptr_t base, size_t size, int protection, int flags, int fd, int64_t offset, uintptr_t *stray) {
    long at = map(base, size, protection, flags, fd, offset);
    *stray = 0;
    if (at < 0) {
        return (int)at;
    }
    if ((uintptr_t)at == base) {
        return 0;
    }
    for (int tries = 0; tries < STRAY_TRIES; tries++) {
        if (uvas_vm_unmap((uintptr_t)at, size) == 0) {
            return UVAS_VM_MOVED;
        }
    }
    *stray = (uintptr_t)at;
    return UVAS_VM_MOVED;
}

static int exact_flag(void) {
    uint32_t flag = uvas_vm_platform.flag;
    return flag == UVAS_FLAG_PARTIAL || flag == UVAS_FLAG_REFUSED ? 0 : NOREPLACE;
}

int uvas_vm_reserve(uintptr_t base, size_t size, int tag, uintptr_t *stray) {
    assert(base != 0 && size != 0 && base % PAGE == 0 && size % PAGE == 0);
    int flags = MAP_PRIVATE | MAP_NORESERVE | exact_flag();
    if (tag < 0) {
        return map_exactly(base, size, PROT_NONE, flags | MAP_ANONYMOUS, -1, 0, stray);
    }
    return map_exactly(base, size, PROT_NONE, flags, tag, (int64_t)base, stray);
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
    long at = map(base, size, (int)protection, flags, fd, offset);
    assert(at < 0 || (uintptr_t)at == base);
    return at < 0 ? (int)at : 0;
}

int uvas_vm_try(size_t size, enum uvas_vm_overlay_kind kind, uint32_t protection, int fd, int64_t offset) {
    assert(fd >= 0 && (kind == UVAS_OVERLAY_SHARED || kind == UVAS_OVERLAY_PRIVATE));
    long at = map(0, size, (int)protection, kind == UVAS_OVERLAY_SHARED ? MAP_SHARED : MAP_PRIVATE, fd, offset);
    return at < 0 ? (int)at : uvas_vm_unmap((uintptr_t)at, size);
}

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

/* ---- descriptors --------------------------------------------------------------------------------------------------------------- */

static int memfd(const char *name, unsigned flags) {
    int refused = gate();
    if (refused) {
        return -refused;
    }
    long fd = syscall(SYS_memfd_create, name, flags | MFD_NOEXEC_SEAL | MFD_CLOEXEC);
    if (fd < 0 && errno == EINVAL) { /* before 6.3 */
        fd = syscall(SYS_memfd_create, name, flags | MFD_CLOEXEC);
    }
    return fd < 0 ? -errno : (int)fd;
}

int uvas_vm_tag(const char *name) {
    int fd = memfd(name, MFD_ALLOW_SEALING);
    if (fd >= 0) { /* seals are a courtesy to those who look at the descriptor: no mapping of ours depends on them */
        (void)syscall(SYS_fcntl, fd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_WRITE | F_SEAL_SEAL);
    }
    return fd;
}

static int truncate_to(int fd, size_t size) {
    GATED(syscall(SYS_ftruncate, fd, size));
}

int uvas_vm_memfd(const char *name, size_t size) {
    int fd = memfd(name, 0);
    if (fd < 0) {
        return fd;
    }
    int rc = truncate_to(fd, size);
    if (rc < 0) {
        uvas_vm_close(fd);
        return rc;
    }
    return fd;
}

int uvas_vm_punch_surely(int fd, int64_t offset, size_t size) {
    return syscall(SYS_fallocate, fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size) == 0 ? 0 : -errno;
}

int uvas_vm_punch(int fd, int64_t offset, size_t size) {
    int refused = gate();
    return refused ? -refused : uvas_vm_punch_surely(fd, offset, size);
}

int uvas_vm_allocate(int fd, int64_t offset, size_t size) {
    GATED(syscall(SYS_fallocate, fd, 0, offset, size));
}

long uvas_vm_write_at(int fd, const void *from, size_t size, int64_t offset) {
    int refused = gate();
    if (refused) {
        return -refused;
    }
    long put = syscall(SYS_pwrite64, fd, from, size, offset);
    return put < 0 ? -errno : put;
}

long uvas_vm_read_at(int fd, void *out, size_t size, int64_t offset) {
    int refused = gate();
    if (refused) {
        return -refused;
    }
    long got = syscall(SYS_pread64, fd, out, size, offset);
    return got < 0 ? -errno : got;
}

int uvas_vm_open_pages(void) {
    GATED(syscall(SYS_openat, AT_FDCWD, "/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
}

int uvas_vm_open_memory(void) {
    GATED(syscall(SYS_openat, AT_FDCWD, "/proc/self/mem", O_RDONLY | O_CLOEXEC));
}

int uvas_vm_duplicate(int fd) {
    GATED(syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, 3));
}

void uvas_vm_close(int fd) {
    if (fd >= 0) {
        (void)syscall(SYS_close, fd);
    }
}

int uvas_vm_identify(int fd, struct uvas_file_id *out) {
    struct stat file;
    struct statfs system;
    int refused = gate();
    if (refused) {
        return -refused;
    }
    if (fstat(fd, &file) < 0) {
        return -errno;
    }
    out->inode = file.st_ino;
    out->device_major = major(file.st_dev);
    out->device_minor = minor(file.st_dev);
    int status = fcntl(fd, F_GETFL);
    out->access = status < 0 ? -1 : status & O_ACCMODE;
    out->regular = S_ISREG(file.st_mode);
    out->block_size = (uint32_t)PAGE;
    if (fstatfs(fd, &system) == 0 && (uint32_t)system.f_type == HUGETLBFS_MAGIC_NUMBER) {
        out->block_size = (uint32_t)system.f_bsize;
    }
    return 0;
}

/* ---- what is there --------------------------------------------------------------------------------------------------------------- */

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

long uvas_vm_read(int fd, void *out, size_t size) {
    int refused = gate();
    if (refused) {
        return -refused;
    }
    for (;;) {
        long got = syscall(SYS_read, fd, out, size);
        if (got >= 0 || errno != EINTR) {
            return got < 0 ? -errno : got;
        }
    }
}

long uvas_vm_read_file(const char *path, char *out, size_t size) {
    int refused = gate();
    if (refused) {
        return -refused;
    }
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return -errno;
    }
    long got = uvas_vm_read(fd, out, size - 1);
    uvas_vm_close(fd);
    out[got > 0 ? got : 0] = 0;
    return got;
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

/* ---- our own bookkeeping --------------------------------------------------------------------------------------------------------- */

void *uvas_vm_pages(size_t size_bytes) {
    if (gate()) {
        return NULL;
    }
    long at = map_native(0, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at < 0 ? NULL : (void *)at;
}

int uvas_vm_dont_fork(void *at, size_t size_bytes) {
    GATED(syscall(SYS_madvise, at, size_bytes, MADV_DONTFORK));
}

void *uvas_vm_alias(int fd, size_t size_bytes) {
    long at = map(0, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (at < 0) {
        return NULL;
    }
    if (uvas_vm_dont_fork((void *)at, size_bytes) < 0) {
        (void)syscall(SYS_munmap, at, size_bytes);
        return NULL;
    }
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

/* ---- for arenas ------------------------------------------------------------------------------------------------------------------ */

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

int uvas_vm_memfd_huge(const char *name, size_t size) {
    int fd = memfd(name, MFD_CLOEXEC | MFD_HUGETLB | MEMFD_HUGE_2MB);
    int rc = fd < 0 ? fd : truncate_to(fd, size);
    if (rc < 0) {
        uvas_vm_close(fd);
        return rc;
    }
    return fd;
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

int uvas_vm_barrier_learn(void) {
    return syscall(SYS_membarrier, BARRIER_REGISTER_PRIVATE, 0, 0) == 0 && syscall(SYS_membarrier, BARRIER_PRIVATE, 0, 0) == 0 ? 0 : -ENOSYS;
}

void uvas_vm_barrier(void) {
    if (syscall(SYS_membarrier, BARRIER_PRIVATE, 0, 0) < 0) {
        abort(); /* it worked before: a filter was put up since, and without it threads would trample on each other */
    }
}

void uvas_vm_yield(void) {
    (void)syscall(SYS_sched_yield);
}

/* ---- processes, and copies through the kernel --------------------------------------------------------------------------------------- */

int uvas_vm_wait_for_end(int32_t parent) {
    int fd = (int)syscall(SYS_pidfd_open, parent, 0);
    while (syscall(SYS_getppid) == parent) { /* also: it ended before the descriptor was there, and the number may be another's */
        struct pollfd wait = {.fd = fd, .events = POLLIN};
        (void)poll(&wait, fd >= 0, fd >= 0 ? -1 : PARENT_POLL_MS);
    }
    uvas_vm_close(fd);
    return 0;
}

void uvas_vm_exit(int status) {
    (void)syscall(SYS_exit_group, status);
}

/* A kernel that forbids process_vm_readv (seccomp, gVisor) still copies through a pipe, a page at a time: a pipe takes that much at once. */
static int copy_by_pipe(uintptr_t from, uintptr_t to, size_t size) {
    int ends[2];
    if (syscall(SYS_pipe2, ends, O_CLOEXEC) < 0) {
        return -errno;
    }
    int rc = 0;
    for (size_t done = 0; rc == 0 && done < size;) {
        size_t part = size - done < PAGE ? size - done : PAGE;
        long put = syscall(SYS_write, ends[1], from + done, part);
        long got = put <= 0 ? put : syscall(SYS_read, ends[0], to + done, put);
        if (got <= 0) {
            rc = got < 0 ? -errno : -EFAULT;
        }
        done += got > 0 ? (size_t)got : 0;
    }
    uvas_vm_close(ends[0]);
    uvas_vm_close(ends[1]);
    return rc;
}

static int copy_through_kernel(uintptr_t from, uintptr_t to, size_t size, long call, uintptr_t ours, uintptr_t asked) {
    for (size_t done = 0; done < size;) {
        struct iovec local = {(void *)(ours + done), size - done};
        struct iovec remote = {(void *)(asked + done), size - done};
        long moved = syscall(call, syscall(SYS_getpid), &local, 1, &remote, 1, 0);
        if (moved > 0) {
            done += (size_t)moved;
        } else if (moved < 0 && (errno == EPERM || errno == ENOSYS)) {
            return copy_by_pipe(from + done, to + done, size - done);
        } else {
            return moved < 0 && errno != EFAULT ? -errno : -EFAULT;
        }
    }
    return 0;
}

int uvas_peek(uintptr_t address, void *out, size_t size) {
    uintptr_t ours = (uintptr_t)out;
    return copy_through_kernel(address, ours, size, SYS_process_vm_readv, ours, address);
}

int uvas_poke(uintptr_t address, const void *data, size_t size) {
    uintptr_t ours = (uintptr_t)data;
    return copy_through_kernel(ours, address, size, SYS_process_vm_writev, ours, address);
}

/* ---- learning what this kernel does, once ------------------------------------------------------------------------------------------- */

static int reserve_flags(void) {
    return MAP_PRIVATE | MAP_NORESERVE | MAP_ANONYMOUS | NOREPLACE;
}

/* A page on top of a page of our own; then two pages whose second is taken (what 4.17 got wrong). */
static int learn_flag(void) {
    size_t page = PAGE;
    long own = map_native(0, 4 * page, PROT_NONE, MAP_PRIVATE | MAP_NORESERVE | MAP_ANONYMOUS, -1, 0);
    if (own < 0) {
        return (int)own;
    }
    uintptr_t base = (uintptr_t)own;
    long over = map(base, page, PROT_NONE, reserve_flags(), -1, 0);
    uint32_t flag = UVAS_FLAG_IGNORED;
    if (over == -EEXIST) {
        flag = UVAS_FLAG_HONOURED;
    } else if (over == -ENOMEM) {
        flag = UVAS_FLAG_ENOMEM;
    } else if (over < 0) {
        flag = UVAS_FLAG_REFUSED;
    } else if ((uintptr_t)over != base) {
        (void)uvas_vm_unmap((uintptr_t)over, page);
    } else {
        flag = UVAS_FLAG_PARTIAL; /* replaced: worse than the known bug, and answered the same way */
    }
    if (flag == UVAS_FLAG_HONOURED && uvas_vm_unmap(base, page) == 0) {
        long both = map(base, 2 * page, PROT_NONE, reserve_flags(), -1, 0);
        flag = both == (long)base ? UVAS_FLAG_PARTIAL : flag;
        base += both == (long)base ? 0 : page; /* the first page is free again, perhaps somebody else's */
    }
    (void)uvas_vm_unmap(base, (uintptr_t)own + 4 * page - base);
    uvas_vm_platform.flag = flag;
    return 0;
}

/* Whether one page can be held at this address: 1, 0, or -EEXIST when something is there. */
static int reachable(uintptr_t base) {
    uintptr_t stray;
    int rc = uvas_vm_reserve(base, PAGE, -1, &stray);
    if (rc == 0) {
        (void)uvas_vm_unmap(base, PAGE);
        return 1;
    }
    return rc == -EEXIST ? -EEXIST : 0;
}

/* The widest power of two in whose upper half a page can be held; and the one that holds what the kernel chose for the stack. */
static void learn_width(void) {
    uintptr_t here = (uintptr_t)getauxval(AT_RANDOM);
    uint32_t native = here ? 64 - (uint32_t)__builtin_clzl(here) : 0;
    uint32_t bits = native;
    for (uint32_t wider = 57; wider > native && bits == native; wider--) {
        for (uintptr_t eighth = 5; eighth <= 7 && bits == native; eighth++) {
            bits = reachable(eighth << (wider - 3)) != 0 ? wider : bits;
        }
    }
    uvas_vm_platform.window_bits = native ? native : bits;
    uvas_vm_platform.address_bits = bits;
}

/* The smallest power of two at which a shared mapping may start. Tried at addresses just freed: another thread may be there, so a refusal
 * counts only if it comes back every time. */
static void learn_shared_alignment(int fd) {
    size_t align = PAGE;
    for (; align < SHARED_ALIGN_MAX; align *= 2) {
        for (int tries = 0; tries < PROBE_TRIES; tries++) {
            uintptr_t stray;
            long room = map_native(0, 4 * SHARED_ALIGN_MAX, PROT_NONE, MAP_PRIVATE | MAP_NORESERVE | MAP_ANONYMOUS, -1, 0);
            if (room < 0) {
                continue;
            }
            (void)syscall(SYS_munmap, room, 4 * SHARED_ALIGN_MAX);
            uintptr_t at = (((uintptr_t)room + 2 * SHARED_ALIGN_MAX) & ~(SHARED_ALIGN_MAX - 1)) + align;
            if (map_exactly(at, PAGE, PROT_NONE, MAP_SHARED | exact_flag(), fd, 0, &stray) == 0) {
                (void)uvas_vm_unmap(at, PAGE);
                uvas_vm_platform.shared_alignment = align;
                return;
            }
        }
    }
    uvas_vm_platform.shared_alignment = align;
}

static void learn_tag(void) {
    int fd = uvas_vm_tag("uvas:probe");
    uvas_vm_platform.has_tag = 0;
    if (fd >= 0 && !(atomic_load(&lacking) & UVAS_LACK_TAG)) {
        long at = map(0, PAGE, PROT_NONE, MAP_PRIVATE | MAP_NORESERVE, fd, (int64_t)PAGE * 16);
        if (at >= 0) {
            (void)uvas_vm_unmap((uintptr_t)at, PAGE);
            uvas_vm_platform.has_tag = 1;
        }
    }
    uvas_vm_close(fd);
}

/* By what it does: qemu-user answers 0 to advice that it ignores. A guard takes the memory, so a mark is gone after it. */
static bool guards(char *own) {
    *(volatile char *)own = 1;
    return syscall(SYS_madvise, own, PAGE, GUARD_INSTALL) == 0 && syscall(SYS_madvise, own, PAGE, GUARD_REMOVE) == 0 && *(volatile char *)own == 0;
}

static void learn_guard(void) {
    long own = map_native(0, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uvas_vm_platform.has_guard = 0;
    if (own >= 0) {
        bool lacks = (atomic_load(&lacking) & UVAS_LACK_GUARD) != 0;
        uvas_vm_platform.has_guard = !lacks && guards((char *)own);
        (void)uvas_vm_unmap((uintptr_t)own, PAGE);
    }
}

static void learn_query(void) {
    struct procmap_query_abi ask = {0};
    bool lacks = (atomic_load(&lacking) & UVAS_LACK_QUERY) != 0;
    uvas_vm_platform.has_procmap_query = !lacks && query((uintptr_t)&ask, &ask) == 1;
}

int uvas_vm_learn(void) {
    uvas_vm_platform = (struct uvas_platform){.page_size = (size_t)getauxval(AT_PAGESZ)};
    if (uvas_vm_platform.page_size == 0) {
        uvas_vm_platform.page_size = (size_t)sysconf(_SC_PAGESIZE);
    }
    int rc = learn_flag();
    if (rc < 0) {
        return rc;
    }
    learn_width();
    learn_tag();
    learn_guard();
    learn_query();
    uvas_vm_platform.shared_alignment = PAGE;
    int fd = uvas_vm_memfd("uvas:probe", PAGE);
    if (fd >= 0) {
        learn_shared_alignment(fd);
    }
    uvas_vm_close(fd);
    return 0;
}

void uvas_vm_imitate(uint32_t kernel, uint32_t lacks) {
    atomic_store(&imitated, kernel);
    atomic_store(&lacking, lacks);
}
