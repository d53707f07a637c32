/* Integers in wire order. */
#ifndef LHB_BYTES_H
#define LHB_BYTES_H

#include <stdint.h>

_Static_assert (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
                "the on-disk and wire code assumes little endian");

#define LHB_DEFINE_BYTES(bits)                                                \
  static inline void lhb_put_be##bits (uint8_t *at, uint##bits##_t value)     \
  {                                                                           \
    value = __builtin_bswap##bits (value);                                    \
    __builtin_memcpy (at, &value, sizeof value);                              \
  }                                                                           \
  static inline uint##bits##_t lhb_get_be##bits (const uint8_t *at)           \
  {                                                                           \
    uint##bits##_t value;                                                     \
                                                                              \
    __builtin_memcpy (&value, at, sizeof value);                              \
    return __builtin_bswap##bits (value);                                     \
  }                                                                           \
  static inline void lhb_put_le##bits (uint8_t *at, uint##bits##_t value)     \
  {                                                                           \
    __builtin_memcpy (at, &value, sizeof value);                              \
  }                                                                           \
  static inline uint##bits##_t lhb_get_le##bits (const uint8_t *at)           \
  {                                                                           \
    uint##bits##_t value;                                                     \
                                                                              \
    __builtin_memcpy (&value, at, sizeof value);                              \
    return value;                                                             \
  }

LHB_DEFINE_BYTES (16)
LHB_DEFINE_BYTES (32)
LHB_DEFINE_BYTES (64)
#undef LHB_DEFINE_BYTES

#endif
