/*
 * intent.c - the intent log: after the death of the host, where may a disk differ from
 * what its bitmaps say on disk?
 *
 * The disk is cut into regions of 4 MiB; a table of slots holds those that are active. A
 * region becomes active, durably, before the first change to it goes on, and stays so until
 * nothing about it can be lost any more. Invariant: for a region that the log on disk does
 * not name, the image on disk is the image, and the bitmaps on disk mark at least the pages
 * that the spool and the vault do not hold.
 *
 * The way of a change: with its ticket it looks whether its regions are active. If not, it
 * gives the ticket back, lets them be written to the log together with those of all others
 * that wait, and takes a ticket again while the slots are pinned. So a ticket held means
 * that the regions stay.
 *
 * The way out: a thread marks the slots used longest ago as leaving, waits for the tickets
 * of the moment, syncs image and bitmaps, and frees those that nobody came back to. A slot
 * that is leaving is still in the log on disk: whoever wants it takes it back for nothing.
 *
 * Changes too large for regions are spans, each the hull of what was asked for: SPAN_CUT
 * reaches from the smallest size that a truncation set to the end of any disk, and stays
 * until the truncation's epoch is in the spool; SPAN_WIDE is for discards.
 *
 * What cannot be logged makes the log void: it then says nothing, a death of the host makes
 * everything suspect, and guests' changes go on. The thread starts it anew when it can.
 *
 * The record's time: while a disk is written to, the log is written at least every
 * VDF_INTENT_STAMP_S seconds; after a pause the first change waits for that. A file that
 * changed later than the log can know was changed by somebody else (recover.c).
 *
 * Locks: track->admin -> intent->lock, never the other way round. Neither a ticket nor a
 * stripe is held while intent->lock is waited for.
 */
#include "internal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define REGIONS (VDF_MAX_PAGES * VDF_PAGE_SIZE >> VDF_INTENT_SHIFT)
#define WHERE_BYTES (REGIONS * sizeof(uint16_t))

uint64_t vdf_intent_now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * VDF_SECOND_NS + (uint64_t)now.tv_nsec;
}

static uint64_t first_of(uint64_t offset)
{
    return offset >> VDF_INTENT_SHIFT;
}

static uint64_t end_of(uint64_t offset, uint64_t length)
{
    return (offset + length + (UINT64_C(1) << VDF_INTENT_SHIFT) - 1) >> VDF_INTENT_SHIFT;
}

uint16_t vdf_intent_where(const vdf_intent *intent, uint64_t region)
{
    return atomic_load_explicit(&intent->where[region], memory_order_acquire);
}

static vdf_intent_slot *slot_of(vdf_intent *intent, uint64_t region)
{
    return &intent->slot[(vdf_intent_where(intent, region) & VDF_INTENT_SLOT_MASK) - 1];
}

void vdf_intent_set_where(vdf_intent *intent, const vdf_intent_slot *slot, unsigned flags)
{
    unsigned number = (unsigned)(slot - intent->slot) + 1;

    atomic_store(&intent->where[slot->region], (uint16_t)(number | flags));
}

/* ---- the table; all of it with the lock held ----------------------------------- */

void vdf_intent_free_slot(vdf_intent *intent, vdf_intent_slot *slot)
{
    atomic_store(&intent->where[slot->region], 0);
    slot->region = VDF_INTENT_NONE;
    intent->free++;
}

void vdf_intent_clear_table(vdf_intent *intent)
{
    for (uint32_t i = 0; i < intent->slots; i++) {
        if (intent->slot[i].region != VDF_INTENT_NONE)
            vdf_intent_free_slot(intent, &intent->slot[i]);
        intent->slot[i].pins = 0;
    }
    memset(intent->span, 0, sizeof intent->span);
    intent->generation++;
}

/* The caller knows that one is free. */
static vdf_intent_slot *take_slot(vdf_intent *intent, uint64_t region, unsigned flags)
{
    while (intent->slot[intent->hand].region != VDF_INTENT_NONE)
        intent->hand = (intent->hand + 1) % intent->slots;
    vdf_intent_slot *slot = &intent->slot[intent->hand];
    slot->region = (uint32_t)region;
    slot->pins = 0;
    slot->version = intent->version;
    intent->free--;
    vdf_intent_set_where(intent, slot, flags);
    return slot;
}

bool vdf_intent_is_full(const vdf_intent_span *span, unsigned which)
{
    return span->to > span->from && (which != VDF_SPAN_CUT || span->to == UINT64_MAX);
}

/* Lets a span be relied on, or not, by those who hold a ticket. */
void vdf_intent_publish_span(vdf_intent_span *span, bool valid)
{
    atomic_store(&span->safe_to, 0);
    atomic_store(&span->safe_from, span->from);
    atomic_store(&span->safe_to, valid ? span->to : 0);
}

