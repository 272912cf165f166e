/*
 * presencefile.c - the files of a writable lazy image's presence: made, opened after the
 * death of a process or of the host, closed. presence.c says what they mean.
 */
#include "internal.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static const char magic[8] = "VDFPRESN";

#define BITMAP_NAME "presence"
#define HEAD_NAME "presence.head"

static int open_file(int dir, const char *name, int flags)
{
    int fd = openat(dir, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_CREAT | flags, 0600);

    return fd < 0 ? -errno : fd;
}

static int allocate(int fd, uint64_t bytes)
{
    int error;

    do {
        error = posix_fallocate(fd, 0, (off_t)bytes);
    } while (error == EINTR);
    return -error;
}

/* ---- making -------------------------------------------------------------------------------- */

static uint64_t bitmap_bytes(uint64_t size)
{
    uint64_t bytes = (vdf_pages_of(size) + 7) / 8;

    return (bytes + VDF_PAGE_SIZE - 1) / VDF_PAGE_SIZE * VDF_PAGE_SIZE;
}

/* Room for the bitmap now: a guest's write must not find none later. */
static int make_bitmap(int dir, uint64_t size)
{
    int fd = open_file(dir, BITMAP_NAME, O_TRUNC);

    if (fd < 0)
        return fd;
    int error = size == 0 ? 0 : allocate(fd, bitmap_bytes(size));
    if (error == 0 && fsync(fd) != 0)
        error = -errno;
    close(fd);
    return error;
}

static void fill_head(vdf_presence_head *head, uint64_t base_size, uint64_t low)
{
    memset(head, 0, sizeof *head);
    memcpy(head->magic, magic, sizeof magic);
    head->version = VDF_PRESENCE_VERSION;
    head->base_size = base_size;
    head->low = low;
}

static int make_head(int dir, uint64_t size)
{
    uint8_t page[VDF_PAGE_SIZE] = {0};
    vdf_presence_head head;
    int fd = open_file(dir, HEAD_NAME, O_TRUNC);

    if (fd < 0)
        return fd;
    fill_head(&head, size, size);
    head.valid = 1;
    memcpy(page, &head, sizeof head);
    int error = vdf_file_write(fd, 0, sizeof page, page);
    if (error == 0 && fsync(fd) != 0)
        error = -errno;
    close(fd);
    return error;
}

static int make_log(int dir, uint64_t size, bool whole, const uint64_t *absent, uint64_t count)
{
    vdf_presencelog log = {.dir = dir, .fd = -1};
    vdf_records records;
    uint64_t pages = vdf_pages_of(size);

    for (uint64_t i = 0; i < count; i++)
        if (absent[2 * i] > pages || absent[2 * i + 1] > pages - absent[2 * i])
            return -EINVAL;
    vdf_records_begin(&records, 1);
    vdf_records_add(&records, VDF_RECORD_HEAD, VDF_PRESENCE_VERSION);
    vdf_records_add(&records, VDF_RECORD_HEAD, size);
    vdf_records_add(&records, VDF_RECORD_HEAD, whole);
    for (uint64_t i = 0; i < count; i++)
        vdf_records_add_run(&records, VDF_RECORD_ABSENT, absent[2 * i], absent[2 * i + 1]);
    int error = vdf_presencelog_replace(&log, &records);
    vdf_records_free(&records);
    vdf_presencelog_close(&log);
    return error;
}

int vdf_presence_create(int directory, uint64_t size, unsigned flags, const uint64_t *absent,
                        uint64_t count)
{
    struct stat st;
    bool whole = (flags & VDF_PRESENCE_WHOLE) != 0;
    int error = vdf_range_check(0, size);

    if (error == 0 && !whole && count != 0)
        error = -EINVAL;
    if (error == 0 && fstatat(directory, "presence.log", &st, AT_SYMLINK_NOFOLLOW) == 0)
        error = -EEXIST;
    if (error == 0)
        error = make_bitmap(directory, size);
    if (error == 0)
        error = make_head(directory, size);
    /* Last: without it there is no presence. Its rename syncs the other names too. */
    if (error == 0)
        error = make_log(directory, size, whole, absent, count);
    return error;
}

/* ---- opening --------------------------------------------------------------------------------- */

