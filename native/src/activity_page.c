/* The file of an activity log: pages, and each of them twice. */

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "lhb_activity.h"
#include "lhb_bytes.h"
#include "lhb_fault.h"
#include "lhb_layer_io.h"
#include "lhb_store.h"

_Static_assert (LHB_ACTIVITY_PAGE_BYTES == LHB_BLOCK_BYTES,
                "a page is written as a block");

enum {
  CRC_AT = 8,
  ID_AT = 16,                   /* the first byte that the CRC is of */
  SEQUENCE_AT = 32,
  COOLINGS_AT = 40,
  INDEX_AT = 48,
  SLOT_AT = 52,
  SHIFT_AT = 56,
};

static const char magic[8] = "LHBACTV1";

uint32_t
lhb_activity_pages_of (uint64_t size_bytes)
{
  assert (size_bytes > 0);
  return lhb_activity_extent_of (size_bytes - 1) / LHB_ACTIVITY_PAGE_EXTENTS
         + 1;
}

static uint64_t
crc_of (const uint8_t *image)
{
  return lhb_crc64 (0, image + ID_AT, LHB_ACTIVITY_PAGE_BYTES - ID_AT);
}

void
lhb_activity_encode_page (const struct lhb_activity_page *page,
                          const uint64_t *bits, char *image_out)
{
  uint8_t *image = (uint8_t *) image_out;

  memset (image, 0, LHB_ACTIVITY_HEADER_BYTES);
  memcpy (image, magic, sizeof magic);
  memcpy (image + ID_AT, page->id, LHB_ACTIVITY_ID_BYTES);
  lhb_put_le64 (image + SEQUENCE_AT, page->sequence);
  lhb_put_le64 (image + COOLINGS_AT, page->coolings);
  lhb_put_le32 (image + INDEX_AT, page->index);
  lhb_put_le32 (image + SLOT_AT, page->slot);
  lhb_put_le32 (image + SHIFT_AT, LHB_ACTIVITY_EXTENT_SHIFT);
  memcpy (image + LHB_ACTIVITY_HEADER_BYTES, bits,
          LHB_ACTIVITY_PAGE_WORDS * sizeof *bits);
  lhb_put_le64 (image + CRC_AT, crc_of (image));
}

/* False: it is no page. */
static bool
decode_page (const uint8_t *image, struct lhb_activity_page *page_out)
{
  *page_out = (struct lhb_activity_page){
    .id = image + ID_AT,
    .sequence = lhb_get_le64 (image + SEQUENCE_AT),
    .coolings = lhb_get_le64 (image + COOLINGS_AT),
    .index = lhb_get_le32 (image + INDEX_AT),
    .slot = lhb_get_le32 (image + SLOT_AT),
  };
  return memcmp (image, magic, sizeof magic) == 0
         && lhb_get_le64 (image + CRC_AT) == crc_of (image)
         && lhb_get_le32 (image + SHIFT_AT) == LHB_ACTIVITY_EXTENT_SHIFT
         && page_out->index < LHB_ACTIVITY_PAGES_MAX && page_out->slot < 2
         && page_out->sequence > 0;
}

static uint64_t
offset_of (uint32_t index, uint32_t slot)
{
  return ((uint64_t) index * 2 + slot) * LHB_ACTIVITY_PAGE_BYTES;
}

/* ---- For Python. */

uint64_t
lhb_activity_file_bytes (uint64_t size_bytes)
{
  return offset_of (lhb_activity_pages_of (size_bytes), 0);
}

void
lhb_activity_encode (const uint8_t *id, uint64_t size_bytes, char *file_out)
{
  static const uint64_t cold[LHB_ACTIVITY_PAGE_WORDS];
  struct lhb_activity_page page = { .id = id, .sequence = 1 };

  memset (file_out, 0, lhb_activity_file_bytes (size_bytes));
  for (; page.index < lhb_activity_pages_of (size_bytes); page.index++)
    lhb_activity_encode_page (&page, cold,
                              file_out + offset_of (page.index, 0));
}

/* The image that counts; NULL: there is none. */
static const uint8_t *
choose_slot (const char *file, uint64_t length_bytes, const uint8_t *id,
             uint32_t index, struct lhb_activity_page *page_out)
{
  const uint8_t *best = NULL;

  for (uint32_t slot = 0; slot < 2; slot++)
    {
      uint64_t at = offset_of (index, slot);
      const uint8_t *image = (const uint8_t *) file + at;
      struct lhb_activity_page page;

      if (at + LHB_ACTIVITY_PAGE_BYTES > length_bytes
          || !decode_page (image, &page) || page.index != index
          || page.slot != slot
          || memcmp (page.id, id, LHB_ACTIVITY_ID_BYTES) != 0)
        continue;
      if (best == NULL || page.sequence > page_out->sequence)
        {
          best = image;
          *page_out = page;
        }
    }
  return best;
}

