/*
 * lazy.c - images whose bytes arrive when they are asked for: which pages are here.
 *
 * A region is unmapped (nothing is known) or mapped; a page of a mapped region is
 * absent (it has data that is not here) or here (filled, or zero: a hole of the
 * file). Only absent and mapped are kept, so that a mapped region of zeros costs one
 * bit. Both are volatile.
 *
 * A writable image has `present` besides: pages that were filled, written or made zero,
 * which are here whatever a map says (presence.c makes that outlive the process). Pages
 * beyond `low` have no data in the base: they are what the file says.
 *
 * Invariant: a page that is here stays here (of a writable image; of another one until it
 * is evicted). A change makes its pages present with their stripes held, after it wrote;
 * a fill writes only pages that are not present, with their stripes held.
 */
#include "internal.h"

#include <stdlib.h>
#include <unistd.h>

static int open_bitmaps(vdf_lazy *lazy, bool writable)
{
    vdf_bitmap *const map[] = {&lazy->absent, &lazy->mapped, &lazy->present, &lazy->fresh};
    unsigned count = writable ? 4 : 2;
    int error = 0;

    for (unsigned i = 0; i < count && error == 0; i++)
        error = vdf_bitmap_open(map[i], -1, 0);
    return error;
}

int vdf_lazy_create(uint64_t size, bool writable, vdf_lazy **out)
{
    int error = vdf_range_check(0, size);

    if (error != 0)
        return error;
    vdf_lazy *lazy = calloc(1, sizeof *lazy);
    if (lazy == NULL)
        return -ENOMEM;
    lazy->writable = writable;
    lazy->base_size = size;
    atomic_store(&lazy->low, size);
    error = vdf_rwlock_init(&lazy->lock);
    if (error != 0) {
        free(lazy);
        return error;
    }
    error = open_bitmaps(lazy, writable);
    if (error != 0) {
        vdf_lazy_free(lazy);
        return error;
    }
    *out = lazy;
    return 0;
}

static void close_bitmap(vdf_bitmap *map)
{
    if (map->word != NULL)
        vdf_bitmap_close(map);
}

void vdf_lazy_free(vdf_lazy *lazy)
{
    if (lazy == NULL)
        return;
    close_bitmap(&lazy->absent);
    close_bitmap(&lazy->mapped);
    close_bitmap(&lazy->present);
    close_bitmap(&lazy->fresh);
    vdf_presence_free(lazy->presence);
    pthread_rwlock_destroy(&lazy->lock);
    free(lazy);
}

/* ---- which pages are here ------------------------------------------------------------ */

uint64_t vdf_lazy_next_missing(const vdf_lazy *lazy, uint64_t page, uint64_t end)
{
    uint64_t stop = vdf_min(end, vdf_lazy_low_pages(lazy));

    while (page < stop) {
        if (lazy->writable)
            page = vdf_bitmap_next_clear(&lazy->present, page, stop);
        if (page >= stop)
            break;
        if (!vdf_lazy_is_mapped(lazy, page / VDF_REGION_PAGES))
            return page;
        uint64_t region_end = vdf_min(stop, (page / VDF_REGION_PAGES + 1) * VDF_REGION_PAGES);
        page = vdf_bitmap_next(&lazy->absent, page, region_end);
        if (page < region_end && !vdf_lazy_is_present(lazy, page))
            return page;
    }
    return end;
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
    /* What is here of a writable image stays here: nothing to keep eviction out of. */
    if (!lazy->writable)
        pthread_rwlock_rdlock(&lazy->lock);
    if (vdf_lazy_is_here(lazy, offset / VDF_PAGE_SIZE, vdf_pages_of(offset + length)))
        result = vdf_file_read(image->fd, offset, length, data);
    else
        result = -EAGAIN;
    if (!lazy->writable)
        pthread_rwlock_unlock(&lazy->lock);
    return result;
}

/* ---- what a change needs, and leaves --------------------------------------------------- */

unsigned vdf_lazy_edges(const vdf_image *image, uint64_t offset, uint64_t length, vdf_want want[2])
{
    const vdf_lazy *lazy = vdf_image_lazy(image);
    uint64_t end = offset + length;
    uint64_t first = offset / VDF_PAGE_SIZE, last = end / VDF_PAGE_SIZE;
    unsigned wants = 0;

    if (lazy == NULL || length == 0)
        return 0;
    if (offset % VDF_PAGE_SIZE != 0 && !vdf_lazy_is_here(lazy, first, first + 1))
        want[wants++] = (vdf_want){first * VDF_PAGE_SIZE, VDF_PAGE_SIZE};
    /* What lies between the end of the file and the end of its last page is zero: a change up
     * to there covers all of that page. */
    if (end % VDF_PAGE_SIZE == 0 || end >= atomic_load(&image->size) ||
        (wants != 0 && last == first) || vdf_lazy_is_here(lazy, last, last + 1))
        return wants;
    if (wants != 0 && last == first + 1)
        want[0].length += VDF_PAGE_SIZE;
    else
        want[wants++] = (vdf_want){last * VDF_PAGE_SIZE, VDF_PAGE_SIZE};
    return wants;
}

