/*
 * internal.h - what the files of the core share. Nothing here is public.
 *
 * Locks, in the order in which they may be taken:
 *   track->admin (seal, forget, abandon)  ->  stripes, ascending  ->  track->size_lock
 *   track->admin  ->  intent->lock (never under a ticket or a stripe)
 *   track->grow_lock: a leaf
 *   lazy->lock  ->  stripes
 *   presence->lock: a leaf; who commits holds none
 *   core->park_lock, core->event_lock, core->nodes_lock: leaves
 */
#ifndef VDF_INTERNAL_H
#define VDF_INTERNAL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "vdf.h"

#define VDF_MAX_PAGES (UINT64_C(1) << 34) /* 64 TiB */
#define VDF_REGION_PAGES 4096
#define VDF_CHUNK_PAGES 16
#define VDF_STRIPES 1024
/* A request that would copy more frozen pages than this gives the epoch up (16 MiB). */
#define VDF_PRESERVE_BOUND 4096

/* a + b, or UINT64_MAX where that does not fit. */
static inline uint64_t vdf_add(uint64_t a, uint64_t b)
{
    return a > UINT64_MAX - b ? UINT64_MAX : a + b;
}

/* Loads and stores of words in mapped memory, in program order: a killed process leaves a prefix.
 */
static inline void vdf_store(uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_SEQ_CST);
}

static inline uint64_t vdf_load(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}

