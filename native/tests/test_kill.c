/*
 * test_kill.c - a process that writes, truncates, seals and captures is killed at an odd
 * moment; the track that it leaves marks every page in which the image differs from what
 * was captured.
 */
#include "internal.h"
#include "scratch.h"

#include <linux/falloc.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

enum {
    PAGES = 512,
    ROUNDS = 40,
    BATCH = 64
};

typedef struct vault {
    _Atomic uint64_t size;
    uint8_t page[2 * PAGES][VDF_PAGE_SIZE];
} vault;

static vault *captured; /* shared with the child: what the epochs forgotten say */
static vault frozen;

static void *change(void *argument)
{
    vdf_image *image = argument;
    uint64_t state = (uint64_t)getpid() * 2654435761u + 1;
    uint8_t data[5 * VDF_PAGE_SIZE];

    for (;;) {
        uint64_t offset = scratch_random(&state) % (PAGES * VDF_PAGE_SIZE);
        uint64_t length = 1 + scratch_random(&state) % sizeof data;
        uint64_t kind = scratch_random(&state) % 24;
        memset(data, (int)(1 + scratch_random(&state) % 255), length);
        if (kind == 0)
            CHECK(vdf_image_truncate(image, scratch_random(&state) % (PAGES * VDF_PAGE_SIZE)) == 0);
        else if (kind == 1)
            CHECK(vdf_image_allocate(image, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset,
                                     length) == 0);
        else
            CHECK(vdf_image_write(image, offset, length, data) == 0);
    }
    return NULL;
}

/* Lays the frozen epoch over the vault, as a delta does. */
static bool capture(vdf_image *image, const vdf_seal *seal)
{
    static uint64_t pageno[BATCH], sum[BATCH];
    static uint8_t zero[BATCH], data[BATCH * VDF_PAGE_SIZE];
    vdf_batch batch = {.pageno = pageno, .sum = sum, .zero = zero, .data = data, .capacity = BATCH};
    uint64_t cursor = 0;

    memcpy(frozen.page, captured->page, sizeof frozen.page);
    uint64_t cut = vdf_pages_of(seal->cut);
    memset(frozen.page[cut], 0, sizeof frozen.page - cut * VDF_PAGE_SIZE);
    do {
        int error = vdf_capture_next(image, &cursor, &batch);
        if (error == -ECANCELED)
            return false;
        CHECK(error == 0);
        const uint8_t *at = data;
        for (uint32_t i = 0; i < batch.count; i++) {
            uint8_t *page = frozen.page[pageno[i]];
            memset(page, 0, VDF_PAGE_SIZE);
            if (zero[i])
                continue;
            memcpy(page, at, VDF_PAGE_SIZE);
            at += VDF_PAGE_SIZE;
        }
    } while (batch.count != 0);
    return true;
}

static void child(scratch *s, _Atomic uint64_t *running)
{
    pthread_t thread;
    vdf_seal seal;

    scratch_open(s, 0);
    CHECK(pthread_create(&thread, NULL, change, s->image) == 0);
    for (uint64_t i = 0;; i++) {
        atomic_store(running, i + 1);
        CHECK(vdf_seal_images(&s->image, 1, &seal) == 0);
        if (i % 4 == 3 || !capture(s->image, &seal)) {
            CHECK(vdf_capture_abandon(s->image) == 0);
            continue;
        }
        /* Not at one instant: killed in between, the pages are marked still. */
        memcpy(captured->page, frozen.page, sizeof frozen.page);
        atomic_store(&captured->size, seal.size);
        CHECK(vdf_capture_forget(s->image) == 0);
    }
}

static void check_marks(scratch *s)
{
    uint8_t page[VDF_PAGE_SIZE];
    uint64_t size;
    vdf_track_counts counts;

    scratch_open(s, 0);
    vdf_track_counts_get(s->track, &counts);
    CHECK(!counts.frozen && counts.preserved_pages == 0);
    CHECK(vdf_image_size(s->image, &size) == 0);
    for (uint64_t i = 0; i < vdf_pages_of(size); i++) {
        memset(page, 0, sizeof page);
        CHECK(vdf_image_read(s->image, i * VDF_PAGE_SIZE, sizeof page, page) >= 0);
        if (memcmp(page, captured->page[i], sizeof page) != 0)
            CHECK(vdf_track_is_changed(s->image, i));
    }
    /* And by the rules of a delta the next capture makes the two the same. */
    vdf_seal seal;
    CHECK(vdf_seal_images(&s->image, 1, &seal) == 0 && seal.size == size);
    CHECK(capture(s->image, &seal));
    memcpy(captured->page, frozen.page, sizeof frozen.page);
    atomic_store(&captured->size, size);
    CHECK(vdf_capture_forget(s->image) == 0);
    for (uint64_t i = 0; i < vdf_pages_of(size); i++) {
        memset(page, 0, sizeof page);
        CHECK(vdf_image_read(s->image, i * VDF_PAGE_SIZE, sizeof page, page) >= 0);
        CHECK(memcmp(page, captured->page[i], sizeof page) == 0);
    }
    scratch_close(s);
}

int main(void)
{
    scratch s;
    uint64_t state = 4711;
    size_t shared = sizeof(vault) + sizeof(_Atomic uint64_t);

    captured = mmap(NULL, shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(captured != MAP_FAILED);
    _Atomic uint64_t *running = (void *)(captured + 1);
    scratch_make(&s, PAGES * VDF_PAGE_SIZE / 2);
    scratch_open(&s, VDF_TRACK_NEW);
    scratch_close(&s);
    for (int i = 0; i < ROUNDS; i++) {
        atomic_store(running, 0);
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0)
            child(&s, running);
        while (atomic_load(running) < 2 && waitpid(pid, NULL, WNOHANG) == 0)
            vdf_sleep_ns(200 * 1000);
        vdf_sleep_ns((long)(scratch_random(&state) % (20 * 1000 * 1000)));
        int status = 0;
        CHECK(kill(pid, SIGKILL) == 0 && waitpid(pid, &status, 0) == pid);
        CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        check_marks(&s);
    }
    munmap(captured, shared);
    scratch_remove(&s);
    return 0;
}
