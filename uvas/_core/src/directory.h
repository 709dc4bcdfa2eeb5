/* directory.h: who has a granule of unified memory, and what has to happen before somebody else has it.
 *
 * A *granule* is the unit that moves: a power of two of bytes. A *party* is the host (0) or a device with memory of its own (1 and up), numbered within
 * its domain. A word says who holds a granule:
 *
 *   MODIFIED set     one party holds it, reads and writes
 *   MODIFIED clear   all its holders read; a write waits. No holder: nowhere; it reads as zeros
 *
 * uvas_directory_next is the protocol as a function of that word: no lock, no system call, no memory. moves.c does what it says, in this order, and a
 * model in the tests is searched exhaustively with the same order of steps:
 *
 *   take       the host's pages are moved out of everybody's reach (or the device that may write is protected: what it has is stable then)
 *   fill       the new holder gets a complete copy, write-protected: now both may read
 *   keep       the host gets a copy back, likewise, where it goes on reading
 *   drop       all others lose theirs, where one is to write
 *   unprotect  the new holder may write
 */
#ifndef UVAS_DIRECTORY_H
#define UVAS_DIRECTORY_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "uvas.h"

#define UVAS_HOST 0u
#define UVAS_PARTIES 28u /* the host and 27 devices: the other bits of a word are flags */
#define UVAS_PARTY_BITS ((1u << UVAS_PARTIES) - 1)

#define UVAS_COMMITTED (1u << 28) /* there is memory */
#define UVAS_MODIFIED (1u << 29)
#define UVAS_BYTES_LOST (1u << 30) /* its bytes are gone: whoever touches it is told (SIGBUS) */

struct uvas_granule {
    _Atomic uint32_t word; /* parties and flags. Written by the pager alone, read by anyone */
    uint32_t until;        /* pager's alone. Microseconds, wrapping: until then it stays where it is; bit 0: for a thread that must not lose it */
};

enum uvas_transition_step {
    UVAS_STEP_ZERO = 1,      /* there is nothing to bring: zeros */
    UVAS_STEP_TAKE = 2,      /* the host's pages go to staging */
    UVAS_STEP_PROTECT = 4,   /* the source, a device that may write, is stopped */
    UVAS_STEP_FILL = 8,      /* the new holder gets pages from staging or from the source, protected */
    UVAS_STEP_KEEP = 16,     /* the host gets a protected copy back from staging */
    UVAS_STEP_DROP = 32,     /* all others lose theirs */
    UVAS_STEP_MAP = 64,      /* a device's zeros are mapped */
    UVAS_STEP_UNPROTECT = 128, /* the new holder may write */
};

struct uvas_transition {
    uint32_t steps;  /* set of enum uvas_transition_step, done in the order of their values; 0: satisfied already */
    uint32_t source; /* FILL from this party's memory; UVAS_HOST with TAKE: from staging */
    uint32_t drops;  /* set of parties */
    uint32_t after;  /* the word when all is done */
};

/* What must happen so that `party` may read, or write, a granule with this word. O(1). */
struct uvas_transition uvas_directory_next(uint32_t word, uint32_t party, bool write);

static inline uint32_t uvas_granule_word(const struct uvas_granule *granule) {
    return atomic_load_explicit(&granule->word, memory_order_relaxed);
}

static inline uint32_t uvas_holders(uint32_t word) {
    return word & UVAS_PARTY_BITS;
}

#endif
