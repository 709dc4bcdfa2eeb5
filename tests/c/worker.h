/* worker.h: a device with memory of its own, in C: another process, executed from the same program.
 *
 * The worker claims the host's ranges in its own address space, maps the memory that it is given there, and does small jobs on it. It has one thread for
 * the *control* line, which claims, maps and lets go and never touches that memory, and one for each *job* line: a job may wait in a fault for as long as
 * it likes, and the worker can still be asked to let go of what it waits for.
 *
 *   main          worker_main(count, arguments) first: does not return in a worker
 *   worker_start  executes one; worker_device describes it to uvas_attach
 *   worker_do     does a job there; worker_begin and worker_end with something in between
 *
 * `worker_board` is memory that all of them and the host see at all times: where tests write down what must be true of the other.
 */
#ifndef WORKER_H
#define WORKER_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#define WINDOW_BASE UINT64_C(0x551000000000)
#define WINDOW_SIZE (UINT64_C(4) << 30)
#define KIB ((size_t)1 << 10)
#define MIB ((size_t)1 << 20)
#define WORD sizeof(uint64_t)

#define WORKER_LINES 2       /* jobs at once */
#define WORKER_FIRST_FD 3    /* in the worker: control, the job lines, the board */
#define WORKER_HIGH_FD 100   /* ours lie above those */
#define WORKER_BOARD (4 * MIB)

enum verb { HELLO, CLAIM, UNCLAIM, COMMIT, DECOMMIT, PROTECT, LOAD, STORE, ADD, FILL, VERIFY, ACROSS, COPY_WORD, SPECIAL };

struct order {
    uint32_t verb, protection;
    uintptr_t base;
    size_t size;
    int64_t offset;
    uint64_t value, count;
};

struct answer {
    int32_t rc; /* 0 or -errno; -EFAULT: no such memory (SIGSEGV); -EIO: its bytes are lost (SIGBUS) */
    uint64_t value;
    uintptr_t base; /* what is in the way; where it went wrong */
    size_t size;
    char text[128];
};

struct worker {
    char name[16];
    pid_t pid;
    int process, faults, control, lines[WORKER_LINES];
    bool dead;
    pthread_mutex_t asking; /* one question on the control line at a time */
};

static char *worker_board;
static int worker_board_fd;
/* What SPECIAL does, in a worker and wherever it is called. */
static int (*worker_special)(const struct order *order, struct answer *answer);

/* ---- jobs: on the host as well as in a worker --------------------------------------------------------------------------------------------- */

static inline uint64_t pattern(uintptr_t address, uint64_t version) {
    return version == 0 ? 0 : (address * UINT64_C(0x9E3779B97F4A7C15)) ^ (version * UINT64_C(0xD1B54A32D192ED03)); /* fresh memory reads as zeros */
}

struct __attribute__((packed)) loose_word {
    uint64_t word;
};

/* One instruction. Two threads of a worker may do it at once, on purpose. */
__attribute__((noinline, no_sanitize("thread"))) static void store_across(uintptr_t address, uint64_t value) {
    ((volatile struct loose_word *)address)->word = value;
}

static inline void job_on_words(const struct order *order, struct answer *answer) {
    for (uintptr_t at = order->base; at < order->base + order->size; at += WORD) {
        if (order->verb == FILL) {
            __atomic_store_n((uint64_t *)at, pattern(at, order->value), __ATOMIC_RELAXED);
        } else if (__atomic_load_n((uint64_t *)at, __ATOMIC_RELAXED) != pattern(at, order->value)) {
            answer->base = answer->value++ == 0 ? at : answer->base; /* how many, and the first */
        }
    }
}

/* Where there is one, an instruction that needs the memory of both at the same time. */
__attribute__((noinline, no_sanitize("thread"))) static void copy_word(uintptr_t from, uintptr_t to) {
#ifdef __x86_64__
    __asm__ volatile("movsq" : "+S"(from), "+D"(to) : : "memory");
#else
    *(volatile uint64_t *)to = *(volatile uint64_t *)from;
#endif
}

