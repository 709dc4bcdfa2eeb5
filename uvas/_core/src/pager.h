/* pager.h: memory that moves between the host and devices that have memory of their own. Private to these files:
 *
 *   userfault.c   the system calls
 *   directory.c   the protocol: who has a granule, and what has to happen before somebody else has it
 *   moves.c       doing that to a run of granules, with an undo for each step
 *   residency.c   what a device may hold, and what leaves it first
 *   streams.c     what will be wanted next; who wants two granules at once
 *   pager.c       the thread: faults in, pages moved, threads woken
 *   requests.c    how other threads ask something of it
 *   chores.c      doing what they ask
 *   guard.c       a thread that names faults which nobody answers, and one that does what would be a fault of the pager's own
 *   mirrors.c     life: devices and reservations come and go, memory is committed, processes die and fork
 *   movement.c    the public verbs
 *
 * How it works
 *
 *   A space with private devices is a *domain*. Each of its reservations has a *mirror*: a directory of its granules, and for each device a memfd, which
 *   is that device's memory, mapped in the worker at the reservation's addresses and once more in the host, where the pager reads it (the *alias*).
 *   Whoever touches a page that is not there, or writes one that others read as well, waits in the kernel, and the pager finds the fault on a
 *   userfaultfd: the host's own, or one that a worker has lent. It moves the granule, then wakes. No code of a worker runs for it.
 *
 *   The host's pages leave by UFFDIO_MOVE into *staging*: the page itself goes, so that a write in flight into it is not lost, and one that is pinned
 *   refuses. A staging page is dropped after use and never used twice: a pipe may still hold it.
 *
 *   A reservation whose memory no device has touched is not *armed*: its memory is the host's, and costs nothing. The first fault or prefetch arms it.
 *
 * Who writes what
 *
 *   One thread, the pager, writes directories, mirrors, members and domains. Others ask it by a request (requests.c) and wait. uvas_where and the
 *   counters read without it, relaxed.
 *   It holds the lock of requests for a few instructions, never over a system call. It takes no other lock, allocates nothing, uses no stdio, never
 *   touches a unified address, never waits for a worker: a thread that waits for it may hold anything.
 *
 * What must stay true
 *
 *   - one writer or many readers, never both; whoever loses a granule has lost it before another gains it
 *   - a copy is complete before the last other one goes
 *   - a step that fails leaves a word that is true: what was taken goes back, or the new holder has it alone
 *   - a thread that waits is served, parked here with a time to try again, or in a range that is going away, whose end wakes it
 */
#ifndef UVAS_PAGER_H
#define UVAS_PAGER_H

#include <pthread.h>
#include <stddef.h>

#include "directory.h"
#include "userfault.h"
#include "uvas.h"

#define UVAS_MOVE_BYTES ((size_t)2 << 20)   /* moved at once, at most: faults are looked at in between */
#define UVAS_BLOCK_GRANULES 512u            /* of a directory: one page of it. Blocks without memory are passed over */
#define UVAS_PARKED_MAX 512u                /* faults that wait for their time; more are woken, and come again */
#define UVAS_STREAMS 4u                     /* that are recognised at once, for each party */
#define UVAS_THREADS 64u                    /* whose last faults are known, for each party */
#define UVAS_MIRRORS_MAX (1u << 24)         /* a ring's entry has so many bits for a mirror's number */
#define UVAS_STAYED_MAX 16u                 /* ranges that one request names */
#define UVAS_GRANULE_DEFAULT ((size_t)64 << 10)
#define UVAS_GRANULE_LEAST ((size_t)4 << 10)
#define UVAS_GRANULE_MOST ((size_t)2 << 20)

struct uvas_mirror;
struct uvas_domain;

struct uvas_ring { /* granules in the order in which they came */
    uint64_t *entries;
    uint32_t size, first, count;
};

struct uvas_stream { /* granules asked for one after another */
    struct uvas_mirror *mirror;
    uint32_t next, window; /* granules */
    uint32_t used;         /* by age: the member's count of misses */
};

struct uvas_history { /* of one thread */
    uint32_t thread, at; /* at: microseconds */
    struct uvas_mirror *mirror[4];
    uint32_t granule[4]; /* newest first */
};

struct uvas_room { /* what a device with a bound holds, of all spaces that it is in: its members share it. Pager's alone */
    const void *memory; /* whose; NULL: nobody else's */
    uint64_t capacity, resident; /* bytes */
    uint32_t shift;
    uint32_t members;
    struct uvas_ring probation, proven, ghosts; /* residency.c */
    size_t rings_bytes;
};

