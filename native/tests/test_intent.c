/*
 * test_intent.c - the intent log: what is in it before a write is through, what leaves it,
 * what a torn or damaged one says.
 */
#include "intents.h"

static void a_region_is_logged_once_before_its_first_write_is_through(void)
{
    scratch s;

    begin(&s, REGIONS * REGION, true);
    CHECK(count_active(&s) == 0);
    write_page(&s, 7 * REGION);
    CHECK(is_active(&s, 7) && count_active(&s) == 1);
    uint64_t commits = counts(&s).commits, misses = counts(&s).misses;
    for (uint64_t i = 0; i < 200; i++)
        write_page(&s, 7 * REGION + i * VDF_PAGE_SIZE);
    CHECK(counts(&s).commits <= commits + 2 && counts(&s).misses == misses);
    write_page(&s, 9 * REGION - 100);
    CHECK(is_active(&s, 8) && is_active(&s, 9) && count_active(&s) == 3);
    CHECK(vdf_image_allocate(s.image, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 11 * REGION,
                             2 * REGION) == 0);
    CHECK(is_active(&s, 11) && is_active(&s, 12) && !is_active(&s, 13));
    CHECK(vdf_track_mark(s.image, 20 * REGION, 1) == 0 && is_active(&s, 20));
    /* Growing takes nothing away. */
    CHECK(vdf_image_truncate(s.image, (REGIONS + 50) * REGION) == 0);
    CHECK(vdf_image_allocate(s.image, 0, 30 * REGION, REGION) == 0 && !is_active(&s, 30));
    CHECK(count_active(&s) == 6);
    end(&s);
}

static void regions_leave_to_make_room_and_the_log_never_has_more_than_its_slots(void)
{
    scratch s;

    begin(&s, REGIONS * REGION, true);
    for (uint64_t i = 0; i < REGIONS; i++) {
        write_page(&s, i * REGION);
        CHECK(is_active(&s, i));
    }
    vdf_intent_counts now = counts(&s);
    CHECK(now.slots == SLOTS && now.active <= SLOTS && now.rounds > 0);
    CHECK(now.left >= REGIONS - SLOTS && count_active(&s) <= SLOTS && now.voids == 0);
    end(&s);
}

static void the_log_goes_on_after_the_death_of_the_daemon(void)
{
    scratch s;

    begin(&s, REGIONS * REGION, true);
    write_page(&s, 3 * REGION);
    write_page(&s, 4 * REGION);
    scratch_close(&s);
    s.image = scratch_image(&s, 0, O_RDWR);
    CHECK(vdf_track_open(s.tracks, REGIONS * REGION, 0, &s.track) == 0);
    CHECK(vdf_image_set_track(s.image, s.track) == 0);
    CHECK(!counts(&s).is_void && counts(&s).active == 2);
    /* The first write after a pause says when it was. */
    write_page(&s, 3 * REGION);
    CHECK(counts(&s).commits == 1 && count_active(&s) == 2);
    end(&s);
}

static void large_discards_and_truncations_are_spans_until_they_are_safe(void)
{
    unsigned regions[REGIONS];
    vdf_intent_record record;
    vdf_seal seal;
    scratch s;

    begin(&s, REGIONS * REGION, true);
    CHECK(vdf_image_allocate(s.image, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, REGION,
                             100 * REGION) == 0);
    CHECK(read_log(&s, &record, regions) == 0 && count_active(&s) == 0);
    CHECK(record.span[VDF_SPAN_WIDE][0] == REGION && record.span[VDF_SPAN_WIDE][1] == 101 * REGION);
    CHECK(record.span[VDF_SPAN_CUT][1] == 0);
    CHECK(vdf_image_truncate(s.image, 150 * REGION + 5) == 0);
    CHECK(vdf_image_truncate(s.image, REGIONS * REGION) == 0);
    CHECK(read_log(&s, &record, regions) == 0);
    CHECK(record.span[VDF_SPAN_CUT][0] == 150 * REGION + 5);
    CHECK(record.span[VDF_SPAN_CUT][1] == UINT64_MAX);
    /* Room is made: the discard is durable, the cut is known to nothing but the log. */
    for (uint64_t i = 0; i < 2 * SLOTS; i++)
        write_page(&s, i * REGION);
    CHECK(read_log(&s, &record, regions) == 0);
    CHECK(record.span[VDF_SPAN_WIDE][1] == 0 && record.span[VDF_SPAN_CUT][1] == UINT64_MAX);
    CHECK(vdf_seal_images(&s.image, 1, &seal) == 0 && seal.low == 150 * REGION + 5);
    CHECK(vdf_capture_forget(s.image) == 0);
    for (uint64_t i = 0; i < 2 * SLOTS; i++)
        write_page(&s, (100 + i) * REGION);
    CHECK(read_log(&s, &record, regions) == 0 && record.span[VDF_SPAN_CUT][1] == 0);
    end(&s);
}