/* ---- commit ---------------------------------------------------------------------- */

static void fill_record(vdf_intent *intent, vdf_intent_record *record)
{
    record->flags = 0;
    for (uint32_t i = 0; i < intent->slots; i++)
        record->region[i] = intent->slot[i].region;
    for (unsigned i = 0; i < 2; i++) {
        record->span[i][0] = intent->span[i].from;
        record->span[i][1] = intent->span[i].to;
    }
}

/* The log cannot go on; the caller has set `committing`, so that nobody else writes it. */
void vdf_intent_go_void(vdf_intent *intent, int error)
{
    pthread_mutex_unlock(&intent->lock);
    int failed = vdf_intentlog_void(&intent->log);
    if (failed == 0)
        vdf_crash("intent.voided");
    pthread_mutex_lock(&intent->lock);
    intent->mode = VDF_INTENT_IS_VOID;
    intent->void_error = error;
    intent->void_durable = failed == 0;
    intent->voids++;
    intent->retry_s = VDF_INTENT_RETRY_S;
    vdf_intent_clear_table(intent);
    atomic_store(&intent->state, VDF_INTENT_COVERS_ALL);
    intent->committing = false;
    pthread_cond_broadcast(&intent->changed);
    pthread_cond_signal(&intent->work);
    if (intent->image != NULL)
        vdf_event_post(intent->image->core, VDF_EVENT_INTENT_VOID, -error, intent->image->cookie,
                       failed == 0, 0);
}

static void publish(vdf_intent *intent, uint64_t version)
{
    for (uint32_t i = 0; i < intent->slots; i++) {
        vdf_intent_slot *slot = &intent->slot[i];
        if (slot->region != VDF_INTENT_NONE && slot->version <= version &&
            (vdf_intent_where(intent, slot->region) & VDF_INTENT_PENDING))
            vdf_intent_set_where(intent, slot, 0);
    }
    for (unsigned i = 0; i < 2; i++)
        if (vdf_intent_is_full(&intent->span[i], i) && intent->span[i].version <= version &&
            !intent->span[i].leaving)
            vdf_intent_publish_span(&intent->span[i], true);
    intent->durable = version;
    atomic_fetch_add_explicit(&intent->tick, 1, memory_order_relaxed);
    /* A writer that looked before and one that looks after are both within the record's time. */
    if (atomic_exchange(&intent->state, 0) & VDF_INTENT_ASLEEP)
        pthread_cond_signal(&intent->work); /* it has to be stamped again from here on */
}

/* Writes what the table holds now; others that come meanwhile go into the next one. */
int vdf_intent_commit(vdf_intent *intent)
{
    intent->committing = true;
    uint64_t version = intent->version;
    fill_record(intent, &intent->record);
    vdf_intentlog_encode(&intent->log, &intent->record);
    pthread_mutex_unlock(&intent->lock);
    int error = vdf_intentlog_write(&intent->log);
    if (error == 0)
        vdf_crash("intent.synced");
    pthread_mutex_lock(&intent->lock);
    if (error != 0) {
        vdf_intent_go_void(intent, error);
        return error;
    }
    intent->commits++;
    intent->committed_ns = vdf_intent_now_ns();
    intent->committing = false;
    publish(intent, version);
    pthread_cond_broadcast(&intent->changed);
    return 0;
}

void vdf_intent_wait_durable(vdf_intent *intent, uint64_t version)
{
    while (intent->mode == VDF_INTENT_IS_KEPT && intent->durable < version) {
        if (intent->committing)
            pthread_cond_wait(&intent->changed, &intent->lock);
        else
            vdf_intent_commit(intent);
    }
}

/* ---- what a change asks for ------------------------------------------------------ */

/* Regions of [first, end) that have no slot yet. */
static uint32_t count_missing(const vdf_intent *intent, uint64_t first, uint64_t end)
{
    uint32_t missing = 0;

    for (uint64_t region = first; region < end; region++)
        missing += vdf_intent_where(intent, region) == 0;
    return missing;
}

/* Waits until every region of [first, end) can have a slot; false: the log is void. */
static bool wait_room(vdf_intent *intent, uint64_t first, uint64_t end)
{
    while (intent->mode != VDF_INTENT_IS_VOID && count_missing(intent, first, end) > intent->free) {
        if (intent->mode == VDF_INTENT_IS_MADE) {
            /* Nothing can leave before it is made: void again, and tried again later. */
            intent->spoiled = true;
            intent->mode = VDF_INTENT_IS_VOID;
            vdf_intent_clear_table(intent);
            atomic_store(&intent->state, VDF_INTENT_COVERS_ALL);
            pthread_cond_broadcast(&intent->changed);
            return false;
        }
        intent->waiting++;
        intent->waits++;
        pthread_cond_signal(&intent->work);
        pthread_cond_wait(&intent->changed, &intent->lock);
        intent->waiting--;
    }
    return intent->mode != VDF_INTENT_IS_VOID;
}