void
lhb_activity_decode (const char *file, uint64_t length_bytes,
                     const uint8_t *id, uint64_t size_bytes,
                     uint64_t *bitmap_io,
                     struct lhb_activity_state *state_out)
{
  struct lhb_activity_state state
      = { .pages = lhb_activity_pages_of (size_bytes) };

  for (uint32_t index = 0; index < state.pages; index++)
    {
      uint64_t *bits = bitmap_io + (size_t) index * LHB_ACTIVITY_PAGE_WORDS;
      struct lhb_activity_page page;
      const uint8_t *image
          = choose_slot (file, length_bytes, id, index, &page);

      if (image == NULL)
        {
          memset (bits, 0xff, LHB_ACTIVITY_PAGE_WORDS * sizeof *bits);
          state.pages_lost++;
          continue;
        }
      for (size_t i = 0; i < LHB_ACTIVITY_PAGE_WORDS; i++)
        bits[i] |= lhb_get_le64 (image + LHB_ACTIVITY_HEADER_BYTES + 8 * i);
      if (page.sequence > state.sequence)
        state.sequence = page.sequence;
      if (page.coolings > state.coolings)
        state.coolings = page.coolings;
    }
  *state_out = state;
}

/* The first extent at or after 'at' whose bit is 'value', or 'end'. */
static uint32_t
find_extent (const uint64_t *bitmap, uint32_t at, uint32_t end, bool value)
{
  while (at < end)
    {
      uint64_t word = value ? bitmap[at / 64] : ~bitmap[at / 64];

      word >>= at % 64;
      if (word != 0)
        {
          at += (uint32_t) __builtin_ctzll (word);
          break;
        }
      at += 64 - at % 64;
    }
  return at < end ? at : end;
}

uint32_t
lhb_activity_ranges (const uint64_t *bitmap, uint64_t size_bytes,
                     uint64_t offset_bytes, struct lhb_extent *ranges_out,
                     uint32_t max)
{
  const uint32_t end = lhb_activity_extent_of (size_bytes - 1) + 1;
  uint32_t at, count = 0;

  if (offset_bytes >= size_bytes)
    return 0;
  at = lhb_activity_extent_of (offset_bytes);
  while (count < max && (at = find_extent (bitmap, at, end, true)) < end)
    {
      struct lhb_extent *range = &ranges_out[count++];
      uint32_t stop = find_extent (bitmap, at, end, false);

      range->offset_bytes = (uint64_t) at << LHB_ACTIVITY_EXTENT_SHIFT;
      range->length_bytes
          = (stop == end ? size_bytes
                         : (uint64_t) stop << LHB_ACTIVITY_EXTENT_SHIFT)
            - range->offset_bytes;
      at = stop;
    }
  return count;
}

/* ---- Writing. */

/* It was made before; one that is missing is not made anew. */
static int
open_log (struct lhb_store *store)
{
  int fd;

  if (store->activity_fd >= 0)
    return 0;
  fd = lhb_store_open_file (store, LHB_ACTIVITY_NAME, 0);
  if (fd >= 0)
    store->activity_fd = fd;
  return fd < 0 ? fd : 0;
}

static int
check_images (const char *images, size_t length_bytes)
{
  struct lhb_activity_page page;

  if (length_bytes == 0 || length_bytes % LHB_ACTIVITY_PAGE_BYTES != 0)
    return -EINVAL;
  for (size_t at = 0; at < length_bytes; at += LHB_ACTIVITY_PAGE_BYTES)
    if (!decode_page ((const uint8_t *) images + at, &page))
      return -EINVAL;
  return 0;
}

int
lhb_activity_write_images (struct lhb_store *store, char *images,
                           size_t length_bytes)
{
  int err = check_images (images, length_bytes);

  if (err)
    return err;
  pthread_mutex_lock (&store->activity_lock);
  err = lhb_fault (LHB_FAULT_ACTIVITY_WRITE, store->id);
  if (err == 0)
    err = open_log (store);
  for (size_t at = 0; at < length_bytes && err == 0;
       at += LHB_ACTIVITY_PAGE_BYTES)
    {
      const uint8_t *image = (const uint8_t *) images + at;
      uint64_t offset_bytes = offset_of (lhb_get_le32 (image + INDEX_AT),
                                         lhb_get_le32 (image + SLOT_AT));

      err = lhb_layer_transfer (store->activity_fd, images + at,
                                offset_bytes >> LHB_BLOCK_SHIFT, 1, true);
    }
  if (err == 0)
    err = lhb_fault (LHB_FAULT_ACTIVITY_SYNC, store->id);
  if (err == 0 && fdatasync (store->activity_fd) == -1)
    err = -errno;
  pthread_mutex_unlock (&store->activity_lock);
  return err;
}
