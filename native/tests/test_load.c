/*
 * test_load.c - everything at once on one image for two seconds: writers, readers, a
 * discarder, a resizer, syncs, a pass over suspect pages, and seals captured meanwhile.
 *
 * Content is checked all the time: what a reader sees, what every captured epoch holds of
 * each writer (as in test_seal.c), and at the end that the captured epochs laid over each
 * other are the image, byte for byte. Meant for the sanitizers.
 */
#include "batches.h"
#include "internal.h"
#include "scratch.h"

#include <linux/falloc.h>
#include <time.h>

enum {
    WRITERS = 3,
    READERS = 2,
    PAGES = 128, /* of each writer */
    OWNED = WRITERS * PAGES,
    HOLES = 128,           /* pages that the discarder fills and punches */
    FIXED = OWNED + HOLES, /* the size is never below these */
    TAIL = 96,             /* what the resizer adds and takes away */
    ALL = FIXED + TAIL,
    WORDS = VDF_PAGE_SIZE / 8,
    BATCH = 64,
    SECONDS = 2
};

typedef struct writer {
    uint64_t first;
    _Atomic uint64_t begun;
    _Atomic uint64_t completed;
} writer;

static vdf_image *image;
static vdf_track *track;
static writer writers[WRITERS];
static atomic_bool stop;
static _Atomic uint64_t reads, discards, resizes, passes;
static uint64_t shipped[ALL][WORDS]; /* what the captured epochs make of the disk */

static void write_page(uint64_t page, uint64_t value)
{
    uint64_t words[WORDS];

    for (size_t i = 0; i < WORDS; i++)
        words[i] = value;
    CHECK(vdf_image_write(image, page * VDF_PAGE_SIZE, VDF_PAGE_SIZE, (const uint8_t *)words) == 0);
}

static void *write_pages(void *argument)
{
    writer *self = argument;

    for (uint64_t number = 1; !atomic_load(&stop); number++) {
        atomic_store(&self->begun, number);
        write_page(self->first + number % PAGES, number);
        atomic_store(&self->completed, number);
    }
    return NULL;
}

/* The newest write to page p of a writer whose newest write is `newest`; 0: none yet. */
static uint64_t newest_at(uint64_t newest, uint64_t p)
{
    uint64_t back = (newest + PAGES - p) % PAGES;

    return newest > back ? newest - back : 0;
}

static void *read_pages(void *argument)
{
    uint64_t state = (uint64_t)(uintptr_t)argument * 77 + 1;
    uint64_t words[WORDS];

    while (!atomic_load(&stop)) {
        const writer *of = &writers[scratch_random(&state) % WRITERS];
        uint64_t p = scratch_random(&state) % PAGES;
        uint64_t least = newest_at(atomic_load(&of->completed), p);
        CHECK(vdf_image_read(image, (of->first + p) * VDF_PAGE_SIZE, VDF_PAGE_SIZE,
                             (uint8_t *)words) == VDF_PAGE_SIZE);
        uint64_t most = atomic_load(&of->begun);
        for (size_t i = 0; i < WORDS; i++) /* a read beside a write may see some of both */
            CHECK(words[i] >= least && words[i] <= most &&
                  (words[i] == 0 || words[i] % PAGES == p));
        atomic_fetch_add(&reads, 1);
    }
    return NULL;
}

static void *discard(void *argument)
{
    uint64_t state = 4711;

    (void)argument;
    while (!atomic_load(&stop)) {
        uint64_t page = OWNED + scratch_random(&state) % HOLES;
        uint64_t count = 1 + scratch_random(&state) % (ALL - TAIL - page);
        for (uint64_t i = 0; i < count && i < 4; i++)
            write_page(page + i, page + i);
        int mode = scratch_random(&state) % 2 ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE;
        CHECK(vdf_image_allocate(image, mode | FALLOC_FL_KEEP_SIZE, page * VDF_PAGE_SIZE,
                                 count * VDF_PAGE_SIZE) == 0);
        atomic_fetch_add(&discards, 1);
    }
    return NULL;
}

/* Grows by writing behind the end, shrinks by truncating; alone, so that it knows the size. */
static void *resize(void *argument)
{
    uint64_t state = 1147;

    (void)argument;
    while (!atomic_load(&stop)) {
        uint64_t page = FIXED + scratch_random(&state) % TAIL;
        write_page(page, page);
        uint64_t size = FIXED * VDF_PAGE_SIZE + scratch_random(&state) % (TAIL * VDF_PAGE_SIZE);
        CHECK(vdf_image_truncate(image, size) == 0);
        atomic_fetch_add(&resizes, 1);
    }
    return NULL;
}

static void *pass(void *argument)
{
    static uint64_t pageno[BATCH], sum[BATCH];
    static uint8_t zero[BATCH], data[BATCH * VDF_PAGE_SIZE];
    vdf_batch batch = {.pageno = pageno, .sum = sum, .zero = zero, .data = data, .capacity = BATCH};
    uint64_t state = 31;
    vdf_track_counts counts;

    (void)argument;
    while (!atomic_load(&stop)) {
        uint64_t cursor = 0;
        CHECK(vdf_suspect_mark(image, scratch_random(&state) % (OWNED * VDF_PAGE_SIZE), 200000) ==
              0);
        do {
            CHECK(vdf_suspect_next(image, &cursor, &batch) == 0);
            CHECK(vdf_suspect_clear(image, pageno, batch.count) == 0);
        } while (batch.count > 0);
        vdf_track_counts_get(track, &counts);
        CHECK(counts.overflow == 0 && counts.dirty_pages <= 2 * ALL);
        CHECK(vdf_image_sync(image, 1) == 0 && vdf_image_sync_internal(image) == 0);
        atomic_fetch_add(&passes, 1);
    }
    return NULL;
}

