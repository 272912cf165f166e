/*
 * intentout.c - the thread of an intent log (intent.c): lets regions leave that nothing can be
 * lost of any more, and makes a void log anew.
 */
#include "internal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

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
            (vdf_intent_where(intent, slot->region) & (VDF_INTENT_PENDING | VDF_INTENT_LEAVING)))
            continue;
        uint32_t age = now - atomic_load_explicit(&slot->used, memory_order_relaxed);
        intent->order[found++] = (uint64_t)(UINT32_MAX - age) << 32 | i;
    }
    qsort(intent->order, found, sizeof *intent->order, by_use);
    found = found < count ? found : count;
    for (uint32_t i = 0; i < found; i++)
        vdf_intent_set_where(intent, &intent->slot[(uint32_t)intent->order[i]], VDF_INTENT_LEAVING);
    return found;
}

static uint32_t choose_spans(vdf_intent *intent)
{
    uint32_t found = 0;

    for (unsigned i = 0; i < 2; i++) {
        vdf_intent_span *span = &intent->span[i];
        if (!vdf_intent_is_full(span, i) || span->pins != 0 || span->version > intent->durable ||
            !intent->allowed)
            continue;
        span->leaving = true;
        vdf_intent_publish_span(span, false);
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
        if (slot->region != VDF_INTENT_NONE &&
            (vdf_intent_where(intent, slot->region) & VDF_INTENT_LEAVING)) {
            vdf_intent_free_slot(intent, slot);
            intent->left++;
        }
    }
    for (unsigned i = 0; i < 2; i++) {
        vdf_intent_span *span = &intent->span[i];
        if (!span->leaving)
            continue;
        span->leaving = false;
        if (i == VDF_SPAN_CUT && !settled) {
            vdf_intent_publish_span(span, true);
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
        if (slot->region != VDF_INTENT_NONE &&
            (vdf_intent_where(intent, slot->region) & VDF_INTENT_LEAVING))
            vdf_intent_set_where(intent, slot, 0);
    }
    for (unsigned i = 0; i < 2; i++) {
        if (intent->span[i].leaving)
            vdf_intent_publish_span(&intent->span[i], true);
        intent->span[i].leaving = false;
    }
}

/* Pages that could not be marked are named by nothing but the log: as if cut off there. */
static void keep_overflow(vdf_intent *intent)
{
    uint64_t noted = vdf_load(&intent->track->head->overflow);
    vdf_intent_span *span = &intent->span[VDF_SPAN_CUT];
    uint64_t from = (noted - 1) * VDF_PAGE_SIZE;

    if (noted == 0 || (vdf_intent_is_full(span, VDF_SPAN_CUT) && span->from <= from))
        return;
    span->from = from;
    span->to = UINT64_MAX;
    span->version = ++intent->version;
    vdf_intent_wait_durable(intent, span->version);
}

/* With the lock, given back meanwhile. Lets up to `count` regions and all spans go; false: none. */
static bool round_out(vdf_intent *intent, uint32_t count)
{
    uint32_t chosen = choose(intent, count);
    uint32_t spans = choose_spans(intent);
    uint64_t generation = intent->generation;

    if (chosen + spans == 0)
        return false;
    intent->rounded_ns = vdf_intent_now_ns();
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
            vdf_intent_go_void(intent, error);
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
    span->from = vdf_intent_is_full(span, VDF_SPAN_CUT) ? vdf_min(span->from, cut) : cut;
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
    intent->retry_s = VDF_INTENT_RETRY_S;
    if (intent->spoiled || error != 0) {
        if (intent->mode == VDF_INTENT_IS_MADE)
            vdf_intent_clear_table(intent);
        intent->mode = VDF_INTENT_IS_VOID;
        atomic_store(&intent->state, VDF_INTENT_COVERS_ALL);
        pthread_cond_broadcast(&intent->changed);
        return;
    }
    take_cuts(intent);
    intent->version++;
    intent->mode = VDF_INTENT_IS_KEPT;
    if (vdf_intent_commit(intent) == 0) {
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
        vdf_intent_wait_durable(intent, ++intent->version);
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
void vdf_intent_give_up(vdf_intent *intent, int error)
{
    while (intent->committing)
        pthread_cond_wait(&intent->changed, &intent->lock);
    if (intent->mode == VDF_INTENT_IS_KEPT) {
        intent->committing = true;
        vdf_intent_go_void(intent, error);
    }
}

/* Whether regions are to leave ahead of those who need their slots. */
static bool is_short(const vdf_intent *intent)
{
    return intent->allowed && intent->free < intent->low &&
           vdf_intent_now_ns() - intent->rounded_ns >= VDF_SECOND_NS;
}

static void work(vdf_intent *intent)
{
    bool asleep = (atomic_load(&intent->state) & VDF_INTENT_ASLEEP) != 0;

    if (intent->mode == VDF_INTENT_IS_VOID) {
        work_void(intent);
    } else if (intent->waiting != 0 && !intent->allowed) {
        /* Marks that belong to regions named here are still being made. */
        vdf_intent_give_up(intent, -EAGAIN);
    } else if (intent->waiting != 0 || (!asleep && is_short(intent))) {
        /* None to let go: each is pinned or pending, for as long as a commit takes. */
        if (!round_out(intent, intent->slots / 4 + 1))
            nap(intent, 1);
    } else if (asleep) {
        pthread_cond_wait(&intent->work, &intent->lock);
    } else if (vdf_intent_now_ns() - intent->committed_ns >= VDF_INTENT_STAMP_S * VDF_SECOND_NS) {
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
