/*
 * stamper.c - writes stamped blocks of 4 KiB and logs what it does; checks images by the log.
 *
 *     stamper write FILE --disk N --size BYTES --log LOG [--writers N] [--seed N]
 *             [--first N] [--operations N] [--buffered] [--flush PERCENT]
 *     stamper check FILE --disk N --log LOG [--after NS] [--flushed]
 *
 * Linked statically, so that it is also the program of a guest without anything else; there the
 * log is the console (--log -). Python's twin of the checker is tests/e2e/oracle.py: the stamps
 * are those of tests/e2e/stamps.py, where each word of 8 bytes says disk, place and operation
 * and proves itself. Operation k of writer w of n has the number k * n + w + 1.
 *
 * The log, a line an event, each appended by one write(2); times are CLOCK_MONOTONIC in ns:
 *
 *     @H writers
 *     @I operation block count time     about to be issued
 *     @C operation time                 was completed
 *     @F writer begin end               a flush was acknowledged
 *     @E operation errno time           failed, 0 for a flush: what it did is not known
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

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
static atomic_bool stopped;
static atomic_int failures;

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

static void fail(uint64_t operation, int code)
{
    note("@E %" PRIu64 " %d %" PRId64 "\n", operation, code, now());
    fprintf(stderr, "stamper: operation %" PRIu64 ": %s\n", operation, strerror(code));
    atomic_fetch_add(&failures, 1);
    atomic_store(&stopped, true);
}

static bool flush(int fd, uint64_t writer)
{
    int64_t begin = now();
    if (fdatasync(fd) != 0) {
        fail(0, errno);
        return false;
    }
    note("@F %" PRIu64 " %" PRId64 " %" PRId64 "\n", writer, begin, now());
    return true;
}

/* A range of a region that is the writer's: no two writes to one block are ever in flight. */
static void pick(uint64_t *state, uint64_t writer, uint64_t *block, uint64_t *count)
{
    uint64_t regions = opt.size / BLOCK / REGION / opt.writers;
    uint64_t region = random64(state) % regions * opt.writers + writer;
    *count = 1 + (random64(state) % 4 ? random64(state) % 4 : random64(state) % MAX_COUNT);
    *block = region * REGION + random64(state) % (REGION - *count + 1);
}

