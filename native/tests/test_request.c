/*
 * test_request.c - requests as the kernel sends them, over a socket in place of /dev/fuse:
 * data, parking, malformed messages, names passed on, stopping.
 */
#include "internal.h"
#include "scratch.h"

#include <linux/fuse.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>

#define SIZE (4 * (uint64_t)VDF_PAGE_SIZE)

typedef struct answer {
    struct fuse_out_header out;
    uint8_t body[2 * VDF_PAGE_SIZE];
} answer;

static scratch s;
static int kernel; /* our end */
static vdf_core *core;

/* The quota of the image's file system is used up: this is in the place of pwrite. */
static atomic_bool at_quota;

ssize_t __real_pwrite64(int fd, const void *data, size_t length, off_t offset);
ssize_t __wrap_pwrite64(int fd, const void *data, size_t length, off_t offset);
ssize_t __wrap_pwrite64(int fd, const void *data, size_t length, off_t offset)
{
    if (!atomic_load(&at_quota))
        return __real_pwrite64(fd, data, length, offset);
    errno = EDQUOT;
    return -1;
}

static void ask(uint32_t opcode, uint64_t nodeid, uint64_t unique, const void *body, size_t size)
{
    static uint8_t message[256 * 1024];
    struct fuse_in_header in = {
        .len = (uint32_t)(sizeof in + size), .opcode = opcode, .unique = unique, .nodeid = nodeid};

    CHECK(sizeof in + size <= sizeof message);
    memcpy(message, &in, sizeof in);
    if (size != 0)
        memcpy(message + sizeof in, body, size);
    CHECK(send(kernel, message, sizeof in + size, 0) == (ssize_t)(sizeof in + size));
}

static answer heard(uint64_t unique)
{
    answer got;
    ssize_t length = recv(kernel, &got, sizeof got, 0);

    CHECK(length >= (ssize_t)sizeof got.out && got.out.len == (uint32_t)length);
    CHECK(got.out.unique == unique);
    return got;
}

static int32_t error_of(uint32_t opcode, const void *body, size_t size)
{
    static uint64_t unique = 1000;

    unique += 2;
    ask(opcode, 5, unique, body, size);
    return heard(unique).out.error;
}

static void data_requests(void)
{
    struct {
        struct fuse_write_in in;
        uint8_t data[16];
    } write = {.in = {.offset = 100, .size = 10}, .data = "0123456789"};
    struct fuse_read_in read = {.offset = 102, .size = 4096};

    CHECK(error_of(FUSE_WRITE, &write, sizeof write) == 0);
    ask(FUSE_READ, 5, 2, &read, sizeof read);
    answer got = heard(2);
    CHECK(got.out.error == 0 && got.out.len == sizeof got.out + 4096);
    CHECK(memcmp(got.body, "23456789", 9) == 0);
    read.offset = SIZE;
    ask(FUSE_READ, 5, 4, &read, sizeof read);
    got = heard(4);
    CHECK(got.out.error == 0 && got.out.len == sizeof got.out);
    read.offset = UINT64_MAX;
    CHECK(error_of(FUSE_READ, &read, sizeof read) < 0);

    /* More data promised than there is; far away; short; no node. */
    write.in.size = sizeof write.data + 1;
    CHECK(error_of(FUSE_WRITE, &write, sizeof write) == -EINVAL);
    write.in.size = UINT32_MAX;
    CHECK(error_of(FUSE_WRITE, &write, sizeof write) == -EINVAL);
    write.in.size = 10;
    write.in.offset = (uint64_t)INT64_MAX - 5;
    CHECK(error_of(FUSE_WRITE, &write, sizeof write) == -EFBIG);
    const uint32_t ours[] = {FUSE_READ,  FUSE_WRITE,     FUSE_FSYNC,
                             FUSE_FLUSH, FUSE_FALLOCATE, FUSE_LSEEK};
    for (size_t i = 0; i < sizeof ours / sizeof *ours; i++) {
        CHECK(error_of(ours[i], &write, 7) == -EINVAL);
        ask(ours[i], 6, 6, &write, sizeof write);
        CHECK(heard(6).out.error == (ours[i] == FUSE_FLUSH ? 0 : -EBADF));
    }
    struct fuse_fallocate_in allocate = {.offset = UINT64_MAX - 1, .length = UINT64_MAX};
    CHECK(error_of(FUSE_FALLOCATE, &allocate, sizeof allocate) == -EFBIG);
    allocate.mode = UINT32_MAX;
    allocate.offset = 0;
    allocate.length = 1;
    CHECK(error_of(FUSE_FALLOCATE, &allocate, sizeof allocate) == -EOPNOTSUPP);
    struct fuse_lseek_in seek = {.offset = UINT64_MAX, .whence = SEEK_HOLE};
    CHECK(error_of(FUSE_LSEEK, &seek, sizeof seek) == -ENXIO);
    seek.whence = 77;
    CHECK(error_of(FUSE_LSEEK, &seek, sizeof seek) == -EINVAL);
    struct fuse_fsync_in fsync = {.fsync_flags = 1};
    CHECK(error_of(FUSE_FSYNC, &fsync, sizeof fsync) == 0);
    CHECK(error_of(FUSE_COPY_FILE_RANGE, NULL, 0) == -ENOSYS);
    /* Less than a header: nobody to answer. */
    CHECK(send(kernel, &seek, 9, 0) == 9);
    CHECK(error_of(FUSE_FSYNC, &fsync, sizeof fsync) == 0);
}

