/* uvas.h: the whole C contract of uvas, an allocator of address space that hosts and devices share.
 *
 * A *space* hands out *reservations*: ranges of addresses that mean the same thing on the host and on every attached *device*.
 * Memory is *committed* inside them. uvas never replaces a mapping that it does not own; an address is a demand or it is absent, never a hint.
 *
 * Conventions
 *   ranges      (uintptr_t base, size_t size) in bytes, half-open, in that order
 *   results     0 or -errno; values through out-parameters, untouched on failure
 *   failures    a call that fails has changed nothing. uvas_last_failure() tells the calling thread what happened, in fields and in a sentence
 *   handles     64-bit ids that are never used again; 0 is none. A released, closed or inherited (fork) id answers -ESTALE
 *   threads     every function may be called from any thread. uvas_find, uvas_next, uvas_find_allocation, uvas_find_arena and uvas_unlease take no lock
 *   fork        the child starts with an empty registry: ids of the parent are dead there, its memory is inherited as memory always is
 *
 * Errors, by the condition that causes them
 *   -EEXIST     somebody is there (failure: in the way, owner)           -ENOSPC   no room in the window for it (failure: tried)
 *   -EDQUOT     a limit of this process is reached (what, value, remedy) -ENOMEM   no memory behind it
 *   -ENOTSUP    this kernel or device cannot (what, remedy)              -ESTALE   the handle is dead
 *   -EINVAL     the caller's mistake (text)                              -EBUSY    under a live lease
 *   other       what a device's callback answered (failure: kind DEVICE) or a system call that should not fail did
 */
#ifndef UVAS_H
#define UVAS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifndef UVAS_API
#define UVAS_API __attribute__((visibility("default")))
#endif

/* cffi: begin (from here on plain declarations; the build reads them too) */

#define UVAS_ABI_VERSION 1
#define UVAS_DEFAULT_ATTEMPTS 64
#define UVAS_TRIED_MAX 32
#define UVAS_DEVICES_MAX 32
#define UVAS_UNRECOVERABLE 1073741824 /* taken off a callback's negative answer: see struct uvas_device */

typedef uint64_t uvas_id;

/* ---- the platform, learnt once at run time -------------------------------------------------------------------------------- */

enum uvas_flag { /* what this kernel does with MAP_FIXED_NOREPLACE, found by trying */
    UVAS_FLAG_HONOURED = 1, /* Linux 4.19 and later: EEXIST */
    UVAS_FLAG_ENOMEM = 2,   /* the first MAP_FIXED_SAFE proposal: a conflict answers ENOMEM */
    UVAS_FLAG_IGNORED = 3,  /* before 4.17, gVisor, emulators: the address is a hint; uvas compares and gives strays back */
    UVAS_FLAG_PARTIAL = 4,  /* 4.17 and 4.18 clobber on partial overlap; uvas does not use the flag there */
    UVAS_FLAG_REFUSED = 5,  /* WSL1: EOPNOTSUPP; uvas does not use the flag there */
};

struct uvas_platform {
    size_t page_size;           /* bytes */
    size_t shared_alignment;    /* bytes; where a shared mapping may start (SHMLBA); the page size on most architectures */
    uint32_t address_bits;      /* reachable on request */
    uint32_t window_bits;       /* of addresses that the kernel gives without being asked for more */
    uint32_t flag;              /* enum uvas_flag */
    uint32_t has_procmap_query; /* 0 or 1, as are the next ones */
    uint32_t has_guard;         /* MADV_GUARD_INSTALL on private memory */
    uint32_t has_tag;           /* a sealed empty memfd can be mapped */
};

UVAS_API unsigned uvas_abi_version(void);
UVAS_API int uvas_platform(struct uvas_platform *out);

/* ---- what went wrong ------------------------------------------------------------------------------------------------------- */

enum uvas_failure_kind {
    UVAS_FAILURE_NONE = 0,
    UVAS_FAILURE_IN_USE = 1,
    UVAS_FAILURE_EXHAUSTED = 2,
    UVAS_FAILURE_LIMIT = 3,
    UVAS_FAILURE_MEMORY = 4,
    UVAS_FAILURE_DEVICE = 5,
    UVAS_FAILURE_UNSUPPORTED = 6,
    UVAS_FAILURE_RELEASED = 7,
    UVAS_FAILURE_INVALID = 8,
    UVAS_FAILURE_BUSY = 9,
    UVAS_FAILURE_SYSTEM = 10,
};

struct uvas_tried { /* one candidate of a search and why it was not taken */
    uintptr_t base;
    char reason[72];
};

