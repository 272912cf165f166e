/* test_gate.c - tickets: a flip waits for those before it, a hold lets nobody in. */
#include "check.h"
#include "internal.h"

static vdf_gate gate;
static _Atomic uint64_t old_inside; /* tickets out with an epoch below `barrier` */
static _Atomic uint64_t barrier;
static atomic_bool stop, held;

static void *take_tickets(void *argument)
{
    (void)argument;
    while (!atomic_load(&stop)) {
        vdf_ticket ticket = vdf_gate_enter(&gate);
        uint64_t epoch = ticket.epoch;
        CHECK(epoch >= atomic_load(&barrier));
        CHECK(!atomic_load(&held));
        atomic_fetch_add(&old_inside, 1);
        atomic_fetch_sub(&old_inside, 1);
        vdf_gate_leave(&gate, ticket);
    }
    return NULL;
}

int main(void)
{
    pthread_t thread[4];

    CHECK(vdf_gate_init(&gate) == 0);
    for (int i = 0; i < 4; i++)
        CHECK(pthread_create(&thread[i], NULL, take_tickets, NULL) == 0);
    for (uint64_t epoch = 1; epoch <= 300; epoch++) {
        bool hold = epoch % 3 == 0;
        if (hold)
            vdf_gate_hold(&gate);
        uint64_t phase = vdf_gate_flip(&gate, epoch);
        vdf_gate_wait(&gate, phase);
        /* Whoever takes a ticket from now on has this epoch. */
        atomic_store(&barrier, epoch);
        if (hold) {
            /* What entered before the hold had the old phase or was let in with the new one. */
            vdf_gate_wait(&gate, phase + 1);
            atomic_store(&held, true);
            CHECK(atomic_load(&old_inside) == 0);
            vdf_sleep_ns(100 * 1000);
            CHECK(atomic_load(&old_inside) == 0);
            atomic_store(&held, false);
            vdf_gate_release(&gate);
        }
    }
    atomic_store(&stop, true);
    for (int i = 0; i < 4; i++)
        pthread_join(thread[i], NULL);
    vdf_gate_destroy(&gate);
    return 0;
}