static bool put(int fd, const uint64_t *data, uint64_t operation, uint64_t block, uint64_t count)
{
    size_t length = (size_t)count * BLOCK;
    note("@I %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRId64 "\n", operation, block, count, now());
    ssize_t done = pwrite(fd, data, length, (off_t)(block * BLOCK));
    if (done != (ssize_t)length) {
        fail(operation, done < 0 ? errno : EIO);
        return false;
    }
    note("@C %" PRIu64 " %" PRId64 "\n", operation, now());
    return true;
}

static void *work(void *argument)
{
    uint64_t writer = (uint64_t)(uintptr_t)argument;
    uint64_t state = mix(opt.seed * opt.writers + writer) + opt.first;
    uint64_t *data = aligned_alloc(BLOCK, MAX_COUNT * BLOCK);
    int fd = open(opt.file, O_RDWR | O_CLOEXEC | (opt.buffered ? 0 : O_DIRECT));
    if (fd < 0 || data == NULL)
        die(opt.file);
    for (uint64_t k = opt.first; k - opt.first < opt.operations && !atomic_load(&stopped); k++) {
        uint64_t block, count, operation = k * opt.writers + writer + 1;
        pick(&state, writer, &block, &count);
        stamp(data, operation, block, count);
        if (!put(fd, data, operation, block, count))
            break;
        if (random64(&state) % 100 < opt.flush_percent && !flush(fd, writer))
            break;
    }
    free(data);
    if (close(fd) != 0 && atomic_load(&failures) == 0)
        fail(0, errno);
    return NULL;
}

static int write_blocks(void)
{
    pthread_t threads[MAX_WRITERS];
    sigset_t set;
    int number;

    if (opt.writers < 1 || opt.writers > MAX_WRITERS ||
        opt.size / BLOCK / REGION / opt.writers == 0) {
        errno = EINVAL;
        die("a region of 256 KiB for each of 1 to 64 writers");
    }
    if (strcmp(opt.log, "-") != 0)
        log_fd = open(opt.log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (log_fd < 0)
        die(opt.log);
    note("@H %" PRIu64 "\n", opt.writers);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    for (uint64_t i = 0; i < opt.writers; i++)
        if (pthread_create(&threads[i], NULL, work, (void *)(uintptr_t)i) != 0)
            die("pthread_create");
    /* SIGTERM ends it, and so do the operations asked for. */
    if (opt.operations == UINT64_MAX) {
        struct timespec tick = {.tv_nsec = 100000000};
        do
            number = sigtimedwait(&set, NULL, &tick);
        while (number < 0 && !atomic_load(&stopped));
        atomic_store(&stopped, true);
    }
    for (uint64_t i = 0; i < opt.writers; i++)
        pthread_join(threads[i], NULL);
    return atomic_load(&failures) == 0 ? 0 : 3;
}

/* ---- checking -------------------------------------------------------------------------- */

typedef struct {
    uint64_t block, count;
    int64_t issued, completed;
} operation;

typedef struct {
    operation *operations; /* by number; issued 0: there is none */
    uint64_t count;
    int64_t flushed; /* the beginning of the last flush that was acknowledged; 0: none */
} history;

static operation *find(history *all, uint64_t number)
{
    if (number >= all->count) {
        uint64_t count = number + 1 + number / 2;
        all->operations = realloc(all->operations, count * sizeof(operation));
        if (all->operations == NULL)
            die("log");
        memset(all->operations + all->count, 0, (count - all->count) * sizeof(operation));
        all->count = count;
    }
    return &all->operations[number];
}

static history read_log(void)
{
    history all = {0};
    char line[256];
    FILE *file = fopen(opt.log, "r");
    if (file == NULL)
        die(opt.log);
    while (fgets(line, sizeof line, file) != NULL) {
        uint64_t number, block, count;
        int64_t begin, end;
        if (sscanf(line, "@I %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNd64, &number, &block, &count,
                   &begin) == 4)
            *find(&all, number) = (operation){block, count, begin, FOREVER};
        else if (sscanf(line, "@C %" SCNu64 " %" SCNd64, &number, &end) == 2)
            find(&all, number)->completed = end;
        else if (sscanf(line, "@F %" SCNu64 " %" SCNd64 " %" SCNd64, &number, &begin, &end) == 3)
            all.flushed = begin > all.flushed ? begin : all.flushed;
    }
    fclose(file);
    return all;
}

/* When a block's version may be what is seen: from its issue until the next one's completion. */
typedef struct {
    int64_t low, high;
    uint64_t holds, lacks; /* operations; 0: the zeros of the beginning, or none */
} interval;

/* The bounds of all sectors, and what they would be without the operation that set them. */
typedef struct {
    interval newest, oldest;
    uint64_t newest_block, oldest_block;
    int64_t other_low, other_high;
    uint64_t sectors;
} verdict;

static interval when(const history *all, const uint64_t *chain, uint64_t length, uint64_t holds)
{
    interval found = {.low = opt.after, .high = FOREVER, .holds = holds};
    uint64_t at = 0;
    if (holds != 0) {
        while (at < length && chain[at] != holds)
            at++;
        found.low = all->operations[holds].issued;
        at++;
    }
    /* The version was gone for certain when any later operation was completed. */
    for (; at < length; at++)
        if (all->operations[chain[at]].completed < found.high) {
            found.high = all->operations[chain[at]].completed;
            found.lacks = chain[at];
        }
    return found;
}

static void judge(verdict *all, interval found, uint64_t block)
{
    all->sectors++;
    if (found.low > all->newest.low) {
        if (found.holds != all->newest.holds)
            all->other_low = all->newest.low;
        all->newest = found;
        all->newest_block = block;
    } else if (found.holds != all->newest.holds && found.low > all->other_low) {
        all->other_low = found.low;
    }
    if (found.high < all->oldest.high) {
        if (found.lacks != all->oldest.lacks)
            all->other_high = all->oldest.high;
        all->oldest = found;
        all->oldest_block = block;
    } else if (found.lacks != all->oldest.lacks && found.high < all->other_high) {
        all->other_high = found.high;
    }
}

/* Return the one operation that the sector's words name, 0 for zeros, UINT64_MAX for neither. */
static uint64_t identify(const uint64_t *words, uint64_t sector)
{
    uint64_t first = sector * WORDS, any = 0;
    for (int i = 0; i < WORDS; i++)
        any |= words[i];
    if (any == 0)
        return 0;
    uint64_t named = unmix(words[0]) - first * STEP - base();
    for (uint64_t i = 1; i < WORDS; i++)
        if (words[i] != mix(base() + named + (first + i) * STEP))
            return UINT64_MAX;
    return named == 0 ? UINT64_MAX : named;
}

static bool is_in(const uint64_t *chain, uint64_t length, uint64_t number)
{
    for (uint64_t i = 0; i < length; i++)
        if (chain[i] == number)
            return true;
    return number == 0;
}

/* Check one block against the operations on it, in their order; 0 or 1 for the exit status. */
static int check_block(const history *all, const uint64_t *chain, uint64_t length, uint64_t block,
                       const uint64_t *words, verdict *result)
{
    for (uint64_t i = 0; i < SECTORS; i++) {
        uint64_t holds = identify(words + i * WORDS, block * SECTORS + i);
        if (holds == UINT64_MAX || !is_in(chain, length, holds)) {
            printf("%s: block %" PRIu64 " sector %" PRIu64 " holds what it never held (%s)\n",
                   length ? "torn" : "strange", block, i,
                   holds == UINT64_MAX ? "no stamp of one operation" : "a stamp of another time");
            return 1;
        }
        interval found = when(all, chain, length, holds);
        if (opt.flushed && found.high < all->flushed) {
            printf("lost: block %" PRIu64 " lacks operation %" PRIu64
                   ", completed before the flush at %" PRId64 "\n",
                   block, found.lacks, all->flushed);
            return 1;
        }
        if (length > 0)
            judge(result, found, block);
    }
    return 0;
}

static int conclude(const verdict *result)
{
    const char *kind = "mixed";
    if (opt.flushed || result->newest.low <= result->oldest.high) {
        printf("cut: [%" PRId64 ", %" PRId64 "] of %" PRIu64 " sectors\n", result->newest.low,
               result->oldest.high, result->sectors);
        return 0;
    }
    /* Without which one of the two operations would there be an instant? */
    if (result->newest.low <= result->other_high)
        kind = "lost";
    else if (result->other_low <= result->oldest.high)
        kind = "reordered";
    printf("%s: block %" PRIu64 " lacks operation %" PRIu64 ", completed at %" PRId64, kind,
           result->oldest_block, result->oldest.lacks, result->oldest.high);
    if (result->newest_block == UINT64_MAX)
        printf(", but the image is not older than %" PRId64 "\n", opt.after);
    else
        printf(", but block %" PRIu64 " holds operation %" PRIu64 ", issued at %" PRId64 "\n",
               result->newest_block, result->newest.holds, result->newest.low);
    return 1;
}

/* The operations on each block, in order: chain[start[b]] up to chain[start[b + 1]]. */
static uint64_t *chains(const history *all, uint64_t blocks, uint64_t *start)
{
    for (uint64_t n = 1; n < all->count; n++)
        for (uint64_t i = 0; all->operations[n].issued && i < all->operations[n].count; i++)
            start[all->operations[n].block + i + 2]++;
    for (uint64_t b = 0; b <= blocks; b++)
        start[b + 1] += start[b];
    uint64_t *chain = calloc(start[blocks + 1] + 1, sizeof *chain);
    if (chain == NULL)
        die("chains");
    for (uint64_t n = 1; n < all->count; n++)
        for (uint64_t i = 0; all->operations[n].issued && i < all->operations[n].count; i++)
            chain[start[all->operations[n].block + i + 1]++] = n;
    return chain;
}

static int check_image(void)
{
    history all = read_log();
    int fd = open(opt.file, O_RDONLY | O_CLOEXEC);
    off_t size = fd < 0 ? -1 : lseek(fd, 0, SEEK_END);
    if (size < 0)
        die(opt.file);
    uint64_t blocks = (uint64_t)size / BLOCK;
    for (uint64_t n = 1; n < all.count; n++)
        if (all.operations[n].issued &&
            all.operations[n].block + all.operations[n].count > blocks) {
            printf("size: the image ends before operation %" PRIu64 "\n", n);
            return 1;
        }
    uint64_t *start = calloc(blocks + 3, sizeof *start);
    uint64_t *chain = chains(&all, blocks, start);
    uint64_t words[BLOCK / 8];
    verdict result = {.newest.low = opt.after,
                      .oldest.high = FOREVER,
                      .other_low = opt.after,
                      .other_high = FOREVER,
                      .newest_block = UINT64_MAX,
                      .oldest_block = UINT64_MAX};
    int status = 0;
    for (uint64_t b = 0; b < blocks && status == 0; b++) {
        if (pread(fd, words, BLOCK, (off_t)(b * BLOCK)) != BLOCK)
            die(opt.file);
        status = check_block(&all, chain + start[b], start[b + 1] - start[b], b, words, &result);
    }
    close(fd);
    free(start);
    free(chain);
    free(all.operations);
    return status ? status : conclude(&result);
}

/* ---- the command line ------------------------------------------------------------------ */

static const struct option options[] = {
    {"disk", required_argument, NULL, 'd'},  {"size", required_argument, NULL, 's'},
    {"log", required_argument, NULL, 'l'},   {"writers", required_argument, NULL, 'w'},
    {"seed", required_argument, NULL, 'r'},  {"operations", required_argument, NULL, 'n'},
    {"flush", required_argument, NULL, 'f'}, {"after", required_argument, NULL, 'a'},
    {"first", required_argument, NULL, 'i'}, {"buffered", no_argument, NULL, 'b'},
    {"flushed", no_argument, NULL, 'F'},     {NULL, 0, NULL, 0},
};

static uint64_t number(const char *text)
{
    char *end;
    errno = 0;
    uint64_t value = strtoull(text, &end, 10);
    if (*end != '\0' || end == text || errno != 0) {
        errno = EINVAL;
        die(text);
    }
    return value;
}

static void set(int option, const char *value)
{
    switch (option) {
    case 'd':
        opt.disk = number(value);
        break;
    case 's':
        opt.size = number(value);
        break;
    case 'l':
        opt.log = value;
        break;
    case 'w':
        opt.writers = number(value);
        break;
    case 'r':
        opt.seed = number(value);
        break;
    case 'i':
        opt.first = number(value);
        break;
    case 'n':
        opt.operations = number(value);
        break;
    case 'f':
        opt.flush_percent = (unsigned)number(value);
        break;
    case 'a':
        opt.after = (int64_t)number(value);
        break;
    case 'b':
        opt.buffered = true;
        break;
    case 'F':
        opt.flushed = true;
        break;
    default:
        exit(2);
    }
}

int main(int argc, char **argv)
{
    int option;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1)
        set(option, optarg);
    if (argc - optind != 2 || opt.log == NULL) {
        fprintf(stderr, "usage: stamper write|check FILE --disk N --log LOG [OPTIONS]\n");
        return 2;
    }
    opt.file = argv[optind + 1];
    return strcmp(argv[optind], "check") == 0 ? check_image() : write_blocks();
}