struct uvas_failure {
    uint32_t kind; /* enum uvas_failure_kind */
    int32_t code;  /* what the call returned */
    uintptr_t base; /* what was wanted */
    size_t size;
    uintptr_t other_base; /* what is in the way; other_size 0: not known */
    size_t other_size;
    uint64_t value; /* the limit's value */
    uint32_t tried_count; /* candidates tried in all; the last UVAS_TRIED_MAX of them are in `tried`, oldest first */
    uint32_t tried_kept;
    uint64_t poisoned; /* id of a reservation whose undo failed, or 0 */
    char owner[192];   /* who is in the way (a reservation's name, a device, a line of /proc/self/maps); kind DEVICE: the device */
    char what[64];     /* the limit, the feature, the system call; kind DEVICE: what it was asked; kind MEMORY: who has none */
    char remedy[192];
    char text[640]; /* a sentence for a person */
    struct uvas_tried tried[UVAS_TRIED_MAX];
};

/* The calling thread's last failure. Valid until its next failing call; kind is NONE before the first one. Never NULL. */
UVAS_API const struct uvas_failure *uvas_last_failure(void);

/* ---- spaces ---------------------------------------------------------------------------------------------------------------- */

enum uvas_backing { /* what commit puts behind the addresses; a set of bits */
    UVAS_BACKING_ANONYMOUS = 1, /* private anonymous memory: nobody else sees it, or those who follow host addresses */
    UVAS_BACKING_MEMFD = 2,     /* one memfd a reservation, mapped shared, at the reservation's own offsets */
    UVAS_BACKING_DESCRIPTOR = 4, /* a descriptor of the caller's (map_fd) */
    UVAS_BACKING_DRIVER = 8,    /* what a device that owns the range maps there */
};

enum uvas_space_flags {
    UVAS_UNTAGGED = 1, /* plain anonymous reservations: /proc/PID/maps does not name them and audit sees less */
};

struct uvas_space_options {
    const char *name;      /* at most 63 bytes are kept; NULL: "uvas" */
    uintptr_t window_base; /* reservations lie inside [window_base, window_base + window_size); size 0: anywhere that every party reaches */
    size_t window_size;
    uint32_t backing;  /* one of ANONYMOUS, MEMFD; 0: what the devices agree on, ANONYMOUS first */
    uint32_t flags;    /* enum uvas_space_flags */
    uint32_t attempts; /* candidates acted on by one reserve, at most; 0: UVAS_DEFAULT_ATTEMPTS */
};

struct uvas_space_stats {
    uint64_t reservations; /* live now */
    uint64_t adoptions;
    uint64_t reserved_bytes; /* live now */
    uint64_t committed_bytes;
    uint64_t reserves;  /* that succeeded, ever */
    uint64_t releases;
    uint64_t attempts;  /* candidates acted on, ever */
    uint64_t conflicts; /* answered "taken", ever, by the host or a device */
    uint64_t registry_conflicts; /* candidates found claimed in the registry, ever */
    uint64_t quarantined_bytes;  /* released, addresses still held because the kernel had no mapping left to split; given back later */
    uint64_t poisoned_bytes;     /* an undo failed: never used again */
    uint64_t lost_bytes;         /* taken by somebody else behind our back, found by heal */
};

UVAS_API int uvas_space_open(const struct uvas_space_options *options, uvas_id *out);
/* Releases what is left in it and forgets it. -EBUSY, before anything is released, while a lease lives in it or an arena takes reservations of it. */
UVAS_API int uvas_space_close(uvas_id space);
UVAS_API int uvas_space_stats(uvas_id space, struct uvas_space_stats *out);

/* ---- devices: parties that must agree to an address ------------------------------------------------------------------------ */

enum uvas_placement { /* how a device agrees to an address */
    UVAS_FOLLOWS = 0,   /* a host address is enough: claim and unclaim are not called */
    UVAS_CLAIMS = 1,    /* it has an address space of its own and can refuse */
    UVAS_REGISTERS = 2, /* host memory is made known to it at commit: claim and unclaim are not called */
    UVAS_OWNS = 3,      /* its claim takes the address itself, on the host too: it is asked first; at most one in a space */
};

enum uvas_memory { /* what a device sees at an address */
    UVAS_MEMORY_SHARED = 0,  /* what the host sees */
    UVAS_MEMORY_PRIVATE = 1, /* memory of its own, kept coherent: a granule moves to whoever touches it (see `memory that moves`) */
};

enum uvas_protection { UVAS_NONE = 0, UVAS_READ = 1, UVAS_WRITE = 2, UVAS_EXECUTE = 4 };

struct uvas_backing_info { /* what is behind a committed range */
    uint32_t kind;      /* enum uvas_backing */
    uint32_t shared;    /* 1: mapped shared, 0: private */
    int32_t descriptor; /* MEMFD, DESCRIPTOR: valid during the call; duplicate it to keep it. Otherwise -1 */
    int64_t offset;     /* of the range's first byte in it */
};

