/*
 * test_track.c - one track's life: create, mark, seal, capture, forget, abandon, overflow;
 * and two disks sealed together: what came second is never in the point without the first.
 */
#include "internal.h"
#include "scratch.h"

#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>

#define SIZE (64 * VDF_PAGE_SIZE)

static uint64_t pageno[64], sum[64];
static uint8_t zero[64], data[64 * VDF_PAGE_SIZE];
static vdf_batch batch = {.pageno = pageno, .sum = sum, .zero = zero, .data = data, .capacity = 64};

static vdf_track_counts counts(vdf_track *track)
{
    vdf_track_counts out;

    vdf_track_counts_get(track, &out);
    return out;
}

static void one_life(void)
{
    scratch s;
    vdf_seal seal;
    uint64_t cursor = 0;
    vdf_track *again = NULL;
    vdf_event event;

    scratch_make(&s, SIZE);
    CHECK(vdf_track_open(s.tracks, SIZE, 0, &again) == -ENOENT);
    scratch_open(&s, VDF_TRACK_NEW);
    CHECK(vdf_track_open(s.tracks, SIZE, VDF_TRACK_NEW, &again) == -EEXIST);
    CHECK(vdf_image_set_track(s.image, s.track) == -EBUSY);
    CHECK(vdf_capture_next(s.image, &cursor, &batch) == -EINVAL);
    CHECK(vdf_capture_forget(s.image) == -EINVAL && vdf_capture_abandon(s.image) == -EINVAL);
    CHECK(vdf_core_next_event(s.core, &event) == 0);
    CHECK(vdf_image_write(s.image, 4095, 2, (const uint8_t *)"ab") == 0);
    CHECK(vdf_image_write(s.image, 8192, 1, (const uint8_t *)"") == 0);
    CHECK(vdf_core_next_event(s.core, &event) == 1 && event.kind == VDF_EVENT_DIRTY);
    CHECK(event.cookie == 7 && vdf_core_next_event(s.core, &event) == 0);
    CHECK(vdf_seal_images(&s.image, 1, &seal) == 0);
    CHECK(seal.epoch == 1 && seal.size == SIZE && seal.cut == 0 && seal.low == SIZE);
    CHECK(vdf_seal_images(&s.image, 1, &seal) == -EBUSY);
    CHECK(vdf_image_write(s.image, 0, 1, (const uint8_t *)"X") == 0);
    CHECK(vdf_core_next_event(s.core, &event) == 1 && event.kind == VDF_EVENT_DIRTY);
    batch.capacity = 15;
    CHECK(vdf_capture_next(s.image, &cursor, &batch) == -EINVAL);
    batch.capacity = 64;
    CHECK(vdf_capture_next(s.image, &cursor, &batch) == 0);
    CHECK(batch.count == 3 && batch.data_pages == 2 && zero[2]);
    CHECK(data[0] == 0 && data[4095] == 'a' && data[4096] == 'b');
    CHECK(vdf_pages_verify(data, 2, sum) == -1);
    CHECK(counts(s.track).preserved_pages == 1 && counts(s.track).dirty_pages == 1);
    CHECK(vdf_capture_forget(s.image) == 0);
    CHECK(counts(s.track).preserved_pages == 0 && counts(s.track).frozen_pages == 0);
    CHECK(vdf_seal_images(&s.image, 1, &seal) == 0 && seal.cut == SIZE);
    CHECK(vdf_capture_abandon(s.image) == 0);
    CHECK(counts(s.track).dirty_pages == 1 && counts(s.track).epoch == 3);
    scratch_close(&s);
    scratch_remove(&s);
}

