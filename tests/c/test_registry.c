/* test_registry.c: the registry against the obvious model, a sorted array; and how much memory it takes.
 *
 *   test_registry [seed = 1] [rounds = 20000] [ranges = 200000]
 */
#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "check.h"
#include "registry.h"

#define MODEL_MAX 4096
#define PAGE ((uintptr_t)4096)

static struct uvas_entry model[MODEL_MAX];
static size_t count;

static size_t model_after(uintptr_t address) {
    size_t i = 0;
    while (i < count && model[i].end <= address) {
        i++;
    }
    return i;
}

static void same(const struct uvas_entry *a, const struct uvas_entry *b) {
    CHECK(a->base == b->base && a->end == b->end && a->value == b->value);
}

static void compare_at(uintptr_t address) {
    struct uvas_entry seen;
    size_t i = model_after(address);
    int found = uvas_registry_find(address, &seen);
    bool expected = i < count && model[i].base <= address && !(model[i].value & UVAS_REGISTRY_HIDDEN);
    CHECK(found == expected);
    if (found) {
        same(&seen, &model[i]);
    }
    CHECK(uvas_registry_next(address, &seen) == (i < count));
    if (i < count) {
        same(&seen, &model[i]);
    }
    size_t last = count;
    while (last > 0 && model[last - 1].base >= address) {
        last--;
    }
    CHECK(uvas_registry_previous(address, &seen) == (last > 0));
    if (last > 0) {
        same(&seen, &model[last - 1]);
    }
}

static void check_registry(void) {
    char why[256] = "";
    uvas_registry_lock();
    int rc = uvas_registry_check(why, sizeof why);
    uvas_registry_unlock();
    if (rc < 0) {
        fprintf(stderr, "%s\n", why);
    }
    CHECK(rc == 0);
}

static void try_insert(uintptr_t base, uintptr_t end, uint64_t value) {
    struct uvas_entry taken;
    size_t i = model_after(base);
    bool overlaps = i < count && model[i].base < end;
    CHECK_OK(uvas_registry_lock_for_insert());
    int rc = uvas_registry_insert(base, end, value, &taken);
    uvas_registry_unlock();
    CHECK(rc == (overlaps ? -EEXIST : 0));
    if (overlaps) {
        same(&taken, &model[i]);
    } else if (count < MODEL_MAX) {
        memmove(&model[i + 1], &model[i], (count - i) * sizeof *model);
        model[i] = (struct uvas_entry){.base = base, .end = end, .value = value};
        count++;
    }
}

static void remove_at(size_t i) {
    uvas_registry_lock();
    uvas_registry_remove(model[i].base, model[i].end);
    uvas_registry_unlock();
    memmove(&model[i], &model[i + 1], (count - i - 1) * sizeof *model);
    count--;
}

/* Sizes from one page to the whole space, places crowded or far apart. */
static void against_model(uint64_t seed, uint64_t rounds) {
    uint64_t random = seed * 2 + 1;
    for (uint64_t round = 0; round < rounds; round++) {
        uint64_t dice = next_random(&random) % 100, grow = (round / 3000) % 2 == 0 ? 70 : 35;
        uintptr_t span = next_random(&random) % 8 == 0 ? (uintptr_t)1 << 46 : (uintptr_t)1 << 26;
        uintptr_t base = PAGE * (1 + next_random(&random) % (span / PAGE));
        if (dice < grow && count < MODEL_MAX) {
            uintptr_t size = PAGE << (next_random(&random) % 64 == 0 ? next_random(&random) % 34 : next_random(&random) % 3);
            try_insert(base, base + size, next_random(&random) & ~UVAS_REGISTRY_HIDDEN);
        } else if (dice < 90 && count > 0) {
            remove_at(next_random(&random) % count);
        } else if (count > 0) {
            size_t i = next_random(&random) % count;
            model[i].value ^= UVAS_REGISTRY_HIDDEN;
            uvas_registry_lock();
            uvas_registry_set(model[i].base, model[i].end, model[i].value);
            uvas_registry_unlock();
        }
        compare_at(base);
        if (count > 0) {
            size_t i = next_random(&random) % count;
            compare_at(model[i].base);
            compare_at(model[i].base - 1);
            compare_at(model[i].end - 1);
            compare_at(model[i].end);
        }
        if (round % 64 == 0) {
            check_registry();
        }
    }
    while (count > 0) {
        remove_at(next_random(&random) % count);
    }
    compare_at(PAGE);
    check_registry();
    puts("ok against_model");
}

