/* userfault.c: see userfault.h. The kernel's ABI (include/uapi/linux/userfaultfd.h) is given here by value: headers lag behind kernels. */
#define _GNU_SOURCE
#include "userfault.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "vm.h"

#ifndef SYS_userfaultfd
#define SYS_userfaultfd (-1)
#endif
#ifndef SYS_epoll_pwait2
#define SYS_epoll_pwait2 441
#endif
#define USER_MODE_ONLY 1u
#define NEW_FROM_DEVICE _IO(0xAA, 0x00) /* of /dev/userfaultfd, Linux 6.1 */

#define API_VERSION 0xAAu
#define FEATURE_PROTECT (1u << 0)
#define FEATURE_MISSING_SHMEM (1u << 5)
#define FEATURE_THREAD (1u << 8)
#define FEATURE_MINOR_SHMEM (1u << 10)
#define FEATURE_PROTECT_SHMEM (1u << 12)
#define FEATURE_POISON (1u << 14)
#define FEATURE_MOVE (1u << 16)
#define HOST_NEEDS (FEATURE_PROTECT | FEATURE_THREAD)
#define WORKER_NEEDS (HOST_NEEDS | FEATURE_MISSING_SHMEM | FEATURE_MINOR_SHMEM | FEATURE_PROTECT_SHMEM)

#define MODE_MISSING 1u
#define MODE_PROTECT 2u
#define MODE_MINOR 4u
#define DONT_WAKE 1u
#define COPY_PROTECTED 2u
#define MOVE_OVER_HOLES 2u
#define PROTECT_ON 1u

#define EVENT_PAGEFAULT 0x12
#define MOST_READ 32

struct api_abi {
    uint64_t api, features, ioctls;
};
struct range_abi {
    uint64_t start, len;
};
struct register_abi {
    struct range_abi range;
    uint64_t mode, ioctls;
};
struct copy_abi { /* of COPY and of MOVE */
    uint64_t dst, src, len, mode;
    int64_t done;
};
struct fill_abi { /* of ZEROPAGE, CONTINUE and POISON */
    struct range_abi range;
    uint64_t mode;
    int64_t done;
};
struct protect_abi {
    struct range_abi range;
    uint64_t mode;
};
struct message_abi {
    uint8_t event, reserved[7];
    uint64_t flags, address;
    uint32_t thread, padding;
};
_Static_assert(sizeof(struct message_abi) == 32, "the kernel's layout");

#define CALL_API _IOWR(0xAA, 0x3F, struct api_abi)
#define CALL_REGISTER _IOWR(0xAA, 0x00, struct register_abi)
#define CALL_UNREGISTER _IOR(0xAA, 0x01, struct range_abi)
#define CALL_WAKE _IOR(0xAA, 0x02, struct range_abi)
#define CALL_COPY _IOWR(0xAA, 0x03, struct copy_abi)
#define CALL_ZERO _IOWR(0xAA, 0x04, struct fill_abi)
#define CALL_MOVE _IOWR(0xAA, 0x05, struct copy_abi)
#define CALL_PROTECT _IOWR(0xAA, 0x06, struct protect_abi)
#define CALL_CONTINUE _IOWR(0xAA, 0x07, struct fill_abi)
#define CALL_POISON _IOWR(0xAA, 0x08, struct fill_abi)

static int call(int fd, unsigned long request, void *argument) {
    int refused = uvas_vm_gate();
    if (refused) {
        return -refused;
    }
    return syscall(SYS_ioctl, fd, request, argument) == 0 ? 0 : -errno;
}

/* ---- opening -------------------------------------------------------------------------------------------------------------------- */

/* Root, CAP_SYS_PTRACE or the sysctl may take it from the system call; who may open /dev/userfaultfd gets it there; anybody gets one that serves
 * user code only. */
static int open_any(bool *user_only) {
    *user_only = false;
    int refused = uvas_vm_gate();
    if (refused) {
        return -refused;
    }
    long fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 && errno == EPERM) {
        int device = (int)syscall(SYS_openat, AT_FDCWD, "/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        fd = device < 0 ? -1 : syscall(SYS_ioctl, device, NEW_FROM_DEVICE, O_CLOEXEC | O_NONBLOCK);
        uvas_vm_close(device);
        if (fd < 0) {
            *user_only = true;
            fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | USER_MODE_ONLY);
        }
    }
    return fd < 0 ? -errno : (int)fd;
}

