/*
 * test_memory.c - the first, second, ... allocation of a scenario fails, until none is left to
 * fail: each time one call says ENOMEM, the same call then works, and no mark is missing.
 * The linker puts the functions below in the place of malloc and its kind (CMakeLists.txt).
 */
#include "batches.h"
#include "copies.h"
#include "intents.h"

#include <linux/fuse.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/socket.h>

#define PAGES ((uint64_t)2048) /* two regions of the intent log */
#define SIZE (PAGES * VDF_PAGE_SIZE)

static atomic_long left; /* allocations until one fails; 0 or less: none does */
static atomic_bool has_failed;

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *at, size_t size);
int __real_posix_memalign(void **out, size_t alignment, size_t size);
void *__real_mmap64(void *at, size_t length, int protection, int flags, int fd, off_t offset);

static bool fails(void)
{
    if (atomic_load(&left) <= 0 || atomic_fetch_sub(&left, 1) != 1)
        return false;
    atomic_store(&has_failed, true);
    errno = ENOMEM;
    return true;
}

void *__wrap_malloc(size_t size);
void *__wrap_malloc(size_t size)
{
    return fails() ? NULL : __real_malloc(size);
}

void *__wrap_calloc(size_t count, size_t size);
void *__wrap_calloc(size_t count, size_t size)
{
    return fails() ? NULL : __real_calloc(count, size);
}

void *__wrap_realloc(void *at, size_t size);
void *__wrap_realloc(void *at, size_t size)
{
    return fails() ? NULL : __real_realloc(at, size);
}

int __wrap_posix_memalign(void **out, size_t alignment, size_t size);
int __wrap_posix_memalign(void **out, size_t alignment, size_t size)
{
    return fails() ? ENOMEM : __real_posix_memalign(out, alignment, size);
}

void *__wrap_mmap64(void *at, size_t length, int protection, int flags, int fd, off_t offset);
void *__wrap_mmap64(void *at, size_t length, int protection, int flags, int fd, off_t offset)
{
    return fails() ? MAP_FAILED : __real_mmap64(at, length, protection, flags, fd, offset);
}

/* True: it is to be done again, because an allocation failed in it. */
static bool again(int64_t error)
{
    if (error != -ENOMEM)
        return false;
    CHECK(atomic_load(&has_failed) && atomic_load(&left) <= 0);
    return true;
}

#define TRY(call)                                                                                  \
    do {                                                                                           \
        int64_t error_ = (call);                                                                   \
        CHECK((again(error_) ? (call) : error_) == 0);                                             \
    } while (0)

/* Runs it with each allocation failing in turn; returns how many there are. */
static long each(void (*scenario)(void))
{
    long number = 0;

    do {
        atomic_store(&has_failed, false);
        atomic_store(&left, ++number);
        scenario();
        atomic_store(&left, 0);
        CHECK(number < 10000);
    } while (atomic_load(&has_failed));
    return number - 1;
}

/* ---- a tracked image ------------------------------------------------------------------------ */

static uint8_t expected[PAGES + 1024][VDF_PAGE_SIZE];
static batch_page captured[PAGES + 1024];
static bool changed[PAGES + 1024];
static uint8_t bytes[64 * VDF_PAGE_SIZE];

static void note(uint64_t offset, uint64_t length, int byte)
{
    memset((uint8_t *)expected + offset, byte, length);
    for (uint64_t page = offset / VDF_PAGE_SIZE; page <= (offset + length - 1) / VDF_PAGE_SIZE;
         page++)
        changed[page] = true;
}

static void put(vdf_image *image, uint64_t offset, uint64_t length, int byte)
{
    memset(bytes, byte, length);
    TRY(vdf_image_write(image, offset, length, bytes));
    note(offset, length, byte);
}

static void discard(vdf_image *image, uint64_t page, uint64_t count)
{
    TRY(vdf_image_allocate(image, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, page * VDF_PAGE_SIZE,
                           count * VDF_PAGE_SIZE));
    note(page * VDF_PAGE_SIZE, count * VDF_PAGE_SIZE, 0);
}

