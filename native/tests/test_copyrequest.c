/*
 * test_copyrequest.c - requests as the kernel sends them to a writable lazy image, over a
 * socket in place of /dev/fuse: those that need pages that are not here wait, and are run
 * once, whole, when the pages came.
 */
#include "copies.h"

#include <linux/falloc.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sys/socket.h>

#define PAGES 64
#define SIZE (PAGES * (uint64_t)VDF_PAGE_SIZE)
#define AT(page) ((page) * (uint64_t)VDF_PAGE_SIZE)

static scratch s;
static int kernel; /* our end */
static vdf_image *image;

static void ask(uint32_t opcode, uint64_t unique, const void *body, size_t size)
{
    static uint8_t message[128 * 1024];
    struct fuse_in_header in = {
        .len = (uint32_t)(sizeof in + size), .opcode = opcode, .unique = unique, .nodeid = 5};

    CHECK(sizeof in + size <= sizeof message);
    memcpy(message, &in, sizeof in);
    memcpy(message + sizeof in, body, size);
    CHECK(send(kernel, message, sizeof in + size, 0) == (ssize_t)(sizeof in + size));
}

static void ask_write(uint64_t unique, uint64_t offset, uint32_t length, int byte)
{
    static uint8_t body[sizeof(struct fuse_write_in) + 16 * VDF_PAGE_SIZE];
    struct fuse_write_in in = {.offset = offset, .size = length};

    memcpy(body, &in, sizeof in);
    memset(body + sizeof in, byte, length);
    ask(FUSE_WRITE, unique, body, sizeof in + length);
}

/* The answer to this request; `size`: what a WRITE says was written. */
static int32_t heard(uint64_t unique, uint32_t *size)
{
    struct {
        struct fuse_out_header out;
        struct fuse_write_out write;
        uint8_t rest[VDF_PAGE_SIZE];
    } got;
    ssize_t length = recv(kernel, &got, sizeof got, 0);

    CHECK(length >= (ssize_t)sizeof got.out && got.out.len == (uint32_t)length);
    CHECK(got.out.unique == unique);
    if (size != NULL && got.out.error == 0)
        *size = got.write.size;
    return got.out.error;
}

static void is_silent(void)
{
    struct pollfd poller = {.fd = kernel, .events = POLLIN};

    CHECK(poll(&poller, 1, 0) == 0);
}

static void wanted(uint64_t page, uint64_t count)
{
    vdf_event event;
    struct pollfd poller = {.fd = vdf_core_event_fd(s.core), .events = POLLIN};
    uint64_t number;

    while (vdf_core_next_event(s.core, &event) == 0) {
        CHECK(poll(&poller, 1, 5000) == 1);
        CHECK(read(poller.fd, &number, sizeof number) == sizeof number);
    }
    CHECK(event.kind == VDF_EVENT_WANT && event.cookie == 7);
    CHECK(event.offset == AT(page) && event.length == AT(count));
}

static void none_wanted(void)
{
    vdf_event event;

    CHECK(vdf_core_next_event(s.core, &event) == 0);
}

static void give(uint64_t page, uint64_t count)
{
    copy_fetch(image, page, count);
    CHECK(vdf_image_answer(image, AT(page), AT(count), 0) == 0);
}

static uint64_t parked(void)
{
    vdf_core_counts counts;

    vdf_core_counts_get(s.core, &counts);
    return counts.parked;
}

static void expect(uint64_t page, uint64_t from, uint64_t to, int byte)
{
    uint8_t data[VDF_PAGE_SIZE];

    copy_base(page, data);
    memset(data + from, byte, to - from);
    copy_check(image, page, data);
}

static void writes(void)
{
    uint32_t size = 0;

    ask_write(2, AT(1), (uint32_t)AT(2), 1); /* whole pages: at once */
    CHECK(heard(2, &size) == 0 && size == AT(2));
    ask_write(4, AT(5) + 100, (uint32_t)AT(4), 2);
    wanted(5, 1);
    wanted(9, 1);
    none_wanted();
    /* Nothing of it is written before all can be. */
    CHECK(!vdf_image_is_present(image, AT(6), AT(1)) && parked() == 1);
    give(5, 1);
    is_silent();
    CHECK(!vdf_image_is_present(image, AT(6), AT(1)));
    give(9, 1);
    CHECK(heard(4, &size) == 0 && size == AT(4) && parked() == 0);
    expect(5, 100, VDF_PAGE_SIZE, 2);
    copy_check_byte(image, 7, 2);
    expect(9, 0, 100, 2);
    CHECK(atomic_load(&s.core->parked_bytes) == 0);
    /* Answered with nothing filled in: asked for again. */
    ask_write(6, AT(13) + 1, 10, 3);
    wanted(13, 1);
    CHECK(vdf_image_answer(image, AT(13), 1, 0) == 0);
    wanted(13, 1);
    /* Written to as a whole meanwhile: there is nothing left to wait for. */
    ask_write(8, AT(13), (uint32_t)AT(1), 4);
    CHECK(heard(8, &size) == 0);
    CHECK(vdf_image_answer(image, AT(13), 1, 0) == 0);
    CHECK(heard(6, &size) == 0 && size == 10);
    uint8_t page[VDF_PAGE_SIZE];
    memset(page, 4, sizeof page);
    memset(page + 1, 3, 10);
    copy_check(image, 13, page);
    /* Two answers to a request of two wants, one of them an error. */
    ask_write(10, AT(17) + 1, (uint32_t)AT(4), 5);
    wanted(17, 1);
    wanted(21, 1);
    CHECK(vdf_image_answer(image, AT(21), AT(1), EIO) == 0);
    CHECK(heard(10, NULL) == -EIO && parked() == 0);
    CHECK(!vdf_image_is_present(image, AT(18), AT(1)));
}

