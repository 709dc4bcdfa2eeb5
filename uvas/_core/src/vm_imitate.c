/* vm_imitate.c: what tests can make of the kernel: the k-th call fails, or mmap behaves as on another kernel. Written by tests, read by every call of
 * every thread (vm_call.h).
 */
#define _GNU_SOURCE
#include "vm_call.h"

_Atomic uint32_t uvas_vm_armed;
_Atomic uint32_t uvas_vm_imitated;
_Atomic uint32_t uvas_vm_lacking;

/* ---- the fault knob ---------------------------------------------------------------------------------------------------------------------------- */

static struct {
    _Atomic uint64_t countdown; /* calls left until the first failure; any thread decrements */
    _Atomic uint64_t calls;
    _Atomic int32_t error;
    _Atomic uint32_t lasting;
} knob;

void uvas_test_fail(uint64_t k, int32_t error, uint32_t lasting) {
    atomic_store_explicit(&uvas_vm_armed, 0, memory_order_seq_cst);
    atomic_store(&knob.error, error);
    atomic_store(&knob.lasting, lasting);
    atomic_store(&knob.countdown, k);
    atomic_store(&knob.calls, 0);
    atomic_store_explicit(&uvas_vm_armed, 1, memory_order_seq_cst);
}

uint64_t uvas_test_calls(void) {
    return atomic_load(&knob.calls);
}

int uvas_vm_gate_armed(void) {
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

int uvas_vm_gate(void) {
    return gate();
}

/* ---- other kernels' ways with mmap ------------------------------------------------------------------------------------------------------------- */

/* 4.17 asked only whether something covers the first page, and then went on as the destructive flag does. The imitation clobbers too:
 * that is the point, and uvas, which has probed for it, must never get here. */
static long map_partial_bug(uintptr_t base, size_t size, int protection, int flags, int fd, int64_t offset) {
    long first = uvas_vm_map_native(base, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | NOREPLACE, -1, 0);
    if (first < 0) {
        return first;
    }
    (void)syscall(SYS_munmap, base, size);
    return uvas_vm_map_native(base, size, protection, flags, fd, offset);
}

long uvas_vm_map_imitated(uint32_t kernel, uintptr_t base, size_t size, int protection, int flags, int fd, int64_t offset) {
    bool exact = (flags & NOREPLACE) != 0;
    bool placed_by_colour = (fd >= 0 || (flags & MAP_SHARED)) && ((base - (uintptr_t)offset) & (SHARED_ALIGN_MAX - 1)) != 0;
    switch (kernel) {
    case UVAS_KERNEL_ENOMEM: {
        long at = uvas_vm_map_native(base, size, protection, flags, fd, offset);
        return exact && at == -EEXIST ? -ENOMEM : at;
    }
    case UVAS_KERNEL_HINT:
        return uvas_vm_map_native(base, size, protection, flags & ~NOREPLACE, fd, offset);
    case UVAS_KERNEL_HINT_FUSSY: /* moves from every odd 2 MiB, free or not */
        return uvas_vm_map_native(exact && ((base >> 21) & 1) ? 0 : base, size, protection, flags & ~NOREPLACE, fd, offset);
    case UVAS_KERNEL_PARTIAL:
        return exact ? map_partial_bug(base, size, protection, flags, fd, offset) : uvas_vm_map_native(base, size, protection, flags, fd, offset);
    case UVAS_KERNEL_REFUSED:
        return exact ? -EOPNOTSUPP : uvas_vm_map_native(base, size, protection, flags, fd, offset);
    case UVAS_KERNEL_ALIGNS:
        if (placed_by_colour && !exact && base != 0) { /* the destructive one */
            return (flags & MAP_SHARED) ? -EINVAL : uvas_vm_map_native(base, size, protection, flags, fd, offset);
        }
        if (placed_by_colour && exact) {
            return uvas_vm_map_native(0, size, protection, flags & ~NOREPLACE, fd, offset);
        }
        return uvas_vm_map_native(base, size, protection, flags, fd, offset);
    default:
        return uvas_vm_map_native(base, size, protection, flags, fd, offset);
    }
}

void uvas_vm_imitate(uint32_t kernel, uint32_t lacks) {
    atomic_store(&uvas_vm_imitated, kernel);
    atomic_store(&uvas_vm_lacking, lacks);
}