static vdf_event next_event(void)
{
    vdf_event event;
    struct pollfd poller = {.fd = vdf_core_event_fd(core), .events = POLLIN};
    uint64_t count;

    while (vdf_core_next_event(core, &event) == 0) {
        CHECK(poll(&poller, 1, 5000) == 1);
        CHECK(read(poller.fd, &count, sizeof count) == sizeof count);
    }
    return event;
}

static void parked_requests(void)
{
    uint64_t words[VDF_REGION_WORDS] = {0x7};
    uint8_t data[2 * VDF_PAGE_SIZE];
    vdf_image *lazy = scratch_image(&s, VDF_IMAGE_LAZY | VDF_IMAGE_READONLY, O_RDWR);
    struct fuse_read_in read = {.offset = 0, .size = 4096};
    struct fuse_lseek_in seek = {.offset = 0, .whence = SEEK_DATA};
    struct fuse_interrupt_in interrupt = {.unique = 14};
    vdf_core_counts counts;

    CHECK(vdf_core_attach(core, 8, lazy) == 0);
    ask(FUSE_LSEEK, 8, 10, &seek, sizeof seek);
    vdf_event event = next_event();
    CHECK(event.kind == VDF_EVENT_SEEK && event.cookie == 7 && event.offset == 0);
    CHECK(vdf_image_map(lazy, 0, 1, words) == 0);
    CHECK(vdf_image_answer(lazy, 0, 1, 0) == 0);
    CHECK(heard(10).out.error == 0);
    ask(FUSE_READ, 8, 12, &read, sizeof read);
    event = next_event();
    CHECK(event.kind == VDF_EVENT_WANT && event.length == 4096);
    memset(data, 3, sizeof data);
    CHECK(vdf_image_fill(lazy, 0, 4096, data, NULL) == 0);
    CHECK(vdf_image_answer(lazy, 0, 4096, 0) == 0);
    answer got = heard(12);
    CHECK(got.out.error == 0 && got.body[0] == 3 && got.body[4095] == 3);
    read.offset = 4096;
    ask(FUSE_READ, 8, 14, &read, sizeof read);
    next_event();
    vdf_core_counts_get(core, &counts);
    CHECK(counts.parked == 1);
    ask(FUSE_INTERRUPT, 0, 15, &interrupt, sizeof interrupt);
    CHECK(heard(14).out.error == -EINTR);
    ask(FUSE_READ, 8, 16, &read, sizeof read);
    next_event();
    CHECK(vdf_image_answer(lazy, 4096, 1, EIO) == 0);
    CHECK(heard(16).out.error == -EIO);
    /* One is left to the end: stopping answers it. Its image lives as long as it waits. */
    ask(FUSE_READ, 8, 18, &read, sizeof read);
    next_event();
    CHECK(vdf_core_detach(core, 8) == 0 && vdf_core_detach(core, 8) == -ENOENT);
    vdf_image_unref(lazy);
}

/* The image's file system is full: what waits is run once more, and once only. */
static void spaceless_requests(vdf_image *image)
{
    struct {
        struct fuse_write_in in;
        uint8_t data[8];
    } write = {.in = {.offset = 64, .size = 8}, .data = "is there"};
    struct fuse_read_in read = {.offset = 64, .size = 8};
    struct fuse_interrupt_in interrupt = {.unique = 30};
    int full = open("/dev/full", O_RDWR | O_CLOEXEC);
    int whole = dup(image->fd);
    struct pollfd poller = {.fd = kernel, .events = POLLIN};

    CHECK(full >= 0 && whole >= 0 && dup3(full, image->fd, O_CLOEXEC) >= 0);
    ask(FUSE_WRITE, 5, 30, &write, sizeof write);
    vdf_event event = next_event();
    CHECK(event.kind == VDF_EVENT_NO_ROOM && event.cookie == 7 && event.length == 8);
    /* Some of it may be written: it goes on, whoever interrupts it. */
    ask(FUSE_INTERRUPT, 0, 31, &interrupt, sizeof interrupt);
    CHECK(poll(&poller, 1, 100) == 0);
    CHECK(dup3(whole, image->fd, O_CLOEXEC) >= 0);
    CHECK(vdf_core_try_again(core) == 0);
    CHECK(heard(30).out.error == 0);
    ask(FUSE_READ, 5, 32, &read, sizeof read);
    CHECK(memcmp(heard(32).body, "is there", 8) == 0);

    CHECK(dup3(full, image->fd, O_CLOEXEC) >= 0);
    ask(FUSE_WRITE, 5, 34, &write, sizeof write);
    next_event();
    CHECK(poll(&poller, 1, 0) == 0);
    CHECK(vdf_core_try_again(core) == 0);
    CHECK(heard(34).out.error == -ENOSPC);
    CHECK(dup3(whole, image->fd, O_CLOEXEC) >= 0);

    /* So it is with a quota. */
    atomic_store(&at_quota, true);
    ask(FUSE_WRITE, 5, 36, &write, sizeof write);
    event = next_event();
    CHECK(event.kind == VDF_EVENT_NO_ROOM && event.length == 8);
    atomic_store(&at_quota, false);
    CHECK(vdf_core_try_again(core) == 0);
    CHECK(heard(36).out.error == 0);
    atomic_store(&at_quota, true);
    ask(FUSE_WRITE, 5, 38, &write, sizeof write);
    next_event();
    CHECK(vdf_core_try_again(core) == 0);
    CHECK(heard(38).out.error == -EDQUOT);
    atomic_store(&at_quota, false);
    close(full);
    close(whole);
    CHECK(atomic_load(&core->parked_bytes) == 0);
}