/*
 * Fresh first: who sees a page present leaves it to the others to have it logged. A page
 * becomes present once, so that a commit that takes fresh bits away never meets this.
 */
void vdf_lazy_mark_run(vdf_lazy *lazy, uint64_t page, uint64_t count)
{
    vdf_bitmap_set(&lazy->fresh, page, count);
    vdf_bitmap_set(&lazy->present, page, count);
    vdf_bitmap_clear(&lazy->absent, page, count);
}

static void mark_pages(vdf_lazy *lazy, uint64_t page, uint64_t end)
{
    end = vdf_min(end, vdf_lazy_low_pages(lazy));
    while (page < end) {
        uint64_t stop;
        if (lazy->whole) {
            page = vdf_bitmap_next(&lazy->absent, page, end);
            stop = vdf_bitmap_next_clear(&lazy->absent, page, end);
        } else {
            page = vdf_bitmap_next_clear(&lazy->present, page, end);
            stop = vdf_bitmap_next(&lazy->present, page, end);
        }
        if (page < end)
            vdf_lazy_mark_run(lazy, page, stop - page);
        page = stop;
    }
}

void vdf_lazy_mark(vdf_image *image, uint64_t offset, uint64_t length)
{
    vdf_lazy *lazy = vdf_image_lazy(image);

    if (lazy == NULL || length == 0)
        return;
    mark_pages(lazy, offset / VDF_PAGE_SIZE, vdf_pages_of(offset + length));
    vdf_crash("presence.marked");
}

void vdf_lazy_cut(vdf_image *image, uint64_t size)
{
    vdf_lazy *lazy = vdf_image_lazy(image);

    if (lazy == NULL || size >= atomic_load(&lazy->low))
        return;
    /* After the file: killed in between, its size says it. The other way round pages of a
     * truncation that nobody was told of would be zero. */
    atomic_store(&lazy->low, size);
    if (lazy->presence != NULL)
        vdf_store(&lazy->presence->head->low, size);
    vdf_crash("presence.cut");
}

/* ---- seek -------------------------------------------------------------------------------- */

typedef enum stretch {
    UNKNOWN,
    ABSENT, /* data */
    LOCAL   /* what the file says */
} stretch;

/* What is at `offset`, and up to which byte. */
static stretch stretch_at(const vdf_lazy *lazy, uint64_t offset, uint64_t size, uint64_t *end)
{
    uint64_t page = offset / VDF_PAGE_SIZE;
    uint64_t stop = vdf_lazy_low_pages(lazy);
    uint64_t region_end = (page / VDF_REGION_PAGES + 1) * VDF_REGION_PAGES;
    stretch kind = LOCAL;

    if (page >= stop) {
        stop = VDF_MAX_PAGES;
    } else if (vdf_lazy_is_present(lazy, page)) {
        stop = vdf_bitmap_next_clear(&lazy->present, page, stop);
    } else if (!vdf_lazy_is_mapped(lazy, page / VDF_REGION_PAGES)) {
        kind = UNKNOWN;
    } else if (vdf_bitmap_test(&lazy->absent, page)) {
        kind = ABSENT;
        stop = vdf_bitmap_next_clear(&lazy->absent, page, vdf_min(stop, region_end));
    } else {
        stop = vdf_bitmap_next(&lazy->absent, page, vdf_min(stop, region_end));
    }
    *end = vdf_min(stop * VDF_PAGE_SIZE, size);
    return kind;
}

static int64_t seek_data(const vdf_image *image, uint64_t offset, uint64_t size)
{
    while (offset < size) {
        uint64_t end;
        stretch kind = stretch_at(image->lazy, offset, size, &end);
        if (kind != LOCAL)
            return kind == ABSENT ? (int64_t)offset : -EAGAIN;
        off_t data = lseek(image->fd, (off_t)offset, SEEK_DATA);
        if (data >= 0 && (uint64_t)data < end)
            return data;
        offset = end;
    }
    return -ENXIO;
}

static int64_t seek_hole(const vdf_image *image, uint64_t offset, uint64_t size)
{
    while (offset < size) {
        uint64_t end;
        stretch kind = stretch_at(image->lazy, offset, size, &end);
        if (kind == UNKNOWN)
            return -EAGAIN;
        if (kind == LOCAL) {
            off_t hole = lseek(image->fd, (off_t)offset, SEEK_HOLE);
            if (hole < 0)
                return -errno;
            if ((uint64_t)hole < end)
                return hole;
        }
        offset = end;
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