/* Half a track, left by a process that was killed while it made one, is none. */
static void half_made(void)
{
    scratch s;
    char path[128];

    scratch_make(&s, SIZE);
    snprintf(path, sizeof path, "%s/dirty.0", s.tracks);
    close(open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    snprintf(path, sizeof path, "%s/track.new", s.tracks);
    close(open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    CHECK(vdf_track_open(s.tracks, SIZE, 0, &s.track) == -ENOENT);
    scratch_open(&s, VDF_TRACK_NEW);
    scratch_close(&s);
    snprintf(path, sizeof path, "%s/track", s.tracks);
    CHECK(truncate(path, 100) == 0);
    CHECK(vdf_track_open(s.tracks, SIZE, 0, &s.track) == -EBADMSG);
    scratch_remove(&s);
}

/* Bitmaps that cannot grow: what was missed is suspect later, whatever grew meanwhile. */
static void overflow(void)
{
    const uint64_t per_page = UINT64_C(32768) * VDF_PAGE_SIZE; /* tracked by a page of bitmap */
    struct rlimit limit, small;
    scratch s;
    vdf_seal seal;

    scratch_make(&s, SIZE);
    scratch_open(&s, VDF_TRACK_NEW);
    signal(SIGXFSZ, SIG_IGN);
    CHECK(getrlimit(RLIMIT_FSIZE, &limit) == 0);
    small = limit;
    small.rlim_cur = VDF_PAGE_SIZE;
    CHECK(vdf_image_write(s.image, per_page - 1, 1, (const uint8_t *)"x") == 0);
    CHECK(counts(s.track).overflow == 0);
    /* The limit on the sizes of files is down while the growth is tried, and up for the write. */
    CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
    vdf_track_reach(s.track, 3 * per_page);
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    CHECK(counts(s.track).overflow == 1);
    vdf_track_reach(s.track, 5 * per_page);
    CHECK(vdf_image_write(s.image, 2 * per_page, 1, (const uint8_t *)"y") == 0);
    scratch_close(&s);
    scratch_open(&s, 0);
    CHECK(counts(s.track).overflow == 1);
    CHECK(vdf_seal_images(&s.image, 1, &seal) == -EAGAIN);
    CHECK(counts(s.track).suspect_pages == 32768 + 1);
    CHECK(vdf_bitmap_test(&s.track->suspect, 32768) && !vdf_bitmap_test(&s.track->suspect, 32767));
    CHECK(vdf_seal_images(&s.image, 1, &seal) == 0);
    CHECK(vdf_capture_forget(s.image) == 0);
    /* A change that finds no room for its mark spoils the epoch that it belongs to. */
    vdf_track_missed(s.track, 1);
    CHECK(vdf_seal_images(&s.image, 1, &seal) == -EAGAIN);
    scratch_close(&s);
    scratch_remove(&s);
}

/* ---- two disks -------------------------------------------------------------------- */

static scratch pair[2];
static atomic_bool stop;

static void *write_in_order(void *argument)
{
    uint64_t page[VDF_PAGE_SIZE / 8] = {0};

    (void)argument;
    for (uint64_t number = 1; !atomic_load(&stop); number++) {
        for (int i = 0; i < 2; i++) {
            page[0] = page[511] = number;
            CHECK(vdf_image_write(pair[i].image, 0, sizeof page, (const uint8_t *)page) == 0);
        }
    }
    return NULL;
}

static void *write_beside(void *argument)
{
    uint8_t page[VDF_PAGE_SIZE] = {1};
    uint64_t state = 5;

    while (!atomic_load(&stop))
        CHECK(vdf_image_write(argument, (1 + scratch_random(&state) % 63) * VDF_PAGE_SIZE,
                              sizeof page, page) == 0);
    return NULL;
}

static uint64_t captured(vdf_image *image, uint64_t before)
{
    uint64_t cursor = 0, number = before, last;

    while (vdf_capture_next(image, &cursor, &batch) == 0 && batch.count != 0) {
        if (pageno[0] == 0 && !zero[0]) {
            memcpy(&number, data, 8);
            memcpy(&last, data + VDF_PAGE_SIZE - 8, 8);
            CHECK(last == number);
        }
    }
    CHECK(vdf_capture_forget(image) == 0);
    return number;
}

static void group(void)
{
    pthread_t thread[3];
    uint64_t number[2] = {0, 0};
    vdf_seal seal[2];

    for (int i = 0; i < 2; i++) {
        scratch_make(&pair[i], SIZE);
        scratch_open(&pair[i], VDF_TRACK_NEW);
    }
    CHECK(pthread_create(&thread[0], NULL, write_in_order, NULL) == 0);
    for (int i = 0; i < 2; i++)
        CHECK(pthread_create(&thread[i + 1], NULL, write_beside, pair[i].image) == 0);
    for (int round = 0; round < 200 || number[1] < 20; round++) {
        vdf_image *both[2] = {pair[round % 2].image, pair[1 - round % 2].image};
        CHECK(vdf_seal_images(both, 2, seal) == 0);
        CHECK(seal[0].time_ns == seal[1].time_ns);
        for (int i = 0; i < 2; i++)
            number[i] = captured(pair[i].image, number[i]);
        CHECK(number[1] <= number[0] && number[0] <= number[1] + 1);
    }
    vdf_image *twice[2] = {pair[0].image, pair[0].image};
    CHECK(vdf_seal_images(twice, 2, seal) == -EINVAL);
    CHECK(vdf_seal_images(twice, 0, seal) == -EINVAL);
    atomic_store(&stop, true);
    for (int i = 0; i < 3; i++)
        pthread_join(thread[i], NULL);
    for (int i = 0; i < 2; i++) {
        scratch_close(&pair[i]);
        scratch_remove(&pair[i]);
    }
}

int main(void)
{
    one_life();
    half_made();
    overflow();
    group();
    return 0;
}
