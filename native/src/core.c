/* core.c - one FUSE connection: its threads, from start to end. */
#include "internal.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define SOCKET_BUFFER (2 * 1024 * 1024)

static int open_sockets(vdf_core *core)
{
    int pair[2];
    int size = SOCKET_BUFFER;

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
        return -errno;
    for (int i = 0; i < 2; i++) {
        /* FORCE needs privilege; without it the system's maximum is taken. */
        if (setsockopt(pair[i], SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size) != 0)
            setsockopt(pair[i], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    }
    core->names_core = pair[0];
    core->names_fuse = pair[1];
    return 0;
}

static int open_descriptors(vdf_core *core)
{
    core->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (core->event_fd < 0)
        return -errno;
    return core->fuse_fd < 0 ? 0 : open_sockets(core);
}

int vdf_core_create(int fuse_fd, unsigned workers, unsigned flags, vdf_core **out)
{
    vdf_core *core = calloc(1, sizeof *core);

    if (core == NULL)
        return -ENOMEM;
    core->fuse_fd = fuse_fd;
    core->names_core = core->names_fuse = core->event_fd = -1;
    core->workers = workers == 0 ? 1 : workers;
    core->flags = flags;
    vdf_rwlock_init(&core->nodes_lock);
    pthread_mutex_init(&core->pending_lock, NULL);
    pthread_mutex_init(&core->sleep_lock, NULL);
    pthread_cond_init(&core->sleep_over, NULL);
    pthread_mutex_init(&core->park_lock, NULL);
    pthread_mutex_init(&core->event_lock, NULL);
    vdf_queue_init(&core->to_names);
    vdf_queue_init(&core->to_notify);
    core->thread = calloc(core->workers + 3, sizeof *core->thread);
    core->buffer = calloc(core->workers + 1, sizeof *core->buffer);
    int error = core->thread == NULL || core->buffer == NULL ? -ENOMEM : vdf_event_prepare(core);
    if (error == 0)
        error = open_descriptors(core);
    if (error != 0) {
        core->fuse_fd = -1; /* stays the caller's */
        vdf_core_free(core);
        return error;
    }
    *out = core;
    return 0;
}

int vdf_core_names_fd(const vdf_core *core)
{
    return core->names_fuse;
}

int vdf_core_event_fd(const vdf_core *core)
{
    return core->event_fd;
}

static void wake_all_workers(vdf_core *core);

static void end(vdf_core *core)
{
    if (!atomic_exchange(&core->ended, true))
        vdf_event_post(core, VDF_EVENT_ENDED, 0, 0, 0, 0);
    wake_all_workers(core);
}

/* Reads one request: its length, 0 to try again, -1 when the connection has ended. */
static ssize_t next_request(vdf_core *core, uint8_t *buffer)
{
    ssize_t got = read(core->fuse_fd, buffer, VDF_BUFFER_SIZE);

    if (got > 0)
        return got;
    /* Never 0 from /dev/fuse: the other end of a test's socket is closed. */
    if (got == 0 || errno == ENODEV)
        return -1;
    /* ENOENT: the request was taken back; EINTR: stop. Anything else would spin: end. */
    return errno == ENOENT || errno == EINTR || errno == EAGAIN ? 0 : -1;
}

/*
 * At most this many workers wait for a request; the others sleep. The kernel wakes its
 * waiters in turn, so that with all of them waiting each request would find another's
 * buffer, cold: 1 MiB writes then took 1.5 times as long.
 */
#define WAITING_WORKERS 2

/* Sleeps until a worker is wanted, unless nobody waits for requests any more. */
static void sleep_worker(vdf_core *core)
{
    pthread_mutex_lock(&core->sleep_lock);
    /* Counted before the look: who takes the last waiting worker's place sees us, or we see it. */
    atomic_fetch_add(&core->sleeping, 1);
    while (core->wanted == 0 && atomic_load(&core->waiting) > 0 && !atomic_load(&core->stopped) &&
           !atomic_load(&core->ended))
        pthread_cond_wait(&core->sleep_over, &core->sleep_lock);
    if (core->wanted > 0)
        core->wanted--;
    atomic_fetch_sub(&core->sleeping, 1);
    pthread_mutex_unlock(&core->sleep_lock);
}

static void wake_worker(vdf_core *core)
{
    if (atomic_load(&core->sleeping) == 0)
        return;
    pthread_mutex_lock(&core->sleep_lock);
    if (core->wanted < atomic_load(&core->sleeping)) {
        core->wanted++;
        pthread_cond_signal(&core->sleep_over);
    }
    pthread_mutex_unlock(&core->sleep_lock);
}

static void wake_all_workers(vdf_core *core)
{
    pthread_mutex_lock(&core->sleep_lock);
    pthread_cond_broadcast(&core->sleep_over);
    pthread_mutex_unlock(&core->sleep_lock);
}

/* As next_request, by at most WAITING_WORKERS at a time. */
static ssize_t wait_request(vdf_core *core, uint8_t *buffer)
{
    if (atomic_fetch_add(&core->waiting, 1) >= WAITING_WORKERS) {
        atomic_fetch_sub(&core->waiting, 1);
        sleep_worker(core);
        return 0;
    }
    ssize_t length = next_request(core, buffer);
    if (atomic_fetch_sub(&core->waiting, 1) == 1)
        wake_worker(core);
    return length;
}

static void *work(void *argument)
{
    vdf_core *core = argument;
    uint8_t *buffer = core->buffer[atomic_fetch_add(&core->working, 1)];

    prctl(PR_SET_NAME, "vdf-worker");
    /* A request copied to a page that is not here, by a thread that is being killed, fails
     * for its caller with EIO: every page is here before the first request is read. */
    memset(buffer, 0, VDF_BUFFER_SIZE);
    mlock(buffer, VDF_BUFFER_SIZE);
    while (!atomic_load(&core->stopped)) {
        ssize_t length = wait_request(core, buffer);
        if (length < 0)
            break;
        if (length > 0)
            vdf_request_handle(core, buffer, (size_t)length);
    }
    end(core);
    return NULL;
}

/* Workers wait in a read of their own (the kernel wakes one of them): a signal ends the wait. */
#define STOP_SIGNAL (SIGRTMIN + 5)

static void on_stop(int number)
{
    (void)number;
}

/* A signal for the process is not for these threads: it would break off their system calls. */
static void block_signals(sigset_t *before)
{
    const int ours[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP, SIGSYS};
    sigset_t set;

    sigfillset(&set);
    for (size_t i = 0; i < sizeof ours / sizeof *ours; i++)
        sigdelset(&set, ours[i]);
    sigdelset(&set, STOP_SIGNAL);
    pthread_sigmask(SIG_BLOCK, &set, before);
}

static int start_thread(vdf_core *core, void *(*run)(void *))
{
    sigset_t before;

    block_signals(&before);
    int error = pthread_create(&core->thread[core->threads], NULL, run, core);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error == 0)
        core->threads++;
    return -error;
}