static int shake_hands(int fd, uint64_t features, uint64_t *offered) {
    struct api_abi api = {.api = API_VERSION, .features = features};
    int rc = call(fd, CALL_API, &api);
    *offered = api.features;
    return rc == -EINVAL ? -EOPNOTSUPP : rc;
}

int uvas_fault_open(bool shared, uint32_t *features) {
    uint64_t needed = shared ? WORKER_NEEDS : HOST_NEEDS, offered;
    bool user_only;
    int asked = open_any(&user_only); /* hands are shaken once a descriptor: the first one only asks what there is */
    int rc = asked < 0 ? asked : shake_hands(asked, 0, &offered);
    uvas_vm_close(asked);
    if (rc < 0) {
        return rc;
    }
    if ((offered & needed) != needed) {
        return -EOPNOTSUPP;
    }
    int fd = open_any(&user_only);
    uint64_t wanted = needed | (offered & (FEATURE_MOVE | FEATURE_POISON));
    rc = fd < 0 ? fd : shake_hands(fd, wanted, &offered);
    if (rc < 0) {
        uvas_vm_close(fd);
        return rc;
    }
    *features = (wanted & FEATURE_MOVE ? UVAS_FAULT_MOVES : 0u) | (wanted & FEATURE_POISON ? UVAS_FAULT_POISONS : 0u) |
                (user_only ? UVAS_FAULT_USER_ONLY : 0u);
    return fd;
}

/* ---- ranges --------------------------------------------------------------------------------------------------------------------- */

static int enrol(int fd, uintptr_t base, size_t size, uint64_t mode) {
    struct register_abi ask = {.range = {base, size}, .mode = mode};
    return call(fd, CALL_REGISTER, &ask);
}

int uvas_fault_register(int fd, uintptr_t base, size_t size, bool shared) {
    return enrol(fd, base, size, MODE_MISSING | MODE_PROTECT | (shared ? MODE_MINOR : 0u));
}

int uvas_fault_register_staging(int fd, uintptr_t base, size_t size) {
    return enrol(fd, base, size, MODE_PROTECT);
}

int uvas_fault_unregister(int fd, uintptr_t base, size_t size) {
    struct range_abi range = {base, size};
    return syscall(SYS_ioctl, fd, CALL_UNREGISTER, &range) == 0 ? 0 : -errno; /* likewise past the gate: it ends waiting */
}

int uvas_fault_wake(int fd, uintptr_t base, size_t size) {
    struct range_abi range = {base, size};
    return syscall(SYS_ioctl, fd, CALL_WAKE, &range) == 0 ? 0 : -errno; /* past the gate: there is no undo for a thread that sleeps on */
}

/* ---- faults --------------------------------------------------------------------------------------------------------------------- */

long uvas_fault_read(int fd, struct uvas_fault *out, size_t count) {
    struct message_abi messages[MOST_READ];
    size_t most = count < MOST_READ ? count : MOST_READ;
    long got = syscall(SYS_read, fd, messages, most * sizeof *messages);
    if (got < 0) {
        return -errno;
    }
    long found = 0;
    for (size_t i = 0; i < (size_t)got / sizeof *messages; i++) {
        if (messages[i].event == EVENT_PAGEFAULT) {
            out[found++] = (struct uvas_fault){.address = messages[i].address,
                                               .kind = (uint32_t)messages[i].flags & (UVAS_FAULT_WRITE | UVAS_FAULT_PROTECTED | UVAS_FAULT_MINOR),
                                               .thread = messages[i].thread};
        }
    }
    return found;
}

/* ---- pages ---------------------------------------------------------------------------------------------------------------------- */

/* What a call did before it stopped counts: `done` holds it, or the error where it is nothing. */
static long outcome(int rc, int64_t done, size_t size) {
    return rc == 0 ? (long)size : done > 0 ? (long)done : rc;
}

static long transfer(int fd, unsigned long request, uintptr_t to, uintptr_t from, size_t size, uint64_t mode) {
    struct copy_abi ask = {.dst = to, .src = from, .len = size, .mode = mode};
    int rc = call(fd, request, &ask);
    return outcome(rc, ask.done, size);
}

static long fill(int fd, unsigned long request, uintptr_t base, size_t size, uint64_t mode) {
    struct fill_abi ask = {.range = {base, size}, .mode = mode};
    int rc = call(fd, request, &ask);
    return outcome(rc, ask.done, size);
}

