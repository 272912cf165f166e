/*
 * test_copykill.c - a process that writes to a copy, fetches and syncs is killed at an odd
 * moment, or at a crash hook. Its successor finds all that was acknowledged. And had the host
 * died, what was synced would be there: the files as of their last syncs, which are seen here,
 * the image also with all that was written since, or without.
 */
#include "copies.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>

enum {
    PAGES = 96,
    START = VDF_REGION_PAGES - PAGES / 2,
    UNITS = 2 * PAGES, /* halves of pages */
    WRITERS = 2,
    SYNCERS = 2,
    ROUNDS = 42,
    CHAIN = 3 /* lives before all is made anew */
};

#define UNIT ((uint64_t)VDF_PAGE_SIZE / 2)
#define WORDS (UNIT / 8)
#define SIZE ((START + PAGES) * (uint64_t)VDF_PAGE_SIZE)

/* Version v of a unit is the word v all over; version 0 is the base. */
typedef struct shared {
    _Atomic uint64_t begun[UNITS], done[UNITS], synced[UNITS];
    _Atomic uint64_t syncs;
    _Atomic unsigned image_shadow, log_shadow; /* which of two copies is whole */
} shared;

static shared *known; /* with the child */
static scratch s;
static vdf_image *image;
static bool shadows;

/* ---- what a sync makes durable ------------------------------------------------------------- */

static void shadow_path(char *path, const char *name, unsigned which)
{
    snprintf(path, 128, "%s/%s.%u", s.directory, name, which);
}

static void copy_file(int from, const char *path, uint64_t start)
{
    static uint8_t data[1 << 20];
    struct stat st;
    int to = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

    CHECK(to >= 0 && fstat(from, &st) == 0 && (uint64_t)st.st_size - start <= sizeof data);
    int64_t got = vdf_file_read(from, start, (uint64_t)st.st_size - start, data);
    CHECK(got >= 0 && ftruncate(to, st.st_size) == 0);
    CHECK(vdf_file_write(to, start, (uint64_t)got, data) == 0);
    close(to);
}

static void take_shadow(int fd, const char *name, uint64_t start, _Atomic unsigned *which)
{
    char path[128];

    shadow_path(path, name, atomic_load(which) ^ 1);
    copy_file(fd, path, start);
    atomic_fetch_xor(which, 1);
}

static bool is_file(const struct stat *st, const char *path)
{
    struct stat other;

    return stat(path, &other) == 0 && other.st_ino == st->st_ino;
}

static int take_sync(int fd)
{
    char path[128];
    struct stat st;

    CHECK(fstat(fd, &st) == 0);
    snprintf(path, sizeof path, "%s/presence.log", s.tracks);
    if (S_ISDIR(st.st_mode)) {
        int log = open(path, O_RDONLY | O_CLOEXEC);
        CHECK(log >= 0);
        take_shadow(log, "log", 0, &known->log_shadow);
        close(log);
    } else if (is_file(&st, path)) {
        take_shadow(fd, "log", 0, &known->log_shadow);
    } else if (is_file(&st, s.file)) {
        take_shadow(fd, "image", START * (uint64_t)VDF_PAGE_SIZE, &known->image_shadow);
    }
    return 0;
}

/* In place of the C library's, for the core too. */
int fdatasync(int fd)
{
    return shadows ? take_sync(fd) : (int)syscall(SYS_fdatasync, fd);
}

int fsync(int fd)
{
    return shadows ? take_sync(fd) : (int)syscall(SYS_fsync, fd);
}

/* ---- the one who is killed ------------------------------------------------------------------- */