/* ---- what cannot be written ------------------------------------------------------ */

static void a_log_that_cannot_be_written_is_void_and_costs_the_guest_nothing(void)
{
    unsigned regions[REGIONS];
    vdf_intent_record record;
    vdf_event event;
    scratch s;

    begin(&s, REGIONS * REGION, true);
    write_page(&s, 0);
    while (vdf_core_next_event(s.core, &event) == 1)
        CHECK(event.kind == VDF_EVENT_DIRTY);
    int full = open("/dev/full", O_RDWR | O_CLOEXEC);
    CHECK(full >= 0);
    pthread_mutex_lock(&s.track->intent->lock);
    CHECK(dup2(full, s.track->intent->log.fd) >= 0);
    pthread_mutex_unlock(&s.track->intent->lock);
    close(full);
    for (uint64_t i = 1; i < REGIONS; i++)
        write_page(&s, i * REGION);
    CHECK(vdf_core_next_event(s.core, &event) == 1 && event.kind == VDF_EVENT_INTENT_VOID);
    CHECK(event.error == ENOSPC && event.offset == 1 && event.cookie == 7);
    CHECK(counts(&s).voids == 1);
    /* The disk takes it again: nothing is active, everything before is durable. */
    wait_kept(&s);
    write_page(&s, 5 * REGION);
    CHECK(read_log(&s, &record, regions) == 0 && !(record.flags & VDF_INTENT_VOID));
    CHECK(is_active(&s, 5) && count_active(&s) <= SLOTS);
    end(&s);
}

static void a_void_log_says_nothing(void)
{
    vdf_recovery found;
    scratch s;

    scratch_make(&s, REGIONS * REGION);
    scratch_open(&s, VDF_TRACK_NEW); /* not begun */
    write_page(&s, 0);
    scratch_close(&s);
    CHECK(recover(&s, 0, &found) == -EBADMSG);
    scratch_remove(&s);
}

/* ---- torn and damaged --------------------------------------------------------------- */

enum {
    COPY = 4096 /* one with SLOTS slots */
};

static void rewrite(const scratch *s, uint64_t offset, uint64_t length, const uint8_t *data)
{
    char path[128];

    snprintf(path, sizeof path, "%s/intent", s->tracks);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    CHECK(fd >= 0 && vdf_file_write(fd, offset, length, data) == 0);
    close(fd);
}

static void keep(const scratch *s, uint8_t *bytes)
{
    char path[128];

    snprintf(path, sizeof path, "%s/intent", s->tracks);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0 && vdf_file_read(fd, 0, 2 * COPY, bytes) == 2 * COPY);
    close(fd);
}

static void a_torn_record_leaves_the_one_before_it(void)
{
    uint8_t before[2 * COPY], after[2 * COPY];
    unsigned regions[REGIONS];
    vdf_intent_record record;
    scratch s;

    begin(&s, REGIONS * REGION, true);
    write_page(&s, REGION);
    keep(&s, before);
    write_page(&s, 2 * REGION);
    keep(&s, after);
    /* Two sectors: the description and the regions; either may be the one that arrived. */
    uint64_t at = memcmp(before, after, COPY) != 0 ? 0 : COPY;
    for (unsigned half = 0; half < 2; half++) {
        rewrite(&s, at, COPY, before + at);
        rewrite(&s, at + half * 512, 512, after + at + half * 512);
        CHECK(read_log(&s, &record, regions) == 0 && regions[1] && !regions[2]);
    }
    rewrite(&s, at, COPY, after + at);
    CHECK(read_log(&s, &record, regions) == 0 && regions[1] && regions[2]);
    end(&s);
}

static void a_damaged_log_is_never_read_as_an_older_one(void)
{
    uint8_t good[2 * COPY], bad[2 * COPY];
    unsigned regions[REGIONS];
    vdf_intent_record record;
    vdf_recovery found;
    scratch s;

    begin(&s, REGIONS * REGION, true);
    for (uint64_t i = 0; i < 10; i++)
        write_page(&s, i * REGION);
    scratch_close(&s);
    keep(&s, good);
    for (unsigned copy = 0; copy < 2; copy++)
        for (unsigned at = 0; at < 1024; at++) {
            memcpy(bad, good, sizeof bad);
            bad[copy * COPY + at] ^= (uint8_t)(1 + at % 255);
            rewrite(&s, 0, sizeof bad, bad);
            CHECK(read_log(&s, &record, regions) == -EBADMSG);
        }
    CHECK(recover(&s, 0, &found) == -EBADMSG);
    rewrite(&s, 0, sizeof good, good);
    CHECK(recover(&s, 0, &found) == 0 && found.regions == 10);
    char path[128];
    snprintf(path, sizeof path, "%s/intent", s.tracks);
    CHECK(truncate(path, COPY) == 0 && recover(&s, 0, &found) == -EBADMSG);
    CHECK(unlink(path) == 0 && recover(&s, 0, &found) == -ENOENT);
    scratch_remove(&s);
}

