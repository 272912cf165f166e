/* test_recover.c - what recovery makes of a track after the death of the host. */
#include "intents.h"

static bool is_suspect(const scratch *s, uint64_t page)
{
    return vdf_bitmap_test(&s->track->suspect, page);
}

static void check_recovered(scratch *s, const vdf_recovery *found)
{
    const uint64_t pages = REGION / VDF_PAGE_SIZE;
    vdf_track_counts now;

    CHECK(found->end[0] <= found->start[0] && found->end[1] <= found->start[1]);
    s->image = scratch_image(s, 0, O_RDWR);
    CHECK(vdf_track_open(s->tracks, REGIONS * REGION, 0, &s->track) == 0);
    CHECK(vdf_image_set_track(s->image, s->track) == 0);
    vdf_track_counts_get(s->track, &now);
    CHECK(now.epoch == 9 && now.frozen_pages == 0 && now.preserved_pages == 0 && !now.frozen);
    CHECK(now.suspect_pages == found->regions * pages && now.changed);
    for (uint32_t i = 0; i < found->regions; i++)
        for (uint64_t page = 0; page < pages; page++) {
            CHECK(is_suspect(s, found->region[i] * pages + page));
            CHECK(!vdf_track_is_changed(s->image, found->region[i] * pages + page));
        }
    /* What left the log is marked by page: in the running epoch, whatever it was in before. */
    for (uint64_t i = 0; i < REGIONS; i++)
        CHECK(is_suspect(s, i * pages) || vdf_track_is_changed(s->image, i * pages));
    CHECK(now.dirty_pages == REGIONS - found->regions);
    scratch_close(s);
}

static void recovery_believes_the_bitmaps_outside_the_regions_and_can_be_run_again(void)
{
    vdf_recovery found;
    vdf_seal seal;
    scratch s;

    begin(&s, REGIONS * REGION, true);
    for (uint64_t i = 0; i < REGIONS; i++) {
        write_page(&s, i * REGION);
        if (i == REGIONS / 2)
            CHECK(vdf_seal_images(&s.image, 1, &seal) == 0);
    }
    write_page(&s, 0); /* frozen: preserved */
    uint32_t active = count_active(&s);
    scratch_close(&s);
    for (int i = 0; i < 3; i++) {
        CHECK(recover(&s, 0, &found) == 0 && found.regions == active);
        check_recovered(&s, &found);
    }
    scratch_remove(&s);
}

static void recovery_believes_nothing_that_somebody_else_may_have_changed(void)
{
    unsigned regions[REGIONS];
    vdf_intent_record record;
    vdf_recovery found;
    scratch s;

    begin(&s, REGIONS * REGION, true);
    write_page(&s, 0);
    CHECK(read_log(&s, &record, regions) == 0);
    scratch_close(&s);
    CHECK(recover(&s, NEVER, &found) == -ESTALE);
    uint64_t allowed = record.stamp_ns + VDF_INTENT_ALLOWANCE_S * UINT64_C(1000000000);
    CHECK(recover(&s, allowed + 1, &found) == -ESTALE);
    CHECK(recover(&s, allowed, &found) == 0);
    scratch_remove(&s);
}

static void recovery_knows_sizes_from_the_vault_and_cuts_from_the_log(void)
{
    static uint64_t region[VDF_INTENT_MAX];
    vdf_recovery found = {.region = region, .capacity = VDF_INTENT_MAX};
    const uint64_t size = 100 * REGION + 4097, base = REGIONS * REGION;
    vdf_seal seal;
    scratch s;

    begin(&s, base, true);
    CHECK(vdf_image_truncate(s.image, 50 * REGION) == 0);
    CHECK(vdf_image_truncate(s.image, size) == 0);
    scratch_close(&s);
    CHECK(vdf_track_recover(s.tracks, size, 0, 4, base, &found) == 0);
    CHECK(found.start[VDF_SPAN_CUT] == 50 * REGION && found.end[VDF_SPAN_CUT] == size);
    s.image = scratch_image(&s, 0, O_RDWR);
    CHECK(vdf_track_open(s.tracks, size, 0, &s.track) == 0);
    CHECK(vdf_image_set_track(s.image, s.track) == 0);
    CHECK(vdf_track_is_changed(s.image, size / VDF_PAGE_SIZE));
    CHECK(vdf_seal_images(&s.image, 1, &seal) == 0);
    CHECK(seal.epoch == 4 && seal.size == size && seal.cut == size);
    CHECK(vdf_capture_forget(s.image) == 0);
    end(&s);
}

/* ---- many at once -------------------------------------------------------------------------- */

int main(void)
{
    recovery_believes_the_bitmaps_outside_the_regions_and_can_be_run_again();
    recovery_believes_nothing_that_somebody_else_may_have_changed();
    recovery_knows_sizes_from_the_vault_and_cuts_from_the_log();
    return 0;
}
