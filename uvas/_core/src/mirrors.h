/* mirrors.h: what the rest of the core does about devices with memory of their own; see pager.h. Every function may wait for the pager, so none is
 * called with a lock held. Those that answer int say what failed. */
#ifndef UVAS_MIRRORS_H
#define UVAS_MIRRORS_H

#include "pager.h"
#include "space.h"

/* Says what a failure to open a userfaultfd, or to start the pager, means. */
int uvas_mirrors_unsupported(int rc);

/* Whether a device with memory of its own says what it must, and fits into the space. */
int uvas_mirrors_suit(const struct uvas_space *space, const struct uvas_device *device);
/* The device becomes a party of the space's domain, which its first one makes; the other way round, with what it holds brought home. On an error it is
 * still there. The space is exclusive. */
int uvas_mirrors_join(struct uvas_space *space, struct uvas_party *party);
int uvas_mirrors_home(struct uvas_party *party); /* what it holds comes home; it may take it again */
int uvas_mirrors_part(struct uvas_space *space, struct uvas_party *party);

/* The reservation's directory, and a store in it for each private device of the space, or for this one. The record is its caller's. */
int uvas_mirrors_claim(struct uvas_record *record);
int uvas_mirrors_claim_one(struct uvas_record *record, struct uvas_party *party);
/* The host's addresses are about to go (faults there wait), and have gone. */
void uvas_mirrors_close(struct uvas_record *record, struct uvas_stretch *stretch);
void uvas_mirrors_drop(struct uvas_record *record, struct uvas_stretch *stretch);

/* The device's own memory, as what is behind a committed part of the host's. */
void uvas_mirrors_backing(const struct uvas_record *record, const struct uvas_party *party, size_t start, struct uvas_backing_info *backing);
/* The worker has mapped it: its faults come to us from now on. It has let go of it: who waits there is woken. */
int uvas_mirrors_watch(const struct uvas_record *record, const struct uvas_party *party, size_t start, size_t end);
void uvas_mirrors_unwatch(const struct uvas_record *record, const struct uvas_party *party, size_t start, size_t end);
/* Fresh memory on the host, mapped on every device. */
int uvas_mirrors_commit(struct uvas_record *record, size_t start, size_t end);
/* A part of the host's memory is about to go: faults there wait, nothing moves. Then it is gone, or it stays. */
void uvas_mirrors_suspend(struct uvas_record *record, size_t start, size_t end, struct uvas_stretch *stretch);
void uvas_mirrors_settle(struct uvas_record *record, struct uvas_stretch *stretch, bool gone);
int uvas_mirrors_discard(struct uvas_record *record, size_t start, size_t end);
size_t uvas_mirrors_unit(const struct uvas_record *record); /* what offsets and sizes in it are multiples of */

void uvas_mirrors_before_fork(void);
void uvas_mirrors_after_fork_in_parent(void);
void uvas_mirrors_after_fork_in_child(void); /* with the registry's lock held; takes none */

#endif
