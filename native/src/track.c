/* track.c - the bitmaps of one disk and their header: open, grow, count, mark. */
#include "internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static const char track_magic[8] = "VDFTRACK";
#define TRACK_VERSION 1

static int open_file(int dir, const char *name, bool fresh)
{
    int fd = openat(dir, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW | (fresh ? O_CREAT : 0), 0600);

    return fd < 0 ? -errno : fd;
}

static int open_bitmap(vdf_track *track, vdf_bitmap *map, const char *name, bool fresh,
                       uint64_t pages)
{
    int fd = open_file(track->dir, name, fresh);

    return fd < 0 ? fd : vdf_bitmap_open(map, fd, pages);
}

static int open_head(vdf_track *track, const char *name, bool fresh)
{
    int fd = open_file(track->dir, name, fresh);
    int error;

    if (fd < 0)
        return fd;
    struct stat st;
    if (fstat(fd, &st) != 0) {
        error = -errno;
    } else if (!fresh && st.st_size != VDF_PAGE_SIZE) {
        error = -EBADMSG;
    } else {
        do {
            error = -posix_fallocate(fd, 0, VDF_PAGE_SIZE);
        } while (error == -EINTR);
        /* What cannot be read is an error here; in the mapping it would be a SIGBUS. */
        uint8_t seen[VDF_PAGE_SIZE];
        int64_t got = error == 0 ? vdf_file_read(fd, 0, sizeof seen, seen) : 0;
        if (got < 0)
            error = (int)got;
        if (error == 0) {
            void *at = mmap(NULL, VDF_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
            error = at == MAP_FAILED ? -errno : 0;
            track->head = at == MAP_FAILED ? NULL : at;
        }
    }
    close(fd);
    return error;
}

static int check_head(const vdf_track_head *head)
{
    if (memcmp(head->magic, track_magic, sizeof track_magic) != 0 ||
        head->version != TRACK_VERSION || head->epoch == 0 || head->frozen_epoch > head->epoch)
        return -EBADMSG;
    return 0;
}

static void start_head(vdf_track_head *head)
{
    memset(head, 0, sizeof *head);
    head->version = TRACK_VERSION;
    head->epoch = 1;
    head->cut[0] = head->cut[1] = UINT64_MAX;
    memcpy(head->magic, track_magic, sizeof track_magic);
}

/*
 * After a sync that failed the kernel takes what it could not write for written: what the
 * files hold is not known, and a later sync that succeeds says nothing about it.
 */
static void note_lost(vdf_track *track)
{
    atomic_store(&track->lost.unsettled, 1);
    vdf_store(&track->head->lost, 1);
}

/*
 * The kernel writes the two bitmaps back in any order: what one takes over is durable
 * before the other forgets it, or the death of the host loses it.
 */
int vdf_track_fold(vdf_track *track, uint64_t new)
{
    if (atomic_load(&track->dirty[new ^ 1].set) == 0)
        return 0;
    vdf_bitmap_merge(&track->dirty[new], &track->dirty[new ^ 1]);
    int error = vdf_bitmap_sync(&track->dirty[new]);
    if (error != 0)
        note_lost(track);
    return error;
}

/*
 * Frozen goes back to dirty: what was sealed and not captured is captured again.
 * May itself be cut short anywhere: the frozen epoch's cut and bits are merged
 * before its number is forgotten.
 */
static int thaw(vdf_track *track, uint64_t size)
{
    vdf_track_head *head = track->head;
    uint64_t now = head->epoch & 1;

    if (head->frozen_epoch == head->epoch) /* stopped in the middle of announcing a seal */
        vdf_store(&head->frozen_epoch, 0);

    int error = vdf_track_fold(track, now);
    if (error != 0)
        return error;
    vdf_crash("thaw.merged");
    vdf_bitmap_reset(&track->dirty[now ^ 1]);
    vdf_bitmap_reset(&track->preserved);
    vdf_crash("thaw.reset");
    if (head->frozen_epoch != 0) {
        vdf_store(&head->cut[now], vdf_min(head->cut[now], head->cut[now ^ 1]));
        vdf_store(&head->base_size[now], head->base_size[now ^ 1]);
        vdf_store(&head->changed[now], head->changed[now] | head->changed[now ^ 1]);
        /* If the frozen epoch was spooled after all, the page of the old end has to be here too. */
        if (head->base_size[now] % VDF_PAGE_SIZE != 0)
            vdf_bitmap_set(&track->dirty[now], head->base_size[now] / VDF_PAGE_SIZE, 1);
        vdf_crash("thaw.settled");
        vdf_store(&head->frozen_epoch, 0);
        vdf_crash("thaw.released");
    }
    /* Stopped in the middle of a truncation: what the cut takes away may be there still. */
    if (head->cut[now] < size)
        vdf_bitmap_set(&track->dirty[now], head->cut[now] / VDF_PAGE_SIZE,
                       vdf_pages_of(size) - head->cut[now] / VDF_PAGE_SIZE);
    if (atomic_load(&track->dirty[now].set) != 0)
        vdf_store(&head->changed[now], 1);
    return 0;
}

/* The header comes last and under its name at once: half a track is none. */
static int create_head(vdf_track *track)
{
    int error = open_head(track, "track.new", true);

    if (error != 0)
        return error;
    start_head(track->head);
    /* Of what follows any may be lost with the host, but never what makes it a track. */
    if (msync(track->head, VDF_PAGE_SIZE, MS_SYNC) != 0)
        return -errno;
    vdf_crash("track.made");
    return vdf_rename(track->dir, "track.new", track->dir, "track", RENAME_NOREPLACE);
}

static int find_head(vdf_track *track, bool fresh)
{
    struct stat st;

    if (fresh)
        return fstatat(track->dir, "track", &st, AT_SYMLINK_NOFOLLOW) == 0 ? -EEXIST : 0;
    int error = open_head(track, "track", false);
    return error != 0 ? error : check_head(track->head);
}

static int open_all(vdf_track *track, bool fresh, uint64_t pages)
{
    int error = find_head(track, fresh);

    if (error == 0)
        error = open_bitmap(track, &track->dirty[0], "dirty.0", fresh, pages);
    if (error == 0)
        error = open_bitmap(track, &track->dirty[1], "dirty.1", fresh, pages);
    if (error == 0)
        error = open_bitmap(track, &track->preserved, "preserved", fresh, pages);
    if (error == 0)
        error = open_bitmap(track, &track->suspect, "suspect", fresh, pages);
    if (error == 0)
        track->preserve = open_file(track->dir, "preserve", fresh);
    if (error == 0 && track->preserve < 0)
        error = track->preserve;
    if (error == 0 && fresh)
        error = create_head(track);
    return error;
}

/* Before the first store into any of them. */
static int guard_all(vdf_track *track)
{
    vdf_bitmap *const map[] = {&track->dirty[0], &track->dirty[1], &track->preserved,
                               &track->suspect};
    int error = 0;

    track->lost.noted = &track->head->lost;
    if (vdf_load(&track->head->lost) != 0)
        atomic_store(&track->lost.unsettled, 1);
    for (unsigned i = 0; i < 4 && error == 0; i++)
        error = vdf_bitmap_guard(map[i], &track->lost);
    if (error == 0)
        error = vdf_guard_add(track->head, VDF_PAGE_SIZE, &track->lost, &track->head_guard);
    /* Kept here, so that it can always be read. Where that is not allowed it is in use anyhow. */
    if (error == 0)
        mlock(track->head, VDF_PAGE_SIZE);
    return error;
}

int vdf_track_load(const char *directory, uint64_t size, bool fresh, vdf_track **out)
{
    int error = vdf_range_check(0, size);

    if (error != 0)
        return error;
    vdf_track *track = calloc(1, sizeof *track);
    if (track == NULL)
        return -ENOMEM;
    track->preserve = -1;
    atomic_store(&track->budget, UINT64_MAX);
    track->dirty[0].fd = track->dirty[1].fd = track->preserved.fd = track->suspect.fd = -1;
    pthread_mutex_init(&track->admin, NULL);
    pthread_mutex_init(&track->grow_lock, NULL);
    pthread_mutex_init(&track->size_lock, NULL);
    track->dir = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    error = track->dir < 0 ? -errno : open_all(track, fresh, vdf_pages_of(size));
    if (error == 0)
        error = guard_all(track);
    if (error != 0) {
        vdf_track_close(track);
        return error;
    }
    *out = track;
    return 0;
}

int vdf_track_make_log(vdf_track *track, uint32_t slots, vdf_intentlog *log)
{
    const int files[VDF_INTENT_FILES] = {track->dirty[0].fd, track->dirty[1].fd, track->suspect.fd};

    vdf_intentlog_close(log);
    return vdf_intentlog_create(track->dir, slots, files, VDF_INTENT_FILES, log);
}

/* The log goes on where it is sound; a new one is void, and so says nothing wrong. */
static int open_intent(vdf_track *track, uint32_t slots)
{
    const int files[VDF_INTENT_FILES] = {track->dirty[0].fd, track->dirty[1].fd, track->suspect.fd};
    vdf_intentlog log;
    vdf_intent_record record;

    slots = slots == 0 ? VDF_INTENT_SLOTS : slots < VDF_INTENT_MIN ? VDF_INTENT_MIN : slots;
    int error = vdf_intentlog_open(track->dir, files, VDF_INTENT_FILES, &log, &record);
    /* One that could not be read for want of memory is as good as it was. */
    if (error != 0 && error != -ENOMEM) {
        record = (vdf_intent_record){.flags = VDF_INTENT_VOID};
        error = vdf_track_make_log(track, slots > VDF_INTENT_MAX ? VDF_INTENT_MAX : slots, &log);
    }
    if (error == 0) {
        error = vdf_intent_create(track, &log, &record, &track->intent);
        if (error != 0)
            vdf_intentlog_close(&log);
    }
    free(record.region);
    return error;
}

int vdf_track_open_slots(const char *directory, uint64_t size, unsigned flags, uint32_t slots,
                         vdf_track **out)
{
    vdf_track *track;
    int error = vdf_track_load(directory, size, (flags & VDF_TRACK_NEW) != 0, &track);

    if (error != 0)
        return error;
    error = thaw(track, size);
    if (error == 0 && ftruncate(track->preserve, 0) != 0)
        error = -errno;
    atomic_store(&track->epoch, track->head->epoch);
    atomic_store(&track->overflow, track->head->overflow != 0);
    if (error == 0)
        error = open_intent(track, slots);
    if (error != 0) {
        vdf_track_close(track);
        return error;
    }
    *out = track;
    return 0;
}

int vdf_track_open(const char *directory, uint64_t size, unsigned flags, vdf_track **out)
{
    return vdf_track_open_slots(directory, size, flags, 0, out);
}

static int sync_files(vdf_track *track)
{
    int error = vdf_bitmap_sync(&track->dirty[0]);

    if (error == 0)
        error = vdf_bitmap_sync(&track->dirty[1]);
    if (error == 0)
        error = vdf_bitmap_sync(&track->suspect);
    if (error == 0)
        vdf_crash("bitmaps.synced");
    else
        note_lost(track);
    return error;
}

int vdf_track_sync(vdf_track *track)
{
    return atomic_load(&track->lost.unsettled) != 0 ? -EIO : sync_files(track);
}

/* All that is set goes to disk again, and is believed there. */
static int write_again(vdf_track *track)
{
    vdf_bitmap_touch(&track->dirty[0]);
    vdf_bitmap_touch(&track->dirty[1]);
    vdf_bitmap_touch(&track->suspect);
    int error = sync_files(track);
    if (error != 0)
        return error;
    vdf_store(&track->head->lost, 0);
    if (msync(track->head, VDF_PAGE_SIZE, MS_SYNC) != 0) {
        error = -errno;
        note_lost(track);
        return error;
    }
    vdf_crash("track.settled");
    return 0;
}

int vdf_track_settle(vdf_image *image)
{
    vdf_track *track = atomic_load(&image->track);

    if (track == NULL)
        return -EINVAL;
    pthread_mutex_lock(&track->admin);
    int error = atomic_load(&track->lost.pages) != 0 ? -EIO : write_again(track);
    if (error == 0)
        atomic_store(&track->lost.unsettled, 0);
    pthread_mutex_unlock(&track->admin);
    return error;
}

void vdf_track_close(vdf_track *track)
{
    if (track == NULL)
        return;
    vdf_intent_free(track->intent);
    for (int i = 0; i < 2; i++)
        if (track->dirty[i].word != NULL)
            vdf_bitmap_close(&track->dirty[i]);
    if (track->preserved.word != NULL)
        vdf_bitmap_close(&track->preserved);
    if (track->suspect.word != NULL)
        vdf_bitmap_close(&track->suspect);
    if (track->preserve >= 0)
        close(track->preserve);
    vdf_guard_remove(track->head_guard);
    if (track->head != NULL)
        munmap(track->head, VDF_PAGE_SIZE);
    if (track->dir >= 0)
        close(track->dir);
    pthread_mutex_destroy(&track->admin);
    pthread_mutex_destroy(&track->grow_lock);
    pthread_mutex_destroy(&track->size_lock);
    free(track);
}

uint64_t vdf_track_epoch(const vdf_track *track)
{
    return atomic_load(&track->epoch);
}

int vdf_track_set_epoch(vdf_track *track, uint64_t epoch, uint64_t base_size)
{
    vdf_track_head *head = track->head;
    uint64_t old = head->epoch & 1, new = epoch & 1;

    if (epoch == 0 || head->frozen_epoch != 0)
        return -EINVAL;
    /* The number in the middle: a process killed on either side of it finds everything. */
    if (old != new) {
        int error = vdf_track_fold(track, new);
        if (error != 0)
            return error;
        vdf_store(&head->cut[new], head->cut[old]);
        vdf_store(&head->changed[new], head->changed[old]);
    }
    vdf_store(&head->base_size[new], base_size);
    vdf_crash("epoch.prepared");
    vdf_store(&head->epoch, epoch);
    vdf_crash("epoch.numbered");
    if (old != new) {
        vdf_bitmap_reset(&track->dirty[old]);
        vdf_store(&head->cut[old], UINT64_MAX);
        vdf_store(&head->changed[old], 0);
    }
    atomic_store(&track->epoch, epoch);
    return 0;
}

static int grow_all(vdf_track *track, uint64_t pages)
{
    int error = vdf_bitmap_grow(&track->dirty[0], pages);

    if (error == 0)
        error = vdf_bitmap_grow(&track->dirty[1], pages);
    if (error == 0)
        error = vdf_bitmap_grow(&track->preserved, pages);
    if (error == 0)
        error = vdf_bitmap_grow(&track->suspect, pages);
    return error;
}

/* `suspect` grows last. */
uint64_t vdf_track_capacity(const vdf_track *track)
{
    return atomic_load(&track->suspect.capacity);
}

/* With grow_lock held. The smallest page stays: the bitmaps may grow past it meanwhile. */
static void note_missed(vdf_track *track, uint64_t page)
{
    uint64_t noted = vdf_load(&track->head->overflow);

    if (noted == 0 || page + 1 < noted)
        vdf_store(&track->head->overflow, page + 1);
    atomic_store(&track->overflow, 1);
}

void vdf_track_missed(vdf_track *track, uint64_t page)
{
    pthread_mutex_lock(&track->grow_lock);
    note_missed(track, page);
    pthread_mutex_unlock(&track->grow_lock);
}

void vdf_track_reach(vdf_track *track, uint64_t size)
{
    uint64_t pages = vdf_pages_of(size);

    if (pages <= vdf_track_capacity(track))
        return;
    pthread_mutex_lock(&track->grow_lock);
    if (pages > vdf_track_capacity(track) && grow_all(track, pages) != 0)
        note_missed(track, vdf_track_capacity(track));
    pthread_mutex_unlock(&track->grow_lock);
}

int vdf_track_mend(vdf_track *track, uint64_t size)
{
    uint64_t end = vdf_pages_of(size);
    int error = -EAGAIN;

    if (atomic_load(&track->overflow) == 0)
        return 0;
    pthread_mutex_lock(&track->grow_lock);
    if (grow_all(track, end) == 0) {
        uint64_t first = vdf_load(&track->head->overflow) - 1;
        /* Suspect before it is forgotten that they were missed. */
        if (first < end) {
            /* Changed as well: a pass's parts do not count beyond the epoch's smallest size. */
            uint64_t now = atomic_load(&track->epoch) & 1;
            vdf_bitmap_set(&track->suspect, first, end - first);
            vdf_bitmap_set(&track->dirty[now], first, end - first);
            vdf_store(&track->head->changed[now], 1);
        } else {
            error = 0;
        }
        vdf_crash("mend.suspect");
        vdf_store(&track->head->overflow, 0);
        atomic_store(&track->overflow, 0);
    }
    pthread_mutex_unlock(&track->grow_lock);
    return error;
}

void vdf_track_counts_get(vdf_track *track, vdf_track_counts *out)
{
    uint64_t frozen = atomic_load(&track->frozen_epoch);
    uint64_t epoch = atomic_load(&track->epoch);

    memset(out, 0, sizeof *out);
    out->epoch = epoch;
    out->dirty_pages = atomic_load(&track->dirty[epoch & 1].set);
    out->frozen_pages = frozen ? atomic_load(&track->dirty[frozen & 1].set) : 0;
    out->suspect_pages = atomic_load(&track->suspect.set);
    out->preserved_pages = atomic_load(&track->preserved.set);
    out->frozen = frozen != 0;
    out->changed = out->dirty_pages != 0 || vdf_load(&track->head->changed[epoch & 1]) != 0;
    out->overflow = atomic_load(&track->overflow);
    out->abandoned = atomic_load(&track->abandoned) != 0;
    out->lost = atomic_load(&track->lost.unsettled) != 0;
    out->detached = atomic_load(&track->lost.pages) != 0;
}