/* Relaxed: with another order ThreadSanitizer holds a lock of its own over an access that may end in job_signal. */
static inline int job(const struct order *order, struct answer *answer) {
    uint64_t *word = (uint64_t *)order->base;
    switch (order->verb) {
    case LOAD:
        answer->value = __atomic_load_n(word, __ATOMIC_RELAXED);
        return 0;
    case STORE:
        __atomic_store_n(word, order->value, __ATOMIC_RELAXED);
        return 0;
    case ADD:
        for (uint64_t i = 0; i < order->count; i++) {
            (void)__atomic_fetch_add(word, 1, __ATOMIC_RELAXED);
        }
        return 0;
    case ACROSS: /* one store to two granules */
        for (uint64_t i = 1; i <= order->count; i++) {
            store_across(order->base, i * order->value);
        }
        return 0;
    case COPY_WORD: /* there and back */
        for (uint64_t i = 0; i < order->count; i++) {
            copy_word(order->base, order->base + order->size);
            copy_word(order->base + order->size, order->base);
        }
        return 0;
    case FILL:
    case VERIFY:
        job_on_words(order, answer);
        return 0;
    default:
        return worker_special ? worker_special(order, answer) : -EINVAL;
    }
}

static _Thread_local sigjmp_buf *job_way_out;

static inline void job_signal(int signal, siginfo_t *info, void *context) {
    (void)info, (void)context;
    if (!job_way_out) {
        abort();
    }
    siglongjmp(*job_way_out, signal);
}

/* A job on memory that may not be there. */
static inline struct answer job_done(const struct order *order) {
    struct answer answer = {0};
    sigjmp_buf out;
    int signal = sigsetjmp(out, 1);
    job_way_out = &out;
    answer.rc = signal == SIGBUS ? -EIO : signal ? -EFAULT : job(order, &answer);
    job_way_out = NULL;
    return answer;
}

static inline void job_signals(void) {
    struct sigaction action = {.sa_sigaction = job_signal, .sa_flags = SA_SIGINFO | SA_NODEFER};
    CHECK(sigaction(SIGBUS, &action, NULL) == 0 && sigaction(SIGSEGV, &action, NULL) == 0);
}

/* ---- messages ----------------------------------------------------------------------------------------------------------------------------- */

