/* umf.h: the pools of the Unified Memory Framework, over the provider that the file which includes this names:
 *   UMF_POOL       "Disjoint" or "Scalable"
 *   UMF_PROVIDER   "Fixed" (memory that is there already) or "Os" (mapped as it grows)
 *
 * Without adapter_aligned: freeing a block of 256 KiB and more that umfPoolAlignedMalloc made over OS memory loses the tracker's entry (1.2.0), and
 * later allocations there fail. */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "adapter.h"

#define ADAPTER_LIBRARY "libumf.so"
#define ADAPTER_PACKAGE "umf"
#define ADAPTER_GET "pip install umf, and for its scalable pool: apt install libtbbmalloc2"

#define UMF_FIXED_BYTES ((size_t)20 << 30) /* of addresses; none is touched before a block lies there */

static void *umf_pool;
static void *(*umf_alloc)(void *, size_t);
static int (*umf_free)(void *, void *), (*umf_trim)(void *, size_t);

static const char *umf_open_pool(const void *provider_ops, void *provider_params, const void *pool_ops, void *pool_params) {
    const char *missing = NULL;
    int (*provider_create)(const void *, const void *, void **);
    int (*pool_create)(const void *, void *, const void *, uint32_t, void **);
    void *provider;
    ADAPTER_SYMBOL(provider_create, "umfMemoryProviderCreate");
    ADAPTER_SYMBOL(pool_create, "umfPoolCreate");
    if (!missing && provider_create(provider_ops, provider_params, &provider)) {
        missing = "umfMemoryProviderCreate refuses";
    }
    if (!missing && pool_create(pool_ops, provider, pool_params, 0, &umf_pool)) {
        missing = "umfPoolCreate refuses (the scalable pool wants libtbbmalloc.so.2)";
    }
    return missing;
}

static const char *adapter_open(const char *path) {
    const char *missing = adapter_load(path);
    const void *(*provider_ops)(void), *(*pool_ops)(void);
    int (*provider_params)(void **), (*fixed_params)(void *, size_t, void **), (*pool_params)(void **);
    void *of_provider = NULL, *of_pool = NULL, *memory;
    ADAPTER_SYMBOL(provider_ops, "umf" UMF_PROVIDER "MemoryProviderOps");
    ADAPTER_SYMBOL(provider_params, "umf" UMF_PROVIDER "MemoryProviderParamsCreate");
    ADAPTER_SYMBOL(fixed_params, "umfFixedMemoryProviderParamsCreate");
    ADAPTER_SYMBOL(pool_ops, "umf" UMF_POOL "PoolOps");
    ADAPTER_SYMBOL(pool_params, "umf" UMF_POOL "PoolParamsCreate");
    ADAPTER_SYMBOL(umf_alloc, "umfPoolMalloc");
    ADAPTER_SYMBOL(umf_free, "umfPoolFree");
    ADAPTER_SYMBOL(umf_trim, "umfPoolTrimMemory");
    if (missing || pool_params(&of_pool)) {
        return missing ? missing : "no parameters for the pool";
    }
    if (UMF_PROVIDER[0] == 'F') {
        memory = mmap(NULL, UMF_FIXED_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        missing = memory == MAP_FAILED || fixed_params(memory, UMF_FIXED_BYTES, &of_provider) ? "no fixed provider" : NULL;
    } else {
        missing = provider_params(&of_provider) ? "no provider of the system's memory" : NULL;
    }
    return missing ? missing : umf_open_pool(provider_ops(), of_provider, pool_ops(), of_pool);
}

static inline void *adapter_alloc(size_t size) {
    return umf_alloc(umf_pool, size);
}

static inline void adapter_free(void *block) {
    (void)umf_free(umf_pool, block);
}

#define ADAPTER_TRIM
static void adapter_trim(void) {
    (void)umf_trim(umf_pool, 0);
}
