/*
 * test_seal.c - writers and seals at once: every epoch captured is the image at one instant.
 *
 * Each writer owns some pages and fills them in turn, each page with the number of the write.
 * Its writes never overlap in time, so an image at one instant holds all of them up to some
 * number, maybe the one after it, and nothing later. Meant for the sanitizers as well.
 */
#include "batches.h"
#include "check.h"
#include "vdf.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <unistd.h>

enum {
    WRITERS = 4,
    PAGES = 256,
    ALL = WRITERS * PAGES,
    SEALS = 60,
    BATCH = 64
};

typedef struct writer {
    pthread_t thread;
    vdf_image *image;
    uint64_t first;             /* page */
    _Atomic uint64_t begun;     /* number of the write under way, or the last */
    _Atomic uint64_t completed; /* number of the last write that returned */
    atomic_bool *stop;
} writer;

static uint64_t shipped[ALL][VDF_PAGE_SIZE / 8]; /* what the deltas make of the disk */

static void *write_pages(void *argument)
{
    writer *self = argument;
    uint64_t page[VDF_PAGE_SIZE / 8];

    for (uint64_t number = 1; !atomic_load(self->stop); number++) {
        uint64_t pageno = self->first + number % PAGES;
        for (size_t i = 0; i < VDF_PAGE_SIZE / 8; i++)
            page[i] = number;
        atomic_store(&self->begun, number);
        CHECK(vdf_image_write(self->image, pageno * VDF_PAGE_SIZE, VDF_PAGE_SIZE,
                              (const uint8_t *)page) == 0);
        atomic_store(&self->completed, number);
    }
    return NULL;
}

/* Returns 0 and lays the frozen epoch over what was shipped, or -ECANCELED. */
static int capture(vdf_image *image)
{
    static uint64_t pageno[BATCH], sum[BATCH];
    static uint8_t zero[BATCH], data[BATCH * VDF_PAGE_SIZE];
    vdf_batch batch = {.pageno = pageno, .sum = sum, .zero = zero, .data = data, .capacity = BATCH};
    uint64_t cursor = 0;
    int error;

    do {
        error = vdf_capture_next(image, &cursor, &batch);
        if (error == 0)
            batch_lay(&batch, shipped, ALL);
    } while (error == 0 && batch.count > 0);
    return error;
}

static void check_writer(const writer *self, uint64_t least, uint64_t most)
{
    uint64_t newest = 0;

    for (uint64_t p = 0; p < PAGES; p++) {
        const uint64_t *page = shipped[self->first + p];
        for (size_t i = 1; i < VDF_PAGE_SIZE / 8; i++)
            CHECK(page[i] == page[0]); /* no torn page */
        if (page[0] > newest)
            newest = page[0];
    }
    CHECK(newest >= least && newest <= most);
    for (uint64_t p = 0; p < PAGES; p++) {
        uint64_t has = shipped[self->first + p][0];
        /* The last write to this page with a number before the newest: it had returned. */
        uint64_t back = (newest - 1 + PAGES - p) % PAGES;
        uint64_t must = newest > 0 && newest - 1 > back ? newest - 1 - back : 0;
        CHECK(has == must || (has == newest && newest % PAGES == p));
    }
}

static void run(vdf_image *image)
{
    static writer writers[WRITERS];
    atomic_bool stop = false;
    uint64_t least[WRITERS], most[WRITERS];

    for (unsigned i = 0; i < WRITERS; i++) {
        writers[i].image = image;
        writers[i].first = (uint64_t)i * PAGES;
        writers[i].stop = &stop;
        CHECK(pthread_create(&writers[i].thread, NULL, write_pages, &writers[i]) == 0);
    }
    for (unsigned n = 0; n < SEALS; n++) {
        vdf_seal seal;
        for (unsigned i = 0; i < WRITERS; i++)
            least[i] = atomic_load(&writers[i].completed);
        CHECK(vdf_seal_images(&image, 1, &seal) == 0);
        for (unsigned i = 0; i < WRITERS; i++)
            most[i] = atomic_load(&writers[i].begun);
        CHECK(seal.epoch == n + 1 && seal.size == (uint64_t)ALL * VDF_PAGE_SIZE);
        CHECK(vdf_seal_images(&image, 1, &seal) == -EBUSY);
        CHECK(capture(image) == 0);
        CHECK(vdf_capture_forget(image) == 0);
        for (unsigned i = 0; i < WRITERS; i++)
            check_writer(&writers[i], least[i], most[i]);
    }
    atomic_store(&stop, true);
    for (unsigned i = 0; i < WRITERS; i++)
        CHECK(pthread_join(writers[i].thread, NULL) == 0);
}

static int open_disk(const char *directory)
{
    int dir = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int fd;

    CHECK(dir >= 0);
    fd = openat(dir, "disk.img", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)ALL * VDF_PAGE_SIZE) == 0);
    CHECK(unlinkat(dir, "disk.img", 0) == 0);
    close(dir);
    return fd;
}

static void remove_track(const char *directory)
{
    static const char *const names[] = {"track",     "dirty.0", "dirty.1", "intent",
                                        "preserved", "suspect", "preserve"};
    int dir = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        (void)unlinkat(dir, names[i], 0);
    close(dir);
    CHECK(rmdir(directory) == 0);
}

int main(void)
{
    char directory[] = "/tmp/vdf-test-seal-XXXXXX";
    vdf_core *core;
    vdf_image *image;
    vdf_track *track;

    CHECK(mkdtemp(directory) != NULL);
    int fd = open_disk(directory);
    CHECK(vdf_core_create(-1, 1, 0, &core) == 0);
    CHECK(vdf_image_create(core, fd, 0, 7, &image) == 0);
    close(fd);
    CHECK(vdf_track_open(directory, (uint64_t)ALL * VDF_PAGE_SIZE, VDF_TRACK_NEW, &track) == 0);
    CHECK(vdf_image_set_track(image, track) == 0);
    run(image);
    CHECK(vdf_image_set_track(image, NULL) == 0);
    vdf_image_unref(image);
    vdf_track_close(track);
    vdf_core_stop(core);
    vdf_core_free(core);
    remove_track(directory);
    return 0;
}
