/* Calls kernels on memory that is given as it lies in another process: areas, with pointers among them, and calls.
 *
 *     call INPUT OUTPUT     numbers are int64: areas {address, size, content}, calls {function, arguments, argument …}
 *
 * Linked with the kernels of another processor, it runs under an emulator of that. OUTPUT gets the areas' content.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

void prerope_linear(), prerope_rows(), prerope_plan_rows(), prerope_bounds();
int64_t prerope_has_dots();

typedef struct {
    int64_t address, size, pointers;
    char *here;
} Area;

static Area areas[512];
static int64_t num_areas;

static int64_t number(FILE *from) {
    int64_t value;
    if (fread(&value, 8, 1, from) != 1) exit(2);
    return value;
}

/* An address there is one here; anything else is a number. */
static int64_t moved(int64_t value) {
    for (Area *area = areas; area < areas + num_areas; area++)
        if (value >= area->address && value < area->address + area->size)
            return (int64_t)(area->here + (value - area->address));
    return value;
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    FILE *from = fopen(arguments[1], "rb"), *to = fopen(arguments[2], "wb");
    int64_t num = number(from);
    for (; num_areas < num; num_areas++) {
        if (num_areas == sizeof areas / sizeof *areas) return 2;
        Area *area = areas + num_areas;
        area->address = number(from), area->size = number(from), area->pointers = number(from);
        area->here = aligned_alloc(64, (area->size + 63) / 64 * 64);
        if (fread(area->here, 1, area->size, from) != (size_t)area->size) return 2;
    }
    for (Area *area = areas; area < areas + num; area++)
        for (int64_t n = 0; area->pointers && n < area->size / 8; n++) {
            int64_t *word = (int64_t *)area->here + n;
            *word = moved(*word);
        }
    for (int64_t calls = number(from); calls > 0; calls--) {
        int64_t function = number(from), a[9] = {0};
        for (int64_t n = 0, given = number(from); n < given; n++) a[n] = moved(number(from));
        if (function == 0) prerope_linear(a[0], a[1], a[2]);
        if (function == 1) prerope_plan_rows(a[0]);
        if (function == 2) prerope_rows(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8]);
        if (function == 3) *(int64_t *)a[0] = prerope_has_dots();
        if (function == 4) prerope_bounds(a[0], a[1], a[2], a[3], a[4], a[5], a[6]);
    }
    for (Area *area = areas; area < areas + num; area++) fwrite(area->here, 1, area->size, to);
    return fclose(to) ? 1 : 0;
}