struct uvas_obstacle { /* filled by a claim that answers -EEXIST, as far as it knows: the next candidate starts after it */
    uintptr_t base;
    size_t size;
    char owner[192];
};

/* Contract of every callback: ranges are not empty, aligned to the granularity and inside one live reservation; on an answer other than 0
 * nothing has changed; calls on disjoint ranges may come from several threads at once; no callback calls back into uvas; no lock of uvas is
 * held. claim: 0, -EEXIST for "taken here", anything else for "broken". unclaim gives back the range with whatever is still committed in it. A
 * device that failed and could not undo what it had begun answers -EIO - UVAS_UNRECOVERABLE, say: the reservation is poisoned. Devices that
 * register or own may take memory back only as it was committed, at once; a device that owns is asked to decommit ranges in which not all is
 * committed, because it alone can do so all or nothing. */
struct uvas_device {
    const char *name;
    uint32_t placement;    /* enum uvas_placement */
    uint32_t backings;     /* set of enum uvas_backing that it can live with */
    size_t granularity;    /* bytes, a power of two; 0: the host's page */
    uintptr_t window_base; /* addresses that it can reach; size 0: all */
    size_t window_size;
    void *context; /* first argument of each callback */
    int (*claim)(void *context, uintptr_t base, size_t size, struct uvas_obstacle *obstacle);
    int (*unclaim)(void *context, uintptr_t base, size_t size);
    int (*commit)(void *context, uintptr_t base, size_t size, const struct uvas_backing_info *backing, uint32_t protection);
    int (*decommit)(void *context, uintptr_t base, size_t size);
    int (*protect)(void *context, uintptr_t base, size_t size, uint32_t protection); /* before the host loses rights, after it gains them */
    /* Optional (NULL: none). Called on every claiming device before the first claim is, with what claim will be asked:
     * a device that can work meanwhile starts here and answers in claim. A start is always followed by its claim. */
    void (*start_claim)(void *context, uintptr_t base, size_t size);
    /* The rest only for a device with memory of its own. It claims, lives with ANONYMOUS memory, and its granularity is a multiple of the granule.
     * commit is given the descriptor of the device's memory, which its process maps shared at the same addresses; nothing else is asked of it. */
    uint32_t memory;   /* enum uvas_memory */
    int32_t faults;    /* a userfaultfd that its process has made (uvas_lend_faults); a duplicate is kept */
    int32_t process;   /* a pidfd: when that process ends, what it held comes home; -1: it never ends. A duplicate is kept */
    uint64_t capacity; /* bytes that it holds, at most; 0: as many as there is memory for */
    size_t granule;    /* bytes that move at once, a power of two from 4 KiB to 2 MiB; 0: 64 KiB. The same for all of a space */
    /* Which memory it is: any address that is the device's alone, and the same in each space that it is attached to, with the same capacity and granule:
     * the capacity then bounds what it holds of all of them together. NULL: each attachment has a capacity of its own. */
    const void *identity;
};

/* Brings a device to a space: claims every live reservation on it and commits what is committed, all or nothing. *device is copied.
 * Waits until no other call works in the space. -ENOTSUP if its backings do not allow what is there. */
UVAS_API int uvas_attach(uvas_id space, const struct uvas_device *device, uvas_id *out);
/* Takes it away: unclaims every live reservation on it. */
UVAS_API int uvas_detach(uvas_id space, uvas_id device);

/* ---- reservations ---------------------------------------------------------------------------------------------------------- */

struct uvas_where { /* demands; a zeroed one demands nothing */
    uintptr_t at;          /* exactly here; 0: no such demand */
    uintptr_t window_base; /* inside [window_base, window_base + window_size); size 0: the space's window */
    size_t window_size;
    size_t align;     /* a power of two; 0: what the parties need */
    const char *name; /* at most 63 bytes are kept; NULL: none */
};

struct uvas_reservation {
    uvas_id id;
    uintptr_t base;
    size_t size; /* as rounded up to pages and granularities */
};

/* One range on the host and on every device of the space, or nothing anywhere. `where` may be NULL. O(log n) and 2 to 4 system calls
 * without conflict. */
UVAS_API int uvas_reserve(uvas_id space, size_t size, const struct uvas_where *where, struct uvas_reservation *out);
/* Gives memory and addresses back. -EBUSY while a lease lives in it; waits for operations in it. */
UVAS_API int uvas_release(uvas_id reservation);
/* Releases now if no lease lives in it (returns 0), else refuses new leases (returns -EBUSY): the caller releases when the last is gone. */
UVAS_API int uvas_retire(uvas_id reservation);

