/* image.c - one file's bytes: open, read, write, allocate, truncate, seek, sync. */
#include "internal.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

/* At most as many chunks as there are stripes, so that a range takes each lock once. */
#define PIECE ((uint64_t)VDF_STRIPES * VDF_CHUNK_SIZE)

static int reopen(int fd, int mode)
{
    char path[64];

    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int again = open(path, mode | O_CLOEXEC);
    return again < 0 ? -errno : again;
}

static int make_stripes(vdf_image *image)
{
    if (image->stripe != NULL)
        return 0;
    image->stripe = calloc(VDF_STRIPES, sizeof *image->stripe);
    if (image->stripe == NULL)
        return -ENOMEM;
    for (unsigned i = 0; i < VDF_STRIPES; i++)
        pthread_mutex_init(&image->stripe[i], NULL);
    return 0;
}

static int fill_image(vdf_image *image, int fd)
{
    struct stat st;

    image->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (image->fd < 0 || fstat(image->fd, &st) != 0)
        return -errno;
    if (!S_ISREG(st.st_mode))
        return -EINVAL;
    atomic_store(&image->size, (uint64_t)st.st_size);
    int inner =
        reopen(image->fd, (image->flags & VDF_IMAGE_READONLY) && !(image->flags & VDF_IMAGE_LAZY)
                              ? O_RDONLY
                              : O_RDWR);
    if (inner == -EACCES || inner == -EPERM || inner == -EROFS || inner == -ETXTBSY)
        inner = fcntl(image->fd, F_DUPFD_CLOEXEC, 0);
    if (inner < 0)
        return inner;
    image->inner_fd = inner;
    if (!(image->flags & VDF_IMAGE_LAZY))
        return 0;
    int error = make_stripes(image);
    bool writable = !(image->flags & VDF_IMAGE_READONLY);
    return error != 0 ? error : vdf_lazy_create((uint64_t)st.st_size, writable, &image->lazy);
}

int vdf_image_create(vdf_core *core, int fd, unsigned flags, uint64_t cookie, vdf_image **out)
{
    vdf_image *image = calloc(1, sizeof *image);
    if (image == NULL)
        return -ENOMEM;
    image->core = core;
    image->fd = image->inner_fd = -1;
    image->flags = flags;
    image->cookie = cookie;
    atomic_store(&image->references, 1);
    int error = vdf_gate_init(&image->gate);
    if (error != 0) {
        free(image);
        return error;
    }
    error = fill_image(image, fd);
    if (error != 0) {
        vdf_image_unref(image);
        return error;
    }
    *out = image;
    return 0;
}

void vdf_image_ref(vdf_image *image)
{
    atomic_fetch_add(&image->references, 1);
}

void vdf_image_unref(vdf_image *image)
{
    if (image == NULL || atomic_fetch_sub(&image->references, 1) != 1)
        return;
    vdf_lazy_free(image->lazy);
    for (unsigned i = 0; image->stripe != NULL && i < VDF_STRIPES; i++)
        pthread_mutex_destroy(&image->stripe[i]);
    free(image->stripe);
    vdf_gate_destroy(&image->gate);
    if (image->inner_fd >= 0)
        close(image->inner_fd);
    if (image->fd >= 0)
        close(image->fd);
    free(image);
}

int vdf_image_size(vdf_image *image, uint64_t *size)
{
    *size = atomic_load(&image->size);
    return 0;
}

static void each_stripe(vdf_image *image, uint64_t offset, uint64_t length,
                        int (*act)(pthread_mutex_t *))
{
    uint64_t first = offset / VDF_CHUNK_SIZE;
    uint64_t last = (offset + (length ? length : 1) - 1) / VDF_CHUNK_SIZE;
    uint64_t low = first % VDF_STRIPES, high = last % VDF_STRIPES;

    if (last - first >= VDF_STRIPES - 1) {
        low = 0;
        high = VDF_STRIPES - 1;
    }
    /* Ascending always: a range that wraps takes its low part first. */
    for (uint64_t i = 0; i < VDF_STRIPES && low > high && i <= high; i++)
        act(&image->stripe[i]);
    for (uint64_t i = low; i <= (low > high ? VDF_STRIPES - 1 : high); i++)
        act(&image->stripe[i]);
}

