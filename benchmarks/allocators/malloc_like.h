/* malloc_like.h: the adapter of every allocator whose calls look like malloc and free. Its file is data (TOML); the harness turns that into the
 * macros below.
 *
 * What any adapter gives, and this one as the example:
 *   ADAPTER_NAME      what tables call it
 *   ADAPTER_LIBRARY   the file name of its library, as for dlopen; "" if it needs none
 *   ADAPTER_PACKAGE   the Python package that brings the library, or ""
 *   ADAPTER_GET       how to get it
 *   adapter_open      loads it: NULL, or the reason why it cannot be had
 *   adapter_alloc     a block of `size` bytes, or NULL
 *   adapter_free      takes the block back
 * and, where it can, with the macro that says so:
 *   ADAPTER_BOUND     no allocator to choose but a limit to compare with; nothing is called better or worse than it
 *   ADAPTER_ALONE     one thread only
 *   ADAPTER_USABLE    adapter_usable: how many bytes of the block may be used
 *   ADAPTER_ALIGNED   adapter_aligned: a block at a multiple of `align`
 *   ADAPTER_TRIM      adapter_trim: gives back to the system what it can
 *   ADAPTER_HOLES     adapter_holes: bytes in holes, and in the largest
 *
 * The hot calls go through one function pointer, got from dlsym, in every adapter: nobody is inlined, and nobody is called twice. */
#include "adapter.h"

static void *(*library_alloc)(size_t);
static void (*library_free)(void *);

static inline void *adapter_alloc(size_t size) {
    return library_alloc(size);
}

static inline void adapter_free(void *block) {
    library_free(block);
}

#ifdef LIBRARY_USABLE
#define ADAPTER_USABLE
static size_t (*library_usable)(void *);

static size_t adapter_usable(void *block) {
    return library_usable(block);
}
#endif

#ifdef LIBRARY_ALIGNED
#define ADAPTER_ALIGNED
static void *(*library_aligned)(size_t, size_t);

static void *adapter_aligned(size_t align, size_t size) {
    return library_aligned(align, size);
}
#endif

#ifdef LIBRARY_TRIM
#define ADAPTER_TRIM
static int (*library_trim)(size_t);

static void adapter_trim(void) {
    (void)library_trim(LIBRARY_TRIM_WITH);
}
#endif

static const char *adapter_open(const char *path) {
    const char *missing = adapter_load(path);
    ADAPTER_SYMBOL(library_alloc, LIBRARY_ALLOC);
    ADAPTER_SYMBOL(library_free, LIBRARY_FREE);
#ifdef LIBRARY_USABLE
    ADAPTER_SYMBOL(library_usable, LIBRARY_USABLE);
#endif
#ifdef LIBRARY_ALIGNED
    ADAPTER_SYMBOL(library_aligned, LIBRARY_ALIGNED);
#endif
#ifdef LIBRARY_TRIM
    ADAPTER_SYMBOL(library_trim, LIBRARY_TRIM);
#endif
    return missing;
}
