/* pages.c - sums and zero tests of pages. Pure functions, any thread. */
#include "internal.h"

#include <string.h>
#include <xxhash.h>

void vdf_pages_sum(const uint8_t *data, uint64_t count, uint64_t *sums)
{
    for (uint64_t i = 0; i < count; i++)
        sums[i] = XXH3_64bits(data + i * VDF_PAGE_SIZE, VDF_PAGE_SIZE);
}

static bool page_is_zero(const uint8_t *page)
{
    uint64_t first;

    memcpy(&first, page, sizeof first);
    if (first != 0)
        return false;
    /* Every byte equals the one before it, and the first is zero. */
    return memcmp(page, page + 1, VDF_PAGE_SIZE - 1) == 0;
}

void vdf_pages_zero(const uint8_t *data, uint64_t count, uint8_t *zero)
{
    for (uint64_t i = 0; i < count; i++)
        zero[i] = page_is_zero(data + i * VDF_PAGE_SIZE);
}

int64_t vdf_pages_verify(const uint8_t *data, uint64_t count, const uint64_t *sums)
{
    for (uint64_t i = 0; i < count; i++)
        if (XXH3_64bits(data + i * VDF_PAGE_SIZE, VDF_PAGE_SIZE) != sums[i])
            return (int64_t)i;
    return -1;
}