long uvas_fault_copy(int fd, uintptr_t to, const void *from, size_t size, bool protect) {
    return transfer(fd, CALL_COPY, to, (uintptr_t)from, size, DONT_WAKE | (protect ? COPY_PROTECTED : 0u));
}

long uvas_fault_move(int fd, uintptr_t to, uintptr_t from, size_t size) {
    return transfer(fd, CALL_MOVE, to, from, size, DONT_WAKE | MOVE_OVER_HOLES);
}

long uvas_fault_zero(int fd, uintptr_t base, size_t size) {
    return fill(fd, CALL_ZERO, base, size, DONT_WAKE);
}

long uvas_fault_map(int fd, uintptr_t base, size_t size, bool protect) {
    return fill(fd, CALL_CONTINUE, base, size, DONT_WAKE | (protect ? COPY_PROTECTED : 0u));
}

long uvas_fault_poison(int fd, uintptr_t base, size_t size) {
    return fill(fd, CALL_POISON, base, size, DONT_WAKE);
}

static int set_protection(int fd, uintptr_t base, size_t size, uint64_t mode) {
    struct protect_abi ask = {.range = {base, size}, .mode = mode};
    int rc;
    do {
        rc = call(fd, CALL_PROTECT, &ask);
    } while (rc == -EAGAIN);
    return rc;
}

int uvas_fault_protect(int fd, uintptr_t base, size_t size) {
    return set_protection(fd, base, size, PROTECT_ON);
}

int uvas_fault_unprotect(int fd, uintptr_t base, size_t size) {
    return set_protection(fd, base, size, 0);
}

/* ---- waiting -------------------------------------------------------------------------------------------------------------------- */

int uvas_bell_open(void) {
    int refused = uvas_vm_gate();
    if (refused) {
        return -refused;
    }
    long fd = syscall(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK);
    return fd < 0 ? -errno : (int)fd;
}

void uvas_bell_ring(int bell) {
    uint64_t one = 1;
    (void)syscall(SYS_write, bell, &one, sizeof one);
}

void uvas_bell_hush(int bell) {
    uint64_t rung;
    (void)syscall(SYS_read, bell, &rung, sizeof rung);
}

int uvas_watch_open(void) {
    int refused = uvas_vm_gate();
    if (refused) {
        return -refused;
    }
    long fd = syscall(SYS_epoll_create1, EPOLL_CLOEXEC);
    return fd < 0 ? -errno : (int)fd;
}

int uvas_watch_add(int set, int fd, uint64_t number) {
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = number};
    int refused = uvas_vm_gate();
    if (refused) {
        return -refused;
    }
    return syscall(SYS_epoll_ctl, set, EPOLL_CTL_ADD, fd, &event) == 0 ? 0 : -errno;
}

void uvas_watch_remove(int set, int fd) {
    (void)syscall(SYS_epoll_ctl, set, EPOLL_CTL_DEL, fd, NULL);
}

uint32_t uvas_watch_wait(int set, uint64_t *out, uint32_t most, int64_t timeout_ns) {
    struct epoll_event events[MOST_READ];
    struct timespec limit = {.tv_sec = timeout_ns / 1000000000, .tv_nsec = timeout_ns % 1000000000};
    int at_most = (int)(most < MOST_READ ? most : MOST_READ);
    long ready = syscall(SYS_epoll_pwait2, set, events, at_most, timeout_ns < 0 ? NULL : &limit, NULL, 0);
    if (ready < 0 && errno == ENOSYS) { /* before 5.11: milliseconds, rounded up */
        ready = syscall(SYS_epoll_pwait, set, events, at_most, timeout_ns < 0 ? -1 : (int)((timeout_ns + 999999) / 1000000), NULL, 0);
    }
    for (long i = 0; i < ready; i++) {
        out[i] = events[i].data.u64;
    }
    return ready < 0 ? 0 : (uint32_t)ready;
}

void uvas_pause_ns(uint64_t ns) {
    struct timespec pause = {.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
    (void)nanosleep(&pause, NULL);
}

uint64_t uvas_clock_ns(void) {
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void uvas_wait_exactly(void) {
    (void)syscall(SYS_prctl, PR_SET_TIMERSLACK, 1, 0, 0, 0);
}

void uvas_say(const char *text, size_t size) {
    (void)!syscall(SYS_write, 2, text, size);
}