static void a_log_of_other_files_says_nothing(void)
{
    char from[128], to[128];
    uint8_t bytes[2 * COPY];
    vdf_recovery found;
    scratch s;

    begin(&s, REGIONS * REGION, true);
    write_page(&s, 0);
    scratch_close(&s);
    keep(&s, bytes);
    snprintf(from, sizeof from, "%s/intent", s.tracks);
    snprintf(to, sizeof to, "%s/other", s.tracks);
    /* As a backup of the state directory gives it back: the same bytes, another file. */
    int fd = open(to, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && vdf_file_write(fd, 0, sizeof bytes, bytes) == 0);
    close(fd);
    CHECK(recover(&s, 0, &found) == 0);
    CHECK(rename(to, from) == 0);
    CHECK(recover(&s, 0, &found) == -EBADMSG);
    scratch_remove(&s);
}

/* ---- recovery -------------------------------------------------------------------------- */

typedef struct writer {
    scratch *s;
    uint64_t state;
    pthread_t thread;
} writer;

static _Atomic bool over;

static void *write_anywhere(void *argument)
{
    writer *me = argument;

    for (int i = 0; i < 400; i++) {
        uint64_t dice = scratch_random(&me->state);
        uint64_t offset = scratch_random(&me->state) % (REGIONS * REGION - VDF_PAGE_SIZE);
        if (dice % 64 == 0)
            CHECK(vdf_image_allocate(me->s->image, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                     offset, (dice >> 8) % (40 * REGION) + 1) == 0);
        else if (dice % 64 == 1)
            CHECK(vdf_image_truncate(me->s->image, REGIONS * REGION - (dice >> 8) % REGION) == 0);
        else
            write_page(me->s, offset);
    }
    return NULL;
}

static void *seal_and_forget(void *argument)
{
    scratch *s = argument;
    vdf_seal seal;

    for (unsigned i = 0; !atomic_load(&over); i++) {
        if (vdf_seal_images(&s->image, 1, &seal) == 0)
            CHECK((i % 3 ? vdf_capture_forget : vdf_capture_abandon)(s->image) == 0);
        vdf_sleep_ns(1000 * 1000);
    }
    return NULL;
}

static void many_writers_share_what_they_wait_for(void)
{
    writer writers[6];
    pthread_t sealer;
    scratch s;

    begin(&s, REGIONS * REGION, true);
    CHECK(pthread_create(&sealer, NULL, seal_and_forget, &s) == 0);
    for (unsigned i = 0; i < 6; i++) {
        writers[i] = (writer){.s = &s, .state = 17 + i};
        CHECK(pthread_create(&writers[i].thread, NULL, write_anywhere, &writers[i]) == 0);
    }
    for (unsigned i = 0; i < 6; i++)
        CHECK(pthread_join(writers[i].thread, NULL) == 0);
    atomic_store(&over, true);
    CHECK(pthread_join(sealer, NULL) == 0);
    vdf_intent_counts now = counts(&s);
    printf("%llu misses, %llu records, %llu rounds, %llu left\n", (unsigned long long)now.misses,
           (unsigned long long)now.commits, (unsigned long long)now.rounds,
           (unsigned long long)now.left);
    CHECK(now.voids == 0 && now.commits < now.misses && now.active <= SLOTS && now.rounds > 0);
    for (uint32_t i = 0; i < SLOTS; i++)
        CHECK(s.track->intent->slot[i].pins == 0);
    end(&s);
}

int main(void)
{
    a_region_is_logged_once_before_its_first_write_is_through();
    regions_leave_to_make_room_and_the_log_never_has_more_than_its_slots();
    the_log_goes_on_after_the_death_of_the_daemon();
    large_discards_and_truncations_are_spans_until_they_are_safe();
    a_log_that_cannot_be_written_is_void_and_costs_the_guest_nothing();
    a_void_log_says_nothing();
    a_torn_record_leaves_the_one_before_it();
    a_damaged_log_is_never_read_as_an_older_one();
    a_log_of_other_files_says_nothing();
    many_writers_share_what_they_wait_for();
    return 0;
}
