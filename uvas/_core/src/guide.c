/* guide.c: see guide.h. */
#include "guide.h"

#include <assert.h>

#define SLOTS_PER_LEAF 2u /* at least; the table's size is a power of two */
#define SHIFT_LEAST 12u
#define SLACK_PART 8u /* room for ranges to come, on each side, of the window */
#define SLACK_MOST UINT64_C(32)
#define FAR_APART 4u /* the whole over the middle three quarters: beyond it, the ends are left out */

size_t uvas_guide_bytes(size_t leaves) {
    size_t bytes = UVAS_GUIDE_BYTES_LEAST;
    while (bytes < UVAS_GUIDE_BYTES_MOST && uvas_guide_capacity(bytes) < SLOTS_PER_LEAF * leaves) {
        bytes *= 2;
    }
    return bytes;
}

void uvas_guide_lay(struct uvas_guide *guide, uintptr_t low, uintptr_t high) {
    size_t capacity = uvas_guide_capacity(guide->bytes);
    uint64_t shift = SHIFT_LEAST;
    assert(low < high);
    for (size_t i = 0; i < capacity; i++) {
        uvas_guide_set(guide, i, 0, &uvas_guide_nothing);
    }
    while (((high - 1) >> shift) - (low >> shift) + 2 + 2 * SLACK_MOST > capacity) {
        shift++;
    }
    uintptr_t slack = (high - low) / SLACK_PART;
    slack = slack >> shift > SLACK_MOST ? SLACK_MOST << shift : slack;
    low = low > slack ? low - slack : 0;
    high += slack;
    __atomic_store_n(&guide->last, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&guide->shift, shift, __ATOMIC_RELAXED);
    __atomic_store_n(&guide->origin, low >> shift << shift, __ATOMIC_RELAXED);
    __atomic_store_n(&guide->last, ((high - 1) >> shift) - (low >> shift) + 1, __ATOMIC_RELAXED);
}

void uvas_guide_window(uintptr_t *low, uintptr_t *high, uintptr_t first, uintptr_t last) {
    uintptr_t middle = last - first;
    if ((*high - *low) / FAR_APART <= middle) {
        return;
    }
    *low = first - *low > middle ? first - middle : *low;
    *high = *high - last > middle ? last + middle : *high;
}
