/* copies.h - a writable lazy image over a base that is a function of the page number. */
#ifndef VDF_TESTS_COPIES_H
#define VDF_TESTS_COPIES_H

#include "internal.h"
#include "scratch.h"

/* Every fourth page of the base is zero. */
static inline void copy_base(uint64_t page, uint8_t *data)
{
    uint64_t state = (page + 1) * 2654435761u;

    memset(data, 0, VDF_PAGE_SIZE);
    for (uint64_t i = 0; i < VDF_PAGE_SIZE / 8 && page % 4 != 0; i++) {
        uint64_t word = scratch_random(&state);
        memcpy(data + 8 * i, &word, 8);
    }
}

static inline void copy_map(vdf_image *image, uint64_t region)
{
    uint64_t words[VDF_REGION_WORDS];

    memset(words, 0xee, sizeof words);
    CHECK(vdf_image_map(image, region, 1, words) == 0);
}

/* What Python does with a WANT: map, fill. The base has whole pages, its last one padded. */
static inline void copy_fetch(vdf_image *image, uint64_t page, uint64_t count)
{
    static _Thread_local uint8_t data[64 * VDF_PAGE_SIZE];

    CHECK(count <= 64);
    copy_map(image, page / VDF_REGION_PAGES);
    copy_map(image, (page + count - 1) / VDF_REGION_PAGES);
    for (uint64_t i = 0; i < count; i++)
        copy_base(page + i, data + i * VDF_PAGE_SIZE);
    CHECK(vdf_image_fill(image, page * VDF_PAGE_SIZE, count * VDF_PAGE_SIZE, data, NULL) == 0);
}

/* Reads one page, fetched where it is absent; what is beyond the end is zero. */
static inline void copy_read(vdf_image *image, uint64_t page, uint8_t *data)
{
    int64_t got;

    memset(data, 0, VDF_PAGE_SIZE);
    while ((got = vdf_image_read(image, page * VDF_PAGE_SIZE, VDF_PAGE_SIZE, data)) == -EAGAIN)
        copy_fetch(image, page, 1);
    CHECK(got >= 0);
}

static inline void copy_check(vdf_image *image, uint64_t page, const uint8_t *expected)
{
    uint8_t data[VDF_PAGE_SIZE];

    copy_read(image, page, data);
    CHECK(memcmp(data, expected, VDF_PAGE_SIZE) == 0);
}

static inline void copy_check_base(vdf_image *image, uint64_t page)
{
    uint8_t data[VDF_PAGE_SIZE];

    copy_base(page, data);
    copy_check(image, page, data);
}

static inline void copy_check_byte(vdf_image *image, uint64_t page, int byte)
{
    uint8_t data[VDF_PAGE_SIZE];

    memset(data, byte, sizeof data);
    copy_check(image, page, data);
}

/* `count` pages of one byte from `offset` on. */
static inline int copy_put(vdf_image *image, uint64_t offset, uint64_t length, int byte)
{
    static _Thread_local uint8_t data[64 * VDF_PAGE_SIZE];

    CHECK(length <= sizeof data);
    memset(data, byte, length);
    return vdf_image_write(image, offset, length, data);
}

static inline int copy_dir(const scratch *s)
{
    int fd = open(s->tracks, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    CHECK(fd >= 0);
    return fd;
}

static inline void copy_create(const scratch *s, uint64_t size, unsigned flags,
                               const uint64_t *absent, uint64_t count)
{
    int dir = copy_dir(s);

    CHECK(vdf_presence_create(dir, size, flags, absent, count) == 0);
    CHECK(vdf_presence_create(dir, size, flags, absent, count) == -EEXIST);
    close(dir);
}

static inline vdf_image *copy_open(scratch *s, unsigned flags)
{
    vdf_image *image = scratch_image(s, VDF_IMAGE_LAZY, O_RDWR);
    int dir = copy_dir(s);

    CHECK(vdf_image_presence_open(image, dir, flags) == 0);
    CHECK(vdf_image_presence_open(image, dir, flags) == -EBUSY);
    close(dir);
    return image;
}

static inline vdf_presence_counts copy_counts(vdf_image *image)
{
    vdf_presence_counts counts;

    CHECK(vdf_presence_counts_get(image, &counts) == 0);
    return counts;
}

#endif
