/*
 * capture.c - reading frozen pages as they were at the seal, and suspect pages as
 * they are. No lock is taken: the image is read first, then `preserved` is looked
 * at; a change preserves before it writes.
 */
#include "internal.h"

#include <string.h>
#include <unistd.h>

#define RUN_PAGES 256

typedef struct source {
    vdf_image *image;
    vdf_track *track;
    bool frozen; /* read `preserve` where a page is preserved */
    uint64_t size;
} source;

/* True if the file system has a hole at least over the pages of the run. */
static bool is_hole(const source *from, uint64_t page, uint64_t count)
{
    off_t data = lseek(from->image->inner_fd, (off_t)(page * VDF_PAGE_SIZE), SEEK_DATA);

    if (data < 0)
        return errno == ENXIO;
    return (uint64_t)data >= (page + count) * VDF_PAGE_SIZE;
}

static int read_padded(int fd, uint64_t page, uint64_t count, uint64_t size, uint8_t *data)
{
    uint64_t offset = page * VDF_PAGE_SIZE;
    uint64_t length = vdf_min(count * VDF_PAGE_SIZE, size - offset);
    int64_t got = vdf_file_read(fd, offset, length, data);

    if (got < 0)
        return (int)got;
    memset(data + got, 0, count * VDF_PAGE_SIZE - (uint64_t)got);
    return 0;
}

static int read_preserved(const source *from, uint64_t page, uint64_t count, uint8_t *data)
{
    uint64_t end = page + count;

    for (uint64_t at = vdf_bitmap_next(&from->track->preserved, page, end); at < end;) {
        uint64_t stop = vdf_bitmap_next_clear(&from->track->preserved, at, end);
        int error = read_padded(from->track->preserve, at, stop - at, from->size,
                                data + (at - page) * VDF_PAGE_SIZE);
        if (error != 0)
            return error;
        at = vdf_bitmap_next(&from->track->preserved, stop, end);
    }
    return 0;
}

/*
 * Reads the image, whose disk has failed once, page by page: one that was preserved is not needed.
 * What cannot be read otherwise is named in the batch.
 */
static int read_pages(const source *from, uint64_t page, uint64_t count, uint8_t *data,
                      vdf_batch *batch)
{
    for (uint64_t i = 0; i < count; i++) {
        int error =
            read_padded(from->image->inner_fd, page + i, 1, from->size, data + i * VDF_PAGE_SIZE);
        if (error == 0 || (from->frozen && vdf_bitmap_test(&from->track->preserved, page + i)))
            continue;
        batch->unreadable = page + i;
        return error;
    }
    return 0;
}

/* Reads a run into `data`, whole; a hole of many pages is not read but zeroed. */
static int read_run(const source *from, uint64_t page, uint64_t count, uint8_t *data,
                    vdf_batch *batch)
{
    int error = 0;

    if (count >= VDF_CHUNK_PAGES && is_hole(from, page, count))
        memset(data, 0, count * VDF_PAGE_SIZE);
    else
        error = read_padded(from->image->inner_fd, page, count, from->size, data);
    if (error != 0)
        error = read_pages(from, page, count, data, batch);
    if (error == 0 && from->frozen)
        error = read_preserved(from, page, count, data);
    return error;
}

/* Adds a run that was read to the end of batch->data: zero pages give their room back. */
static void take_run(vdf_batch *batch, uint64_t page, uint64_t count)
{
    uint8_t *data = batch->data + (uint64_t)batch->data_pages * VDF_PAGE_SIZE;
    uint8_t *zero = batch->zero + batch->count;
    uint64_t kept = 0;

    vdf_pages_zero(data, count, zero);
    for (uint64_t i = 0; i < count; i++) {
        batch->pageno[batch->count + i] = page + i;
        batch->sum[batch->count + i] = 0;
        if (zero[i])
            continue;
        if (kept != i)
            memmove(data + kept * VDF_PAGE_SIZE, data + i * VDF_PAGE_SIZE, VDF_PAGE_SIZE);
        vdf_pages_sum(data + kept * VDF_PAGE_SIZE, 1, &batch->sum[batch->count + i]);
        kept++;
    }
    batch->count += (uint32_t)count;
    batch->data_pages += (uint32_t)kept;
}