enum uvas_commit_flags { UVAS_POPULATE = 1 };

/* Memory behind [offset, offset + size) of the reservation, page-aligned, on every party. What is committed already keeps its contents and
 * gets the protection. -EBUSY where an arena lives, unless its addresses are bare. */
UVAS_API int uvas_commit(uvas_id reservation, size_t offset, size_t size, uint32_t protection, uint32_t flags);
/* Gives the memory back and keeps the addresses. What is not committed is passed over. */
UVAS_API int uvas_decommit(uvas_id reservation, size_t offset, size_t size);
/* All of the range is committed, else -EINVAL. Also where an arena lives, which touches its memory only to zero, poison or move it. */
UVAS_API int uvas_protect(uvas_id reservation, size_t offset, size_t size, uint32_t protection);

enum uvas_sharing { UVAS_PRIVATE = 0, UVAS_SHARED = 1 };

struct uvas_mapping {
    int32_t descriptor; /* any file or device that mmap takes; uvas keeps a duplicate */
    uint32_t sharing;   /* enum uvas_sharing */
    size_t offset;      /* in the reservation, bytes, page-aligned */
    size_t size;        /* bytes; rounded up as the kernel will round it (huge pages) */
    int64_t descriptor_offset;
    uint32_t protection;
};

/* Maps a descriptor inside a reservation, in place of what was committed there, on every party. */
UVAS_API int uvas_map_fd(uvas_id reservation, const struct uvas_mapping *mapping);

/* Tells uvas of a range that is somebody else's: it is neither mapped nor unmapped, only known. Released by uvas_release. */
UVAS_API int uvas_adopt(uvas_id space, uintptr_t base, size_t size, const char *owner, struct uvas_reservation *out);

struct uvas_piece { /* a part of a reservation, all of one nature */
    size_t offset;
    size_t size;
    uint32_t kind;       /* enum uvas_backing; 0: lost to somebody else */
    uint32_t protection; /* enum uvas_protection */
    uint32_t shared;
    uint32_t guarded;    /* 1: decommitted without a mapping to spare; pages are gone, guards are up */
    int64_t descriptor_offset;
};

/* Pieces that end after `offset`, in order, at most `capacity`; what lies between them is reserved only. */
UVAS_API int uvas_pieces(uvas_id reservation, size_t offset, struct uvas_piece *out, size_t capacity, size_t *count);

/* ---- leases: who uses the memory ------------------------------------------------------------------------------------------- */

/* Marks committed memory as used: release, decommit and map_fd there answer -EBUSY until it ends. -EINVAL where not all is committed. */
UVAS_API int uvas_lease(uvas_id reservation, size_t offset, size_t size, uvas_id *out);
/* Ends it. Takes no lock and makes no system call: for finalizers and signal handlers. -ESTALE if it has ended. */
UVAS_API int uvas_unlease(uvas_id lease);

/* ---- memory that moves ------------------------------------------------------------------------------------------------------ */

/* In a space with private devices, memory is valid on the host and on each of them. A *granule* is modified in one place, shared for reading in several,
 * or nowhere (it reads as zeros). Whoever touches it gets it: a read makes a copy, a write takes the others away. One thread in this process, the pager,
 * serves the faults of all. Until a device first touches a reservation, or memory in it is prefetched, its memory is the host's and costs nothing.
 *
 * Offsets and sizes of commit, decommit and protect in such a reservation are multiples of the granule. Those below may be any inside it, and are widened
 * to whole granules, but where it says otherwise. */

#define UVAS_STAYED 16

struct uvas_stays { /* part of a range that did not move */
    uintptr_t base;
    size_t size;
};

struct uvas_moved {
    uint64_t bytes; /* that are at the target now and were not before */
    uint32_t stayed_count; /* ranges that stayed; the first UVAS_STAYED of them are in `stayed` */
    int32_t why;           /* they did: -EBUSY: pinned, by I/O in flight or by uvas_pin_host; -EIO: lost; -ENOMEM: not committed, or no memory */
    struct uvas_stays stayed[UVAS_STAYED];
};

/* Moves a range to a device of its space, or to the host (device 0), without a fault; advice may make it a copy. 0, also where nothing had to move;
 * -EBUSY: some of it stayed, *out says what; -ENOMEM: it is more than the device may hold, or the host has no memory; -ENOTSUP: memory that cannot
 * move (a descriptor); -EINVAL: not all is committed, or it may not be accessed; -ESRCH: the device's process has ended.
 * `out` may be NULL. On a device without memory of its own there is nothing to do. */
UVAS_API int uvas_prefetch(uvas_id reservation, size_t offset, size_t size, uvas_id device, struct uvas_moved *out);