static void put_units(uint64_t unit, uint64_t count)
{
    uint64_t words[4 * WORDS];
    uint64_t offset = START * (uint64_t)VDF_PAGE_SIZE + unit * UNIT;
    int error;

    for (uint64_t i = 0; i < count; i++) {
        uint64_t version = atomic_load(&known->begun[unit + i]) + 1;
        atomic_store(&known->begun[unit + i], version);
        for (uint64_t j = 0; j < WORDS; j++)
            words[i * WORDS + j] = version;
    }
    while ((error = vdf_image_write(image, offset, count * UNIT, (uint8_t *)words)) == -EAGAIN) {
        vdf_want want[2];
        unsigned wants = vdf_lazy_edges(image, offset, count * UNIT, want);
        for (unsigned i = 0; i < wants; i++)
            copy_fetch(image, want[i].offset / VDF_PAGE_SIZE, want[i].length / VDF_PAGE_SIZE);
    }
    CHECK(error == 0);
    for (uint64_t i = 0; i < count; i++)
        atomic_store(&known->done[unit + i], atomic_load(&known->begun[unit + i]));
}

static void *write_units(void *argument)
{
    uint64_t number = (uint64_t)(uintptr_t)argument;
    uint64_t state = (uint64_t)getpid() * 2654435761u + number;
    uint64_t own = UNITS / WRITERS;

    for (;;) {
        uint64_t count = 1 + scratch_random(&state) % 4;
        put_units(number * own + scratch_random(&state) % (own - count + 1), count);
        vdf_sleep_ns(100 * 1000);
    }
    return NULL;
}

static void *sync_units(void *argument)
{
    static _Thread_local uint64_t before[UNITS];

    for (;;) {
        for (uint64_t i = 0; i < UNITS; i++)
            before[i] = atomic_load(&known->done[i]);
        CHECK((argument == NULL ? vdf_image_sync(image, 1) : vdf_image_presence_commit(image)) ==
              0);
        for (uint64_t i = 0; i < UNITS; i++) {
            uint64_t old = atomic_load(&known->synced[i]);
            while (old < before[i] &&
                   !atomic_compare_exchange_weak(&known->synced[i], &old, before[i])) {
            }
        }
        atomic_fetch_add(&known->syncs, 1);
    }
    return NULL;
}

static void child(const char *plan)
{
    pthread_t thread;

    shadows = true;
    if (plan != NULL)
        vdf_crash_arm(plan, NULL);
    image = copy_open(&s, VDF_PRESENCE_TRUST);
    for (uintptr_t i = 0; i < WRITERS; i++)
        CHECK(pthread_create(&thread, NULL, write_units, (void *)i) == 0);
    for (uintptr_t i = 0; i < SYNCERS; i++)
        CHECK(pthread_create(&thread, NULL, sync_units, (void *)i) == 0);
    for (uint64_t i = 0;; i++) {
        if (i % 8 == 0)
            copy_fetch(image, START + i / 8 * 5 % (PAGES - 3), 3);
        copy_fetch(image, (4 * i + 1) % (START - 4), 1); /* nobody writes there: always absent */
        vdf_sleep_ns(300 * 1000);
    }
}

/* ---- what is left of it ---------------------------------------------------------------------- */

static void check_unit(uint64_t unit, const uint64_t *words, const uint64_t *base, uint64_t least)
{
    uint64_t most = atomic_load(&known->begun[unit]);

    for (uint64_t i = 0; i < WORDS; i++) {
        bool is_base = words[i] == base[i];
        CHECK((is_base && least == 0) || (words[i] >= least && words[i] <= most && words[i] != 0));
    }
}

/* What is absent is as the base has it; fetched or not. */
static void check_pages(vdf_image *of, const _Atomic uint64_t *least, bool fetch)
{
    uint64_t words[2 * WORDS], base[2 * WORDS];

    for (uint64_t page = 0; page < PAGES; page++) {
        copy_base(START + page, (uint8_t *)base);
        if (fetch)
            copy_read(of, START + page, (uint8_t *)words);
        else if (vdf_image_read(of, (START + page) * VDF_PAGE_SIZE, VDF_PAGE_SIZE,
                                (uint8_t *)words) == -EAGAIN)
            memcpy(words, base, sizeof words);
        for (uint64_t i = 0; i < 2; i++)
            check_unit(2 * page + i, words + i * WORDS, base + i * WORDS,
                       atomic_load(&least[2 * page + i]));
    }
}

