/*
 * change.c - what a write to a tracked image does around the write itself.
 *
 * A change takes a ticket, and with it the epoch that it belongs to. Under the
 * stripes of its chunks it copies frozen pages that it is about to overwrite to
 * `preserve`, marks its pages, and only then writes.
 *
 * Three cases, by the change's epoch and the frozen one:
 *   no epoch frozen          mark in the change's epoch
 *   change is of a later one preserve what is frozen and not preserved yet; while tickets
 *                            of the frozen epoch are out, also pages that are not marked
 *                            in it: one of those tickets may still come to them; mark
 *   change is of the frozen  a page that is preserved already belongs to the later epoch
 *                            now: mark it there; the others in the frozen one
 */
#include "internal.h"

#include <string.h>
#include <unistd.h>

void vdf_track_notify(vdf_image *image, vdf_track *track)
{
    if (atomic_load(&track->notified) == 0 && atomic_exchange(&track->notified, 1) == 0)
        vdf_event_post(image->core, VDF_EVENT_DIRTY, 0, image->cookie, 0, 0);
}

void vdf_track_give_up(vdf_image *image, vdf_track *track, int error)
{
    uint32_t none = 0;

    if (atomic_compare_exchange_strong(&track->abandoned, &none, (uint32_t)-error))
        vdf_event_post(image->core, VDF_EVENT_ABANDONED, -error, image->cookie, 0, 0);
}

void vdf_change_begin(vdf_change *change, vdf_image *image)
{
    change->image = image;
    change->missed = UINT64_MAX;
    change->ticket = vdf_gate_enter(&image->gate);
    /* Read with the ticket held: vdf_image_set_track waits for it. */
    change->track = atomic_load(&image->track);
    change->epoch = change->ticket.epoch;
    /* A ticket from before tracking began: nothing is sealed until it is back. */
    if (change->track != NULL && change->epoch == 0)
        change->epoch = atomic_load(&change->track->epoch);
}

void vdf_change_begin_covered(vdf_change *change, vdf_image *image, uint64_t offset,
                              uint64_t length)
{
    vdf_change_begin(change, image);
    while (change->track != NULL && !vdf_intent_covers(change->track->intent, offset, length)) {
        vdf_intent *intent = change->track->intent;
        atomic_fetch_add(&intent->users, 1);
        vdf_change_end(change);
        vdf_intent_hold hold = vdf_intent_take(intent, offset, length);
        vdf_change_begin(change, image);
        vdf_intent_put(intent, hold);
    }
}

void vdf_change_begin_span(vdf_change *change, vdf_image *image, unsigned which, uint64_t from,
                           uint64_t to)
{
    vdf_change_begin(change, image);
    while (change->track != NULL &&
           !vdf_intent_covers_span(change->track->intent, which, from, to)) {
        vdf_intent *intent = change->track->intent;
        atomic_fetch_add(&intent->users, 1);
        vdf_change_end(change);
        vdf_intent_hold hold = vdf_intent_take_span(intent, which, from, to);
        vdf_change_begin(change, image);
        vdf_intent_put(intent, hold);
    }
}

void vdf_change_begin_unmarked(vdf_change *change, vdf_image *image)
{
    vdf_change_begin(change, image);
    /* The file's time of change moves: the log's stamp must keep up with it. */
    while (change->track != NULL && vdf_intent_is_asleep(change->track->intent)) {
        vdf_intent *intent = change->track->intent;
        atomic_fetch_add(&intent->users, 1);
        vdf_change_end(change);
        vdf_intent_wake(intent);
        vdf_change_begin(change, image);
    }
}

void vdf_change_end(vdf_change *change)
{
    /* Said again now that the bytes and the size are in place, and before a seal goes on. */
    if (change->missed != UINT64_MAX)
        vdf_track_missed(change->track, change->missed);
    vdf_gate_leave(&change->image->gate, change->ticket);
}

/* Pages copied at a time: on the stack, and in the processor's cache. */
#define COPY_PAGES 64

/* Copies count pages to `preserve`; what lies beyond the end of the file stays a hole there. */
static int copy_pages(const vdf_change *change, uint64_t page, uint64_t count)
{
    uint8_t block[COPY_PAGES * VDF_PAGE_SIZE];

    while (count > 0) {
        uint64_t step = vdf_min(count, COPY_PAGES);
        int64_t got = vdf_file_read(change->image->inner_fd, page * VDF_PAGE_SIZE,
                                    step * VDF_PAGE_SIZE, block);
        if (got < 0)
            return (int)got;
        memset(block + got, 0, step * VDF_PAGE_SIZE - (uint64_t)got);
        int error = vdf_file_write(change->track->preserve, page * VDF_PAGE_SIZE,
                                   step * VDF_PAGE_SIZE, block);
        if (error != 0)
            return error;
        page += step;
        count -= step;
    }
    return 0;
}

