/* What parties do to mirrored memory in the tests: run by workers and by the host, at the same addresses. */
#include <linux/io_uring.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
#include <errno.h>

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* ---- one word, many parties ---- */

/* An atomic addition is the exclusive access: nobody else may have the granule meanwhile. The value before the last one. */
uint64_t add(uint64_t *word, uint64_t times)
{
    uint64_t before = 0;
    for (uint64_t i = 0; i < times; i++)
        before = __atomic_fetch_add(word, 1, __ATOMIC_SEQ_CST);
    return before;
}

/* Additions until `stop` is set; how many. The longest time that one took goes to *longest_ns. Waits until everybody is there. */
uint64_t add_until(uint64_t *word, const uint64_t *stop, uint64_t *longest_ns)
{
    uint64_t done = 0, longest = 0, last = now_ns();
    do {
        __atomic_fetch_add(word, 1, __ATOMIC_SEQ_CST);
        uint64_t now = now_ns();
        if (now - last > longest)
            longest = now - last;
        last = now;
        done++;
    } while (!(done & 63 ? 0 : __atomic_load_n(stop, __ATOMIC_SEQ_CST)));
    *longest_ns = longest;
    return done;
}

/* Stores 8 bytes at an address that may lie across two granules, `times`, each the party's own byte eight times. */
uint64_t store_across(unsigned char *address, uint64_t party, uint64_t times)
{
    unsigned char bytes[8];
    memset(bytes, (int)party, sizeof bytes);
    for (uint64_t i = 0; i < times; i++) {
        uint64_t value;
        memcpy(&value, bytes, 8);
        __asm__ volatile("" ::: "memory");
        *(volatile uint64_t __attribute__((aligned(1))) *)(void *)address = value;
    }
    return times;
}

/* page[0] says whose turn it is, by turns in all modulo `parties`; page[1 + me] counts mine; 1000 words after follow the turn. How many turns were
 * had before `seconds` were over; a word that does not have what the party before wrote ends it: -1. */
int64_t take_turns(volatile uint64_t *page, uint64_t me, uint64_t parties, uint64_t turns, uint64_t words, uint64_t seconds)
{
    uint64_t end = now_ns() + seconds * 1000000000u;
    for (uint64_t done = 0; done < turns; done++) {
        uint64_t turn;
        while ((turn = __atomic_load_n(&page[0], __ATOMIC_SEQ_CST)) % parties != me)
            if (now_ns() > end)
                return (int64_t)done;
        page[1 + me]++;
        for (uint64_t i = 0; i < words; i++) {
            if (page[1 + parties + i] != turn)
                return -1;
            page[1 + parties + i] = turn + 1;
        }
        __atomic_store_n(&page[0], turn + 1, __ATOMIC_SEQ_CST);
    }
    return (int64_t)turns;
}

/* ---- many words ---- */

void fill(uint64_t *words, uint64_t count, uint64_t first)
{
    for (uint64_t i = 0; i < count; i++)
        words[i] = first + i;
}

/* How many of the words are not first, first + 1, ... */
uint64_t differ(const uint64_t *words, uint64_t count, uint64_t first)
{
    uint64_t wrong = 0;
    for (uint64_t i = 0; i < count; i++)
        wrong += words[i] != first + i;
    return wrong;
}

/* Adds to one word in each `stride`, `count` words; the sum of what was there. */
uint64_t add_strided(uint64_t *words, uint64_t count, uint64_t stride, uint64_t value)
{
    uint64_t sum = 0;
    for (uint64_t i = 0; i < count; i++) {
        sum += words[i * stride];
        words[i * stride] += value;
    }
    return sum;
}

/* ---- linked structures ---- */

struct node {
    struct node *next;
    uint64_t value;
};

/* Links nodes that lie `stride` bytes apart, in an order that is not theirs; the head. */
struct node *link_up(unsigned char *memory, uint64_t count, uint64_t stride)
{
    struct node *head = 0;
    for (uint64_t i = 0; i < count; i++) {
        struct node *node = (struct node *)(void *)(memory + (i * 7919 % count) * stride);
        node->next = head;
        node->value = i;
        head = node;
    }
    return head;
}

