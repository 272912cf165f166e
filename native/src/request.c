/*
 * request.c - the requests that carry data: READ, WRITE, FSYNC, FLUSH, FALLOCATE,
 * LSEEK. None of them is ever answered with ENOSYS, which would switch it off for
 * the whole connection; COPY_FILE_RANGE is, on purpose: the kernel then copies by
 * reading and writing.
 */
#include "internal.h"

#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef FUSE_FSYNC_FDATASYNC
#define FUSE_FSYNC_FDATASYNC (1u << 0)
#endif

static void reply(vdf_core *core, uint64_t unique, int error, const void *body, size_t size)
{
    struct fuse_out_header out = {
        .len = (uint32_t)(sizeof out + size), .error = error, .unique = unique};
    struct iovec part[2] = {{.iov_base = &out, .iov_len = sizeof out},
                            {.iov_base = (void *)(uintptr_t)body, .iov_len = size}};

    if (core->fuse_fd < 0)
        return;
    /* ENOENT: interrupted; ENODEV: unmounted. Nobody is left to hear of either. */
    while (writev(core->fuse_fd, part, size ? 2 : 1) < 0 && errno == EINTR) {
    }
}

void vdf_reply_error(vdf_core *core, uint64_t unique, int error)
{
    reply(core, unique, error, NULL, 0);
}

static void park(vdf_core *core, const vdf_parked *request)
{
    int error = vdf_park(core, request);

    if (error != 0)
        vdf_reply_error(core, request->unique, error);
}

static void strand(vdf_core *core, const uint8_t *request, size_t length)
{
    const struct fuse_in_header *in = (const void *)request;
    int error = vdf_strand(core, request, length);

    if (error != 0)
        vdf_reply_error(core, in->unique, error);
}

/* A quota is room that runs out, too. */
static bool lacks_room(int error)
{
    return error == -ENOSPC || error == -EDQUOT;
}

/*
 * Whether a request that found no space has been parked, or told why not, until something has
 * been asked to give way: once. Of a WRITE some may be written; all of it is written again then.
 */
static bool waits_for_room(vdf_core *core, vdf_parked *request, int error)
{
    if (!lacks_room(error) || !(core->flags & VDF_CORE_ASK_ROOM) || request->spaceless)
        return false;
    request->spaceless = request->begun = true;
    request->wants = 0;
    park(core, request);
    return true;
}

/* The data goes to a page boundary of the buffer, the header in front of it: one write. */
static void reply_read(vdf_core *core, vdf_image *image, uint64_t unique, uint64_t offset,
                       uint64_t length, uint8_t *buffer)
{
    uint8_t *data = buffer + VDF_PAGE_SIZE;
    int64_t got = vdf_image_read(image, offset, length, data);

    if (got == -EAGAIN) {
        park(core, &(vdf_parked){.image = image,
                                 .unique = unique,
                                 .opcode = FUSE_READ,
                                 .offset = offset,
                                 .length = length,
                                 .wants = 1,
                                 .want = {{offset, length}}});
        return;
    }
    if (got < 0) {
        vdf_reply_error(core, unique, (int)got);
        return;
    }
    atomic_fetch_add(&core->read_bytes, (uint64_t)got);
    struct fuse_out_header out = {
        .len = (uint32_t)(sizeof out + (size_t)got), .error = 0, .unique = unique};
    memcpy(data - sizeof out, &out, sizeof out);
    while (write(core->fuse_fd, data - sizeof out, out.len) < 0 && errno == EINTR) {
    }
}

static void handle_read(vdf_core *core, vdf_image *image, uint8_t *buffer)
{
    struct fuse_in_header in;
    struct fuse_read_in read;

    memcpy(&in, buffer, sizeof in);
    memcpy(&read, buffer + sizeof in, sizeof read);
    atomic_fetch_add(&core->reads, 1);
    reply_read(core, image, in.unique, read.offset, vdf_min(read.size, VDF_REQUEST_MAX), buffer);
}

static void reply_written(vdf_core *core, uint64_t unique, uint64_t length)
{
    struct fuse_write_out out = {.size = (uint32_t)length};

    atomic_fetch_add(&core->write_bytes, length);
    reply(core, unique, 0, &out, sizeof out);
}

/*
 * A WRITE that needs pages that are not here, kept whole: nothing of it is written before all
 * of it can be. Where VDF_PARK_BYTES are kept already, its whole pages are written now, and
 * what waits is the rest, less than two pages; that is not interrupted any more.
 */
