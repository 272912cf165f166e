/* test_bitmap.c - a page bitmap against an array of bytes, with growth and reopening. */
#include "internal.h"
#include "scratch.h"

enum {
    PAGES = 3 * 32768
};

static uint8_t model[PAGES];
static uint64_t state = 88172645463325252u;

static void compare(const vdf_bitmap *map, uint64_t from, uint64_t end)
{
    uint64_t next = end, clear = end, count = 0;

    for (uint64_t i = end; i-- > from;) {
        if (model[i])
            next = i;
        else
            clear = i;
        count += model[i];
    }
    CHECK(vdf_bitmap_next(map, from, end) == next);
    CHECK(vdf_bitmap_next_clear(map, from, end) == clear);
    CHECK(vdf_bitmap_count(map, from, end, UINT64_MAX) == count);
}

static void check_all(const vdf_bitmap *map, uint64_t capacity)
{
    uint64_t set = 0;

    for (uint64_t i = 0; i < capacity; i++) {
        CHECK(vdf_bitmap_test(map, i) == (model[i] != 0));
        set += model[i];
    }
    CHECK(atomic_load(&map->set) == set);
    /* Invariant: a region with a page has its summary bit; without one it may not cost a scan. */
    for (uint64_t r = 0; r < capacity / VDF_REGION_PAGES; r++) {
        bool any = memchr(model + r * VDF_REGION_PAGES, 1, VDF_REGION_PAGES) != NULL;
        CHECK(((atomic_load(&map->summary[r / 64]) >> (r % 64)) & 1) == any);
    }
}

static uint64_t operate(vdf_bitmap *map, uint64_t capacity)
{
    uint64_t first = scratch_random(&state) % capacity;
    uint64_t count = scratch_random(&state) % (scratch_random(&state) % 8 == 0 ? 20000 : 100);
    uint64_t end = vdf_min(first + count, capacity);

    switch (scratch_random(&state) % 6) {
    case 0:
    case 1:
        vdf_bitmap_set(map, first, count); /* beyond the capacity nothing happens */
        memset(model + first, 1, end - first);
        break;
    case 2:
    case 3:
        vdf_bitmap_clear(map, first, count);
        memset(model + first, 0, end - first);
        break;
    case 4:
        compare(map, first, end);
        break;
    default:
        if (scratch_random(&state) % 50 == 0) {
            vdf_bitmap_reset(map);
            memset(model, 0, sizeof model);
        }
        break;
    }
    return capacity;
}

static void random_operations(void)
{
    scratch s;
    vdf_bitmap map, other;

    scratch_make(&s, 0);
    CHECK(vdf_bitmap_open(&map, open(s.file, O_RDWR | O_CLOEXEC), 1) == 0);
    uint64_t capacity = atomic_load(&map.capacity);
    CHECK(capacity == 32768);
    for (int i = 0; i < 3000; i++) {
        operate(&map, capacity);
        if (i % 1000 == 999) {
            check_all(&map, capacity);
            if (capacity < PAGES) {
                CHECK(vdf_bitmap_grow(&map, capacity + 1) == 0);
                capacity = atomic_load(&map.capacity);
            }
        }
    }
    vdf_bitmap_set(&map, 40000, 7);
    memset(model + 40000, 1, 7);
    CHECK(vdf_bitmap_open(&other, -1, 0) == 0);
    vdf_bitmap_set(&other, 5, 1);
    vdf_bitmap_set(&map, 5, 1);
    model[5] = 1;
    vdf_bitmap_merge(&other, &map);
    compare(&other, 0, PAGES);
    vdf_bitmap_close(&other);
    vdf_bitmap_close(&map);
    CHECK(vdf_bitmap_open(&map, open(s.file, O_RDWR | O_CLOEXEC), 1) == 0);
    check_all(&map, capacity);
    CHECK(vdf_bitmap_grow(&map, VDF_MAX_PAGES + 1) == -EFBIG);
    vdf_bitmap_close(&map);
    scratch_remove(&s);
}

static void *set_and_clear(void *argument)
{
    vdf_bitmap *map = argument;
    uint64_t seed = (uint64_t)(uintptr_t)&seed | 1;

    for (int i = 0; i < 20000; i++) {
        uint64_t page = scratch_random(&seed) % 8192;
        vdf_bitmap_set(map, page, 3);
        CHECK(atomic_load(&map->set) < 20000);
        vdf_bitmap_clear(map, page, 3);
    }
    return NULL;
}

/* Setters and clearers at once: the count and the summary are right when they are through. */
static void concurrent_operations(void)
{
    pthread_t thread[4];
    vdf_bitmap map;

    CHECK(vdf_bitmap_open(&map, -1, 0) == 0);
    for (int i = 0; i < 4; i++)
        CHECK(pthread_create(&thread[i], NULL, set_and_clear, &map) == 0);
    for (int i = 0; i < 4; i++)
        pthread_join(thread[i], NULL);
    CHECK(atomic_load(&map.set) == 0);
    CHECK(vdf_bitmap_next(&map, 0, 1 << 20) == 1 << 20);
    vdf_bitmap_set(&map, 4095, 2);
    CHECK(vdf_bitmap_next(&map, 0, 1 << 20) == 4095);
    CHECK(vdf_bitmap_next(&map, 4096, 1 << 20) == 4096);
    vdf_bitmap_close(&map);
}

int main(void)
{
    random_operations();
    concurrent_operations();
    return 0;
}
