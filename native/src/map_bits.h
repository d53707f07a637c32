/* Scans and bulk updates of the block map's chunks: words of 64 bits (head)
 * and strings of bytes (lower).  Positions are block numbers in a chunk.
 *
 * Bytes are handled eight to a 64-bit word, of which byte 0 is the lowest
 * block, hence little endian only.
 */
#ifndef LHB_MAP_BITS_H
#define LHB_MAP_BITS_H

#include <stdbool.h>
#include <stdint.h>

_Static_assert (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "byte order");

#define BYTES_01 0x0101010101010101u
#define BYTES_7F 0x7f7f7f7f7f7f7f7fu
#define BYTES_80 0x8080808080808080u

/* The bits of word 'w' that lie in [first, end). */
static inline uint64_t
bits_mask (uint32_t w, uint32_t first, uint32_t end)
{
  uint64_t mask = ~UINT64_C (0);

  if (first > w * 64)
    mask <<= first - w * 64;
  if (end < w * 64 + 64)
    mask &= ~UINT64_C (0) >> (w * 64 + 64 - end);
  return mask;
}

/* How many bits from 'first' on, up to 'end', are like the first one. */
static inline uint32_t
bits_run (const uint64_t *words, uint32_t first, uint32_t end)
{
  uint64_t like = (words[first / 64] >> first % 64) & 1 ? ~UINT64_C (0) : 0;
  uint64_t unlike = (words[first / 64] ^ like) >> first % 64 << first % 64;
  uint32_t w = first / 64;

  while (unlike == 0) {
    if (++w * 64 >= end)
      return end - first;
    unlike = words[w] ^ like;
  }
  w = w * 64 + (uint32_t) __builtin_ctzll (unlike);
  return (w < end ? w : end) - first;
}

/* How many bytes from 'first' on, up to 'end', are like the first one. */
static inline uint32_t
bytes_run (const uint64_t *words, uint32_t first, uint32_t end)
{
  const uint8_t *bytes = (const uint8_t *) words;
  uint64_t like = bytes[first] * BYTES_01;
  uint64_t unlike = (words[first / 8] ^ like) >> first % 8 * 8
                    << first % 8 * 8;
  uint32_t w = first / 8;

  while (unlike == 0) {
    if (++w * 8 >= end)
      return end - first;
    unlike = words[w] ^ like;
  }
  w = w * 8 + (uint32_t) __builtin_ctzll (unlike) / 8;
  return (w < end ? w : end) - first;
}

/* Set or clear [first, end).  Returns how many bits changed. */
static inline uint32_t
bits_assign (uint64_t *words, uint32_t first, uint32_t end, bool value)
{
  uint32_t changed = 0;

  for (uint32_t w = first / 64; w * 64 < end; w++) {
    uint64_t mask = bits_mask (w, first, end);
    uint64_t change = (value ? ~words[w] : words[w]) & mask;

    words[w] ^= change;
    changed += (uint32_t) __builtin_popcountll (change);
  }
  return changed;
}

/* Bit n is set where byte n of the 64 bytes is 'value'. */
static inline uint64_t
bytes_match (const uint64_t words[8], uint8_t value)
{
  uint64_t match = 0;

  for (unsigned i = 0; i < 8; i++) {
    uint64_t unlike = words[i] ^ value * BYTES_01;
    uint64_t like = ~(((unlike & BYTES_7F) + BYTES_7F) | unlike | BYTES_7F);

    /* One bit a byte; the product gathers them in its top byte. */
    match |= ((like >> 7) * UINT64_C (0x0102040810204080)) >> 56 << i * 8;
  }
  return match;
}

/* Store 'value' in those of the 64 bytes whose bit is set. */
static inline void
bytes_store (uint64_t words[8], uint64_t bits, uint8_t value)
{
  for (unsigned i = 0; i < 8; i++) {
    uint64_t mask = (bits >> i * 8 & 0xff) * BYTES_01
                    & UINT64_C (0x8040201008040201);

    mask = ((mask + BYTES_7F) & BYTES_80) >> 7;
    mask *= 0xff;
    words[i] = (words[i] & ~mask) | (value * BYTES_01 & mask);
  }
}

#endif
