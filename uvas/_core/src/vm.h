/* vm.h: the system calls that uvas makes, one function each, and what this kernel does with them. vm_call.h lists the files that they are in.
 *
 * Preconditions that hold for all: base and size are multiples of the page size, size > 0, base + size does not wrap.
 * Results are 0 (or a descriptor) or -errno. No function takes a lock. None is called with the core's lock held, bar uvas_vm_pages'
 * absence: nobody allocates under the lock either.
 */
#ifndef UVAS_VM_H
#define UVAS_VM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "uvas.h"

/* What uvas_vm_reserve answers when the kernel put the mapping elsewhere: somebody is there, or the kernel does not want to. */
#define UVAS_VM_MOVED (-99 /* EADDRNOTAVAIL: no mmap answers it */)

struct uvas_vma { /* one mapping of this process, as the kernel tells it */
    uintptr_t start;
    uintptr_t end;
    uint32_t protection; /* enum uvas_protection */
    uint32_t shared;
    uint64_t offset;
    uint64_t inode; /* 0: anonymous */
    uint32_t device_major;
    uint32_t device_minor;
};

struct uvas_file_id { /* tells whose a mapping is */
    uint64_t inode;
    uint32_t device_major;
    uint32_t device_minor;
    int32_t access;      /* of the descriptor: O_RDONLY, O_RDWR, ... */
    bool regular;        /* a file whose every descriptor reaches the same bytes; a device's may each have a state of its own */
    uint32_t block_size; /* what lengths of mappings of it are multiples of; the page size but for hugetlb */
};

/* Between a system call and the caller: each return after the kernel was entered is mispredicted, as it empties the stack of return addresses. */
#define UVAS_FLAT static inline __attribute__((always_inline))

/* 0, or the error that the next system call shall answer: the tests' fault knob, for who decides about a call of his own. */
int uvas_vm_gate(void);

/* The platform; valid after uvas_vm_learn. Written by uvas_vm_learn only, before any other thread reads it (core.c orders them). */
extern struct uvas_platform uvas_vm_platform;
int uvas_vm_learn(void);

/* -- addresses -- */

/* Holds [base, base + size) without access, never in place of anything. tag: a descriptor from uvas_vm_tag, or -1 for anonymous memory.
 * 0; -EEXIST or UVAS_VM_MOVED: taken; -ENOMEM: taken or a limit (the caller looks). A mapping that landed elsewhere is given back;
 * if even that fails, its base is stored in *stray (else 0). */
int uvas_vm_reserve(uintptr_t base, size_t size, int tag, uintptr_t *stray);
int uvas_vm_unmap(uintptr_t base, size_t size);

/* -- memory inside what is held: the caller has pinned the range in a live reservation -- */

enum uvas_vm_overlay_kind { UVAS_OVERLAY_HELD, UVAS_OVERLAY_ANONYMOUS, UVAS_OVERLAY_SHARED, UVAS_OVERLAY_PRIVATE };

/* The one use of the destructive flag. HELD: no access, over the tag `fd` (-1: anonymous); ANONYMOUS: fresh private memory;
 * SHARED, PRIVATE: `fd` at `offset`. Atomic if it succeeds: at no moment is a page of the range unmapped. If it fails for a descriptor, the kernel
 * may have unmapped the range before the file said no (seen: hugetlbfs without pages, Linux 6.18), so the caller tries the file elsewhere first
 * (uvas_vm_try) and takes a hole back at once. */
int uvas_vm_overlay(uintptr_t base, size_t size, enum uvas_vm_overlay_kind kind, uint32_t protection, int fd, int64_t offset);
/* Whether the file would be mapped: maps it where the kernel likes, and unmaps it. */
int uvas_vm_try(size_t size, enum uvas_vm_overlay_kind kind, uint32_t protection, int fd, int64_t offset);
int uvas_vm_protect(uintptr_t base, size_t size, uint32_t protection);
int uvas_vm_drop(uintptr_t base, size_t size);     /* contents gone, mapping stays */
/* The same, also where memory is locked, and past the tests' knob: for what must not stay, as nothing else says that it is gone. 0 or -errno. */
int uvas_vm_drop_surely(uintptr_t base, size_t size);
int uvas_vm_guard(uintptr_t base, size_t size);    /* contents gone, no access, no mapping used */
int uvas_vm_unguard(uintptr_t base, size_t size);
int uvas_vm_populate(uintptr_t base, size_t size, uint32_t protection);
int uvas_vm_inherit(uintptr_t base, size_t size, bool inherited); /* whether the child of a fork has it too */

