/* seal.c - ending an epoch, and what becomes of the frozen one. */
#include "internal.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static uint64_t wall_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

static int prepare(vdf_image *image)
{
    vdf_track *track = atomic_load(&image->track);

    if (track == NULL)
        return -EINVAL;
    if (atomic_load(&track->frozen_epoch) != 0)
        return -EBUSY;
    if (atomic_load(&track->lost.unsettled) != 0)
        return -EUCLEAN;
    int error = vdf_track_mend(track, atomic_load(&image->size));
    if (error != 0)
        return error;
    /* Here, not while tickets are held back: the lock may belong to a slow write. */
    pthread_mutex_lock(&track->size_lock);
    track->sealed_known = 0;
    pthread_mutex_unlock(&track->size_lock);
    return 0;
}

/* Everything that a later change looks at is in place before the flip lets it in. */
static void announce(vdf_track *track)
{
    vdf_track_head *head = track->head;
    uint64_t epoch = atomic_load(&track->epoch);

    atomic_store(&track->drained, 0);
    atomic_store(&track->abandoned, 0);
    atomic_store(&track->notified, 0);
    vdf_store(&head->cut[(epoch + 1) & 1], UINT64_MAX);
    vdf_store(&head->changed[(epoch + 1) & 1], 0);
    vdf_store(&head->frozen_epoch, epoch);
    vdf_crash("seal.frozen");
    vdf_store(&head->epoch, epoch + 1);
    atomic_store(&track->frozen_epoch, epoch);
    vdf_crash("seal.announced");
}

static void settle(vdf_image *image, vdf_track *track, uint64_t phase, vdf_seal *out)
{
    vdf_track_head *head = track->head;
    uint64_t epoch = out->epoch;

    vdf_gate_wait(&image->gate, phase);
    pthread_mutex_lock(&track->size_lock);
    if (!track->sealed_known)
        track->sealed_size = atomic_load(&image->size);
    track->sealed_known = 1;
    vdf_store(&head->base_size[(epoch + 1) & 1], track->sealed_size);
    pthread_mutex_unlock(&track->size_lock);
    out->size = track->sealed_size;
    out->low = vdf_min(vdf_load(&head->cut[epoch & 1]), out->size);
    out->cut = vdf_min(out->low, head->base_size[epoch & 1]);
    /* A change of this epoch could not mark its pages: the next seal makes them suspect. */
    if (atomic_load(&track->overflow) != 0)
        vdf_track_give_up(image, track, -ENOSPC);
    /* A late change may have spent the notice that belongs to the next epoch. */
    atomic_store(&track->notified, 0);
    if (vdf_load(&head->changed[(epoch + 1) & 1]) != 0)
        vdf_track_notify(image, track);
    atomic_store(&track->drained, 1);
    vdf_crash("seal.drained");
}

static int by_address(const void *a, const void *b)
{
    const vdf_image *x = *(vdf_image *const *)a, *y = *(vdf_image *const *)b;

    return x < y ? -1 : x > y;
}

static int seal_locked(vdf_image **images, unsigned count, vdf_seal *out, uint64_t *phase)
{
    for (unsigned i = 0; i < count; i++) {
        int error = prepare(images[i]);
        if (error != 0)
            return error;
    }
    for (unsigned i = 0; i < count && count > 1; i++)
        vdf_gate_hold(&images[i]->gate);
    uint64_t now = wall_ns();
    for (unsigned i = 0; i < count; i++) {
        vdf_track *track = atomic_load(&images[i]->track);
        out[i].epoch = atomic_load(&track->epoch);
        out[i].time_ns = now;
        announce(track);
        phase[i] = vdf_gate_flip(&images[i]->gate, out[i].epoch + 1);
        atomic_store(&track->epoch, out[i].epoch + 1);
    }
    for (unsigned i = 0; i < count && count > 1; i++)
        vdf_gate_release(&images[i]->gate);
    for (unsigned i = 0; i < count; i++)
        settle(images[i], atomic_load(&images[i]->track), phase[i], &out[i]);
    return 0;
}

static void lock_all(vdf_image **sorted, unsigned count, bool lock)
{
    for (unsigned i = 0; i < count; i++) {
        vdf_track *track = atomic_load(&sorted[i]->track);
        if (lock)
            pthread_mutex_lock(&track->admin);
        else
            pthread_mutex_unlock(&track->admin);
    }
}

