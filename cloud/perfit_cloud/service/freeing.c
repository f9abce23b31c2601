/* free() and realloc() that overwrite what they let go of; loaded before the C library (service/freeing.py).

   A tensor is not overwritten at once: the next one of its size does that, in the same pass, and the rest are
   overwritten when perfit_overwrite() is called. Done at once and by one thread, it took a tenth of a pass
   whose threads each had their part of the tensor in a cache of their own. What is kept so goes to no other
   use: only to posix_memalign, from which torch has its tensors, and never in part. */

#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

extern void *__libc_malloc(size_t);
extern void *__libc_memalign(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void __libc_free(void *);

#define TENSOR ((size_t)64 << 10) /* bytes; what is smaller is overwritten at once */
#define ALIGNED ((size_t)64)      /* as torch asks for them */
#define MOST ((size_t)1 << 30)    /* bytes kept */
#define LISTS 4096                /* by size, in steps of TENSOR */

struct block { struct block *next; };

static struct block *kept[LISTS];
static size_t kept_bytes;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void take_lock(void) { pthread_mutex_lock(&lock); }
static void give_lock(void) { pthread_mutex_unlock(&lock); }

/* A child of fork() has only the thread that forked, and no other would give the lock back. */
__attribute__((constructor)) static void prepare(void) { pthread_atfork(take_lock, give_lock, give_lock); }

static void overwrite(void *start, size_t size) {
    memset(start, 0, size);
    __asm__ __volatile__("" : : "r"(start) : "memory"); /* no compiler may leave it out */
}

static int keep(void *block, size_t size) {
    int fits = size >= TENSOR && size / TENSOR < LISTS && (uintptr_t)block % ALIGNED == 0;
    if (!fits) return 0;
    take_lock();
    fits = kept_bytes + size <= MOST;
    if (fits) {
        struct block **list = &kept[size / TENSOR];
        ((struct block *)block)->next = *list;
        *list = block;
        kept_bytes += size;
    }
    give_lock();
    return fits;
}

/* A kept block for so many bytes, what it has beyond them overwritten; or NULL. */
static void *take(size_t size) {
    struct block *found = NULL;
    size_t usable = 0;
    if (size / TENSOR >= LISTS) return NULL;
    take_lock();
    for (struct block **at = &kept[size / TENSOR]; *at; at = &(*at)->next) {
        usable = malloc_usable_size(*at);
        if (usable >= size && usable - size <= 2 * ALIGNED) { /* what the C library adds to the same size */
            found = *at;
            *at = found->next;
            kept_bytes -= usable;
            break;
        }
    }
    give_lock();
    if (found) overwrite((char *)found + size, usable - size);
    return found;
}

/* Overwrite what is kept, and free it. Returns how many bytes. */
size_t perfit_overwrite(void) {
    size_t total = 0;
    for (size_t number = 0; number < LISTS; number++) {
        take_lock();
        struct block *list = kept[number];
        kept[number] = NULL;
        for (struct block *at = list; at; at = at->next) kept_bytes -= malloc_usable_size(at);
        give_lock();
        while (list) {
            struct block *next = list->next;
            size_t size = malloc_usable_size(list);
            overwrite(list, size);
            __libc_free(list);
            list = next;
            total += size;
        }
    }
    return total;
}

void free(void *block) {
    if (!block) return;
    size_t size = malloc_usable_size(block);
    if (keep(block, size)) return;
    overwrite(block, size);
    __libc_free(block);
}

void *realloc(void *block, size_t size) {
    if (!block) return __libc_malloc(size);
    if (!size) {
        free(block);
        return NULL;
    }
    size_t had = malloc_usable_size(block);
    if (size <= had) {
        overwrite((char *)block + size, had - size);
        return __libc_realloc(block, size); /* which stays where it is */
    }
    void *moved = __libc_malloc(size);
    if (!moved) return NULL;
    memcpy(moved, block, had);
    free(block);
    return moved;
}

int posix_memalign(void **made, size_t alignment, size_t size) {
    if (alignment < sizeof(void *) || (alignment & (alignment - 1))) return EINVAL;
    void *block = alignment <= ALIGNED && size >= TENSOR ? take(size) : NULL;
    int before = errno;
    if (!block) block = __libc_memalign(alignment, size);
    if (!block && perfit_overwrite()) block = __libc_memalign(alignment, size);
    errno = before;
    if (!block) return ENOMEM;
    *made = block;
    return 0;
}