enum uvas_advice {
    UVAS_ADVISE_NOTHING = 0,      /* takes all advice back */
    UVAS_ADVISE_READ_MOSTLY = 1,  /* a prefetch copies and takes nothing away */
    UVAS_ADVISE_PREFERRED = 2,    /* the device keeps it as long as others can be evicted; takes the place of ACCESSED_BY. 0, the host: only the latter,
                                     nothing stays or comes home for it */
    UVAS_ADVISE_ACCESSED_BY = 3,  /* the device keeps a copy when it is prefetched elsewhere; passed over where a device is preferred */
};

UVAS_API int uvas_advise(uvas_id reservation, size_t offset, size_t size, uint32_t advice, uvas_id device);

enum uvas_page { /* where a page is: the host, private devices (bits 1 to 27: uvas_page_bit says which), and */
    UVAS_PAGE_HOST = 1,
    UVAS_PAGE_LOST = 1 << 28,       /* its bytes are gone: a touch is SIGBUS, until uvas_discard */
    UVAS_PAGE_DUPLICATED = 1 << 29, /* more than one has it */
    UVAS_PAGE_READ_ONLY = 1 << 30,  /* by uvas_protect */
};
#define UVAS_PAGE_PROTECTED 0x80000000u /* by uvas_protect: no access */

/* A word of enum uvas_page for each page of the host from `offset` on, without a fault; 0: nowhere (it reads as zeros), or not committed. Memory that
 * all share is on the host once anybody has written there; what maps a descriptor is always. Offset and size are whole pages; *out has room for
 * size / page words. */
UVAS_API int uvas_where(uvas_id reservation, size_t offset, size_t size, uint32_t *out);
/* The bit of a device in those words; 0: it has no memory of its own. */
UVAS_API int uvas_page_bit(uvas_id space, uvas_id device, uint32_t *out);

/* Contents do not matter any more: granules that lie inside the range as a whole read as zeros, nothing is copied, what was lost is forgotten. */
UVAS_API int uvas_discard(uvas_id reservation, size_t offset, size_t size);

struct uvas_pin { /* the caller's memory, from pin to unpin; nothing in it is for the caller */
    uint64_t private_[8];
};

/* The range comes home and stays: devices that want it wait. It cannot be released meanwhile. Where it fails, *pin is as it was. */
UVAS_API int uvas_pin_host(uvas_id reservation, size_t offset, size_t size, struct uvas_pin *pin);
UVAS_API int uvas_unpin_host(struct uvas_pin *pin);

struct uvas_traffic { /* of one party */
    uvas_id device; /* 0: the host */
    uint64_t read_faults, write_faults; /* as they arrived: a thread that is woken before it may go on comes again */
    uint64_t bytes_in, bytes_out;
    uint64_t resident_bytes, capacity, evictions; /* devices only; evictions: granules */
};

struct uvas_movement {
    uint64_t pager_ns; /* the pager's time at work, for all spaces */
    uint64_t granule;  /* bytes */
    uint64_t metadata_bytes; /* directories as far as they are in RAM, and what the pager knows of the devices */
    uint32_t count;    /* parties: the host and each private device; 0: there is none */
    uint32_t unused;
    struct uvas_traffic parties[28];
};

UVAS_API int uvas_movement(uvas_id space, struct uvas_movement *out);

enum uvas_private_feature { /* what private memory can do here */
    UVAS_PRIVATE_PINNED = 1,   /* pages with I/O in flight are safe: they do not move (Linux 6.8) */
    UVAS_PRIVATE_POISON = 2,   /* a touch of what was lost is SIGBUS (Linux 6.6) */
    UVAS_PRIVATE_USER_ONLY = 4, /* no privilege: a system call that touches a page which is elsewhere fails with EFAULT; uvas_pin_host helps */
};

/* Whether this process can have devices with memory of their own: 0 and a set of enum uvas_private_feature, or -ENOTSUP. */
UVAS_API int uvas_private_memory(uint32_t *features);

/* ---- whose address is this? ------------------------------------------------------------------------------------------------ */

enum uvas_kind { UVAS_RESERVATION = 1, UVAS_ADOPTION = 2 };

struct uvas_found {
    uvas_id id;
    uintptr_t base;
    size_t size;
    uint32_t kind; /* enum uvas_kind */
};

/* Any address inside. No lock; async-signal-safe; O(log n). 0 or -ENOENT (which is no failure: uvas_last_failure does not change). */
UVAS_API int uvas_find(uintptr_t address, struct uvas_found *out);
/* The lowest reservation or adoption that ends above `address`, of any space. Likewise. */
UVAS_API int uvas_next(uintptr_t address, struct uvas_found *out);
/* Copies of names, cut to fit. */
UVAS_API int uvas_name(uvas_id id, char *out, size_t capacity);
UVAS_API int uvas_space_of(uvas_id id, uvas_id *out);

