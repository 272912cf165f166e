/* test_image.c - an untracked image against plain bytes, and requests out of all bounds. */
#include "internal.h"
#include "scratch.h"

#include <linux/falloc.h>
#include <stdlib.h>

#define SIZE 300000u

static uint8_t model[4 * SIZE];
static uint8_t data[4 * SIZE];

static void random_operations(scratch *s)
{
    uint64_t state = 42, length = SIZE, size;

    for (int i = 0; i < 600; i++) {
        uint64_t offset = scratch_random(&state) % (2 * SIZE);
        uint64_t count = 1 + scratch_random(&state) % 70000;
        uint64_t end = vdf_min(offset + count, length);
        int keep = scratch_random(&state) % 2 ? FALLOC_FL_KEEP_SIZE : 0;
        switch (scratch_random(&state) % 5) {
        case 0:
            memset(data, i | 1, count);
            CHECK(vdf_image_write(s->image, offset, count, data) == 0);
            memcpy(model + offset, data, count);
            length = offset + count > length ? offset + count : length;
            break;
        case 1:
            CHECK(vdf_image_allocate(s->image, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset,
                                     count) == 0);
            if (end > offset)
                memset(model + offset, 0, end - offset);
            break;
        case 2: {
            int error = vdf_image_allocate(s->image, FALLOC_FL_ZERO_RANGE | keep, offset, count);
            if (error == -EOPNOTSUPP) /* tmpfs */
                break;
            CHECK(error == 0);
            if (end > offset)
                memset(model + offset, 0, end - offset);
            length = !keep && offset + count > length ? offset + count : length;
            break;
        }
        case 3:
            CHECK(vdf_image_allocate(s->image, keep, offset, count) == 0);
            length = !keep && offset + count > length ? offset + count : length;
            break;
        default:
            CHECK(vdf_image_truncate(s->image, offset) == 0);
            if (offset < length)
                memset(model + offset, 0, length - offset);
            length = offset;
            break;
        }
        CHECK(vdf_image_size(s->image, &size) == 0 && size == length);
        CHECK(vdf_image_read(s->image, 0, sizeof data, data) == (int64_t)length);
        CHECK(memcmp(data, model, length) == 0);
    }
    CHECK(vdf_image_sync(s->image, 1) == 0 && vdf_image_sync_internal(s->image) == 0);
}

static void out_of_bounds(vdf_image *image)
{
    const uint64_t huge[] = {UINT64_MAX, INT64_MAX, (uint64_t)INT64_MAX + 1, UINT64_MAX - 4095,
                             UINT64_C(1) << 46};
    const int mode[] = {0,
                        FALLOC_FL_KEEP_SIZE,
                        FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                        FALLOC_FL_ZERO_RANGE,
                        0x40,
                        -1};
    uint8_t byte = 1;
    uint64_t before, after;

    CHECK(vdf_image_size(image, &before) == 0);
    for (size_t i = 0; i < sizeof huge / sizeof *huge; i++) {
        CHECK(vdf_image_write(image, huge[i], 1, &byte) == -EFBIG);
        CHECK(vdf_image_read(image, huge[i], 4096, data) <= 0);
        CHECK(vdf_image_seek(image, huge[i], SEEK_DATA) == -ENXIO);
        CHECK(vdf_image_seek(image, huge[i], SEEK_HOLE) == -ENXIO);
        for (size_t m = 0; m < sizeof mode / sizeof *mode; m++) {
            CHECK(vdf_image_allocate(image, mode[m], huge[i], 4096) < 0);
            CHECK(vdf_image_allocate(image, mode[m], 4096, huge[i]) < 0);
            CHECK(vdf_image_allocate(image, mode[m], huge[i], huge[i]) < 0);
            CHECK(vdf_image_allocate(image, mode[m], 0, 0) == -EINVAL);
        }
        if (huge[i] > UINT64_C(1) << 46)
            CHECK(vdf_image_truncate(image, huge[i]) == -EFBIG);
    }
    CHECK(vdf_image_seek(image, 0, SEEK_SET) == -EINVAL);
    CHECK(vdf_image_size(image, &after) == 0 && after == before);
}

static void readonly(scratch *s)
{
    uint8_t byte = 1;
    vdf_image *image = scratch_image(s, VDF_IMAGE_READONLY, O_RDONLY);

    CHECK(vdf_image_write(image, 0, 1, &byte) == -EROFS);
    CHECK(vdf_image_allocate(image, 0, 0, 1) == -EROFS);
    CHECK(vdf_image_truncate(image, 0) == -EROFS);
    CHECK(vdf_image_read(image, 0, 1, &byte) == 1);
    CHECK(vdf_image_sync(image, 0) == 0);
    vdf_image_unref(image);
}

int main(void)
{
    scratch s;

    scratch_make(&s, SIZE);
    s.image = scratch_image(&s, 0, O_RDWR);
    random_operations(&s);
    CHECK(vdf_image_truncate(s.image, 0) == 0 && vdf_image_truncate(s.image, SIZE) == 0);
    CHECK(vdf_image_write(s.image, 131072, 1, (const uint8_t *)"x") == 0);
    CHECK(vdf_image_seek(s.image, 0, SEEK_DATA) == 131072);
    CHECK(vdf_image_seek(s.image, 131072, SEEK_HOLE) > 131072);
    out_of_bounds(s.image);
    CHECK(vdf_track_open(s.tracks, SIZE, VDF_TRACK_NEW, &s.track) == 0);
    CHECK(vdf_image_set_track(s.image, s.track) == 0);
    out_of_bounds(s.image);
    CHECK(vdf_track_mark(s.image, UINT64_MAX, UINT64_MAX) == -EFBIG);
    CHECK(vdf_suspect_mark(s.image, 4096, UINT64_MAX) == -EFBIG);
    scratch_close(&s);
    readonly(&s);
    scratch_remove(&s);
    return 0;
}
