/* vm_learn.c: what this kernel does, found out once, by trying: what it makes of the flag that replaces nothing, how wide addresses are, where shared
 * mappings may start, whether it maps a tag, guards pages and answers questions. Everybody else asks uvas_vm_platform.
 */
#define _GNU_SOURCE
#include <sys/auxv.h>

#include "vm_call.h"

#define PROBE_TRIES 8 /* of one property of the kernel, where another thread may be in the way */

struct uvas_platform uvas_vm_platform;

static int reserve_flags(void) {
    return MAP_PRIVATE | MAP_NORESERVE | MAP_ANONYMOUS | NOREPLACE;
}

/* A page on top of a page of our own; then two pages whose second is taken (what 4.17 got wrong). */
static int learn_flag(void) {
    size_t page = PAGE;
    long own = uvas_vm_map_native(0, 4 * page, PROT_NONE, MAP_PRIVATE | MAP_NORESERVE | MAP_ANONYMOUS, -1, 0);
    if (own < 0) {
        return (int)own;
    }
    uintptr_t base = (uintptr_t)own;
    long over = uvas_vm_map(base, page, PROT_NONE, reserve_flags(), -1, 0);
    uint32_t flag = UVAS_FLAG_IGNORED;
    if (over == -EEXIST) {
        flag = UVAS_FLAG_HONOURED;
    } else if (over == -ENOMEM) {
        flag = UVAS_FLAG_ENOMEM;
    } else if (over < 0) {
        flag = UVAS_FLAG_REFUSED;
    } else if ((uintptr_t)over != base) {
        (void)uvas_vm_unmap((uintptr_t)over, page);
    } else {
        flag = UVAS_FLAG_PARTIAL; /* replaced: worse than the known bug, and answered the same way */
    }
    if (flag == UVAS_FLAG_HONOURED && uvas_vm_unmap(base, page) == 0) {
        long both = uvas_vm_map(base, 2 * page, PROT_NONE, reserve_flags(), -1, 0);
        flag = both == (long)base ? UVAS_FLAG_PARTIAL : flag;
        base += both == (long)base ? 0 : page; /* the first page is free again, perhaps somebody else's */
    }
    (void)uvas_vm_unmap(base, (uintptr_t)own + 4 * page - base);
    uvas_vm_platform.flag = flag;
    return 0;
}

/* Whether one page can be held at this address: 1, 0, or -EEXIST when something is there. */
static int reachable(uintptr_t base) {
    uintptr_t stray;
    int rc = uvas_vm_reserve(base, PAGE, -1, &stray);
    if (rc == 0) {
        (void)uvas_vm_unmap(base, PAGE);
        return 1;
    }
    return rc == -EEXIST ? -EEXIST : 0;
}

/* The widest power of two in whose upper half a page can be held; and the one that holds what the kernel chose for the stack. */
static void learn_width(void) {
    uintptr_t here = (uintptr_t)getauxval(AT_RANDOM);
    uint32_t native = here ? 64 - (uint32_t)__builtin_clzl(here) : 0;
    uint32_t bits = native;
    for (uint32_t wider = 57; wider > native && bits == native; wider--) {
        for (uintptr_t eighth = 5; eighth <= 7 && bits == native; eighth++) {
            bits = reachable(eighth << (wider - 3)) != 0 ? wider : bits;
        }
    }
    uvas_vm_platform.window_bits = native ? native : bits;
    uvas_vm_platform.address_bits = bits;
}

/* The smallest power of two at which a shared mapping may start. Tried at addresses just freed: another thread may be there, so a refusal
 * counts only if it comes back every time. */
static void learn_shared_alignment(int fd) {
    size_t align = PAGE;
    for (; align < SHARED_ALIGN_MAX; align *= 2) {
        for (int tries = 0; tries < PROBE_TRIES; tries++) {
            uintptr_t stray;
            long room = uvas_vm_map_native(0, 4 * SHARED_ALIGN_MAX, PROT_NONE, MAP_PRIVATE | MAP_NORESERVE | MAP_ANONYMOUS, -1, 0);
            if (room < 0) {
                continue;
            }
            (void)syscall(SYS_munmap, room, 4 * SHARED_ALIGN_MAX);
            uintptr_t at = (((uintptr_t)room + 2 * SHARED_ALIGN_MAX) & ~(SHARED_ALIGN_MAX - 1)) + align;
            if (uvas_vm_map_exactly(at, PAGE, PROT_NONE, MAP_SHARED | uvas_vm_exact_flag(), fd, 0, &stray) == 0) {
                (void)uvas_vm_unmap(at, PAGE);
                uvas_vm_platform.shared_alignment = align;
                return;
            }
        }
    }
    uvas_vm_platform.shared_alignment = align;
}

static void learn_tag(void) {
    int fd = uvas_vm_tag("uvas:probe");
    uvas_vm_platform.has_tag = 0;
    if (fd >= 0 && !(atomic_load(&uvas_vm_lacking) & UVAS_LACK_TAG)) {
        long at = uvas_vm_map(0, PAGE, PROT_NONE, MAP_PRIVATE | MAP_NORESERVE, fd, (int64_t)PAGE * 16);
        if (at >= 0) {
            (void)uvas_vm_unmap((uintptr_t)at, PAGE);
            uvas_vm_platform.has_tag = 1;
        }
    }
    uvas_vm_close(fd);
}

/* By what it does: qemu-user answers 0 to advice that it ignores. A guard takes the memory, so a mark is gone after it. */
static bool guards(char *own) {
    *(volatile char *)own = 1;
    return syscall(SYS_madvise, own, PAGE, GUARD_INSTALL) == 0 && syscall(SYS_madvise, own, PAGE, GUARD_REMOVE) == 0 && *(volatile char *)own == 0;
}

static void learn_guard(void) {
    long own = uvas_vm_map_native(0, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uvas_vm_platform.has_guard = 0;
    if (own >= 0) {
        bool lacks = (atomic_load(&uvas_vm_lacking) & UVAS_LACK_GUARD) != 0;
        uvas_vm_platform.has_guard = !lacks && guards((char *)own);
        (void)uvas_vm_unmap((uintptr_t)own, PAGE);
    }
}

static void learn_query(void) {
    bool lacks = (atomic_load(&uvas_vm_lacking) & UVAS_LACK_QUERY) != 0;
    uvas_vm_platform.has_procmap_query = !lacks && uvas_vm_query_learn();
}

int uvas_vm_learn(void) {
    uvas_vm_platform = (struct uvas_platform){.page_size = (size_t)getauxval(AT_PAGESZ)};
    if (uvas_vm_platform.page_size == 0) {
        uvas_vm_platform.page_size = (size_t)sysconf(_SC_PAGESIZE);
    }
    int rc = learn_flag();
    if (rc < 0) {
        return rc;
    }
    learn_width();
    learn_tag();
    learn_guard();
    learn_query();
    uvas_vm_platform.shared_alignment = PAGE;
    int fd = uvas_vm_memfd("uvas:probe", PAGE);
    if (fd >= 0) {
        learn_shared_alignment(fd);
    }
    uvas_vm_close(fd);
    return 0;
}