struct uvas_member { /* a party of a domain; the host is one too. Pager's alone, but for the counters */
    struct uvas_domain *domain;
    uint32_t party;
    int faults;      /* userfaultfd; the host's is the pager's. -1: none */
    int process;     /* pidfd; -1: never ends */
    bool dead;       /* its process has ended: nothing to stop there, nothing to map; its memory is here */
    bool recovered;  /* and what it held is home */
    bool unrecovered; /* something would not come, in this pass */
    uintptr_t recovering_at; /* how far the pass is: the mirror's base, and the granule */
    uint32_t recovering_first;
    uint64_t capacity; /* bytes; 0: no bound */
    struct uvas_room *room; /* NULL: no bound */
    struct uvas_stream streams[UVAS_STREAMS];
    uint32_t misses;
    struct uvas_history threads[UVAS_THREADS];
    _Atomic uint64_t resident; /* bytes; these are written by the pager, read by anyone, relaxed */
    _Atomic uint64_t read_faults, write_faults, bytes_in, bytes_out, evictions;
    char name[64];
};

struct uvas_domain {
    uint32_t shift;   /* granule = 1 << shift bytes */
    uint32_t hold_us; /* a granule is kept so long */
    struct uvas_member *members[UVAS_PARTIES]; /* by party; the first is the host below */
    struct uvas_member host;
    uint32_t mirrors; /* of its reservations; those of poisoned ones stay for ever. Under the registry's lock */
};

struct uvas_stretch { /* granules of a mirror that somebody has a word about; on the stack of who waits */
    uint32_t first, end;
    struct uvas_stretch *next;
};

struct uvas_store { /* a device's memory for one reservation */
    int fd;       /* sparse memfd, offsets as in the reservation; meaningful where alias is not NULL */
    bool stale;   /* it may hold bytes of memory that was decommitted */
    char *alias;  /* the same, mapped here */
    uint8_t *marks; /* two bits a granule: enum mark of residency.c; NULL: the device has no bound */
    size_t marks_bytes;
};

struct uvas_mirror { /* of one reservation */
    struct uvas_domain *domain;
    uintptr_t base;
    size_t size;
    uint32_t number;   /* in the pager's table: what rings name it by */
    uint32_t granules;
    bool armed;        /* the host's memory is watched */
    struct uvas_granule *directory;
    _Atomic uint32_t *advice; /* a word a granule, untouched unless advised. Written by uvas_advise's thread, read by the pager, relaxed */
    uint8_t *blocks;   /* one a block of the directory: memory was committed there */
    size_t tables_bytes;
    struct uvas_stretch *suspended; /* going away: faults of the host wait for who took it away, entries do not change */
    struct uvas_stretch *pinned;    /* stay on the host */
    struct uvas_store stores[UVAS_PARTIES];
};

/* ---- advice: a word a granule ---- */

#define UVAS_ADVICE_ACCESSED UVAS_PARTY_BITS /* by these: they keep a copy */
#define UVAS_ADVICE_READ_MOSTLY (1u << 28)
#define UVAS_ADVICE_PREFERRED_HOST (1u << 29)
#define UVAS_ADVICE_PREFERRED (1u << 30) /* by the one device of the upper mask that holds it: not evicted while others can be */

/* ---- moves.c ---- */

struct uvas_extent { /* granules of one mirror, side by side, all with the same word */
    struct uvas_mirror *mirror;
    uint32_t first, count;
    uint32_t word;
};

static inline size_t uvas_extent_offset(const struct uvas_extent *run) {
    return (size_t)run->first << run->mirror->domain->shift;
}

static inline size_t uvas_extent_bytes(const struct uvas_extent *run) {
    return (size_t)run->count << run->mirror->domain->shift;
}

static inline uintptr_t uvas_extent_base(const struct uvas_extent *run) {
    return run->mirror->base + uvas_extent_offset(run);
}

/* The run from `first` on, of at most `most` granules and UVAS_MOVE_BYTES. */
struct uvas_extent uvas_extent_from(struct uvas_mirror *mirror, uint32_t first, uint32_t most);
/* The party may read, or write, all of it. 0, or -errno with every word true: -EBUSY: the host's pages are pinned or shared with a child of fork.
 * Room at the party has been made. Wakes nobody. */
int uvas_move(const struct uvas_extent *run, uint32_t party, bool write);
/* Bytes into memory that is watched, write-protected. A page that is there already has them: nobody else puts one there. 0 or -errno. */
int uvas_copy_protected(int faults, uintptr_t to, const char *from, size_t size);
uintptr_t uvas_move_stuck(void); /* the page for which the last move answered -EBUSY */
/* A device's copies go; somebody else has them too, or nobody wants them. */
int uvas_move_drop(const struct uvas_extent *run, uint32_t party);
/* All copies go: zeros. */
int uvas_move_discard(const struct uvas_extent *run);
/* What a fault asks for is so by the directory: made so for its page (a hole that nobody has touched yet, protection that outlived its reason). */
int uvas_move_repair(struct uvas_mirror *mirror, uint32_t granule, uint32_t party, uintptr_t address);
void uvas_publish(const struct uvas_extent *run, uint32_t word);
int uvas_moves_open(int host_faults, uint32_t features);
void uvas_moves_close(void);
void uvas_moves_forget(void); /* the child of a fork */

