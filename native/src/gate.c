/* gate.c - tickets of writes under way; see internal.h. */
#include "internal.h"

#include <string.h>

int vdf_gate_init(vdf_gate *gate)
{
    memset(gate, 0, sizeof *gate);
    int error = pthread_mutex_init(&gate->lock, NULL);
    if (error != 0)
        return -error;
    error = pthread_cond_init(&gate->released, NULL);
    if (error != 0)
        pthread_mutex_destroy(&gate->lock);
    return -error;
}

void vdf_gate_destroy(vdf_gate *gate)
{
    pthread_cond_destroy(&gate->released);
    pthread_mutex_destroy(&gate->lock);
}

static void wait_released(vdf_gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    while (atomic_load(&gate->held) != 0)
        pthread_cond_wait(&gate->released, &gate->lock);
    pthread_mutex_unlock(&gate->lock);
}

vdf_ticket vdf_gate_enter(vdf_gate *gate)
{
    for (;;) {
        if (atomic_load(&gate->held) != 0)
            wait_released(gate);
        uint64_t phase = atomic_load(&gate->phase);
        atomic_fetch_add(&gate->inside[phase & 1].tickets, 1);
        /*
         * Looked at again after the ticket counts: a flip or a hold that came in
         * between is seen here, one that comes later waits for this ticket.
         */
        if (atomic_load(&gate->phase) == phase && atomic_load(&gate->held) == 0)
            return (vdf_ticket){.phase = phase, .epoch = atomic_load(&gate->epoch[phase & 1])};
        atomic_fetch_sub(&gate->inside[phase & 1].tickets, 1);
    }
}

void vdf_gate_leave(vdf_gate *gate, vdf_ticket ticket)
{
    atomic_fetch_sub(&gate->inside[ticket.phase & 1].tickets, 1);
}

void vdf_gate_hold(vdf_gate *gate)
{
    atomic_fetch_add(&gate->held, 1);
}

void vdf_gate_release(vdf_gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    atomic_fetch_sub(&gate->held, 1);
    pthread_cond_broadcast(&gate->released);
    pthread_mutex_unlock(&gate->lock);
}

uint64_t vdf_gate_flip(vdf_gate *gate, uint64_t epoch)
{
    uint64_t phase = atomic_load(&gate->phase);

    atomic_store(&gate->epoch[(phase + 1) & 1], epoch);
    atomic_store(&gate->phase, phase + 1);
    return phase;
}

void vdf_gate_wait(vdf_gate *gate, uint64_t phase)
{
    long nap = 20 * 1000;

    while (atomic_load(&gate->inside[phase & 1].tickets) != 0) {
        vdf_sleep_ns(nap);
        if (nap < 1000 * 1000)
            nap *= 2;
    }
}
