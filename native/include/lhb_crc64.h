/* CRC-64/ISO, the checksum of Longhorn's snapshot files: reflected polynomial
 * 0xD800000000000000, initial value and final XOR all ones.  A running value
 * is the final one of the bytes so far, and 0 before the first byte.
 * lhb_crc64() itself is in cdef.h.
 */
#ifndef LHB_CRC64_H
#define LHB_CRC64_H

#include <stdint.h>

/* The running value after 'length_bytes' more zero bytes, in a time that does
 * not depend on how many they are. */
uint64_t lhb_crc64_zeros (uint64_t crc, uint64_t length_bytes);

#endif