/* ---- residency.c ---- */

/* Room for what a bounded device holds, before it joins. 0, -ENOMEM, or -EINVAL: more granules than can be counted. */
int uvas_residency_open(struct uvas_member *member, const void *memory, uint32_t shift);
void uvas_residency_close(struct uvas_room *room);
/* It joins: where the device is in another space already, the room there is its own. Returns the one that it does not need, or NULL; *rc is -EEXIST if
 * the two do not agree. */
struct uvas_room *uvas_residency_join(struct uvas_member *member, int *rc);
/* It leaves, and keeps its room only if nobody else has it. */
void uvas_residency_part(struct uvas_member *member);
void uvas_residency_came(struct uvas_member *member, const struct uvas_extent *run);
void uvas_residency_went(struct uvas_member *member, const struct uvas_extent *run);
/* The mirror is about to go: nothing of it is in line any more. */
void uvas_residency_forget(struct uvas_member *member, const struct uvas_mirror *mirror);
/* Bytes at the device for the run, evicting others; nothing inside `keep` (may be NULL). 0, -ENOMEM: the host has no room for what leaves, or all that
 * is there must stay; -ENOSPC: it is more than the device may ever hold. */
int uvas_residency_room(struct uvas_member *member, const struct uvas_extent *run, const struct uvas_extent *keep);

/* ---- streams.c ---- */

/* A miss at this granule: how many from there on are worth bringing. */
uint32_t uvas_streams_window(struct uvas_member *member, struct uvas_mirror *mirror, uint32_t granule);
/* Notes the fault; true: the thread goes back and forth between granules that others take away, and shall have its last ones at once. */
bool uvas_streams_torn(struct uvas_member *member, uint32_t thread, struct uvas_mirror *mirror, uint32_t granule, uint32_t now_us);
const struct uvas_history *uvas_streams_history(const struct uvas_member *member, uint32_t thread);
void uvas_streams_forget(struct uvas_member *member, const struct uvas_mirror *mirror);

/* ---- pager.c ---- */

#define UVAS_MEMBERS_MAX 40u /* private devices of a process: two descriptors each are waited on */

struct uvas_pager { /* the thread's world: written by it, and by others only while it does not run */
    int faults;        /* the host's userfaultfd */
    uint32_t features; /* set of enum uvas_fault_feature */
    int bell, watch;   /* rung by who asks for something; what it waits on */
    struct uvas_mirror **mirrors; /* by base */
    struct uvas_mirror **numbered; /* by number; holes are NULL */
    uint32_t mirror_count, mirror_room;
    struct uvas_member *members[UVAS_MEMBERS_MAX];
    uint32_t member_count;
    bool pausing;      /* for a fork: nothing goes to a device until it is over */
    _Atomic uint64_t busy_ns;       /* time at work; these two are written by the pager, read by anyone, relaxed */
    _Atomic uint64_t busy_since_ns; /* when it began what it is at; 0: it waits */
};

extern struct uvas_pager uvas_pager;

enum uvas_watched_kind { UVAS_WATCHED_FAULTS = 0, UVAS_WATCHED_PROCESS = 1, UVAS_WATCHED_BELL = 2 };

/* The number of a descriptor that the pager waits on: whose (NULL: its own) and what. */
static inline uint64_t uvas_watched(const struct uvas_member *member, enum uvas_watched_kind kind) {
    return (uint64_t)(uintptr_t)member | (uint64_t)kind;
}
void uvas_unwatch(const struct uvas_member *member);

#define UVAS_WAITS_FOR_PIN 1 /* no error: uvas_pin_host has it on the host */

struct uvas_waiting { /* what the watchdog says of the fault that has waited longest. Under requests.c's lock */
    uintptr_t address;
    uint64_t since_ns; /* 0: nobody waits */
    uint32_t thread;
    int error; /* why the last try failed; 0: it is not its turn; UVAS_WAITS_FOR_PIN */
    char name[64];
};

