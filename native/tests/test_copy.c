/*
 * test_copy.c - writable lazy images: what needs the base and what does not, and what is
 * there after the process or the host died.
 */
#include "copies.h"

#include <linux/falloc.h>
#include <time.h>

#define PAGES (2 * VDF_REGION_PAGES + 100)
#define SIZE (PAGES * (uint64_t)VDF_PAGE_SIZE - 1000)
#define AT(page) ((page) * (uint64_t)VDF_PAGE_SIZE)
#define PUNCH (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)

static scratch s;

static void remake(uint64_t size)
{
    CHECK(truncate(s.file, 0) == 0 && truncate(s.file, (off_t)size) == 0);
    const char *const names[] = {"presence", "presence.head", "presence.log"};
    for (unsigned i = 0; i < 3; i++) {
        char path[128];
        snprintf(path, sizeof path, "%s/%s", s.tracks, names[i]);
        unlink(path);
    }
}

static void whole_pages_need_nothing(void)
{
    uint8_t page[VDF_PAGE_SIZE];
    uint64_t length = 0;

    remake(SIZE);
    vdf_image *image = scratch_image(&s, VDF_IMAGE_LAZY, O_RDWR);
    CHECK(copy_put(image, AT(5), AT(3), 7) == 0);
    CHECK(vdf_image_read(image, AT(6), 100, page) == 100 && page[99] == 7);
    CHECK(vdf_image_read(image, AT(4), 1, page) == -EAGAIN);
    CHECK(!vdf_image_is_mapped(image, 0) && vdf_image_is_present(image, AT(5), AT(3)));
    CHECK(!vdf_image_is_present(image, AT(5), AT(4)));
    /* In part: only where it is here already. */
    CHECK(copy_put(image, AT(5) + 10, 20, 8) == 0);
    CHECK(copy_put(image, AT(9) + 10, 20, 8) == -EAGAIN);
    CHECK(copy_put(image, AT(8), AT(1) + 1, 8) == -EAGAIN);
    CHECK(vdf_image_is_present(image, AT(8), 1) == 0);
    /* A map and a fill that come later leave it alone. */
    copy_fetch(image, 4, 6);
    copy_check_base(image, 9);
    copy_check_byte(image, 7, 7);
    CHECK(copy_put(image, AT(9) + 10, 20, 8) == 0);
    CHECK(vdf_image_read(image, AT(9), 40, page) == 40 && page[10] == 8 && page[29] == 8);
    CHECK(vdf_image_next_absent(image, 0, &length) == AT(1) && length == AT(3));
    /* The end of the disk is the end of its last page. */
    CHECK(copy_put(image, AT(PAGES - 1), SIZE - AT(PAGES - 1), 9) == 0);
    CHECK(vdf_image_read(image, SIZE - 1, 1, page) == 1 && page[0] == 9);
    CHECK(vdf_image_evict(image, 0, 1) == -EINVAL);
    CHECK(vdf_image_next_unmapped(image, 0) == 1);
    CHECK(vdf_image_presence_commit(image) == -EINVAL && vdf_image_sync(image, 0) == 0);
    vdf_image_unref(image);
}

static void only_the_missing_pages_are_asked_for(void)
{
    vdf_want want[2];

    remake(SIZE);
    vdf_image *image = scratch_image(&s, VDF_IMAGE_LAZY, O_RDWR);
    CHECK(vdf_lazy_edges(image, AT(3), AT(9), want) == 0);
    CHECK(vdf_lazy_edges(image, AT(3) + 1, AT(1) - 2, want) == 1 && want[0].offset == AT(3));
    CHECK(want[0].length == AT(1));
    CHECK(vdf_lazy_edges(image, AT(3) + 1, AT(1), want) == 1 && want[0].length == AT(2));
    CHECK(vdf_lazy_edges(image, AT(3) + 1, AT(4), want) == 2 && want[0].offset == AT(3));
    CHECK(want[1].offset == AT(7) && want[1].length == AT(1));
    CHECK(copy_put(image, AT(3), AT(1), 1) == 0);
    CHECK(vdf_lazy_edges(image, AT(3) + 1, AT(4), want) == 1 && want[0].offset == AT(7));
    copy_map(image, 0);
    CHECK(vdf_lazy_edges(image, AT(4) + 1, AT(4), want) == 0); /* 4 and 8 are zero by the map */
    CHECK(vdf_lazy_edges(image, SIZE - 1, 1, want) == 1 && want[0].offset == AT(PAGES - 1));
    CHECK(vdf_lazy_edges(image, AT(PAGES - 1), 5000, want) == 0);
    CHECK(vdf_lazy_edges(image, AT(PAGES + 4) + 3, 5, want) == 0);
    /* More than one piece, not aligned: nothing is written before it fails. */
    uint64_t length = 2 * VDF_REQUEST_MAX;
    uint8_t *data = calloc(1, length);
    CHECK(data != NULL && vdf_image_write(image, AT(101) + 5, length, data) == -EAGAIN);
    CHECK(vdf_image_is_present(image, AT(102), AT(1)) == 0);
    copy_fetch(image, 101, 1);
    copy_fetch(image, 101 + 512, 1);
    CHECK(vdf_image_write(image, AT(101) + 5, length, data) == 0);
    CHECK(vdf_image_is_present(image, AT(101), AT(513)));
    free(data);
    vdf_image_unref(image);
}

