/*
 * lazy.c - images whose bytes arrive when they are asked for.
 *
 * A region is unmapped (nothing is known) or mapped; a page of a mapped region is
 * absent (it has data that is not here) or present (here, or zero: a hole of the
 * cache file). Only absent and mapped are kept, so that a mapped region of zeros
 * costs one bit. All of it is volatile.
 */
#include "internal.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <unistd.h>

int vdf_lazy_create(uint64_t size, vdf_lazy **out)
{
    int error = vdf_range_check(0, size);

    if (error != 0)
        return error;
    vdf_lazy *lazy = calloc(1, sizeof *lazy);
    if (lazy == NULL)
        return -ENOMEM;
    error = vdf_bitmap_open(&lazy->absent, -1, 0);
    if (error == 0) {
        error = vdf_bitmap_open(&lazy->mapped, -1, 0);
        if (error != 0)
            vdf_bitmap_close(&lazy->absent);
    }
    if (error == 0)
        error = vdf_rwlock_init(&lazy->lock);
    if (error != 0) {
        free(lazy);
        return error;
    }
    *out = lazy;
    return 0;
}

void vdf_lazy_free(vdf_lazy *lazy)
{
    if (lazy == NULL)
        return;
    vdf_bitmap_close(&lazy->absent);
    vdf_bitmap_close(&lazy->mapped);
    pthread_rwlock_destroy(&lazy->lock);
    free(lazy);
}

static bool range_present(const vdf_lazy *lazy, uint64_t page, uint64_t end)
{
    uint64_t first = page / VDF_REGION_PAGES;
    uint64_t stop = (end + VDF_REGION_PAGES - 1) / VDF_REGION_PAGES;

    return vdf_bitmap_next_clear(&lazy->mapped, first, stop) == stop &&
           vdf_bitmap_next(&lazy->absent, page, end) == end;
}

int64_t vdf_lazy_read(vdf_image *image, uint64_t offset, uint64_t length, uint8_t *data)
{
    vdf_lazy *lazy = image->lazy;
    uint64_t size = atomic_load(&image->size);
    int64_t result;

    if (offset >= size)
        return 0;
    length = vdf_min(length, size - offset);
    if (length == 0)
        return 0;
    pthread_rwlock_rdlock(&lazy->lock);
    if (range_present(lazy, offset / VDF_PAGE_SIZE, vdf_pages_of(offset + length)))
        result = vdf_file_read(image->fd, offset, length, data);
    else
        result = -EAGAIN;
    pthread_rwlock_unlock(&lazy->lock);
    return result;
}

static bool mapped_at(const vdf_lazy *lazy, uint64_t offset)
{
    return vdf_bitmap_test(&lazy->mapped, offset / VDF_REGION_SIZE);
}

/* The first data in the region from offset on, or the region's end. */
static uint64_t data_in_region(const vdf_image *image, uint64_t offset)
{
    uint64_t end = (offset / VDF_REGION_SIZE + 1) * VDF_REGION_SIZE;
    uint64_t page =
        vdf_bitmap_next(&image->lazy->absent, offset / VDF_PAGE_SIZE, end / VDF_PAGE_SIZE);
    uint64_t absent = page * VDF_PAGE_SIZE;
    off_t here = lseek(image->fd, (off_t)offset, SEEK_DATA);
    uint64_t found = vdf_min(absent, here < 0 ? end : (uint64_t)here);

    found = found < offset ? offset : found;
    return vdf_min(found, end);
}

static int64_t seek_data(const vdf_image *image, uint64_t offset, uint64_t size)
{
    while (offset < size) {
        if (!mapped_at(image->lazy, offset))
            return -EAGAIN;
        uint64_t end = (offset / VDF_REGION_SIZE + 1) * VDF_REGION_SIZE;
        uint64_t found = data_in_region(image, offset);
        if (found < end)
            return found < size ? (int64_t)found : -ENXIO;
        offset = end;
    }
    return -ENXIO;
}

static int64_t seek_hole(const vdf_image *image, uint64_t offset, uint64_t size)
{
    while (offset < size) {
        if (!mapped_at(image->lazy, offset))
            return -EAGAIN;
        uint64_t page = offset / VDF_PAGE_SIZE;
        if (vdf_bitmap_test(&image->lazy->absent, page)) {
            offset = vdf_bitmap_next_clear(&image->lazy->absent, page, vdf_pages_of(size)) *
                     VDF_PAGE_SIZE;
            continue;
        }
        off_t hole = lseek(image->fd, (off_t)offset, SEEK_HOLE);
        if (hole < 0)
            return -errno;
        if ((uint64_t)hole == offset)
            return (int64_t)offset;
        offset = (uint64_t)hole;
    }
    return (int64_t)size;
}

int64_t vdf_lazy_seek(vdf_image *image, uint64_t offset, int whence)
{
    uint64_t size = atomic_load(&image->size);
    int64_t result;

    pthread_rwlock_rdlock(&image->lazy->lock);
    result = whence == SEEK_DATA ? seek_data(image, offset, size) : seek_hole(image, offset, size);
    pthread_rwlock_unlock(&image->lazy->lock);
    return result;
}

