/* test_lazy.c - an image whose bytes arrive when they are asked for. */
#include "internal.h"
#include "scratch.h"

#include <stdlib.h>

#define SIZE (3 * (uint64_t)VDF_REGION_SIZE - 1000)

static uint8_t *data;

static void map_fill_evict(vdf_image *image)
{
    uint64_t words[2 * VDF_REGION_WORDS] = {0};
    uint8_t page[2 * VDF_PAGE_SIZE];
    uint64_t filled;

    CHECK(vdf_image_read(image, 0, 1, page) == -EAGAIN);
    CHECK(vdf_image_seek(image, 0, SEEK_DATA) == -EAGAIN);
    CHECK(!vdf_image_is_mapped(image, 0) && !vdf_image_is_present(image, 0, 1));
    words[0] = 0x8000000000000006;        /* pages 1, 2, 63 */
    words[1] = 1;                         /* page 64 */
    words[VDF_REGION_WORDS] = UINT64_MAX; /* the first 64 of region 1 */
    CHECK(vdf_image_map(image, 0, 2, words) == 0);
    CHECK(vdf_image_read(image, 0, 4096, page) == 4096 && page[0] == 0);
    CHECK(vdf_image_read(image, 4095, 2, page) == -EAGAIN);
    CHECK(vdf_image_seek(image, 0, SEEK_DATA) == 4096);
    CHECK(vdf_image_seek(image, 4097, SEEK_DATA) == 4097);
    CHECK(vdf_image_seek(image, 4096, SEEK_HOLE) == 3 * 4096);
    CHECK(vdf_image_seek(image, 3 * 4096, SEEK_DATA) == 63 * 4096);
    CHECK(vdf_image_seek(image, 63 * 4096, SEEK_HOLE) == 65 * 4096);
    CHECK(vdf_image_seek(image, 65 * 4096, SEEK_DATA) == VDF_REGION_SIZE);
    CHECK(vdf_image_seek(image, VDF_REGION_SIZE + 64 * 4096, SEEK_DATA) == -EAGAIN);
    /* Only absent pages are filled: page 0 is known to be zero. */
    memset(data, 7, 64 * 4096);
    CHECK(vdf_image_fill(image, 0, 64 * 4096, data, &filled) == 0 && filled == 3 * 4096);
    CHECK(vdf_image_fill(image, 0, 64 * 4096, data, &filled) == 0 && filled == 0);
    CHECK(vdf_image_read(image, 4000, 8192, page) == 8192);
    CHECK(page[95] == 0 && page[96] == 7 && page[8191] == 7);
    CHECK(vdf_image_seek(image, 0, SEEK_DATA) == 4096);
    /* The last region is zeros; its last page is short. */
    CHECK(vdf_image_map(image, 2, 1, NULL) == 0);
    CHECK(vdf_image_read(image, SIZE - 10, 4096, page) == 10);
    CHECK(vdf_image_read(image, SIZE, 4096, page) == 0);
    CHECK(vdf_image_read(image, UINT64_MAX, UINT64_MAX, page) == 0);
    CHECK(vdf_image_seek(image, 2 * (uint64_t)VDF_REGION_SIZE, SEEK_DATA) == -ENXIO);
    CHECK(vdf_image_evict(image, 0, 1) == 0);
    CHECK(vdf_image_read(image, 0, 1, page) == -EAGAIN);
    CHECK(vdf_image_map(image, 0, 1, NULL) == 0);
    CHECK(vdf_image_read(image, 4096, 1, page) == 1 && page[0] == 0);
    CHECK(vdf_image_fill(image, 1, 4096, data, NULL) == -EINVAL);
    CHECK(vdf_image_fill(image, 0, 4095, data, NULL) == -EINVAL);
    CHECK(vdf_image_fill(image, UINT64_MAX - 4095, 4096, data, NULL) == -EINVAL);
    CHECK(vdf_image_map(image, UINT64_MAX, 2, NULL) == -EINVAL);
    CHECK(vdf_image_evict(image, 1, UINT64_MAX) == -EINVAL);
    CHECK(vdf_image_write(image, 0, 1, data) == -EROFS);
}

static atomic_bool stop;

static void *read_all(void *argument)
{
    uint8_t page[VDF_PAGE_SIZE];
    uint64_t state = 99;

    while (!atomic_load(&stop)) {
        uint64_t at = scratch_random(&state) % 1024;
        int64_t got = vdf_image_read(argument, at * VDF_PAGE_SIZE, VDF_PAGE_SIZE, page);
        CHECK(got == -EAGAIN || (got == VDF_PAGE_SIZE && page[0] == 9 && page[4095] == 9));
    }
    return NULL;
}

/* Readers, fills and evictions at once: a page is either absent or right. */
static void concurrent(vdf_image *image)
{
    uint64_t words[VDF_REGION_WORDS] = {0};
    pthread_t thread[3];

    CHECK(vdf_image_evict(image, 0, 3) == 0);
    memset(words, 0xff, 16 * sizeof *words);
    memset(data, 9, 1024 * VDF_PAGE_SIZE);
    for (int i = 0; i < 3; i++)
        CHECK(pthread_create(&thread[i], NULL, read_all, image) == 0);
    for (int i = 0; i < 40; i++) {
        CHECK(vdf_image_map(image, 0, 1, words) == 0);
        for (uint64_t at = 0; at < 1024; at += 128)
            CHECK(vdf_image_fill(image, at * VDF_PAGE_SIZE, 128 * VDF_PAGE_SIZE, data, NULL) == 0);
        CHECK(vdf_image_is_present(image, 0, 1024 * VDF_PAGE_SIZE));
        CHECK(vdf_image_evict(image, 0, 1) == 0);
    }
    atomic_store(&stop, true);
    for (int i = 0; i < 3; i++)
        pthread_join(thread[i], NULL);
}

int main(void)
{
    scratch s;

    data = calloc(1024, VDF_PAGE_SIZE);
    scratch_make(&s, SIZE);
    vdf_image *image = scratch_image(&s, VDF_IMAGE_LAZY | VDF_IMAGE_READONLY, O_RDWR);
    CHECK(vdf_image_set_track(image, NULL) == -EINVAL);
    map_fill_evict(image);
    concurrent(image);
    vdf_image_unref(image);
    scratch_remove(&s);
    free(data);
    return 0;
}
