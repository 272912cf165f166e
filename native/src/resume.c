/*
 * resume.c - a connection that a predecessor has served: it is taken over with what
 * the kernel believes of it, and left to a successor the same way.
 */
#include "internal.h"

#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* Newer than the headers of some supported systems. */
#define VDF_FUSE_NOTIFY_RESEND 7

int64_t vdf_core_init_request(vdf_core *core, uint8_t *data, uint64_t room)
{
    size_t length = atomic_load(&core->init_length);

    if (length > room)
        return -ENOSPC;
    memcpy(data, core->init, length);
    return (int64_t)length;
}

int vdf_core_can_resend(vdf_core *core)
{
    return atomic_load(&core->init_length) != 0 && (core->init_flags2 & VDF_FUSE_HAS_RESEND) != 0;
}

int vdf_core_resume(vdf_core *core, const uint8_t *init, uint64_t length)
{
    struct fuse_in_header in;

    if (core->fuse_fd < 0 || atomic_load(&core->started) || length > sizeof core->init ||
        length < sizeof in + 16)
        return -EINVAL;
    memcpy(&in, init, sizeof in);
    if (in.opcode != FUSE_INIT || in.len != length)
        return -EINVAL;
    vdf_names_note_init(core, init, length);
    core->resumed = true;
    return 0;
}

int vdf_resume_begin(vdf_core *core)
{
    const struct fuse_out_header resend = {.len = sizeof resend, .error = VDF_FUSE_NOTIFY_RESEND};

    /* First in the socket: libfuse answers nothing before it is initialized. */
    atomic_store(&core->init_answer, true);
    if (send(core->names_core, core->init, core->init_length, MSG_NOSIGNAL) < 0)
        return -errno;
    /* EINVAL: the kernel is older than 6.9, and what was under way has failed there. */
    if (write(core->fuse_fd, &resend, sizeof resend) < 0 && errno != EINVAL)
        return errno == ENODEV ? 0 : -errno; /* unmounted: the workers will see it */
    return 0;
}

/* ---- requests for nodes without an image ------------------------------------- */

/* Takes the first stranded request with this node, or this number; 0: either is not asked. */
static vdf_stranded *take(vdf_core *core, uint64_t nodeid, uint64_t unique)
{
    vdf_stranded *found = NULL;

    pthread_mutex_lock(&core->park_lock);
    for (vdf_stranded **at = &core->stranded; *at != NULL; at = &(*at)->next) {
        const struct fuse_in_header *in = (const void *)(*at)->data;
        if ((nodeid == 0 || in->nodeid == nodeid) && (unique == 0 || in->unique == unique)) {
            found = *at;
            *at = found->next;
            break;
        }
    }
    pthread_mutex_unlock(&core->park_lock);
    if (found != NULL)
        atomic_fetch_sub(&core->parked_count, 1);
    return found;
}

int vdf_strand(vdf_core *core, const uint8_t *request, size_t length)
{
    const struct fuse_in_header *in = (const void *)request;
    vdf_stranded *stranded = malloc(sizeof *stranded + length);

    if (stranded == NULL)
        return -ENOMEM;
    stranded->length = length;
    memcpy(stranded->data, request, length);
    uint64_t nodeid = in->nodeid, unique = in->unique;
    pthread_mutex_lock(&core->park_lock);
    stranded->next = core->stranded;
    core->stranded = stranded;
    pthread_mutex_unlock(&core->park_lock);
    atomic_fetch_add(&core->parked_count, 1);
    int error = vdf_event_offer(core, VDF_EVENT_NODE, 0, 0, nodeid, 0);
    if (error != 0 && (stranded = take(core, nodeid, unique)) != NULL) {
        free(stranded);
        return error;
    }
    return 0; /* else it was taken up meanwhile */
}

static void refuse(vdf_core *core, vdf_stranded *stranded, int error)
{
    const struct fuse_in_header *in = (const void *)stranded->data;

    vdf_reply_error(core, in->unique, error);
    free(stranded);
}

bool vdf_strand_interrupt(vdf_core *core, uint64_t unique)
{
    vdf_stranded *found = take(core, 0, unique);

    if (found == NULL)
        return false;
    refuse(core, found, -EINTR);
    return true;
}

void vdf_strand_clear(vdf_core *core)
{
    vdf_stranded *found;

    while ((found = take(core, 0, 0)) != NULL)
        refuse(core, found, -EIO);
}

int vdf_core_retry(vdf_core *core, uint64_t nodeid, int error)
{
    vdf_stranded *waiting = NULL, *found;
    uint8_t *buffer = NULL;

    /* Each once: one that finds no image again (closed meanwhile) waits for another event. */
    while ((found = take(core, nodeid, 0)) != NULL) {
        found->next = waiting;
        waiting = found;
    }
    if (error == 0 && posix_memalign((void **)&buffer, VDF_PAGE_SIZE, VDF_BUFFER_SIZE) != 0)
        error = ENOMEM;
    while ((found = waiting) != NULL) {
        waiting = found->next;
        if (error != 0) {
            refuse(core, found, -error);
            continue;
        }
        size_t length = found->length;
        memcpy(buffer, found->data, length);
        free(found);
        vdf_request_handle(core, buffer, length);
    }
    free(buffer);
    return 0;
}

/* ---- leaving it to a successor ------------------------------------------------- */

int64_t vdf_core_pause(vdf_core *core, uint64_t limit_ms)
{
    vdf_core_join_workers(core);
    for (uint64_t waited = 0; waited < limit_ms && atomic_load(&core->names_out) > 0; waited++)
        vdf_sleep_ns(1000 * 1000);
    return atomic_load(&core->names_out);
}
