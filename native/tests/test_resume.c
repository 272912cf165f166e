/*
 * test_resume.c - a connection taken over from a predecessor, and left to a successor, over a
 * socket in place of /dev/fuse.
 */
#include "internal.h"
#include "scratch.h"

#include <linux/fuse.h>
#include <poll.h>
#include <sys/socket.h>

#define SIZE (4 * (uint64_t)VDF_PAGE_SIZE)
#define RESENT (UINT64_C(1) << 63)

typedef struct message {
    union {
        struct fuse_in_header in;
        struct fuse_out_header out;
    };
    uint8_t body[2 * VDF_PAGE_SIZE];
} message;

static scratch s;
static int kernel, names; /* our ends */
static vdf_core *core;

static size_t make(message *to, uint32_t opcode, uint64_t nodeid, uint64_t unique, const void *body,
                   size_t size)
{
    memset(to, 0, sizeof *to);
    to->in = (struct fuse_in_header){.len = (uint32_t)(sizeof to->in + size),
                                     .opcode = opcode,
                                     .unique = unique,
                                     .nodeid = nodeid,
                                     .pid = 4711};
    if (size != 0)
        memcpy((uint8_t *)to + sizeof to->in, body, size);
    return to->in.len;
}

static void ask(uint32_t opcode, uint64_t nodeid, uint64_t unique, const void *body, size_t size)
{
    message to;
    size_t length = make(&to, opcode, nodeid, unique, body, size);

    CHECK(send(kernel, &to, length, 0) == (ssize_t)length);
}

static message heard(int at)
{
    message got;

    memset(&got, 0, sizeof got);
    CHECK(recv(at, &got, sizeof got, 0) >= (ssize_t)sizeof got.out);
    return got;
}

static bool silent(int at)
{
    struct pollfd poll_at = {.fd = at, .events = POLLIN};

    return poll(&poll_at, 1, 50) == 0;
}

static uint64_t wanted_node(void)
{
    struct pollfd events = {.fd = vdf_core_event_fd(core), .events = POLLIN};
    vdf_event event;

    while (vdf_core_next_event(core, &event) == 0)
        CHECK(poll(&events, 1, 10000) == 1);
    CHECK(event.kind == VDF_EVENT_NODE);
    return event.offset;
}

static void answer_name(uint64_t unique)
{
    struct fuse_out_header out = {.len = sizeof out, .unique = unique};

    CHECK(send(names, &out, sizeof out, 0) == sizeof out);
}

static void taken_over(void)
{
    struct fuse_init_in init = {
        .major = 7, .minor = 41, .flags = FUSE_INIT_EXT, .flags2 = VDF_FUSE_HAS_RESEND};
    uint8_t copy[256];
    message request;
    int pair[2];
    size_t length = make(&request, FUSE_INIT, 0, 2, &init, sizeof init);

    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    kernel = pair[0];
    CHECK(vdf_core_create(pair[1], 2, 0, &core) == 0);
    names = vdf_core_names_fd(core);
    CHECK(vdf_core_can_resend(core) == 0 && vdf_core_init_request(core, copy, sizeof copy) == 0);
    CHECK(vdf_core_resume(core, (uint8_t *)&request, length - 1) == -EINVAL);
    request.in.opcode = FUSE_OPEN;
    CHECK(vdf_core_resume(core, (uint8_t *)&request, length) == -EINVAL);
    request.in.opcode = FUSE_INIT;
    CHECK(vdf_core_resume(core, (uint8_t *)&request, length) == 0);
    CHECK(vdf_core_can_resend(core) == 1);
    CHECK(vdf_core_init_request(core, copy, 8) == -ENOSPC);
    CHECK(vdf_core_init_request(core, copy, sizeof copy) == (int64_t)length);
    CHECK(memcmp(copy, &request, length) == 0);

    /* Sent by the kernel while nobody read: taken only when everything is in place. */
    ask(FUSE_GETATTR, 1, 40 | RESENT, NULL, 0);
    CHECK(vdf_core_start(core) == 0);
    message got = heard(kernel);
    CHECK(got.out.len == sizeof got.out && got.out.error == 7 && got.out.unique == 0);
    got = heard(names);
    CHECK(got.in.opcode == FUSE_INIT && got.in.unique == 2);
    got = heard(names);
    CHECK(got.in.opcode == FUSE_GETATTR && got.in.unique == (40 | RESENT));
    /* The kernel's number in the place of the process id, and that it came again. */
    CHECK(got.in.pid == (20 | 1u << 30));
    answer_name(2); /* the kernel has had this answer */
    answer_name(40 | RESENT);
    got = heard(kernel);
    CHECK(got.out.unique == (40 | RESENT));
}

