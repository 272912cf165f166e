/*
 * park.c - requests that wait for bytes of a lazy image, or for space. They hold no thread; a
 * WRITE is kept with its payload (request.c bounds that of those that wait for bytes).
 */
#include "internal.h"

#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>

/* A copy with the payload behind it. */
static vdf_parked *copy_of(const vdf_parked *request)
{
    vdf_parked *parked = malloc(sizeof *parked + request->payload);

    if (parked == NULL)
        return NULL;
    *parked = *request;
    uint8_t *at = (uint8_t *)(parked + 1);
    for (unsigned i = 0; i < parked->parts; i++) {
        memcpy(at, request->part[i].data, request->part[i].length);
        parked->part[i].data = at;
        at += request->part[i].length;
    }
    return parked;
}

/* Taken from the list: it waits no more. Before its answer, so that who hears that sees it. */
static void count_out(vdf_core *core, const vdf_parked *parked)
{
    atomic_fetch_sub(&core->parked_count, 1);
    atomic_fetch_sub(&core->parked_bytes, parked->payload);
}

static void drop(vdf_parked *parked)
{
    vdf_image_unref(parked->image);
    free(parked);
}

/* Nobody heard that it waits: it is no longer parked. False: it was answered all the same. */
static bool leave(vdf_core *core, vdf_parked *parked)
{
    pthread_mutex_lock(&core->park_lock);
    vdf_parked **at = &core->parked;
    while (*at != NULL && *at != parked)
        at = &(*at)->next;
    bool found = *at != NULL;
    if (found)
        *at = parked->next;
    pthread_mutex_unlock(&core->park_lock);
    if (found) {
        count_out(core, parked);
        drop(parked);
    }
    return found;
}

static int tell(vdf_core *core, const vdf_parked *request)
{
    uint32_t kind = request->opcode == FUSE_LSEEK ? VDF_EVENT_SEEK : VDF_EVENT_WANT;
    uint64_t cookie = request->image->cookie;
    int error = 0;

    if (request->wants == 0)
        return vdf_event_offer(core, VDF_EVENT_NO_ROOM, ENOSPC, cookie, request->offset,
                               request->length);
    for (unsigned i = 0; i < request->wants && error == 0; i++)
        error = vdf_event_offer(core, kind, 0, cookie, request->want[i].offset,
                                request->want[i].length);
    return error;
}

int vdf_park(vdf_core *core, const vdf_parked *request)
{
    vdf_parked *parked = copy_of(request);

    if (parked == NULL)
        return -ENOMEM;
    vdf_image_ref(parked->image);
    atomic_fetch_add(&core->parked_bytes, parked->payload);
    atomic_fetch_add(&core->parked_count, 1);
    pthread_mutex_lock(&core->park_lock);
    parked->next = core->parked;
    core->parked = parked;
    pthread_mutex_unlock(&core->park_lock);
    /* Told after it is parked: the answer cannot come too early. */
    int error = tell(core, request);
    return error != 0 && leave(core, parked) ? error : 0;
}

bool vdf_park_interrupt(vdf_core *core, uint64_t unique)
{
    vdf_parked *found = NULL;
    bool begun = false;

    pthread_mutex_lock(&core->park_lock);
    for (vdf_parked **at = &core->parked; *at != NULL; at = &(*at)->next) {
        if ((*at)->unique == unique) {
            begun = (*at)->begun;
            if (begun) /* EINTR would say that nothing was done: it goes on */
                break;
            found = *at;
            *at = found->next;
            break;
        }
    }
    pthread_mutex_unlock(&core->park_lock);
    if (found == NULL)
        return begun;
    count_out(core, found);
    vdf_reply_error(core, unique, -EINTR);
    drop(found);
    return true;
}

/* Takes the wants away that the range touches; true if it was the last one. */
static bool is_answered(vdf_parked *parked, uint64_t offset, uint64_t length)
{
    unsigned left = 0, before = parked->wants;

    for (unsigned i = 0; i < before; i++) {
        const vdf_want want = parked->want[i];
        if (want.offset >= vdf_add(offset, length) || offset >= vdf_add(want.offset, want.length))
            parked->want[left++] = want;
    }
    parked->wants = left;
    return left == 0;
}

static bool touches(const vdf_parked *parked, uint64_t offset, uint64_t length)
{
    vdf_parked copy = *parked;

    is_answered(&copy, offset, length);
    return copy.wants < parked->wants;
}

/* Those that have no want left; after an error all that the range touches. */
static vdf_parked *take_touching(vdf_image *image, uint64_t offset, uint64_t length, int error)
{
    vdf_core *core = image->core;
    vdf_parked *taken = NULL;

    pthread_mutex_lock(&core->park_lock);
    for (vdf_parked **at = &core->parked; *at != NULL;) {
        vdf_parked *parked = *at;
        if (parked->image == image && touches(parked, offset, length) &&
            (is_answered(parked, offset, length) || error != 0)) {
            *at = parked->next;
            parked->next = taken;
            taken = parked;
        } else {
            at = &parked->next;
        }
    }
    pthread_mutex_unlock(&core->park_lock);
    return taken;
}

/* Runs taken requests again, or gives all of them an errno. */
static void run(vdf_core *core, vdf_parked *taken, int error)
{
    uint8_t *buffer = NULL;

    if (taken != NULL && error == 0) {
        buffer = malloc(VDF_BUFFER_SIZE);
        if (buffer == NULL)
            error = ENOMEM;
    }
    while (taken != NULL) {
        vdf_parked *parked = taken;
        taken = parked->next;
        count_out(core, parked);
        if (error != 0)
            vdf_reply_error(core, parked->unique, -error);
        else
            vdf_request_resume(core, parked, buffer);
        drop(parked);
    }
    free(buffer);
}

int vdf_image_answer(vdf_image *image, uint64_t offset, uint64_t length, int error)
{
    run(image->core, take_touching(image, offset, length, error), error);
    return 0;
}

int vdf_core_try_again(vdf_core *core)
{
    vdf_parked *taken = NULL;

    pthread_mutex_lock(&core->park_lock);
    for (vdf_parked **at = &core->parked; *at != NULL;) {
        vdf_parked *parked = *at;
        if (parked->spaceless && parked->wants == 0) {
            *at = parked->next;
            parked->next = taken;
            taken = parked;
        } else {
            at = &parked->next;
        }
    }
    pthread_mutex_unlock(&core->park_lock);
    run(core, taken, 0);
    return 0;
}

void vdf_park_clear(vdf_core *core)
{
    pthread_mutex_lock(&core->park_lock);
    vdf_parked *taken = core->parked;
    core->parked = NULL;
    pthread_mutex_unlock(&core->park_lock);
    while (taken != NULL) {
        vdf_parked *parked = taken;
        taken = parked->next;
        count_out(core, parked);
        vdf_reply_error(core, parked->unique, -EIO);
        drop(parked);
    }
}
