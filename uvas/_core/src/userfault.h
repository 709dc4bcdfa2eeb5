/* userfault.h: the system calls of userfaultfd(2), one function each, beside those of vm.h and under the same rules.
 *
 * A descriptor acts on the address space that it was made in, also when another process has been handed it: so one thread serves the faults of a
 * worker, whose code need not run for it. Ranges are whole pages. Calls that install pages return how many bytes they did, which may be fewer than
 * asked, or -errno where it is none:
 *   -EEXIST  the first page is there already          -ENOENT  no such mapping, or none that is registered (any more)
 *   -EBUSY   the page is pinned, or shared with a child of fork (move)    -ESRCH   that process has ended
 *   -EFAULT  the source is not there (a hole)         -ENOMEM  no memory
 */
#ifndef UVAS_USERFAULT_H
#define UVAS_USERFAULT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum uvas_fault_feature { /* what the kernel can, beyond what every kernel with userfaultfd can */
    UVAS_FAULT_MOVES = 1,     /* Linux 6.8: pages are moved, not copied */
    UVAS_FAULT_POISONS = 2,   /* Linux 6.6 */
    UVAS_FAULT_USER_ONLY = 4, /* a system call that touches a missing page fails (EFAULT) where code would wait */
};

enum uvas_fault_kind { UVAS_FAULT_WRITE = 1, UVAS_FAULT_PROTECTED = 2, UVAS_FAULT_MINOR = 4 };

struct uvas_fault {
    uintptr_t address;
    uint32_t kind; /* set of enum uvas_fault_kind */
    uint32_t thread;
};

/* For the host's private anonymous memory, or for a worker's shared one. -EPERM: this process may not; -ENOSYS, -EOPNOTSUPP: this kernel cannot. */
int uvas_fault_open(bool shared, uint32_t *features);
int uvas_fault_register(int fd, uintptr_t base, size_t size, bool shared);
/* Only so that writes wait: a hole is no fault. For staging. */
int uvas_fault_register_staging(int fd, uintptr_t base, size_t size);
int uvas_fault_unregister(int fd, uintptr_t base, size_t size);
/* Faults that wait to be served, at most `count`: how many, or -errno; -EAGAIN: none. */
long uvas_fault_read(int fd, struct uvas_fault *out, size_t count);

int uvas_fault_wake(int fd, uintptr_t base, size_t size);
/* None of these wakes. */
long uvas_fault_copy(int fd, uintptr_t to, const void *from, size_t size, bool protect);
long uvas_fault_zero(int fd, uintptr_t base, size_t size);
long uvas_fault_map(int fd, uintptr_t base, size_t size, bool protect); /* pages that the file has already */
long uvas_fault_move(int fd, uintptr_t to, uintptr_t from, size_t size);
long uvas_fault_poison(int fd, uintptr_t base, size_t size);
int uvas_fault_protect(int fd, uintptr_t base, size_t size);
int uvas_fault_unprotect(int fd, uintptr_t base, size_t size); /* wakes who waited for it */

/* -- waiting: for threads that must not use what a thread that waits for them may hold (malloc, stdio) -- */

int uvas_bell_open(void); /* a descriptor that rings: readable from uvas_bell_ring to uvas_bell_hush */
void uvas_bell_ring(int bell);
void uvas_bell_hush(int bell);
/* A set of descriptors to wait for, each known by the caller's number for it. */
int uvas_watch_open(void);
int uvas_watch_add(int set, int fd, uint64_t number);
void uvas_watch_remove(int set, int fd);
/* Until one is readable, or its other side has ended, or so many nanoseconds have passed (< 0: for ever). How many numbers of ready ones are in *out. */
uint32_t uvas_watch_wait(int set, uint64_t *out, uint32_t most, int64_t timeout_ns);
void uvas_pause_ns(uint64_t ns);
void uvas_wait_exactly(void); /* the calling thread's timeouts are not rounded up by 50 us any more */
uint64_t uvas_clock_ns(void);
void uvas_say(const char *text, size_t size); /* to stderr, as it is */

#endif