static void zeros_need_only_their_edges(void)
{
    uint8_t page[VDF_PAGE_SIZE];

    remake(SIZE);
    vdf_image *image = scratch_image(&s, VDF_IMAGE_LAZY, O_RDWR);
    CHECK(vdf_image_allocate(image, PUNCH, AT(1), AT(5)) == 0);
    CHECK(vdf_image_allocate(image, PUNCH, AT(9) + 1, AT(5)) == -EAGAIN);
    CHECK(!vdf_image_is_present(image, AT(10), 1));
    copy_fetch(image, 9, 1);
    copy_fetch(image, 14, 1);
    CHECK(vdf_image_allocate(image, PUNCH, AT(9) + 1, AT(5)) == 0);
    copy_fetch(image, 0, 20);
    for (uint64_t i = 1; i < 6; i++)
        copy_check_byte(image, i, 0);
    copy_check_byte(image, 11, 0);
    copy_base(14, page);
    page[0] = 0;
    copy_check(image, 14, page);
    CHECK(vdf_image_seek(image, AT(1), SEEK_DATA) == (int64_t)AT(6));
    /* To the end of the disk, and of all of it. */
    CHECK(vdf_image_allocate(image, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, AT(PAGES - 2),
                             AT(9)) == 0);
    CHECK(vdf_image_is_present(image, AT(PAGES - 2), AT(2)));
    CHECK(vdf_image_allocate(image, PUNCH, 0, SIZE) == 0);
    CHECK(vdf_image_seek(image, 0, SEEK_DATA) == -ENXIO);
    CHECK(copy_counts(image).present_pages == PAGES && vdf_image_presence_complete(image) == 0);
    vdf_image_unref(image);
}

static void what_was_cut_off_stays_away(void)
{
    uint8_t page[VDF_PAGE_SIZE];

    remake(SIZE);
    vdf_image *image = scratch_image(&s, VDF_IMAGE_LAZY, O_RDWR);
    CHECK(vdf_image_truncate(image, AT(50) + 77) == -EAGAIN);
    CHECK(vdf_image_truncate(image, AT(60)) == 0);
    CHECK(vdf_image_truncate(image, AT(50) + 77) == -EAGAIN);
    copy_fetch(image, 50, 1);
    CHECK(vdf_image_truncate(image, AT(50) + 77) == 0);
    CHECK(vdf_image_truncate(image, SIZE) == 0);
    copy_base(50, page);
    memset(page + 77, 0, sizeof page - 77);
    copy_check(image, 50, page);
    copy_check_byte(image, 51, 0);
    copy_check_byte(image, PAGES - 10, 0);
    CHECK(copy_counts(image).low == AT(50) + 77 && vdf_image_next_unmapped(image, 0) == -ENXIO);
    CHECK(copy_put(image, AT(70) + 3, 20, 1) == 0); /* the base has nothing there */
    /* A fetch that was on its way fills nothing in. */
    copy_fetch(image, 45, 20);
    copy_check_base(image, 49);
    copy_check(image, 50, page);
    copy_check_byte(image, 51, 0);
    /* Beyond the end: zeros. */
    CHECK(copy_put(image, AT(PAGES + 9), AT(1), 3) == 0);
    copy_check_byte(image, PAGES + 8, 0);
    vdf_image_unref(image);
    /* The page of a cut that the host forgot: the rest of it does not come back. */
    remake(SIZE);
    CHECK(truncate(s.file, (off_t)AT(3) + 5) == 0);
    image = scratch_image(&s, VDF_IMAGE_LAZY, O_RDWR);
    CHECK(vdf_image_truncate(image, AT(9)) == 0);
    copy_fetch(image, 0, 3);
    copy_map(image, 0);
    uint8_t data[VDF_PAGE_SIZE];
    copy_base(3, data);
    CHECK(vdf_image_fill(image, AT(3), AT(1), data, NULL) == 0);
    memset(data + 5, 0, sizeof data - 5);
    copy_check(image, 3, data);
    vdf_image_unref(image);
}