/* -- descriptors, all close-on-exec -- */

int uvas_vm_tag(const char *name);                 /* a sealed, empty memfd */
int uvas_vm_memfd(const char *name, size_t size);  /* a sparse one */
int uvas_vm_punch(int fd, int64_t offset, size_t size);
int uvas_vm_punch_surely(int fd, int64_t offset, size_t size); /* past the tests' knob: to undo */
/* The next stretch that holds data, [*data, *hole), which ends after `offset`; INT64_MAX: there is none. Moves the descriptor's position. */
int uvas_vm_next_data(int fd, int64_t offset, int64_t *data, int64_t *hole);
int uvas_vm_allocate(int fd, int64_t offset, size_t size); /* pages of zeros where holes are */
long uvas_vm_write_at(int fd, const void *from, size_t size, int64_t offset); /* bytes or -errno */
long uvas_vm_read_at(int fd, void *out, size_t size, int64_t offset);
int uvas_vm_open_pages(void);  /* /proc/self/pagemap: eight bytes a page, bit 63: present, bit 62: swapped out */
int uvas_vm_open_memory(void); /* /proc/self/mem: what is there, through the kernel */
int uvas_vm_duplicate(int fd);
void uvas_vm_close(int fd);
int uvas_vm_identify(int fd, struct uvas_file_id *out);

/* -- what is there; advice, never a decision -- */

/* The mapping that covers `address` or the next one above it: 1, or 0 where there is none, or -errno (-ENOTSUP: this kernel cannot say). */
int uvas_vm_query(uintptr_t address, struct uvas_vma *out, char *name, size_t name_size);
int uvas_vm_open_maps(void); /* the text, for kernels without the query */
long uvas_vm_read(int fd, void *out, size_t size);
/* The whole of a small file of /proc, NUL-terminated. Bytes read or -errno. */
long uvas_vm_read_file(const char *path, char *out, size_t size);
uintptr_t uvas_vm_break(void);
uint64_t uvas_vm_limit(int resource); /* the soft limit; UINT64_MAX: none */

/* -- our own bookkeeping -- */

void *uvas_vm_pages(size_t size_bytes); /* zeroed private memory for our own bookkeeping, never given back; or NULL */
int uvas_vm_dont_fork(void *at, size_t size_bytes); /* a child of fork does not have it */
void *uvas_vm_alias(int fd, size_t size_bytes); /* a file, shared, where the kernel likes, not in a child of fork; or NULL */
#define UVAS_VM_HUGE_PAGE ((size_t)2 << 20)
void *uvas_vm_huge_pages(size_t size_bytes); /* likewise, of whole huge pages, and aligned to them */

/* -- for arenas -- */

int uvas_vm_advise_huge(uintptr_t base, size_t size);              /* transparent huge pages are welcome */
int uvas_vm_bind(uintptr_t base, size_t size, uint32_t node);      /* pages of this NUMA node only */
int uvas_vm_memfd_huge(const char *name, size_t size);             /* a sparse file of 2 MiB pages */
int uvas_vm_resident(uintptr_t base, size_t size, uint64_t *bytes); /* what of it is in RAM */
int uvas_vm_barrier_learn(void); /* 0: uvas_vm_barrier works in this process */
void uvas_vm_barrier(void);      /* every other running thread of the process passes a full barrier before this returns */
void uvas_vm_yield(void);

/* -- processes -- */

int uvas_vm_wait_for_end(int32_t parent); /* returns when that process, our parent, has ended */
void uvas_vm_exit(int status);

/* For tests: from here on calls behave as on that kernel. uvas_vm_learn is to follow. */
void uvas_vm_imitate(uint32_t kernel, uint32_t lacks);

/* The child of a fork: forget the parent's descriptors of /proc. */
void uvas_vm_forget(void);

#endif
