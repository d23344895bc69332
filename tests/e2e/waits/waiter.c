/* Wants one byte of a file, in one of the ways in which programs want them.
 *
 *     waiter HOW FILE
 *
 * HOW: read, random (without read-ahead), map, map-random, direct (O_DIRECT, if the file system has it), exec. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096
#define AT (64 * PAGE)

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    const char *how = argv[1], *path = argv[2];
    if (!strcmp(how, "exec")) {
        execl(path, path, NULL);
        return 1;
    }
    int flags = O_RDONLY;
    if (!strcmp(how, "direct"))
        flags |= O_DIRECT;
    int fd = open(path, flags);
    if (fd < 0)
        fd = open(path, O_RDONLY);
    if (fd < 0)
        return 1;
    if (!strncmp(how, "map", 3)) {
        volatile char *map = mmap(NULL, 128 * PAGE, PROT_READ, MAP_SHARED, fd, 0);
        if (map == MAP_FAILED)
            return 1;
        if (!strcmp(how, "map-random"))
            madvise((void *)map, 128 * PAGE, MADV_RANDOM);
        return map[AT] & 0;
    }
    if (!strcmp(how, "random"))
        posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
    void *buffer;
    if (posix_memalign(&buffer, PAGE, PAGE))
        return 1;
    return pread(fd, buffer, PAGE, AT) == PAGE ? 0 : 1;
}
