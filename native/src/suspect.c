/* suspect.c - pages of which it is not known what the vault holds, and those that changed. */
#include "internal.h"

#include <unistd.h>

int vdf_suspect_mark(vdf_image *image, uint64_t offset, uint64_t length)
{
    vdf_track *track = atomic_load(&image->track);
    int error = vdf_range_check(offset, length);

    if (track == NULL || error != 0)
        return track == NULL ? -EINVAL : error;
    if (length == 0)
        return 0;
    vdf_track_reach(track, offset + length);
    uint64_t first = offset / VDF_PAGE_SIZE;
    vdf_bitmap_set(&track->suspect, first, vdf_pages_of(offset + length) - first);
    return 0;
}

int vdf_suspect_mark_allocated(vdf_image *image)
{
    return vdf_suspect_mark_allocated_in(image, 0, UINT64_MAX);
}

int vdf_suspect_mark_allocated_in(vdf_image *image, uint64_t start, uint64_t end)
{
    uint64_t size = vdf_min(end, atomic_load(&image->size));
    uint64_t at = start;
    int error = 0;

    while (at < size && error == 0) {
        off_t data = lseek(image->inner_fd, (off_t)at, SEEK_DATA);
        if (data < 0)
            return errno == ENXIO ? 0 : -errno;
        off_t hole = lseek(image->inner_fd, data, SEEK_HOLE);
        if (hole < 0)
            return -errno;
        at = (uint64_t)hole;
        uint64_t stop = vdf_min(at, end);
        if ((uint64_t)data < stop)
            error = vdf_suspect_mark(image, (uint64_t)data, stop - (uint64_t)data);
    }
    return error;
}

int vdf_suspect_clear(vdf_image *image, const uint64_t *pageno, uint64_t count)
{
    vdf_track *track = atomic_load(&image->track);

    if (track == NULL)
        return -EINVAL;
    for (uint64_t i = 0; i < count; i++)
        vdf_bitmap_clear(&track->suspect, pageno[i], 1);
    vdf_crash("suspect.cleared");
    return 0;
}

int vdf_suspect_clear_from(vdf_image *image, uint64_t first)
{
    vdf_track *track = atomic_load(&image->track);

    if (track == NULL)
        return -EINVAL;
    vdf_bitmap *map = &track->suspect;
    uint64_t end = atomic_load(&map->capacity);
    for (uint64_t page = vdf_bitmap_next(map, first, end); page < end;
         page = vdf_bitmap_next(map, page, end)) {
        uint64_t clear = vdf_bitmap_next_clear(map, page, end);
        vdf_bitmap_clear(map, page, clear - page);
        page = clear;
    }
    return 0;
}

int vdf_track_is_changed(vdf_image *image, uint64_t pageno)
{
    vdf_track *track = atomic_load(&image->track);

    return track != NULL &&
           (vdf_bitmap_test(&track->dirty[0], pageno) || vdf_bitmap_test(&track->dirty[1], pageno));
}
