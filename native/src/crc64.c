/* CRC-64/ISO: eight bytes a step, and zeros by the million in one. */
#include <endian.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "lhb_crc64.h"
#include "lhb_contract.h"

#define CRC64_POLYNOMIAL 0xD800000000000000ull
#define CRC64_SLICES 8
#define CRC64_POWERS 64                 /* one for each bit of a byte count */

/* slices[k][b] is the register after byte b and k zero bytes. */
static uint64_t crc64_slices[CRC64_SLICES][256];
/* powers[k] is x^(8 * 2^k) modulo the polynomial: what a register is to be
 * multiplied with for 2^k zero bytes. */
static uint64_t crc64_powers[CRC64_POWERS];
static pthread_once_t crc64_once = PTHREAD_ONCE_INIT;

/* Product of two polynomials modulo ours.  Bits are reflected: the highest bit
 * of a word is the coefficient of x^0.
 */
static uint64_t
crc64_multiply (uint64_t a, uint64_t b)
{
  uint64_t product = 0;

  for (; a != 0; a <<= 1)
    {
      if (a >> 63)
        product ^= b;
      b = (b >> 1) ^ ((b & 1) ? CRC64_POLYNOMIAL : 0);
    }
  return product;
}

static void
crc64_make_tables (void)
{
  for (unsigned byte = 0; byte < 256; byte++)
    {
      uint64_t value = byte;

      for (int bit = 0; bit < 8; bit++)
        value = (value >> 1) ^ ((value & 1) ? CRC64_POLYNOMIAL : 0);
      crc64_slices[0][byte] = value;
    }
  for (unsigned slice = 1; slice < CRC64_SLICES; slice++)
    for (unsigned byte = 0; byte < 256; byte++)
      {
        uint64_t value = crc64_slices[slice - 1][byte];

        crc64_slices[slice][byte]
          = (value >> 8) ^ crc64_slices[0][value & 0xff];
      }

  crc64_powers[0] = 1ull << (63 - 8);
  for (unsigned k = 1; k < CRC64_POWERS; k++)
    crc64_powers[k] = crc64_multiply (crc64_powers[k - 1],
                                      crc64_powers[k - 1]);
}

uint64_t
lhb_crc64 (uint64_t crc, const void *data, size_t length_bytes)
{
  const unsigned char *bytes = data;

  pthread_once (&crc64_once, crc64_make_tables);
  crc = ~crc;
  for (; length_bytes >= 8; bytes += 8, length_bytes -= 8)
    {
      uint64_t word;

      memcpy (&word, bytes, sizeof word);
      word = le64toh (word) ^ crc;
      crc = crc64_slices[7][word & 0xff]
            ^ crc64_slices[6][(word >> 8) & 0xff]
            ^ crc64_slices[5][(word >> 16) & 0xff]
            ^ crc64_slices[4][(word >> 24) & 0xff]
            ^ crc64_slices[3][(word >> 32) & 0xff]
            ^ crc64_slices[2][(word >> 40) & 0xff]
            ^ crc64_slices[1][(word >> 48) & 0xff]
            ^ crc64_slices[0][word >> 56];
    }
  for (; length_bytes > 0; bytes++, length_bytes--)
    crc = (crc >> 8) ^ crc64_slices[0][(crc ^ *bytes) & 0xff];
  return ~crc;
}

/* A zero byte multiplies the register with x^8, so n of them are one product
 * for each bit set in n.
 */
uint64_t
lhb_crc64_zeros (uint64_t crc, uint64_t length_bytes)
{
  pthread_once (&crc64_once, crc64_make_tables);
  crc = ~crc;
  for (unsigned k = 0; length_bytes != 0; k++, length_bytes >>= 1)
    if (length_bytes & 1)
      crc = crc64_multiply (crc, crc64_powers[k]);
  return ~crc;
}
