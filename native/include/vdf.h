/*
 * vdf.h - the public interface of the vdiskfs C core.
 *
 * This file, with vdf_presence.h at its end, is also the declaration that cffi reads:
 * after the preprocessor lines are dropped, what is left must be plain declarations.
 *
 * Conventions. Every function returns 0 or a negative errno unless its comment
 * says otherwise. `offset`, `length` and `size` are bytes, `pageno` counts pages
 * of 4 KiB, `chunkno` chunks of 64 KiB, `region` stretches of 16 MiB.
 * Unless a comment says otherwise a function may be called from any thread, does
 * not hold Python's lock, and copies what it needs from its arguments.
 */
#ifndef VDF_H
#define VDF_H

#include <stdint.h>

typedef struct vdf_core vdf_core;
typedef struct vdf_image vdf_image;
typedef struct vdf_track vdf_track;

enum {
    VDF_PAGE_SIZE = 4096,
    VDF_CHUNK_SIZE = 65536,
    VDF_REGION_SIZE = 16777216,
    VDF_REGION_WORDS = 64,
    VDF_REQUEST_MAX = 1048576
};

/* ---- pages: pure functions ------------------------------------------------ */

/* XXH3-64 (seed 0) of each of `count` pages at `data` into `sums`. */
void vdf_pages_sum(const uint8_t *data, uint64_t count, uint64_t *sums);

/* zero[i] = 1 where page i holds only zeros, else 0. */
void vdf_pages_zero(const uint8_t *data, uint64_t count, uint8_t *zero);

/* The number of the first page whose XXH3-64 is not sums[i], or -1: all are right. */
int64_t vdf_pages_verify(const uint8_t *data, uint64_t count, const uint64_t *sums);

/*
 * The calling thread steps back behind guests' requests: a nice value of 10 and the
 * lowest best-effort I/O priority. For threads that capture, compress and ship.
 */
int vdf_thread_background(void);

/*
 * Crash hooks, for tests: what VDISKFS_CRASH and VDISKFS_CRASH_LOG say (crash.c), told
 * anew; NULL: nothing. The strings stay the caller's. Only while no other thread runs.
 */
void vdf_crash_arm(const char *plan, const char *log);

/* ---- mount ---------------------------------------------------------------- */

enum {
    VDF_MOUNT_ALLOW_OTHER = 1
};

/*
 * Mounts a FUSE file system of subtype `vdiskfs` and gives the connection's
 * descriptor. Root: mount(2); anyone else: fusermount3, which passes it over a
 * socket. nosuid, nodev, noexec and default_permissions always.
 */
int vdf_mount(const char *mountpoint, const char *source, unsigned flags, int *fd_out);

/* Unmounts; -EBUSY when in use. `lazy` detaches at once. */
int vdf_unmount(const char *mountpoint, int lazy);

/* Identity of the open file: device, inode, birth time (0 where the file system keeps none). */
typedef struct vdf_identity {
    uint64_t device;
    uint64_t inode;
    uint64_t birth_ns;
    uint64_t change_ns;
    uint64_t modify_ns;
    uint64_t size;
} vdf_identity;
int vdf_file_identity(int fd, vdf_identity *out);

/* renameat2(2) with its flags (RENAME_NOREPLACE = 1, RENAME_EXCHANGE = 2). */
int vdf_rename(int old_dir, const char *old_name, int new_dir, const char *new_name,
               unsigned flags);

/* Make a range of a file a hole; its size stays. -EOPNOTSUPP where the file system cannot. */
int vdf_punch(int fd, uint64_t offset, uint64_t length);

/* ---- core: one FUSE connection -------------------------------------------- */

enum {
    VDF_EVENT_WANT = 1,        /* a request waits for pages in [offset, offset+length) */
    VDF_EVENT_SEEK = 2,        /* an LSEEK waits for the map from offset on */
    VDF_EVENT_DIRTY = 3,       /* the first change of a new epoch */
    VDF_EVENT_ABANDONED = 4,   /* the frozen epoch was given up; error says why */
    VDF_EVENT_SYNC_FAILED = 5, /* a sync of the image or its presence failed; error says why */
    VDF_EVENT_ENDED = 6,       /* the mount is gone (unmounted or aborted) */
    VDF_EVENT_NODE = 7,        /* data is asked of node `offset`, which has no image: see resume */
    VDF_EVENT_INTENT_VOID = 8, /* the intent log cannot be kept; error says why, offset 1:
                                  durably so, 0: the disk did not take that either */
    VDF_EVENT_NO_ROOM = 9      /* a request found the image's file system full, and waits: see
                                  vdf_core_try_again */
};

