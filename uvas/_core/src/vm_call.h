/* vm_call.h: how a system call is made. For the files that make them, and no others (userfault.c, beside them, goes by vm.h):
 *
 *   vm.c          addresses and the memory in them; the only use of the destructive MAP_FIXED
 *   vm_files.c    descriptors
 *   vm_maps.c     what the kernel says is there
 *   vm_process.c  other threads, other processes, copies through the kernel
 *   vm_learn.c    what this kernel does, found out once by trying
 *   vm_imitate.c  calls that the tests want to fail, and kernels that they want to meet
 *
 * Everything goes through syscall(2): libc's wrappers are intercepted by sanitizers, and GCC 12's ThreadSanitizer turns an mmap that it does
 * not like into one at address 0. Every call that can fail first passes the gate, the fault knob of the tests; every mmap passes uvas_vm_map, where
 * the tests' other kernels are imitated. Both are always compiled in, off by default, and cost one predictable branch.
 *
 * The constants that older headers lack are the kernel's ABI (include/uapi/linux), given here and there by value.
 */
#ifndef UVAS_VM_CALL_H
#define UVAS_VM_CALL_H

#include <errno.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vm.h"

_Static_assert(sizeof(uintptr_t) == 8 && sizeof(long) == 8, "uvas knows 64-bit Linux only");

#ifdef __alpha__
#define NOREPLACE 0x200000
#else
#define NOREPLACE 0x100000
#endif
#define GUARD_INSTALL 102 /* MADV_GUARD_INSTALL, Linux 6.13 */
#define GUARD_REMOVE 103
#define PAGE (uvas_vm_platform.page_size)
#define STRAY_TRIES 3 /* to give back a mapping that landed elsewhere */
#define SHARED_ALIGN_MAX ((size_t)4 << 20) /* parisc's SHMLBA, the largest known */

/* -- vm_imitate.c -- */

#pragma GCC visibility push(hidden) /* read by every call: not by way of the table that a definition elsewhere would need */
/* The fault knob; 0: the gate costs one branch. Written by uvas_test_fail, after the rest of the knob; read by every call, acquire. */
extern _Atomic uint32_t uvas_vm_armed;
/* The kernel that is imitated and what it lacks: written by uvas_test_kernel while no reservation lives, read by every call, relaxed. */
extern _Atomic uint32_t uvas_vm_imitated;
extern _Atomic uint32_t uvas_vm_lacking;
#pragma GCC visibility pop
int uvas_vm_gate_armed(void);
long uvas_vm_map_imitated(uint32_t kernel, uintptr_t base, size_t size, int protection, int flags, int fd, int64_t offset);

/* -- vm_maps.c -- */

bool uvas_vm_query_learn(void); /* whether this kernel answers PROCMAP_QUERY */

/* -- calls -- */

/* 0, or the error that the next system call shall answer. */
static inline int gate(void) {
    if (__builtin_expect(atomic_load_explicit(&uvas_vm_armed, memory_order_acquire) != 0, 0)) {
        return uvas_vm_gate_armed();
    }
    return 0;
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

UVAS_FLAT long uvas_vm_map_native(uintptr_t base, size_t size, int protection, int flags, int fd, int64_t offset) {
    long at = syscall(SYS_mmap, base, size, protection, flags, fd, offset);
    return at == -1 ? -errno : at;
}

UVAS_FLAT long uvas_vm_map(uintptr_t base, size_t size, int protection, int flags, int fd, int64_t offset) {
    int refused = gate();
    if (refused) {
        return -refused;
    }
    uint32_t kernel = atomic_load_explicit(&uvas_vm_imitated, memory_order_relaxed);
    if (__builtin_expect(kernel > UVAS_KERNEL_NOREPLACE, 0)) {
        return uvas_vm_map_imitated(kernel, base, size, protection, flags, fd, offset);
    }
    return uvas_vm_map_native(base, size, protection, flags, fd, offset);
}

/* Maps at base or nowhere. The kernel's answer is compared with the request whatever it promised. */
UVAS_FLAT int uvas_vm_map_exactly(uintptr_t base, size_t size, int protection, int flags, int fd, int64_t offset, uintptr_t *stray) {
    long at = uvas_vm_map(base, size, protection, flags, fd, offset);
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

static inline int uvas_vm_exact_flag(void) {
    uint32_t flag = uvas_vm_platform.flag;
    return flag == UVAS_FLAG_PARTIAL || flag == UVAS_FLAG_REFUSED ? 0 : NOREPLACE;
}

#endif