static void check_marks(vdf_image *image, uint64_t pages)
{
    for (uint64_t page = 0; page < pages; page++)
        CHECK(!changed[page] || vdf_track_is_changed(image, page) == 1);
}

static void check_bytes(vdf_image *image, uint64_t pages)
{
    for (uint64_t page = 0; page < pages; page++) {
        CHECK(vdf_image_read(image, page * VDF_PAGE_SIZE, VDF_PAGE_SIZE, bytes) == VDF_PAGE_SIZE);
        CHECK(memcmp(bytes, expected[page], VDF_PAGE_SIZE) == 0);
    }
}

/* As image.py opens it: half of a new one is taken away. */
static void open_track(scratch *s, uint64_t size)
{
    char path[128];
    snprintf(path, sizeof path, "%s/track", s->tracks);
    unsigned flags = access(path, F_OK) == 0 ? 0 : VDF_TRACK_NEW;
    int error = vdf_track_open_slots(s->tracks, size, flags, SLOTS, &s->track);

    if (!again(error)) {
        CHECK(error == 0);
        return;
    }
    if (flags == VDF_TRACK_NEW) {
        CHECK(nftw(s->tracks, scratch_remove_one, 16, FTW_DEPTH | FTW_PHYS) == 0);
        CHECK(mkdir(s->tracks, 0700) == 0);
    }
    CHECK(vdf_track_open_slots(s->tracks, size, flags, SLOTS, &s->track) == 0);
}

static void open_image(scratch *s, uint64_t size)
{
    int fd = open(s->file, O_RDWR | O_CLOEXEC);

    CHECK(fd >= 0);
    TRY(vdf_image_create(s->core, fd, 0, 7, &s->image));
    close(fd);
    open_track(s, size);
    TRY(vdf_image_set_track(s->image, s->track));
}

/* What the epoch changed, laid over what was there before it, is what was there at its seal. */
static void capture(vdf_image *image, uint64_t pages)
{
    uint64_t pageno[64], sum[64], cursor = 0;
    static uint8_t data[64 * VDF_PAGE_SIZE];
    uint8_t zero[64];
    vdf_batch batch = {
        .pageno = pageno, .sum = sum, .zero = zero, .data = data, .capacity = 64, .count = 1};

    while (batch.count != 0) {
        TRY(vdf_capture_next(image, &cursor, &batch));
        batch_lay(&batch, captured, pages);
    }
}

static void tracked(void)
{
    const uint64_t more = PAGES + 1024;
    static uint8_t sealed[sizeof expected];
    vdf_seal seal;
    scratch s;

    memset(expected, 0, sizeof expected);
    memset(captured, 0, sizeof captured);
    memset(changed, 0, sizeof changed);
    long armed = atomic_exchange(&left, 0);
    scratch_make(&s, SIZE);
    vdf_core_stop(s.core);
    vdf_core_free(s.core);
    atomic_store(&left, armed);

    TRY(vdf_core_create(-1, 1, 0, &s.core));
    open_image(&s, SIZE);
    TRY(vdf_image_begin_intent(s.image));
    put(s.image, 0, VDF_PAGE_SIZE, 1);
    put(s.image, 5 * VDF_PAGE_SIZE - 10, 20, 2);
    put(s.image, 1500 * VDF_PAGE_SIZE, 40 * VDF_PAGE_SIZE, 3);
    discard(s.image, 1510, 5);
    check_marks(s.image, PAGES);

    TRY(vdf_seal_images(&s.image, 1, &seal));
    memcpy(sealed, expected, sizeof sealed);
    check_marks(s.image, PAGES);
    put(s.image, 1505 * VDF_PAGE_SIZE, 10 * VDF_PAGE_SIZE, 4); /* some are frozen: preserved */
    TRY(vdf_image_truncate(s.image, more * VDF_PAGE_SIZE));
    put(s.image, (more - 1) * VDF_PAGE_SIZE, VDF_PAGE_SIZE, 5);
    capture(s.image, PAGES);
    CHECK(memcmp(captured, sealed, SIZE) == 0);
    memset(changed, 0, sizeof changed);
    for (uint64_t page = 1505; page < 1515; page++)
        changed[page] = true;
    changed[more - 1] = true;
    TRY(vdf_capture_forget(s.image));
    check_marks(s.image, more);
    TRY(vdf_image_sync(s.image, 1));

    scratch_close(&s);
    open_image(&s, more * VDF_PAGE_SIZE);
    check_marks(s.image, more);
    check_bytes(s.image, more);
    TRY(vdf_suspect_mark(s.image, 0, 2 * VDF_PAGE_SIZE));
    TRY(vdf_seal_images(&s.image, 1, &seal));
    capture(s.image, more);
    CHECK(memcmp(captured, expected, sizeof expected) == 0);
    TRY(vdf_capture_abandon(s.image));
    check_marks(s.image, more);
    scratch_close(&s);
    scratch_remove(&s);
}

