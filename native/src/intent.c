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
#define PENDING 0x8000u
#define LEAVING 0x4000u
#define SLOT_MASK 0x3fffu
#define RETRY_S 5
#define SECOND_NS UINT64_C(1000000000)

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

static uint64_t first_of(uint64_t offset)
{
    return offset >> VDF_INTENT_SHIFT;
}

static uint64_t end_of(uint64_t offset, uint64_t length)
{
    return (offset + length + (UINT64_C(1) << VDF_INTENT_SHIFT) - 1) >> VDF_INTENT_SHIFT;
}

static uint16_t where(const vdf_intent *intent, uint64_t region)
{
    return atomic_load_explicit(&intent->where[region], memory_order_acquire);
}

static vdf_intent_slot *slot_of(vdf_intent *intent, uint64_t region)
{
    return &intent->slot[(where(intent, region) & SLOT_MASK) - 1];
}

static void set_where(vdf_intent *intent, const vdf_intent_slot *slot, unsigned flags)
{
    unsigned number = (unsigned)(slot - intent->slot) + 1;

    atomic_store(&intent->where[slot->region], (uint16_t)(number | flags));
}

/* ---- the table; all of it with the lock held ----------------------------------- */

static void free_slot(vdf_intent *intent, vdf_intent_slot *slot)
{
    atomic_store(&intent->where[slot->region], 0);
    slot->region = VDF_INTENT_NONE;
    intent->free++;
}

static void clear_table(vdf_intent *intent)
{
    for (uint32_t i = 0; i < intent->slots; i++) {
        if (intent->slot[i].region != VDF_INTENT_NONE)
            free_slot(intent, &intent->slot[i]);
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
    set_where(intent, slot, flags);
    return slot;
}

static bool is_full(const vdf_intent_span *span, unsigned which)
{
    return span->to > span->from && (which != VDF_SPAN_CUT || span->to == UINT64_MAX);
}

/* Lets a span be relied on, or not, by those who hold a ticket. */
static void publish_span(vdf_intent_span *span, bool valid)
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
static void go_void(vdf_intent *intent, int error)
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
    intent->retry_s = RETRY_S;
    clear_table(intent);
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
            (where(intent, slot->region) & PENDING))
            set_where(intent, slot, 0);
    }
    for (unsigned i = 0; i < 2; i++)
        if (is_full(&intent->span[i], i) && intent->span[i].version <= version &&
            !intent->span[i].leaving)
            publish_span(&intent->span[i], true);
    intent->durable = version;
    atomic_fetch_add_explicit(&intent->tick, 1, memory_order_relaxed);
    /* A writer that looked before and one that looks after are both within the record's time. */
    atomic_store(&intent->state, 0);
}

/* Writes what the table holds now; others that come meanwhile go into the next one. */
static int commit(vdf_intent *intent)
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
        go_void(intent, error);
        return error;
    }
    intent->commits++;
    intent->committed_ns = now_ns();
    intent->committing = false;
    publish(intent, version);
    pthread_cond_broadcast(&intent->changed);
    return 0;
}

static void wait_durable(vdf_intent *intent, uint64_t version)
{
    while (intent->mode == VDF_INTENT_IS_KEPT && intent->durable < version) {
        if (intent->committing)
            pthread_cond_wait(&intent->changed, &intent->lock);
        else
            commit(intent);
    }
}

/* ---- what a change asks for ------------------------------------------------------ */

