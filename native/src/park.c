/* park.c - requests that wait for bytes of a lazy image. They hold no thread. */
#include "internal.h"

#include <linux/fuse.h>
#include <stdlib.h>

int vdf_park(vdf_core *core, vdf_image *image, uint64_t unique, uint32_t opcode, uint64_t offset,
             uint64_t length, int whence)
{
    vdf_parked *parked = calloc(1, sizeof *parked);

    if (parked == NULL)
        return -ENOMEM;
    *parked = (vdf_parked){.image = image,
                           .unique = unique,
                           .opcode = opcode,
                           .whence = whence,
                           .offset = offset,
                           .length = length};
    vdf_image_ref(image);
    pthread_mutex_lock(&core->park_lock);
    parked->next = core->parked;
    core->parked = parked;
    pthread_mutex_unlock(&core->park_lock);
    atomic_fetch_add(&core->parked_count, 1);
    /* Posted after it is parked: the answer cannot come too early. */
    vdf_event_post(core, opcode == FUSE_LSEEK ? VDF_EVENT_SEEK : VDF_EVENT_WANT, 0, image->cookie,
                   offset, length);
    return 0;
}

static void drop(vdf_core *core, vdf_parked *parked)
{
    atomic_fetch_sub(&core->parked_count, 1);
    vdf_image_unref(parked->image);
    free(parked);
}

bool vdf_park_interrupt(vdf_core *core, uint64_t unique)
{
    vdf_parked *found = NULL;

    pthread_mutex_lock(&core->park_lock);
    for (vdf_parked **at = &core->parked; *at != NULL; at = &(*at)->next) {
        if ((*at)->unique == unique) {
            found = *at;
            *at = found->next;
            break;
        }
    }
    pthread_mutex_unlock(&core->park_lock);
    if (found == NULL)
        return false;
    vdf_reply_error(core, unique, -EINTR);
    drop(core, found);
    return true;
}

static bool touches(const vdf_parked *parked, uint64_t offset, uint64_t length)
{
    return parked->offset < vdf_add(offset, length) &&
           offset < vdf_add(parked->offset, parked->length);
}

static vdf_parked *take_touching(vdf_image *image, uint64_t offset, uint64_t length)
{
    vdf_core *core = image->core;
    vdf_parked *taken = NULL;

    pthread_mutex_lock(&core->park_lock);
    for (vdf_parked **at = &core->parked; *at != NULL;) {
        vdf_parked *parked = *at;
        if (parked->image == image && touches(parked, offset, length)) {
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

int vdf_image_answer(vdf_image *image, uint64_t offset, uint64_t length, int error)
{
    vdf_core *core = image->core;
    vdf_parked *taken = take_touching(image, offset, length);
    uint8_t *buffer = NULL;

    if (taken != NULL && error == 0) {
        buffer = malloc(VDF_BUFFER_SIZE);
        if (buffer == NULL)
            error = ENOMEM;
    }
    while (taken != NULL) {
        vdf_parked *parked = taken;
        taken = parked->next;
        if (error != 0)
            vdf_reply_error(core, parked->unique, -error);
        else
            vdf_request_resume(core, parked, buffer);
        drop(core, parked);
    }
    free(buffer);
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
        vdf_reply_error(core, parked->unique, -EIO);
        drop(core, parked);
    }
}
