/* adapter.h: loading a library and finding its calls, for adapters. What an adapter is: malloc_like.h. */
#ifndef UVAS_BENCH_ADAPTER_H
#define UVAS_BENCH_ADAPTER_H

#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>

static void *adapter_library;

static inline const char *adapter_load(const char *path) {
    adapter_library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    return adapter_library ? NULL : dlerror();
}

/* Inside adapter_open, whose `missing` stays the first thing that was not there. dlsym gives void * for functions too: copied, not cast. */
#define ADAPTER_SYMBOL(call, name)                                                             \
    do {                                                                                       \
        void *found_ = missing ? NULL : dlsym(adapter_library, name);                          \
        __builtin_memcpy(&(call), &found_, sizeof found_);                                     \
        missing = missing ? missing : found_ ? NULL : "the library has no " name;              \
    } while (0)

#endif