/* Regions of [first, end) that have no slot yet. */
static uint32_t count_missing(const vdf_intent *intent, uint64_t first, uint64_t end)
{
    uint32_t missing = 0;

    for (uint64_t region = first; region < end; region++)
        missing += where(intent, region) == 0;
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
            clear_table(intent);
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
        uint16_t at = where(intent, region);
        vdf_intent_slot *slot =
            at == 0 ? take_slot(intent, region, made ? 0 : PENDING) : slot_of(intent, region);
        if (at & PENDING)
            needed = needed > slot->version ? needed : slot->version;
        if (at & LEAVING)
            set_where(intent, slot, 0);
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
        wait_durable(intent, needed);
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
            publish_span(span,
                         span->version <= intent->durable || intent->mode == VDF_INTENT_IS_MADE);
        span->leaving = false;
        wait_durable(intent, span->version);
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

void vdf_intent_shrunk(vdf_intent *intent, uint64_t epoch)
{
    uint64_t before = atomic_load(&intent->shrunk);

    while (before < epoch && !atomic_compare_exchange_weak(&intent->shrunk, &before, epoch)) {
    }
}

/* ---- the way out ------------------------------------------------------------------ */

/* Waits for every change that holds a ticket now. False: the image has no track any more. */
static bool wait_tickets(vdf_intent *intent)
{
    vdf_track *track = intent->track;
    vdf_image *image = intent->image;

    pthread_mutex_lock(&track->admin);
    bool tracked = atomic_load(&image->track) == track;
    if (tracked) {
        uint64_t phase = vdf_gate_flip(&image->gate, atomic_load(&track->epoch));
        vdf_gate_wait(&image->gate, phase);
    }
    pthread_mutex_unlock(&track->admin);
    return tracked;
}

static int sync_all(vdf_intent *intent)
{
    int error = vdf_image_sync_internal(intent->image);

    if (error != 0)
        return error;
    vdf_crash("image.synced");
    return vdf_track_sync(intent->track);
}

static int by_use(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return x < y ? -1 : x > y;
}

/* Marks up to `count` slots as leaving, those used longest ago. */
static uint32_t choose(vdf_intent *intent, uint32_t count)
{
    uint32_t found = 0, now = atomic_load(&intent->tick);

    for (uint32_t i = 0; i < intent->slots; i++) {
        vdf_intent_slot *slot = &intent->slot[i];
        if (slot->region == VDF_INTENT_NONE || slot->pins != 0 ||
            (where(intent, slot->region) & (PENDING | LEAVING)))
            continue;
        uint32_t age = now - atomic_load_explicit(&slot->used, memory_order_relaxed);
        intent->order[found++] = (uint64_t)(UINT32_MAX - age) << 32 | i;
    }
    qsort(intent->order, found, sizeof *intent->order, by_use);
    found = found < count ? found : count;
    for (uint32_t i = 0; i < found; i++)
        set_where(intent, &intent->slot[(uint32_t)intent->order[i]], LEAVING);
    return found;
}

static uint32_t choose_spans(vdf_intent *intent)
{
    uint32_t found = 0;

    for (unsigned i = 0; i < 2; i++) {
        vdf_intent_span *span = &intent->span[i];
        if (!is_full(span, i) || span->pins != 0 || span->version > intent->durable ||
            !intent->allowed)
            continue;
        span->leaving = true;
        publish_span(span, false);
        found++;
    }
    return found;
}

/* Whether what the header says of sizes and of the bitmaps' end is in the spool. */
static bool is_settled(const vdf_intent *intent)
{
    const vdf_track *track = intent->track;

    return atomic_load(&track->overflow) == 0 && atomic_load(&track->frozen_epoch) == 0 &&
           atomic_load(&track->epoch) > atomic_load(&intent->shrunk);
}

static void leave(vdf_intent *intent, bool settled)
{
    for (uint32_t i = 0; i < intent->slots; i++) {
        vdf_intent_slot *slot = &intent->slot[i];
        if (slot->region != VDF_INTENT_NONE && (where(intent, slot->region) & LEAVING)) {
            free_slot(intent, slot);
            intent->left++;
        }
    }
    for (unsigned i = 0; i < 2; i++) {
        vdf_intent_span *span = &intent->span[i];
        if (!span->leaving)
            continue;
        span->leaving = false;
        if (i == VDF_SPAN_CUT && !settled) {
            publish_span(span, true);
            continue;
        }
        span->from = span->to = 0;
        span->version = ++intent->version;
    }
}

static void stay(vdf_intent *intent)
{
    for (uint32_t i = 0; i < intent->slots; i++) {
        vdf_intent_slot *slot = &intent->slot[i];
        if (slot->region != VDF_INTENT_NONE && (where(intent, slot->region) & LEAVING))
            set_where(intent, slot, 0);
    }
    for (unsigned i = 0; i < 2; i++) {
        if (intent->span[i].leaving)
            publish_span(&intent->span[i], true);
        intent->span[i].leaving = false;
    }
}

/* Pages that could not be marked are named by nothing but the log: as if cut off there. */
static void keep_overflow(vdf_intent *intent)
{
    uint64_t noted = vdf_load(&intent->track->head->overflow);
    vdf_intent_span *span = &intent->span[VDF_SPAN_CUT];
    uint64_t from = (noted - 1) * VDF_PAGE_SIZE;

    if (noted == 0 || (is_full(span, VDF_SPAN_CUT) && span->from <= from))
        return;
    span->from = from;
    span->to = UINT64_MAX;
    span->version = ++intent->version;
    wait_durable(intent, span->version);
}

/* With the lock, given back meanwhile. Lets up to `count` regions and all spans go; false: none. */
static bool round_out(vdf_intent *intent, uint32_t count)
{
    uint32_t chosen = choose(intent, count);
    uint32_t spans = choose_spans(intent);
    uint64_t generation = intent->generation;

    if (chosen + spans == 0)
        return false;
    intent->rounded_ns = now_ns();
    pthread_mutex_unlock(&intent->lock);
    bool tracked = wait_tickets(intent);
    /* Looked at before the syncs: what is settled by now is made durable by them. */
    bool settled = is_settled(intent);
    int error = tracked ? sync_all(intent) : 0;
    pthread_mutex_lock(&intent->lock);
    if (intent->mode != VDF_INTENT_IS_KEPT || intent->generation != generation)
        return true;
    if (!tracked || error != 0) {
        stay(intent);
        while (error != 0 && intent->committing)
            pthread_cond_wait(&intent->changed, &intent->lock);
        if (error != 0 && intent->mode == VDF_INTENT_IS_KEPT) {
            intent->committing = true;
            go_void(intent, error);
        }
        return true;
    }
    keep_overflow(intent);
    if (intent->mode != VDF_INTENT_IS_KEPT || intent->generation != generation)
        return true;
    leave(intent, settled);
    intent->rounds++;
    vdf_crash("intent.region-left");
    pthread_cond_broadcast(&intent->changed);
    return true;
}

/* ---- starting the log anew ---------------------------------------------------------- */

/* A truncation whose epoch is not in the spool; nobody knows whether it took anything away. */
static void take_cuts(vdf_intent *intent)
{
    const vdf_track_head *head = intent->track->head;
    vdf_intent_span *span = &intent->span[VDF_SPAN_CUT];
    uint64_t cut = vdf_min(vdf_load(&head->cut[0]), vdf_load(&head->cut[1]));

    if (cut == UINT64_MAX)
        return;
    vdf_intent_shrunk(intent, atomic_load(&intent->track->epoch));
    span->from = is_full(span, VDF_SPAN_CUT) ? vdf_min(span->from, cut) : cut;
    span->to = UINT64_MAX;
    span->version = intent->version;
}

/* With the lock, given back meanwhile; the log is void until the end. */
static void make_anew(vdf_intent *intent)
{
    intent->mode = VDF_INTENT_IS_MADE;
    intent->spoiled = false;
    atomic_store(&intent->state, 0);
    pthread_mutex_unlock(&intent->lock);
    /* Afterwards every change under way has its regions in the table. */
    int error = wait_tickets(intent) ? 0 : -ESTALE;
    if (error == 0)
        error = sync_all(intent);
    if (error == 0 && fsync(intent->log.dir) != 0)
        error = -errno;
    if (error == 0 && intent->log.fd < 0)
        error = vdf_track_make_log(intent->track, intent->slots, &intent->log);
    pthread_mutex_lock(&intent->lock);
    intent->retry_s = RETRY_S;
    if (intent->spoiled || error != 0) {
        if (intent->mode == VDF_INTENT_IS_MADE)
            clear_table(intent);
        intent->mode = VDF_INTENT_IS_VOID;
        atomic_store(&intent->state, VDF_INTENT_COVERS_ALL);
        pthread_cond_broadcast(&intent->changed);
        return;
    }
    take_cuts(intent);
    intent->version++;
    intent->mode = VDF_INTENT_IS_KEPT;
    if (commit(intent) == 0) {
        vdf_crash("intent.begun");
        keep_overflow(intent);
    }
}

/* ---- the thread ---------------------------------------------------------------------- */

static uint64_t change_ns(const vdf_intent *intent)
{
    struct stat st;

    if (fstat(intent->image->inner_fd, &st) != 0)
        return 0;
    return (uint64_t)st.st_ctim.tv_sec * UINT64_C(1000000000) + (uint64_t)st.st_ctim.tv_nsec;
}

/* True when the time is over, false when there may be something to do. */
static bool nap(vdf_intent *intent, time_t seconds)
{
    struct timespec until;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += seconds;
    return pthread_cond_timedwait(&intent->work, &intent->lock, &until) == ETIMEDOUT;
}

/* The disk may be written to: says when, or that it is not any more. */
static void stamp(vdf_intent *intent)
{
    uint64_t changed = change_ns(intent);

    if (changed != intent->seen_ns || intent->durable < intent->version) {
        intent->seen_ns = changed;
        wait_durable(intent, ++intent->version);
    } else {
        atomic_store(&intent->state, VDF_INTENT_ASLEEP);
    }
}

static void work_void(vdf_intent *intent)
{
    if (!intent->allowed)
        pthread_cond_wait(&intent->work, &intent->lock);
    else if (intent->retry_s == 0)
        make_anew(intent);
    else if (nap(intent, intent->retry_s))
        intent->retry_s = 0;
}

/* With the lock, given back meanwhile. */
static void fail(vdf_intent *intent, int error)
{
    while (intent->committing)
        pthread_cond_wait(&intent->changed, &intent->lock);
    if (intent->mode == VDF_INTENT_IS_KEPT) {
        intent->committing = true;
        go_void(intent, error);
    }
}

/* Whether regions are to leave ahead of those who need their slots. */
static bool is_short(const vdf_intent *intent)
{
    return intent->allowed && intent->free < intent->low &&
           now_ns() - intent->rounded_ns >= SECOND_NS;
}

static void work(vdf_intent *intent)
{
    bool asleep = (atomic_load(&intent->state) & VDF_INTENT_ASLEEP) != 0;

    if (intent->mode == VDF_INTENT_IS_VOID) {
        work_void(intent);
    } else if (intent->waiting != 0 && !intent->allowed) {
        /* Marks that belong to regions named here are still being made. */
        fail(intent, -EAGAIN);
    } else if (intent->waiting != 0 || (!asleep && is_short(intent))) {
        /* None to let go: each is pinned or pending, for as long as a commit takes. */
        if (!round_out(intent, intent->slots / 4 + 1))
            nap(intent, 1);
    } else if (asleep) {
        pthread_cond_wait(&intent->work, &intent->lock);
    } else if (now_ns() - intent->committed_ns >= VDF_INTENT_STAMP_S * SECOND_NS) {
        round_out(intent, 0);
        if (intent->mode == VDF_INTENT_IS_KEPT)
            stamp(intent);
    } else {
        nap(intent, 1);
    }
}

static void *run(void *argument)
{
    vdf_intent *intent = argument;

    pthread_mutex_lock(&intent->lock);
    while (!intent->stop)
        work(intent);
    pthread_mutex_unlock(&intent->lock);
    return NULL;
}

int vdf_intent_start(vdf_intent *intent, vdf_image *image)
{
    if (intent->running)
        return -EBUSY;
    intent->image = image;
    intent->stop = false;
    int error = pthread_create(&intent->thread, NULL, run, intent);
    if (error == 0)
        intent->running = true;
    return -error;
}

void vdf_intent_stop(vdf_intent *intent)
{
    if (!intent->running)
        return;
    /* Those who came before tracking ended are served to the end. */
    while (atomic_load(&intent->users) != 0)
        vdf_sleep_ns(50 * 1000);
    pthread_mutex_lock(&intent->lock);
    intent->stop = true;
    pthread_cond_signal(&intent->work);
    pthread_mutex_unlock(&intent->lock);
    pthread_join(intent->thread, NULL);
    intent->running = false;
    intent->image = NULL;
}

/* ---- making one ----------------------------------------------------------------------- */

static void load(vdf_intent *intent, const vdf_intent_record *record)
{
    bool kept = !(record->flags & VDF_INTENT_VOID);

    intent->mode = kept ? VDF_INTENT_IS_KEPT : VDF_INTENT_IS_VOID;
    atomic_store(&intent->state, kept ? VDF_INTENT_ASLEEP : VDF_INTENT_COVERS_ALL);
    for (uint32_t i = 0; kept && i < intent->slots; i++)
        if (record->region[i] < REGIONS && where(intent, record->region[i]) == 0)
            take_slot(intent, record->region[i], 0);
    for (unsigned i = 0; kept && i < 2; i++) {
        intent->span[i].from = record->span[i][0];
        intent->span[i].to = record->span[i][1];
        publish_span(&intent->span[i], is_full(&intent->span[i], i));
    }
    if (is_full(&intent->span[VDF_SPAN_CUT], VDF_SPAN_CUT))
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
    fail(intent, error);
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
