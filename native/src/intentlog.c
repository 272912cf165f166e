/*
 * intentlog.c - the intent log's file: which regions of a disk may differ from what its
 * bitmaps say on disk. What the regions mean is intent.c's.
 *
 * The file `intent` holds two copies of one record, written in turn. A copy is a run of
 * sectors of 512 bytes, each with its own checksum and the number of the record that it
 * belongs to; the first describes the record, the others hold region numbers. Nothing
 * relies on a record before its copy was synced, and the other copy is left alone
 * meanwhile: a write that was cut short leaves one copy whose sectors are of two records,
 * next to a whole one. Sectors are expected to be written whole, as file systems do. A
 * sector whose checksum is wrong is damage, not a torn write: then the log says nothing at
 * all, because the older copy may lack regions that the newer one had.
 *
 * The file is written in full when it is made, so that later syncs carry no metadata.
 * Numbers have the host's byte order: the file never leaves it.
 */
#include "internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#define LOG_VERSION 1
#define SECTOR 512
#define PER_SECTOR 122
#define LOG_MAGIC UINT32_C(0x4c494456) /* "VDIL" */

typedef struct sector {
    uint32_t magic;
    uint32_t index; /* within its copy */
    uint64_t number;
    uint64_t sum; /* XXH3-64 of the sector with 0 here */
    uint32_t body[PER_SECTOR];
} sector;

typedef struct description {
    uint32_t version;
    uint32_t slots;
    uint64_t flags;
    uint64_t identity;
    uint64_t stamp_ns;
    uint64_t span[2][2];
} description;

_Static_assert(sizeof(sector) == SECTOR, "a sector is written whole");
_Static_assert(sizeof(description) <= sizeof(uint32_t[PER_SECTOR]), "it fits one sector");

static uint32_t sectors_of(uint32_t slots)
{
    return 1 + (slots + PER_SECTOR - 1) / PER_SECTOR;
}

static uint64_t copy_bytes(uint32_t slots)
{
    uint64_t bytes = (uint64_t)sectors_of(slots) * SECTOR;

    return (bytes + VDF_PAGE_SIZE - 1) / VDF_PAGE_SIZE * VDF_PAGE_SIZE;
}

static uint64_t sum_of(const sector *one)
{
    sector copy = *one;

    copy.sum = 0;
    return XXH3_64bits(&copy, sizeof copy);
}

static uint64_t wall_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

static void encode(vdf_intentlog *log, const vdf_intent_record *record, uint64_t number)
{
    sector *at = (sector *)(void *)log->buffer;
    description head = {.version = LOG_VERSION,
                        .slots = log->slots,
                        .flags = record->flags,
                        .identity = log->identity,
                        .stamp_ns = wall_ns()};

    memcpy(head.span, record->span, sizeof head.span);
    memset(log->buffer, 0, copy_bytes(log->slots));
    memcpy(at[0].body, &head, sizeof head);
    for (uint32_t i = 0; i < log->slots; i++)
        at[1 + i / PER_SECTOR].body[i % PER_SECTOR] = record->region[i];
    for (uint32_t i = 0; i < sectors_of(log->slots); i++) {
        at[i].magic = LOG_MAGIC;
        at[i].index = i;
        at[i].number = number;
        at[i].sum = sum_of(&at[i]);
    }
}

static int write_copy(const vdf_intentlog *log, uint64_t number)
{
    uint64_t bytes = copy_bytes(log->slots);

    return vdf_file_write(log->fd, (number & 1) * bytes, bytes, log->buffer);
}

void vdf_intentlog_encode(vdf_intentlog *log, const vdf_intent_record *record)
{
    encode(log, record, log->number + 1);
}

int vdf_intentlog_write(vdf_intentlog *log)
{
    if (log->fd < 0)
        return -EBADF;
    int error = write_copy(log, log->number + 1);
    if (error == 0 && fdatasync(log->fd) != 0)
        error = -errno;
    if (error != 0)
        return error;
    log->number++;
    return 0;
}

int vdf_intentlog_void(vdf_intentlog *log)
{
    vdf_intent_record record = {.flags = VDF_INTENT_VOID, .region = log->none};

    encode(log, &record, log->number + 1);
    if (vdf_intentlog_write(log) == 0)
        return 0;
    /* A log that is not there says nothing either. */
    if (log->fd >= 0 && unlinkat(log->dir, "intent", 0) != 0 && errno != ENOENT)
        return -errno;
    int error = fsync(log->dir) == 0 ? 0 : -errno;
    if (error == 0) {
        close(log->fd);
        log->fd = -1;
    }
    return error;
}

static int set_slots(vdf_intentlog *log, uint32_t slots)
{
    log->slots = slots;
    log->buffer = malloc(copy_bytes(slots));
    log->none = malloc(slots * sizeof *log->none);
    if (log->buffer == NULL || log->none == NULL)
        return -ENOMEM;
    memset(log->none, 0xff, slots * sizeof *log->none);
    return 0;
}

/* What tells these files from copies of them. */
static int identify(vdf_intentlog *log, const int *others, unsigned count)
{
    uint64_t told[2 * (1 + VDF_INTENT_FILES)] = {0};
    vdf_identity one;

    for (unsigned i = 0; i <= count; i++) {
        int error = vdf_file_identity(i == 0 ? log->fd : others[i - 1], &one);
        if (error != 0)
            return error;
        told[2 * i] = one.inode;
        told[2 * i + 1] = one.birth_ns;
    }
    log->identity = XXH3_64bits(told, sizeof told);
    return 0;
}

