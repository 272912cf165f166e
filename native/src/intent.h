/*
 * intent.h - the intent log inside the core: its file, its table, its thread. Part of
 * internal.h, which includes it.
 */
#ifndef VDF_INTENT_H
#define VDF_INTENT_H

/* ---- intent log: the file (intentlog.c) ---------------------------------------- */

#define VDF_INTENT_SLOTS 1237 /* as DRBD's activity log: 4.8 GiB at most to look at */
#define VDF_INTENT_MIN 2      /* for tests: one change takes up to 17 at once, or waits for ever */
#define VDF_INTENT_MAX 8000
#define VDF_INTENT_SHIFT 22 /* regions of 4 MiB */
#define VDF_INTENT_NONE UINT32_MAX
#define VDF_INTENT_FILES 3 /* bitmaps that the log belongs to */
#define VDF_INTENT_STAMP_S 5
/* A file changed later than this after the log's last record was changed by others. */
#define VDF_INTENT_ALLOWANCE_S 20

#define VDF_INTENT_VOID 1u /* the record says nothing */

typedef struct vdf_intent_record {
    uint32_t flags;
    uint64_t stamp_ns; /* wall clock, of the write */
    uint64_t span[2][2];
    uint32_t *region; /* one a slot, VDF_INTENT_NONE: free */
} vdf_intent_record;

typedef struct vdf_intentlog {
    int dir;
    int fd; /* -1: there is no file */
    uint32_t slots;
    uint64_t number; /* of the newest record */
    uint64_t identity;
    uint8_t *buffer;
    uint32_t *none;
} vdf_intentlog;

/* Makes a void log, durable on return. `others`: the files that it belongs to. */
int vdf_intentlog_create(int dir, uint32_t slots, const int *others, unsigned count,
                         vdf_intentlog *log);
/* The newest record; its region array is the caller's. -EBADMSG: damaged, or other files. */
int vdf_intentlog_open(int dir, const int *others, unsigned count, vdf_intentlog *log,
                       vdf_intent_record *record);
/* Prepares the next record, then writes it: durable on return. */
void vdf_intentlog_encode(vdf_intentlog *log, const vdf_intent_record *record);
int vdf_intentlog_write(vdf_intentlog *log);
/* The log says nothing any more: durable on return, or an error. */
int vdf_intentlog_void(vdf_intentlog *log);
void vdf_intentlog_close(vdf_intentlog *log);

/* ---- intent log: which regions are active (intent.c) ----------------------------- */

enum {
    VDF_SPAN_CUT,
    VDF_SPAN_WIDE
};

typedef struct vdf_intent_span {
    uint64_t from, to; /* empty: to <= from */
    uint64_t version;
    uint32_t pins;
    bool leaving;
    _Atomic uint64_t safe_from, safe_to; /* what is durable and stays while a ticket is held */
} vdf_intent_span;

typedef struct vdf_intent_slot {
    uint32_t region; /* VDF_INTENT_NONE: free */
    _Atomic uint32_t used;
    uint64_t version; /* durable from this one on */
    uint32_t pins;
} vdf_intent_slot;

enum {
    VDF_INTENT_ASLEEP = 1,    /* no change for a while: the next one writes the log */
    VDF_INTENT_COVERS_ALL = 2 /* the log is void, nobody needs to ask */
};

typedef enum vdf_intent_mode {
    VDF_INTENT_IS_VOID,
    VDF_INTENT_IS_MADE, /* the log on disk is void, the table is kept already */
    VDF_INTENT_IS_KEPT
} vdf_intent_mode;

typedef struct vdf_intent {
    _Atomic uint16_t *where; /* by region: slot + 1 and flags, 0: none */
    vdf_intent_slot *slot;
    _Atomic uint32_t state;
    _Atomic uint32_t tick;
    vdf_intent_span span[2];
    _Atomic uint64_t shrunk; /* the last epoch that a truncation made smaller */
    _Atomic uint32_t users;

    pthread_mutex_t lock; /* all that follows */
    pthread_cond_t changed, work;
    vdf_track *track;
    vdf_image *image;
    vdf_intentlog log;
    vdf_intent_record record;
    uint64_t *order;
    uint32_t slots, free, low, hand, waiting;
    vdf_intent_mode mode;
    bool committing, allowed, spoiled, stop, running, void_durable;
    int void_error;
    int retry_s;
    uint64_t version, durable, generation;
    uint64_t committed_ns, rounded_ns, seen_ns;
    uint64_t misses, commits, waits, rounds, left, voids;
    pthread_t thread;
} vdf_intent;

typedef struct vdf_intent_hold {
    enum {
        VDF_HOLD_NONE,
        VDF_HOLD_REGIONS,
        VDF_HOLD_CUT,
        VDF_HOLD_WIDE
    } which;
    uint64_t first, end;
    uint64_t generation;
} vdf_intent_hold;

