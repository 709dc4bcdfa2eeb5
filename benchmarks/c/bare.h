/* bare.h: the least that moving pages by userfaultfd takes: a host process, one worker process, a range at the same addresses in both.
 *
 * The host's side of the range is anonymous memory, the worker's a sparse memfd, which the host keeps open: uvas's layout, without a directory,
 * without a lock, for one thread that moves. What this costs is what the kernel costs; the benchmarks measure uvas against it. */
#ifndef UVAS_BENCH_BARE_H
#define UVAS_BENCH_BARE_H

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "touch.h"

#ifndef UFFDIO_MOVE /* Linux 6.8; the headers of older systems lack it */
struct uffdio_move {
    __u64 dst, src, len, mode;
    __s64 move;
};
#define UFFDIO_MOVE _IOWR(UFFDIO, 0x05, struct uffdio_move)
#define UFFDIO_MOVE_MODE_DONTWAKE ((__u64)1 << 0)
#define UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES ((__u64)1 << 1)
#define UFFD_FEATURE_MOVE ((__u64)1 << 16)
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

#define BARE_PAGE ((size_t)4096)
#define BARE_PLACE ((uintptr_t)0x510000000000)
#define BARE_STAGING ((uintptr_t)0x520000000000)

/* What the worker is told to do with its side. */
enum bare_order { BARE_FAULTS, BARE_RISING, BARE_RANDOM, BARE_SUM };

struct bare_work {
    enum bare_order order;
    int cpu;
    size_t offset, size, count;
};

struct bare {
    size_t size;
    uintptr_t base, staging, alias; /* alias: the worker's memfd in the host, for reading */
    int host, worker;               /* userfaultfds */
    int memfd, line;
    pid_t pid;
};

#define BARE_ANY (-1)

/* On that CPU alone; BARE_ANY: where the kernel wants it, of the first two. */
static inline void bare_pin(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int one = 0; one < 2; one++) {
        if (cpu == one || cpu == BARE_ANY) {
            CPU_SET((unsigned)one, &set);
        }
    }
    BENCH_NEED(sched_setaffinity(0, sizeof set, &set) == 0);
}

static inline int bare_uffd(__u64 features, uintptr_t base, size_t size, __u64 modes) {
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    BENCH_NEED(uffd >= 0);
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    struct uffdio_register registered = {.range = {base, size}, .mode = modes};
    BENCH_NEED(ioctl(uffd, UFFDIO_API, &api) == 0 && ioctl(uffd, UFFDIO_REGISTER, &registered) == 0);
    return uffd;
}

/* ---- the system calls, each for one piece of the range; all of them must do all of it ------------------------------------------------- */

static inline void bare_move(const struct bare *b, uintptr_t to, uintptr_t from, size_t size) {
    struct uffdio_move move = {.dst = to, .src = from, .len = size, .mode = UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES};
    while (ioctl(b->host, UFFDIO_MOVE, &move) != 0) { /* another mapping changed meanwhile: go on where it stopped */
        BENCH_NEED(errno == EAGAIN || errno == EEXIST);
        size_t done = move.move > 0 ? (size_t)move.move : (errno == EEXIST ? BARE_PAGE : 0);
        move = (struct uffdio_move){move.dst + done, move.src + done, move.len - done, move.mode, 0};
        if (move.len == 0) {
            break;
        }
    }
}

static inline void bare_copy(int uffd, uintptr_t to, uintptr_t from, size_t size) {
    struct uffdio_copy copy = {.dst = to, .src = from, .len = size};
    BENCH_NEED(ioctl(uffd, UFFDIO_COPY, &copy) == 0);
}

static inline void bare_continue(int uffd, uintptr_t at, size_t size) {
    struct uffdio_continue go_on = {.range = {at, size}};
    BENCH_NEED(ioctl(uffd, UFFDIO_CONTINUE, &go_on) == 0);
}

static inline void bare_zero(int uffd, uintptr_t at, size_t size) {
    struct uffdio_zeropage zero = {.range = {at, size}};
    BENCH_NEED(ioctl(uffd, UFFDIO_ZEROPAGE, &zero) == 0);
}

static inline void bare_protect(int uffd, uintptr_t at, size_t size, bool on) {
    struct uffdio_writeprotect protect = {.range = {at, size}, .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0};
    BENCH_NEED(ioctl(uffd, UFFDIO_WRITEPROTECT, &protect) == 0);
}

static inline void bare_punch(const struct bare *b, size_t offset, size_t size) {
    BENCH_NEED(fallocate(b->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)size) == 0);
}