static uint64_t take_regions(vdf_intent *intent, uint64_t first, uint64_t end)
{
    bool made = intent->mode == VDF_INTENT_IS_MADE;
    bool asleep = atomic_load(&intent->state) & VDF_INTENT_ASLEEP;
    uint64_t needed = 0;

    if (!made && (asleep || count_missing(intent, first, end) != 0))
        needed = ++intent->version;
    for (uint64_t region = first; region < end; region++) {
        uint16_t at = vdf_intent_where(intent, region);
        vdf_intent_slot *slot = at == 0 ? take_slot(intent, region, made ? 0 : VDF_INTENT_PENDING)
                                        : slot_of(intent, region);
        if (at & VDF_INTENT_PENDING)
            needed = needed > slot->version ? needed : slot->version;
        if (at & VDF_INTENT_LEAVING)
            vdf_intent_set_where(intent, slot, 0);
        slot->pins++;
        atomic_store_explicit(&slot->used, atomic_load(&intent->tick), memory_order_relaxed);
    }
    intent->misses++;
    if (intent->free < intent->low)
        pthread_cond_signal(&intent->work);
    return needed;
}

vdf_intent_hold vdf_intent_take(vdf_intent *intent, uint64_t offset, uint64_t length)
{
    vdf_intent_hold hold = {.which = VDF_HOLD_NONE};
    uint64_t first = first_of(offset), end = end_of(offset, length);

    pthread_mutex_lock(&intent->lock);
    if (wait_room(intent, first, end)) {
        uint64_t needed = take_regions(intent, first, end);
        hold = (vdf_intent_hold){.which = VDF_HOLD_REGIONS,
                                 .first = first,
                                 .end = end,
                                 .generation = intent->generation};
        vdf_intent_wait_durable(intent, needed);
    }
    pthread_mutex_unlock(&intent->lock);
    return hold;
}

vdf_intent_hold vdf_intent_take_span(vdf_intent *intent, unsigned which, uint64_t from, uint64_t to)
{
    vdf_intent_hold hold = {.which = VDF_HOLD_NONE};
    vdf_intent_span *span = &intent->span[which];

    pthread_mutex_lock(&intent->lock);
    if (intent->mode != VDF_INTENT_IS_VOID) {
        bool empty = span->to <= span->from;
        bool asleep = atomic_load(&intent->state) & VDF_INTENT_ASLEEP;
        hold = (vdf_intent_hold){.which = which == VDF_SPAN_CUT ? VDF_HOLD_CUT : VDF_HOLD_WIDE,
                                 .generation = intent->generation};
        if (empty || from < span->from || to > span->to || asleep) {
            span->from = empty ? from : vdf_min(from, span->from);
            span->to = empty || to > span->to ? to : span->to;
            span->version = ++intent->version;
        }
        span->pins++;
        if (span->leaving || intent->mode == VDF_INTENT_IS_MADE)
            vdf_intent_publish_span(span, span->version <= intent->durable ||
                                              intent->mode == VDF_INTENT_IS_MADE);
        span->leaving = false;
        vdf_intent_wait_durable(intent, span->version);
    }
    pthread_mutex_unlock(&intent->lock);
    return hold;
}

void vdf_intent_put(vdf_intent *intent, vdf_intent_hold hold)
{
    pthread_mutex_lock(&intent->lock);
    if (hold.which != VDF_HOLD_NONE && hold.generation == intent->generation) {
        for (uint64_t region = hold.first; region < hold.end; region++)
            slot_of(intent, region)->pins--;
        if (hold.which != VDF_HOLD_REGIONS)
            intent->span[hold.which == VDF_HOLD_CUT ? VDF_SPAN_CUT : VDF_SPAN_WIDE].pins--;
        if (intent->free < intent->low)
            pthread_cond_signal(&intent->work);
    }
    atomic_fetch_sub(&intent->users, 1);
    pthread_mutex_unlock(&intent->lock);
}

void vdf_intent_wake(vdf_intent *intent)
{
    pthread_mutex_lock(&intent->lock);
    if (intent->mode == VDF_INTENT_IS_KEPT && vdf_intent_is_asleep(intent))
        vdf_intent_wait_durable(intent, ++intent->version);
    atomic_fetch_sub(&intent->users, 1);
    pthread_mutex_unlock(&intent->lock);
}

void vdf_intent_shrunk(vdf_intent *intent, uint64_t epoch)
{
    uint64_t before = atomic_load(&intent->shrunk);

    while (before < epoch && !atomic_compare_exchange_weak(&intent->shrunk, &before, epoch)) {
    }
}