int vdf_seal_images(vdf_image **images, unsigned count, vdf_seal *out)
{
    if (count == 0)
        return -EINVAL;
    vdf_image **sorted = calloc(count, sizeof *sorted);
    uint64_t *phase = calloc(count, sizeof *phase);
    int error = sorted == NULL || phase == NULL ? -ENOMEM : 0;
    if (error == 0) {
        memcpy(sorted, images, count * sizeof *sorted);
        qsort(sorted, count, sizeof *sorted, by_address);
        for (unsigned i = 0; i < count; i++)
            if (atomic_load(&sorted[i]->track) == NULL || (i > 0 && sorted[i] == sorted[i - 1]))
                error = -EINVAL;
    }
    if (error == 0) {
        lock_all(sorted, count, true);
        error = seal_locked(images, count, out, phase);
        lock_all(sorted, count, false);
    }
    free(sorted);
    free(phase);
    return error;
}

/*
 * Ends the frozen state. After the flip every change under way knows it, so that
 * nobody sets a frozen or preserved bit any more while they are cleared.
 */
static void unfreeze(vdf_image *image, vdf_track *track)
{
    atomic_store(&track->frozen_epoch, 0);
    uint64_t phase = vdf_gate_flip(&image->gate, atomic_load(&track->epoch));
    vdf_gate_wait(&image->gate, phase);
}

static int drop_preserve(vdf_track *track)
{
    bool used = atomic_load(&track->preserved.set) != 0;

    vdf_bitmap_reset(&track->preserved);
    return !used || ftruncate(track->preserve, 0) == 0 ? 0 : -errno;
}

int vdf_capture_forget(vdf_image *image)
{
    vdf_track *track = atomic_load(&image->track);

    if (track == NULL)
        return -EINVAL;
    pthread_mutex_lock(&track->admin);
    uint64_t frozen = atomic_load(&track->frozen_epoch);
    int error = frozen == 0 ? -EINVAL : 0;
    if (error == 0) {
        unfreeze(image, track);
        /*
         * Forgotten before its bits are cleared: a process killed in between marks
         * too much. The other way round the next epoch would inherit this one's cut
         * without its pages, and hide them.
         */
        vdf_store(&track->head->frozen_epoch, 0);
        vdf_crash("forget.released");
        vdf_bitmap_reset(&track->dirty[frozen & 1]);
        vdf_crash("forget.cleared");
        error = drop_preserve(track);
        vdf_crash("forget.done");
        atomic_store(&track->abandoned, 0);
    }
    pthread_mutex_unlock(&track->admin);
    return error;
}

int vdf_capture_abandon(vdf_image *image)
{
    vdf_track *track = atomic_load(&image->track);

    if (track == NULL)
        return -EINVAL;
    pthread_mutex_lock(&track->admin);
    uint64_t frozen = atomic_load(&track->frozen_epoch);
    int error = frozen == 0 ? -EINVAL : 0;
    if (error == 0) {
        vdf_track_head *head = track->head;
        uint64_t old = frozen & 1, new = old ^ 1;
        unfreeze(image, track);
        vdf_intent_shrunk(track->intent, frozen + 1);
        int unsaved = vdf_track_fold(track, new);
        if (unsaved != 0)
            vdf_intent_fail(track->intent, unsaved);
        vdf_crash("abandon.merged");
        pthread_mutex_lock(&track->size_lock);
        vdf_store(&head->cut[new], vdf_min(vdf_load(&head->cut[new]), vdf_load(&head->cut[old])));
        vdf_store(&head->base_size[new], head->base_size[old]);
        if (vdf_load(&head->changed[old]) != 0)
            vdf_store(&head->changed[new], 1);
        pthread_mutex_unlock(&track->size_lock);
        vdf_crash("abandon.settled");
        vdf_store(&head->frozen_epoch, 0);
        vdf_crash("abandon.released");
        vdf_bitmap_reset(&track->dirty[old]);
        error = drop_preserve(track);
        atomic_store(&track->abandoned, 0);
    }
    pthread_mutex_unlock(&track->admin);
    return error;
}

void vdf_track_set_budget(vdf_track *track, uint64_t pages)
{
    atomic_store(&track->budget, pages);
}