/* The next stretch of pages in [*page, end) to preserve; its length, 0 when none is left. */
static uint64_t next_needed(const vdf_track *track, const vdf_bitmap *frozen, bool all,
                            uint64_t *page, uint64_t end)
{
    while (*page < end) {
        uint64_t first = all ? *page : vdf_bitmap_next(frozen, *page, end);
        first = vdf_bitmap_next_clear(&track->preserved, first, end);
        *page = first;
        if (first >= end)
            return 0;
        if (!all && !vdf_bitmap_test(frozen, first))
            continue;
        uint64_t stop = vdf_bitmap_next(&track->preserved, first, end);
        if (!all)
            stop = vdf_min(stop, vdf_bitmap_next_clear(frozen, first, end));
        return stop - first;
    }
    return 0;
}

/*
 * A lazy image: whether a page of the range is marked in the frozen epoch and yet not here. A
 * change that failed after it marked, or the death of a host, leaves such a page; the file
 * does not hold what it was at the seal, so that it cannot be copied.
 *
 * Of the pages that are not marked, those that are not here are copied all the same while old
 * tickets are out: a hole, or nothing that counts. Nobody reads that copy. Only a mark in the
 * frozen epoch makes the capture look for it, and an old ticket that comes to the page later
 * finds it preserved and counts itself to the next epoch.
 */
static bool is_frozen_missing(const vdf_change *change, const vdf_bitmap *frozen, uint64_t page,
                              uint64_t end)
{
    const vdf_lazy *lazy = vdf_image_lazy(change->image);

    if (lazy == NULL)
        return false;
    for (page = vdf_bitmap_next(frozen, page, end); page < end;
         page = vdf_bitmap_next(frozen, page, end)) {
        uint64_t stop = vdf_bitmap_next_clear(frozen, page, end);
        if (!vdf_lazy_is_here(lazy, page, stop))
            return true;
        page = stop;
    }
    return false;
}

static void preserve(vdf_change *change, uint64_t frozen_epoch, uint64_t page, uint64_t end)
{
    vdf_track *track = change->track;
    const vdf_bitmap *frozen = &track->dirty[frozen_epoch & 1];
    bool all = atomic_load(&track->drained) == 0;
    uint64_t copied = 0, count;

    while (atomic_load(&track->abandoned) == 0 &&
           (count = next_needed(track, frozen, all, &page, end)) != 0) {
        copied += count;
        uint64_t held = atomic_load(&track->preserved.set) + count;
        bool outrun = copied > VDF_PRESERVE_BOUND || held > atomic_load(&track->budget);
        int error = outrun ? -EFBIG : 0;
        if (error == 0 && is_frozen_missing(change, frozen, page, page + count))
            error = -EAGAIN;
        if (error == 0)
            error = copy_pages(change, page, count);
        if (error != 0) {
            vdf_track_give_up(change->image, track, error);
            return;
        }
        /* Set after the copy: capture reads the image first, then looks here. */
        vdf_crash("preserve.written");
        vdf_bitmap_set(&track->preserved, page, count);
        vdf_crash("preserve.marked");
        page += count;
    }
}

static void mark_pages(vdf_track *track, uint64_t epoch, uint64_t page, uint64_t count)
{
    vdf_bitmap_set(&track->dirty[epoch & 1], page, count);
    vdf_store(&track->head->changed[epoch & 1], 1);
    vdf_crash("change.marked");
}

/* A change of the frozen epoch: pages preserved by a later one count to that. */
static void mark_late(vdf_track *track, uint64_t frozen, uint64_t page, uint64_t end)
{
    while (page < end) {
        uint64_t taken = vdf_bitmap_next(&track->preserved, page, end);
        if (taken > page)
            mark_pages(track, frozen, page, taken - page);
        if (taken >= end)
            return;
        page = vdf_bitmap_next_clear(&track->preserved, taken, end);
        mark_pages(track, frozen + 1, taken, page - taken);
    }
}

/* Whether a change of the frozen epoch may come to lie beyond the size that the seal takes. */
static bool is_outside(const vdf_change *change, uint64_t end)
{
    vdf_track *track = change->track;

    pthread_mutex_lock(&track->size_lock);
    uint64_t size = track->sealed_known ? track->sealed_size : atomic_load(&change->image->size);
    pthread_mutex_unlock(&track->size_lock);
    return end > size;
}

