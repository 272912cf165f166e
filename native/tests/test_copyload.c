/*
 * test_copyload.c - everything at once on a writable lazy image: writers of whole pages and of
 * parts, holes, a truncating thread, maps, fills and syncs; with a track, epochs are captured
 * meanwhile. Each writer knows what its pages hold. Meant for the sanitizers.
 */
#include "batches.h"
#include "copies.h"

#include <linux/falloc.h>

enum {
    WRITERS = 3,
    OWNED = 192, /* pages of each writer */
    TAIL = 64,   /* pages of the one who truncates */
    ALL = WRITERS * OWNED + TAIL,
    START = VDF_REGION_PAGES - ALL / 2, /* across the end of a region */
    ROUNDS = 8,
    STEPS = 300,
    BATCH = 64
};

#define SIZE ((START + ALL) * (uint64_t)VDF_PAGE_SIZE)

typedef struct writer {
    uint64_t first; /* pages from START on */
    uint64_t count;
    uint64_t seed;
} writer;

static scratch s;
static vdf_image *image;
static uint8_t model[ALL][VDF_PAGE_SIZE];
static batch_page shipped[ALL];
static atomic_bool stop;
static _Atomic unsigned working;
static _Atomic uint64_t waits;

static uint64_t at(uint64_t page)
{
    return (START + page) * VDF_PAGE_SIZE;
}

static void fetch_wants(uint64_t offset, uint64_t length)
{
    vdf_want want[2];
    unsigned count = vdf_lazy_edges(image, offset, length, want);

    for (unsigned i = 0; i < count; i++)
        copy_fetch(image, want[i].offset / VDF_PAGE_SIZE, want[i].length / VDF_PAGE_SIZE);
    atomic_fetch_add(&waits, 1);
}

static void write_some(uint64_t offset, uint64_t length, int byte)
{
    int error;

    while ((error = copy_put(image, offset, length, byte)) == -EAGAIN)
        fetch_wants(offset, length);
    CHECK(error == 0);
    memset(model[0] + (offset - at(0)), byte, length);
}

static void zero_some(uint64_t offset, uint64_t length, int mode)
{
    int error;

    while ((error = vdf_image_allocate(image, mode | FALLOC_FL_KEEP_SIZE, offset, length)) ==
           -EAGAIN)
        fetch_wants(offset, length);
    CHECK(error == 0);
    memset(model[0] + (offset - at(0)), 0, length);
}

static void *change(void *argument)
{
    const writer *self = argument;
    uint64_t state = self->seed;

    for (int i = 0; i < STEPS; i++) {
        uint64_t kind = scratch_random(&state) % 8;
        uint64_t unit = kind < 3 ? VDF_PAGE_SIZE : 1;
        uint64_t bytes = self->count * VDF_PAGE_SIZE;
        uint64_t offset = scratch_random(&state) % bytes / unit * unit;
        uint64_t length = (1 + scratch_random(&state) % (9 * VDF_PAGE_SIZE)) / unit * unit;
        length = vdf_min(length, bytes - offset);
        if (kind == 7)
            copy_check(image, START + self->first + offset / VDF_PAGE_SIZE,
                       model[self->first + offset / VDF_PAGE_SIZE]);
        else if (kind == 6 && length > 0)
            zero_some(at(self->first) + offset, length,
                      i % 2 ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE);
        else if (length > 0)
            write_some(at(self->first) + offset, length, 1 + (int)(scratch_random(&state) % 255));
    }
    atomic_fetch_sub(&working, 1);
    return NULL;
}

/* Owns the end of the disk. */
static void *truncate_some(void *argument)
{
    const writer *self = argument;
    uint64_t state = self->seed, size = SIZE;

    for (int i = 0; i < STEPS / 3; i++) {
        uint64_t offset = scratch_random(&state) % (TAIL * VDF_PAGE_SIZE);
        uint64_t wanted = at(self->first) + offset;
        int error;
        while ((error = vdf_image_truncate(image, wanted)) == -EAGAIN)
            copy_fetch(image, wanted / VDF_PAGE_SIZE, 1);
        CHECK(error == 0);
        memset(model[self->first] + offset, 0, TAIL * VDF_PAGE_SIZE - offset);
        size = wanted;
        uint64_t from = at(self->first) + scratch_random(&state) % (TAIL - 4) * VDF_PAGE_SIZE;
        if (i % 3 == 0)
            write_some(from + (uint64_t)i, 3 * VDF_PAGE_SIZE, 1 + i % 200);
        CHECK(vdf_image_size(image, &size) == 0);
        if (i % 2 == 0)
            CHECK(vdf_image_truncate(image, vdf_min(SIZE, size + 10000)) == 0);
        uint64_t page = self->first + scratch_random(&state) % TAIL;
        copy_check(image, START + page, model[page]);
    }
    CHECK(vdf_image_size(image, &size) == 0 && size <= SIZE);
    CHECK(vdf_image_truncate(image, SIZE) == 0);
    atomic_fetch_sub(&working, 1);
    return NULL;
}

static void *hydrate(void *argument)
{
    uint64_t state = (uint64_t)(uintptr_t)argument * 977 + 3;

    while (!atomic_load(&stop)) {
        uint64_t page = scratch_random(&state) % ALL;
        copy_fetch(image, START + page, 1 + scratch_random(&state) % vdf_min(16, ALL - page));
        vdf_sleep_ns(200 * 1000);
    }
    return NULL;
}

