/* intents.h - a tracked image whose intent log is kept, and what the log on disk says. */
#ifndef VDF_TESTS_INTENTS_H
#define VDF_TESTS_INTENTS_H

#include "internal.h"

#include "scratch.h"

#include <linux/falloc.h>
#include <stdlib.h>

#define REGION ((uint64_t)VDF_INTENT_REGION)
#define SLOTS 32
#define REGIONS 200
#define NEVER (UINT64_C(1) << 62)

static const uint8_t block[VDF_PAGE_SIZE] = {1, 2, 3};

static inline vdf_intent_counts counts(const scratch *s)
{
    vdf_intent_counts out;

    vdf_intent_counts_get(s->image, &out);
    return out;
}

static inline void wait_kept(const scratch *s)
{
    for (int i = 0; counts(s).is_void; i++) {
        CHECK(i < 60 * 1000);
        vdf_sleep_ns(1000 * 1000);
    }
}

/* A tracked image of `size` bytes whose log is kept. */
static inline void begin(scratch *s, uint64_t size, bool made)
{
    if (made)
        scratch_make(s, size);
    s->image = scratch_image(s, 0, O_RDWR);
    CHECK(vdf_track_open_slots(s->tracks, size, made ? VDF_TRACK_NEW : 0, SLOTS, &s->track) == 0);
    CHECK(vdf_image_set_track(s->image, s->track) == 0);
    CHECK(!made || counts(s).is_void);
    CHECK(vdf_image_begin_intent(s->image) == 0);
    wait_kept(s);
}

static inline void end(scratch *s)
{
    scratch_close(s);
    scratch_remove(s);
}

/* What the log on disk says; its regions are counted in `regions`, by number. */
static inline int read_log(const scratch *s, vdf_intent_record *record, unsigned *regions)
{
    static const char *const names[] = {"dirty.0", "dirty.1", "suspect"};
    int files[VDF_INTENT_FILES];
    vdf_intentlog log;
    int dir = open(s->tracks, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    CHECK(dir >= 0);
    for (unsigned i = 0; i < VDF_INTENT_FILES; i++)
        CHECK((files[i] = openat(dir, names[i], O_RDONLY | O_CLOEXEC)) >= 0);
    int error = vdf_intentlog_open(dir, files, VDF_INTENT_FILES, &log, record);
    memset(regions, 0, REGIONS * sizeof *regions);
    for (uint32_t i = 0; error == 0 && i < log.slots; i++)
        if (record->region[i] < REGIONS)
            regions[record->region[i]]++;
    if (error == 0)
        vdf_intentlog_close(&log);
    for (unsigned i = 0; i < VDF_INTENT_FILES; i++)
        close(files[i]);
    close(dir);
    free(record->region);
    record->region = NULL;
    return error;
}

static inline unsigned count_active(const scratch *s)
{
    unsigned regions[REGIONS], active = 0;
    vdf_intent_record record;

    CHECK(read_log(s, &record, regions) == 0 && !(record.flags & VDF_INTENT_VOID));
    for (unsigned i = 0; i < REGIONS; i++) {
        CHECK(regions[i] <= 1);
        active += regions[i];
    }
    return active;
}

static inline bool is_active(const scratch *s, uint64_t region)
{
    unsigned regions[REGIONS];
    vdf_intent_record record;

    CHECK(read_log(s, &record, regions) == 0);
    return regions[region] != 0;
}

static inline void write_page(const scratch *s, uint64_t offset)
{
    CHECK(vdf_image_write(s->image, offset, sizeof block, block) == 0);
}

static inline int recover(const scratch *s, uint64_t change_ns, vdf_recovery *out)
{
    static uint64_t region[VDF_INTENT_MAX];

    *out = (vdf_recovery){.region = region, .capacity = VDF_INTENT_MAX};
    return vdf_track_recover(s->tracks, REGIONS * REGION, change_ns, 9, REGIONS * REGION, out);
}

#endif
