// Preloaded into a process under test: moves its wall clock by as many nanoseconds as the
// file says that GROUPSTATE_TEST_CLOCK names, from the moment at which it says so.
//
// libfaketime does the same for other programs; Redis with jemalloc does not start with it,
// since looking up the real function needs memory, and its allocator asks for the time.

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static _Atomic(const volatile int64_t *) offset;

static int64_t nanoseconds(void) {
    const volatile int64_t *mapped = offset;
    if (mapped == NULL) {
        const char *path = getenv("GROUPSTATE_TEST_CLOCK");
        int file = path == NULL ? -1 : open(path, O_RDONLY | O_CLOEXEC);
        void *page = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
        // Without the clock that it asks for, a test must not go on.
        if (page == MAP_FAILED) abort();
        close(file);
        offset = mapped = page;
    }
    return *mapped;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    long failed = syscall(SYS_clock_gettime, clock, time);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        const int64_t second = 1000000000;
        int64_t moved = time->tv_sec * second + time->tv_nsec + nanoseconds();
        time->tv_sec = moved / second;
        time->tv_nsec = moved % second;
    }
    return (int)failed;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone) {
    (void)zone;
    struct timespec now;
    int failed = clock_gettime(CLOCK_REALTIME, &now);
    time->tv_sec = now.tv_sec;
    time->tv_usec = now.tv_nsec / 1000;
    return failed;
}

time_t time(time_t *told) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (told != NULL) *told = now.tv_sec;
    return now.tv_sec;
}
