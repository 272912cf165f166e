/*
 * vdf_presence.h - which pages of a writable LAZY image are here, beyond the life of its
 * process and of its host. Part of vdf.h, which includes it.
 */
#ifndef VDF_PRESENCE_H
#define VDF_PRESENCE_H

#include <stdint.h>

/*
 * Presence lives in a directory: `presence` (a page bitmap, preallocated, mapped),
 * `presence.head` (mapped) and `presence.log`. What was written, filled or made zero is
 * present from then on, and survives the process. The death of the host survives what the
 * log names: what was present at the last vdf_image_sync or vdf_image_presence_commit. The
 * rest falls back to what the base has, as pages that were never written.
 */
enum {
    VDF_PRESENCE_WHOLE = 1 /* all is here but the absent runs: no region has to be mapped */
};

/*
 * Makes the presence of an image over a base of `size` bytes, in a directory of its own.
 * absent: `count` pairs of a first page and a number of pages; only with WHOLE. Durable on
 * return. -EEXIST: there is one. -ENOSPC: no room for the bitmap.
 */
int vdf_presence_create(int directory, uint64_t size, unsigned flags, const uint64_t *absent,
                        uint64_t count);

enum {
    VDF_PRESENCE_TRUST = 1 /* the host has lived since it was made or opened last */
};

/*
 * Opens it for a writable LAZY image, before the first use of that (-EBUSY). Without TRUST,
 * and where the bitmap lost bits to a disk that failed, what is present is built from the log.
 * Takes time and memory by what is present. -ENOENT: there is none. -EBADMSG: damaged, it
 * is not known what the image holds. After an error the image is of no use.
 */
int vdf_image_presence_open(vdf_image *image, int directory, unsigned flags);

/*
 * As vdf_image_sync, for use in the background: what is present now outlives the host. May
 * write the log anew, when it has more than doubled; syncs wait meanwhile.
 */
int vdf_image_presence_commit(vdf_image *image);

/*
 * All is here: durably so on return, and from then on the image is like any other. -EAGAIN:
 * a page is absent, or a region not mapped.
 */
int vdf_image_presence_complete(vdf_image *image);

typedef struct vdf_presence_counts {
    uint64_t base_size;         /* bytes */
    uint64_t low;               /* bytes: the smallest size so far; none comes from beyond */
    uint64_t present_pages;     /* written, filled or made zero */
    uint64_t uncommitted_pages; /* of them, those that the log does not name */
    uint64_t absent_pages;      /* known to be absent */
    uint64_t log_bytes;
    uint32_t complete; /* 1: nothing is absent; what was counted before stays as it was */
    uint32_t rebuilt;  /* 1: it was opened from the log */
    uint32_t lost;     /* 1: a part of the bitmap is in memory alone, the disk failed */
} vdf_presence_counts;
/* -EINVAL: not a writable LAZY image. */
int vdf_presence_counts_get(vdf_image *image, vdf_presence_counts *out);

#endif