/* ---- after the death of the host ------------------------------------------------------------ */

static scratch died;

static void recovered(void)
{
    static uint64_t region[VDF_INTENT_MAX];
    vdf_recovery found = {.region = region, .capacity = VDF_INTENT_MAX};

    TRY(vdf_track_recover(died.tracks, SIZE, 0, 9, SIZE, &found));
    CHECK(found.regions == 2); /* in each turn: opening the track has not made the log void */
    open_image(&died, SIZE);
    for (uint64_t page = 0; page < PAGES; page++)
        CHECK(!changed[page] || vdf_bitmap_test(&died.track->suspect, page));
    scratch_close(&died);
}

/* ---- a writable copy of a point ------------------------------------------------------------- */

static void open_copy(scratch *s)
{
    int fd = open(s->file, O_RDWR | O_CLOEXEC), dir = copy_dir(s);
    int error;

    CHECK(fd >= 0);
    do { /* after an error the image is of no use */
        TRY(vdf_image_create(s->core, fd, VDF_IMAGE_LAZY, 7, &s->image));
        error = vdf_image_presence_open(s->image, dir, 0);
        if (error != 0)
            vdf_image_unref(s->image);
    } while (again(error));
    CHECK(error == 0);
    close(fd);
    close(dir);
}

static void copied(void)
{
    long armed = atomic_exchange(&left, 0);
    uint64_t words[VDF_REGION_WORDS];
    scratch s;

    memset(words, 0xff, sizeof words);
    scratch_make(&s, SIZE);
    int dir = copy_dir(&s);
    atomic_store(&left, armed);

    TRY(vdf_presence_create(dir, SIZE, 0, NULL, 0));
    open_copy(&s);
    TRY(vdf_image_map(s.image, 0, 1, words));
    copy_base(9, bytes);
    TRY(vdf_image_fill(s.image, 9 * VDF_PAGE_SIZE, VDF_PAGE_SIZE, bytes, NULL));
    for (uint64_t page = 100; page < PAGES; page += 2) /* runs, so that the log needs room */
        TRY(copy_put(s.image, page * VDF_PAGE_SIZE, VDF_PAGE_SIZE, 6));
    TRY(vdf_image_sync(s.image, 1));
    vdf_image_unref(s.image);
    open_copy(&s);
    copy_check_base(s.image, 9);
    copy_check_base(s.image, 101);
    for (uint64_t page = 100; page < PAGES; page += 2)
        copy_check_byte(s.image, page, 6);
    vdf_image_unref(s.image);
    close(dir);
    scratch_remove(&s);
}

/* ---- requests ------------------------------------------------------------------------------- */

static scratch asked;
static int kernel;