static void seeks_know_what_is_here(void)
{
    remake(SIZE);
    vdf_image *image = scratch_image(&s, VDF_IMAGE_LAZY, O_RDWR);
    CHECK(copy_put(image, AT(8), AT(4), 1) == 0);
    CHECK(vdf_image_seek(image, AT(9), SEEK_DATA) == (int64_t)AT(9));
    CHECK(vdf_image_seek(image, AT(9), SEEK_HOLE) == -EAGAIN);
    CHECK(vdf_image_seek(image, AT(7), SEEK_DATA) == -EAGAIN);
    copy_map(image, 0);
    CHECK(vdf_image_seek(image, AT(4), SEEK_DATA) == (int64_t)AT(5));
    CHECK(vdf_image_seek(image, AT(9), SEEK_HOLE) == (int64_t)AT(12));
    CHECK(vdf_image_seek(image, AT(13), SEEK_HOLE) == (int64_t)AT(16));
    CHECK(vdf_image_truncate(image, AT(18)) == 0 && vdf_image_truncate(image, SIZE) == 0);
    CHECK(vdf_image_seek(image, AT(17), SEEK_HOLE) == (int64_t)AT(18));
    CHECK(vdf_image_seek(image, AT(18), SEEK_DATA) == -ENXIO);
    vdf_image_unref(image);
}

/* Absent again where the log did not name it: what the file holds there is nobody's. */
static void the_log_outlives_the_host_and_the_bitmap_the_process(void)
{
    remake(SIZE);
    copy_create(&s, SIZE, 0, NULL, 0);
    vdf_image *image = copy_open(&s, VDF_PRESENCE_TRUST);
    CHECK(copy_put(image, AT(1), AT(2), 1) == 0);
    copy_fetch(image, 5, 2);
    CHECK(copy_counts(image).uncommitted_pages == 4);
    CHECK(vdf_image_sync(image, 1) == 0);
    uint64_t bytes = copy_counts(image).log_bytes;
    CHECK(copy_put(image, AT(1), AT(2), 2) == 0 && vdf_image_sync(image, 1) == 0);
    CHECK(copy_counts(image).log_bytes == bytes); /* nothing became present */
    CHECK(copy_put(image, AT(9), AT(1), 3) == 0);
    CHECK(vdf_image_truncate(image, AT(99)) == 0 && vdf_image_truncate(image, SIZE) == 0);
    vdf_image_unref(image);

    image = copy_open(&s, VDF_PRESENCE_TRUST);
    vdf_presence_counts counts = copy_counts(image);
    CHECK(counts.present_pages == 5 && counts.uncommitted_pages == 1 && !counts.rebuilt);
    CHECK(counts.low == AT(99) && counts.base_size == SIZE);
    copy_check_byte(image, 9, 3);
    copy_check_byte(image, 2, 2);
    CHECK(vdf_image_is_mapped(image, 0) == 0);
    vdf_image_unref(image);

    /* The truncation is of no account: nobody synced it. */
    image = copy_open(&s, 0);
    counts = copy_counts(image);
    CHECK(counts.rebuilt && counts.present_pages == 4 && counts.uncommitted_pages == 0);
    CHECK(counts.low == SIZE);
    copy_check_byte(image, 1, 2);
    copy_check_base(image, 6);
    copy_check_base(image, 9);
    CHECK(vdf_image_truncate(image, AT(98)) == 0 && vdf_image_truncate(image, SIZE) == 0);
    CHECK(vdf_image_sync(image, 0) == 0);
    vdf_image_unref(image);
    image = copy_open(&s, 0);
    CHECK(copy_counts(image).low == AT(98));
    copy_check_byte(image, 98, 0);
    vdf_image_unref(image);
}

/* Killed between the file's truncation and the note of it; the file may grow again before the
 * next death. */