/*
 * A lazy image: the first chunk in [page, end) that has a marked page that is not here, or end.
 * What the file holds there is not the disk's: it must be fetched first.
 */
static uint64_t next_missing_chunk(const source *from, const vdf_bitmap *map, uint64_t page,
                                   uint64_t end)
{
    const vdf_lazy *lazy = vdf_image_lazy(from->image);

    while (lazy != NULL && page < end) {
        page = vdf_bitmap_next(map, page, end);
        uint64_t stop = vdf_bitmap_next_clear(map, page, end);
        uint64_t missing = vdf_lazy_next_missing(lazy, page, stop);
        /* One that is preserved is read from there. */
        while (from->frozen && missing < stop && vdf_bitmap_test(&from->track->preserved, missing))
            missing = vdf_lazy_next_missing(lazy, missing + 1, stop);
        if (missing < stop)
            return missing / VDF_CHUNK_PAGES * VDF_CHUNK_PAGES;
        page = stop;
    }
    return end;
}

static int fill(const source *from, const vdf_bitmap *map, uint64_t *cursor, vdf_batch *batch)
{
    uint64_t end = vdf_pages_of(from->size);
    uint64_t page = *cursor;

    batch->count = batch->data_pages = 0;
    batch->unreadable = UINT64_MAX;
    if (batch->capacity < VDF_CHUNK_PAGES)
        return -EINVAL;
    for (;;) {
        page = vdf_bitmap_next(map, page, end);
        if (page >= end)
            break;
        /* A new chunk only if it fits whole; within a chunk there is always room. */
        uint64_t chunk_end = (page / VDF_CHUNK_PAGES + 1) * VDF_CHUNK_PAGES;
        uint64_t room = batch->capacity - batch->count;
        if (room < chunk_end - page)
            break;
        uint64_t whole =
            chunk_end + (room - (chunk_end - page)) / VDF_CHUNK_PAGES * VDF_CHUNK_PAGES;
        uint64_t stop = vdf_min(vdf_min(end, whole), page + RUN_PAGES);
        uint64_t window = (page + RUN_PAGES) / VDF_CHUNK_PAGES * VDF_CHUNK_PAGES + VDF_CHUNK_PAGES;
        uint64_t missing = next_missing_chunk(from, map, page, window);
        if (missing <= page && batch->count != 0)
            break;
        if (missing <= page) {
            *cursor = page;
            return -EAGAIN;
        }
        stop = vdf_bitmap_next_clear(map, page, vdf_min(stop, missing));
        int error = read_run(from, page, stop - page,
                             batch->data + (uint64_t)batch->data_pages * VDF_PAGE_SIZE, batch);
        if (error != 0)
            return error;
        take_run(batch, page, stop - page);
        page = stop;
    }
    /* An image that grows meanwhile must not give the rest of the last chunk later. */
    *cursor = page < end ? page : (page + VDF_CHUNK_PAGES - 1) / VDF_CHUNK_PAGES * VDF_CHUNK_PAGES;
    return 0;
}

int vdf_capture_next(vdf_image *image, uint64_t *cursor, vdf_batch *batch)
{
    vdf_track *track = atomic_load(&image->track);

    if (track == NULL)
        return -EINVAL;
    uint64_t frozen = atomic_load(&track->frozen_epoch);
    if (frozen == 0 || atomic_load(&track->drained) == 0)
        return -EINVAL;
    source from = {.image = image, .track = track, .frozen = true, .size = track->sealed_size};
    int error = fill(&from, &track->dirty[frozen & 1], cursor, batch);
    /* A change gives the epoch up before it overwrites: seen here, or it came later. */
    uint32_t abandoned = atomic_load(&track->abandoned);
    /* A page's mark, or that it was preserved, may be gone. */
    if (error == 0 && atomic_load(&track->lost.unsettled) != 0)
        return -EUCLEAN;
    if (error == 0 && abandoned != 0)
        return abandoned == EFBIG ? -EFBIG : -ECANCELED;
    return error;
}

int vdf_suspect_next(vdf_image *image, uint64_t *cursor, vdf_batch *batch)
{
    vdf_track *track = atomic_load(&image->track);

    if (track == NULL)
        return -EINVAL;
    source from = {.image = image, .track = track, .size = atomic_load(&image->size)};
    return fill(&from, &track->suspect, cursor, batch);
}