static inline void bare_write(const struct bare *b, size_t offset, uintptr_t from, size_t size) {
    BENCH_NEED(pwrite(b->memfd, (const void *)from, size, (off_t)offset) == (ssize_t)size);
}

static inline void bare_read(const struct bare *b, size_t offset, uintptr_t to, size_t size) {
    BENCH_NEED(pread(b->memfd, (void *)to, size, (off_t)offset) == (ssize_t)size);
}

static inline void bare_drop(uintptr_t at, size_t size) {
    BENCH_NEED(madvise((void *)at, size, MADV_DONTNEED) == 0);
}

/* ---- the worker ----------------------------------------------------------------------------------------------------------------------- */

static inline uint64_t bare_obey(const struct bare *b, const struct bare_work *work) {
    uintptr_t at = b->base + work->offset;
    bare_pin(work->cpu);
    switch (work->order) {
    case BARE_FAULTS:
        return touch_faults(at, work->count, BARE_PAGE);
    case BARE_RISING:
        return touch_stretches(at, work->size, BARE_PAGE, TOUCH_WRITE);
    case BARE_RANDOM:
        return touch_random(at, work->size, work->count);
    case BARE_SUM:
        return touch_sum(at, work->size);
    }
    return 0;
}

static inline void bare_live(struct bare *b, int line) {
    void *at = mmap((void *)b->base, b->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, b->memfd, 0);
    BENCH_NEED(at == (void *)b->base && prctl(PR_SET_PDEATHSIG, SIGKILL) == 0);
    int uffd = bare_uffd(UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
                         b->base, b->size, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_WP);
    BENCH_NEED(write(line, &uffd, sizeof uffd) == sizeof uffd);
    struct bare_work work;
    while (read(line, &work, sizeof work) == sizeof work) {
        uint64_t answer = bare_obey(b, &work);
        BENCH_NEED(write(line, &answer, sizeof answer) == sizeof answer);
    }
    _exit(0);
}

static inline uint64_t bare_ask(const struct bare *b, struct bare_work work) {
    uint64_t answer;
    BENCH_NEED(write(b->line, &work, sizeof work) == sizeof work && read(b->line, &answer, sizeof answer) == sizeof answer);
    return answer;
}

/* ---- both ----------------------------------------------------------------------------------------------------------------------------- */

static inline void bare_open(struct bare *b, size_t size) {
    int lines[2], theirs;
    *b = (struct bare){.size = size, .base = BARE_PLACE, .staging = BARE_STAGING, .memfd = (int)syscall(SYS_memfd_create, "bare", MFD_CLOEXEC)};
    BENCH_NEED(b->memfd >= 0 && ftruncate(b->memfd, (off_t)size) == 0 && socketpair(AF_UNIX, SOCK_SEQPACKET, 0, lines) == 0);
    b->pid = fork();
    BENCH_NEED(b->pid >= 0);
    if (b->pid == 0) {
        BENCH_NEED(close(lines[0]) == 0);
        bare_live(b, lines[1]);
    }
    BENCH_NEED(close(lines[1]) == 0);
    b->line = lines[0];
    int anonymous = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
    BENCH_NEED(mmap((void *)b->base, size, PROT_READ | PROT_WRITE, anonymous, -1, 0) == (void *)b->base);
    BENCH_NEED(mmap((void *)b->staging, size, PROT_READ | PROT_WRITE, anonymous, -1, 0) == (void *)b->staging);
    b->alias = (uintptr_t)mmap(NULL, size, PROT_READ, MAP_SHARED, b->memfd, 0);
    BENCH_NEED((void *)b->alias != MAP_FAILED && madvise((void *)b->base, size, MADV_NOHUGEPAGE) == 0);
    BENCH_NEED(madvise((void *)b->staging, size, MADV_NOHUGEPAGE) == 0);
    int registered = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP;
    b->host = bare_uffd(UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_MOVE, b->base, size, (__u64)registered);
    struct uffdio_register staging = {.range = {b->staging, size}, .mode = UFFDIO_REGISTER_MODE_WP};
    BENCH_NEED(ioctl(b->host, UFFDIO_REGISTER, &staging) == 0);
    BENCH_NEED(read(b->line, &theirs, sizeof theirs) == sizeof theirs);
    int pidfd = (int)syscall(SYS_pidfd_open, b->pid, 0);
    b->worker = (int)syscall(SYS_pidfd_getfd, pidfd, theirs, 0);
    BENCH_NEED(pidfd >= 0 && b->worker >= 0 && close(pidfd) == 0);
}

static inline void bare_close(struct bare *b) {
    BENCH_NEED(close(b->line) == 0 && waitpid(b->pid, NULL, 0) == b->pid);
}

#endif
