/* free() and realloc() that overwrite what they let go of; loaded before the C library (hardening/allocator.py).

   A freed tensor is cached, not overwritten at once. The next tensor of its size reuses the block and overwrites
   it in the same pass; the scrubber overwrites the rest between two passes. Overwriting at once, in one thread,
   took a tenth of a pass, because each thread of the pass has its part of the tensor in its own CPU cache. Only
   posix_memalign, from which torch gets its tensors, reuses a cached block, and only whole. Sizes are rounded up:
   hardly two passes have equally many rows, and with exact sizes the second could use nothing of the first. */

#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

extern void *__libc_malloc(size_t);
extern void *__libc_memalign(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void __libc_free(void *);

#define TENSOR ((size_t)64 << 10) /* bytes; smaller blocks are overwritten at once */
#define ALIGNED ((size_t)64)      /* bytes, as torch asks for */
#define LISTS ((size_t)4096)      /* by size, in steps of STEP, over and over */
#define STEP ((size_t)4096)
#define CLASSES 8         /* sizes of tensors between a power of two and the next */
#define LOOKS 32 /* most blocks of a list to look at; other sizes may fill a list */
#define MAPPED ((size_t)2) /* a bit of the size in front of a block (malloc.c): it has pages of its own */

struct block { struct block *next; };

static struct block *cached[LISTS];
static size_t cached_bytes;
static size_t most = (size_t)1 << 30; /* bytes cached */
static size_t page = 4096;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void take_lock(void) { pthread_mutex_lock(&lock); }
static void give_lock(void) { pthread_mutex_unlock(&lock); }

__attribute__((constructor)) static void prepare(void) {
    page = (size_t)sysconf(_SC_PAGESIZE);
    /* A child of fork() has only the thread that forked, and no other would give the lock back. */
    pthread_atfork(take_lock, give_lock, give_lock);
}

static void overwrite(void *start, size_t size) {
    memset(start, 0, size);
    __asm__ __volatile__("" : : "r"(start) : "memory"); /* no compiler may leave it out */
}

static int is_mapped(const void *block) { return (((const size_t *)block)[-1] & MAPPED) != 0; }

static void let_go(void *block, size_t size) {
    if (!is_mapped(block)) overwrite(block, size); /* else its pages return to the system, which clears them */
    __libc_free(block);
}

static int cache_block(void *block, size_t size) {
    if (size < TENSOR || (uintptr_t)block % ALIGNED) return 0;
    struct block **list = &cached[size / STEP % LISTS];
    take_lock();
    if (*list == block) abort(); /* freed twice */
    int fits = cached_bytes + size <= most;
    if (fits) {
        ((struct block *)block)->next = *list;
        *list = block;
        cached_bytes += size;
    }
    give_lock();
    return fits;
}

/* A cached block of this size, overwritten from the `used` bytes on; or NULL. */
static void *take_cached(size_t size, size_t used) {
    size_t surplus = 2 * ALIGNED + 2 * page; /* at most, of what the C library gives for one and the same size */
    size_t usable = 0;
    struct block *found = NULL;
    if (size > most) return NULL;
    take_lock();
    for (size_t number = size / STEP; !found && number <= (size + surplus) / STEP; number++) {
        struct block **at = &cached[number % LISTS];
        for (int looks = 0; *at && looks < LOOKS; at = &(*at)->next, looks++) {
            usable = malloc_usable_size(*at);
            if (usable >= size && usable - size <= surplus) {
                found = *at;
                *at = found->next;
                cached_bytes -= usable;
                break;
            }
        }
    }
    give_lock();
    if (found) overwrite((char *)found + used, usable - used);
    return found;
}

static size_t rounded(size_t size) {
    size_t power = (size_t)1 << (8 * sizeof(size) - 1 - (size_t)__builtin_clzl(size));
    size_t step = power / CLASSES;
    size_t whole = (size + step - 1) / step * step;
    return whole < size ? size : whole; /* beyond any memory */
}

void perfit_cache_at_most(size_t bytes) { most = bytes; }

/* Take all cached blocks, for perfit_overwrite(): no tensor reuses them from here on. */
void *perfit_take_cached(void) {
    struct block *taken = NULL;
    take_lock();
    for (size_t number = 0; number < LISTS; number++)
        while (cached[number]) {
            struct block *block = cached[number];
            cached[number] = block->next;
            block->next = taken;
            taken = block;
        }
    cached_bytes = 0;
    give_lock();
    return taken;
}

void perfit_overwrite(void *taken) {
    for (struct block *block = taken; block;) {
        struct block *next = block->next;
        let_go(block, malloc_usable_size(block));
        block = next;
    }
}

void free(void *block) {
    if (!block) return;
    size_t size = malloc_usable_size(block);
    if (!cache_block(block, size)) let_go(block, size);
}

void *realloc(void *block, size_t size) {
    if (!block) return __libc_malloc(size);
    if (!size) {
        free(block);
        return NULL;
    }
    size_t had = malloc_usable_size(block);
    if (size <= had) { /* it stays where it is */
        if (!is_mapped(block)) overwrite((char *)block + size, had - size);
        return __libc_realloc(block, size);
    }
    void *moved = __libc_malloc(size);
    if (!moved) return NULL;
    memcpy(moved, block, had);
    free(block);
    return moved;
}

int posix_memalign(void **made, size_t alignment, size_t size) {
    if (alignment < sizeof(void *) || (alignment & (alignment - 1))) return EINVAL;
    int before = errno;
    void *block = NULL;
    if (size >= TENSOR && alignment <= ALIGNED) {
        size_t used = size;
        size = rounded(size);
        block = take_cached(size, used);
    }
    if (!block) block = __libc_memalign(alignment, size);
    if (!block) {
        perfit_overwrite(perfit_take_cached());
        block = __libc_memalign(alignment, size);
    }
    errno = before;
    if (!block) return ENOMEM;
    *made = block;
    return 0;
}
