/* test_platform.c: what uvas_platform says of this kernel, tried once more by other means, and printed as JSON. On the kernels of tests/kernels as well:
 * some of them say yes and do nothing. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "check.h"

#define GUARD_INSTALL 102
#undef PROCMAP_QUERY
#define PROCMAP_QUERY _IOWR('f', 17, uint64_t[13])

static size_t page;

static long map(uintptr_t at, size_t size, int protection, int flags) {
    long got = syscall(SYS_mmap, at, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    return got == -1 ? -errno : got;
}

/* A stranger of three pages and a mapping over its middle: the answer is what was said, and the stranger's bytes stay. */
static void flag_is(uint32_t said) {
    char *stranger = (char *)map(0, 3 * page, PROT_READ | PROT_WRITE, 0);
    uintptr_t middle = (uintptr_t)stranger + page;
    CHECK((long)stranger > 0);
    for (size_t i = 0; i < 3; i++) {
        stranger[i * page] = 's';
    }
    long got = said == UVAS_FLAG_PARTIAL || said == UVAS_FLAG_REFUSED ? -EEXIST : map(middle, page, PROT_NONE, NOREPLACE);
    CHECK(said != UVAS_FLAG_HONOURED || got == -EEXIST);
    CHECK(said != UVAS_FLAG_ENOMEM || got == -ENOMEM);
    CHECK(said != UVAS_FLAG_IGNORED || (got > 0 && got != (long)middle));
    for (size_t i = 0; i < 3; i++) {
        CHECK(stranger[i * page] == 's');
    }
    if (got > 0) {
        CHECK(munmap((void *)got, page) == 0);
    }
    CHECK(munmap(stranger, 3 * page) == 0);
}

/* The kernel itself reads the page: EFAULT where there is a guard. */
static void guards_are(uint32_t said) {
    char *own = (char *)map(0, page, PROT_READ | PROT_WRITE, 0);
    int ends[2];
    CHECK((long)own > 0 && pipe(ends) == 0);
    own[0] = 'g';
    bool works = madvise(own, page, GUARD_INSTALL) == 0 && write(ends[1], own, 1) == -1 && errno == EFAULT;
    CHECK(works == said);
    CHECK(close(ends[0]) == 0 && close(ends[1]) == 0 && munmap(own, page) == 0);
}

static void query_is(uint32_t said) {
    uint64_t ask[13] = {sizeof ask, 0, (uintptr_t)&page};
    int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    bool works = fd >= 0 && ioctl(fd, PROCMAP_QUERY, ask) == 0 && ask[3] <= (uintptr_t)&page && (uintptr_t)&page < ask[4];
    CHECK(works == said);
    if (fd >= 0) {
        CHECK(close(fd) == 0);
    }
}

int main(void) {
    struct uvas_platform said;
    CHECK_OK(uvas_platform(&said));
    page = (size_t)sysconf(_SC_PAGESIZE);
    CHECK(said.page_size == page);
    CHECK(said.shared_alignment >= page && (said.shared_alignment & (said.shared_alignment - 1)) == 0);
    CHECK(said.window_bits <= said.address_bits && (uintptr_t)&said >> said.window_bits == 0);
    flag_is(said.flag);
    guards_are(said.has_guard);
    query_is(said.has_procmap_query);
    printf("{\"page_size\": %zu, \"shared_alignment\": %zu, \"address_bits\": %u, \"window_bits\": %u, \"flag\": %u, \"procmap_query\": %u, \"guard\": %u, "
           "\"tag\": %u}\n",
           said.page_size, said.shared_alignment, said.address_bits, said.window_bits, said.flag, said.has_procmap_query, said.has_guard, said.has_tag);
    return 0;
}