static void open_files_of_the_predecessor(void)
{
    struct {
        struct fuse_write_in in;
        uint8_t data[10];
    } write = {.in = {.offset = 100, .size = 10}, .data = "0123456789"};
    struct fuse_read_in read = {.offset = 102, .size = 8};
    struct fuse_interrupt_in interrupt = {.unique = 54 | RESENT};

    ask(FUSE_WRITE, 5, 50 | RESENT, &write, sizeof write.in + 10);
    CHECK(wanted_node() == 5);
    CHECK(silent(kernel));
    /* Without an image it waits again, and asks again: once. */
    CHECK(vdf_core_retry(core, 5, 0) == 0);
    CHECK(wanted_node() == 5);
    vdf_image *image = NULL;
    int fd = open(s.file, O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0 && vdf_image_create(core, fd, 0, 7, &image) == 0);
    close(fd);
    CHECK(vdf_core_attach(core, 5, image) == 0);
    CHECK(vdf_core_retry(core, 5, 0) == 0);
    message got = heard(kernel);
    CHECK(got.out.unique == (50 | RESENT) && got.out.error == 0);
    ask(FUSE_READ, 5, 52, &read, sizeof read);
    got = heard(kernel);
    CHECK(got.out.unique == 52 && memcmp((uint8_t *)&got + sizeof got.out, "23456789", 8) == 0);

    /* An interrupt ends the wait; so does a file that cannot be opened again. */
    ask(FUSE_READ, 6, 54 | RESENT, &read, sizeof read);
    CHECK(wanted_node() == 6);
    ask(FUSE_INTERRUPT, 0, 55 | RESENT, &interrupt, sizeof interrupt);
    got = heard(kernel);
    CHECK(got.out.unique == (54 | RESENT) && got.out.error == -EINTR);
    ask(FUSE_READ, 6, 56, &read, sizeof read);
    CHECK(wanted_node() == 6);
    CHECK(vdf_core_retry(core, 6, ESTALE) == 0);
    got = heard(kernel);
    CHECK(got.out.unique == 56 && got.out.error == -ESTALE);
    ask(FUSE_FLUSH, 6, 58, &read, 24);
    CHECK(heard(kernel).out.error == 0);
    vdf_image_unref(image);
}

static void left_to_a_successor(void)
{
    struct fuse_read_in read = {.offset = 0, .size = 8};

    ask(FUSE_READ, 6, 60, &read, sizeof read);
    CHECK(wanted_node() == 6);
    ask(FUSE_GETATTR, 1, 62, NULL, 0);
    CHECK(heard(names).in.unique == 62);
    CHECK(vdf_core_pause(core, 20) == 1);
    answer_name(62);
    CHECK(heard(kernel).out.unique == 62);
    CHECK(vdf_core_pause(core, 10000) == 0);
    /* What comes now stays in the kernel; what waits for its image is not answered. */
    ask(FUSE_READ, 5, 64, &read, sizeof read);
    CHECK(silent(kernel));
}

int main(void)
{
    scratch_make(&s, SIZE);
    taken_over();
    open_files_of_the_predecessor();
    left_to_a_successor();
    vdf_core_stop(core);
    vdf_core_free(core);
    close(kernel);
    scratch_remove(&s);
    return 0;
}
