/* core.c: what happens once, the gates, and fork.
 *
 * Nothing runs when the library is loaded. The first call that can fail sets up: it learns the platform, registers the fork handlers, and looks
 * for another copy of this library in the process (loaded from another path, so with variables of its own): two registries would not know of
 * each other, so the second copy refuses to work.
 */
#define _GNU_SOURCE
#include <assert.h>
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "arena.h"
#include "failure.h"
#include "mirrors.h"
#include "registry.h"
#include "search.h"
#include "space.h"

static _Atomic(char *) space_chunks[UVAS_SLOTS_CHUNKS_MAX], record_chunks[UVAS_SLOTS_CHUNKS_MAX];
static _Atomic(char *) party_chunks[UVAS_SLOTS_CHUNKS_MAX], lease_chunks[UVAS_SLOTS_CHUNKS_MAX];

struct uvas_slots uvas_space_slots = {.record_bytes = sizeof(struct uvas_space), .kind = UVAS_SLOT_SPACE, .chunks = space_chunks};
struct uvas_slots uvas_record_slots = {.record_bytes = sizeof(struct uvas_record), .kind = UVAS_SLOT_RANGE, .chunks = record_chunks};
struct uvas_slots uvas_party_slots = {.record_bytes = sizeof(struct uvas_party), .kind = UVAS_SLOT_DEVICE, .chunks = party_chunks};
struct uvas_slots uvas_lease_slots = {.record_bytes = sizeof(struct uvas_lease), .kind = UVAS_SLOT_LEASE, .chunks = lease_chunks};

struct uvas_space *uvas_spaces;

unsigned uvas_abi_version(void) {
    return UVAS_ABI_VERSION;
}

/* ---- one copy a process --------------------------------------------------------------------------------------------------------------------- */

/* 0 until this copy begins to set itself up. Written once, before the look for others; read by other copies through this symbol. */
UVAS_API _Atomic uint32_t uvas_copy_in_use;

struct other_copy {
    char path[160];
};

static int look_at_library(struct dl_phdr_info *info, size_t size, void *found) {
    (void)size;
    const char *slash = info->dlpi_name ? strrchr(info->dlpi_name, '/') : NULL;
    if (!slash || strncmp(slash + 1, "libuvas.so", sizeof "libuvas.so" - 1) != 0) {
        return 0;
    }
    void *library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
    _Atomic uint32_t *in_use = library ? dlsym(library, "uvas_copy_in_use") : NULL;
    bool other = in_use && in_use != &uvas_copy_in_use && atomic_load(in_use) != 0;
    if (other) {
        struct other_copy *copy = found;
        (void)snprintf(copy->path, sizeof copy->path, "%s", info->dlpi_name);
    }
    if (library) {
        dlclose(library);
    }
    return other;
}

/* ---- fork --------------------------------------------------------------------------------------------------------------------------------------- */

static void before_fork(void) {
    uvas_mirrors_before_fork(); /* first: it waits for the pager, which takes none of the locks below */
    uvas_arenas_before_fork();
    uvas_registry_lock(); /* so that the child's copy of all records is whole */
}

static void after_fork_in_parent(void) {
    uvas_registry_unlock();
    uvas_arenas_after_fork_in_parent();
    uvas_mirrors_after_fork_in_parent();
}

/* The parent's ids are dead here, its mappings stay as any memory does. Its descriptors are closed: mappings do not need them. */
static void after_fork_in_child(void) {
    for (struct uvas_space *space = uvas_spaces; space; space = space->next) {
        uvas_vm_close(space->tag);
        for (struct uvas_record *record = space->records; record; record = record->next) {
            uvas_vm_close(record->file ? record->file->fd : -1);
            for (size_t i = 0; i < record->pieces.count; i++) {
                struct uvas_file *file = record->pieces.list[i].file;
                if (file && file != record->file && file->fd >= 0) {
                    uvas_vm_close(file->fd);
                    file->fd = -1;
                }
            }
        }
    }
    uvas_mirrors_after_fork_in_child();
    uvas_spaces = NULL;
    uvas_slots_forget(&uvas_space_slots);
    uvas_slots_forget(&uvas_record_slots);
    uvas_slots_forget(&uvas_party_slots);
    uvas_leases_forget();
    uvas_quarantine_forget();
    uvas_files_forget();
    uvas_registry_forget();
    uvas_vm_forget();
    uvas_arenas_after_fork_in_child();
    uvas_registry_unlock();
}

