/* vm_files.c: descriptors: memfds and what is done to them, files of /proc, other people's descriptors. See vm.h.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>

#include "vm_call.h"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif
#define MEMFD_HUGE_2MB (21U << 26)
#define HUGETLBFS_MAGIC_NUMBER 0x958458f6

/* ---- memfds ------------------------------------------------------------------------------------------------------------------------------------ */

static int memfd(const char *name, unsigned flags) {
    int refused = gate();
    if (refused) {
        return -refused;
    }
    long fd = syscall(SYS_memfd_create, name, flags | MFD_NOEXEC_SEAL | MFD_CLOEXEC);
    if (fd < 0 && errno == EINVAL) { /* before 6.3 */
        fd = syscall(SYS_memfd_create, name, flags | MFD_CLOEXEC);
    }
    return fd < 0 ? -errno : (int)fd;
}

int uvas_vm_tag(const char *name) {
    int fd = memfd(name, MFD_ALLOW_SEALING);
    if (fd >= 0) { /* seals are a courtesy to those who look at the descriptor: no mapping of ours depends on them */
        (void)syscall(SYS_fcntl, fd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_WRITE | F_SEAL_SEAL);
    }
    return fd;
}

static int truncate_to(int fd, size_t size) {
    GATED(syscall(SYS_ftruncate, fd, size));
}

int uvas_vm_memfd(const char *name, size_t size) {
    int fd = memfd(name, 0);
    if (fd < 0) {
        return fd;
    }
    int rc = truncate_to(fd, size);
    if (rc < 0) {
        uvas_vm_close(fd);
        return rc;
    }
    return fd;
}

int uvas_vm_memfd_huge(const char *name, size_t size) {
    int fd = memfd(name, MFD_CLOEXEC | MFD_HUGETLB | MEMFD_HUGE_2MB);
    int rc = fd < 0 ? fd : truncate_to(fd, size);
    if (rc < 0) {
        uvas_vm_close(fd);
        return rc;
    }
    return fd;
}

int uvas_vm_punch_surely(int fd, int64_t offset, size_t size) {
    return syscall(SYS_fallocate, fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size) == 0 ? 0 : -errno;
}

int uvas_vm_punch(int fd, int64_t offset, size_t size) {
    int refused = gate();
    return refused ? -refused : uvas_vm_punch_surely(fd, offset, size);
}

int uvas_vm_allocate(int fd, int64_t offset, size_t size) {
    GATED(syscall(SYS_fallocate, fd, 0, offset, size));
}

int uvas_vm_next_data(int fd, int64_t offset, int64_t *data, int64_t *hole) {
    int refused = gate();
    if (refused) {
        return -refused;
    }
    *data = syscall(SYS_lseek, fd, offset, SEEK_DATA);
    if (*data < 0) {
        *data = errno == EINVAL ? offset : INT64_MAX; /* a kernel that does not know: all of it may be data */
        *hole = INT64_MAX;
        return errno == ENXIO || errno == EINVAL ? 0 : -errno; /* no data from there on */
    }
    *hole = syscall(SYS_lseek, fd, *data, SEEK_HOLE);
    if (*hole <= *data) { /* taken away between the two questions */
        *hole = *data + (int64_t)PAGE;
    }
    return 0;
}

/* ---- any descriptor ---------------------------------------------------------------------------------------------------------------------------- */

long uvas_vm_write_at(int fd, const void *from, size_t size, int64_t offset) {
    int refused = gate();
    if (refused) {
        return -refused;
    }
    long put = syscall(SYS_pwrite64, fd, from, size, offset);
    return put < 0 ? -errno : put;
}

long uvas_vm_read_at(int fd, void *out, size_t size, int64_t offset) {
    int refused = gate();
    if (refused) {
        return -refused;
    }
    long got = syscall(SYS_pread64, fd, out, size, offset);
    return got < 0 ? -errno : got;
}

long uvas_vm_read(int fd, void *out, size_t size) {
    int refused = gate();
    if (refused) {
        return -refused;
    }
    for (;;) {
        long got = syscall(SYS_read, fd, out, size);
        if (got >= 0 || errno != EINTR) {
            return got < 0 ? -errno : got;
        }
    }
}

long uvas_vm_read_file(const char *path, char *out, size_t size) {
    int refused = gate();
    if (refused) {
        return -refused;
    }
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return -errno;
    }
    long got = uvas_vm_read(fd, out, size - 1);
    uvas_vm_close(fd);
    out[got > 0 ? got : 0] = 0;
    return got;
}

int uvas_vm_open_pages(void) {
    GATED(syscall(SYS_openat, AT_FDCWD, "/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
}

int uvas_vm_open_memory(void) {
    GATED(syscall(SYS_openat, AT_FDCWD, "/proc/self/mem", O_RDONLY | O_CLOEXEC));
}

int uvas_vm_duplicate(int fd) {
    GATED(syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, 3));
}

void uvas_vm_close(int fd) {
    if (fd >= 0) {
        (void)syscall(SYS_close, fd);
    }
}

int uvas_vm_identify(int fd, struct uvas_file_id *out) {
    struct stat file;
    struct statfs system;
    int refused = gate();
    if (refused) {
        return -refused;
    }
    if (fstat(fd, &file) < 0) {
        return -errno;
    }
    out->inode = file.st_ino;
    out->device_major = major(file.st_dev);
    out->device_minor = minor(file.st_dev);
    int status = fcntl(fd, F_GETFL);
    out->access = status < 0 ? -1 : status & O_ACCMODE;
    out->regular = S_ISREG(file.st_mode);
    out->block_size = (uint32_t)PAGE;
    if (fstatfs(fd, &system) == 0 && (uint32_t)system.f_type == HUGETLBFS_MAGIC_NUMBER) {
        out->block_size = (uint32_t)system.f_bsize;
    }
    return 0;
}
