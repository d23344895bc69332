/* Reads files in a container until it is told to stop, looks at every byte, and tells how it went.
 *
 *     reader DIRECTORY STOP
 *
 * DIRECTORY holds files "SEED-LENGTH" whose bytes follow from the seed, and "small/0" ... "small/N" that hold their number. It stops when the
 * file STOP is there, and prints one line: operations, failures, wrong bytes, the longest time of one operation in microseconds, and which
 * kind that was. Each round does one thing: ranges of a file, cold in the page cache; pages of a mapping; small files; a listing; and the
 * same with a file and a mapping that were opened before the first round. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MAX_FILES 64
#define RANGE (256 << 10)
#define PAGE 4096

static struct { char path[512]; uint64_t seed, length; } files[MAX_FILES];
static int file_count, small_count;
static char directory[256];
static long operations, failures, wrong, longest;
static const char *longest_kind = "none", *kind = "none";

/* The same as `word` of takeover.rs. */
static uint64_t word(uint64_t seed, uint64_t index)
{
    uint64_t z = seed * 0x9e3779b97f4a7c15u + index * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static uint64_t random_state;
static uint64_t random_below(uint64_t limit)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return limit ? random_state % limit : 0;
}

static void report(void)
{
    printf("operations=%ld failures=%ld wrong=%ld longest_us=%ld kind=%s\n", operations, failures, wrong, longest, longest_kind);
    fflush(stdout);
}

static void failed(const char *what)
{
    failures++;
    printf("failed: %s %s: %s\n", kind, what, strerror(errno));
    fflush(stdout);
}

static void on_bus(int number)
{
    (void)number;
    failures++;
    printf("failed: a mapping gave SIGBUS\n");
    report();
    _exit(1);
}

static void check(int file, uint64_t offset, const unsigned char *bytes, uint64_t length)
{
    for (uint64_t at = 0; at < length;) {
        uint64_t place = offset + at, expected = word(files[file].seed, place / 8);
        const unsigned char *want = (const unsigned char *)&expected;
        for (uint64_t in = place % 8; in < 8 && at < length; in++, at++)
            if (bytes[at] != want[in])
                wrong++;
    }
}

static void read_ranges(int file, int fd)
{
    static unsigned char buffer[RANGE];
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    uint64_t offset = random_below(files[file].length);
    ssize_t got = pread(fd, buffer, 1 + random_below(RANGE - 1), offset);
    if (got <= 0)
        failed(files[file].path);
    else
        check(file, offset, buffer, got);
}

static void touch_pages(int file, int fd, unsigned char *map)
{
    madvise(map, files[file].length, MADV_DONTNEED);
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    for (int i = 0; i < 4; i++) {
        uint64_t page = random_below(files[file].length / PAGE);
        check(file, page * PAGE, map + page * PAGE, 64);
    }
}

static int open_file(int file)
{
    int fd = open(files[file].path, O_RDONLY);
    if (fd < 0)
        failed(files[file].path);
    return fd;
}

static unsigned char *map_file(int file, int fd)
{
    unsigned char *map = mmap(NULL, files[file].length, PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
        failed("mmap");
        return NULL;
    }
    madvise(map, files[file].length, MADV_RANDOM);
    return map;
}

static void list(void)
{
    char path[512];
    snprintf(path, sizeof path, "%s/small", directory);
    DIR *dir = opendir(path);
    if (!dir)
        return failed("opendir");
    int count = 0;
    struct dirent *entry;
    errno = 0;
    while ((entry = readdir(dir)))
        if (entry->d_name[0] != '.') {
            struct stat stat;
            if (fstatat(dirfd(dir), entry->d_name, &stat, 0))
                failed(entry->d_name);
            count++;
        }
    if (errno)
        failed("readdir");
    closedir(dir);
    if (!small_count)
        small_count = count;
    else if (count != small_count)
        wrong++;
}

static void read_small(void)
{
    for (int i = 0; i < 8; i++) {
        char path[512], text[32] = "", want[32];
        int number = random_below(small_count);
        snprintf(path, sizeof path, "%s/small/%d", directory, number);
        snprintf(want, sizeof want, "%d", number);
        int fd = open(path, O_RDONLY);
        if (fd < 0) {
            failed(path);
            continue;
        }
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        if (read(fd, text, sizeof text - 1) < 0)
            failed(path);
        else if (strcmp(text, want))
            wrong++;
        close(fd);
    }
}

static long microseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000L + now.tv_nsec / 1000;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    signal(SIGBUS, on_bus);
    random_state = getpid() * 0x2545f4914f6cdd1du + 1;
    snprintf(directory, sizeof directory, "%s", argv[1]);
    DIR *dir = opendir(directory);
    struct dirent *entry;
    while (dir && (entry = readdir(dir)) && file_count < MAX_FILES)
        if (sscanf(entry->d_name, "%lu-%lu", &files[file_count].seed, &files[file_count].length) == 2) {
            snprintf(files[file_count].path, sizeof files[0].path, "%s/%s", directory, entry->d_name);
            file_count++;
        }
    list();
    if (!file_count || !small_count) {
        printf("failed: nothing to read\n");
        return 1;
    }
    int held = open_file(0);
    unsigned char *held_map = map_file(0, held);
    while (access(argv[2], F_OK)) {
        long begun = microseconds();
        int file = random_below(file_count), what = random_below(6), fd;
        unsigned char *map;
        switch (what) {
        case 0:
            kind = "read";
            if ((fd = open_file(file)) >= 0) {
                read_ranges(file, fd);
                close(fd);
            }
            break;
        case 1:
            kind = "map";
            if ((fd = open_file(file)) >= 0) {
                if ((map = map_file(file, fd))) {
                    touch_pages(file, fd, map);
                    munmap(map, files[file].length);
                }
                close(fd);
            }
            break;
        case 2:
            kind = "small";
            read_small();
            break;
        case 3:
            kind = "list";
            list();
            break;
        case 4:
            kind = "held";
            read_ranges(0, held);
            break;
        case 5:
            kind = "held-map";
            touch_pages(0, held, held_map);
            break;
        }
        operations++;
        long took = microseconds() - begun;
        if (took > longest) {
            longest = took;
            longest_kind = kind;
        }
    }
    report();
    return failures || wrong;
}