typedef struct vdf_event {
    uint32_t kind;
    int32_t error;
    uint64_t cookie; /* the image's, as given to vdf_image_create */
    uint64_t offset;
    uint64_t length;
} vdf_event;

typedef struct vdf_core_counts {
    uint64_t reads, writes, syncs, discards, seeks; /* requests answered in C */
    uint64_t names;                                 /* requests passed on */
    uint64_t parked;                                /* requests waiting now */
    uint64_t read_bytes, write_bytes;
} vdf_core_counts;

enum {
    VDF_CORE_ALLOW_MMAP = 1, /* FUSE_DIRECT_IO_ALLOW_MMAP, kernel 6.6 and later */
    VDF_CORE_ASK_ROOM = 2    /* a WRITE or FALLOCATE that finds no space waits, once */
};

/*
 * Takes the descriptor of a FUSE connection (or -1: images without a mount, for
 * tests and tools; then only the events work). Owns it from here on.
 */
int vdf_core_create(int fuse_fd, unsigned workers, unsigned flags, vdf_core **out);

/* The descriptor that libfuse is to use as /dev/fd/N; stays the core's. */
int vdf_core_names_fd(const vdf_core *core);

/* An eventfd, readable while events wait. Read it (8 bytes) before draining. */
int vdf_core_event_fd(const vdf_core *core);

/*
 * Answers all events NO_ROOM: what waits for space is run once more, and then gets what the
 * file system says. It may wait for the local disk.
 */
int vdf_core_try_again(vdf_core *core);

/* Starts the threads. */
int vdf_core_start(vdf_core *core);

/*
 * A successor takes a connection over. `init` is the FUSE_INIT request that a
 * predecessor got (vdf_core_init_request): it initializes libfuse, and its reply
 * goes nowhere. vdf_core_start then has the kernel send again what the
 * predecessor had read and not answered. Before start, and only when the
 * predecessor is reaped: two servers must never hold the same request.
 *
 * From here on a data request for a node without an image is kept, and posts
 * VDF_EVENT_NODE: the kernel holds files open that only the predecessor knew.
 */
int vdf_core_resume(vdf_core *core, const uint8_t *init, uint64_t length);

/* Copies the FUSE_INIT request; its length, 0: none came yet, -ENOSPC: `room` is too small. */
int64_t vdf_core_init_request(vdf_core *core, uint8_t *data, uint64_t room);

/* 1 if the kernel can send requests again (6.9 and later); known once INIT came. */
int vdf_core_can_resend(vdf_core *core);

/* Runs the data requests kept for the node again; with error > 0 they get that errno. */
int vdf_core_retry(vdf_core *core, uint64_t nodeid, int error);

/*
 * Reads no further request, and waits until those that were read are answered,
 * for names at most `limit_ms`. Parked ones stay unanswered: a successor gets
 * them. Returns how many names are not answered. Afterwards only stop or exit.
 */
int64_t vdf_core_pause(vdf_core *core, uint64_t limit_ms);

/* Takes the oldest event. Returns 1, or 0: none waits. */
int vdf_core_next_event(vdf_core *core, vdf_event *out);

/*
 * From now on READ, WRITE, FSYNC, FLUSH, FALLOCATE and LSEEK on the node go to
 * the image, and OPEN and CREATE replies for it get its open flags. Call it
 * before the reply that names an open handle. The core takes a reference.
 */
int vdf_core_attach(vdf_core *core, uint64_t nodeid, vdf_image *image);

/* Ends that; -ENOENT if the node has no image. Requests under way finish. */
int vdf_core_detach(vdf_core *core, uint64_t nodeid);

void vdf_core_counts_get(const vdf_core *core, vdf_core_counts *out);

/* Ends the threads and closes the connection. Parked requests get EIO. Idempotent. */
void vdf_core_stop(vdf_core *core);

/* After stop; takes NULL. */
void vdf_core_free(vdf_core *core);

/* ---- image: one file's bytes ---------------------------------------------- */

enum {
    VDF_IMAGE_READONLY = 1,   /* writes get EROFS */
    VDF_IMAGE_DIRECT = 2,     /* opened with direct I/O and parallel direct writes */
    VDF_IMAGE_KEEP_CACHE = 4, /* the kernel may keep its pages between opens */
    VDF_IMAGE_LAZY = 8        /* nothing is here until it is mapped and filled, or written */
};

/*
 * An image over the open file `fd` (duplicated; read-write unless READONLY).
 * A LAZY image's file must be sparse and already have its full size; its descriptor must be
 * read-write. LAZY without READONLY is a writable copy: its presence is in memory alone
 * until vdf_image_presence_open. `cookie` comes back in its events. Reference count 1.
 */