void vdf_image_lock(vdf_image *image, uint64_t offset, uint64_t length)
{
    each_stripe(image, offset, length, pthread_mutex_lock);
}

void vdf_image_unlock(vdf_image *image, uint64_t offset, uint64_t length)
{
    each_stripe(image, offset, length, pthread_mutex_unlock);
}

int64_t vdf_image_read(vdf_image *image, uint64_t offset, uint64_t length, uint8_t *data)
{
    if (vdf_image_lazy(image) != NULL)
        return vdf_lazy_read(image, offset, length, data);
    if (offset > INT64_MAX || length > INT64_MAX)
        return -EINVAL;
    return vdf_file_read(image->fd, offset, length, data);
}

static void lock_size(const vdf_change *change)
{
    if (change->track != NULL)
        pthread_mutex_lock(&change->track->size_lock);
}

static void unlock_size(const vdf_change *change)
{
    if (change->track != NULL)
        pthread_mutex_unlock(&change->track->size_lock);
}

/* The file may have become longer: the image's size follows it. */
static void size_at_least(vdf_image *image, uint64_t end)
{
    uint64_t size = atomic_load(&image->size);

    while (size < end && !atomic_compare_exchange_weak(&image->size, &size, end)) {
    }
}

static int write_marked(vdf_change *change, uint64_t offset, uint64_t length, const uint8_t *data)
{
    vdf_image *image = change->image;
    uint64_t end = offset + length;

    vdf_change_mark(change, offset, length);
    if (end <= atomic_load(&image->size))
        return vdf_file_write(image->fd, offset, length, data);
    lock_size(change);
    vdf_change_size(change, atomic_load(&image->size));
    int error = vdf_file_write(image->fd, offset, length, data);
    if (error == 0) {
        size_at_least(image, end);
    } else {
        struct stat st;
        if (fstat(image->fd, &st) == 0)
            size_at_least(image, (uint64_t)st.st_size);
    }
    unlock_size(change);
    return error;
}

/* Only changes of a tracked image exclude each other, and those of a lazy one its fills. */
static bool excludes(const vdf_change *change)
{
    return change->track != NULL || change->image->lazy != NULL;
}

static void lock_change(const vdf_change *change, uint64_t offset, uint64_t length)
{
    if (excludes(change))
        vdf_image_lock(change->image, offset, length);
}

static void unlock_change(const vdf_change *change, uint64_t offset, uint64_t length)
{
    if (excludes(change))
        vdf_image_unlock(change->image, offset, length);
}

static int act_zero(vdf_change *change, uint64_t offset, uint64_t length, const void *argument);
static int act_grow(vdf_change *change, uint64_t offset, uint64_t length, const void *argument);

/* Zeros within a span that goes into the intent log as a whole. */
typedef struct zeroing {
    int mode;
    uint64_t from, to; /* empty: it does not */
} zeroing;

/* A ticket, with what is about to be changed in the intent log. */
static void begin_piece(vdf_change *change, vdf_image *image, uint64_t offset, uint64_t length,
                        int (*act)(vdf_change *, uint64_t, uint64_t, const void *),
                        const void *argument)
{
    const zeroing *zero = act == act_zero ? argument : NULL;

    if (act == act_grow) /* changes no byte */
        vdf_change_begin(change, image);
    else if (zero != NULL && zero->to > zero->from)
        vdf_change_begin_span(change, image, VDF_SPAN_WIDE, zero->from, zero->to);
    else
        vdf_change_begin_covered(change, image, offset, length);
}

/* What every change has in common: make room, ticket, stripes, act, give back. */
static int change_piece(vdf_image *image, uint64_t offset, uint64_t length,
                        int (*act)(vdf_change *, uint64_t, uint64_t, const void *),
                        const void *argument)
{
    vdf_change change;
    vdf_track *track = atomic_load(&image->track);

    if (track != NULL)
        vdf_track_reach(track, offset + length);
    begin_piece(&change, image, offset, length, act, argument);
    if (act == act_zero)
        vdf_change_wait_drained(&change);
    lock_change(&change, offset, length);
    int error = act(&change, offset, length, argument);
    vdf_crash("change.written");
    unlock_change(&change, offset, length);
    vdf_change_end(&change);
    return error;
}

