/*
 * names.c - everything that is not data goes to libfuse over a socketpair, and
 * its replies come back here. The INIT reply and the open flags are rewritten on
 * the way.
 */
#include "internal.h"

#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

/* Newer than the headers of some supported systems. */
#define VDF_FUSE_DIRECT_IO_ALLOW_MMAP (1u << (36 - 32))
#define VDF_UNIQUE_RESENT (UINT64_C(1) << 63)
#define VDF_UNIQUE_INTERRUPT UINT64_C(1)
#define VDF_FOPEN_PARALLEL_DIRECT_WRITES (1u << 6)

/* An ordinary user's socket buffer does not take more than this in one message. */
#define READDIR_MAX (128u * 1024)
#define FORGETS_MAX 4096 /* in one message: 64 KiB */

static vdf_pending **pending_bucket(vdf_core *core, uint64_t unique)
{
    /* The kernel counts requests in steps of 2. */
    return &core->pending[(unique >> 1) % VDF_PENDING_BUCKETS];
}

static int remember(vdf_core *core, const struct fuse_in_header *in)
{
    vdf_pending *pending = calloc(1, sizeof *pending);

    if (pending == NULL)
        return -ENOMEM;
    pending->unique = in->unique;
    pending->nodeid = in->nodeid;
    pending->opcode = in->opcode;
    pthread_mutex_lock(&core->pending_lock);
    vdf_pending **at = pending_bucket(core, in->unique);
    pending->next = *at;
    *at = pending;
    pthread_mutex_unlock(&core->pending_lock);
    return 0;
}

static vdf_pending *recall(vdf_core *core, uint64_t unique)
{
    vdf_pending *found = NULL;

    pthread_mutex_lock(&core->pending_lock);
    for (vdf_pending **at = pending_bucket(core, unique); *at != NULL; at = &(*at)->next) {
        if ((*at)->unique == unique) {
            found = *at;
            *at = found->next;
            break;
        }
    }
    pthread_mutex_unlock(&core->pending_lock);
    return found;
}

static bool is_answered(const struct fuse_in_header *in)
{
    return in->opcode != FUSE_FORGET && in->opcode != FUSE_BATCH_FORGET &&
           in->opcode != FUSE_INTERRUPT;
}

/* Answers a request that cannot be passed on. */
static void refuse(vdf_core *core, const uint8_t *request, int error)
{
    const struct fuse_in_header *in = (const void *)request;

    if (!is_answered(in))
        return;
    free(recall(core, in->unique));
    atomic_fetch_sub(&core->names_out, 1);
    vdf_reply_error(core, in->unique, error);
}

void vdf_names_note_init(vdf_core *core, const uint8_t *request, size_t length)
{
    const struct fuse_init_in *init = (const void *)(request + sizeof(struct fuse_in_header));

    if (length < sizeof(struct fuse_in_header) + 16)
        return;
    core->init_flags = init->flags;
    core->init_flags2 = 0;
    if (length >= sizeof(struct fuse_in_header) + sizeof *init && (init->flags & FUSE_INIT_EXT))
        core->init_flags2 = init->flags2;
    if (length <= sizeof core->init) {
        memcpy(core->init, request, length);
        atomic_store(&core->init_length, length);
    }
}

/*
 * The kernel's number of a request reaches Python in the place of the caller's process id,
 * which nobody there asks for: 30 bits of the number, and whether it was sent again.
 */
static void put_number(uint8_t *request)
{
    struct fuse_in_header *in = (void *)request;

    in->pid = (uint32_t)((in->unique >> 1) & ((1u << 30) - 1));
    if (in->unique & VDF_UNIQUE_RESENT)
        in->pid |= 1u << 30;
}

static void limit_readdir(uint8_t *request, size_t length)
{
    struct fuse_read_in *read = (void *)(request + sizeof(struct fuse_in_header));

    if (length >= sizeof(struct fuse_in_header) + sizeof *read && read->size > READDIR_MAX)
        read->size = READDIR_MAX;
}