int vdf_image_create(vdf_core *core, int fd, unsigned flags, uint64_t cookie, vdf_image **out);

void vdf_image_ref(vdf_image *image);

/* Drops a reference; the last one closes the file. Takes NULL. */
void vdf_image_unref(vdf_image *image);

/*
 * Lets every write, discard and change of size from now on get EROFS, or no longer. What is
 * under way already may still be carried out.
 */
void vdf_image_refuse_writes(vdf_image *image, int refuse);

/* The file's size in bytes now. */
int vdf_image_size(vdf_image *image, uint64_t *size);

/*
 * The same code that answers requests. Read returns the number of bytes (short
 * only at the end of the file) or -EAGAIN when pages are absent; write returns
 * 0 and writes all. Not durable until vdf_image_sync.
 *
 * A writable LAZY image: a change that covers pages in part that are absent, or not known to
 * be here, gives -EAGAIN before it has changed anything (vdf_image_allocate of more than 64
 * MiB: before it has changed anything that the same call would not change again). Whole pages
 * need nothing. vdf_image_truncate needs the page of the new end, where that is not a multiple
 * of the page size: fetch it, then call again.
 */
int64_t vdf_image_read(vdf_image *image, uint64_t offset, uint64_t length, uint8_t *data);
int vdf_image_write(vdf_image *image, uint64_t offset, uint64_t length, const uint8_t *data);
int vdf_image_allocate(vdf_image *image, int mode, uint64_t offset, uint64_t length);
int vdf_image_truncate(vdf_image *image, uint64_t size);
int64_t vdf_image_seek(vdf_image *image, uint64_t offset, int whence);

/*
 * fdatasync or fsync of the guest's descriptor. Of a writable LAZY image what became present
 * is committed too: all that completed before is there after the death of the host. Those
 * that come meanwhile share the next commit. An error for want of room for the presence log
 * loses nothing and passes when there is room. Any other stays until the image is made anew.
 */
int vdf_image_sync(vdf_image *image, int datasync);

/*
 * fdatasync on a descriptor of the core's own: its errors are not the guest's. Of a writable
 * LAZY image the same as vdf_image_sync.
 */
int vdf_image_sync_internal(vdf_image *image);

/*
 * LAZY images. Says what the regions [first, first + count) hold: bit p of
 * data[r * 64 + p / 64] set = page p of region r has data (absent until filled),
 * clear = zeros. data NULL: all zeros. Regions mapped already are left alone.
 */
int vdf_image_map(vdf_image *image, uint64_t first, uint64_t count, const uint64_t *data);

/* 1 if the region is mapped, 0 if not. */
int vdf_image_is_mapped(vdf_image *image, uint64_t region);

/*
 * Fills pages of mapped regions that are still absent; whole pages, offset
 * aligned (the end of the file may be short). Pages present are left alone.
 * filled (may be NULL): bytes that were absent.
 * Of a writable image the end is that of the base (vdf_presence_counts), and what was cut
 * off since is left out. A fill is no change to a track.
 */
int vdf_image_fill(vdf_image *image, uint64_t offset, uint64_t length, const uint8_t *data,
                   uint64_t *filled);

/* 1 if every page of the range is mapped and present, 0 if not. */
int vdf_image_is_present(vdf_image *image, uint64_t offset, uint64_t length);

/*
 * Answers an event WANT or SEEK: requests parked on that range run again, or,
 * with error > 0, get that errno. A request that still misses pages posts a new
 * event; one that waits for two ranges runs when both are answered. Runs WRITEs too,
 * and so may wait for the local disk.
 */
int vdf_image_answer(vdf_image *image, uint64_t offset, uint64_t length, int error);

/* Gives the regions' bytes back to the file system; they are unmapped again. Not if writable. */
int vdf_image_evict(vdf_image *image, uint64_t first, uint64_t count);

/*
 * For hydration in the background. The offset of the first absent page at or after `offset`
 * in a region that is mapped, and the bytes of its run; -ENXIO: none.
 */
int64_t vdf_image_next_absent(vdf_image *image, uint64_t offset, uint64_t *length);

/* The first region at or after `region` that has to be mapped to know what is absent; -ENXIO. */
int64_t vdf_image_next_unmapped(vdf_image *image, uint64_t region);

/* ---- track: which pages changed ------------------------------------------- */