static void remove_place(uintptr_t base) {
    struct uvas_entry there;
    CHECK(uvas_registry_next(base, &there) && there.base == base);
    uvas_registry_lock();
    uvas_registry_remove(base, there.end);
    uvas_registry_unlock();
}

/* Whatever the size of the ranges; also after most of them are gone. */
static void memory_per_range(uint64_t seed, size_t ranges) {
    uint64_t random = seed * 2 + 1;
    struct uvas_registry_stats before, full, sparse;
    uvas_registry_lock();
    uvas_registry_stats(&before);
    uvas_registry_unlock();
    for (size_t i = 0; i < ranges; i++) { /* in an order that is not sorted: a bijection of the index */
        uintptr_t place = (uintptr_t)(i * UINT64_C(2654435761) % ranges);
        uintptr_t base = (place + 1) * 16 * PAGE;
        CHECK_OK(uvas_registry_lock_for_insert());
        CHECK_OK(uvas_registry_insert(base, base + PAGE * (1 + next_random(&random) % 16), i, NULL));
        uvas_registry_unlock();
    }
    uvas_registry_lock();
    uvas_registry_stats(&full);
    uvas_registry_unlock();
    CHECK(full.ranges == ranges);
    double each = (double)(full.node_bytes) / (double)ranges;
    printf("   %zu ranges: %.1f bytes each, %zu levels\n", ranges, each, full.depth);
    CHECK(ranges < 10000 || each <= 128);
    for (size_t place = 0; place < ranges; place++) {
        if (place % 10 != 0) {
            remove_place((place + 1) * 16 * PAGE);
        }
    }
    uvas_registry_lock();
    uvas_registry_stats(&sparse);
    CHECK(ranges < 10000 || sparse.tree_bytes <= 128 * sparse.ranges);
    uvas_registry_unlock();
    check_registry();
    for (size_t place = 0; place < ranges; place += 10) {
        remove_place((place + 1) * 16 * PAGE);
    }
    check_registry();
    puts("ok memory_per_range");
}

/* A forked child starts with nothing, and with every node of its parent's to use again. */
static void forget_everything(void) {
    struct uvas_entry seen;
    struct uvas_registry_stats before, after;
    for (uintptr_t i = 1; i <= 5000; i++) {
        CHECK_OK(uvas_registry_lock_for_insert());
        CHECK_OK(uvas_registry_insert(i * 2 * PAGE, (i * 2 + 1) * PAGE, i, NULL));
        uvas_registry_unlock();
    }
    uvas_registry_lock();
    uvas_registry_stats(&before);
    uvas_registry_forget();
    uvas_registry_unlock();
    CHECK(!uvas_registry_next(0, &seen));
    check_registry();
    for (uintptr_t i = 1; i <= 5000; i++) {
        CHECK_OK(uvas_registry_lock_for_insert());
        CHECK_OK(uvas_registry_insert(i * 2 * PAGE, (i * 2 + 1) * PAGE, i, NULL));
        uvas_registry_unlock();
    }
    check_registry();
    uvas_registry_lock();
    uvas_registry_stats(&after);
    uvas_registry_unlock();
    CHECK(after.ranges == 5000 && after.node_bytes == before.node_bytes);
    puts("ok forget_everything");
}

int main(int argc, char **argv) {
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    against_model(seed, argc > 2 ? strtoull(argv[2], NULL, 0) : 20000);
    memory_per_range(seed, argc > 3 ? strtoull(argv[3], NULL, 0) : 200000);
    forget_everything();
    return 0;
}