static void map_region(vdf_lazy *lazy, uint64_t region, const uint64_t *data)
{
    uint64_t page = region * VDF_REGION_PAGES;

    for (uint64_t i = 0; data != NULL && i < VDF_REGION_WORDS; i++) {
        uint64_t word = data[i];
        while (word != 0) {
            uint64_t from = (uint64_t)__builtin_ctzll(word);
            uint64_t rest = ~(word >> from);
            uint64_t count = rest == 0 ? 64 : (uint64_t)__builtin_ctzll(rest);
            count = vdf_min(count, 64 - from);
            vdf_bitmap_set(&lazy->absent, page + i * 64 + from, count);
            word = from + count == 64 ? 0 : word >> (from + count) << (from + count);
        }
    }
    vdf_bitmap_set(&lazy->mapped, region, 1);
}

static int check_regions(const vdf_image *image, uint64_t first, uint64_t count)
{
    if (image->lazy == NULL || first > VDF_MAX_PAGES / VDF_REGION_PAGES ||
        count > VDF_MAX_PAGES / VDF_REGION_PAGES - first)
        return -EINVAL;
    return 0;
}

int vdf_image_map(vdf_image *image, uint64_t first, uint64_t count, const uint64_t *data)
{
    int error = check_regions(image, first, count);

    if (error != 0)
        return error;
    pthread_rwlock_rdlock(&image->lazy->lock);
    for (uint64_t i = 0; i < count; i++)
        if (!vdf_bitmap_test(&image->lazy->mapped, first + i))
            map_region(image->lazy, first + i, data == NULL ? NULL : data + i * VDF_REGION_WORDS);
    pthread_rwlock_unlock(&image->lazy->lock);
    return 0;
}

int vdf_image_is_mapped(vdf_image *image, uint64_t region)
{
    return image->lazy == NULL || vdf_bitmap_test(&image->lazy->mapped, region);
}

int vdf_image_is_present(vdf_image *image, uint64_t offset, uint64_t length)
{
    if (image->lazy == NULL)
        return 1;
    uint64_t end = vdf_min(vdf_add(offset, length), atomic_load(&image->size));
    return offset >= end || range_present(image->lazy, offset / VDF_PAGE_SIZE, vdf_pages_of(end));
}

/* With the chunk's stripe held: writes the absent pages of [page, end). */
static int fill_chunk(vdf_image *image, uint64_t page, uint64_t end, uint64_t size,
                      const uint8_t *data, uint64_t *filled)
{
    vdf_lazy *lazy = image->lazy;

    if (!vdf_bitmap_test(&lazy->mapped, page / VDF_REGION_PAGES))
        return 0;
    for (uint64_t at = vdf_bitmap_next(&lazy->absent, page, end); at < end;
         at = vdf_bitmap_next(&lazy->absent, at, end)) {
        uint64_t stop = vdf_bitmap_next_clear(&lazy->absent, at, end);
        uint64_t from = at * VDF_PAGE_SIZE;
        uint64_t bytes = vdf_min(stop * VDF_PAGE_SIZE, size) - from;
        int error = vdf_file_write(image->fd, from, bytes, data + (from - page * VDF_PAGE_SIZE));
        if (error != 0)
            return error;
        vdf_bitmap_clear(&lazy->absent, at, stop - at);
        *filled += bytes;
        at = stop;
    }
    return 0;
}

int vdf_image_fill(vdf_image *image, uint64_t offset, uint64_t length, const uint8_t *data,
                   uint64_t *filled)
{
    uint64_t size = atomic_load(&image->size);
    uint64_t total = 0;
    int error = 0;

    if (image->lazy == NULL || offset % VDF_PAGE_SIZE != 0 || offset > size ||
        length > size - offset || (length % VDF_PAGE_SIZE != 0 && offset + length != size))
        return -EINVAL;
    pthread_rwlock_rdlock(&image->lazy->lock);
    for (uint64_t at = offset, end = offset + length; at < end && error == 0;) {
        uint64_t stop = vdf_min(end, (at / VDF_CHUNK_SIZE + 1) * VDF_CHUNK_SIZE);
        vdf_image_lock(image, at, stop - at);
        error = fill_chunk(image, at / VDF_PAGE_SIZE, vdf_pages_of(stop), size,
                           data + (at - offset), &total);
        vdf_image_unlock(image, at, stop - at);
        at = stop;
    }
    pthread_rwlock_unlock(&image->lazy->lock);
    if (filled != NULL)
        *filled = total;
    return error;
}

int vdf_image_evict(vdf_image *image, uint64_t first, uint64_t count)
{
    int error = check_regions(image, first, count);

    if (error != 0 || count == 0)
        return error;
    pthread_rwlock_wrlock(&image->lazy->lock);
    vdf_bitmap_clear(&image->lazy->mapped, first, count);
    vdf_bitmap_clear(&image->lazy->absent, first * VDF_REGION_PAGES, count * VDF_REGION_PAGES);
    if (fallocate(image->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  (off_t)(first * VDF_REGION_SIZE), (off_t)(count * VDF_REGION_SIZE)) != 0)
        error = -errno;
    pthread_rwlock_unlock(&image->lazy->lock);
    return error;
}