static int split(vdf_core *core, vdf_parked *request)
{
    const vdf_part whole = request->part[0];
    uint64_t end = whole.offset + whole.length;
    uint64_t first = (whole.offset + VDF_PAGE_SIZE - 1) / VDF_PAGE_SIZE * VDF_PAGE_SIZE;
    uint64_t last = end / VDF_PAGE_SIZE * VDF_PAGE_SIZE;

    if (first >= last || atomic_load(&core->parked_bytes) + whole.length <= VDF_PARK_BYTES)
        return 0;
    int error =
        vdf_image_write(request->image, first, last - first, whole.data + (first - whole.offset));
    if (error != 0)
        return error;
    request->begun = true;
    request->parts = 0;
    request->payload = (first - whole.offset) + (end - last);
    if (first > whole.offset)
        request->part[request->parts++] =
            (vdf_part){whole.offset, first - whole.offset, whole.data};
    if (end > last)
        request->part[request->parts++] =
            (vdf_part){last, end - last, whole.data + (last - whole.offset)};
    return 0;
}

/* Pages that the parts need; 0: none. */
static unsigned find_wants(vdf_parked *request)
{
    request->wants = 0;
    for (unsigned i = 0; i < request->parts; i++) {
        const vdf_part *part = &request->part[i];
        vdf_want want[2];
        unsigned count = vdf_lazy_edges(request->image, part->offset, part->length, want);
        for (unsigned j = 0; j < count; j++)
            request->want[request->wants++] = want[j];
    }
    return request->wants;
}

/* Writes the parts of a request, or parks it. Nothing is written while any of them waits. */
static void write_parts(vdf_core *core, vdf_parked *request)
{
    for (;;) {
        bool waits = find_wants(request) != 0;
        int error = waits && !request->begun ? split(core, request) : 0;
        if (waits && error == 0) {
            park(core, request);
            return;
        }
        for (unsigned i = 0; i < request->parts && error == 0; i++) {
            const vdf_part *part = &request->part[i];
            error = vdf_image_write(request->image, part->offset, part->length, part->data);
        }
        if (error == 0)
            reply_written(core, request->unique, request->length);
        else if (error != -EAGAIN && !waits_for_room(core, request, error))
            vdf_reply_error(core, request->unique, error);
        if (error != -EAGAIN)
            return;
    }
}

static void handle_write(vdf_core *core, vdf_image *image, const uint8_t *buffer, size_t length)
{
    const struct fuse_in_header *in = (const void *)buffer;
    const struct fuse_write_in *wanted = (const void *)(buffer + sizeof *in);
    const size_t head = sizeof *in + sizeof *wanted;

    atomic_fetch_add(&core->writes, 1);
    if (wanted->size > length - head) {
        vdf_reply_error(core, in->unique, -EINVAL);
        return;
    }
    int error = vdf_image_write(image, wanted->offset, wanted->size, buffer + head);
    if (error == 0)
        reply_written(core, in->unique, wanted->size);
    else if (error != -EAGAIN && !lacks_room(error))
        vdf_reply_error(core, in->unique, error);
    else /* tried again with what it takes to wait */
        write_parts(core, &(vdf_parked){.image = image,
                                        .unique = in->unique,
                                        .opcode = FUSE_WRITE,
                                        .offset = wanted->offset,
                                        .length = wanted->size,
                                        .parts = 1,
                                        .part = {{wanted->offset, wanted->size, buffer + head}},
                                        .payload = wanted->size});
}

static void handle_fsync(vdf_core *core, vdf_image *image, const uint8_t *buffer)
{
    const struct fuse_in_header *in = (const void *)buffer;
    const struct fuse_fsync_in *fsync = (const void *)(buffer + sizeof *in);

    atomic_fetch_add(&core->syncs, 1);
    int datasync = (fsync->fsync_flags & FUSE_FSYNC_FDATASYNC) != 0;
    vdf_reply_error(core, in->unique, vdf_image_sync(image, datasync));
}

static void reply_allocate(vdf_core *core, vdf_parked *request)
{
    int error;

    do {
        error = vdf_image_allocate(request->image, request->how, request->offset, request->length);
        if (error == -EAGAIN)
            request->wants =
                vdf_lazy_edges(request->image, request->offset, request->length, request->want);
    } while (error == -EAGAIN && request->wants == 0); /* filled meanwhile */
    if (error == -EAGAIN)
        park(core, request);
    else if (!waits_for_room(core, request, error))
        /* Invariant: no ENOSYS from here, whatever the file system below says. */
        vdf_reply_error(core, request->unique, error == -ENOSYS ? -EOPNOTSUPP : error);
}

static void handle_fallocate(vdf_core *core, vdf_image *image, const uint8_t *buffer)
{
    const struct fuse_in_header *in = (const void *)buffer;
    const struct fuse_fallocate_in *wanted = (const void *)(buffer + sizeof *in);

    atomic_fetch_add(&core->discards, 1);
    reply_allocate(core, &(vdf_parked){.image = image,
                                       .unique = in->unique,
                                       .opcode = FUSE_FALLOCATE,
                                       .how = (int)wanted->mode,
                                       .offset = wanted->offset,
                                       .length = wanted->length});
}

