/* test_pages.c - sums and zero tests of pages agree with plain versions of them. */
#include "check.h"
#include "vdf.h"

#include <string.h>

enum {
    COUNT = 64
};

static uint8_t data[COUNT * VDF_PAGE_SIZE];

static void test_a_sum_depends_on_each_byte(void)
{
    uint64_t sums[COUNT], again[COUNT];

    memset(data, 0, sizeof data);
    vdf_pages_sum(data, COUNT, sums);
    for (int i = 1; i < COUNT; i++)
        CHECK(sums[i] == sums[0]);
    for (size_t at = 0; at < VDF_PAGE_SIZE; at += 17) {
        data[at] = 1;
        vdf_pages_sum(data, 1, again);
        CHECK(again[0] != sums[0]);
        CHECK(vdf_pages_verify(data, COUNT, sums) == 0);
        data[at] = 0;
    }
    CHECK(vdf_pages_verify(data, COUNT, sums) == -1);
    CHECK(vdf_pages_verify(data, 0, sums) == -1);
}

static void test_one_byte_makes_a_page_not_zero(void)
{
    uint8_t zero[COUNT];

    memset(data, 0, sizeof data);
    vdf_pages_zero(data, COUNT, zero);
    for (int i = 0; i < COUNT; i++)
        CHECK(zero[i] == 1);
    for (size_t at = 0; at < VDF_PAGE_SIZE; at++) {
        size_t page = at % COUNT;
        data[page * VDF_PAGE_SIZE + at] = 128;
        vdf_pages_zero(data, COUNT, zero);
        for (size_t i = 0; i < COUNT; i++)
            CHECK(zero[i] == (i != page));
        data[page * VDF_PAGE_SIZE + at] = 0;
    }
}

static void test_pages_need_no_alignment(void)
{
    uint64_t sum, moved;
    uint8_t zero;
    static uint8_t shifted[VDF_PAGE_SIZE + 8];

    for (size_t i = 0; i < VDF_PAGE_SIZE; i++)
        data[i] = (uint8_t)(i * 7 + i / 256);
    vdf_pages_sum(data, 1, &sum);
    for (size_t shift = 0; shift < 8; shift++) {
        memcpy(shifted + shift, data, VDF_PAGE_SIZE);
        vdf_pages_sum(shifted + shift, 1, &moved);
        vdf_pages_zero(shifted + shift, 1, &zero);
        CHECK(moved == sum && zero == 0);
    }
}

int main(void)
{
    test_a_sum_depends_on_each_byte();
    test_one_byte_makes_a_page_not_zero();
    test_pages_need_no_alignment();
    return 0;
}
