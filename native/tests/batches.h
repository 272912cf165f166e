/* batches.h - what captured pages make of a disk that is an array of pages. */
#ifndef VDF_TESTS_BATCHES_H
#define VDF_TESTS_BATCHES_H

#include "check.h"
#include "vdf.h"

#include <stdint.h>
#include <string.h>

typedef uint64_t batch_page[VDF_PAGE_SIZE / 8];

/* Lays the pages of a batch over the disk, which has `count` pages, and checks their sums. */
static inline void batch_lay(const vdf_batch *batch, batch_page *disk, uint64_t count)
{
    const uint8_t *data = batch->data;

    for (uint32_t i = 0; i < batch->count; i++) {
        CHECK(batch->pageno[i] < count);
        if (batch->zero[i]) {
            memset(disk[batch->pageno[i]], 0, VDF_PAGE_SIZE);
            continue;
        }
        CHECK(vdf_pages_verify(data, 1, &batch->sum[i]) == -1);
        memcpy(disk[batch->pageno[i]], data, VDF_PAGE_SIZE);
        data += VDF_PAGE_SIZE;
    }
    CHECK(data == batch->data + (uint64_t)batch->data_pages * VDF_PAGE_SIZE);
}

#endif
