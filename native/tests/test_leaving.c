/*
 * test_leaving.c - what a region must have behind it before the intent log on disk names it no
 * more: its bytes synced, its marks synced, and no change under way.
 *
 * fdatasync is this program's own: it keeps what each file has on disk. Whenever a record of
 * the log becomes durable, the disk as a loss of power would leave it is held against the image.
 */
#include "intents.h"

#include <sys/syscall.h>

#define PAGES 2 /* of each region that tests write to */
#define REGION_PAGES (REGION / VDF_PAGE_SIZE)

enum {
    IMAGE,
    DIRTY_0,
    DIRTY_1,
    INTENT,
    FILES,
    OTHER = FILES
};

static struct {
    pthread_mutex_t lock;
    const scratch *s; /* NULL: nothing is kept */
    struct stat file[FILES];
    uint64_t bytes[REGIONS][PAGES]; /* the first of each page */
    bool marked[2][REGIONS][PAGES];
    uint64_t records;
} disk = {.lock = PTHREAD_MUTEX_INITIALIZER};

static unsigned which_file(int fd)
{
    struct stat st;
    unsigned which = 0;

    CHECK(fstat(fd, &st) == 0);
    while (which < FILES && st.st_ino != disk.file[which].st_ino)
        which++;
    return which;
}

static uint64_t read_page(int fd, uint64_t region, uint64_t page)
{
    uint64_t bytes = 0;

    CHECK(vdf_file_read(fd, region * REGION + page * VDF_PAGE_SIZE, sizeof bytes,
                        (uint8_t *)&bytes) >= 0);
    return bytes;
}

static bool read_mark(int fd, uint64_t region, uint64_t page)
{
    uint64_t bit = region * REGION_PAGES + page;
    uint8_t byte = 0;

    CHECK(vdf_file_read(fd, bit / 8, 1, &byte) >= 0);
    return byte >> bit % 8 & 1;
}

/* Invariant: what the log does not name is on disk as it is, and marked there. */
static void check_disk(void)
{
    int image = open(disk.s->file, O_RDONLY | O_CLOEXEC);
    unsigned regions[REGIONS];
    vdf_intent_record record;

    CHECK(image >= 0 && read_log(disk.s, &record, regions) == 0);
    for (uint64_t region = 0; region < REGIONS && !(record.flags & VDF_INTENT_VOID); region++)
        for (uint64_t page = 0; page < PAGES && !regions[region]; page++) {
            uint64_t bytes = read_page(image, region, page);
            bool cut = record.span[VDF_SPAN_CUT][1] == UINT64_MAX &&
                       record.span[VDF_SPAN_CUT][0] <= region * REGION + page * VDF_PAGE_SIZE;
            CHECK(bytes == disk.bytes[region][page]);
            CHECK(bytes == 0 || cut || disk.marked[0][region][page] ||
                  disk.marked[1][region][page]);
        }
    close(image);
    disk.records++;
}

/* In place of the C library's, for the core. */
int fdatasync(int fd)
{
    pthread_mutex_lock(&disk.lock);
    unsigned which = disk.s == NULL ? OTHER : which_file(fd);
    for (uint64_t region = 0; region < REGIONS; region++)
        for (uint64_t page = 0; page < PAGES; page++) {
            if (which == IMAGE)
                disk.bytes[region][page] = read_page(fd, region, page);
            if (which == DIRTY_0 || which == DIRTY_1)
                disk.marked[which - DIRTY_0][region][page] = read_mark(fd, region, page);
        }
    if (which == INTENT)
        check_disk();
    pthread_mutex_unlock(&disk.lock);
    return (int)syscall(SYS_fdatasync, fd);
}

static void watch(scratch *s, uint64_t size)
{
    static const char *const names[] = {"dirty.0", "dirty.1", "intent"};
    char path[128];

    begin(s, size, true);
    pthread_mutex_lock(&disk.lock);
    CHECK(stat(s->file, &disk.file[IMAGE]) == 0);
    for (unsigned i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s", s->tracks, names[i]);
        CHECK(stat(path, &disk.file[DIRTY_0 + i]) == 0);
    }
    memset(disk.bytes, 0, sizeof disk.bytes);
    memset(disk.marked, 0, sizeof disk.marked);
    disk.records = 0;
    disk.s = s;
    pthread_mutex_unlock(&disk.lock);
}

