/*
 * fill.c - bytes of a lazy image that arrive: maps, fills, what is left to fetch, and
 * giving them back. lazy.c says which pages are here.
 */
#include "internal.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <string.h>

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
    /* A page that became present meanwhile is cleared here, or by who made it present. */
    for (uint64_t at = page, stop = page + VDF_REGION_PAGES; lazy->writable && at < stop;) {
        at = vdf_bitmap_next(&lazy->present, at, stop);
        uint64_t clear = vdf_bitmap_next_clear(&lazy->present, at, stop);
        vdf_bitmap_clear(&lazy->absent, at, clear - at);
        at = clear;
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
        if (!vdf_lazy_is_mapped(image->lazy, first + i))
            map_region(image->lazy, first + i, data == NULL ? NULL : data + i * VDF_REGION_WORDS);
    pthread_rwlock_unlock(&image->lazy->lock);
    return 0;
}

int vdf_image_is_mapped(vdf_image *image, uint64_t region)
{
    return vdf_image_lazy(image) == NULL || vdf_lazy_is_mapped(image->lazy, region);
}

int vdf_image_is_present(vdf_image *image, uint64_t offset, uint64_t length)
{
    if (vdf_image_lazy(image) == NULL)
        return 1;
    uint64_t end = vdf_min(vdf_add(offset, length), atomic_load(&image->size));
    return offset >= end ||
           vdf_lazy_is_here(image->lazy, offset / VDF_PAGE_SIZE, vdf_pages_of(end));
}

/* The bytes of pages from `from` on as the base has them: nothing beyond `low`, and up to `size`.
 */
static int write_base(const vdf_image *image, uint64_t from, uint64_t pages, const uint8_t *data)
{
    uint8_t page[VDF_PAGE_SIZE] = {0};
    uint64_t low = atomic_load(&image->lazy->low);
    uint64_t end = vdf_min(from + pages * VDF_PAGE_SIZE, atomic_load(&image->size));
    uint64_t whole = vdf_min(end, low) / VDF_PAGE_SIZE * VDF_PAGE_SIZE;
    int error = 0;

    if (whole > from)
        error = vdf_file_write(image->fd, from, whole - from, data);
    if (error != 0 || end <= whole)
        return error;
    memcpy(page, data + (whole - from), vdf_min(end, low) - whole);
    return vdf_file_write(image->fd, whole, end - whole, page);
}

/* With the chunk's stripe held: writes the absent pages of [page, end). */
static int fill_chunk(vdf_image *image, uint64_t page, uint64_t end, const uint8_t *data,
                      uint64_t *filled)
{
    vdf_lazy *lazy = image->lazy;

    if (!vdf_lazy_is_mapped(lazy, page / VDF_REGION_PAGES))
        return 0;
    end = vdf_min(end, vdf_lazy_low_pages(lazy));
    for (uint64_t at = vdf_bitmap_next(&lazy->absent, page, end); at < end;
         at = vdf_bitmap_next(&lazy->absent, at, end)) {
        /* It may be marked absent still by who maps the region while it is written to. */
        if (vdf_lazy_is_present(lazy, at)) {
            at++;
            continue;
        }
        uint64_t stop = vdf_bitmap_next_clear(&lazy->absent, at, end);
        if (lazy->writable)
            stop = vdf_bitmap_next(&lazy->present, at, stop);
        int error =
            write_base(image, at * VDF_PAGE_SIZE, stop - at, data + (at - page) * VDF_PAGE_SIZE);
        if (error != 0)
            return error;
        vdf_crash("fill.written");
        if (lazy->writable)
            vdf_lazy_mark_run(lazy, at, stop - at);
        else
            vdf_bitmap_clear(&lazy->absent, at, stop - at);
        vdf_crash("fill.marked");
        *filled += vdf_min(stop * VDF_PAGE_SIZE, atomic_load(&image->size)) - at * VDF_PAGE_SIZE;
        at = stop;
    }
    return 0;
}

/* A fill is no change: no mark, no page preserved. But the intent log must be awake. */
static int fill_piece(vdf_image *image, uint64_t offset, uint64_t length, const uint8_t *data,
                      uint64_t *filled)
{
    vdf_change change;

    vdf_change_begin_unmarked(&change, image);
    vdf_image_lock(image, offset, length);
    int error =
        fill_chunk(image, offset / VDF_PAGE_SIZE, vdf_pages_of(offset + length), data, filled);
    vdf_image_unlock(image, offset, length);
    vdf_change_end(&change);
    return error;
}

