/*
 * presence.c - what a writable lazy image knows of its pages, beyond the life of its process
 * and of its host.
 *
 * In a directory: `presence`, a bitmap of the pages that are here, preallocated and mapped;
 * `presence.head`, mapped; `presence.log` (presencelog.c). While the host lives the bitmap is
 * right, whatever becomes of the process: a bit is set when the page's bytes were written.
 * After the death of the host only the log counts: a page is named in it after the image was
 * synced with the page in it. What is here and not logged goes back to what the base says.
 *
 * Invariant: a page that is logged was durable in the image before.
 */
#include "internal.h"

#include <unistd.h>

/* A log is written anew when it has more than doubled, and has more than this. */
#define COMPACT_BYTES 1048576

/* ---- the log's content ------------------------------------------------------------------ */

static void add_head(vdf_records *records, const vdf_lazy *lazy, uint64_t low)
{
    vdf_records_add(records, VDF_RECORD_HEAD, VDF_PRESENCE_VERSION);
    vdf_records_add(records, VDF_RECORD_HEAD, lazy->base_size);
    vdf_records_add(records, VDF_RECORD_HEAD, lazy->whole);
    if (low < lazy->base_size)
        vdf_records_add(records, VDF_RECORD_LOW, low);
}

/*
 * 64 pages that the log is to name: those that are here and durable, or of a WHOLE image
 * those that are not. Who makes a page present sets fresh, then present, then clears absent:
 * read the other way round.
 */
static uint64_t durable_word(const vdf_lazy *lazy, uint64_t i)
{
    uint64_t absent = atomic_load(&lazy->absent.word[i]);
    uint64_t present = atomic_load(&lazy->present.word[i]);
    uint64_t fresh = atomic_load(&lazy->fresh.word[i]);

    return lazy->whole ? absent | fresh : present & ~fresh;
}

/* All that is durable, as runs. Only who commits clears fresh bits. */
static void add_durable(vdf_records *records, const vdf_lazy *lazy)
{
    unsigned kind = lazy->whole ? VDF_RECORD_ABSENT : VDF_RECORD_PRESENT;
    const vdf_bitmap *first = lazy->whole ? &lazy->absent : &lazy->present;
    uint64_t end = vdf_pages_of(lazy->base_size), start = 0, length = 0;

    for (uint64_t i = 0; i * 64 < end; i++) {
        uint64_t word = durable_word(lazy, i);
        if (word == 0 && length == 0) {
            uint64_t next = vdf_bitmap_next(first, (i + 1) * 64, end);
            if (lazy->whole)
                next = vdf_min(next, vdf_bitmap_next(&lazy->fresh, (i + 1) * 64, end));
            if (next >= end)
                break;
            i = next / 64 - 1;
            continue;
        }
        for (uint64_t bit = 0; bit < 64; bit++) {
            if (word >> bit & 1) {
                start = length == 0 ? i * 64 + bit : start;
                length++;
            } else if (length != 0) {
                vdf_records_add_run(records, kind, start, length);
                length = 0;
            }
        }
    }
    if (length != 0)
        vdf_records_add_run(records, kind, start, length);
}

int vdf_presence_write_log(vdf_lazy *lazy)
{
    vdf_presence *presence = lazy->presence;
    vdf_records records;

    vdf_records_begin(&records, 1);
    add_head(&records, lazy, presence->logged_low);
    add_durable(&records, lazy);
    int error = vdf_presencelog_replace(&presence->log, &records);
    vdf_records_free(&records);
    if (error == 0) {
        presence->compact_bytes = presence->log.end;
        atomic_store(&presence->log_bytes, presence->log.end);
    }
    return error;
}

/* ---- commit -------------------------------------------------------------------------------- */

/* Takes the fresh pages: each is seen here, or by the next commit. */
static void collect(vdf_lazy *lazy, vdf_records *records)
{
    bool none = atomic_load(&lazy->fresh.set) == 0; /* counted before it is set */
    uint64_t end = none ? 0 : vdf_pages_of(lazy->base_size);

    for (uint64_t page = vdf_bitmap_next(&lazy->fresh, 0, end); page < end;
         page = vdf_bitmap_next(&lazy->fresh, page, end)) {
        uint64_t stop = vdf_bitmap_next_clear(&lazy->fresh, page, end);
        vdf_records_add_run(records, VDF_RECORD_PRESENT, page, stop - page);
        if (records->error != 0)
            return;
        vdf_bitmap_clear(&lazy->fresh, page, stop - page);
        page = stop;
    }
}