/* Beyond the bitmaps: the growth failed, or tracking began after room was asked for. */
static void check_reach(vdf_change *change, uint64_t page, uint64_t end)
{
    uint64_t capacity = vdf_track_capacity(change->track);

    if (end <= capacity)
        return;
    change->missed = vdf_min(change->missed, page > capacity ? page : capacity);
    vdf_track_missed(change->track, change->missed);
}

void vdf_change_mark(vdf_change *change, uint64_t offset, uint64_t length)
{
    vdf_track *track = change->track;

    if (track == NULL || length == 0)
        return;
    uint64_t page = offset / VDF_PAGE_SIZE;
    uint64_t end = vdf_pages_of(offset + length);
    uint64_t frozen = atomic_load(&track->frozen_epoch);
    check_reach(change, page, end);
    if (frozen != 0 && change->epoch > frozen)
        preserve(change, frozen, page, end);
    if (frozen != 0 && change->epoch == frozen) {
        mark_late(track, frozen, page, end);
        /* The capture leaves out what lies beyond the sealed size: the next one takes it. */
        if (is_outside(change, offset + length))
            mark_pages(track, frozen + 1, page, end - page);
    } else {
        mark_pages(track, change->epoch, page, end - page);
    }
    vdf_track_notify(change->image, track);
}

/*
 * The pages behind the new end need no mark, the cut says that they are gone; but
 * those that are frozen are preserved, and the page of the new end changes.
 */
void vdf_change_cut(vdf_change *change, uint64_t size, uint64_t old)
{
    uint64_t frozen = atomic_load(&change->track->frozen_epoch);

    if (frozen != 0 && change->epoch > frozen)
        preserve(change, frozen, size / VDF_PAGE_SIZE, vdf_pages_of(old));
    if (size % VDF_PAGE_SIZE == 0)
        return;
    vdf_change_mark(change, size, 1);
    /* The size may yet count to the later epoch (vdf_change_size): its page then too. */
    if (frozen != 0 && change->epoch == frozen)
        mark_pages(change->track, frozen + 1, size / VDF_PAGE_SIZE, 1);
}

void vdf_change_uncut(vdf_change *change, uint64_t size, uint64_t old)
{
    uint64_t frozen = atomic_load(&change->track->frozen_epoch);

    vdf_change_mark(change, size, old - size);
    if (frozen != 0 && change->epoch == frozen)
        mark_pages(change->track, frozen + 1, size / VDF_PAGE_SIZE,
                   vdf_pages_of(old) - size / VDF_PAGE_SIZE);
}

void vdf_change_wait_drained(const vdf_change *change)
{
    const vdf_track *track = change->track;

    if (track == NULL)
        return;
    for (;;) {
        uint64_t frozen = atomic_load(&track->frozen_epoch);
        if (frozen == 0 || change->epoch <= frozen || atomic_load(&track->drained) != 0)
            return;
        vdf_sleep_ns(50 * 1000);
    }
}

void vdf_change_size(vdf_change *change, uint64_t size)
{
    vdf_track *track = change->track;

    if (track == NULL)
        return;
    vdf_track_head *head = track->head;
    uint64_t frozen = atomic_load(&track->frozen_epoch);
    uint64_t epoch = change->epoch;
    if (frozen != 0 && epoch > frozen && !track->sealed_known) {
        track->sealed_size = atomic_load(&change->image->size);
        track->sealed_known = 1;
    }
    if (frozen != 0 && epoch == frozen && track->sealed_known)
        epoch = frozen + 1;
    vdf_store(&head->cut[epoch & 1], vdf_min(vdf_load(&head->cut[epoch & 1]), size));
    vdf_store(&head->changed[epoch & 1], 1);
    vdf_crash("size.marked");
    vdf_track_notify(change->image, track);
}

int vdf_track_mark(vdf_image *image, uint64_t offset, uint64_t length)
{
    vdf_change change;
    int error = vdf_range_check(offset, length);

    if (error != 0)
        return error;
    vdf_track *track = atomic_load(&image->track);
    if (track == NULL)
        return -EINVAL;
    vdf_track_reach(track, offset + length);
    for (uint64_t at = offset, end = offset + length; at < end;) {
        uint64_t step = vdf_min(end, (at / VDF_REGION_SIZE + 1) * VDF_REGION_SIZE) - at;
        vdf_change_begin_covered(&change, image, at, step);
        vdf_image_lock(image, at, step);
        vdf_change_mark(&change, at, step);
        vdf_image_unlock(image, at, step);
        vdf_change_end(&change);
        at += step;
    }
    return 0;
}