/* ---- arenas: blocks of any size inside reservations ------------------------------------------------------------------------ */

/* An arena hands out *blocks*. What it knows of them lies apart from the memory: allocating, freeing and looking up never touch a block, which may
 * be on a device, protected or not there at all. Small blocks come from slabs of one size each, large ones (above 256 KiB) are whole pages. Every
 * thread keeps some slabs and pages for itself; a block may be freed by any thread. */

#define UVAS_ARENA_GROWTH 17179869184 /* 16 GiB: bytes of addresses that an arena takes from its space at once, where it may choose */

enum uvas_arena_flags {
    UVAS_ARENA_BARE = 1,   /* addresses only: never commits anything; the caller maps what it likes behind a block */
    UVAS_ARENA_GUARD = 2,  /* a page that faults after each block of more than 64 KiB; it costs no mapping */
    UVAS_ARENA_POISON = 4, /* blocks are filled with 0xdf when they are freed, which touches them */
    UVAS_ARENA_BIND = 8,   /* memory of NUMA node `node` only */
};

enum uvas_arena_pages { /* what the memory is made of */
    UVAS_PAGES_ANY = 0,         /* transparent huge pages are asked for in blocks of 4 MiB and more, otherwise as the kernel likes */
    UVAS_PAGES_TRANSPARENT = 1, /* they are asked for everywhere, in aligned spans of 2 MiB */
    UVAS_PAGES_HUGE = 2,        /* 2 MiB pages that the administrator set aside; -ENOTSUP where there are none */
};

struct uvas_arena_options {
    const char *name;    /* at most 63 bytes are kept; NULL: "arena" */
    uvas_id space;       /* it takes reservations from this space as it needs them, or, if 0, */
    uvas_id reservation; /* it lives in this one, which the caller made, and never grows. Nobody else commits in it, unless BARE */
    uint32_t flags;      /* enum uvas_arena_flags */
    uint32_t pages;      /* enum uvas_arena_pages */
    uint32_t node;       /* with UVAS_ARENA_BIND */
    size_t growth;       /* bytes of addresses taken from the space at once; 0: UVAS_ARENA_GROWTH, or less where that much is not to be had */
    size_t limit;        /* bytes that large blocks and slabs take, at most, rounded down to pages; 0: no limit */
    uint64_t idle_ns;    /* memory that nothing has used for so long is given back by a thread that takes or returns pages; 0: ten seconds; UINT64_MAX: never */
    /* Asked, with no lock held, before a call fails with -ENOMEM, -ENOSPC or -EDQUOT: it may free blocks, and answers 1 to have the call tried
     * once more. Nobody is asked on behalf of what it allocates here itself. NULL: nobody is asked. */
    int (*exhausted)(void *context, size_t size);
    void *context;
};

struct uvas_arena_stats {
    uint64_t live_blocks; /* now */
    uint64_t live_bytes;  /* of those blocks, as rounded up to sizes of slabs and pages */
    uint64_t total_blocks; /* ever allocated, those included that a failed uvas_alloc_many gave back */
    uint64_t total_bytes;
    uint64_t used_bytes; /* pages of slabs and of large blocks: what `limit` bounds */
    uint64_t peak_bytes; /* the most that used_bytes has been (see uvas_arena_peak) */
    uint64_t cached_bytes; /* of used_bytes: pages that threads keep for their next block, without a live block in them */
    uint64_t reserved_bytes; /* addresses */
    uint64_t committed_bytes; /* memory behind them */
    uint64_t resident_bytes; /* of it, present in RAM, as the kernel says */
    uint64_t hole_bytes; /* pages that are neither a slab's nor a large block's */
    uint64_t hole_count;
    uint64_t largest_hole; /* bytes */
    uint64_t metadata_bytes; /* the arena's own bookkeeping, all of it */
    uint64_t threads; /* that keep something */
    uint64_t regions; /* reservations */
};

struct uvas_allocation { /* a live block */
    uintptr_t base;
    size_t size; /* usable bytes, at least what was asked for */
    uvas_id arena;
};

UVAS_API int uvas_arena_open(const struct uvas_arena_options *options, uvas_id *out);
/* Releases the reservations that it took. -EBUSY, with nothing changed, while a block lives or another thread allocates. What a device answers to a
 * release is the answer; the arena is closed all the same, and the reservation is its space's to release. */
UVAS_API int uvas_arena_close(uvas_id arena);

