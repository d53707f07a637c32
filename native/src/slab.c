/* Slabs: the buffers of one connection. */

#include <assert.h>
#include <errno.h>
#include <sys/mman.h>

#include "lhb_slab.h"

static const struct {
  uint32_t blocks, count;
} table[LHB_CONN_SLAB_CLASSES] = LHB_CONN_SLAB_TABLE;

/* What a class keeps resident after use.  The largest ones are rare, so their
 * pages go back at once. */
#define KEEP_BLOCKS_MAX 1025

int
lhb_slabs_open (struct lhb_slabs *slabs)
{
  uint16_t *indices = slabs->indices;
  size_t blocks = 0;
  char *at;

  for (int c = 0; c < LHB_CONN_SLAB_CLASSES; c++)
    blocks += (size_t) table[c].blocks * table[c].count;
  slabs->memory_bytes = blocks * LHB_BLOCK_BYTES;
  at = mmap (NULL, slabs->memory_bytes, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED)
    return -errno;
  /* A huge page for a 4 KiB request would multiply the memory by 512. */
  (void) madvise (at, slabs->memory_bytes, MADV_NOHUGEPAGE);
  slabs->memory = at;
  for (int c = 0; c < LHB_CONN_SLAB_CLASSES; c++)
    {
      struct lhb_slab_class *class = &slabs->classes[c];

      class->memory = at;
      class->blocks = table[c].blocks;
      class->count = table[c].count;
      class->free = indices;
      class->free_count = class->count;
      for (uint32_t i = 0; i < class->count; i++)
        class->free[i] = (uint16_t) (class->count - 1 - i);
      indices += class->count;
      at += (size_t) class->blocks * class->count * LHB_BLOCK_BYTES;
    }
  assert (indices <= slabs->indices + 1024);
  return 0;
}

void
lhb_slabs_close (struct lhb_slabs *slabs)
{
  if (slabs->memory != NULL)
    munmap (slabs->memory, slabs->memory_bytes);
  slabs->memory = NULL;
}

char *
lhb_slabs_take (struct lhb_slabs *slabs, uint32_t blocks)
{
  for (int c = 0; c < LHB_CONN_SLAB_CLASSES; c++)
    {
      struct lhb_slab_class *class = &slabs->classes[c];

      if (class->blocks >= blocks && class->free_count > 0)
        return class->memory
               + (size_t) class->free[--class->free_count] * class->blocks
                     * LHB_BLOCK_BYTES;
    }
  return NULL;
}

void
lhb_slabs_give (struct lhb_slabs *slabs, char *slab)
{
  int c = LHB_CONN_SLAB_CLASSES - 1;
  struct lhb_slab_class *class;
  size_t slab_bytes, index;

  while (slab < slabs->classes[c].memory)
    c--;
  class = &slabs->classes[c];
  slab_bytes = (size_t) class->blocks * LHB_BLOCK_BYTES;
  index = (size_t) (slab - class->memory) / slab_bytes;
  assert (index < class->count && class->free_count < class->count);
  if (class->blocks > KEEP_BLOCKS_MAX)
    (void) madvise (slab, slab_bytes, MADV_DONTNEED);
  class->free[class->free_count++] = (uint16_t) index;
}
