/*
 * presencelog.c - the presence log's file: which pages of a writable lazy image are here, as
 * far as that outlives the host. What becomes of it is presence.c's.
 *
 * The file `presence.log` is a run of sectors of 512 bytes, each a record with a checksum of
 * its own. Sectors that are written together are a batch; the next batch is written only after
 * this one was synced. So of the last batch any sector may be torn, and the log ends before
 * it; a sector that is wrong in front of the last batch is damage, and then nothing is known.
 *
 * Each record is true by itself as soon as it is written: the image was synced before.
 * Numbers have the host's byte order: the file never leaves it.
 */
#include "internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define LOG_MAGIC UINT32_C(0x4c504456) /* "VDPL" */
#define SECTOR 512
#define PER_SECTOR 60
#define ROOM_STEP 65536
#define READ_SECTORS 128

/* A run in one word: its first page, and above it its number of pages less one. */
#define PAGE_BITS 34
#define RUN_MAX (UINT64_C(1) << (64 - PAGE_BITS))

typedef struct sector {
    uint32_t magic;
    uint16_t kind;
    uint16_t count; /* of values */
    uint64_t batch;
    uint64_t index; /* within its batch */
    uint64_t sum;   /* XXH3-64 of the sector with 0 here */
    uint64_t value[PER_SECTOR];
} sector;

_Static_assert(sizeof(sector) == SECTOR, "a record is a sector");
_Static_assert(VDF_MAX_PAGES <= UINT64_C(1) << PAGE_BITS, "a run fits one word");

static uint64_t sum_of(const sector *one)
{
    sector copy = *one;

    copy.sum = 0;
    return XXH3_64bits(&copy, sizeof copy);
}

/* ---- records ------------------------------------------------------------------------ */

void vdf_records_begin(vdf_records *records, uint64_t batch)
{
    *records = (vdf_records){.batch = batch};
}

void vdf_records_free(vdf_records *records)
{
    free(records->data);
    *records = (vdf_records){.batch = 0};
}

static sector *add_sector(vdf_records *records, unsigned kind)
{
    if (records->bytes == records->room) {
        uint64_t room = records->room == 0 ? 8 * SECTOR : 2 * records->room;
        uint8_t *larger = realloc(records->data, room);
        if (larger == NULL) {
            records->error = -ENOMEM;
            return NULL;
        }
        records->data = larger;
        records->room = room;
    }
    sector *one = (sector *)(void *)(records->data + records->bytes);
    memset(one, 0, sizeof *one);
    one->magic = LOG_MAGIC;
    one->kind = (uint16_t)kind;
    one->batch = records->batch;
    one->index = records->bytes / SECTOR;
    records->bytes += SECTOR;
    return one;
}

void vdf_records_add(vdf_records *records, unsigned kind, uint64_t value)
{
    sector *one = NULL;

    if (records->error != 0)
        return;
    if (records->bytes != 0)
        one = (sector *)(void *)(records->data + records->bytes - SECTOR);
    if (one == NULL || one->kind != kind || one->count == PER_SECTOR)
        one = add_sector(records, kind);
    if (one != NULL)
        one->value[one->count++] = value;
}

void vdf_records_add_run(vdf_records *records, unsigned kind, uint64_t page, uint64_t count)
{
    while (count > 0) {
        uint64_t step = vdf_min(count, RUN_MAX);
        vdf_records_add(records, kind, (step - 1) << PAGE_BITS | page);
        page += step;
        count -= step;
    }
}

static int write_records(int fd, uint64_t offset, vdf_records *records)
{
    if (records->error != 0)
        return records->error;
    for (uint64_t at = 0; at < records->bytes; at += SECTOR) {
        sector *one = (sector *)(void *)(records->data + at);
        one->sum = sum_of(one);
    }
    return vdf_file_write(fd, offset, records->bytes, records->data);
}

/* ---- writing ------------------------------------------------------------------------ */

int vdf_presencelog_replace(vdf_presencelog *log, vdf_records *records)
{
    int fd =
        openat(log->dir, "presence.new", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);

    if (fd < 0)
        return -errno;
    int error = write_records(fd, 0, records);
    if (error == 0 && fsync(fd) != 0)
        error = -errno;
    if (error == 0 && renameat(log->dir, "presence.new", log->dir, "presence.log") != 0)
        error = -errno;
    if (error != 0) {
        close(fd);
        return error;
    }
    /* The old file is gone for us: what comes next goes into this one. */
    if (log->fd >= 0)
        close(log->fd);
    log->fd = fd;
    log->end = log->room = records->bytes;
    log->batch = records->batch + 1;
    log->unnamed = true;
    vdf_crash("presence-log.renamed");
    if (fsync(log->dir) != 0)
        return -errno;
    log->unnamed = false;
    vdf_crash("presence-log.replaced");
    return 0;
}

int vdf_presencelog_reserve(vdf_presencelog *log, uint64_t bytes)
{
    uint64_t end = log->end + bytes;
    int error;

    if (end <= log->room)
        return 0;
    end = (end + ROOM_STEP - 1) / ROOM_STEP * ROOM_STEP;
    do {
        error = posix_fallocate(log->fd, (off_t)log->room, (off_t)(end - log->room));
    } while (error == EINTR);
    if (error == 0)
        log->room = end;
    return -error;
}

int vdf_presencelog_append(vdf_presencelog *log, vdf_records *records)
{
    int error = write_records(log->fd, log->end, records);

    if (error == 0)
        vdf_crash("presence-log.written");
    if (error == 0 && fdatasync(log->fd) != 0)
        error = -errno;
    if (error != 0)
        return error;
    log->end += records->bytes;
    log->batch = records->batch + 1;
    return 0;
}

