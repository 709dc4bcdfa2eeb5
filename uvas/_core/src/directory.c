/* directory.c: the protocol of one granule, as a function. See directory.h. */
#include "directory.h"

#include <assert.h>

static uint32_t lowest(uint32_t parties) {
    return (uint32_t)__builtin_ctz(parties);
}

static struct uvas_transition upgrade(uint32_t flags, uint32_t holders, uint32_t party) {
    uint32_t others = holders & ~(1u << party);
    return (struct uvas_transition){.steps = (others ? UVAS_STEP_DROP : 0u) | UVAS_STEP_UNPROTECT,
                                    .source = party,
                                    .drops = others,
                                    .after = flags | (1u << party) | UVAS_MODIFIED};
}

static struct uvas_transition bring(uint32_t word, uint32_t party, bool write) {
    uint32_t holders = uvas_holders(word), devices = holders & ~1u;
    bool take = devices == 0; /* only the host has it */
    struct uvas_transition next = {.steps = UVAS_STEP_FILL, .source = take ? UVAS_HOST : lowest(devices)};
    next.steps |= take ? UVAS_STEP_TAKE : word & UVAS_MODIFIED ? UVAS_STEP_PROTECT : 0u;
    next.steps |= take && !write ? UVAS_STEP_KEEP : 0u;
    next.drops = write ? holders & ~(take ? 1u : 0u) : 0u; /* what was taken is dropped already */
    next.steps |= next.drops ? UVAS_STEP_DROP : 0u;
    next.steps |= write ? UVAS_STEP_UNPROTECT : 0u; /* filling maps its pages, protected */
    next.after = (word & ~(UVAS_PARTY_BITS | UVAS_MODIFIED)) | 1u << party | (write ? UVAS_MODIFIED : holders);
    return next;
}

struct uvas_transition uvas_directory_next(uint32_t word, uint32_t party, bool write) {
    assert(party < UVAS_PARTIES);
    uint32_t holders = uvas_holders(word), mine = 1u << party, flags = word & ~(UVAS_PARTY_BITS | UVAS_MODIFIED);
    assert(!(word & UVAS_MODIFIED) || (holders & (holders - 1)) == 0);
    if (holders == 0) {
        return (struct uvas_transition){.steps = UVAS_STEP_ZERO | (party != UVAS_HOST ? UVAS_STEP_MAP : 0u),
                                        .source = party,
                                        .after = flags | mine | UVAS_MODIFIED};
    }
    if (holders & mine) {
        return write && !(word & UVAS_MODIFIED) ? upgrade(flags, holders, party)
                                                : (struct uvas_transition){.source = party, .after = word};
    }
    return bring(word, party, write);
}

int uvas_test_transition(uint32_t word, uint32_t party, uint32_t write, struct uvas_test_step *out) {
    if (party >= UVAS_PARTIES) {
        return -1;
    }
    struct uvas_transition next = uvas_directory_next(word, party, write != 0);
    *out = (struct uvas_test_step){.steps = next.steps, .source = next.source, .drops = next.drops, .after = next.after};
    return 0;
}
