/* program.c: what a C runtime does with uvas, without Python: a range, memory in it, whose address is this, the end. */
#include <stdio.h>
#include <string.h>

#include <uvas.h>

#define SIZE ((size_t)1 << 20)

static int failed(const char *call) {
    fprintf(stderr, "%s: %s\n", call, uvas_last_failure()->text);
    return 1;
}

int main(void) {
    uvas_id space;
    struct uvas_reservation range, second;
    struct uvas_found found;
    if (uvas_abi_version() != UVAS_ABI_VERSION) {
        return 2;
    }
    if (uvas_space_open(NULL, &space) < 0) {
        return failed("open");
    }
    if (uvas_reserve(space, SIZE, NULL, &range) < 0) {
        return failed("reserve");
    }
    if (uvas_commit(range.id, 0, SIZE, UVAS_READ | UVAS_WRITE, 0) < 0) {
        return failed("commit");
    }
    memset((void *)range.base, 0x5a, SIZE);
    if (uvas_find(range.base + SIZE - 1, &found) < 0 || found.id != range.id) {
        return failed("find");
    }
    struct uvas_where there = {.at = range.base};
    if (uvas_reserve(space, SIZE, &there, &second) == 0) {
        fprintf(stderr, "the same range was given twice\n");
        return 1;
    }
    if (uvas_last_failure()->kind != UVAS_FAILURE_IN_USE || *(unsigned char *)range.base != 0x5a) {
        return failed("reserve at what is taken");
    }
    if (uvas_release(range.id) < 0 || uvas_space_close(space) < 0) {
        return failed("release");
    }
    puts("good");
    return 0;
}
