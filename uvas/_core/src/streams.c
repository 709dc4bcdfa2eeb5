/* streams.c: what a party's faults tell of the next ones.
 *
 * A fault where the last one of a stream said the next would be doubles how much is brought at once, up to UVAS_MOVE_BYTES; any other begins a stream of
 * its own, in the place of the one that was used longest ago.
 *
 * A thread whose instruction needs two granules (a store across their border) can lose the first while it waits for the second, for ever. It shows: it
 * faults again on one of its last four granules, and not on its last one. Such a thread gets all four for itself for a while.
 */
#include <string.h>

#include "pager.h"

#define TORN_US 200000u /* older faults have nothing to do with this one */

uint32_t uvas_streams_window(struct uvas_member *member, struct uvas_mirror *mirror, uint32_t granule) {
    uint32_t most = (uint32_t)(UVAS_MOVE_BYTES >> mirror->domain->shift);
    struct uvas_stream *oldest = &member->streams[0];
    member->misses++;
    for (uint32_t i = 0; i < UVAS_STREAMS; i++) {
        struct uvas_stream *stream = &member->streams[i];
        if (stream->mirror == mirror && stream->next == granule) {
            stream->window = 2 * stream->window < most ? 2 * stream->window : most;
            stream->next = granule + stream->window;
            stream->used = member->misses;
            return stream->window;
        }
        oldest = member->misses - stream->used > member->misses - oldest->used ? stream : oldest;
    }
    *oldest = (struct uvas_stream){.mirror = mirror, .next = granule + 1, .window = 1, .used = member->misses};
    return 1;
}

static struct uvas_history *history_of(struct uvas_member *member, uint32_t thread) {
    struct uvas_history *history = &member->threads[thread % UVAS_THREADS];
    if (history->thread != thread) {
        *history = (struct uvas_history){.thread = thread};
    }
    return history;
}

bool uvas_streams_torn(struct uvas_member *member, uint32_t thread, struct uvas_mirror *mirror, uint32_t granule, uint32_t now_us) {
    struct uvas_history *history = history_of(member, thread);
    uint32_t at = 0;
    while (at < 4 && !(history->mirror[at] == mirror && history->granule[at] == granule)) {
        at++;
    }
    bool torn = at > 0 && at < 4 && now_us - history->at < TORN_US;
    history->at = now_us;
    if (at > 0) { /* to the front; what is there comes once */
        uint32_t shifted = at < 4 ? at : 3;
        memmove(&history->mirror[1], &history->mirror[0], shifted * sizeof history->mirror[0]);
        memmove(&history->granule[1], &history->granule[0], shifted * sizeof history->granule[0]);
        history->mirror[0] = mirror;
        history->granule[0] = granule;
    }
    return torn;
}

const struct uvas_history *uvas_streams_history(const struct uvas_member *member, uint32_t thread) {
    return &member->threads[thread % UVAS_THREADS];
}

void uvas_streams_forget(struct uvas_member *member, const struct uvas_mirror *mirror) {
    for (uint32_t i = 0; i < UVAS_STREAMS; i++) {
        if (member->streams[i].mirror == mirror) {
            member->streams[i].mirror = NULL;
        }
    }
    for (uint32_t i = 0; i < UVAS_THREADS; i++) {
        for (uint32_t j = 0; j < 4; j++) {
            if (member->threads[i].mirror[j] == mirror) {
                member->threads[i].mirror[j] = NULL;
            }
        }
    }
}