/* A commit that failed: what it took is fresh still. */
static void put_back(vdf_lazy *lazy, const vdf_records *records)
{
    vdf_records_set(records, VDF_RECORD_PRESENT, &lazy->fresh);
}

static int sync_image(vdf_image *image, bool full)
{
    int error = (full ? fsync(image->fd) : fdatasync(image->fd)) == 0 ? 0 : -errno;

    if (error != 0 && error != -EINTR)
        vdf_image_latch(image, error);
    if (error == 0)
        vdf_crash("presence.image-synced");
    return error;
}

/* What the log's file shows need not be on disk: no more is written to it. */
static void fail_log(vdf_image *image, int error)
{
    vdf_store(&image->lazy->presence->head->log_failed, 1);
    vdf_image_latch(image, error);
}

static int append(vdf_image *image, vdf_records *records)
{
    vdf_presence *presence = image->lazy->presence;
    /* No room is the one error after which nothing is lost and the next try may succeed. */
    int error = vdf_presencelog_reserve(&presence->log, records->bytes);

    if (error != 0)
        return error;
    error = vdf_presencelog_append(&presence->log, records);
    if (error != 0) {
        fail_log(image, error);
        return error;
    }
    vdf_crash("presence-log.synced");
    atomic_store(&presence->log_bytes, presence->log.end);
    return 0;
}

static int commit_records(vdf_image *image, unsigned wanted, uint64_t low, vdf_records *records)
{
    vdf_presence *presence = image->lazy->presence;

    if (records->error != 0)
        return records->error;
    int error = sync_image(image, (wanted & VDF_COMMIT_FULL) != 0);
    if (error == 0 && records->bytes != 0)
        error = append(image, records);
    if (error != 0)
        return error;
    presence->logged_low = low;
    if (wanted & VDF_COMMIT_COMPLETE)
        atomic_store(&image->lazy->complete, true);
    return 0;
}

/* Where it cannot be written anew, the log goes on as it is. */
static int compact(vdf_image *image)
{
    int error = vdf_presence_write_log(image->lazy);

    if (error == 0 || !image->lazy->presence->log.unnamed)
        return 0;
    fail_log(image, error);
    return error;
}

/* Alone. */
static int commit_now(vdf_image *image, unsigned wanted)
{
    vdf_lazy *lazy = image->lazy;
    vdf_presence *presence = lazy->presence;
    uint64_t low = atomic_load(&lazy->low);
    int error = atomic_load(&image->sync_error);
    vdf_records records;

    if (error != 0)
        return error;
    if (atomic_load(&lazy->complete))
        return sync_image(image, (wanted & VDF_COMMIT_FULL) != 0);
    vdf_records_begin(&records, presence->log.batch);
    if (low != presence->logged_low)
        vdf_records_add(&records, VDF_RECORD_LOW, low);
    collect(lazy, &records);
    if (wanted & VDF_COMMIT_COMPLETE)
        vdf_records_add(&records, VDF_RECORD_COMPLETE, 1);
    error = commit_records(image, wanted, low, &records);
    if (error != 0)
        put_back(lazy, &records);
    vdf_records_free(&records);
    if (error == 0 && (wanted & VDF_COMMIT_COMPACT) && !atomic_load(&lazy->complete) &&
        presence->log.end > COMPACT_BYTES + 2 * presence->compact_bytes)
        error = compact(image);
    return error;
}

int vdf_presence_commit(vdf_image *image, unsigned wanted)
{
    vdf_presence *presence = image->lazy->presence;

    pthread_mutex_lock(&presence->lock);
    /* One that has begun may have looked before us. */
    uint64_t target = presence->started + 1;
    presence->wanted |= wanted;
    while (presence->done < target) {
        if (presence->running) {
            pthread_cond_wait(&presence->changed, &presence->lock);
            continue;
        }
        unsigned all = presence->wanted;
        uint64_t number = ++presence->started;
        presence->wanted = 0;
        presence->running = true;
        pthread_mutex_unlock(&presence->lock);
        int error = commit_now(image, all);
        pthread_mutex_lock(&presence->lock);
        presence->running = false;
        presence->done = number;
        presence->good = error == 0 ? number : presence->good;
        presence->error = error;
        pthread_cond_broadcast(&presence->changed);
    }
    int error = presence->good >= target ? 0 : presence->error;
    pthread_mutex_unlock(&presence->lock);
    return error;
}