/* The threads' buffers, made before the first of them: none ends for want of its own. */
static int make_buffers(vdf_core *core)
{
    for (unsigned i = 0; i <= core->workers; i++)
        if (core->buffer[i] == NULL &&
            posix_memalign((void **)&core->buffer[i], VDF_PAGE_SIZE, VDF_BUFFER_SIZE) != 0) {
            core->buffer[i] = NULL;
            return -ENOMEM;
        }
    return 0;
}

int vdf_core_start(vdf_core *core)
{
    struct sigaction stop = {.sa_handler = on_stop};

    if (core->fuse_fd < 0 || atomic_load(&core->started))
        return -EINVAL;
    int error = make_buffers(core);
    if (error != 0)
        return error;
    if (atomic_exchange(&core->started, true))
        return -EINVAL;
    sigemptyset(&stop.sa_mask);
    if (sigaction(STOP_SIGNAL, &stop, NULL) != 0)
        return -errno;
    if (core->resumed)
        error = vdf_resume_begin(core);
    for (unsigned i = 0; i < core->workers && error == 0; i++)
        error = start_thread(core, work);
    if (error == 0)
        error = start_thread(core, vdf_names_send_loop);
    if (error == 0)
        error = start_thread(core, vdf_names_reply_loop);
    if (error == 0)
        error = start_thread(core, vdf_names_notify_loop);
    return error;
}