/* A block of at least `size` > 0 bytes, aligned to `align` (a power of two up to 1 GiB; 0: 16 bytes). Contents are undefined; zeroed by the second.
 * -ENOMEM: the limit is reached (failure: size, value = limit, other_size = the largest hole, text) or the host has no memory; -ENOSPC: no hole is
 * large enough and the arena may not grow; -EINVAL: also a size beyond all addresses. Tens of instructions where the thread has a slab; otherwise O(log n) in the number of holes. */
UVAS_API int uvas_alloc(uvas_id arena, size_t size, size_t align, uintptr_t *out);
UVAS_API int uvas_alloc_zeroed(uvas_id arena, size_t size, size_t align, uintptr_t *out);
/* All of them or none; *out has room for `count` addresses, and holds none that means anything if it fails. */
UVAS_API int uvas_alloc_many(uvas_id arena, const size_t *sizes, size_t count, uintptr_t *out);
/* Only if it takes no system call, no callback and no wait for a lock that is held over either: -EAGAIN otherwise, which is no failure and
 * changes nothing. For callers that hold a lock of their own (Python's). */
UVAS_API int uvas_alloc_try(uvas_id arena, size_t size, size_t align, uintptr_t *out);
UVAS_API int uvas_alloc_zeroed_try(uvas_id arena, size_t size, size_t align, uintptr_t *out); /* may take the time to write zeros */
/* The block with another size, in place where it can be, else moved (contents copied up to the smaller size). On failure it is as it was. */
UVAS_API int uvas_realloc(uvas_id arena, uintptr_t address, size_t size, uintptr_t *out);
/* -EINVAL, and nothing happens, where `address` is not the base of a live block of this arena: freed already, or never allocated. (Two frees of one
 * block at the very same time: one of them answers -EINVAL, or both 0 where one is by the thread that owns the slab, which the allocating one does
 * until it ends; the block is free once. What cannot
 * be told is a second free that comes when the block has been handed out again.) In a forked child the blocks of the parent's arenas are left alone, and the answer is 0. */
UVAS_API int uvas_free(uvas_id arena, uintptr_t address);
/* As uvas_free, under the conditions of uvas_alloc_try. */
UVAS_API int uvas_free_try(uvas_id arena, uintptr_t address);
/* Usable bytes of a live block; also in a forked child for a block of the parent's. */
UVAS_API int uvas_allocation_size(uvas_id arena, uintptr_t address, size_t *out);

/* The live block of any arena that holds an address, which may be inside it. No lock; async-signal-safe; 0 or -ENOENT (which is no failure). */
UVAS_API int uvas_find_allocation(uintptr_t address, struct uvas_allocation *out);
/* The arena that lives in the reservation there, whether or not a block does. Likewise. */
UVAS_API int uvas_find_arena(uintptr_t address, uvas_id *out);

/* Calls in what all threads keep, and gives back the memory of every hole: whole spans are decommitted, other pages emptied, those of slabs in which no
 * block lives as well. *bytes (may be NULL): how much. O(blocks). */
UVAS_API int uvas_arena_trim(uvas_id arena, uint64_t *bytes);
UVAS_API int uvas_arena_stats(uvas_id arena, struct uvas_arena_stats *out);
/* Starts peak_bytes anew from what is used now, or from `floor` if that is more; *was (may be NULL): what it had been. */
UVAS_API int uvas_arena_peak(uvas_id arena, uint64_t floor, uint64_t *was);
/* Every invariant of the arena, all threads stopped at its door meanwhile. 0, or -EINVAL with the sentence in the failure. */
UVAS_API int uvas_arena_check(uvas_id arena);

/* ---- blocks in the order of streams ---------------------------------------------------------------------------------------- */

/* A GPU's queue (a *stream*) runs after the calls that fill it. So a block that one stream has used can be handed out again at once to whoever works
 * on the same stream, and to nobody else until somebody has waited. An *order* keeps freed blocks in lists of their streams, in front of an arena.
 * Nothing here waits, calls a driver or touches a block. */

struct uvas_order; /* lives to the last of its blocks */

struct uvas_order_options {
    uvas_id arena;
    /* The calling thread's stream, asked at each allocation: its number counts, with the device; CU_STREAM_PER_THREAD (2) is another in each thread. */
    intptr_t (*current)(void);
    /* Asked, without a lock, for a block where that may wait, or where there is no memory: calls uvas_alloc, or uvas_order_trim first. 0 or -errno. */
    int (*wait)(void *context, size_t size, uintptr_t *out);
    void *context;
};

struct uvas_order_stats {
    uint64_t live_blocks; /* handed out */
    uint64_t live_bytes;
    uint64_t kept_blocks; /* in the lists of streams */
    uint64_t kept_bytes;
};

