/* Preloaded before libuvas.so, whose system calls all go through syscall(2): writes down those by which memory moves. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PUNCH 3    /* FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE */
#define DONTNEED 4 /* MADV_DONTNEED */

static long (*really)(long number, ...);
static int out = -1;

__attribute__((constructor)) static void begin(void) {
    really = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    const char *descriptor = getenv("UVAS_TRACE");
    out = descriptor ? atoi(descriptor) : -1;
    (void)unsetenv("UVAS_TRACE"); /* workers are not written down, and have no such descriptor */
}

static void tell(const char *what, long fd, uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
    char line[160];
    int length = snprintf(line, sizeof line, "%s %ld %llu %llu %llu %llu\n", what, fd, (unsigned long long)a, (unsigned long long)b, (unsigned long long)c, (unsigned long long)d);
    (void)!write(out, line, (size_t)length);
}

long syscall(long number, ...) {
    va_list list;
    long a[6];
    va_start(list, number);
    for (int i = 0; i < 6; i++) {
        a[i] = va_arg(list, long);
    }
    va_end(list);
    if (out >= 0 && number == SYS_ioctl && (a[1] >> 8 & 0xff) == 0xAA && (a[1] & 0xff) < 0x3f && (a[1] & 0xff) != 2) {
        const uint64_t *words = (const uint64_t *)a[2];
        char name[16];
        (void)snprintf(name, sizeof name, "uffd%ld", a[1] & 0xff);
        tell(name, a[0], words[0], words[1], words[2], (a[1] & 0xff) == 3 ? words[3] : 0);
    } else if (out >= 0 && number == SYS_fallocate) {
        tell(a[1] == PUNCH ? "punch" : "allocate", a[0], (uint64_t)a[2], (uint64_t)a[3], 0, 0);
    } else if (out >= 0 && number == SYS_madvise && a[2] == DONTNEED) {
        tell("drop", -1, (uint64_t)a[0], (uint64_t)a[1], 0, 0);
    }
    long answer = really(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    if (out >= 0 && number == SYS_mmap && a[4] >= 0 && answer > 0) {
        tell("map", a[4], (uint64_t)answer, (uint64_t)a[1], (uint64_t)a[3], 0);
    }
    return answer;
}