/* Before anything of it is changed: a page that is here by now stays here. */
static int check_edges(const vdf_image *image, uint64_t offset, uint64_t length)
{
    vdf_want want[2];

    if (image->lazy == NULL)
        return 0;
    return vdf_lazy_edges(image, offset, length, want) != 0 ? -EAGAIN : 0;
}

static void mark_here(vdf_image *image, uint64_t offset, uint64_t length)
{
    if (image->lazy != NULL)
        vdf_lazy_mark(image, offset, length);
}

static int act_write(vdf_change *change, uint64_t offset, uint64_t length, const void *data)
{
    int error = check_edges(change->image, offset, length);

    if (error == 0)
        error = write_marked(change, offset, length, data);
    if (error == 0)
        mark_here(change->image, offset, length);
    return error;
}

int vdf_image_write(vdf_image *image, uint64_t offset, uint64_t length, const uint8_t *data)
{
    int error = vdf_range_check(offset, length);

    if (vdf_image_refuses(image))
        return -EROFS;
    if (error == 0)
        error = check_edges(image, offset, length);
    while (error == 0 && length > 0) {
        /* Pieces meet between two pages: none covers a part where the whole covers all of it. */
        uint64_t excess = image->lazy == NULL ? 0 : offset % VDF_PAGE_SIZE;
        uint64_t step = vdf_min(length, VDF_REQUEST_MAX - excess);
        error = change_piece(image, offset, step, act_write, data);
        offset += step;
        data += step;
        length -= step;
    }
    return error;
}

/* fallocate of a stretch whose bytes become zero and whose size stays. */
static int act_zero(vdf_change *change, uint64_t offset, uint64_t length, const void *argument)
{
    const zeroing *zero = argument;
    int error = check_edges(change->image, offset, length);

    if (error != 0)
        return error;
    vdf_change_mark(change, offset, length);
    if (fallocate(change->image->fd, zero->mode, (off_t)offset, (off_t)length) != 0)
        return -errno;
    mark_here(change->image, offset, length);
    return 0;
}

/* fallocate that may make the file longer; the bytes inside it stay. */
static int act_grow(vdf_change *change, uint64_t offset, uint64_t length, const void *argument)
{
    int mode = *(const int *)argument;
    vdf_image *image = change->image;
    struct stat st;

    lock_size(change);
    if (!(mode & FALLOC_FL_KEEP_SIZE) && offset + length > atomic_load(&image->size))
        vdf_change_size(change, atomic_load(&image->size));
    int error = fallocate(image->fd, mode, (off_t)offset, (off_t)length) == 0 ? 0 : -errno;
    if (fstat(image->fd, &st) == 0)
        size_at_least(image, (uint64_t)st.st_size);
    unlock_size(change);
    return error;
}

static int zero_range(vdf_image *image, int mode, uint64_t offset, uint64_t length)
{
    /* Bytes beyond the end are zero already and stay outside. */
    uint64_t end = vdf_min(offset + length, atomic_load(&image->size));
    int error = end > offset ? check_edges(image, offset, end - offset) : 0;

    zeroing zero = {.mode = mode | FALLOC_FL_KEEP_SIZE};

    if (end > offset && end - offset > PIECE) {
        zero.from = offset;
        zero.to = end;
    }
    while (error == 0 && offset < end) {
        uint64_t step = vdf_min(end, (offset / PIECE + 1) * PIECE) - offset;
        error = change_piece(image, offset, step, act_zero, &zero);
        offset += step;
    }
    return error;
}

int vdf_image_allocate(vdf_image *image, int mode, uint64_t offset, uint64_t length)
{
    int keep = mode & FALLOC_FL_KEEP_SIZE;
    int kind = mode & ~FALLOC_FL_KEEP_SIZE;
    int error = vdf_range_check(offset, length);

    if (vdf_image_refuses(image))
        return -EROFS;
    if (error != 0 || length == 0)
        return length == 0 ? -EINVAL : error;
    if (kind == FALLOC_FL_PUNCH_HOLE && keep)
        return zero_range(image, kind, offset, length);
    if (kind != 0 && kind != FALLOC_FL_ZERO_RANGE)
        return -EOPNOTSUPP;
    if (kind == FALLOC_FL_ZERO_RANGE)
        error = zero_range(image, kind, offset, length);
    if (error == 0 && (kind == 0 || !keep))
        error = change_piece(image, offset, length, act_grow, &keep);
    return error;
}

