/* umap.c: LLNL's umap, a library that serves page faults from a file by userfaultfd, on a memfd: the peer of a fault and of going through memory that
 * is elsewhere (targets H1, H4). Its pages move one way and within one process; nothing is taken away from anybody.
 *
 *   umap LIBUMAP.so MEBIBYTES FAULTS      the size of its pages comes from UMAP_PAGESIZE, a size that its buffer holds all of from UMAP_BUFSIZE
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "touch.h"

#define UMAP_PRIVATE MAP_PRIVATE
#define PAGE ((size_t)4096)

int main(int argc, char **argv) {
    BENCH_NEED(argc == 4);
    size_t size = strtoul(argv[2], NULL, 10) << 20, faults = strtoul(argv[3], NULL, 10);
    void *library = dlopen(argv[1], RTLD_NOW);
    BENCH_NEED(library);
    void *(*map)(void *, size_t, int, int, int, off_t) = (void *(*)(void *, size_t, int, int, int, off_t))dlsym(library, "umap");
    int (*unmap)(void *, size_t) = (int (*)(void *, size_t))dlsym(library, "uunmap");
    uint64_t (*page_size)(void) = (uint64_t (*)(void))dlsym(library, "umapcfg_get_umap_page_size");
    int file = (int)syscall(SYS_memfd_create, "umap", 0);
    BENCH_NEED(map && unmap && page_size && file >= 0 && ftruncate(file, (off_t)size) == 0);
    uint64_t *there = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    BENCH_NEED(there != MAP_FAILED);
    for (size_t i = 0; i < size / 8; i++) {
        there[i] = i;
    }
    void *at = map(NULL, size, PROT_READ | PROT_WRITE, UMAP_PRIVATE, file, 0);
    BENCH_NEED(at != MAP_FAILED);
    size_t page = (size_t)page_size();
    if (page == PAGE) {
        bench_say("H1", "LLNL umap, from a memfd", page, (double)touch_faults((uintptr_t)at, faults, page));
        BENCH_NEED(((uint64_t *)at)[1] == 1);
    } else {
        bench_say("H4", "LLNL umap: read from a memfd", page, (double)touch_stretches((uintptr_t)at, size, PAGE, TOUCH_READ));
        BENCH_NEED(touch_sum((uintptr_t)at, size) == touch_sum((uintptr_t)there, size));
    }
    BENCH_NEED(unmap(at, size) == 0);
    return 0;
}