/* Sends a request; -ENOMEM: it could not be kept. 0: it was answered, or waits (an event). */
static int32_t ask(uint32_t opcode, uint64_t nodeid, const void *body, size_t size)
{
    static uint64_t unique = 1000;
    uint8_t message[256], answer[8 * VDF_PAGE_SIZE];
    struct fuse_in_header in = {.len = (uint32_t)(sizeof in + size),
                                .opcode = opcode,
                                .unique = unique += 2,
                                .nodeid = nodeid};
    struct fuse_out_header out;
    struct fuse_open_out flags;
    struct pollfd poller[] = {{.fd = kernel, .events = POLLIN},
                              {.fd = vdf_core_event_fd(asked.core), .events = POLLIN},
                              {.fd = vdf_core_names_fd(asked.core), .events = POLLIN}};
    vdf_event event;

    memcpy(message, &in, sizeof in);
    memcpy(message + sizeof in, body, size);
    CHECK(send(kernel, message, in.len, 0) == (ssize_t)in.len);
    while (poll(poller, 3, 10000) > 0) {
        if (poller[0].revents) {
            CHECK(recv(kernel, answer, sizeof answer, 0) >= (ssize_t)sizeof out);
            memcpy(&out, answer, sizeof out);
            memcpy(&flags, answer + sizeof out, sizeof flags);
            CHECK(out.unique == in.unique);
            CHECK(opcode != FUSE_OPEN || out.error != 0 || flags.open_flags & FOPEN_KEEP_CACHE);
            return out.error;
        }
        if (poller[2].revents) { /* as libfuse: an answer of zeros */
            CHECK(recv(poller[2].fd, answer, sizeof answer, 0) > 0);
            memset(answer, 0, sizeof answer);
            out = (struct fuse_out_header){.len = sizeof out + sizeof(struct fuse_open_out),
                                           .unique = in.unique};
            memcpy(answer, &out, sizeof out);
            CHECK(send(poller[2].fd, answer, out.len, 0) == (ssize_t)out.len);
            continue;
        }
        uint64_t count;
        CHECK(read(poller[1].fd, &count, sizeof count) == sizeof count);
        while (vdf_core_next_event(asked.core, &event) == 1) {
            CHECK(event.kind == VDF_EVENT_WANT);
            memset(bytes, 8, VDF_PAGE_SIZE);
            CHECK(vdf_image_fill(asked.image, event.offset, event.length, bytes, NULL) == 0);
            CHECK(vdf_image_answer(asked.image, event.offset, event.length, 0) == 0);
        }
    }
    CHECK(false); /* neither an answer nor an event */
    return 0;
}

