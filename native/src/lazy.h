/*
 * lazy.h - images whose bytes arrive when they are asked for, inside the core: which pages
 * are here, and what says so after a crash. Part of internal.h, which includes it.
 */
#ifndef VDF_LAZY_H
#define VDF_LAZY_H

/* ---- presence log: the file (presencelog.c) ------------------------------------- */

#define VDF_PRESENCE_VERSION 1

enum {
    VDF_RECORD_HEAD = 1, /* version, base size, flags: the first record, alone */
    VDF_RECORD_PRESENT,  /* runs of pages that are here */
    VDF_RECORD_ABSENT,   /* WHOLE: runs of pages that are not */
    VDF_RECORD_LOW,      /* the smallest size so far */
    VDF_RECORD_COMPLETE  /* every page is here */
};

/* Records that are written together. */
typedef struct vdf_records {
    uint8_t *data;
    uint64_t bytes, room;
    uint64_t batch;
    int error; /* of the first one that could not be added */
} vdf_records;

typedef struct vdf_presencelog {
    int dir, fd;
    uint64_t end;   /* bytes that hold records */
    uint64_t room;  /* bytes that have blocks */
    uint64_t batch; /* the next one's number */
    bool unnamed;   /* the name of the file is not durable */
} vdf_presencelog;

/* What a log says. */
typedef struct vdf_presence_said {
    uint64_t base_size, low;
    bool whole, complete;
    vdf_bitmap present, absent; /* in memory; absent as it was at first */
} vdf_presence_said;

void vdf_records_begin(vdf_records *records, uint64_t batch);
void vdf_records_add(vdf_records *records, unsigned kind, uint64_t value);
/* PRESENT or ABSENT. */
void vdf_records_add_run(vdf_records *records, unsigned kind, uint64_t page, uint64_t count);
/* Sets the pages of these runs. */
void vdf_records_set(const vdf_records *records, unsigned kind, vdf_bitmap *map);
void vdf_records_free(vdf_records *records);

/* The log becomes these records (of batch 1): durable on return. log->fd is replaced. */
int vdf_presencelog_replace(vdf_presencelog *log, vdf_records *records);
/* Blocks for so many more bytes, so that the write does not fail for want of them. */
int vdf_presencelog_reserve(vdf_presencelog *log, uint64_t bytes);
/* Appends: durable on return. After an error nothing more may be appended. */
int vdf_presencelog_append(vdf_presencelog *log, vdf_records *records);
/* Reads all records; an end that was cut short is taken away. -EBADMSG: damaged. */
int vdf_presencelog_open(int dir, vdf_presencelog *log, vdf_presence_said *said);
void vdf_presencelog_close(vdf_presencelog *log);
void vdf_presence_said_free(vdf_presence_said *said);

/* ---- presence: what is here, durably (presence.c) --------------------------------- */

/* Mapped; right as long as the host lives. */
typedef struct vdf_presence_head {
    char magic[8];
    uint64_t version;
    uint64_t base_size;
    uint64_t low;
    uint64_t lost;       /* 1: bits may be missing in the bitmap's file */
    uint64_t valid;      /* 0: the bitmap is being made from the log */
    uint64_t log_failed; /* 1: what the log's file shows may not be on disk */
} vdf_presence_head;

typedef struct vdf_presence {
    vdf_presence_head *head;
    vdf_guard *head_guard;
    vdf_lost lost;
    bool rebuilt;

    /* Of the one who commits. */
    vdf_presencelog log;
    uint64_t logged_low;
    _Atomic uint64_t log_bytes;
    uint64_t compact_bytes; /* of the log when it was written anew */

    pthread_mutex_t lock; /* all that follows */
    pthread_cond_t changed;
    uint64_t started, done, good; /* numbers of commits; good: the last that succeeded */
    unsigned wanted;              /* of the next commit: VDF_COMMIT_ */
    bool running;
    int error;
} vdf_presence;

enum {
    VDF_COMMIT_FULL = 1,    /* fsync, not fdatasync */
    VDF_COMMIT_COMPACT = 2, /* the log may be written anew */
    VDF_COMMIT_COMPLETE = 4 /* every page is here: says so */
};

/* All that was written and made present before is durable on return. */
int vdf_presence_commit(vdf_image *image, unsigned wanted);
/* By who commits, or before the first use: a new log of what is durable. Durable on return. */
int vdf_presence_write_log(struct vdf_lazy *lazy);
void vdf_presence_free(vdf_presence *presence);

/* ---- lazy: which pages are here (lazy.c) ------------------------------------------- */

typedef struct vdf_lazy {
    pthread_rwlock_t lock; /* readers and fills share, eviction is alone */
    vdf_bitmap absent;
    vdf_bitmap mapped; /* one bit a region */

    /* Of a writable image; the bitmaps of another one are not open. */
    bool writable;
    bool whole; /* every region is mapped: `absent` holds all that is not here */
    _Atomic bool complete;
    _Atomic uint64_t low; /* bytes: the smallest size ever. Beyond it the base has no data */
    uint64_t base_size;
    vdf_bitmap present; /* here, whatever a map says */
    vdf_bitmap fresh;   /* present, and not in the log */
    vdf_presence *presence;
} vdf_lazy;

int vdf_lazy_create(uint64_t size, bool writable, vdf_lazy **out);
void vdf_lazy_free(vdf_lazy *lazy);
/* -EAGAIN: parts are not here. */
int64_t vdf_lazy_read(vdf_image *image, uint64_t offset, uint64_t length, uint8_t *data);
int64_t vdf_lazy_seek(vdf_image *image, uint64_t offset, int whence);

static inline bool vdf_lazy_is_mapped(const vdf_lazy *lazy, uint64_t region)
{
    return lazy->whole || vdf_bitmap_test(&lazy->mapped, region);
}

static inline bool vdf_lazy_is_present(const vdf_lazy *lazy, uint64_t page)
{
    return lazy->writable && vdf_bitmap_test(&lazy->present, page);
}

/* Pages of which the base may have data. */
static inline uint64_t vdf_lazy_low_pages(const vdf_lazy *lazy)
{
    return vdf_pages_of(atomic_load(&lazy->low));
}

/* The first page of [page, end) that is not here, or not known to be; or end. */
uint64_t vdf_lazy_next_missing(const vdf_lazy *lazy, uint64_t page, uint64_t end);

static inline bool vdf_lazy_is_here(const vdf_lazy *lazy, uint64_t page, uint64_t end)
{
    return vdf_lazy_next_missing(lazy, page, end) == end;
}

typedef struct vdf_want {
    uint64_t offset, length;
} vdf_want;

/*
 * A change of these bytes needs these pages first: those that it covers in part and that are
 * not here. Returns how many ranges: 0 to 2. A page that is here stays here.
 */
unsigned vdf_lazy_edges(const vdf_image *image, uint64_t offset, uint64_t length, vdf_want want[2]);
/* With the stripes held, after the change: the pages of the range are here. */
void vdf_lazy_mark(vdf_image *image, uint64_t offset, uint64_t length);
/* The same for a run of pages none of which was present. */
void vdf_lazy_mark_run(vdf_lazy *lazy, uint64_t page, uint64_t count);
/* With all stripes held, after the file became smaller. */
void vdf_lazy_cut(vdf_image *image, uint64_t size);

#endif