static void check_life(void)
{
    image = copy_open(&s, VDF_PRESENCE_TRUST);
    CHECK(!copy_counts(image).rebuilt);
    check_pages(image, known->done, false);
    vdf_image_unref(image);
}

/* Had the host died: the files as they were synced, or the image with all that came after. */
static void check_host(bool all_written)
{
    scratch dead;
    char path[128];

    scratch_make(&dead, SIZE);
    shadow_path(path, "image", atomic_load(&known->image_shadow));
    int fd = open(all_written ? s.file : path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        copy_file(fd, dead.file, START * (uint64_t)VDF_PAGE_SIZE);
        close(fd);
    }
    shadow_path(path, "log", atomic_load(&known->log_shadow));
    fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    snprintf(path, sizeof path, "%s/presence.log", dead.tracks);
    copy_file(fd, path, 0);
    close(fd);
    vdf_image *again = copy_open(&dead, 0);
    CHECK(copy_counts(again).rebuilt);
    check_pages(again, known->synced, true);
    vdf_image_unref(again);
    scratch_remove(&dead);
}

/* A sync that the successor answers covers all that was acknowledged before it came. */
static void sync_after_death(void)
{
    shadows = true;
    image = copy_open(&s, VDF_PRESENCE_TRUST);
    CHECK(vdf_image_sync(image, 1) == 0);
    shadows = false;
    vdf_image_unref(image);
    for (uint64_t i = 0; i < UNITS; i++)
        atomic_store(&known->synced[i], atomic_load(&known->done[i]));
    check_host(false);
}

static void make_anew(void)
{
    memset(known, 0, sizeof *known);
    CHECK(nftw(s.directory, scratch_remove_one, 16, FTW_DEPTH | FTW_PHYS) == 0);
    vdf_core_stop(s.core);
    vdf_core_free(s.core);
    scratch_make(&s, SIZE);
    shadows = true;
    copy_create(&s, SIZE, 0, NULL, 0);
    shadows = false;
}

static void live_and_die(const char *plan, uint64_t *state)
{
    uint64_t syncs = atomic_load(&known->syncs);
    int status = 0;
    pid_t pid = fork();

    CHECK(pid >= 0);
    if (pid == 0)
        child(plan);
    if (plan == NULL) {
        while (atomic_load(&known->syncs) < syncs + 2 && waitpid(pid, NULL, WNOHANG) == 0)
            vdf_sleep_ns(200 * 1000);
        vdf_sleep_ns((long)(scratch_random(state) % (10 * 1000 * 1000)));
        CHECK(kill(pid, SIGKILL) == 0);
    }
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

int main(void)
{
    static const char *const hook[] = {
        "presence.marked", "presence.image-synced", "presence-log.written", "presence-log.synced",
        "fill.written",    "fill.marked",           "change.written"};
    uint64_t state = 4711, syncs = 0;
    char plan[64];

    known = mmap(NULL, sizeof *known, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(known != MAP_FAILED);
    scratch_make(&s, SIZE);
    for (unsigned i = 0; i < ROUNDS; i++) {
        if (i % CHAIN == 0) {
            syncs += atomic_load(&known->syncs);
            make_anew();
        }
        /* Early in a life there is much to fetch and to log: each hook is passed often. */
        snprintf(plan, sizeof plan, "%s:%u", hook[i / CHAIN % (sizeof hook / sizeof *hook)],
                 1 + (unsigned)(scratch_random(&state) % 4));
        live_and_die(i % CHAIN == 0 ? plan : NULL, &state);
        check_host(false);
        check_host(true);
        check_life();
        sync_after_death();
    }
    printf("%llu syncs were acknowledged\n",
           (unsigned long long)(syncs + atomic_load(&known->syncs)));
    munmap(known, sizeof *known);
    scratch_remove(&s);
    return 0;
}