static int check_fill(const vdf_image *image, uint64_t offset, uint64_t length)
{
    const vdf_lazy *lazy = image->lazy;
    uint64_t end = vdf_add(offset, length);

    if (lazy == NULL || offset % VDF_PAGE_SIZE != 0)
        return -EINVAL;
    /* The size of a writable image may have changed since the data was asked for. */
    uint64_t size = lazy->writable ? lazy->base_size : atomic_load(&image->size);
    uint64_t most = lazy->writable ? vdf_pages_of(size) * VDF_PAGE_SIZE : size;
    return end > most || (length % VDF_PAGE_SIZE != 0 && end != size) ? -EINVAL : 0;
}

int vdf_image_fill(vdf_image *image, uint64_t offset, uint64_t length, const uint8_t *data,
                   uint64_t *filled)
{
    uint64_t total = 0;
    int error = check_fill(image, offset, length);

    if (error != 0)
        return error;
    pthread_rwlock_rdlock(&image->lazy->lock);
    for (uint64_t at = offset, end = offset + length; at < end && error == 0;) {
        uint64_t stop = vdf_min(end, (at / VDF_CHUNK_SIZE + 1) * VDF_CHUNK_SIZE);
        error = fill_piece(image, at, stop - at, data + (at - offset), &total);
        at = stop;
    }
    pthread_rwlock_unlock(&image->lazy->lock);
    if (filled != NULL)
        *filled = total;
    return error;
}

/* ---- what is left to do -------------------------------------------------------------------- */

int64_t vdf_image_next_absent(vdf_image *image, uint64_t offset, uint64_t *length)
{
    const vdf_lazy *lazy = vdf_image_lazy(image);

    if (image->lazy == NULL)
        return -EINVAL;
    if (lazy == NULL)
        return -ENXIO;
    uint64_t end = vdf_lazy_low_pages(lazy), page = offset / VDF_PAGE_SIZE;
    for (page = vdf_bitmap_next(&lazy->absent, page, end); page < end;
         page = vdf_bitmap_next(&lazy->absent, page, end)) {
        uint64_t region = page / VDF_REGION_PAGES;
        uint64_t stop = vdf_min(end, (region + 1) * VDF_REGION_PAGES);
        if (!vdf_lazy_is_mapped(lazy, region)) {
            page = stop;
        } else if (vdf_lazy_is_present(lazy, page)) {
            page++;
        } else {
            stop = vdf_bitmap_next_clear(&lazy->absent, page, stop);
            if (lazy->writable)
                stop = vdf_bitmap_next(&lazy->present, page, stop);
            *length = (stop - page) * VDF_PAGE_SIZE;
            return (int64_t)(page * VDF_PAGE_SIZE);
        }
    }
    return -ENXIO;
}

int64_t vdf_image_next_unmapped(vdf_image *image, uint64_t region)
{
    const vdf_lazy *lazy = vdf_image_lazy(image);

    if (image->lazy == NULL)
        return -EINVAL;
    if (lazy == NULL || lazy->whole)
        return -ENXIO;
    uint64_t pages = vdf_lazy_low_pages(lazy);
    uint64_t end = (pages + VDF_REGION_PAGES - 1) / VDF_REGION_PAGES;
    for (region = vdf_bitmap_next_clear(&lazy->mapped, region, end); region < end;
         region = vdf_bitmap_next_clear(&lazy->mapped, region + 1, end)) {
        uint64_t page = region * VDF_REGION_PAGES;
        uint64_t stop = vdf_min(pages, page + VDF_REGION_PAGES);
        if (!lazy->writable || vdf_bitmap_next_clear(&lazy->present, page, stop) < stop)
            return (int64_t)region;
    }
    return -ENXIO;
}

int vdf_image_evict(vdf_image *image, uint64_t first, uint64_t count)
{
    int error = check_regions(image, first, count);

    /* What a guest wrote is nowhere else. */
    if (error == 0 && image->lazy->writable)
        error = -EINVAL;
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