/* ---- once ------------------------------------------------------------------------------------------------------------------------------------------ */

static pthread_once_t once = PTHREAD_ONCE_INIT;
static int ready; /* 0 or -errno; written inside the once */
static struct other_copy other;

static void set_up(void) {
    atomic_store(&uvas_copy_in_use, 1);
    if (dl_iterate_phdr(look_at_library, &other)) {
        ready = -EALREADY;
        return;
    }
    ready = uvas_vm_learn();
    if (ready == 0) {
        uvas_search_learn();
        ready = uvas_heaps_ready();
    }
    if (ready == 0) {
        ready = -pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
    }
    if (ready == 0 && uvas_registry_lock_for_insert() == 0) { /* the first reservation may come when there is no memory left for nodes */
        uvas_registry_unlock();
    }
}

int uvas_core_ready(void) {
    (void)pthread_once(&once, set_up);
    if (__builtin_expect(ready == 0, 1)) {
        return 0;
    }
    if (ready == -EALREADY) {
        return uvas_fail_unsupported("a second copy of libuvas", "let all who use uvas link or load the same file",
                                     "another copy of libuvas, %s, holds this process's registry; two registries would clobber each other",
                                     other.path);
    }
    return uvas_fail_system(0, 0, "setting up", ready);
}

int uvas_platform(struct uvas_platform *out) {
    int rc = uvas_core_ready();
    if (rc == 0) {
        *out = uvas_vm_platform;
    }
    return rc;
}

int uvas_test_kernel(uint32_t kernel, uint32_t lacks) {
    int rc = uvas_core_ready();
    if (rc < 0) {
        return rc;
    }
    if (kernel > UVAS_KERNEL_ALIGNS) {
        return uvas_fail_invalid("no kernel has the number %u: they go from 0 to %u", kernel, UVAS_KERNEL_ALIGNS);
    }
    uvas_registry_lock();
    bool busy = uvas_spaces != NULL;
    uvas_registry_unlock();
    if (busy) {
        return uvas_fail_say(uvas_fail(UVAS_FAILURE_BUSY, -EBUSY), "the kernel cannot change while a space is open");
    }
    uvas_vm_imitate(kernel, lacks);
    uvas_vm_forget();
    return uvas_vm_learn();
}

/* ---- the gates ---------------------------------------------------------------------------------------------------------------------------------------- */

/* Under the lock. */
static struct uvas_space *living_space(uvas_id id) {
    struct uvas_space *space = uvas_slots_get(&uvas_space_slots, id);
    if (!space) {
        (void)uvas_fail_released("space", id);
        return NULL;
    }
    return space;
}

struct uvas_space *uvas_space_enter(uvas_id id) {
    struct uvas_space *space;
    while ((space = living_space(id)) && space->exclusive) {
        uvas_registry_wait();
    }
    if (space) {
        space->working++;
    }
    return space;
}

void uvas_space_leave(struct uvas_space *space) {
    assert(space->working > 0);
    if (--space->working == 0 && space->exclusive) {
        uvas_registry_wake();
    }
}

struct uvas_space *uvas_space_enter_alone(uvas_id id) {
    uvas_registry_lock();
    struct uvas_space *space;
    while ((space = living_space(id)) && space->exclusive) {
        uvas_registry_wait();
    }
    if (space) {
        space->exclusive = true; /* nobody comes in any more; those inside leave */
        while (space->working > 0) {
            uvas_registry_wait();
        }
    }
    uvas_registry_unlock();
    return space;
}

void uvas_space_leave_alone(struct uvas_space *space) {
    uvas_registry_lock();
    space->exclusive = false;
    uvas_registry_wake();
    uvas_registry_unlock();
}

/* ---- ends with its parent ----------------------------------------------------------------------------------------------------------------------------- */

static void *wait_for_parent(void *parent) {
    (void)uvas_vm_wait_for_end((int32_t)(intptr_t)parent);
    uvas_vm_exit(0);
    return NULL;
}

int uvas_thread_start(pthread_t *thread, void *(*run)(void *), void *argument) {
    sigset_t all, before;
    sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before); /* the thread inherits it: no handler ever runs there */
    int rc = -pthread_create(thread, NULL, run, argument);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    return rc;
}

int uvas_end_with(int32_t pid) {
    pthread_t thread;
    int rc = uvas_thread_start(&thread, wait_for_parent, (void *)(intptr_t)pid);
    if (rc == 0) {
        (void)pthread_detach(thread);
    }
    return rc;
}
