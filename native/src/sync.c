/* sync.c - making an image's bytes durable, and what is known of its pages with them; refusing. */
#include "internal.h"

#include <unistd.h>

void vdf_image_latch(vdf_image *image, int error)
{
    atomic_store(&image->sync_error, error);
    vdf_event_post(image->core, VDF_EVENT_SYNC_FAILED, -error, image->cookie, 0, 0);
}

void vdf_image_refuse_writes(vdf_image *image, int refuse)
{
    atomic_store(&image->refuses, refuse != 0);
}

/* Whether what is present has to be committed with the bytes. */
static bool has_presence(const vdf_image *image)
{
    const vdf_lazy *lazy = vdf_image_lazy(image);

    return lazy != NULL && lazy->presence != NULL;
}

int vdf_image_sync(vdf_image *image, int datasync)
{
    int latched = atomic_load(&image->sync_error);

    if (latched != 0)
        return latched;
    if (has_presence(image))
        return vdf_presence_commit(image, datasync ? 0 : VDF_COMMIT_FULL);
    int error = (datasync ? fdatasync(image->fd) : fsync(image->fd)) == 0 ? 0 : -errno;
    if (error != 0 && error != -EINTR)
        vdf_image_latch(image, error);
    return error;
}

int vdf_image_sync_internal(vdf_image *image)
{
    /* A region leaves the intent log when its marks are durable: its pages must be here then. */
    if (has_presence(image))
        return vdf_presence_commit(image, 0);
    int error = fdatasync(image->inner_fd) == 0 ? 0 : -errno;

    if (error != 0 && error != -EINTR)
        vdf_image_latch(image, error);
    return error;
}
