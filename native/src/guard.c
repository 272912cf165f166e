/*
 * guard.c - stores into mapped files of a disk that fails.
 *
 * A store into a mapped page is a SIGBUS where the file system cannot take it any more: shut
 * down after an error, read-only, or unable to read the page. The guest's write that was to be
 * marked must go on: the page is replaced by one in memory that holds what the mapping still
 * shows, or zeros. Whoever owns the mapping learns of it by `lost`.
 *
 * Any thread may come here, in a signal handler: only atomics and system calls. Nodes are never
 * freed, so that a list that is being walked stays one.
 */
#include "internal.h"

#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

struct vdf_guard {
    struct vdf_guard *next;
    _Atomic uintptr_t start; /* 0: free */
    _Atomic uintptr_t end;
    _Atomic(vdf_lost *) lost;
    _Atomic uint64_t *replaced; /* one bit a page */
    uint64_t replaced_bytes;
};

static _Atomic(vdf_guard *) guards;
static atomic_flag busy = ATOMIC_FLAG_INIT;
static pthread_mutex_t adding = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction before;

/* With `busy`. */
static bool replace(uintptr_t page)
{
    void *made =
        mmap(NULL, VDF_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct iovec to = {.iov_base = made, .iov_len = VDF_PAGE_SIZE};
    struct iovec from = {.iov_base = (void *)page, .iov_len = VDF_PAGE_SIZE};

    if (made == MAP_FAILED)
        return false;
    /* What cannot be read stays zero. */
    (void)!process_vm_readv(getpid(), &to, 1, &from, 1, 0);
    /* At once: another thread may read there. */
    return mremap(made, VDF_PAGE_SIZE, VDF_PAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED,
                  (void *)page) != MAP_FAILED;
}

static bool mend(vdf_guard *guard, uintptr_t at)
{
    uint64_t number = (at - atomic_load(&guard->start)) / VDF_PAGE_SIZE;
    uint64_t bit = UINT64_C(1) << (number % 64);
    bool done = true;

    while (atomic_flag_test_and_set(&busy))
        sched_yield();
    if (!(atomic_load(&guard->replaced[number / 64]) & bit)) {
        done = replace(at / VDF_PAGE_SIZE * VDF_PAGE_SIZE);
        if (done)
            atomic_fetch_or(&guard->replaced[number / 64], bit);
    }
    atomic_flag_clear(&busy);
    return done;
}

static void on_bus_error(int number, siginfo_t *info, void *context)
{
    uintptr_t at = (uintptr_t)info->si_addr;
    int saved = errno;

    (void)context;
    for (vdf_guard *guard = atomic_load(&guards); guard != NULL && info->si_code > 0;
         guard = guard->next) {
        uintptr_t start = atomic_load(&guard->start);
        if (start == 0 || at < start || at >= atomic_load(&guard->end) || !mend(guard, at))
            continue;
        vdf_lost *lost = atomic_load(&guard->lost);
        atomic_store(&lost->pages, 1);
        atomic_store(&lost->unsettled, 1);
        /* May fail in the same way: the handler is entered again. */
        if (lost->noted != NULL)
            vdf_store(lost->noted, 1);
        errno = saved;
        return;
    }
    /* Not ours: the instruction runs into it again. */
    sigaction(number, &before, NULL);
    if (info->si_code <= 0)
        raise(number);
    errno = saved;
}

static int install(void)
{
    struct sigaction action;

    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGBUS, &action, &before) == 0 ? 0 : -errno;
}

/* With `adding`. */
static vdf_guard *find_free(uint64_t replaced_bytes)
{
    vdf_guard *guard = atomic_load(&guards);

    while (guard != NULL &&
           (atomic_load(&guard->start) != 0 || guard->replaced_bytes != replaced_bytes))
        guard = guard->next;
    return guard;
}

/* With `adding`. */
static vdf_guard *make(uint64_t replaced_bytes)
{
    vdf_guard *guard = calloc(1, sizeof *guard);

    if (guard == NULL)
        return NULL;
    guard->replaced_bytes = replaced_bytes;
    guard->replaced = mmap(NULL, replaced_bytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (guard->replaced == MAP_FAILED) {
        free(guard);
        return NULL;
    }
    guard->next = atomic_load(&guards);
    atomic_store(&guards, guard);
    return guard;
}

int vdf_guard_add(void *start, uint64_t bytes, vdf_lost *lost, vdf_guard **out)
{
    uint64_t words = (bytes / VDF_PAGE_SIZE + 63) / 64;
    static bool installed;

    pthread_mutex_lock(&adding);
    int error = installed ? 0 : install();
    installed = error == 0;
    vdf_guard *guard = find_free(words * 8);
    if (guard != NULL)
        madvise((void *)guard->replaced, guard->replaced_bytes, MADV_DONTNEED);
    else if (error == 0)
        guard = make(words * 8);
    if (error == 0 && guard == NULL)
        error = -ENOMEM;
    if (error == 0) {
        atomic_store(&guard->lost, lost);
        atomic_store(&guard->end, (uintptr_t)start + bytes);
        atomic_store(&guard->start, (uintptr_t)start);
        *out = guard;
    }
    pthread_mutex_unlock(&adding);
    return error;
}

void vdf_guard_remove(vdf_guard *guard)
{
    if (guard != NULL)
        atomic_store(&guard->start, 0);
}