static void a_size_that_was_found_smaller_is_not_forgotten(void)
{
    for (unsigned flags = 0; flags <= VDF_PRESENCE_TRUST; flags++) {
        remake(SIZE);
        copy_create(&s, SIZE, 0, NULL, 0);
        CHECK(truncate(s.file, (off_t)AT(20)) == 0);
        vdf_image *image = copy_open(&s, flags);
        CHECK(copy_counts(image).low == AT(20) && vdf_image_truncate(image, SIZE) == 0);
        vdf_image_unref(image);
        image = copy_open(&s, flags);
        CHECK(copy_counts(image).low == AT(20));
        copy_check_byte(image, 21, 0);
        copy_check_base(image, 19);
        vdf_image_unref(image);
    }
}

static int log_file(int flags)
{
    char path[128];

    snprintf(path, sizeof path, "%s/presence.log", s.tracks);
    int fd = open(path, flags | O_CLOEXEC);
    CHECK(fd >= 0);
    return fd;
}

static void break_log(uint64_t offset, const char *with, size_t length)
{
    int fd = log_file(O_RDWR);

    CHECK(pwrite(fd, with, length, (off_t)offset) == (ssize_t)length);
    close(fd);
}

static void a_torn_end_is_no_damage(void)
{
    uint64_t end[4];

    remake(SIZE);
    copy_create(&s, SIZE, 0, NULL, 0);
    vdf_image *image = copy_open(&s, 0);
    for (uint64_t i = 0; i < 4; i++) {
        CHECK(copy_put(image, AT(2 * i + 1), AT(1), 1) == 0 && vdf_image_sync(image, 1) == 0);
        end[i] = copy_counts(image).log_bytes;
    }
    /* Many runs: a batch of several records. */
    for (uint64_t i = 0; i < 200; i++)
        CHECK(copy_put(image, AT(100 + 2 * i), AT(1), 2) == 0);
    CHECK(vdf_image_sync(image, 1) == 0 && copy_counts(image).log_bytes == end[3] + 4 * 512);
    vdf_image_unref(image);
    /* The second of four was not written: it and what follows do not count. */
    break_log(end[3] + 512 + 100, "torn", 4);
    image = copy_open(&s, 0);
    CHECK(copy_counts(image).present_pages == 4 + 60 &&
          copy_counts(image).log_bytes < end[3] + 1500);
    copy_check_byte(image, 7, 1);
    copy_check_base(image, 100 + 2 * 61 + 0);
    CHECK(copy_put(image, AT(501), AT(1), 3) == 0 && vdf_image_sync(image, 1) == 0);
    vdf_image_unref(image);
    image = copy_open(&s, 0);
    CHECK(copy_counts(image).present_pages >= 4 + 61);
    copy_check_byte(image, 501, 3);
    vdf_image_unref(image);
    /* In front of the last batch it is: a page that was acknowledged would be lost. */
    break_log(end[1] - 10, "rot", 3);
    image = scratch_image(&s, VDF_IMAGE_LAZY, O_RDWR);
    int dir = copy_dir(&s);
    CHECK(vdf_image_presence_open(image, dir, 0) == -EBADMSG);
    vdf_image_unref(image);
    image = scratch_image(&s, VDF_IMAGE_LAZY, O_RDWR);
    CHECK(ftruncate(log_file(O_RDWR), 0) == 0);
    CHECK(vdf_image_presence_open(image, dir, VDF_PRESENCE_TRUST) == -EBADMSG);
    vdf_image_unref(image);
    close(dir);
}

