/* Keys and values of a step's rows to their slots: plain copies, both in one call. */
#include <stdint.h>
#include <string.h>

/* keys, values: [slots] rows of key_bytes and value_bytes; key, value: [rows]; slots: [rows]. */
void prerope_store(char *keys, char *values, const char *key, const char *value, const int64_t *slots, int64_t rows,
                   int64_t key_bytes, int64_t value_bytes) {
    for (int64_t row = 0; row < rows; row++) {
        memcpy(keys + slots[row] * key_bytes, key + row * key_bytes, key_bytes);
        memcpy(values + slots[row] * value_bytes, value + row * value_bytes, value_bytes);
    }
}