void vdf_core_counts_get(const vdf_core *core, vdf_core_counts *out)
{
    *out = (vdf_core_counts){.reads = atomic_load(&core->reads),
                             .writes = atomic_load(&core->writes),
                             .syncs = atomic_load(&core->syncs),
                             .discards = atomic_load(&core->discards),
                             .seeks = atomic_load(&core->seeks),
                             .names = atomic_load(&core->names),
                             .parked = atomic_load(&core->parked_count),
                             .read_bytes = atomic_load(&core->read_bytes),
                             .write_bytes = atomic_load(&core->write_bytes)};
}

/* Joins a thread; `nudge` is done again and again until it ends. */
static void join(vdf_core *core, unsigned number, void (*nudge)(vdf_core *, unsigned))
{
    while (pthread_tryjoin_np(core->thread[number], NULL) == EBUSY) {
        nudge(core, number);
        vdf_sleep_ns(1000 * 1000);
    }
}

/* A notification may wait for a page whose READ is parked. */
static void nudge_names(vdf_core *core, unsigned number)
{
    (void)number;
    vdf_park_clear(core);
    vdf_strand_clear(core);
}

/* Again and again: one that was just about to read has not seen the first. */
static void nudge_worker(vdf_core *core, unsigned number)
{
    pthread_kill(core->thread[number], STOP_SIGNAL);
    wake_all_workers(core);
}

void vdf_core_join_workers(vdf_core *core)
{
    atomic_store(&core->stopped, true);
    for (unsigned i = 0; i < core->workers && i < core->threads && !core->workers_joined; i++)
        join(core, i, nudge_worker);
    core->workers_joined = true;
}

void vdf_core_stop(vdf_core *core)
{
    if (atomic_exchange(&core->stopping, true))
        return;
    if (core->names_core >= 0)
        shutdown(core->names_core, SHUT_RDWR);
    vdf_queue_close(&core->to_names);
    vdf_queue_close(&core->to_notify);
    /* The workers last: a notification under way may need their answers. */
    for (unsigned i = core->workers; i < core->threads; i++)
        join(core, i, nudge_names);
    vdf_core_join_workers(core);
    core->threads = 0;
    vdf_park_clear(core);
    vdf_strand_clear(core);
    end(core);
}

static void close_fd(int fd)
{
    if (fd >= 0)
        close(fd);
}

void vdf_core_free(vdf_core *core)
{
    if (core == NULL)
        return;
    vdf_park_clear(core);
    vdf_strand_clear(core);
    vdf_nodes_clear(core);
    vdf_names_clear(core);
    vdf_queue_destroy(&core->to_names);
    vdf_queue_destroy(&core->to_notify);
    pthread_rwlock_destroy(&core->nodes_lock);
    pthread_mutex_destroy(&core->pending_lock);
    pthread_mutex_destroy(&core->sleep_lock);
    pthread_cond_destroy(&core->sleep_over);
    pthread_mutex_destroy(&core->park_lock);
    pthread_mutex_destroy(&core->event_lock);
    close_fd(core->fuse_fd);
    close_fd(core->names_core);
    close_fd(core->names_fuse);
    close_fd(core->event_fd);
    free(core->event);
    for (unsigned i = 0; core->buffer != NULL && i <= core->workers; i++)
        free(core->buffer[i]);
    free(core->buffer);
    free(core->thread);
    free(core);
}