/* The log is the intent's from here on, the record is only read. */
int vdf_intent_create(vdf_track *track, const vdf_intentlog *log, const vdf_intent_record *record,
                      vdf_intent **out);
void vdf_intent_free(vdf_intent *intent);
int vdf_track_make_log(vdf_track *track, uint32_t slots, vdf_intentlog *log);
int vdf_intent_start(vdf_intent *intent, vdf_image *image);
void vdf_intent_stop(vdf_intent *intent);
/* What was suspect before is marked and durable: the log may be begun, spans may leave. */
void vdf_intent_allow(vdf_intent *intent);
/* What the log says cannot be kept true. */
void vdf_intent_fail(vdf_intent *intent, int error);
/* A truncation of this epoch took something away. */
void vdf_intent_shrunk(vdf_intent *intent, uint64_t epoch);

/*
 * Without a ticket: the range or the span is in the log on return, and stays until put.
 * The caller has counted itself in `users` with a ticket held; put takes that back.
 */
vdf_intent_hold vdf_intent_take(vdf_intent *intent, uint64_t offset, uint64_t length);
vdf_intent_hold vdf_intent_take_span(vdf_intent *intent, unsigned which, uint64_t from,
                                     uint64_t to);
void vdf_intent_put(vdf_intent *intent, vdf_intent_hold hold);

/* Nothing changed for a while: what changes the file without a region in the log wakes it. */
static inline bool vdf_intent_is_asleep(vdf_intent *intent)
{
    return (atomic_load(&intent->state) & VDF_INTENT_ASLEEP) != 0;
}

/* As take: without a ticket, counted in `users`, which it takes back. */
void vdf_intent_wake(vdf_intent *intent);

/* With a ticket: whether all regions of the range are in the log; they stay while it is held. */
static inline bool vdf_intent_covers(vdf_intent *intent, uint64_t offset, uint64_t length)
{
    uint32_t state = atomic_load(&intent->state);

    if (state != 0)
        return (state & VDF_INTENT_COVERS_ALL) != 0;
    uint32_t tick = atomic_load_explicit(&intent->tick, memory_order_relaxed);
    uint64_t last = (offset + (length ? length : 1) - 1) >> VDF_INTENT_SHIFT;
    for (uint64_t region = offset >> VDF_INTENT_SHIFT; region <= last; region++) {
        uint16_t at = atomic_load_explicit(&intent->where[region], memory_order_acquire);
        if (at == 0 || (at & 0xc000u) != 0)
            return false;
        vdf_intent_slot *slot = &intent->slot[at - 1];
        if (atomic_load_explicit(&slot->used, memory_order_relaxed) != tick)
            atomic_store_explicit(&slot->used, tick, memory_order_relaxed);
    }
    return true;
}

static inline bool vdf_intent_covers_span(vdf_intent *intent, unsigned which, uint64_t from,
                                          uint64_t to)
{
    vdf_intent_span *span = &intent->span[which];
    uint32_t state = atomic_load(&intent->state);

    if (state != 0)
        return (state & VDF_INTENT_COVERS_ALL) != 0;
    uint64_t end = atomic_load(&span->safe_to);
    return atomic_load(&span->safe_from) <= from && to <= end && atomic_load(&span->safe_to) == end;
}

/* ---- what intent.c and intentout.c share: all with intent->lock ------------------- */

#define VDF_INTENT_PENDING 0x8000u
#define VDF_INTENT_LEAVING 0x4000u
#define VDF_INTENT_SLOT_MASK 0x3fffu
#define VDF_INTENT_RETRY_S 5
#define VDF_SECOND_NS UINT64_C(1000000000)

uint16_t vdf_intent_where(const vdf_intent *intent, uint64_t region);
void vdf_intent_set_where(vdf_intent *intent, const vdf_intent_slot *slot, unsigned flags);
void vdf_intent_free_slot(vdf_intent *intent, vdf_intent_slot *slot);
void vdf_intent_clear_table(vdf_intent *intent);
/* The log cannot go on; the caller has set `committing`, so that nobody else writes it. */
void vdf_intent_go_void(vdf_intent *intent, int error);
/* Writes what the table holds now; others that come meanwhile go into the next one. */
int vdf_intent_commit(vdf_intent *intent);
void vdf_intent_wait_durable(vdf_intent *intent, uint64_t version);
/* Lets a span be relied on, or not, by those who hold a ticket. */
void vdf_intent_publish_span(vdf_intent_span *span, bool valid);
bool vdf_intent_is_full(const vdf_intent_span *span, unsigned which);
uint64_t vdf_intent_now_ns(void);
/* With the lock, given back meanwhile. */
void vdf_intent_give_up(vdf_intent *intent, int error);

#endif