/* ---- reading ------------------------------------------------------------------------ */

typedef struct reader {
    vdf_presence_said *said;
    uint64_t end;          /* sectors that are right */
    uint64_t batch, index; /* expected next; or a new batch */
    bool ended;            /* one was not right */
} reader;

static bool take_head(vdf_presence_said *said, const sector *one)
{
    if (one->count != 3 || one->value[0] != VDF_PRESENCE_VERSION)
        return false;
    said->base_size = said->low = one->value[1];
    said->whole = one->value[2] != 0;
    return said->base_size <= VDF_MAX_PAGES * VDF_PAGE_SIZE;
}

static void set_runs(vdf_bitmap *map, const sector *one)
{
    for (unsigned i = 0; i < one->count; i++) {
        uint64_t page = one->value[i] & ((UINT64_C(1) << PAGE_BITS) - 1);
        vdf_bitmap_set(map, page, (one->value[i] >> PAGE_BITS) + 1);
    }
}

void vdf_records_set(const vdf_records *records, unsigned kind, vdf_bitmap *map)
{
    for (uint64_t at = 0; at < records->bytes; at += SECTOR) {
        const sector *one = (const sector *)(const void *)(records->data + at);
        if (one->kind == kind)
            set_runs(map, one);
    }
}

/* Checksums hold: what makes no sense was not written by this version. */
static bool take(reader *from, const sector *one)
{
    vdf_presence_said *said = from->said;

    if (one->count > PER_SECTOR || (from->end == 0) != (one->kind == VDF_RECORD_HEAD))
        return false;
    switch (one->kind) {
    case VDF_RECORD_HEAD:
        return take_head(said, one);
    case VDF_RECORD_PRESENT:
        set_runs(&said->present, one);
        return true;
    case VDF_RECORD_ABSENT:
        set_runs(&said->absent, one);
        return true;
    case VDF_RECORD_LOW:
        for (unsigned i = 0; i < one->count; i++)
            said->low = vdf_min(said->low, one->value[i]);
        return true;
    case VDF_RECORD_COMPLETE:
        said->complete = true;
        return true;
    default:
        return false;
    }
}

static int read_sector(reader *from, uint64_t number, const sector *one)
{
    bool sound = one->magic == LOG_MAGIC && one->sum == sum_of(one);
    bool next = (one->batch == from->batch && one->index == from->index) ||
                (one->batch == from->batch + 1 && one->index == 0);

    if (from->ended || !sound || !next) {
        /* Its batch was begun when all before it was synced: that must be right. */
        if (sound && (one->index > number || number - one->index > from->end))
            return -EBADMSG;
        from->ended = true;
        return 0;
    }
    if (!take(from, one))
        return -EBADMSG;
    from->end++;
    from->batch = one->batch;
    from->index = one->index + 1;
    return 0;
}

static int read_all(int fd, uint64_t bytes, reader *from)
{
    static const uint64_t step = (uint64_t)READ_SECTORS * SECTOR;
    sector *block = malloc(step);
    int error = block == NULL ? -ENOMEM : 0;

    for (uint64_t at = 0; at < bytes && error == 0; at += step) {
        int64_t got = vdf_file_read(fd, at, vdf_min(step, bytes - at), (uint8_t *)block);
        if (got < 0)
            error = (int)got;
        for (uint64_t i = 0; error == 0 && i < (uint64_t)got / SECTOR; i++)
            error = read_sector(from, at / SECTOR + i, &block[i]);
    }
    free(block);
    return error == 0 && from->end == 0 ? -EBADMSG : error;
}

/*
 * What is behind the end must never be taken for part of a later batch. What a process that was
 * killed had written and not synced is relied on from here on, and so is its name.
 */
static int settle(vdf_presencelog *log, uint64_t bytes)
{
    if (bytes != log->end && ftruncate(log->fd, (off_t)log->end) != 0)
        return -errno;
    return fdatasync(log->fd) == 0 && fsync(log->dir) == 0 ? 0 : -errno;
}

int vdf_presencelog_open(int dir, vdf_presencelog *log, vdf_presence_said *said)
{
    struct stat st;
    reader from = {.said = said, .batch = 1};

    *log = (vdf_presencelog){.dir = dir, .fd = -1};
    memset(said, 0, sizeof *said);
    int error = vdf_bitmap_open(&said->present, -1, 0);
    if (error == 0)
        error = vdf_bitmap_open(&said->absent, -1, 0);
    if (error == 0) {
        log->fd = openat(dir, "presence.log", O_RDWR | O_CLOEXEC | O_NOFOLLOW);
        error = log->fd < 0 || fstat(log->fd, &st) != 0 ? -errno : 0;
    }
    if (error == 0)
        error = read_all(log->fd, (uint64_t)st.st_size, &from);
    if (error == 0) {
        log->end = log->room = from.end * SECTOR;
        log->batch = from.batch + 1;
        error = settle(log, (uint64_t)st.st_size);
    }
    if (error != 0) {
        vdf_presencelog_close(log);
        vdf_presence_said_free(said);
    }
    return error;
}

void vdf_presencelog_close(vdf_presencelog *log)
{
    if (log->fd >= 0)
        close(log->fd);
    log->fd = -1;
}

void vdf_presence_said_free(vdf_presence_said *said)
{
    if (said->present.word != NULL)
        vdf_bitmap_close(&said->present);
    if (said->absent.word != NULL)
        vdf_bitmap_close(&said->absent);
}
