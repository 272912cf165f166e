/* scratch.h - a directory that goes away, a tracked image in it, and random numbers. */
#ifndef VDF_TESTS_SCRATCH_H
#define VDF_TESTS_SCRATCH_H

#include "check.h"
#include "vdf.h"

#include <fcntl.h>
#include <ftw.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct scratch {
    char directory[64];
    char file[96];
    char tracks[96];
    vdf_core *core;
    vdf_image *image;
    vdf_track *track;
} scratch;

static inline uint64_t scratch_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static inline int scratch_remove_one(const char *path, const struct stat *st, int kind,
                                     struct FTW *at)
{
    (void)st;
    (void)kind;
    (void)at;
    return remove(path);
}

static inline vdf_image *scratch_image(scratch *s, unsigned flags, int mode)
{
    vdf_image *image = NULL;
    int fd = open(s->file, mode | O_CLOEXEC);

    CHECK(fd >= 0);
    CHECK(vdf_image_create(s->core, fd, flags, 7, &image) == 0);
    close(fd);
    return image;
}

/* A directory with an image file of `size` bytes; nothing is open yet but the core. */
static inline void scratch_make(scratch *s, uint64_t size)
{
    memset(s, 0, sizeof *s);
    strcpy(s->directory, "/tmp/vdf-test-XXXXXX");
    CHECK(mkdtemp(s->directory) != NULL);
    snprintf(s->file, sizeof s->file, "%s/image", s->directory);
    snprintf(s->tracks, sizeof s->tracks, "%s/track", s->directory);
    CHECK(mkdir(s->tracks, 0700) == 0);
    int fd = open(s->file, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    close(fd);
    CHECK(vdf_core_create(-1, 1, 0, &s->core) == 0);
}

static inline void scratch_open(scratch *s, unsigned flags)
{
    uint64_t size;

    s->image = scratch_image(s, 0, O_RDWR);
    CHECK(vdf_image_size(s->image, &size) == 0);
    CHECK(vdf_track_open(s->tracks, size, flags, &s->track) == 0);
    CHECK(vdf_image_set_track(s->image, s->track) == 0);
}

static inline void scratch_close(scratch *s)
{
    CHECK(vdf_image_set_track(s->image, NULL) == 0);
    vdf_track_close(s->track);
    vdf_image_unref(s->image);
    s->track = NULL;
    s->image = NULL;
}

static inline void scratch_remove(scratch *s)
{
    vdf_core_stop(s->core);
    vdf_core_free(s->core);
    CHECK(nftw(s->directory, scratch_remove_one, 16, FTW_DEPTH | FTW_PHYS) == 0);
}

#endif
