/* file.c - small things about open files. Any thread. */
#include "internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int vdf_range_check(uint64_t offset, uint64_t length)
{
    uint64_t end = vdf_add(offset, length);

    return end > VDF_MAX_PAGES * VDF_PAGE_SIZE ? -EFBIG : 0;
}

int64_t vdf_file_read(int fd, uint64_t offset, uint64_t length, uint8_t *data)
{
    uint64_t done = 0;

    while (done < length) {
        ssize_t got = pread(fd, data + done, length - done, (off_t)(offset + done));
        if (got < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (got == 0)
            break;
        done += (uint64_t)got;
    }
    return (int64_t)done;
}

int vdf_file_write(int fd, uint64_t offset, uint64_t length, const uint8_t *data)
{
    uint64_t done = 0;

    while (done < length) {
        ssize_t put = pwrite(fd, data + done, length - done, (off_t)(offset + done));
        if (put < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (put == 0)
            return -EIO;
        done += (uint64_t)put;
    }
    return 0;
}

void vdf_sleep_ns(long ns)
{
    struct timespec span = {.tv_sec = 0, .tv_nsec = ns};

    nanosleep(&span, NULL);
}

int vdf_rwlock_init(pthread_rwlock_t *lock)
{
    pthread_rwlockattr_t attributes;
    int error = pthread_rwlockattr_init(&attributes);

    if (error != 0)
        return -error;
    pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    error = pthread_rwlock_init(lock, &attributes);
    pthread_rwlockattr_destroy(&attributes);
    return -error;
}

static uint64_t stamp_ns(struct statx_timestamp stamp)
{
    return (uint64_t)stamp.tv_sec * UINT64_C(1000000000) + stamp.tv_nsec;
}

int vdf_file_identity(int fd, vdf_identity *out)
{
    struct statx st;

    if (statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_BTIME, &st) != 0)
        return -errno;
    memset(out, 0, sizeof *out);
    out->device = ((uint64_t)st.stx_dev_major << 32) | st.stx_dev_minor;
    out->inode = st.stx_ino;
    out->birth_ns = (st.stx_mask & STATX_BTIME) ? stamp_ns(st.stx_btime) : 0;
    out->change_ns = stamp_ns(st.stx_ctime);
    out->modify_ns = stamp_ns(st.stx_mtime);
    out->size = st.stx_size;
    return 0;
}

int vdf_thread_background(void)
{
    const int lowest = (2 << 13) | 7; /* best effort, level 7: linux/ioprio.h */
    id_t self = (id_t)gettid();

    if (setpriority(PRIO_PROCESS, self, 10) != 0)
        return -errno;
    return syscall(SYS_ioprio_set, 1, self, lowest) == 0 ? 0 : -errno;
}

int vdf_rename(int old_dir, const char *old_name, int new_dir, const char *new_name, unsigned flags)
{
    return renameat2(old_dir, old_name, new_dir, new_name, flags) == 0 ? 0 : -errno;
}

int vdf_punch(int fd, uint64_t offset, uint64_t length)
{
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;

    if (length == 0 || vdf_range_check(offset, length) != 0)
        return -EINVAL;
    return fallocate(fd, mode, (off_t)offset, (off_t)length) == 0 ? 0 : -errno;
}