static int make_file(vdf_intentlog *log, const int *others, unsigned count)
{
    vdf_intent_record record = {.flags = VDF_INTENT_VOID, .region = log->none};

    log->fd =
        openat(log->dir, "intent.new", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (log->fd < 0)
        return -errno;
    int error = identify(log, others, count);
    for (uint64_t number = 2; error == 0 && number < 4; number++) {
        encode(log, &record, number);
        error = write_copy(log, number);
        log->number = number;
    }
    if (error == 0 && fsync(log->fd) != 0)
        error = -errno;
    if (error == 0 && renameat(log->dir, "intent.new", log->dir, "intent") != 0)
        error = -errno;
    if (error == 0 && fsync(log->dir) != 0)
        error = -errno;
    if (error == 0)
        vdf_crash("intent.created");
    return error;
}

int vdf_intentlog_create(int dir, uint32_t slots, const int *others, unsigned count,
                         vdf_intentlog *log)
{
    memset(log, 0, sizeof *log);
    log->dir = dir;
    log->fd = -1;
    int error = set_slots(log, slots);
    if (error == 0)
        error = make_file(log, others, count);
    if (error != 0)
        vdf_intentlog_close(log);
    return error;
}

/* The record's number if all sectors of the copy are of one record, 0 if not. */
static uint64_t whole(const sector *copy, uint32_t count)
{
    for (uint32_t i = 1; i < count; i++)
        if (copy[i].number != copy[0].number)
            return 0;
    return copy[0].number;
}

static bool is_sound(const sector *copy, uint32_t count, uint64_t parity)
{
    for (uint32_t i = 0; i < count; i++)
        if (copy[i].magic != LOG_MAGIC || copy[i].index != i || copy[i].sum != sum_of(&copy[i]) ||
            (copy[i].number & 1) != parity)
            return false;
    return true;
}

/* The whole copy with the higher number; NULL: damaged. */
static const sector *newest(const sector *copy[2], uint32_t count)
{
    if (!is_sound(copy[0], count, 0) || !is_sound(copy[1], count, 1))
        return NULL;
    uint64_t number[2] = {whole(copy[0], count), whole(copy[1], count)};
    unsigned best = number[1] > number[0];
    if (number[best] == 0)
        return NULL;
    /* The other one: the record before, or parts of the one after. */
    for (uint32_t i = 0; i < count; i++) {
        uint64_t other = copy[best ^ 1][i].number;
        if (other + 1 != number[best] && other != number[best] + 1)
            return NULL;
    }
    return copy[best];
}

static int decode(vdf_intentlog *log, const sector *from, vdf_intent_record *record)
{
    description head;

    memcpy(&head, from[0].body, sizeof head);
    if (head.version != LOG_VERSION || head.slots != log->slots || head.identity != log->identity)
        return -EBADMSG;
    log->number = from[0].number;
    record->flags = (uint32_t)head.flags;
    record->stamp_ns = head.stamp_ns;
    memcpy(record->span, head.span, sizeof record->span);
    record->region = malloc(log->slots * sizeof *record->region);
    if (record->region == NULL)
        return -ENOMEM;
    for (uint32_t i = 0; i < log->slots; i++)
        record->region[i] = from[1 + i / PER_SECTOR].body[i % PER_SECTOR];
    return 0;
}

/* How many slots the file has room for, by the description in either copy. */
static uint32_t find_slots(int fd)
{
    sector first;
    description head;

    if (vdf_file_read(fd, 0, sizeof first, (uint8_t *)&first) != sizeof first)
        return 0;
    memcpy(&head, first.body, sizeof head);
    return head.slots;
}

static int load(vdf_intentlog *log, vdf_intent_record *record)
{
    struct stat st;
    uint32_t slots = find_slots(log->fd);

    if (slots == 0 || slots > VDF_INTENT_MAX || fstat(log->fd, &st) != 0 ||
        (uint64_t)st.st_size != 2 * copy_bytes(slots))
        return -EBADMSG;
    int error = set_slots(log, slots);
    uint64_t bytes = copy_bytes(slots);
    uint8_t *both = malloc(2 * bytes);
    if (error == 0 && both == NULL)
        error = -ENOMEM;
    if (error == 0 && vdf_file_read(log->fd, 0, 2 * bytes, both) != (int64_t)(2 * bytes))
        error = -EBADMSG;
    if (error == 0) {
        const sector *copy[2] = {(const void *)both, (const void *)(both + bytes)};
        const sector *best = newest(copy, sectors_of(slots));
        error = best == NULL ? -EBADMSG : decode(log, best, record);
    }
    free(both);
    return error;
}

int vdf_intentlog_open(int dir, const int *others, unsigned count, vdf_intentlog *log,
                       vdf_intent_record *record)
{
    memset(log, 0, sizeof *log);
    memset(record, 0, sizeof *record);
    log->dir = dir;
    log->fd = openat(dir, "intent", O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    int error = log->fd < 0 ? -errno : identify(log, others, count);
    if (error == 0)
        error = load(log, record);
    if (error != 0)
        vdf_intentlog_close(log);
    return error;
}

void vdf_intentlog_close(vdf_intentlog *log)
{
    if (log->fd >= 0)
        close(log->fd);
    free(log->buffer);
    free(log->none);
    log->fd = -1;
    log->buffer = NULL;
    log->none = NULL;
}