static void begin_asking(void)
{
    const unsigned flags = VDF_IMAGE_LAZY | VDF_IMAGE_READONLY | VDF_IMAGE_KEEP_CACHE;
    uint64_t words[VDF_REGION_WORDS] = {0xff};
    long armed = atomic_exchange(&left, 0);
    struct timeval patience = {.tv_sec = 10};
    int pair[2];

    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    kernel = pair[0];
    setsockopt(kernel, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    scratch_make(&asked, SIZE);
    vdf_core_stop(asked.core);
    vdf_core_free(asked.core);
    atomic_store(&left, armed);

    TRY(vdf_core_create(pair[1], 1, 0, &asked.core));
    int fd = open(asked.file, O_RDWR | O_CLOEXEC);
    TRY(vdf_image_create(asked.core, fd, flags, 7, &asked.image));
    close(fd);
    TRY(vdf_image_map(asked.image, 0, 1, words));
    TRY(vdf_core_attach(asked.core, 5, asked.image));
    TRY(vdf_core_start(asked.core));
}

static void end_asking(void)
{
    vdf_core_stop(asked.core);
    vdf_image_unref(asked.image);
    close(kernel);
    scratch_remove(&asked);
}

static void requested(void)
{
    struct fuse_read_in read = {.offset = 3 * VDF_PAGE_SIZE, .size = VDF_PAGE_SIZE};
    struct fuse_open_in opened = {.flags = O_RDWR};
    struct fuse_out_header told = {.len = sizeof told, .error = FUSE_NOTIFY_INVAL_INODE}, heard;
    begin_asking();
    for (int i = 0; i < 2; i++) { /* the first one waits for the page, the second one has it */
        TRY(ask(FUSE_READ, 5, &read, sizeof read));
        TRY(ask(FUSE_OPEN, 5, &opened, sizeof opened));
    }
    /* What libfuse tells the kernel arrives there. */
    CHECK(send(vdf_core_names_fd(asked.core), &told, sizeof told, 0) == sizeof told);
    CHECK(recv(kernel, &heard, sizeof heard, 0) == sizeof heard);
    CHECK(memcmp(&told, &heard, sizeof told) == 0);
    end_asking();
}

#define EVENTS 1024 /* for which there is room at the start */

static void *hear_all(void *argument)
{
    struct fuse_out_header out;

    for (uint64_t number = 0; number < EVENTS; number++)
        CHECK(recv(kernel, &out, sizeof out, 0) == sizeof out && out.error == -EIO);
    return argument;
}

static void a_request_that_nobody_can_be_told_of_is_refused(void)
{
    struct {
        struct fuse_in_header in;
        struct fuse_read_in read;
    } one = {.in = {.len = sizeof one, .opcode = FUSE_READ, .nodeid = 5},
             .read = {.size = VDF_PAGE_SIZE}};
    struct fuse_out_header out;
    vdf_core_counts now;
    uint64_t waited = 0;
    pthread_t hearer;

    begin_asking();
    for (uint64_t number = 1; number <= EVENTS + 1; number++) {
        one.in.unique = 2 * number;
        if (number == EVENTS + 1)
            atomic_store(&left, 2); /* of the request's copy, and of the room for its event */
        CHECK(send(kernel, &one, sizeof one, 0) == sizeof one);
        for (now.parked = 0; number <= EVENTS && now.parked < number; waited++) {
            vdf_core_counts_get(asked.core, &now);
            CHECK(waited < 1000000);
            sched_yield();
        }
    }
    CHECK(recv(kernel, &out, sizeof out, 0) == sizeof out);
    CHECK(out.unique == one.in.unique && out.error == -ENOMEM);
    vdf_core_counts_get(asked.core, &now);
    CHECK(now.parked == EVENTS && atomic_load(&left) == 0);
    CHECK(pthread_create(&hearer, NULL, hear_all, NULL) == 0);
    CHECK(vdf_image_answer(asked.image, 0, 1, EIO) == 0);
    CHECK(pthread_join(hearer, NULL) == 0);
    end_asking();
}

/* ---- one by one ----------------------------------------------------------------------------- */

static void check_each(const char *what, void (*scenario)(void), long least)
{
    long count = each(scenario);

    printf("%s: %ld allocations, each has failed once\n", what, count);
    CHECK(count >= least);
}

static void no_mark_and_no_byte_is_lost(void)
{
    check_each("a tracked image", tracked, 50);
}

static void a_copy_holds_what_was_written(void)
{
    check_each("a copy of a point", copied, 40);
}

static void each_request_is_answered(void)
{
    check_each("requests", requested, 15);
}

static void a_log_is_not_given_up(void)
{
    memset(changed, 0, sizeof changed);
    begin(&died, SIZE, true);
    put(died.image, 0, VDF_PAGE_SIZE, 1);
    put(died.image, 1500 * VDF_PAGE_SIZE, VDF_PAGE_SIZE, 1);
    scratch_close(&died);
    check_each("after the host's death", recovered, 30);
    scratch_remove(&died);
}

int main(void)
{
    no_mark_and_no_byte_is_lost();
    a_copy_holds_what_was_written();
    each_request_is_answered();
    a_log_is_not_given_up();
    a_request_that_nobody_can_be_told_of_is_refused();
    return 0;
}
