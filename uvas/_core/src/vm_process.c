/* vm_process.c: other threads and processes, and copies through the kernel, which answers where a touch of our own would be a fault. See vm.h.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/uio.h>

#include "vm_call.h"

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_membarrier
#define SYS_membarrier (-1)
#endif
#define BARRIER_PRIVATE 8 /* MEMBARRIER_CMD_PRIVATE_EXPEDITED, Linux 4.14 */
#define BARRIER_REGISTER_PRIVATE 16
#define PARENT_POLL_MS 50  /* where pidfd_open is lacking */

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

int uvas_vm_processor(void) {
    return sched_getcpu();
}

void uvas_vm_keep_off(pthread_t thread, int processor) {
    cpu_set_t may;
    if (sched_getaffinity(0, sizeof may, &may) == 0 && CPU_COUNT(&may) > 1) { /* fails where there are more than the set has room for */
        CPU_CLR((unsigned)processor, &may);
        (void)pthread_setaffinity_np(thread, sizeof may, &may);
    }
}

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