static void interrupts(void)
{
    struct fuse_interrupt_in in = {.unique = 12};

    ask_write(12, AT(17) + 1, (uint32_t)AT(4), 5);
    wanted(17, 1);
    wanted(21, 1);
    ask(FUSE_INTERRUPT, 13, &in, sizeof in);
    CHECK(heard(12, NULL) == -EINTR && parked() == 0);
    CHECK(!vdf_image_is_present(image, AT(18), AT(1)));
}

/* Beyond the bound only the ends of a request are kept. */
static void bounded(void)
{
    struct fuse_interrupt_in in = {.unique = 14};
    uint32_t size = 0;

    atomic_fetch_add(&s.core->parked_bytes, VDF_PARK_BYTES);
    ask_write(14, AT(25) + 10, (uint32_t)AT(9), 6);
    wanted(25, 1);
    wanted(34, 1);
    CHECK(vdf_image_is_present(image, AT(26), AT(8)) && !vdf_image_is_present(image, AT(25), 1));
    CHECK(atomic_load(&s.core->parked_bytes) == VDF_PARK_BYTES + VDF_PAGE_SIZE);
    ask(FUSE_INTERRUPT, 15, &in, sizeof in); /* too late */
    ask_write(16, AT(1), (uint32_t)AT(1), 9);
    CHECK(heard(16, &size) == 0 && parked() == 1);
    give(25, 1);
    give(34, 1);
    CHECK(heard(14, &size) == 0 && size == AT(9));
    expect(25, 10, VDF_PAGE_SIZE, 6);
    copy_check_byte(image, 30, 6);
    expect(34, 0, 10, 6);
    /* A request of parts alone is kept as it is. */
    ask_write(18, AT(37) + 1, (uint32_t)AT(1), 7);
    wanted(37, 2);
    CHECK(!vdf_image_is_present(image, AT(37), AT(2)));
    give(37, 2);
    CHECK(heard(18, &size) == 0);
    expect(37, 1, VDF_PAGE_SIZE, 7);
    CHECK(atomic_fetch_sub(&s.core->parked_bytes, VDF_PARK_BYTES) == VDF_PARK_BYTES);
}

static void holes(void)
{
    struct fuse_fallocate_in in = {
        .offset = AT(41) + 5, .length = AT(5), .mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE};

    ask(FUSE_FALLOCATE, 20, &in, sizeof in);
    wanted(41, 1);
    wanted(46, 1);
    none_wanted();
    give(41, 1);
    give(46, 1);
    CHECK(heard(20, NULL) == 0);
    copy_check_byte(image, 44, 0);
    expect(41, 5, VDF_PAGE_SIZE, 0);
    /* Whole pages, and up to the end. */
    in = (struct fuse_fallocate_in){
        .offset = AT(50), .length = SIZE, .mode = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE};
    ask(FUSE_FALLOCATE, 22, &in, sizeof in);
    CHECK(heard(22, NULL) == 0);
    CHECK(vdf_image_is_present(image, AT(50), SIZE - AT(50)));
    none_wanted();
}

int main(void)
{
    int pair[2];

    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    kernel = pair[0];
    struct timeval patience = {.tv_sec = 10};
    setsockopt(kernel, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    scratch_make(&s, SIZE);
    vdf_core_stop(s.core);
    vdf_core_free(s.core);
    CHECK(vdf_core_create(pair[1], 2, 0, &s.core) == 0);
    copy_create(&s, SIZE, 0, NULL, 0);
    image = copy_open(&s, 0);
    CHECK(vdf_core_attach(s.core, 5, image) == 0);
    CHECK(vdf_core_start(s.core) == 0);
    writes();
    interrupts();
    bounded();
    holes();
    /* Left to the end: stopping answers it and frees what it kept. */
    ask_write(24, AT(49) + 1, 1, 1);
    wanted(49, 1);
    vdf_core_stop(s.core);
    CHECK(heard(24, NULL) == -EIO && atomic_load(&s.core->parked_bytes) == 0);
    vdf_image_unref(image);
    close(kernel);
    scratch_remove(&s);
    return 0;
}
