/* limits.c: see limits.h. */
#include "limits.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "failure.h"
#include "maps.h"

#define FILE_BYTES 4096
#define MAP_COUNT_SLACK 2 /* mappings that the text does not list, and those that came or went while it was read */
#define OVERCOMMIT_NEVER 2

static uint64_t number_in(const char *path, const char *key) {
    char text[FILE_BYTES];
    if (uvas_vm_read_file(path, text, sizeof text) <= 0) {
        return 0;
    }
    const char *at = *key ? strstr(text, key) : text;
    return at ? strtoull(at + strlen(key), NULL, 10) : 0;
}

int uvas_limits_explain(uintptr_t base, size_t size) {
    size_t page = uvas_vm_platform.page_size;
    uint64_t most_addresses = uvas_vm_limit(RLIMIT_AS);
    if (most_addresses != UINT64_MAX && number_in("/proc/self/statm", "") * page + size > most_addresses) {
        return uvas_fail_limit(base, size, "RLIMIT_AS", most_addresses, "raise it (ulimit -v, setrlimit) or reserve less: reservations count in full");
    }
    uint64_t most_mappings = number_in("/proc/sys/vm/max_map_count", "");
    if (most_mappings && uvas_maps_count() + MAP_COUNT_SLACK >= most_mappings) {
        return uvas_fail_limit(base, size, "max_map_count", most_mappings,
                               "raise it (sysctl vm.max_map_count), or commit larger and fewer parts, with one protection");
    }
    if (number_in("/proc/sys/vm/overcommit_memory", "") == OVERCOMMIT_NEVER) {
        uint64_t limit = number_in("/proc/meminfo", "CommitLimit:") << 10;
        if ((number_in("/proc/meminfo", "Committed_AS:") << 10) + size > limit) {
            return uvas_fail_limit(base, size, "overcommit", limit, "set vm.overcommit_memory to 0 or 1, or raise vm.overcommit_ratio");
        }
    }
    uint64_t end_of_addresses = UINT64_C(1) << uvas_vm_platform.address_bits;
    if (base >= end_of_addresses - page || size > end_of_addresses - page - base) {
        return uvas_fail_limit(base, size, "address width", uvas_vm_platform.address_bits, "reserve below it");
    }
    uint64_t most_data = uvas_vm_limit(RLIMIT_DATA);
    if (most_data != UINT64_MAX && (number_in("/proc/self/status", "VmData:") << 10) + size > most_data) {
        return uvas_fail_limit(base, size, "RLIMIT_DATA", most_data, "raise it (ulimit -d, setrlimit)");
    }
    return uvas_fail_memory(base, size, "the host");
}

int uvas_limits_descriptors(uintptr_t base, size_t size, int rc) {
    if (rc == -EMFILE) {
        return uvas_fail_limit(base, size, "RLIMIT_NOFILE", uvas_vm_limit(RLIMIT_NOFILE), "close descriptors or raise the limit (ulimit -n)");
    }
    return uvas_fail_limit(base, size, "fs.file-max", number_in("/proc/sys/fs/file-max", ""), "close files, or raise it (sysctl fs.file-max)");
}