static void a_commit_that_fails_loses_nothing(void)
{
    remake(SIZE);
    copy_create(&s, SIZE, 0, NULL, 0);
    vdf_image *image = copy_open(&s, 0);
    vdf_presencelog *log = &image->lazy->presence->log;
    int kept = dup(log->fd);
    int full = open("/dev/full", O_RDWR | O_CLOEXEC);
    CHECK(kept >= 0 && full >= 0);
    CHECK(copy_put(image, AT(1), AT(1), 1) == 0);
    /* No room: an error, once. */
    CHECK(dup2(full, log->fd) == log->fd);
    CHECK(vdf_image_sync(image, 1) < 0);
    CHECK(copy_counts(image).uncommitted_pages == 1);
    CHECK(dup2(kept, log->fd) == log->fd);
    CHECK(vdf_image_sync(image, 1) == 0);
    CHECK(copy_counts(image).uncommitted_pages == 0);
    /* A write of the log that failed: for good. */
    CHECK(copy_put(image, AT(3), AT(1), 3) == 0);
    log->room += 1 << 20;
    CHECK(dup2(full, log->fd) == log->fd);
    CHECK(vdf_image_sync(image, 1) == -ENOSPC && copy_counts(image).uncommitted_pages == 1);
    CHECK(dup2(kept, log->fd) == log->fd);
    CHECK(vdf_image_sync(image, 0) == -ENOSPC && vdf_image_presence_commit(image) == -ENOSPC);
    vdf_image_unref(image);
    /* The next one believes nothing of such a log, and has it all anew. */
    image = copy_open(&s, VDF_PRESENCE_TRUST);
    CHECK(copy_counts(image).uncommitted_pages == 2 && vdf_image_sync(image, 1) == 0);
    vdf_image_unref(image);
    image = copy_open(&s, 0);
    copy_check_byte(image, 1, 1);
    copy_check_byte(image, 3, 3);
    vdf_image_unref(image);
    close(kept);
    close(full);
}

/* Bits that a failed disk took away: what was not committed is lost, the rest is not. */
static void a_bitmap_that_lost_bits_is_built_anew(void)
{
    remake(SIZE);
    copy_create(&s, SIZE, 0, NULL, 0);
    vdf_image *image = copy_open(&s, 0);
    CHECK(copy_put(image, AT(1), AT(1), 1) == 0 && vdf_image_sync(image, 1) == 0);
    CHECK(copy_put(image, AT(3), AT(1), 1) == 0);
    vdf_store(&image->lazy->presence->head->lost, 1);
    vdf_image_unref(image);
    image = copy_open(&s, VDF_PRESENCE_TRUST);
    CHECK(copy_counts(image).rebuilt && copy_counts(image).present_pages == 1);
    copy_check_base(image, 3);
    vdf_image_unref(image);
    /* A build that was cut short is not believed either. */
    image = copy_open(&s, VDF_PRESENCE_TRUST);
    CHECK(!copy_counts(image).rebuilt && copy_counts(image).present_pages == 2);
    vdf_store(&image->lazy->presence->head->valid, 0);
    vdf_image_unref(image);
    image = copy_open(&s, VDF_PRESENCE_TRUST);
    CHECK(copy_counts(image).rebuilt && copy_counts(image).present_pages == 1);
    vdf_image_unref(image);
}

static void all_is_here_but(void)
{
    const uint64_t absent[] = {10, 3, VDF_REGION_PAGES - 2, 5};
    const uint64_t wrong[] = {PAGES, 1};
    uint8_t page[VDF_PAGE_SIZE];
    uint64_t length;

    remake(SIZE);
    int fd = open(s.file, O_RDWR | O_CLOEXEC);
    memset(page, 5, sizeof page);
    for (uint64_t i = 0; i < 20; i++)
        CHECK(pwrite(fd, page, sizeof page, (off_t)AT(i)) == sizeof page);
    close(fd);
    int dir = copy_dir(&s);
    CHECK(vdf_presence_create(dir, SIZE, VDF_PRESENCE_WHOLE, wrong, 1) == -EINVAL);
    CHECK(vdf_presence_create(dir, SIZE, 0, absent, 1) == -EINVAL);
    close(dir);
    copy_create(&s, SIZE, VDF_PRESENCE_WHOLE, absent, 2);
    for (int round = 0; round < 3; round++) {
        vdf_image *image = copy_open(&s, round == 2 ? 0 : VDF_PRESENCE_TRUST);
        CHECK(vdf_image_next_unmapped(image, 0) == -ENXIO);
        CHECK(vdf_image_read(image, AT(13), VDF_PAGE_SIZE, page) == VDF_PAGE_SIZE && page[0] == 5);
        CHECK(copy_put(image, AT(14) + 1, 1, 6) == 0);
        if (round == 0) {
            CHECK(vdf_image_next_absent(image, 0, &length) == AT(10) && length == AT(3));
            CHECK(vdf_image_read(image, AT(10), 1, page) == -EAGAIN);
            CHECK(copy_counts(image).absent_pages == 8);
            CHECK(copy_put(image, AT(11), AT(1), 7) == 0);
            CHECK(copy_counts(image).present_pages == 1);
            CHECK(vdf_image_sync(image, 1) == 0);
            copy_fetch(image, 10, 1);
        } else if (round == 1) {
            CHECK(copy_counts(image).uncommitted_pages == 1);
            CHECK(copy_counts(image).absent_pages == 6);
        } else {
            /* What was fetched and not committed is absent again. */
            CHECK(copy_counts(image).absent_pages == 7);
            CHECK(vdf_image_presence_complete(image) == -EAGAIN);
            copy_fetch(image, 10, 3);
            copy_fetch(image, VDF_REGION_PAGES - 2, 5);
            CHECK(vdf_image_presence_complete(image) == 0);
        }
        copy_check_byte(image, 11, 7);
        vdf_image_unref(image);
    }
    vdf_image *image = copy_open(&s, 0);
    CHECK(copy_counts(image).complete);
    copy_check_base(image, 10);
    copy_check_base(image, VDF_REGION_PAGES + 2);
    CHECK(copy_put(image, AT(33) + 1, 1, 6) == 0 && vdf_image_sync(image, 0) == 0);
    CHECK(vdf_image_next_absent(image, 0, &length) == -ENXIO);
    vdf_image_unref(image);
}