/* ---- making one ----------------------------------------------------------------------- */

static void load(vdf_intent *intent, const vdf_intent_record *record)
{
    bool kept = !(record->flags & VDF_INTENT_VOID);

    intent->mode = kept ? VDF_INTENT_IS_KEPT : VDF_INTENT_IS_VOID;
    atomic_store(&intent->state, kept ? VDF_INTENT_ASLEEP : VDF_INTENT_COVERS_ALL);
    for (uint32_t i = 0; kept && i < intent->slots; i++)
        if (record->region[i] < REGIONS && vdf_intent_where(intent, record->region[i]) == 0)
            take_slot(intent, record->region[i], 0);
    for (unsigned i = 0; kept && i < 2; i++) {
        intent->span[i].from = record->span[i][0];
        intent->span[i].to = record->span[i][1];
        vdf_intent_publish_span(&intent->span[i], vdf_intent_is_full(&intent->span[i], i));
    }
    if (vdf_intent_is_full(&intent->span[VDF_SPAN_CUT], VDF_SPAN_CUT))
        vdf_intent_shrunk(intent, vdf_load(&intent->track->head->epoch));
}

static int init_locks(vdf_intent *intent)
{
    pthread_condattr_t clock;
    int error = pthread_mutex_init(&intent->lock, NULL);

    if (error == 0)
        error = pthread_cond_init(&intent->changed, NULL);
    if (error == 0)
        error = pthread_condattr_init(&clock);
    if (error == 0) {
        pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
        error = pthread_cond_init(&intent->work, &clock);
        pthread_condattr_destroy(&clock);
    }
    return -error;
}

int vdf_intent_create(vdf_track *track, const vdf_intentlog *log, const vdf_intent_record *record,
                      vdf_intent **out)
{
    vdf_intent *intent = calloc(1, sizeof *intent);

    if (intent == NULL)
        return -ENOMEM;
    intent->track = track;
    intent->log = *log;
    intent->slots = intent->free = log->slots;
    intent->low = log->slots / 16 + 1;
    intent->where = mmap(NULL, WHERE_BYTES, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    intent->slot = calloc(log->slots, sizeof *intent->slot);
    intent->order = calloc(log->slots, sizeof *intent->order);
    intent->record.region = calloc(log->slots, sizeof *intent->record.region);
    int error = intent->where == MAP_FAILED || intent->slot == NULL || intent->order == NULL ||
                        intent->record.region == NULL
                    ? -ENOMEM
                    : init_locks(intent);
    if (error != 0) {
        /* The log stays the caller's. */
        intent->log = (vdf_intentlog){.fd = -1};
        vdf_intent_free(intent);
        return error;
    }
    for (uint32_t i = 0; i < intent->slots; i++)
        intent->slot[i].region = VDF_INTENT_NONE;
    load(intent, record);
    *out = intent;
    return 0;
}

void vdf_intent_free(vdf_intent *intent)
{
    if (intent == NULL)
        return;
    vdf_intentlog_close(&intent->log);
    if (intent->where != NULL && intent->where != MAP_FAILED)
        munmap((void *)intent->where, WHERE_BYTES);
    pthread_cond_destroy(&intent->work);
    pthread_cond_destroy(&intent->changed);
    pthread_mutex_destroy(&intent->lock);
    free(intent->slot);
    free(intent->order);
    free(intent->record.region);
    free(intent);
}

void vdf_intent_allow(vdf_intent *intent)
{
    pthread_mutex_lock(&intent->lock);
    intent->allowed = true;
    pthread_cond_signal(&intent->work);
    pthread_mutex_unlock(&intent->lock);
}

void vdf_intent_fail(vdf_intent *intent, int error)
{
    pthread_mutex_lock(&intent->lock);
    vdf_intent_give_up(intent, error);
    intent->spoiled = true;
    pthread_mutex_unlock(&intent->lock);
}

void vdf_intent_counts_get(vdf_image *image, vdf_intent_counts *out)
{
    vdf_track *track = atomic_load(&image->track);

    memset(out, 0, sizeof *out);
    if (track == NULL)
        return;
    vdf_intent *intent = track->intent;
    pthread_mutex_lock(&intent->lock);
    out->slots = intent->slots;
    out->active = intent->slots - intent->free;
    out->misses = intent->misses;
    out->commits = intent->commits;
    out->waits = intent->waits;
    out->rounds = intent->rounds;
    out->left = intent->left;
    out->voids = intent->voids;
    out->is_void = intent->mode != VDF_INTENT_IS_KEPT;
    out->void_durable = intent->void_durable;
    pthread_mutex_unlock(&intent->lock);
}
