/*
 * recover.c - a track after the death of its host.
 *
 * The bitmaps on disk are a mixture of moments, but for a region that the intent log does
 * not name each of these moments marked every page that spool and vault lack. So what they
 * mark is kept, and of the regions that the log names nothing is believed. The header is
 * written anew: sizes and cuts in it may be of any moment.
 *
 * Steps, each durable before the next: marks gathered in one bitmap, regions suspect; the
 * header; the other bitmaps cleared. The log stays as it is, so that all of it can be done
 * again: gathering twice marks too much, never too little.
 */
#include "internal.h"

#include <stdlib.h>
#include <sys/mman.h>

#define REGION_PAGES (VDF_INTENT_REGION / VDF_PAGE_SIZE)

/* What the log says; -ESTALE: the image was changed when nobody kept it. */
static int read_log(vdf_track *track, uint64_t change_ns, vdf_intent_record *record,
                    uint32_t *slots)
{
    const int files[VDF_INTENT_FILES] = {track->dirty[0].fd, track->dirty[1].fd, track->suspect.fd};
    const uint64_t allowance = VDF_INTENT_ALLOWANCE_S * UINT64_C(1000000000);
    vdf_intentlog log;
    int error = vdf_intentlog_open(track->dir, files, VDF_INTENT_FILES, &log, record);

    if (error != 0)
        return error;
    *slots = log.slots;
    vdf_intentlog_close(&log);
    if (record->flags & VDF_INTENT_VOID)
        return -EBADMSG;
    return change_ns > vdf_add(record->stamp_ns, allowance) ? -ESTALE : 0;
}

static void suspect_regions(vdf_track *track, uint64_t pages, uint64_t new,
                            const vdf_intent_record *record, uint32_t slots, vdf_recovery *out)
{
    out->regions = 0;
    for (uint32_t i = 0; i < slots; i++) {
        uint64_t first = (uint64_t)record->region[i] * REGION_PAGES;
        if (record->region[i] == VDF_INTENT_NONE)
            continue;
        if (out->regions < out->capacity)
            out->region[out->regions++] = record->region[i];
        if (first >= pages)
            continue;
        uint64_t count = vdf_min(REGION_PAGES, pages - first);
        vdf_bitmap_set(&track->suspect, first, count);
        /* Compared and sent where it differs, instead of sent in any case. */
        vdf_bitmap_clear(&track->dirty[new], first, count);
    }
}

static void take_spans(const vdf_track_head *head, uint64_t size, const vdf_intent_record *record,
                       vdf_recovery *out)
{
    for (unsigned i = 0; i < VDF_INTENT_SPANS; i++) {
        out->start[i] = record->span[i][0];
        out->end[i] = vdf_min(record->span[i][1], size);
    }
    /* The log says it too before anything relies on it; not believed if it is an old one. */
    uint64_t missed = vdf_load(&head->overflow);
    if (missed != 0 && (missed - 1) * VDF_PAGE_SIZE < size) {
        bool empty = out->end[VDF_SPAN_CUT] <= out->start[VDF_SPAN_CUT];
        uint64_t from = (missed - 1) * VDF_PAGE_SIZE;
        out->start[VDF_SPAN_CUT] = empty ? from : vdf_min(from, out->start[VDF_SPAN_CUT]);
        out->end[VDF_SPAN_CUT] = size;
    }
}

static int gather(vdf_track *track, uint64_t size, uint64_t new, uint64_t base_size,
                  const vdf_intent_record *record, uint32_t slots, vdf_recovery *out)
{
    const uint64_t pages = vdf_pages_of(size);

    vdf_bitmap_merge(&track->dirty[new], &track->dirty[new ^ 1]);
    suspect_regions(track, pages, new, record, slots, out);
    take_spans(track->head, size, record, out);
    /* The ends: what lies behind them in their pages is zero, here and not there, or there. */
    if (size != base_size && base_size % VDF_PAGE_SIZE != 0 && base_size < size)
        vdf_bitmap_set(&track->dirty[new], base_size / VDF_PAGE_SIZE, 1);
    if (size != base_size && size % VDF_PAGE_SIZE != 0)
        vdf_bitmap_set(&track->dirty[new], size / VDF_PAGE_SIZE, 1);
    int error = vdf_bitmap_sync(&track->suspect);
    if (error == 0)
        error = vdf_bitmap_sync(&track->dirty[new]);
    if (error == 0)
        vdf_crash("recovery.gathered");
    return error;
}

static int write_head(vdf_track *track, uint64_t size, uint64_t epoch, uint64_t base_size)
{
    vdf_track_head *head = track->head;
    uint64_t new = epoch & 1;
    bool changed = size != base_size || atomic_load(&track->dirty[new].set) != 0;

    head->epoch = epoch;
    head->frozen_epoch = 0;
    for (unsigned i = 0; i < 2; i++) {
        head->base_size[i] = base_size;
        head->cut[i] = UINT64_MAX;
        head->changed[i] = 0;
    }
    head->changed[new] = changed;
    head->overflow = 0;
    if (msync(head, VDF_PAGE_SIZE, MS_SYNC) != 0)
        return -errno;
    vdf_crash("recovery.head-written");
    return 0;
}

static int drop_rest(vdf_track *track, uint64_t new)
{
    vdf_bitmap_reset(&track->dirty[new ^ 1]);
    vdf_bitmap_reset(&track->preserved);
    int error = vdf_bitmap_sync(&track->dirty[new ^ 1]);
    if (error == 0)
        error = vdf_bitmap_sync(&track->preserved);
    if (error == 0)
        vdf_crash("recovery.frozen-dropped");
    return error;
}

int vdf_track_recover(const char *directory, uint64_t size, uint64_t change_ns, uint64_t epoch,
                      uint64_t base_size, vdf_recovery *out)
{
    vdf_intent_record record = {.region = NULL};
    vdf_track *track;
    uint32_t slots = 0;

    if (epoch == 0)
        return -EINVAL;
    int error = vdf_track_load(directory, size, false, &track);
    if (error != 0)
        return error;
    /* Bitmaps that were not right while the host lived: the log relied on them. */
    error = atomic_load(&track->lost.unsettled) != 0 ? -EBADMSG
                                                     : read_log(track, change_ns, &record, &slots);
    if (error == 0)
        error = gather(track, size, epoch & 1, base_size, &record, slots, out);
    if (error == 0)
        error = write_head(track, size, epoch, base_size);
    if (error == 0)
        error = drop_rest(track, epoch & 1);
    free(record.region);
    vdf_track_close(track);
    return error;
}

int vdf_image_begin_intent(vdf_image *image)
{
    vdf_track *track = atomic_load(&image->track);

    if (track == NULL)
        return -EINVAL;
    int error = vdf_track_sync(track);
    if (error == 0)
        vdf_intent_allow(track->intent);
    return error;
}