static int act_truncate(vdf_change *change, uint64_t offset, uint64_t length, const void *argument)
{
    uint64_t size = *(const uint64_t *)argument;
    vdf_image *image = change->image;
    uint64_t old = atomic_load(&image->size);

    (void)offset;
    (void)length;
    /* What is cut off of the last page must not come back with the rest of it. */
    if (size < old && check_edges(image, size, old - size) != 0)
        return -EAGAIN;
    if (change->track != NULL && size < old)
        vdf_change_cut(change, size, old);
    lock_size(change);
    vdf_change_size(change, vdf_min(size, old));
    int error = ftruncate(image->fd, (off_t)size) == 0 ? 0 : -errno;
    if (error == 0) {
        vdf_lazy_cut(image, size);
        atomic_store(&image->size, size);
    }
    unlock_size(change);
    if (error != 0 && change->track != NULL && size < old)
        vdf_change_uncut(change, size, old);
    if (change->track != NULL && size < old) {
        bool late = atomic_load(&change->track->frozen_epoch) == change->epoch;
        vdf_intent_shrunk(change->track->intent, change->epoch + late);
    }
    return error;
}

/* A ticket and all stripes, and, if the file becomes smaller, that in the intent log. */
static void begin_truncate(vdf_change *change, vdf_image *image, uint64_t size)
{
    bool cut = size < atomic_load(&image->size);

    for (;;) {
        if (cut)
            vdf_change_begin_span(change, image, VDF_SPAN_CUT, size, UINT64_MAX);
        else
            vdf_change_begin(change, image);
        vdf_change_wait_drained(change);
        lock_change(change, 0, PIECE);
        if (cut || change->track == NULL || size >= atomic_load(&image->size))
            return;
        /* It grew meanwhile. */
        unlock_change(change, 0, PIECE);
        vdf_change_end(change);
        cut = true;
    }
}

int vdf_image_truncate(vdf_image *image, uint64_t size)
{
    vdf_change change;
    int error = vdf_range_check(size, 0);

    if (vdf_image_refuses(image))
        return -EROFS;
    if (error != 0)
        return error;
    vdf_track *track = atomic_load(&image->track);
    if (track != NULL)
        vdf_track_reach(track, size);
    begin_truncate(&change, image, size);
    error = act_truncate(&change, 0, PIECE, &size);
    vdf_crash("size.changed");
    unlock_change(&change, 0, PIECE);
    vdf_change_end(&change);
    return error;
}

int64_t vdf_image_seek(vdf_image *image, uint64_t offset, int whence)
{
    if (whence != SEEK_DATA && whence != SEEK_HOLE)
        return -EINVAL;
    if (offset >= atomic_load(&image->size))
        return -ENXIO;
    if (vdf_image_lazy(image) != NULL)
        return vdf_lazy_seek(image, offset, whence);
    off_t at = lseek(image->fd, (off_t)offset, whence);
    return at < 0 ? -errno : at;
}

/* Twice: the first wait ends those without the track, the second those without its epoch. */
static void flip_twice(vdf_image *image, uint64_t epoch)
{
    for (int i = 0; i < 2; i++) {
        uint64_t phase = vdf_gate_flip(&image->gate, epoch);
        vdf_gate_wait(&image->gate, phase);
    }
}

int vdf_image_set_track(vdf_image *image, vdf_track *track)
{
    vdf_track *old = atomic_load(&image->track);
    vdf_track *none = NULL;
    int error = 0;

    if (image->flags & VDF_IMAGE_READONLY)
        return -EINVAL;
    if (make_stripes(image) != 0)
        return -ENOMEM;
    vdf_track *locked = track != NULL ? track : old;
    if (locked == NULL)
        return 0;
    if (track != NULL)
        error = vdf_intent_start(track->intent, image);
    if (error != 0)
        return error;
    /* One flip at a time: a seal waits until the track is in use by all, and the other way round.
     */
    pthread_mutex_lock(&locked->admin);
    if (track == NULL)
        atomic_store(&image->track, NULL);
    else if (!atomic_compare_exchange_strong(&image->track, &none, track))
        error = -EBUSY;
    if (error == 0)
        flip_twice(image, track == NULL ? 0 : atomic_load(&track->epoch));
    pthread_mutex_unlock(&locked->admin);
    if (track == NULL || error != 0)
        vdf_intent_stop(locked->intent);
    return error;
}
