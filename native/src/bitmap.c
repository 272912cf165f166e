/*
 * bitmap.c - page bitmaps with a summary level.
 *
 * The address space for the largest disk is reserved once, so that growing never
 * moves a word. Invariant: a set page bit has its summary bit set; a setter sets
 * the summary, then the page, then looks at the summary again; a clearer clears
 * the summary, then looks at the pages again.
 */
#include "internal.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define WORD_BYTES (VDF_MAX_PAGES / 8)
#define SUMMARY_BYTES (VDF_MAX_PAGES / VDF_REGION_PAGES / 8)

static uint64_t map_bytes(uint64_t pages)
{
    uint64_t bytes = (pages + 7) / 8;

    return (bytes + VDF_PAGE_SIZE - 1) / VDF_PAGE_SIZE * VDF_PAGE_SIZE;
}

static void *reserve(uint64_t bytes, int protection)
{
    void *at = mmap(NULL, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    return at == MAP_FAILED ? NULL : at;
}

/* The mask of the bits [from, to) of a word; 0 <= from < to <= 64. */
static uint64_t bits(uint64_t from, uint64_t to)
{
    uint64_t high = to == 64 ? UINT64_MAX : (UINT64_C(1) << to) - 1;

    return high & ~((UINT64_C(1) << from) - 1);
}

static void summary_set(vdf_bitmap *map, uint64_t region)
{
    uint64_t bit = UINT64_C(1) << (region % 64);

    if (!(atomic_load(&map->summary[region / 64]) & bit))
        atomic_fetch_or(&map->summary[region / 64], bit);
}

static bool region_empty(const vdf_bitmap *map, uint64_t region)
{
    for (uint64_t i = 0; i < VDF_REGION_WORDS; i++)
        if (atomic_load(&map->word[region * VDF_REGION_WORDS + i]) != 0)
            return false;
    return true;
}

static void summary_clear(vdf_bitmap *map, uint64_t region)
{
    atomic_fetch_and(&map->summary[region / 64], ~(UINT64_C(1) << (region % 64)));
    if (!region_empty(map, region))
        summary_set(map, region);
}

#define REGION_BYTES (VDF_REGION_WORDS * 8)

/* Counts the bits of the regions in [at, end) bytes. */
static int load_regions(vdf_bitmap *map, uint64_t at, uint64_t end)
{
    uint64_t block[32 * VDF_REGION_WORDS];

    for (; at < end; at += sizeof block) {
        uint64_t length = vdf_min(sizeof block, end - at);
        int64_t got = vdf_file_read(map->fd, at, length, (uint8_t *)block);
        if (got < 0)
            return (int)got;
        for (uint64_t i = 0; i < (uint64_t)got / 8; i++) {
            if (block[i] == 0)
                continue;
            summary_set(map, (at + i * 8) / REGION_BYTES);
            atomic_fetch_add(&map->set, (uint64_t)__builtin_popcountll(block[i]));
        }
    }
    return 0;
}

/* Builds the summary from the file, reading only what was ever written. */
static int load_summary(vdf_bitmap *map, uint64_t bytes)
{
    uint64_t at = 0;

    /* What is read ahead of an allocated stretch counts as data from then on: all of the file
     * would be read (ext4, 268 MiB for one bit). */
    posix_fadvise(map->fd, 0, 0, POSIX_FADV_RANDOM);

    while (at < bytes) {
        off_t data = lseek(map->fd, (off_t)at, SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            break;
        if (data >= 0)
            at = (uint64_t)data / REGION_BYTES * REGION_BYTES;
        if (at >= bytes)
            break;
        off_t hole = lseek(map->fd, data < 0 ? (off_t)at : data, SEEK_HOLE);
        uint64_t end = hole < 0 ? bytes : vdf_min(bytes, (uint64_t)hole);
        int error = load_regions(map, at, end);
        if (error != 0)
            return error;
        at = vdf_add(end, REGION_BYTES - 1) / REGION_BYTES * REGION_BYTES;
    }
    return 0;
}

int vdf_bitmap_open(vdf_bitmap *map, int fd, uint64_t pages)
{
    int error;

    memset(map, 0, sizeof *map);
    map->fd = fd;
    map->word = reserve(WORD_BYTES, fd < 0 ? PROT_READ | PROT_WRITE : PROT_NONE);
    map->summary = reserve(SUMMARY_BYTES, PROT_READ | PROT_WRITE);
    if (map->word == NULL || map->summary == NULL) {
        vdf_bitmap_close(map);
        return -ENOMEM;
    }
    if (fd < 0) {
        atomic_store(&map->capacity, VDF_MAX_PAGES);
        return 0;
    }
    off_t size = lseek(fd, 0, SEEK_END);
    if (size < 0) {
        error = -errno;
    } else {
        uint64_t held = vdf_min((uint64_t)size, WORD_BYTES);
        error = load_summary(map, held);
        if (error == 0)
            error = vdf_bitmap_grow(map, pages > held * 8 ? pages : held * 8);
    }
    if (error != 0)
        vdf_bitmap_close(map);
    return error;
}

void vdf_bitmap_close(vdf_bitmap *map)
{
    vdf_guard_remove(map->guard);
    if (map->word != NULL)
        munmap((void *)map->word, WORD_BYTES);
    if (map->summary != NULL)
        munmap((void *)map->summary, SUMMARY_BYTES);
    if (map->fd >= 0)
        close(map->fd);
    memset(map, 0, sizeof *map);
    map->fd = -1;
}

int vdf_bitmap_grow(vdf_bitmap *map, uint64_t pages)
{
    uint64_t old = map_bytes(atomic_load(&map->capacity));
    uint64_t new = map_bytes(pages);

    if (map->fd < 0 || new <= old)
        return 0;
    if (new > WORD_BYTES)
        return -EFBIG;
    /* Blocks first: a store into a sparse map on a full disk is a SIGBUS. */
    int error;
    do {
        error = posix_fallocate(map->fd, 0, (off_t)new);
    } while (error == EINTR);
    if (error != 0)
        return -error;
    void *at = mmap((char *)map->word + old, new - old, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_FIXED, map->fd, (off_t)old);
    if (at == MAP_FAILED)
        return -errno;
    madvise(at, new - old, MADV_RANDOM); /* as in load_summary */
    atomic_store(&map->capacity, new * 8);
    return 0;
}

void vdf_bitmap_set(vdf_bitmap *map, uint64_t first, uint64_t count)
{
    uint64_t end = vdf_min(vdf_add(first, count), atomic_load(&map->capacity));

    while (first < end) {
        uint64_t stop = vdf_min(end, (first / 64 + 1) * 64);
        uint64_t mask = bits(first % 64, stop - first / 64 * 64);
        _Atomic uint64_t *word = &map->word[first / 64];
        if ((atomic_load(word) & mask) != mask) {
            summary_set(map, first / VDF_REGION_PAGES);
            /* Counted before it can be seen and cleared: the count never falls below 0. */
            atomic_fetch_add(&map->set, (uint64_t)__builtin_popcountll(mask));
            uint64_t old = atomic_fetch_or(word, mask);
            atomic_fetch_sub(&map->set, (uint64_t)__builtin_popcountll(mask & old));
            summary_set(map, first / VDF_REGION_PAGES);
        }
        first = stop;
    }
}

void vdf_bitmap_clear(vdf_bitmap *map, uint64_t first, uint64_t count)
{
    uint64_t end = vdf_min(vdf_add(first, count), atomic_load(&map->capacity));

    while (first < end) {
        uint64_t stop = vdf_min(end, (first / 64 + 1) * 64);
        uint64_t mask = bits(first % 64, stop - first / 64 * 64);
        _Atomic uint64_t *word = &map->word[first / 64];
        if (atomic_load(word) & mask) {
            uint64_t old = atomic_fetch_and(word, ~mask);
            atomic_fetch_sub(&map->set, (uint64_t)__builtin_popcountll(old & mask));
            if ((old & ~mask) == 0 && region_empty(map, first / VDF_REGION_PAGES))
                summary_clear(map, first / VDF_REGION_PAGES);
        }
        first = stop;
    }
}

bool vdf_bitmap_test(const vdf_bitmap *map, uint64_t page)
{
    return page < atomic_load(&map->capacity) &&
           (atomic_load(&map->word[page / 64]) >> (page % 64) & 1) != 0;
}

/* The first region at or after `region` whose summary is set, or `end`. */
static uint64_t next_region(const vdf_bitmap *map, uint64_t region, uint64_t end)
{
    while (region < end) {
        uint64_t word = atomic_load(&map->summary[region / 64]) >> (region % 64);
        if (word != 0)
            return vdf_min(end, region + (uint64_t)__builtin_ctzll(word));
        region = (region / 64 + 1) * 64;
    }
    return end;
}

uint64_t vdf_bitmap_next(const vdf_bitmap *map, uint64_t page, uint64_t end)
{
    uint64_t limit = vdf_min(end, atomic_load(&map->capacity));

    while (page < limit) {
        if (page % 64 == 0) {
            uint64_t region = page / VDF_REGION_PAGES;
            uint64_t found =
                next_region(map, region, vdf_add(limit, VDF_REGION_PAGES - 1) / VDF_REGION_PAGES);
            if (found != region) {
                page = found * VDF_REGION_PAGES;
                continue;
            }
        }
        uint64_t word = atomic_load(&map->word[page / 64]) >> (page % 64);
        if (word != 0) {
            page += (uint64_t)__builtin_ctzll(word);
            return page < limit ? page : end;
        }
        page = (page / 64 + 1) * 64;
    }
    return end;
}

uint64_t vdf_bitmap_next_clear(const vdf_bitmap *map, uint64_t page, uint64_t end)
{
    uint64_t limit = vdf_min(end, atomic_load(&map->capacity));

    while (page < limit) {
        uint64_t word = ~atomic_load(&map->word[page / 64]) >> (page % 64);
        if (word != 0)
            return vdf_min(end, page + (uint64_t)__builtin_ctzll(word));
        page = (page / 64 + 1) * 64;
    }
    return vdf_min(end, page);
}

uint64_t vdf_bitmap_count(const vdf_bitmap *map, uint64_t page, uint64_t end, uint64_t limit)
{
    uint64_t count = 0;

    for (page = vdf_bitmap_next(map, page, end); page < end && count < limit;
         page = vdf_bitmap_next(map, page, end)) {
        uint64_t clear = vdf_bitmap_next_clear(map, page, end);
        count += clear - page;
        page = clear;
    }
    return count;
}

void vdf_bitmap_reset(vdf_bitmap *map)
{
    uint64_t regions = atomic_load(&map->capacity) / VDF_REGION_PAGES;

    for (uint64_t r = next_region(map, 0, regions); r < regions;
         r = next_region(map, r + 1, regions)) {
        for (uint64_t i = 0; i < VDF_REGION_WORDS; i++)
            if (atomic_load(&map->word[r * VDF_REGION_WORDS + i]) != 0)
                atomic_store(&map->word[r * VDF_REGION_WORDS + i], 0);
        atomic_fetch_and(&map->summary[r / 64], ~(UINT64_C(1) << (r % 64)));
    }
    atomic_store(&map->set, 0);
}

void vdf_bitmap_merge(vdf_bitmap *into, const vdf_bitmap *from)
{
    uint64_t end = atomic_load(&from->capacity);

    for (uint64_t page = vdf_bitmap_next(from, 0, end); page < end;
         page = vdf_bitmap_next(from, page, end)) {
        uint64_t clear = vdf_bitmap_next_clear(from, page, end);
        vdf_bitmap_set(into, page, clear - page);
        page = clear;
    }
}

int vdf_bitmap_guard(vdf_bitmap *map, vdf_lost *lost)
{
    return vdf_guard_add((void *)map->word, WORD_BYTES, lost, &map->guard);
}

void vdf_bitmap_touch(vdf_bitmap *map)
{
    uint64_t regions = atomic_load(&map->capacity) / VDF_REGION_PAGES;

    for (uint64_t r = next_region(map, 0, regions); r < regions;
         r = next_region(map, r + 1, regions))
        atomic_fetch_or(&map->word[r * VDF_REGION_WORDS], 0);
}

int vdf_bitmap_sync(const vdf_bitmap *map)
{
    return map->fd < 0 || fdatasync(map->fd) == 0 ? 0 : -errno;
}
