/*
 * test_hookkill.c - a process that is killed at a crash hook which no walk comes to: regions that
 * leave the intent log, a log that is made void, bitmaps that have room again. Its successor
 * finds what must be there.
 */
#include "intents.h"

#include <errno.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

static const uint64_t per_page = UINT64_C(32768) * VDF_PAGE_SIZE; /* tracked by a page of bitmap */
static scratch s;

/* Does it in a child, which is killed at the hook. */
static void die_at(const char *plan, void (*act)(void))
{
    int status;
    pid_t pid = fork();

    CHECK(pid >= 0);
    if (pid == 0) {
        vdf_crash_arm(plan, NULL);
        act();
        _exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

static void make(void)
{
    begin(&s, REGIONS * REGION, true);
    scratch_close(&s);
}

static void write_all(void)
{
    begin(&s, REGIONS * REGION, false);
    for (uint64_t i = 0; i < REGIONS; i++)
        write_page(&s, i * REGION);
}

static void write_to_a_full_log(void)
{
    begin(&s, REGIONS * REGION, false);
    int full = open("/dev/full", O_RDWR | O_CLOEXEC);
    CHECK(full >= 0);
    pthread_mutex_lock(&s.track->intent->lock);
    CHECK(dup2(full, s.track->intent->log.fd) >= 0);
    pthread_mutex_unlock(&s.track->intent->lock);
    write_page(&s, REGION);
}

/* Had the host died, too: what the log does not name is marked page by page. */
static void regions_that_left_are_named_or_marked(void)
{
    const uint64_t pages = REGION / VDF_PAGE_SIZE;
    static uint8_t found_page[VDF_PAGE_SIZE];
    vdf_recovery found;
    uint64_t written = 0;

    make();
    die_at("intent.region-left:2", write_all);
    CHECK(recover(&s, 0, &found) == 0 && found.regions > 0 && found.regions <= SLOTS);
    s.image = scratch_image(&s, 0, O_RDWR);
    CHECK(vdf_track_open(s.tracks, REGIONS * REGION, 0, &s.track) == 0);
    CHECK(vdf_image_set_track(s.image, s.track) == 0);
    int fd = open(s.file, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    for (uint64_t i = 0; i < REGIONS; i++) {
        CHECK(pread(fd, found_page, sizeof found_page, (off_t)(i * REGION)) ==
              (ssize_t)sizeof found_page);
        if (memcmp(found_page, block, sizeof block) != 0)
            continue;
        written++;
        CHECK(vdf_bitmap_test(&s.track->suspect, i * pages) ||
              vdf_track_is_changed(s.image, i * pages));
    }
    close(fd);
    CHECK(written >= SLOTS / 2);
    end(&s);
}

static void a_log_that_was_made_void_is_not_believed_and_is_begun_anew(void)
{
    vdf_recovery found;

    make();
    die_at("intent.voided:1", write_to_a_full_log);
    CHECK(recover(&s, 0, &found) == -ENOENT); /* it could not even be written that it is void */
    begin(&s, REGIONS * REGION, false);
    write_page(&s, 2 * REGION);
    CHECK(is_active(&s, 2));
    end(&s);
}

/* A change beyond what the bitmaps reach, which have no room to grow; then they have. */
static void grow_late(void)
{
    struct rlimit limit, small;
    vdf_seal seal;

    scratch_open(&s, VDF_TRACK_NEW);
    signal(SIGXFSZ, SIG_IGN);
    CHECK(getrlimit(RLIMIT_FSIZE, &limit) == 0);
    small = limit;
    small.rlim_cur = VDF_PAGE_SIZE;
    CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
    vdf_track_reach(s.track, 3 * per_page);
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    CHECK(vdf_image_write(s.image, 2 * per_page, 1, (const uint8_t *)"y") == 0);
    vdf_seal_images(&s.image, 1, &seal);
}

static void what_was_not_tracked_is_suspect_before_that_is_forgotten(void)
{
    vdf_track_counts now;
    vdf_seal seal;

    scratch_make(&s, VDF_PAGE_SIZE);
    die_at("mend.suspect:1", grow_late);
    scratch_open(&s, 0);
    vdf_track_counts_get(s.track, &now);
    CHECK(now.overflow == 1 || now.suspect_pages != 0);
    CHECK(vdf_bitmap_test(&s.track->suspect, 2 * per_page / VDF_PAGE_SIZE));
    /* Once more, and it can be sealed. */
    while (vdf_seal_images(&s.image, 1, &seal) == -EAGAIN)
        continue;
    CHECK(vdf_bitmap_test(&s.track->suspect, 2 * per_page / VDF_PAGE_SIZE));
    CHECK(vdf_capture_forget(s.image) == 0);
    end(&s);
}

int main(void)
{
    regions_that_left_are_named_or_marked();
    a_log_that_was_made_void_is_not_believed_and_is_begun_anew();
    what_was_not_tracked_is_suspect_before_that_is_forgotten();
    return 0;
}