/* Walks, adds `more` to each value, and returns what the values were in all. */
uint64_t walk(struct node *node, uint64_t more)
{
    uint64_t sum = 0;
    for (; node; node = node->next) {
        sum += node->value;
        node->value += more;
    }
    return sum;
}

/* ---- memory that the kernel holds: io_uring, without its library ---- */

static struct {
    unsigned *tail, *mask, *array, *cq_head, *cq_tail, *cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    void *rings;
    size_t rings_size, sqes_size;
} ring;

/* Opens a ring that has the memory registered, which pins it; its descriptor or -errno. */
int64_t uring_open(void *address, uint64_t size)
{
    struct io_uring_params params;
    memset(&params, 0, sizeof params);
    int fd = (int)syscall(SYS_io_uring_setup, 4, &params);
    if (fd < 0)
        return -errno;
    size_t submit = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    size_t complete = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    ring.rings_size = submit > complete ? submit : complete;
    char *rings = ring.rings = mmap(0, ring.rings_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, IORING_OFF_SQ_RING);
    ring.sqes_size = params.sq_entries * sizeof *ring.sqes;
    ring.sqes = mmap(0, ring.sqes_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, IORING_OFF_SQES);
    struct iovec buffer = {address, size};
    if (rings == MAP_FAILED || ring.sqes == MAP_FAILED || syscall(SYS_io_uring_register, fd, IORING_REGISTER_BUFFERS, &buffer, 1)) {
        int error = errno;
        close(fd);
        return -error;
    }
    ring.tail = (unsigned *)(void *)(rings + params.sq_off.tail);
    ring.mask = (unsigned *)(void *)(rings + params.sq_off.ring_mask);
    ring.array = (unsigned *)(void *)(rings + params.sq_off.array);
    ring.cq_head = (unsigned *)(void *)(rings + params.cq_off.head);
    ring.cq_tail = (unsigned *)(void *)(rings + params.cq_off.tail);
    ring.cq_mask = (unsigned *)(void *)(rings + params.cq_off.ring_mask);
    ring.cqes = (struct io_uring_cqe *)(void *)(rings + params.cq_off.cqes);
    return fd;
}

/* Begins to read from a descriptor into registered memory; 0 or -errno. */
int64_t uring_read(int64_t fd, int64_t from, void *address, uint64_t size)
{
    unsigned tail = *ring.tail, at = tail & *ring.mask;
    struct io_uring_sqe *sqe = &ring.sqes[at];
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = IORING_OP_READ_FIXED;
    sqe->fd = (int)from;
    sqe->addr = (uintptr_t)address;
    sqe->len = (unsigned)size;
    sqe->off = (uint64_t)-1;
    ring.array[at] = at;
    __atomic_store_n(ring.tail, tail + 1, __ATOMIC_RELEASE);
    return syscall(SYS_io_uring_enter, (int)fd, 1, 0, 0, 0, 0) == 1 ? 0 : -errno;
}

/* Waits for it; bytes or -errno. */
int64_t uring_wait(int64_t fd)
{
    unsigned head = *ring.cq_head;
    while (head == __atomic_load_n(ring.cq_tail, __ATOMIC_ACQUIRE))
        if (syscall(SYS_io_uring_enter, (int)fd, 0, 1, IORING_ENTER_GETEVENTS, 0, 0) < 0 && errno != EINTR)
            return -errno;
    int64_t got = ring.cqes[head & *ring.cq_mask].res;
    __atomic_store_n(ring.cq_head, head + 1, __ATOMIC_RELEASE);
    return got;
}

/* Lets go of the memory: soon afterwards, as the kernel takes its time. */
void uring_close(int64_t fd)
{
    munmap(ring.sqes, ring.sqes_size);
    munmap(ring.rings, ring.rings_size);
    close((int)fd);
}