static void reply_seek(vdf_core *core, vdf_image *image, uint64_t unique, uint64_t offset,
                       int whence)
{
    int64_t at = vdf_image_seek(image, offset, whence);

    if (at == -EAGAIN) {
        park(core, &(vdf_parked){.image = image,
                                 .unique = unique,
                                 .opcode = FUSE_LSEEK,
                                 .how = whence,
                                 .offset = offset,
                                 .length = 1,
                                 .wants = 1,
                                 .want = {{offset, 1}}});
        return;
    }
    if (at < 0) {
        vdf_reply_error(core, unique, at == -ENOSYS ? -EINVAL : (int)at);
        return;
    }
    struct fuse_lseek_out out = {.offset = (uint64_t)at};
    reply(core, unique, 0, &out, sizeof out);
}

static void handle_lseek(vdf_core *core, vdf_image *image, const uint8_t *buffer)
{
    const struct fuse_in_header *in = (const void *)buffer;
    const struct fuse_lseek_in *wanted = (const void *)(buffer + sizeof *in);

    atomic_fetch_add(&core->seeks, 1);
    reply_seek(core, image, in->unique, wanted->offset, (int)wanted->whence);
}

/* The least that a request of this kind must hold; 0: not ours. */
static size_t body_size(uint32_t opcode)
{
    switch (opcode) {
    case FUSE_READ:
        return sizeof(struct fuse_read_in);
    case FUSE_WRITE:
        return sizeof(struct fuse_write_in);
    case FUSE_FSYNC:
        return sizeof(struct fuse_fsync_in);
    case FUSE_FLUSH:
        return sizeof(struct fuse_flush_in);
    case FUSE_FALLOCATE:
        return sizeof(struct fuse_fallocate_in);
    case FUSE_LSEEK:
        return sizeof(struct fuse_lseek_in);
    default:
        return 0;
    }
}

static void handle_data(vdf_core *core, vdf_image *image, uint8_t *buffer, size_t length)
{
    const struct fuse_in_header *in = (const void *)buffer;

    switch (in->opcode) {
    case FUSE_READ:
        handle_read(core, image, buffer);
        break;
    case FUSE_WRITE:
        handle_write(core, image, buffer, length);
        break;
    case FUSE_FSYNC:
        handle_fsync(core, image, buffer);
        break;
    case FUSE_FLUSH:
        vdf_reply_error(core, in->unique, 0);
        break;
    case FUSE_FALLOCATE:
        handle_fallocate(core, image, buffer);
        break;
    default:
        handle_lseek(core, image, buffer);
        break;
    }
}

static void handle_interrupt(vdf_core *core, uint8_t *buffer, size_t length)
{
    const struct fuse_interrupt_in *wanted = (const void *)(buffer + sizeof(struct fuse_in_header));

    if (length < sizeof(struct fuse_in_header) + sizeof *wanted)
        return;
    if (!vdf_park_interrupt(core, wanted->unique) && !vdf_strand_interrupt(core, wanted->unique))
        vdf_names_forward(core, buffer, length);
}

void vdf_request_handle(vdf_core *core, uint8_t *buffer, size_t length)
{
    const struct fuse_in_header *in = (const void *)buffer;

    if (length < sizeof *in)
        return;
    size_t body = body_size(in->opcode);
    if (body != 0) {
        uint64_t unique = in->unique;
        vdf_image *image = vdf_nodes_find(core, in->nodeid);
        if (length < sizeof *in + body)
            vdf_reply_error(core, unique, -EINVAL);
        else if (image == NULL && core->resumed && in->opcode != FUSE_FLUSH)
            strand(core, buffer, length);
        else if (image == NULL)
            vdf_reply_error(core, unique, in->opcode == FUSE_FLUSH ? 0 : -EBADF);
        else
            handle_data(core, image, buffer, length);
        vdf_image_unref(image);
    } else if (in->opcode == FUSE_INTERRUPT) {
        handle_interrupt(core, buffer, length);
    } else if (in->opcode == FUSE_COPY_FILE_RANGE) {
        vdf_reply_error(core, in->unique, -ENOSYS);
    } else {
        vdf_names_forward(core, buffer, length);
    }
}

void vdf_request_resume(vdf_core *core, vdf_parked *parked, uint8_t *buffer)
{
    switch (parked->opcode) {
    case FUSE_LSEEK:
        reply_seek(core, parked->image, parked->unique, parked->offset, parked->how);
        break;
    case FUSE_WRITE:
        write_parts(core, parked);
        break;
    case FUSE_FALLOCATE:
        reply_allocate(core, parked);
        break;
    default:
        reply_read(core, parked->image, parked->unique, parked->offset, parked->length, buffer);
    }
}
