/*
 * crash.c - named crash hooks, for tests: VDISKFS_CRASH=NAME:N ends the process when
 * the hook NAME ("*": any) is passed for the Nth time; VDISKFS_CRASH_LOG=FILE takes a
 * line for each hook passed. vdiskfs/crash.py says the same of its own.
 */
#include "internal.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

bool vdf_crash_armed;

static const char *log_path;
static const char *plan;
static size_t plan_length;
static _Atomic long left;

void vdf_crash_arm(const char *new_plan, const char *new_log)
{
    const char *colon = new_plan == NULL ? NULL : strrchr(new_plan, ':');

    plan = new_plan;
    log_path = new_log;
    plan_length = colon == NULL ? 0 : (size_t)(colon - new_plan);
    atomic_store(&left, colon == NULL ? 0 : strtol(colon + 1, NULL, 10));
    vdf_crash_armed = log_path != NULL || atomic_load(&left) > 0;
}

__attribute__((constructor)) static void read_plan(void)
{
    vdf_crash_arm(getenv("VDISKFS_CRASH"), getenv("VDISKFS_CRASH_LOG"));
}

static void write_log(const char *name)
{
    char line[80];
    int fd = open(log_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    int length = snprintf(line, sizeof line, "%s\n", name);

    if (fd < 0)
        return;
    if (write(fd, line, (size_t)length) != length)
        fprintf(stderr, "vdiskfs: %s: the crash log cannot be written\n", log_path);
    close(fd);
}

void vdf_crash_at(const char *name)
{
    if (log_path != NULL)
        write_log(name);
    if (plan_length == 0 || atomic_load(&left) <= 0)
        return;
    bool mine = (plan_length == 1 && *plan == '*') ||
                (strlen(name) == plan_length && memcmp(name, plan, plan_length) == 0);
    if (mine && atomic_fetch_sub(&left, 1) == 1)
        kill(getpid(), SIGKILL);
}