static void a_long_log_is_written_anew(void)
{
    remake(SIZE);
    copy_create(&s, SIZE, 0, NULL, 0);
    vdf_image *image = copy_open(&s, 0);
    uint64_t bytes = 0, page = 0;
    do {
        CHECK(copy_put(image, AT(page), AT(1), 1 + (int)page % 200) == 0);
        CHECK(vdf_image_sync(image, 1) == 0);
        bytes = copy_counts(image).log_bytes;
        page++;
    } while (bytes < 1048576 + 4096);
    CHECK(vdf_image_presence_commit(image) == 0);
    CHECK(copy_counts(image).log_bytes == 1024); /* the head, and one run */
    CHECK(copy_put(image, AT(page + 5), AT(1), 9) == 0 && vdf_image_sync(image, 1) == 0);
    vdf_image_unref(image);
    image = copy_open(&s, 0);
    CHECK(copy_counts(image).present_pages == page + 1);
    for (uint64_t i = 0; i < page; i += 97)
        copy_check_byte(image, i, 1 + (int)i % 200);
    copy_check_base(image, page + 1);
    vdf_image_unref(image);
}

/* The largest file that there may be here: time and memory by what is present. */
static void a_large_disk(void)
{
    uint64_t size = (UINT64_C(64) << 40) - VDF_PAGE_SIZE;
    struct timespec from, now;

    remake(0);
    while (truncate(s.file, (off_t)size) != 0) /* ext4: 16 TiB less one page */
        size /= 2;
    int dir = copy_dir(&s);
    clock_gettime(CLOCK_MONOTONIC, &from);
    int error = vdf_presence_create(dir, size, 0, NULL, 0);
    close(dir);
    CHECK(error == 0 || error == -ENOSPC); /* 32 MiB a TiB */
    for (int i = 0; i < 3 && error == 0; i++) {
        vdf_image *image = copy_open(&s, i == 1 ? VDF_PRESENCE_TRUST : 0);
        CHECK(copy_counts(image).present_pages == (uint64_t)(i == 0 ? 0 : 1));
        CHECK(copy_put(image, size / 2 / VDF_PAGE_SIZE * VDF_PAGE_SIZE, AT(1), 1) == 0);
        CHECK(vdf_image_sync(image, 1) == 0);
        vdf_image_unref(image);
    }
    clock_gettime(CLOCK_MONOTONIC, &now);
    printf("%llu TiB: made and opened 3 times in %lld ms\n", (unsigned long long)(size >> 40),
           (long long)(now.tv_sec - from.tv_sec) * 1000 + (now.tv_nsec - from.tv_nsec) / 1000000);
    remake(SIZE);
}

int main(void)
{
    scratch_make(&s, SIZE);
    whole_pages_need_nothing();
    only_the_missing_pages_are_asked_for();
    zeros_need_only_their_edges();
    what_was_cut_off_stays_away();
    seeks_know_what_is_here();
    the_log_outlives_the_host_and_the_bitmap_the_process();
    a_size_that_was_found_smaller_is_not_forgotten();
    a_torn_end_is_no_damage();
    a_commit_that_fails_loses_nothing();
    a_bitmap_that_lost_bits_is_built_anew();
    all_is_here_but();
    a_long_log_is_written_anew();
    a_large_disk();
    scratch_remove(&s);
    return 0;
}
