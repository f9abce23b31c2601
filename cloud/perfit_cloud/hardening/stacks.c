/* Overwrites what functions that have returned left on stacks; one library with allocator.c.

   A kernel that multiplies matrices may pack them on the stack, a hundred KiB deep, and no free() ever hears
   of it. So each thread overwrites its own stack below the frame it is in, where nothing is alive. Nobody
   else can: the thread may go on at any moment. Nor would a signal to each thread do: the kernel saves the
   vector registers, with what was multiplied last, on the very stack that is to be overwritten. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define ALIVE ((size_t)256)    /* bytes below a frame's address: its own, and the call of memset() */
#define DEEPEST ((size_t)2048) /* pages; no kernel goes deeper */

typedef int create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
typedef void region(void (*)(void *), void *, unsigned, unsigned);

struct begun {
    void *(*start)(void *);
    void *argument;
};

static __thread char *lowest, *highest; /* bounds of this thread's stack, once known */
static __thread int began_others; /* whether this thread began any: OpenMP's workers may be among them */
static create *begin;
static pthread_key_t ending;
static size_t page = 4096;

/* -- registers, which the next signal would save on the stack -------------------------------------------- */

#if defined(__x86_64__)
static int has_avx, has_avx512, tells_use;

static void look_at_processor(void) {
    unsigned a, b, c, d;
    __builtin_cpu_init();
    has_avx = __builtin_cpu_supports("avx") != 0;
    has_avx512 = __builtin_cpu_supports("avx512f") != 0;
    tells_use = has_avx && __get_cpuid_count(13, 1, &a, &b, &c, &d) && (a & 4);
}

static int has_tiles_in_use(void) {
    unsigned low, high;
    if (!tells_use) return 0;
    __asm__ __volatile__("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
    return (low & 0x60000) != 0; /* AMX's configuration and its tiles */
}

static void clear_registers(void) {
    if (has_avx)
        __asm__ __volatile__("vzeroall" : : : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",
                             "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
    if (has_avx512) /* no compiler for all of x86-64 keeps anything in these */
        __asm__ __volatile__(".irp n,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
                             "vpxorq %zmm\\n, %zmm\\n, %zmm\\n\n"
                             ".endr");
    if (has_tiles_in_use()) /* else it may be forbidden */
        __asm__ __volatile__(".byte 0xc4, 0xe2, 0x78, 0x49, 0xc0"); /* tilerelease */
}
#else
static void look_at_processor(void) {}
static void clear_registers(void) {}
#endif

/* -- the stack of one thread ----------------------------------------------------------------------------- */

static void find_stack(void) {
    pthread_attr_t about;
    void *start;
    size_t size;
    if (pthread_getattr_np(pthread_self(), &about)) return;
    if (!pthread_attr_getstack(&about, &start, &size)) {
        lowest = start;
        highest = lowest + size;
    }
    pthread_attr_destroy(&about);
}

/* The first page of [low, high) that was ever touched. One that is swapped out is not seen, which is one more
   reason why a hardened process locks its memory. */
__attribute__((noinline)) static char *first_touched(char *low, char *high) {
    unsigned char touched[DEEPEST];
    low = (char *)(((uintptr_t)low + page - 1) & ~(uintptr_t)(page - 1));
    if (high - low > (ptrdiff_t)(DEEPEST * page)) low = high - DEEPEST * page;
    size_t pages = (size_t)(high - low) / page;
    if (mincore(low, pages * page, touched)) { /* the main thread's: it grows, and is mapped as far as it got */
        for (size_t absent = 0, bound = pages; absent < bound;) {
            size_t half = (absent + bound) / 2;
            if (mincore(low + half * page, (pages - half) * page, touched)) absent = half + 1;
            else bound = half;
            if (absent == bound) return low + bound * page;
        }
        return high;
    }
    for (size_t number = 0; number < pages; number++)
        if (touched[number] & 1) return low + number * page;
    return high;
}

__attribute__((noinline)) static void overwrite_from(char *low) {
    char *high = (char *)__builtin_frame_address(0) - ALIVE;
    if (low < high) memset(low, 0, (size_t)(high - low));
    __asm__ __volatile__("" : : "r"(low) : "memory"); /* no compiler may leave it out */
}

/* Overwrites what lies below the caller on its stack, and what is in its vector registers. */
__attribute__((noinline)) void perfit_overwrite_stack(void) {
    char *here = __builtin_frame_address(0);
    int before = errno;
    if (!lowest) find_stack();
    if (lowest < here && here < highest) /* else it is a coroutine's, and what lies below is not known */
        overwrite_from(first_touched(lowest, (char *)((uintptr_t)here & ~(uintptr_t)(page - 1))));
    clear_registers();
    errno = before;
}

/* -- all threads that worked for this one ---------------------------------------------------------------- */

static void overwrite_unless(void *caller) {
    if (!pthread_equal(pthread_self(), *(pthread_t *)caller)) perfit_overwrite_stack();
}

/* The same in the caller and in the idle threads of its OpenMP pool, which has so many with the caller: by a
   parallel region, the one way to reach each of them. Not where the caller has begun no thread: it has no pool,
   and would be given one. */
void perfit_overwrite_stacks(unsigned threads) {
    static region *found;
    if (threads > 1 && began_others) {
        region *parallel = __atomic_load_n(&found, __ATOMIC_RELAXED);
        pthread_t caller = pthread_self();
        if (!parallel) { /* it is loaded with torch */
            parallel = (region *)dlsym(RTLD_DEFAULT, "GOMP_parallel");
            __atomic_store_n(&found, parallel, __ATOMIC_RELAXED);
        }
        if (parallel) parallel(overwrite_unless, &caller, threads, 0);
    }
    perfit_overwrite_stack();
}

static void overwrite_at_end(void *unused) {
    (void)unused;
    perfit_overwrite_stack();
}

static void *run(void *given) {
    struct begun begun = *(struct begun *)given;
    free(given);
    pthread_setspecific(ending, &ending); /* its destructor runs however the thread ends */
    return begun.start(begun.argument);
}

__attribute__((constructor)) static void prepare_threads(void) {
    if (begin) return; /* another library's constructor began a thread before */
    page = (size_t)sysconf(_SC_PAGESIZE);
    begin = (create *)dlsym(RTLD_NEXT, "pthread_create");
    if (!begin || pthread_key_create(&ending, overwrite_at_end)) abort(); /* in the trial, before it is used */
    look_at_processor();
}

/* The C library keeps the stacks of threads that ended, for others, and some of what is on them. */
int pthread_create(pthread_t *made, const pthread_attr_t *about, void *(*start)(void *), void *argument) {
    prepare_threads();
    struct begun *begun = malloc(sizeof *begun);
    if (!begun) return EAGAIN;
    *begun = (struct begun){start, argument};
    began_others = 1;
    int error = begin(made, about, run, begun);
    if (error) free(begun);
    return error;
}