UVAS_API int uvas_order_open(const struct uvas_order_options *options, struct uvas_order **out);
/* Every stream has come to its end: what is kept goes back to the arena. *bytes (may be NULL): how much. */
UVAS_API int uvas_order_trim(struct uvas_order *order, uint64_t *bytes);
UVAS_API int uvas_order_stats(struct uvas_order *order, struct uvas_order_stats *out);
/* -EBUSY while a block is handed out; otherwise as trim, and it is gone. */
UVAS_API int uvas_order_close(struct uvas_order *order);

/* In the shape that CuPy's CFunctionAllocator calls: `order` is a struct uvas_order. A block of at least `size` bytes, aligned to 512, for the
 * stream that is current on `device`; NULL: no memory (uvas_last_failure). */
UVAS_API void *uvas_order_malloc(void *order, size_t size, int device);
/* To the list of the stream that was current at its allocation, whatever is now. Any thread; nothing happens to what is no block of this order. */
UVAS_API void uvas_order_free(void *order, void *block, int device);

/* ---- truth ------------------------------------------------------------------------------------------------------------------ */

/* Every invariant of registry and records. 0, or -EINVAL with the sentence in the failure. */
UVAS_API int uvas_check(void);

enum uvas_finding_kind {
    UVAS_HOLE = 1,    /* nobody is there: heal takes it back */
    UVAS_FOREIGN = 2, /* somebody else is there: heal marks it lost */
    UVAS_CHANGED = 3, /* ours by its looks, with another protection than uvas gave it */
    UVAS_LOST = 4,    /* marked lost earlier */
};

struct uvas_finding {
    uvas_id reservation;
    uintptr_t base;
    size_t size;
    uint32_t kind;      /* enum uvas_finding_kind */
    uint32_t committed; /* 1: memory was committed there; a hole's bytes are gone unless a descriptor holds them */
    uint32_t healed;    /* by heal: 1 taken back, 0 not */
    char owner[192];
};

/* What the kernel says against what the registry says, for every live reservation of the space. *count: findings in all, which may be
 * more than capacity. Exact where nothing is committed; in committed anonymous memory holes and visible differences. */
UVAS_API int uvas_audit(uvas_id space, struct uvas_finding *out, size_t capacity, size_t *count);
/* audit, and takes holes back with a non-destructive mapping, as reserved addresses (or over their descriptor again); marks the rest lost. */
UVAS_API int uvas_heal(uvas_id space, struct uvas_finding *out, size_t capacity, size_t *count);

/* ---- for processes that serve as devices ------------------------------------------------------------------------------------ */

/* Ends this process when process `pid` (its parent) ends, however it ends, by a thread with all signals blocked. */
UVAS_API int uvas_end_with(int32_t pid);
/* A descriptor for the faults of this process in shared memory, for the host: to be sent there and closed. *features: enum uvas_private_feature. */
UVAS_API int uvas_lend_faults(int32_t *out, uint32_t *features);
/* Copies through the kernel: -EFAULT where an address is not accessible, instead of a crash. */
UVAS_API int uvas_peek(uintptr_t address, void *out, size_t size);
UVAS_API int uvas_poke(uintptr_t address, const void *data, size_t size);

/* ---- for tests: other kernels, and failure on demand ------------------------------------------------------------------------ */

enum uvas_test_kernel {
    UVAS_KERNEL_NATIVE = 0,
    UVAS_KERNEL_NOREPLACE = 1,
    UVAS_KERNEL_ENOMEM = 2,
    UVAS_KERNEL_HINT = 3,
    UVAS_KERNEL_HINT_FUSSY = 4,
    UVAS_KERNEL_PARTIAL = 5,
    UVAS_KERNEL_REFUSED = 6,
    UVAS_KERNEL_ALIGNS = 7,
};

enum uvas_test_lack { UVAS_LACK_QUERY = 1, UVAS_LACK_GUARD = 2, UVAS_LACK_TAG = 4 };

/* The kernel behaves as another one does from here on, lacking some features; the platform is learnt again. Only while no space is open:
 * -EBUSY otherwise. */
UVAS_API int uvas_test_kernel(uint32_t kernel, uint32_t lacks);
/* The k-th fallible system call from now on (k = 1: the next) answers -error; `lasting`: and every later one. k = 0: off. */
UVAS_API void uvas_test_fail(uint64_t k, int32_t error, uint32_t lasting);
/* Fallible system calls since the last uvas_test_fail. */
UVAS_API uint64_t uvas_test_calls(void);

struct uvas_test_step { /* what the directory does: see uvas_test_transition */
    uint32_t steps, source, drops, after;
};

/* The protocol of one granule: what must happen so that `party` may read (or write) where its word is `word`; see directory.h. */
UVAS_API int uvas_test_transition(uint32_t word, uint32_t party, uint32_t write, struct uvas_test_step *out);

/* cffi: end */

#ifdef __cplusplus
}
#endif

#endif