/* The thread: serves until it is asked to stop. */
void *uvas_pager_main(void *nothing);
struct uvas_mirror *uvas_mirror_at(uintptr_t address);
uint32_t uvas_now_us(void);
bool uvas_within(const struct uvas_stretch *list, uint32_t granule);
/* The host's memory of it is watched from now on. 0 or -errno. */
int uvas_arm(struct uvas_mirror *mirror);
/* Who waits there, on the host or on a device, is woken and looks again. */
void uvas_wake(const struct uvas_mirror *mirror, uint32_t first, uint32_t end);
/* The run has come to somebody: kept there for the domain's while. */
void uvas_keep(const struct uvas_extent *run);
/* Parked faults of a mirror, or of a device, that goes are forgotten. */
void uvas_unpark(const struct uvas_mirror *mirror, const struct uvas_member *member);
/* A process has ended: what it held comes home from now on. */
void uvas_pager_died(struct uvas_member *member);
/* guard.c: lets another thread end the sharing of a page with a child of fork, which here would be a fault that we serve. Forgotten if it is at work already. */
void uvas_unshare(uintptr_t page);

/* ---- requests.c: how other threads ask ---- */

enum uvas_request_kind {
    UVAS_ASK_JOIN,    /* member: a device comes */
    UVAS_ASK_HOME,    /* member: what it holds comes home, its other copies go */
    UVAS_ASK_LEAVE,   /* member: it goes; what it holds comes home first */
    UVAS_ASK_ADD,     /* mirror; tables: larger ones, or NULL */
    UVAS_ASK_REMOVE,  /* mirror: nobody touches its memory any more */
    UVAS_ASK_STORE,   /* mirror, party: `store` is there from now on */
    UVAS_ASK_COMMIT,  /* mirror, range: fresh memory on the host */
    UVAS_ASK_SUSPEND, /* mirror, stretch: it is about to go */
    UVAS_ASK_RESUME,  /* it stays after all */
    UVAS_ASK_FORGET,  /* mirror, stretch: it has gone */
    UVAS_ASK_MOVE,    /* mirror, range, party, write */
    UVAS_ASK_DISCARD, /* mirror, range */
    UVAS_ASK_PIN,     /* mirror, range: it has come home, and stays; stretch: written when it does, until UNPIN */
    UVAS_ASK_UNPIN,
    UVAS_ASK_PAUSE,   /* for a fork: what only devices hold is copied home, then all stands still until uvas_requests_resume */
    UVAS_ASK_STOP,
};

struct uvas_errand { /* on the stack of who asks; the pager's until it is done */
    enum uvas_request_kind kind;
    struct uvas_mirror *mirror;
    struct uvas_member *member;
    uint32_t party;
    bool write;
    bool advised;        /* MOVE: advice may make it a copy */
    uint32_t first, end; /* granules; `first` goes forward with the work */
    uint32_t from;       /* MOVE: where it was to begin: what it has brought is not pushed out by what comes after */
    uint32_t most;       /* granules at once; less after a refusal */
    uint32_t tries;
    struct uvas_stretch *stretch;
    struct uvas_store store;
    struct uvas_room *spare; /* JOIN: of no use */
    struct uvas_mirror **tables[2]; /* by base, by number. Afterwards those that are of no use any more */
    uint32_t table_room;
    struct uvas_stretch stayed[UVAS_STAYED_MAX]; /* what could not move, the first of it; `next` is not used */
    uint32_t stayed_count;
    int why;        /* it could not */
    uint64_t moved; /* bytes */
    uintptr_t at;   /* HOME, LEAVE, PAUSE: the base of the mirror that it is at */
    int rc;
    bool done;
    struct uvas_errand *next;
};

/* Hands it to the pager, waits for its end and returns its rc. */
int uvas_ask(struct uvas_errand *request);
/* The pager's side: works on what was asked for a while. true: there is more to do at once. *stop: it was asked to end. */
bool uvas_requests_work(bool *stop);
void uvas_requests_resume(void);
void uvas_requests_forget(void); /* the child of a fork */
void uvas_requests_waiting(const struct uvas_waiting *waiting); /* the pager tells */
struct uvas_waiting uvas_requests_longest(void);

/* ---- chores.c: what a request, or a death, makes the pager do, in parts ---- */

/* Goes on with it. true: done. */
bool uvas_chore(struct uvas_errand *request);
/* What the member alone holds comes home; with `leaves` its other copies go. Goes on from (*at, *first), the base of a mirror and a granule: other mirrors may come and go in between. 1: done, 0: there is more,
 * -errno: a run cannot, and is passed over. */
int uvas_bring_home(struct uvas_member *member, bool leaves, uintptr_t *at, uint32_t *first);

/* ---- core.c ---- */

/* A thread with all signals blocked: no handler ever runs there. 0 or -errno. */
int uvas_thread_start(pthread_t *thread, void *(*run)(void *), void *argument);

#endif
