/* event.c - what the core has to say to Python: a queue and an eventfd. */
#include "internal.h"

#include <stdlib.h>
#include <unistd.h>

/* At the start, so that a short time without memory loses none. */
#define EVENTS_FIRST 1024

static bool make_room(vdf_core *core)
{
    if (core->event_count < core->event_capacity)
        return true;
    size_t capacity = core->event_capacity ? core->event_capacity * 2 : EVENTS_FIRST;
    vdf_event *larger = calloc(capacity, sizeof *larger);
    if (larger == NULL)
        return false;
    for (size_t i = 0; i < core->event_count; i++)
        larger[i] = core->event[(core->event_first + i) % core->event_capacity];
    free(core->event);
    core->event = larger;
    core->event_first = 0;
    core->event_capacity = capacity;
    return true;
}

int vdf_event_prepare(vdf_core *core)
{
    return make_room(core) ? 0 : -ENOMEM;
}

int vdf_event_offer(vdf_core *core, uint32_t kind, int error, uint64_t cookie, uint64_t offset,
                    uint64_t length)
{
    pthread_mutex_lock(&core->event_lock);
    bool room = make_room(core);
    if (room) {
        size_t at = (core->event_first + core->event_count++) % core->event_capacity;
        core->event[at] = (vdf_event){
            .kind = kind, .error = error, .cookie = cookie, .offset = offset, .length = length};
    }
    pthread_mutex_unlock(&core->event_lock);
    uint64_t one = 1;
    while (write(core->event_fd, &one, sizeof one) < 0 && errno == EINTR) {
    }
    return room ? 0 : -ENOMEM;
}

void vdf_event_post(vdf_core *core, uint32_t kind, int error, uint64_t cookie, uint64_t offset,
                    uint64_t length)
{
    /*
     * A disk whose change nobody hears of would not be replicated any more. A successor of this
     * process reads from the bitmaps what was not said.
     */
    if (core != NULL && vdf_event_offer(core, kind, error, cookie, offset, length) != 0)
        abort();
}

int vdf_core_next_event(vdf_core *core, vdf_event *out)
{
    int got = 0;

    pthread_mutex_lock(&core->event_lock);
    if (core->event_count != 0) {
        *out = core->event[core->event_first];
        core->event_first = (core->event_first + 1) % core->event_capacity;
        core->event_count--;
        got = 1;
    }
    pthread_mutex_unlock(&core->event_lock);
    return got;
}