/* Lays the frozen epoch over what was shipped; returns its size. */
static uint64_t capture(const vdf_seal *seal)
{
    static uint64_t pageno[BATCH], sum[BATCH];
    static uint8_t zero[BATCH], data[BATCH * VDF_PAGE_SIZE];
    vdf_batch batch = {.pageno = pageno, .sum = sum, .zero = zero, .data = data, .capacity = BATCH};
    uint64_t cut = vdf_pages_of(seal->cut), cursor = 0;

    memset(shipped[cut], 0, (ALL - cut) * VDF_PAGE_SIZE);
    do {
        /* Too little is preserved here for the epoch to be given up. */
        CHECK(vdf_capture_next(image, &cursor, &batch) == 0);
        batch_lay(&batch, shipped, ALL);
    } while (batch.count > 0);
    CHECK(vdf_capture_forget(image) == 0);
    return seal->size;
}

static void check_writer(const writer *self, uint64_t least, uint64_t most)
{
    uint64_t newest = 0;

    for (uint64_t p = 0; p < PAGES; p++)
        for (size_t i = 0; i < WORDS; i++)
            if (shipped[self->first + p][i] > newest)
                newest = shipped[self->first + p][i];
    CHECK(newest >= least && newest <= most);
    for (uint64_t p = 0; p < PAGES; p++) {
        /* Of the write under way at the seal each sector may be there or not. */
        uint64_t must = newest > 0 ? newest_at(newest - 1, p) : 0;
        for (size_t i = 0; i < WORDS; i++) {
            uint64_t has = shipped[self->first + p][i];
            CHECK(has == must || (has == newest && newest % PAGES == p));
        }
    }
}

static void seal_once(void)
{
    uint64_t least[WRITERS], most[WRITERS];
    vdf_seal seal;

    for (unsigned i = 0; i < WRITERS; i++)
        least[i] = atomic_load(&writers[i].completed);
    CHECK(vdf_seal_images(&image, 1, &seal) == 0);
    for (unsigned i = 0; i < WRITERS; i++)
        most[i] = atomic_load(&writers[i].begun);
    capture(&seal);
    for (unsigned i = 0; i < WRITERS; i++)
        check_writer(&writers[i], least[i], most[i]);
    for (uint64_t p = OWNED; p < FIXED; p++)
        for (size_t i = 0; i < WORDS; i++)
            CHECK(shipped[p][i] == 0 || shipped[p][i] == p);
}

static uint64_t run(void)
{
    pthread_t thread[WRITERS + READERS + 3];
    unsigned count = 0;
    struct timespec from, now;
    uint64_t seals = 0;

    for (unsigned i = 0; i < WRITERS; i++) {
        writers[i].first = (uint64_t)i * PAGES;
        CHECK(pthread_create(&thread[count++], NULL, write_pages, &writers[i]) == 0);
    }
    for (uintptr_t i = 1; i <= READERS; i++)
        CHECK(pthread_create(&thread[count++], NULL, read_pages, (void *)i) == 0);
    CHECK(pthread_create(&thread[count++], NULL, discard, NULL) == 0);
    CHECK(pthread_create(&thread[count++], NULL, resize, NULL) == 0);
    CHECK(pthread_create(&thread[count++], NULL, pass, NULL) == 0);
    clock_gettime(CLOCK_MONOTONIC, &from);
    do {
        seal_once();
        seals++;
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while (now.tv_sec - from.tv_sec < SECONDS);
    atomic_store(&stop, true);
    for (unsigned i = 0; i < count; i++)
        CHECK(pthread_join(thread[i], NULL) == 0);
    return seals;
}

static void check_all(void)
{
    static uint64_t live[ALL][WORDS];
    vdf_seal seal;

    CHECK(vdf_seal_images(&image, 1, &seal) == 0);
    uint64_t size = capture(&seal);
    CHECK(vdf_image_read(image, 0, sizeof live, (uint8_t *)live) == (int64_t)size);
    CHECK(memcmp(live, shipped, sizeof live) == 0);
}

int main(void)
{
    scratch s;

    scratch_make(&s, FIXED * VDF_PAGE_SIZE);
    scratch_open(&s, VDF_TRACK_NEW);
    image = s.image;
    track = s.track;
    uint64_t seals = run();
    check_all();
    printf("%llu seals, %llu reads, %llu discards, %llu resizes, %llu passes\n",
           (unsigned long long)seals, (unsigned long long)reads, (unsigned long long)discards,
           (unsigned long long)resizes, (unsigned long long)passes);
    CHECK(seals > 0 && reads > 0 && discards > 0 && resizes > 0 && passes > 0);
    scratch_close(&s);
    scratch_remove(&s);
    return 0;
}