/*
 * A track lives in a directory: `track` (its header), `dirty.0`, `dirty.1`,
 * `preserved`, `suspect` (page bitmaps, preallocated, mapped) and `preserve`
 * (copies of frozen pages at their own offsets), and `intent`, the intent log. All
 * survive the process. After the death of the host the bitmaps are right outside the
 * regions that the intent log names: vdf_track_recover.
 */
enum {
    VDF_TRACK_NEW = 1 /* fails with -EEXIST where one is; without it -ENOENT */
};

/*
 * Opens or creates the track of an image of `size` bytes. An epoch found frozen
 * goes back to dirty (over-marking only).
 * -ENOSPC: the bitmaps could not be preallocated. -EBADMSG: not a track.
 */
int vdf_track_open(const char *directory, uint64_t size, unsigned flags, vdf_track **out);

/* For tests: the same with an intent log of so many slots, where it makes one; 0: as ever. */
int vdf_track_open_slots(const char *directory, uint64_t size, unsigned flags, uint32_t slots,
                         vdf_track **out);

/* Unmaps and closes; not while an image uses it. Takes NULL. */
void vdf_track_close(vdf_track *track);

/* What is marked changed or suspect by now is on disk on return. */
int vdf_track_sync(vdf_track *track);

enum {
    VDF_INTENT_REGION = 4194304, /* bytes */
    VDF_INTENT_SPANS = 2
};

/* What a host that died may have left otherwise than the bitmaps say. */
typedef struct vdf_recovery {
    uint64_t *region;  /* the caller's, in: room for `capacity` region numbers */
    uint32_t capacity; /* 8000 is always enough */
    uint32_t regions;
    /*
     * Bytes [start, end) of which all that is allocated, or has data in the vault, is to be
     * made suspect by the caller; empty where end <= start.
     */
    uint64_t start[VDF_INTENT_SPANS];
    uint64_t end[VDF_INTENT_SPANS];
} vdf_recovery;

/*
 * After the death of the host, on a track that is not open: what the bitmaps mark, frozen or
 * not, goes to the running epoch, and the regions of the intent log become suspect, whole up
 * to `size`. The image, of `size` bytes and changed last at `change_ns` (wall clock), must
 * be durable as it is. `epoch` and `base_size` are the next epoch's number and the size of
 * the disk at its start as vault and spool know it. All is durable on return; may be cut
 * short anywhere and run again. Close the track's directory to everybody else meanwhile.
 * -EBADMSG or -ENOENT: void, damaged, missing, or of other files. -ESTALE: the image was
 * changed by somebody else. Then nothing is known.
 */
int vdf_track_recover(const char *directory, uint64_t size, uint64_t change_ns, uint64_t epoch,
                      uint64_t base_size, vdf_recovery *out);

/*
 * What has to be suspect is marked: the intent log of the image may be begun. Syncs the
 * bitmaps; a log that has to be begun is begun later, in a thread of the core, and until
 * then the death of the host makes everything suspect.
 */
int vdf_image_begin_intent(vdf_image *image);

typedef struct vdf_intent_counts {
    uint32_t slots;
    uint32_t active;  /* regions that would be suspect now */
    uint64_t misses;  /* changes that had to wait for the log */
    uint64_t commits; /* records written */
    uint64_t waits;   /* of the misses, those that waited for room */
    uint64_t rounds;  /* syncs of image and bitmaps to make room */
    uint64_t left;    /* regions that left */
    uint64_t voids;   /* times that it had to be given up */
    uint32_t is_void; /* 1: everything would be suspect now */
    uint32_t void_durable;
} vdf_intent_counts;
/* All 0 without a track. */
void vdf_intent_counts_get(vdf_image *image, vdf_intent_counts *out);

/*
 * Starts (or with NULL ends) tracking of an image that may be in use. On return
 * every write that was under way without tracking has finished, so what is
 * marked suspect afterwards is complete. -EBUSY: it has another track.
 */
int vdf_image_set_track(vdf_image *image, vdf_track *track);

/* The number of the running epoch. */
uint64_t vdf_track_epoch(const vdf_track *track);

/*
 * Sets the number of the running epoch, and the size in bytes of the disk at its
 * start as the vault knows it (0 for a new disk). Only before the first use.
 */
int vdf_track_set_epoch(vdf_track *track, uint64_t epoch, uint64_t base_size);

/*
 * Sets how many pages of one frozen epoch are preserved before it is given up; from now
 * on, the epoch that is frozen now included. Without it there is no such bound.
 */
void vdf_track_set_budget(vdf_track *track, uint64_t pages);

/*
 * Once everything that may lack a mark is suspect: the bitmaps are right again, and durable on
 * return. -errno: their disk does not take them; a track that is detached has to be opened anew.
 */