static inline uint64_t vdf_min(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static inline uint64_t vdf_pages_of(uint64_t size)
{
    return size / VDF_PAGE_SIZE + (size % VDF_PAGE_SIZE != 0);
}

/* 0, or -EFBIG where the range leaves what a disk may hold. */
int vdf_range_check(uint64_t offset, uint64_t length);

/* ---- whole-buffer file access (retry EINTR and short transfers) ------------ */

/* Bytes read, short only at the end of the file, or -errno. */
int64_t vdf_file_read(int fd, uint64_t offset, uint64_t length, uint8_t *data);
int vdf_file_write(int fd, uint64_t offset, uint64_t length, const uint8_t *data);
void vdf_sleep_ns(long ns);

/* A lock whose readers, who never nest, do not starve its writers. */
int vdf_rwlock_init(pthread_rwlock_t *lock);

/* ---- guard: stores into mapped files of a disk that fails -------------------- */

typedef struct vdf_guard vdf_guard;

/* What became of mapped pages; zero to begin with. */
typedef struct vdf_lost {
    _Atomic uint32_t pages;     /* 1: some are not the file's any more, but memory's */
    _Atomic uint32_t unsettled; /* 1: marks may be missing; see vdf_track_settle */
    uint64_t *noted;            /* NULL, or where 1 is written for who opens the file next */
} vdf_lost;

/*
 * From now on a store into [start, start + bytes) never fails. `lost` outlives the guard;
 * any thread sets its fields.
 */
int vdf_guard_add(void *start, uint64_t bytes, vdf_lost *lost, vdf_guard **out);
/* Nobody stores there any more. NULL is fine. */
void vdf_guard_remove(vdf_guard *guard);

/* ---- bitmap: one bit a page, one summary bit a region ---------------------- */

typedef struct vdf_bitmap {
    _Atomic uint64_t *word;
    _Atomic uint64_t *summary;
    _Atomic uint64_t capacity; /* pages that may be marked */
    _Atomic uint64_t set;      /* bits set now */
    int fd;                    /* -1: anonymous memory, volatile */
    vdf_guard *guard;
} vdf_bitmap;

/* fd is the bitmap's from here on; -1 for memory. Existing content is kept. */
int vdf_bitmap_open(vdf_bitmap *map, int fd, uint64_t pages);
void vdf_bitmap_close(vdf_bitmap *map);
int vdf_bitmap_grow(vdf_bitmap *map, uint64_t pages);
/* Marks and clears; concurrent callers are fine. Beyond the capacity nothing happens. */
void vdf_bitmap_set(vdf_bitmap *map, uint64_t first, uint64_t count);
void vdf_bitmap_clear(vdf_bitmap *map, uint64_t first, uint64_t count);
bool vdf_bitmap_test(const vdf_bitmap *map, uint64_t page);
/* The first set page in [page, end), or end. */
uint64_t vdf_bitmap_next(const vdf_bitmap *map, uint64_t page, uint64_t end);
/* The first clear page in [page, end), or end. */
uint64_t vdf_bitmap_next_clear(const vdf_bitmap *map, uint64_t page, uint64_t end);
/* Pages set in [page, end), counted up to limit. */
uint64_t vdf_bitmap_count(const vdf_bitmap *map, uint64_t page, uint64_t end, uint64_t limit);
/* Clears everything that is set: cost goes with what is set. No concurrent setters. */
void vdf_bitmap_reset(vdf_bitmap *map);
/* into |= from. */
void vdf_bitmap_merge(vdf_bitmap *into, const vdf_bitmap *from);
/* What is set and cleared by now is on disk on return. */
int vdf_bitmap_sync(const vdf_bitmap *map);
/* From now on the disk may fail: vdf_guard_add. */
int vdf_bitmap_guard(vdf_bitmap *map, vdf_lost *lost);
/* Has all that is set written to disk again at the next sync. */
void vdf_bitmap_touch(vdf_bitmap *map);

/* ---- gate: tickets of writes under way -------------------------------------- */

/*
 * A write holds a ticket from before it marks until after it wrote. A flip starts
 * a new phase; waiting for the old phase waits for every write that entered
 * before. The epoch is read together with the phase, so that a flip gives all
 * later tickets the new epoch at one instant.
 */
typedef struct vdf_gate {
    _Atomic uint64_t phase;
    _Atomic uint64_t epoch[2];
    _Atomic uint32_t held;
    struct {
        _Atomic uint64_t tickets;
        char apart[56];
    } inside[2];
    pthread_mutex_t lock;
    pthread_cond_t released;
} vdf_gate;

typedef struct vdf_ticket {
    uint64_t phase;
    uint64_t epoch;
} vdf_ticket;

int vdf_gate_init(vdf_gate *gate);
void vdf_gate_destroy(vdf_gate *gate);
vdf_ticket vdf_gate_enter(vdf_gate *gate);
void vdf_gate_leave(vdf_gate *gate, vdf_ticket ticket);
void vdf_gate_hold(vdf_gate *gate);
void vdf_gate_release(vdf_gate *gate);
/* Starts the next phase with this epoch; gives the old phase. One caller at a time. */
uint64_t vdf_gate_flip(vdf_gate *gate, uint64_t epoch);
void vdf_gate_wait(vdf_gate *gate, uint64_t phase);

/* ---- crash ------------------------------------------------------------------ */

extern bool vdf_crash_armed;
void vdf_crash_at(const char *name);

/* Passes a crash hook (crash.c): `name` says what is durable now. */
static inline void vdf_crash(const char *name)
{
    if (__builtin_expect(vdf_crash_armed, 0))
        vdf_crash_at(name);
}

/* ---- track ------------------------------------------------------------------ */

typedef struct vdf_track_head {
    char magic[8];
    uint64_t version;
    uint64_t epoch;
    uint64_t frozen_epoch; /* 0: none */
    uint64_t base_size[2]; /* by parity of the epoch: bytes at its start */
    uint64_t cut[2];       /* the smallest size since, UINT64_MAX: none smaller */
    uint64_t changed[2];
    uint64_t overflow; /* 0, or 1 + the first page that could not be marked */
    uint64_t lost;     /* 1: marks may be missing in the files */
} vdf_track_head;

struct vdf_intent;

struct vdf_track {
    int dir;
    struct vdf_intent *intent;
    int preserve;
    vdf_track_head *head; /* mapped */
    vdf_guard *head_guard;
    vdf_lost lost;
    vdf_bitmap dirty[2];
    vdf_bitmap preserved;
    vdf_bitmap suspect;
    pthread_mutex_t admin;
    pthread_mutex_t grow_lock;
    pthread_mutex_t size_lock;
    _Atomic uint64_t epoch;
    _Atomic uint64_t frozen_epoch; /* 0: none. Set before the flip, reset before the clean-up */
    _Atomic uint32_t drained;      /* the frozen epoch's tickets are all back */
    _Atomic uint32_t abandoned;    /* 0, or the errno for which the frozen epoch was given up */
    _Atomic uint64_t budget;       /* pages that one frozen epoch may have preserved */
    _Atomic uint32_t notified;
    _Atomic uint32_t overflow;
    uint32_t sealed_known; /* under size_lock */
    uint64_t sealed_size;
};

/* Maps the files as they are; vdf_track_open also thaws and begins the intent log. */
int vdf_track_load(const char *directory, uint64_t size, bool fresh, vdf_track **out);
/* dirty[new] |= dirty[old], durable before dirty[old] is cleared. */
int vdf_track_fold(vdf_track *track, uint64_t new);
/* Lets the bitmaps reach `size`; notes where they cannot. */
void vdf_track_reach(vdf_track *track, uint64_t size);
/* The pages that every bitmap can mark. */
uint64_t vdf_track_capacity(const vdf_track *track);
/* Pages from `page` on changed and could not be marked. */
void vdf_track_missed(vdf_track *track, uint64_t page);
/* Says once that the epoch changed; gives the frozen epoch up and says why. */
void vdf_track_notify(vdf_image *image, vdf_track *track);
void vdf_track_give_up(vdf_image *image, vdf_track *track, int error);
/* Grows again, makes suspect what was missed. -EAGAIN: something was, or no room still. */
int vdf_track_mend(vdf_track *track, uint64_t size);

/* ---- intent log: intent.h ------------------------------------------------------ */

#include "intent.h"

/* ---- image ------------------------------------------------------------------ */

struct vdf_lazy;

struct vdf_image {
    vdf_core *core;
    int fd;       /* the guest's */
    int inner_fd; /* the core's own: reads for capture, syncs */
    unsigned flags;
    uint64_t cookie;
    _Atomic uint32_t references;
    _Atomic uint64_t size;
    _Atomic int sync_error;
    atomic_bool refuses; /* vdf_image_refuse_writes */
    vdf_gate gate;
    _Atomic(vdf_track *) track;
    pthread_mutex_t *stripe; /* VDF_STRIPES, or NULL: neither tracked nor lazy yet */
    struct vdf_lazy *lazy;   /* or NULL */
};

/* Whether writes get EROFS. */
static inline bool vdf_image_refuses(vdf_image *image)
{
    return (image->flags & VDF_IMAGE_READONLY) != 0 || atomic_load(&image->refuses);
}

/* Locks the stripes of the chunks that hold the range; at most VDF_STRIPES of them. */
void vdf_image_lock(vdf_image *image, uint64_t offset, uint64_t length);
void vdf_image_unlock(vdf_image *image, uint64_t offset, uint64_t length);
/* A sync failed: what the kernel could not write it has forgotten, later successes would lie. */
void vdf_image_latch(vdf_image *image, int error);

/* ---- change: what a tracked write does before it writes --------------------- */

typedef struct vdf_change {
    vdf_image *image;
    vdf_track *track; /* NULL: untracked */
    vdf_ticket ticket;
    uint64_t epoch;  /* the epoch that the change counts to */
    uint64_t missed; /* the first page that could not be marked, or UINT64_MAX */
} vdf_change;

void vdf_change_begin(vdf_change *change, vdf_image *image);
/*
 * The same for a change of these bytes, or within a span too large for regions: they are in
 * the intent log on return, which may wait for the local disk.
 */
void vdf_change_begin_covered(vdf_change *change, vdf_image *image, uint64_t offset,
                              uint64_t length);
void vdf_change_begin_span(vdf_change *change, vdf_image *image, unsigned which, uint64_t from,
                           uint64_t to);
/* The same for bytes that come from the vault: they change nothing, and mark nothing. */
void vdf_change_begin_unmarked(vdf_change *change, vdf_image *image);
void vdf_change_end(vdf_change *change);
/* With the stripes held: preserves frozen pages of the range, marks it. */
void vdf_change_mark(vdf_change *change, uint64_t offset, uint64_t length);
/* With all stripes held: what a truncation took away is there still, it failed. */
void vdf_change_uncut(vdf_change *change, uint64_t size, uint64_t old);
/* Before a change that cannot be taken by page: waits until the frozen epoch has drained. */
void vdf_change_wait_drained(const vdf_change *change);
/* With all stripes held: what a truncation from `old` bytes to `size` takes away. */
void vdf_change_cut(vdf_change *change, uint64_t size, uint64_t old);
/* With size_lock held, before the size changes; `size`: the smaller of old and new. */
void vdf_change_size(vdf_change *change, uint64_t size);

/* ---- lazy images: lazy.h ------------------------------------------------------- */

#include "lazy.h"

/* NULL, or the lazy part of an image of which something may not be here yet. */
static inline vdf_lazy *vdf_image_lazy(const vdf_image *image)
{
    return image->lazy == NULL || atomic_load(&image->lazy->complete) ? NULL : image->lazy;
}

/* ---- core ------------------------------------------------------------------- */

/* Bytes of a WRITE that wait. */
typedef struct vdf_part {
    uint64_t offset, length;
    const uint8_t *data;
} vdf_part;

/* Payloads of parked requests up to here are kept whole; beyond it see request.c. */
#define VDF_PARK_BYTES (UINT64_C(64) << 20)

typedef struct vdf_parked {
    struct vdf_parked *next;
    vdf_image *image;
    uint64_t unique;
    uint32_t opcode;
    int how; /* whence of an LSEEK, mode of a FALLOCATE */
    uint64_t offset;
    uint64_t length;
    unsigned wants;
    vdf_want want[2]; /* not answered yet */
    bool begun;       /* some of it is written: not to be interrupted */
    bool spaceless;   /* it has found no space once, and waits for that */
    unsigned parts;
    vdf_part part[2];
    uint64_t payload; /* bytes of all parts, which lie behind this */
} vdf_parked;

/* A request for a node without an image, kept whole. */
typedef struct vdf_stranded {
    struct vdf_stranded *next;
    size_t length;
    uint8_t data[];
} vdf_stranded;

typedef struct vdf_node {
    struct vdf_node *next;
    uint64_t nodeid;
    vdf_image *image;
} vdf_node;

typedef struct vdf_pending {
    struct vdf_pending *next;
    uint64_t unique;
    uint64_t nodeid;
    uint32_t opcode;
} vdf_pending;

typedef struct vdf_message {
    struct vdf_message *next;
    size_t length;
    uint8_t data[];
} vdf_message;

/* Messages in order, for a thread of their own. */
typedef struct vdf_queue {
    pthread_mutex_t lock;
    pthread_cond_t filled;
    vdf_message *head, **tail;
    bool busy; /* one is being delivered */
    bool closed;
} vdf_queue;

int vdf_queue_init(vdf_queue *queue);
void vdf_queue_destroy(vdf_queue *queue);
int vdf_queue_put(vdf_queue *queue, const void *data, size_t length);
/* Waits; NULL when closed and empty. The caller frees it, then calls vdf_queue_done. */
vdf_message *vdf_queue_take(vdf_queue *queue);
void vdf_queue_done(vdf_queue *queue);
bool vdf_queue_idle(vdf_queue *queue);
void vdf_queue_close(vdf_queue *queue);

#define VDF_NODE_BUCKETS 4096
#define VDF_PENDING_BUCKETS 256

struct vdf_core {
    int fuse_fd;
    int names_core; /* our end of the socketpair */
    int names_fuse; /* libfuse's end */
    int event_fd;
    unsigned workers;
    unsigned flags;
    uint32_t init_flags2; /* what the kernel offered */
    uint32_t init_flags;
    uint8_t init[256]; /* the FUSE_INIT request */
    _Atomic size_t init_length;
    bool resumed;             /* taken over from a predecessor */
    _Atomic bool init_answer; /* libfuse's reply to the INIT that the kernel did not send is due */
    bool workers_joined;
    _Atomic int64_t names_out; /* requests that libfuse has not answered */
    _Atomic bool started, stopping, stopped, ended;

    pthread_t *thread;
    uint8_t **buffer; /* the workers', and behind them that of the thread that hears answers */
    _Atomic unsigned working;
    unsigned threads;
    vdf_queue to_names; /* only what the socket would not take at once */
    vdf_queue to_notify;

    pthread_rwlock_t nodes_lock;
    vdf_node *node[VDF_NODE_BUCKETS];

    pthread_mutex_t sleep_lock;
    pthread_cond_t sleep_over;
    unsigned wanted; /* sleepers that were called; under sleep_lock */
    _Atomic unsigned sleeping, waiting;

    pthread_mutex_t pending_lock;
    vdf_pending *pending[VDF_PENDING_BUCKETS];

    pthread_mutex_t park_lock;
    vdf_parked *parked;
    vdf_stranded *stranded;

    pthread_mutex_t event_lock;
    vdf_event *event;
    size_t event_first, event_count, event_capacity;

    _Atomic uint64_t reads, writes, syncs, discards, seeks, names, parked_count;
    _Atomic uint64_t parked_bytes;
    _Atomic uint64_t read_bytes, write_bytes;
};

/* Room for the first events. */
int vdf_event_prepare(vdf_core *core);
/* -ENOMEM: it is not told. */
int vdf_event_offer(vdf_core *core, uint32_t kind, int error, uint64_t cookie, uint64_t offset,
                    uint64_t length);
/* The same of what has to be told: where there is no memory for it the process ends. */
void vdf_event_post(vdf_core *core, uint32_t kind, int error, uint64_t cookie, uint64_t offset,
                    uint64_t length);

/* The node's image with a reference, or NULL. */
vdf_image *vdf_nodes_find(vdf_core *core, uint64_t nodeid);
void vdf_nodes_clear(vdf_core *core);

/* Parks a copy of the request and posts an event for each want. -ENOMEM: it was not parked. */
int vdf_park(vdf_core *core, const vdf_parked *request);
/* Answers EINTR to a parked request; false: none has this id. */
bool vdf_park_interrupt(vdf_core *core, uint64_t unique);
void vdf_park_clear(vdf_core *core);

/* One request from the kernel, of `length` bytes, in a buffer of VDF_BUFFER_SIZE. */
#define VDF_BUFFER_SIZE (VDF_REQUEST_MAX + 2 * VDF_PAGE_SIZE)
void vdf_request_handle(vdf_core *core, uint8_t *buffer, size_t length);
/* Runs a parked request again; buffer as above. */
void vdf_request_resume(vdf_core *core, vdf_parked *parked, uint8_t *buffer);
void vdf_reply_error(vdf_core *core, uint64_t unique, int error);

/* resume: taking a connection over. */
#define VDF_FUSE_HAS_RESEND (1u << (39 - 32)) /* in flags2 of INIT; Linux 6.9 */

/* Keeps a data request whose node has no image. -ENOMEM: it was not kept. */
int vdf_strand(vdf_core *core, const uint8_t *request, size_t length);
/* Answers EINTR to a stranded request; false: none has this id. */
bool vdf_strand_interrupt(vdf_core *core, uint64_t unique);
void vdf_strand_clear(vdf_core *core);
/* Before the workers start: initializes libfuse, has the kernel send again what is open. */
int vdf_resume_begin(vdf_core *core);
void vdf_core_join_workers(vdf_core *core);

/* names: the way to libfuse and back. */
void vdf_names_note_init(vdf_core *core, const uint8_t *request, size_t length);
void vdf_names_forward(vdf_core *core, uint8_t *request, size_t length);
void *vdf_names_send_loop(void *core);
void *vdf_names_reply_loop(void *core);
void *vdf_names_notify_loop(void *core);
void vdf_names_clear(vdf_core *core);

#endif
