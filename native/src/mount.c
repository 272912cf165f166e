/* mount.c - getting a FUSE connection and ending it. */
#include "internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static int mount_as_root(const char *mountpoint, const char *source, unsigned flags, int *fd_out)
{
    char options[256];
    int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);

    if (fd < 0)
        return -errno;
    snprintf(options, sizeof options,
             "fd=%d,rootmode=40000,user_id=%u,group_id=%u,%sdefault_permissions", fd,
             (unsigned)getuid(), (unsigned)getgid(),
             flags & VDF_MOUNT_ALLOW_OTHER ? "allow_other," : "");
    if (mount(source, mountpoint, "fuse.vdiskfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options) != 0) {
        int error = -errno;
        close(fd);
        return error;
    }
    *fd_out = fd;
    return 0;
}

static int receive_fd(int socket, int *fd_out)
{
    char byte;
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec part = {.iov_base = &byte, .iov_len = 1};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control.room,
                             .msg_controllen = sizeof control.room};
    ssize_t got;

    do {
        got = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
    } while (got < 0 && errno == EINTR);
    const struct cmsghdr *head = got > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (head == NULL || head->cmsg_type != SCM_RIGHTS)
        return -EPERM;
    memcpy(fd_out, CMSG_DATA(head), sizeof *fd_out);
    return 0;
}

static int wait_for(pid_t child)
{
    int status;

    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR)
            return -errno;
    return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : -EPERM;
}

/* fusermount3 is told by number which descriptor to send the connection over. */
static pid_t run_fusermount(const char *const *arguments, int socket)
{
    char number[16];
    pid_t child;

    snprintf(number, sizeof number, "%d", socket);
    child = fork();
    if (child != 0)
        return child;
    if (socket >= 0) {
        fcntl(socket, F_SETFD, 0);
        setenv("_FUSE_COMMFD", number, 1);
    }
    execvp("fusermount3", (char *const *)(uintptr_t)arguments);
    _exit(127);
}

static int mount_as_user(const char *mountpoint, const char *source, unsigned flags, int *fd_out)
{
    char options[512];
    int pair[2];

    snprintf(options, sizeof options,
             "nosuid,nodev,noexec,default_permissions,subtype=vdiskfs,fsname=%s%s", source,
             flags & VDF_MOUNT_ALLOW_OTHER ? ",allow_other" : "");
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0)
        return -errno;
    const char *arguments[] = {"fusermount3", "-o", options, "--", mountpoint, NULL};
    pid_t child = run_fusermount(arguments, pair[0]);
    int error = child < 0 ? -errno : 0;
    close(pair[0]);
    if (error == 0)
        error = receive_fd(pair[1], fd_out);
    close(pair[1]);
    int ended = child < 0 ? 0 : wait_for(child);
    if (error == 0 && ended != 0) {
        close(*fd_out);
        error = ended;
    }
    return error;
}

int vdf_mount(const char *mountpoint, const char *source, unsigned flags, int *fd_out)
{
    if (geteuid() == 0)
        return mount_as_root(mountpoint, source, flags, fd_out);
    return mount_as_user(mountpoint, source, flags, fd_out);
}

int vdf_unmount(const char *mountpoint, int lazy)
{
    if (geteuid() == 0)
        return umount2(mountpoint, UMOUNT_NOFOLLOW | (lazy ? MNT_DETACH : 0)) == 0 ? 0 : -errno;
    const char *arguments[] = {"fusermount3", lazy ? "-uqz" : "-uq", "--", mountpoint, NULL};
    pid_t child = run_fusermount(arguments, -1);
    if (child < 0)
        return -errno;
    return wait_for(child) == 0 ? 0 : -EBUSY;
}