/* Never waits: what the socket does not take at once goes to a thread that may. */
static void pass_on(vdf_core *core, const uint8_t *request, size_t length)
{
    if (is_answered((const void *)request))
        atomic_fetch_add(&core->names_out, 1);
    if (vdf_queue_idle(&core->to_names) &&
        send(core->names_core, request, length, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
        return;
    if (vdf_queue_put(&core->to_names, request, length) != 0)
        refuse(core, request, -ENOMEM);
}

/* One message may forget 65,000 nodes: more than a socket takes at once. */
static void pass_forgets(vdf_core *core, uint8_t *request, size_t length)
{
    const size_t head = sizeof(struct fuse_in_header) + sizeof(struct fuse_batch_forget_in);
    struct fuse_in_header in;
    struct fuse_batch_forget_in batch;

    if (length < head)
        return;
    memcpy(&in, request, sizeof in);
    memcpy(&batch, request + sizeof in, sizeof batch);
    uint64_t left = vdf_min(batch.count, (length - head) / sizeof(struct fuse_forget_one));
    uint8_t *at = request;
    while (left > 0) {
        uint64_t count = vdf_min(left, FORGETS_MAX);
        size_t size = count * sizeof(struct fuse_forget_one);
        in.len = (uint32_t)(head + size);
        batch.count = (uint32_t)count;
        memcpy(at, &in, sizeof in);
        memcpy(at + sizeof in, &batch, sizeof batch);
        pass_on(core, at, head + size);
        /* The next head goes over the nodes that are sent. */
        at += size;
        left -= count;
    }
}

void vdf_names_forward(vdf_core *core, uint8_t *request, size_t length)
{
    const struct fuse_in_header *in = (const void *)request;
    int error = 0;

    atomic_fetch_add(&core->names, 1);
    switch (in->opcode) {
    case FUSE_INIT:
        vdf_names_note_init(core, request, length);
        error = remember(core, in);
        break;
    case FUSE_OPEN:
    case FUSE_CREATE:
        error = remember(core, in);
        break;
    case FUSE_READDIR:
    case FUSE_READDIRPLUS:
        limit_readdir(request, length);
        break;
    case FUSE_BATCH_FORGET:
        pass_forgets(core, request, length);
        return;
    default:
        break;
    }
    if (error != 0) { /* its answer could not be made what it has to be */
        vdf_reply_error(core, in->unique, error);
        return;
    }
    put_number(request);
    pass_on(core, request, length);
}

void *vdf_names_send_loop(void *argument)
{
    vdf_core *core = argument;
    vdf_message *message;

    while ((message = vdf_queue_take(&core->to_names)) != NULL) {
        ssize_t sent;
        do {
            sent = send(core->names_core, message->data, message->length, MSG_NOSIGNAL);
        } while (sent < 0 && errno == EINTR);
        /* Too large for the socket, or nobody is there: whoever asked must not wait for ever. */
        if (sent < 0)
            refuse(core, message->data, -EIO);
        free(message);
        vdf_queue_done(&core->to_names);
    }
    return NULL;
}

static void rewrite_init(const vdf_core *core, struct fuse_init_out *out)
{
    const uint32_t never =
        FUSE_WRITEBACK_CACHE | FUSE_ATOMIC_O_TRUNC | FUSE_POSIX_LOCKS | FUSE_FLOCK_LOCKS;
    const uint32_t always =
        FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_ASYNC_DIO | FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES;

    out->flags = (out->flags & ~never) | (always & core->init_flags);
    /* With the default of 12, sixteen reads that wait for the vault stop every disk. */
    out->max_background = 65535;
    out->congestion_threshold = 65535;
    out->max_write = VDF_REQUEST_MAX;
    out->max_pages = VDF_REQUEST_MAX / VDF_PAGE_SIZE;
    if ((core->flags & VDF_CORE_ALLOW_MMAP) &&
        (core->init_flags2 & VDF_FUSE_DIRECT_IO_ALLOW_MMAP)) {
        out->flags |= FUSE_INIT_EXT;
        out->flags2 |= VDF_FUSE_DIRECT_IO_ALLOW_MMAP;
    }
    if (core->init_flags2 & VDF_FUSE_HAS_RESEND) {
        out->flags |= FUSE_INIT_EXT;
        out->flags2 |= VDF_FUSE_HAS_RESEND;
    }
}

static void rewrite_open(vdf_core *core, uint64_t nodeid, struct fuse_open_out *out)
{
    vdf_image *image = vdf_nodes_find(core, nodeid);

    if (image == NULL)
        return;
    out->open_flags &= ~(uint32_t)(FOPEN_DIRECT_IO | FOPEN_KEEP_CACHE | FOPEN_NONSEEKABLE);
    if (image->flags & VDF_IMAGE_DIRECT)
        out->open_flags |= FOPEN_DIRECT_IO | VDF_FOPEN_PARALLEL_DIRECT_WRITES;
    else if (image->flags & VDF_IMAGE_KEEP_CACHE)
        out->open_flags |= FOPEN_KEEP_CACHE;
    vdf_image_unref(image);
}

static void rewrite(vdf_core *core, uint8_t *reply, size_t length)
{
    const struct fuse_out_header *out = (const void *)reply;
    vdf_pending *pending = recall(core, out->unique);
    uint8_t *body = reply + sizeof *out;
    size_t size = length - sizeof *out;

    if (pending == NULL)
        return;
    if (out->error == 0) {
        if (pending->opcode == FUSE_INIT && size >= sizeof(struct fuse_init_out)) {
            rewrite_init(core, (void *)body);
        } else if (pending->opcode == FUSE_OPEN && size >= sizeof(struct fuse_open_out)) {
            rewrite_open(core, pending->nodeid, (void *)body);
        } else if (pending->opcode == FUSE_CREATE &&
                   size >= sizeof(struct fuse_entry_out) + sizeof(struct fuse_open_out)) {
            const struct fuse_entry_out *entry = (const void *)body;
            rewrite_open(core, entry->nodeid, (void *)(body + sizeof *entry));
        }
    }
    free(pending);
}

void *vdf_names_reply_loop(void *argument)
{
    vdf_core *core = argument;
    uint8_t *buffer = core->buffer[core->workers];

    for (;;) {
        ssize_t got = recv(core->names_core, buffer, VDF_BUFFER_SIZE, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            break;
        const struct fuse_out_header *out = (const void *)buffer;
        size_t length = (size_t)got;
        if (length < sizeof *out)
            continue;
        if (out->unique == 0) {
            /* A notification may wait for requests that we answer: not in this thread. */
            while (vdf_queue_put(&core->to_notify, buffer, length) != 0 &&
                   !atomic_load(&core->stopping))
                vdf_sleep_ns(10 * 1000 * 1000);
            continue;
        }
        if (atomic_exchange(&core->init_answer, false))
            continue; /* libfuse answers in order: this is the INIT that we sent */
        rewrite(core, buffer, length);
        /* ENOENT: the request was interrupted meanwhile; ENODEV: unmounted. */
        if (write(core->fuse_fd, buffer, length) < 0 && errno == EINVAL)
            vdf_reply_error(core, out->unique, -EIO);
        if (!(out->unique & VDF_UNIQUE_INTERRUPT))
            atomic_fetch_sub(&core->names_out, 1);
    }
    return NULL;
}

void *vdf_names_notify_loop(void *argument)
{
    vdf_core *core = argument;
    vdf_message *message;

    while ((message = vdf_queue_take(&core->to_notify)) != NULL) {
        /* ENOENT: the kernel does not hold the node any more, which is as good. */
        if (write(core->fuse_fd, message->data, message->length) < 0)
            errno = 0;
        free(message);
        vdf_queue_done(&core->to_notify);
    }
    return NULL;
}

void vdf_names_clear(vdf_core *core)
{
    for (size_t i = 0; i < VDF_PENDING_BUCKETS; i++) {
        while (core->pending[i] != NULL) {
            vdf_pending *pending = core->pending[i];
            core->pending[i] = pending->next;
            free(pending);
        }
    }
}