static void unwatch(scratch *s)
{
    vdf_intent_counts now = counts(s);

    pthread_mutex_lock(&disk.lock);
    disk.s = NULL;
    CHECK(now.left > 0 && now.voids == 0 && disk.records > 0);
    pthread_mutex_unlock(&disk.lock);
    end(s);
}

static void put(const scratch *s, uint64_t region, uint64_t page, uint64_t bytes)
{
    CHECK(vdf_image_write(s->image, region * REGION + page * VDF_PAGE_SIZE, sizeof bytes,
                          (const uint8_t *)&bytes) == 0);
}

/* ---- what is true --------------------------------------------------------------------- */

static void a_region_leaves_when_its_bytes_and_its_marks_are_on_disk(void)
{
    scratch s;

    watch(&s, REGIONS * REGION);
    for (uint64_t i = 0; i < 2 * REGIONS; i++)
        put(&s, i % REGIONS, i / REGIONS, i + 1);
    unwatch(&s);
}

typedef struct writer {
    const scratch *s;
    uint64_t state;
    pthread_t thread;
} writer;

static void *write_anywhere(void *argument)
{
    writer *me = argument;

    for (unsigned i = 0; i < 300; i++) {
        uint64_t dice = scratch_random(&me->state);
        put(me->s, dice % REGIONS, (dice >> 32) % PAGES, dice | 1);
    }
    return NULL;
}

static void so_it_is_while_many_write(void)
{
    writer writers[4];
    scratch s;

    watch(&s, REGIONS * REGION);
    for (unsigned i = 0; i < 4; i++) {
        writers[i] = (writer){.s = &s, .state = 23 + i};
        CHECK(pthread_create(&writers[i].thread, NULL, write_anywhere, &writers[i]) == 0);
    }
    for (unsigned i = 0; i < 4; i++)
        CHECK(pthread_join(writers[i].thread, NULL) == 0);
    unwatch(&s);
}

/* What vdf_image_write does once it has its ticket; bitmaps are not made to reach so far. */
static void finish(vdf_change *change, uint64_t offset)
{
    vdf_image *image = change->image;

    vdf_image_lock(image, offset, sizeof block);
    vdf_change_mark(change, offset, sizeof block);
    CHECK(vdf_file_write(image->inner_fd, offset, sizeof block, block) == 0);
    vdf_image_unlock(image, offset, sizeof block);
    vdf_change_end(change);
}

static void *write_all(void *argument)
{
    for (uint64_t i = 1; i < REGIONS; i++)
        put(argument, i, 0, i);
    return NULL;
}

static void no_region_leaves_before_a_change_under_way_is_through(void)
{
    vdf_change change;
    pthread_t others;
    scratch s;

    watch(&s, REGIONS * REGION);
    vdf_change_begin_covered(&change, s.image, 0, sizeof block);
    CHECK(pthread_create(&others, NULL, write_all, &s) == 0);
    while (counts(&s).waits == 0)
        vdf_sleep_ns(1000 * 1000);
    /* They want its slot, and get none for as long as it takes. */
    for (unsigned i = 0; i < 50; i++) {
        CHECK(counts(&s).left == 0);
        vdf_sleep_ns(1000 * 1000);
    }
    finish(&change, 0);
    CHECK(pthread_join(others, NULL) == 0);
    CHECK(!is_active(&s, 0));
    unwatch(&s);
}

static void what_no_bitmap_has_room_for_is_in_the_log_when_its_region_leaves(void)
{
    const uint64_t beyond = 40;
    unsigned regions[REGIONS];
    vdf_intent_record record;
    vdf_change change;
    scratch s;

    watch(&s, 20 * REGION);
    CHECK(vdf_track_capacity(s.track) <= beyond * REGION_PAGES);
    vdf_change_begin_covered(&change, s.image, beyond * REGION, sizeof block);
    finish(&change, beyond * REGION);
    CHECK(is_active(&s, beyond));
    for (uint64_t i = 1; i <= 2 * SLOTS; i++)
        put(&s, beyond + i, 0, i);
    CHECK(read_log(&s, &record, regions) == 0 && !regions[beyond]);
    CHECK(record.span[VDF_SPAN_CUT][0] == beyond * REGION);
    CHECK(record.span[VDF_SPAN_CUT][1] == UINT64_MAX);
    unwatch(&s);
}

int main(void)
{
    a_region_leaves_when_its_bytes_and_its_marks_are_on_disk();
    so_it_is_while_many_write();
    no_region_leaves_before_a_change_under_way_is_through();
    what_no_bitmap_has_room_for_is_in_the_log_when_its_region_leaves();
    return 0;
}