static void *sync_often(void *argument)
{
    for (int i = 0; !atomic_load(&stop); i++) {
        if (argument != NULL)
            CHECK(vdf_image_sync(image, i % 2) == 0);
        else
            CHECK(vdf_image_presence_commit(image) == 0);
        (void)vdf_image_seek(image, at((uint64_t)i * 7 % ALL), i % 2 ? SEEK_DATA : SEEK_HOLE);
        vdf_sleep_ns(300 * 1000);
    }
    return NULL;
}

/* Lays an epoch over what was shipped, as a delta does. */
static void capture(void)
{
    static uint64_t pageno[BATCH], sum[BATCH];
    static uint8_t zero[BATCH], data[BATCH * VDF_PAGE_SIZE];
    vdf_batch batch = {.pageno = pageno, .sum = sum, .zero = zero, .data = data, .capacity = BATCH};
    uint64_t cursor = 0;
    vdf_seal seal;

    CHECK(vdf_seal_images(&image, 1, &seal) == 0);
    uint64_t cut = vdf_pages_of(seal.cut);
    if (cut < START + ALL)
        memset(shipped[cut - START], 0, (START + ALL - cut) * VDF_PAGE_SIZE);
    do {
        CHECK(vdf_capture_next(image, &cursor, &batch) == 0);
        for (uint32_t i = 0; i < batch.count; i++) {
            CHECK(pageno[i] >= START);
            pageno[i] -= START;
        }
        batch_lay(&batch, shipped, ALL);
    } while (batch.count != 0);
    CHECK(vdf_capture_forget(image) == 0);
}

static void run(uint64_t round, bool tracked)
{
    pthread_t thread[WRITERS + 5];
    writer of[WRITERS + 1];
    unsigned count = 0;

    atomic_store(&stop, false);
    atomic_store(&working, WRITERS + 1);
    for (unsigned i = 0; i <= WRITERS; i++) {
        of[i] = (writer){(uint64_t)i * OWNED, i < WRITERS ? OWNED : TAIL, round * 31 + i + 1};
        CHECK(pthread_create(&thread[count++], NULL, i < WRITERS ? change : truncate_some,
                             &of[i]) == 0);
    }
    CHECK(pthread_create(&thread[count++], NULL, hydrate, (void *)1) == 0);
    CHECK(pthread_create(&thread[count++], NULL, hydrate, (void *)2) == 0);
    CHECK(pthread_create(&thread[count++], NULL, sync_often, (void *)1) == 0);
    CHECK(pthread_create(&thread[count++], NULL, sync_often, NULL) == 0);
    while (atomic_load(&working) != 0) {
        if (tracked)
            capture();
        vdf_sleep_ns(1000 * 1000);
    }
    atomic_store(&stop, true);
    for (unsigned i = 0; i < count; i++)
        CHECK(pthread_join(thread[i], NULL) == 0);
}

static void check_all(void)
{
    for (uint64_t page = 0; page < ALL; page++)
        copy_check(image, START + page, model[page]);
    copy_check_base(image, 3);
}

static void play(uint64_t round, bool tracked)
{
    CHECK(truncate(s.file, 0) == 0 && truncate(s.file, (off_t)SIZE) == 0);
    CHECK(nftw(s.tracks, scratch_remove_one, 16, FTW_DEPTH | FTW_PHYS) == 0);
    CHECK(mkdir(s.tracks, 0700) == 0);
    for (uint64_t page = 0; page < ALL; page++)
        copy_base(START + page, model[page]);
    memcpy(shipped, model, sizeof shipped);
    copy_create(&s, SIZE, 0, NULL, 0);
    image = copy_open(&s, 0);
    if (tracked) {
        CHECK(vdf_track_open(s.tracks, SIZE, VDF_TRACK_NEW, &s.track) == 0);
        CHECK(vdf_track_set_epoch(s.track, 1, SIZE) == 0);
        CHECK(vdf_image_set_track(image, s.track) == 0);
        CHECK(vdf_image_begin_intent(image) == 0);
    }
    run(round, tracked);
    if (tracked) {
        capture();
        CHECK(memcmp(shipped, model, sizeof shipped) == 0);
        /* Fetching the rest is no change. */
        check_all();
        vdf_track_counts counts;
        vdf_track_counts_get(s.track, &counts);
        CHECK(counts.dirty_pages == 0 && !counts.changed);
        CHECK(vdf_image_set_track(image, NULL) == 0);
        vdf_track_close(s.track);
    } else if (round % 4 == 0) {
        check_all();
    }
    CHECK(vdf_image_sync(image, 1) == 0);
    for (unsigned i = 0; i < 2; i++) {
        vdf_image_unref(image);
        image = copy_open(&s, i == 0 ? VDF_PRESENCE_TRUST : 0);
        check_all();
    }
    vdf_image_unref(image);
}

int main(void)
{
    scratch_make(&s, SIZE);
    for (uint64_t round = 0; round < ROUNDS; round++)
        play(round, round % 2 != 0);
    CHECK(atomic_load(&waits) > 0);
    printf("%llu changes waited\n", (unsigned long long)waits);
    scratch_remove(&s);
    return 0;
}