int vdf_track_settle(vdf_image *image);

typedef struct vdf_track_counts {
    uint64_t epoch;        /* the running one */
    uint64_t dirty_pages;  /* changed in the running epoch */
    uint64_t frozen_pages; /* sealed, not yet forgotten */
    uint64_t suspect_pages;
    uint64_t preserved_pages;
    uint32_t frozen;    /* 1 while an epoch is frozen */
    uint32_t changed;   /* 1 if the running epoch changed bytes or size */
    uint32_t overflow;  /* 1: the bitmaps could not grow; pages beyond are not tracked */
    uint32_t abandoned; /* 1: the frozen epoch was given up, vdf_track_abandon is due */
    uint32_t lost;      /* 1: marks may be missing, nothing can be sealed: vdf_track_settle */
    uint32_t detached;  /* 1: marks are kept in memory alone: opened anew all is lost */
} vdf_track_counts;
void vdf_track_counts_get(vdf_track *track, vdf_track_counts *out);

typedef struct vdf_seal {
    uint64_t epoch;   /* the epoch that ended */
    uint64_t time_ns; /* CLOCK_REALTIME at the seal */
    uint64_t size;    /* bytes of the image at the seal */
    uint64_t cut;     /* the smallest size within the epoch, its start included */
    uint64_t low;     /* the same without its start: what was read meanwhile beyond it is void */
} vdf_seal;

/*
 * Ends the running epoch of each image at one instant and waits for the writes
 * of that epoch. -EBUSY: one of them still has a frozen epoch; -EINVAL: one has
 * no track; -EAGAIN: after an overflow pages are suspect, or it could not be mended; -EUCLEAN:
 * marks may be missing, see vdf_track_settle. Nothing is sealed then.
 */
int vdf_seal_images(vdf_image **images, unsigned count, vdf_seal *out);

/* Arrays of the caller's for `capacity` pages (at least 16); data has capacity * 4096 bytes. */
typedef struct vdf_batch {
    uint64_t *pageno;
    uint64_t *sum; /* XXH3-64 of the page */
    uint8_t *zero; /* 1: the page holds zeros and takes no room in data */
    uint8_t *data; /* the pages that are not zero, one after the other */
    uint32_t capacity;
    uint32_t count;      /* pages given */
    uint32_t data_pages; /* of them with data */
    uint64_t unreadable; /* after an error: the page that its disk did not give, or all ones */
} vdf_batch;

/*
 * The next frozen pages from *cursor (a page number) on, in order, as they were
 * at the seal; moves *cursor. A chunk is never split between two batches. The
 * last page is padded with zeros. Pages at or beyond the sealed size are left
 * out. count 0: no more. -ECANCELED: the epoch was given up; -EFBIG: it was because
 * changes outran the capture (vdf_track_set_budget, or one request of more than 16 MiB).
 * -EAGAIN: pages of the chunk at *cursor are not here (a LAZY image after the death of its host
 * or a change that failed): map and fill that chunk, then call again.
 */
int vdf_capture_next(vdf_image *image, uint64_t *cursor, vdf_batch *batch);

/*
 * The same for suspect pages, read as they are now (torn by writes under way, which mark them).
 * -EAGAIN too: a page that is not here is as the base has it.
 */
int vdf_suspect_next(vdf_image *image, uint64_t *cursor, vdf_batch *batch);

/* The frozen epoch is safe elsewhere: frees what it holds. */
int vdf_capture_forget(vdf_image *image);

/* The frozen epoch goes back into the running one; no point. */
int vdf_capture_abandon(vdf_image *image);

/* Marks pages suspect: the range, or all that the file system has allocated. */
int vdf_suspect_mark(vdf_image *image, uint64_t offset, uint64_t length);
int vdf_suspect_mark_allocated(vdf_image *image);
/* The same within [start, end). */
int vdf_suspect_mark_allocated_in(vdf_image *image, uint64_t start, uint64_t end);

/* Takes the marks of these pages away. */
int vdf_suspect_clear(vdf_image *image, const uint64_t *pageno, uint64_t count);

/* The same for all pages from `first` on; for those beyond the end of the image. */
int vdf_suspect_clear_from(vdf_image *image, uint64_t first);

/* Marks the range changed in the running epoch, without writing. */
int vdf_track_mark(vdf_image *image, uint64_t offset, uint64_t length);

/* 1 if the page is marked in the running or the frozen epoch, 0 if not. */
int vdf_track_is_changed(vdf_image *image, uint64_t pageno);

#include "vdf_presence.h"

#endif
