/* library.c: another library of the process that reserves with uvas, on its own account. */
#include <uvas.h>

__attribute__((visibility("default"))) uintptr_t other_library_reserves(void);

uintptr_t other_library_reserves(void) {
    uvas_id space;
    struct uvas_reservation range;
    return uvas_space_open(NULL, &space) == 0 && uvas_reserve(space, 1, NULL, &range) == 0 ? range.base : 0;
}
