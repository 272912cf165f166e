/* stamps.h - what a block of the oracle holds: disk, block, operation, checksum. Part of stamper.c.
 */
#ifndef STAMPS_H
#define STAMPS_H

enum {
    BLOCK = 4096,
    SECTOR = 512,
    SECTORS = BLOCK / SECTOR,
    WORDS = SECTOR / 8,
    REGION = 64, /* blocks in a row that one writer owns */
    MAX_COUNT = 16,
    MAX_WRITERS = 64
};
#define STEP UINT64_C(0x9E3779B97F4A7C15)
#define FOREVER (INT64_C(1) << 62)

static struct {
    const char *file, *log;
    uint64_t disk, size, seed, first, operations, writers;
    int64_t after;
    unsigned flush_percent;
    bool buffered, flushed;
} opt = {.writers = 4, .operations = UINT64_MAX, .flush_percent = 5};

static int log_fd = 1;

static void die(const char *what)
{
    fprintf(stderr, "stamper: %s: %s\n", what, strerror(errno));
    exit(2);
}

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* ---- stamps ---------------------------------------------------------------------------- */

static uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94D049BB133111EB);
    return x ^ (x >> 31);
}

static uint64_t unmix(uint64_t x)
{
    x = (x ^ (x >> 31) ^ (x >> 62)) * UINT64_C(0x319642B2D24D8EC3);
    x = (x ^ (x >> 27) ^ (x >> 54)) * UINT64_C(0x96DE1B173F119089);
    return x ^ (x >> 30) ^ (x >> 60);
}

static uint64_t base(void)
{
    return opt.disk * UINT64_C(0xD1342543DE82EF95) + UINT64_C(0x2545F4914F6CDD1D);
}

static void stamp(uint64_t *words, uint64_t operation, uint64_t block, uint64_t count)
{
    uint64_t first = block * (BLOCK / 8);
    for (uint64_t i = 0; i < count * (BLOCK / 8); i++)
        words[i] = mix(base() + operation + (first + i) * STEP);
}

/* ---- writing --------------------------------------------------------------------------- */

static uint64_t random64(uint64_t *state)
{
    *state += STEP;
    return mix(*state);
}

__attribute__((format(printf, 1, 2))) static void note(const char *format, ...)
{
    char line[160];
    va_list words;
    va_start(words, format);
    int length = vsnprintf(line, sizeof line, format, words);
    va_end(words);
    if (write(log_fd, line, (size_t)length) != length)
        die("log");
}

#endif