static void names_requests(void)
{
    static struct {
        struct fuse_batch_forget_in in;
        struct fuse_forget_one one[10000];
    } forgets = {.in = {.count = 10000}};
    static uint8_t message[VDF_BUFFER_SIZE];
    int names = vdf_core_names_fd(core);
    uint64_t seen = 0;

    for (uint64_t i = 0; i < 10000; i++)
        forgets.one[i].nodeid = i + 1;
    ask(FUSE_BATCH_FORGET, 0, 20, &forgets, sizeof forgets);
    while (seen < 10000) {
        struct fuse_in_header in;
        struct fuse_batch_forget_in part;
        ssize_t length = recv(names, message, sizeof message, 0);
        CHECK(length > 0 && length <= 128 * 1024);
        memcpy(&in, message, sizeof in);
        memcpy(&part, message + sizeof in, sizeof part);
        CHECK(in.len == (uint32_t)length && in.opcode == FUSE_BATCH_FORGET);
        CHECK(in.len == sizeof in + sizeof part + part.count * sizeof(struct fuse_forget_one));
        for (uint32_t i = 0; i < part.count; i++) {
            struct fuse_forget_one one;
            memcpy(&one, message + sizeof in + sizeof part + i * sizeof one, sizeof one);
            CHECK(one.nodeid == ++seen);
        }
    }
    forgets.in.count = UINT32_MAX; /* more than there are */
    ask(FUSE_BATCH_FORGET, 0, 22, &forgets, sizeof forgets.in + sizeof forgets.one[0]);
    CHECK(recv(names, message, sizeof message, 0) ==
          sizeof(struct fuse_in_header) + sizeof forgets.in + sizeof forgets.one[0]);

    /* An INIT as 5.x kernels send it: 16 bytes; the reply is rewritten. */
    const uint32_t init[4] = {7, 31, 131072, FUSE_ASYNC_READ | FUSE_MAX_PAGES};
    ask(FUSE_INIT, 0, 24, init, sizeof init);
    CHECK(recv(names, message, sizeof message, 0) == sizeof(struct fuse_in_header) + 16);
    struct {
        struct fuse_out_header out;
        struct fuse_init_out init;
    } reply = {.out = {.len = sizeof reply, .unique = 24},
               .init = {.major = 7, .minor = 31, .flags = FUSE_WRITEBACK_CACHE}};
    CHECK(send(names, &reply, sizeof reply, 0) == sizeof reply);
    answer got = heard(24);
    memcpy(&reply.init, got.body, sizeof reply.init);
    CHECK(reply.init.flags == (FUSE_ASYNC_READ | FUSE_MAX_PAGES));
    CHECK(reply.init.max_background == 65535 && reply.init.max_write == VDF_REQUEST_MAX);
}

int main(void)
{
    int pair[2];

    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    kernel = pair[0];
    struct timeval patience = {.tv_sec = 10};
    int room = 1 << 20;
    setsockopt(kernel, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(kernel, SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
    scratch_make(&s, SIZE);
    CHECK(vdf_core_start(s.core) == -EINVAL); /* it has no connection */
    vdf_core_stop(s.core);
    vdf_core_free(s.core);
    CHECK(vdf_core_create(pair[1], 2, VDF_CORE_ASK_ROOM, &core) == 0);
    s.core = core;
    vdf_image *image = scratch_image(&s, 0, O_RDWR);
    CHECK(vdf_core_attach(core, 5, image) == 0);
    vdf_image_unref(image); /* the node keeps it */
    CHECK(vdf_core_start(core) == 0);
    data_requests();
    spaceless_requests(image);
    parked_requests();
    names_requests();
    vdf_core_stop(core);
    CHECK(heard(18).out.error == -EIO);
    CHECK(next_event().kind == VDF_EVENT_ENDED);
    close(kernel);
    scratch_remove(&s);
    return 0;
}