/* false: the other side has ended. `descriptor` -1: none goes along. */
static inline bool line_send(int line, const void *data, size_t size, int descriptor) {
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec part = {.iov_base = (void *)(uintptr_t)data, .iov_len = size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (descriptor >= 0) {
        message.msg_control = &control;
        message.msg_controllen = sizeof control.room;
        control.header = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(&control.header), &descriptor, sizeof descriptor);
    }
    ssize_t sent;
    do {
        sent = sendmsg(line, &message, MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    return sent == (ssize_t)size;
}

static inline bool line_receive(int line, void *data, size_t size, int *descriptor) {
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec part = {.iov_base = data, .iov_len = size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control.room};
    ssize_t got;
    do {
        got = recvmsg(line, &message, MSG_CMSG_CLOEXEC);
    } while (got < 0 && errno == EINTR);
    if (descriptor) {
        *descriptor = -1;
        if (message.msg_controllen >= CMSG_LEN(sizeof(int))) {
            memcpy(descriptor, CMSG_DATA(&control.header), sizeof *descriptor);
        }
    }
    return got == (ssize_t)size;
}

/* ---- in the worker ------------------------------------------------------------------------------------------------------------------------ */

/* The worker holds its ranges by uvas as well: it has an address space of its own, and asks it for the very addresses that the host wants. */
static inline int worker_claim(uvas_id space, const struct order *order, struct answer *answer) {
    struct uvas_where where = {.at = order->base, .name = "claimed"};
    struct uvas_reservation held;
    int rc = uvas_reserve(space, order->size, &where, &held);
    if (rc < 0) {
        const struct uvas_failure *failure = uvas_last_failure();
        answer->base = failure->other_base;
        answer->size = failure->other_size;
        (void)snprintf(answer->text, sizeof answer->text, "%.100s", failure->owner);
    }
    return rc;
}

static inline int worker_obey(uvas_id space, const struct order *order, int descriptor, struct answer *answer) {
    struct uvas_found found;
    if (order->verb == CLAIM) {
        return worker_claim(space, order, answer);
    }
    if (uvas_find(order->base, &found) < 0) {
        return order->verb == UNCLAIM ? 0 : -EINVAL;
    }
    size_t offset = order->base - found.base;
    struct uvas_mapping mapping = {.descriptor = descriptor, .sharing = UVAS_SHARED, .offset = offset, .size = order->size,
                                   .descriptor_offset = order->offset, .protection = order->protection};
    return order->verb == COMMIT     ? uvas_map_fd(found.id, &mapping)
           : order->verb == DECOMMIT ? uvas_decommit(found.id, offset, order->size)
           : order->verb == PROTECT  ? uvas_protect(found.id, offset, order->size, order->protection)
                                     : uvas_release(found.id);
}

static inline void *worker_serve_line(void *line) {
    struct order order;
    while (line_receive((int)(intptr_t)line, &order, sizeof order, NULL)) {
        struct answer answer = job_done(&order);
        (void)line_send((int)(intptr_t)line, &answer, sizeof answer, -1);
    }
    return NULL;
}

static inline void worker_serve(int control) {
    uvas_id space;
    struct answer hello = {.value = (uint64_t)getpid()};
    struct uvas_space_options options = {.name = "worker"};
    int32_t faults = -1;
    uint32_t features;
    hello.rc = uvas_lend_faults(&faults, &features);
    CHECK_OK(uvas_space_open(&options, &space));
    (void)line_send(control, &hello, sizeof hello, faults);
    (void)close(faults);
    struct order order;
    int descriptor;
    while (line_receive(control, &order, sizeof order, &descriptor)) {
        struct answer answer = {0};
        answer.rc = worker_obey(space, &order, descriptor, &answer);
        if (descriptor >= 0) {
            (void)close(descriptor);
        }
        (void)line_send(control, &answer, sizeof answer, -1);
    }
}

static inline void board_map(int fd) {
    worker_board_fd = fd;
    worker_board = mmap(NULL, WORKER_BOARD, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(worker_board != MAP_FAILED);
}

/* First in main. In a worker it serves until the host hangs up, and ends the process. */
static inline void worker_main(int count, char **arguments) {
    job_signals();
    if (count < 2 || strcmp(arguments[1], "--worker") != 0) {
        int fd = memfd_create("board", MFD_CLOEXEC);
        CHECK(fd >= 0 && ftruncate(fd, WORKER_BOARD) == 0);
        board_map(fcntl(fd, F_DUPFD_CLOEXEC, WORKER_HIGH_FD));
        return;
    }
    (void)uvas_end_with(getppid());
    board_map(WORKER_FIRST_FD + 1 + WORKER_LINES);
    for (int i = 0; i < WORKER_LINES; i++) {
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, worker_serve_line, (void *)(intptr_t)(WORKER_FIRST_FD + 1 + i)) == 0);
    }
    worker_serve(WORKER_FIRST_FD);
    _exit(0);
}

/* ---- on the host -------------------------------------------------------------------------------------------------------------------------- */

static inline int line_pair(int *theirs) {
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    *theirs = fcntl(pair[1], F_DUPFD_CLOEXEC, WORKER_HIGH_FD);
    CHECK(*theirs >= 0);
    (void)close(pair[1]);
    return pair[0];
}

static inline void worker_start(struct worker *worker, const char *name) {
    extern char **environ;
    posix_spawn_file_actions_t actions;
    int theirs[WORKER_LINES + 2];
    char *arguments[] = {(char *)(uintptr_t)name, "--worker", NULL};
    struct answer hello;
    *worker = (struct worker){.asking = PTHREAD_MUTEX_INITIALIZER};
    (void)snprintf(worker->name, sizeof worker->name, "%s", name);
    worker->control = line_pair(&theirs[0]);
    for (int i = 0; i < WORKER_LINES; i++) {
        worker->lines[i] = line_pair(&theirs[1 + i]);
    }
    theirs[WORKER_LINES + 1] = worker_board_fd;
    CHECK(posix_spawn_file_actions_init(&actions) == 0);
    for (int i = 0; i < WORKER_LINES + 2; i++) {
        CHECK(posix_spawn_file_actions_adddup2(&actions, theirs[i], WORKER_FIRST_FD + i) == 0);
    }
    CHECK(posix_spawn(&worker->pid, "/proc/self/exe", &actions, NULL, arguments, environ) == 0); /* no fork: the pager need not pause for it */
    (void)posix_spawn_file_actions_destroy(&actions);
    for (int i = 0; i < WORKER_LINES + 1; i++) {
        (void)close(theirs[i]);
    }
    worker->process = (int)syscall(SYS_pidfd_open, worker->pid, 0);
    CHECK(worker->process >= 0 && line_receive(worker->control, &hello, sizeof hello, &worker->faults));
    CHECK(hello.rc == 0 && hello.value == (uint64_t)worker->pid);
}

static inline void worker_kill(struct worker *worker) {
    if (!worker->dead) {
        worker->dead = true;
        (void)kill(worker->pid, SIGKILL);
        (void)waitpid(worker->pid, NULL, 0);
    }
}

static inline void worker_end(struct worker *worker) {
    worker_kill(worker);
    (void)close(worker->process);
    (void)close(worker->faults);
    (void)close(worker->control);
    for (int i = 0; i < WORKER_LINES; i++) {
        (void)close(worker->lines[i]);
    }
}

static inline int worker_ask(struct worker *worker, const struct order *order, int descriptor, struct answer *answer) {
    (void)pthread_mutex_lock(&worker->asking);
    bool alive = line_send(worker->control, order, sizeof *order, descriptor) && line_receive(worker->control, answer, sizeof *answer, NULL);
    (void)pthread_mutex_unlock(&worker->asking);
    return alive ? answer->rc : -ESRCH;
}

static inline int device_claim(void *worker, uintptr_t base, size_t size, struct uvas_obstacle *obstacle) {
    struct answer answer;
    int rc = worker_ask(worker, &(struct order){.verb = CLAIM, .base = base, .size = size}, -1, &answer);
    if (rc == -EEXIST) {
        obstacle->base = answer.base;
        obstacle->size = answer.size;
        (void)snprintf(obstacle->owner, sizeof obstacle->owner, "%s: %s", ((struct worker *)worker)->name, answer.text);
    }
    return rc;
}

/* A process that has ended holds nothing: what is to be given back is. */
static inline int device_give_back(struct worker *worker, enum verb verb, uintptr_t base, size_t size) {
    struct answer answer;
    int rc = worker_ask(worker, &(struct order){.verb = verb, .base = base, .size = size}, -1, &answer);
    return rc == -ESRCH ? 0 : rc;
}

static inline int device_unclaim(void *worker, uintptr_t base, size_t size) {
    return device_give_back(worker, UNCLAIM, base, size);
}

static inline int device_decommit(void *worker, uintptr_t base, size_t size) {
    return device_give_back(worker, DECOMMIT, base, size);
}

static inline int device_commit(void *worker, uintptr_t base, size_t size, const struct uvas_backing_info *backing, uint32_t protection) {
    struct answer answer;
    return worker_ask(worker, &(struct order){.verb = COMMIT, .base = base, .size = size, .offset = backing->offset, .protection = protection},
                      backing->descriptor, &answer);
}

static inline int device_protect(void *worker, uintptr_t base, size_t size, uint32_t protection) {
    struct answer answer;
    int rc = worker_ask(worker, &(struct order){.verb = PROTECT, .base = base, .size = size, .protection = protection}, -1, &answer);
    return rc == -ESRCH ? 0 : rc;
}

static inline struct uvas_device worker_device(struct worker *worker, size_t granule, size_t capacity) {
    return (struct uvas_device){.name = worker->name,
                                .placement = UVAS_CLAIMS,
                                .backings = UVAS_BACKING_ANONYMOUS,
                                .granularity = granule,
                                .context = worker,
                                .claim = device_claim,
                                .unclaim = device_unclaim,
                                .commit = device_commit,
                                .decommit = device_decommit,
                                .protect = device_protect,
                                .memory = UVAS_MEMORY_PRIVATE,
                                .faults = worker->faults,
                                .process = worker->process,
                                .capacity = capacity,
                                .granule = granule};
}

/* To a worker that has ended it says nothing: worker_finish does. */
static inline void worker_begin(struct worker *worker, int line, const struct order *order) {
    (void)line_send(worker->lines[line], order, sizeof *order, -1);
}

/* Whether the job has ended, or its worker, within so many milliseconds (-1: for ever). */
static inline bool worker_ended(const struct worker *worker, int line, int milliseconds) {
    struct pollfd wait = {.fd = worker->lines[line], .events = POLLIN};
    int ready;
    do {
        ready = poll(&wait, 1, milliseconds);
    } while (ready < 0 && errno == EINTR);
    return ready > 0;
}

/* Waits for it. rc -ESRCH: the worker has ended. */
static inline struct answer worker_finish(struct worker *worker, int line) {
    struct answer answer;
    return line_receive(worker->lines[line], &answer, sizeof answer, NULL) ? answer : (struct answer){.rc = -ESRCH};
}

static inline struct answer worker_do(struct worker *worker, const struct order *order) {
    worker_begin(worker, 0, order);
    return worker_finish(worker, 0);
}

#endif