static int map_head(vdf_presence *presence, int dir)
{
    int fd = open_file(dir, HEAD_NAME, 0);

    if (fd < 0)
        return fd;
    int error = allocate(fd, VDF_PAGE_SIZE);
    if (error == 0) {
        void *at = mmap(NULL, VDF_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (at == MAP_FAILED)
            error = -errno;
        else
            presence->head = at;
    }
    close(fd);
    return error;
}

/* Before the first store into either. */
static int guard(vdf_lazy *lazy)
{
    vdf_presence *presence = lazy->presence;

    presence->lost.noted = &presence->head->lost;
    int error = vdf_bitmap_guard(&lazy->present, &presence->lost);
    if (error == 0)
        error =
            vdf_guard_add(presence->head, VDF_PAGE_SIZE, &presence->lost, &presence->head_guard);
    /* Kept here, so that it can always be read. Where that is not allowed it is in use anyhow. */
    if (error == 0)
        mlock(presence->head, VDF_PAGE_SIZE);
    return error;
}

static int open_bitmap(vdf_lazy *lazy, int dir, bool anew)
{
    int fd = open_file(dir, BITMAP_NAME, anew ? O_TRUNC : 0);

    if (fd < 0)
        return fd;
    vdf_bitmap_close(&lazy->present);
    return vdf_bitmap_open(&lazy->present, fd, vdf_pages_of(lazy->base_size));
}

/* map -= gone. */
static void subtract(vdf_bitmap *map, const vdf_bitmap *gone)
{
    uint64_t end = atomic_load(&gone->capacity);

    for (uint64_t page = vdf_bitmap_next(gone, 0, end); page < end;
         page = vdf_bitmap_next(gone, page, end)) {
        uint64_t stop = vdf_bitmap_next_clear(gone, page, end);
        vdf_bitmap_clear(map, page, stop - page);
        page = stop;
    }
}

/* map |= one & other. */
static void add_common(vdf_bitmap *map, const vdf_bitmap *one, const vdf_bitmap *other)
{
    uint64_t end = atomic_load(&one->capacity);

    for (uint64_t page = vdf_bitmap_next(one, 0, end); page < end;
         page = vdf_bitmap_next(one, page, end)) {
        uint64_t stop = vdf_bitmap_next_clear(one, page, end);
        uint64_t first = vdf_bitmap_next(other, page, stop);
        page = vdf_bitmap_next_clear(other, first, stop);
        vdf_bitmap_set(map, first, page - first);
    }
}

static bool is_trusted(const vdf_presence_head *head, uint64_t base_size)
{
    return memcmp(head->magic, magic, sizeof magic) == 0 && head->version == VDF_PRESENCE_VERSION &&
           head->base_size == base_size && vdf_load(&head->valid) == 1 &&
           vdf_load(&head->lost) == 0;
}

/* The host has lived: what the log lacks is fresh, and the base has it no more. */
static int take_over(vdf_lazy *lazy, const vdf_presence_said *said, bool log_failed)
{
    if (lazy->whole) {
        add_common(&lazy->fresh, &lazy->present, &lazy->absent);
    } else {
        vdf_bitmap_merge(&lazy->fresh, &lazy->present);
        if (!log_failed)
            subtract(&lazy->fresh, &said->present);
    }
    subtract(&lazy->absent, &lazy->present);
    return 0;
}

/* The log alone is believed. Cut short anywhere, it is done again. */
static int rebuild(vdf_lazy *lazy, const vdf_presence_said *said)
{
    vdf_presence_head *head = lazy->presence->head;

    vdf_bitmap_merge(&lazy->present, &said->present);
    fill_head(head, said->base_size, atomic_load(&lazy->low));
    vdf_crash("presence.rebuilt");
    vdf_store(&head->valid, 1);
    lazy->presence->rebuilt = true;
    return 0;
}

static int open_files(vdf_image *image, int dir, unsigned flags, const vdf_presence_said *said)
{
    vdf_lazy *lazy = image->lazy;
    vdf_presence *presence = lazy->presence;
    bool lives = (flags & VDF_PRESENCE_TRUST) != 0;
    int error = map_head(presence, dir);

    if (error != 0)
        return error;
    bool trusted = lives && is_trusted(presence->head, said->base_size);
    /* The log of a host that lived, of which a part may never have reached the disk. */
    bool log_failed = trusted && vdf_load(&presence->head->log_failed) != 0;
    /* First: a rebuild that is cut short must not be taken for a bitmap. */
    if (!trusted) {
        vdf_store(&presence->head->valid, 0);
    } else {
        atomic_store(&lazy->low, vdf_min(atomic_load(&lazy->low), vdf_load(&presence->head->low)));
        vdf_store(&presence->head->low, atomic_load(&lazy->low));
    }
    error = open_bitmap(lazy, dir, !trusted);
    if (error == 0)
        error = guard(lazy);
    if (error != 0)
        return error;
    vdf_bitmap_merge(&lazy->absent, &said->absent);
    if (!log_failed)
        subtract(&lazy->absent, &said->present);
    error = trusted ? take_over(lazy, said, log_failed) : rebuild(lazy, said);
    /* That the file was found smaller is known from here on, whatever becomes of it. */
    bool cut = !trusted && atomic_load(&lazy->low) < said->low;
    if (cut)
        presence->logged_low = atomic_load(&lazy->low);
    if (error == 0 && (log_failed || cut || (lives && !trusted)))
        error = vdf_presence_write_log(lazy);
    if (error == 0)
        vdf_store(&presence->head->log_failed, 0);
    return error;
}

static int start(vdf_image *image, int directory, unsigned flags, const vdf_presence_said *said)
{
    vdf_lazy *lazy = image->lazy;
    vdf_presence *presence = lazy->presence;

    lazy->base_size = said->base_size;
    lazy->whole = said->whole;
    /* A file that is smaller was truncated when nobody could say so any more. */
    atomic_store(&lazy->low, vdf_min(said->low, atomic_load(&image->size)));
    presence->logged_low = said->low;
    presence->compact_bytes = presence->log.end;
    atomic_store(&presence->log_bytes, presence->log.end);
    atomic_store(&lazy->complete, said->complete);
    return said->complete ? 0 : open_files(image, directory, flags, said);
}

static vdf_presence *make_presence(void)
{
    vdf_presence *presence = calloc(1, sizeof *presence);

    if (presence == NULL)
        return NULL;
    presence->log.fd = presence->log.dir = -1;
    pthread_mutex_init(&presence->lock, NULL);
    pthread_cond_init(&presence->changed, NULL);
    return presence;
}

void vdf_presence_free(vdf_presence *presence)
{
    if (presence == NULL)
        return;
    vdf_guard_remove(presence->head_guard);
    if (presence->head != NULL)
        munmap(presence->head, VDF_PAGE_SIZE);
    vdf_presencelog_close(&presence->log);
    if (presence->log.dir >= 0)
        close(presence->log.dir);
    pthread_cond_destroy(&presence->changed);
    pthread_mutex_destroy(&presence->lock);
    free(presence);
}

int vdf_image_presence_open(vdf_image *image, int directory, unsigned flags)
{
    vdf_lazy *lazy = image->lazy;
    vdf_presence_said said;

    if (lazy == NULL || !lazy->writable)
        return -EINVAL;
    if (lazy->presence != NULL || atomic_load(&lazy->present.set) != 0 ||
        atomic_load(&lazy->mapped.set) != 0)
        return -EBUSY;
    int dir = fcntl(directory, F_DUPFD_CLOEXEC, 0);
    if (dir < 0)
        return -errno;
    lazy->presence = make_presence();
    if (lazy->presence == NULL) {
        close(dir);
        return -ENOMEM;
    }
    int error = vdf_presencelog_open(dir, &lazy->presence->log, &said);
    lazy->presence->log.dir = dir;
    if (error != 0)
        return error;
    error = start(image, dir, flags, &said);
    vdf_presence_said_free(&said);
    return error;
}

/* ---- asking ------------------------------------------------------------------------------------
 */

int vdf_image_presence_commit(vdf_image *image)
{
    if (image->lazy == NULL || image->lazy->presence == NULL)
        return -EINVAL;
    return vdf_presence_commit(image, VDF_COMMIT_COMPACT);
}

int vdf_image_presence_complete(vdf_image *image)
{
    vdf_lazy *lazy = vdf_image_lazy(image);

    if (image->lazy == NULL || !image->lazy->writable)
        return -EINVAL;
    if (lazy == NULL)
        return 0;
    if (!vdf_lazy_is_here(lazy, 0, vdf_lazy_low_pages(lazy)))
        return -EAGAIN;
    if (lazy->presence != NULL)
        return vdf_presence_commit(image, VDF_COMMIT_COMPLETE);
    atomic_store(&lazy->complete, true);
    return 0;
}

int vdf_presence_counts_get(vdf_image *image, vdf_presence_counts *out)
{
    const vdf_lazy *lazy = image->lazy;

    memset(out, 0, sizeof *out);
    if (lazy == NULL || !lazy->writable)
        return -EINVAL;
    out->base_size = lazy->base_size;
    out->low = atomic_load(&lazy->low);
    out->present_pages = atomic_load(&lazy->present.set);
    out->uncommitted_pages = atomic_load(&lazy->fresh.set);
    out->absent_pages = atomic_load(&lazy->absent.set);
    out->complete = atomic_load(&lazy->complete);
    if (lazy->presence != NULL) {
        out->log_bytes = atomic_load(&lazy->presence->log_bytes);
        out->rebuilt = lazy->presence->rebuilt;
        out->lost = atomic_load(&lazy->presence->lost.pages);
    }
    return 0;
}
