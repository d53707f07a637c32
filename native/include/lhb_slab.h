/* Slabs: the buffers of one connection, in classes of sizes; last in, first
 * out, so that a small working set stays in the CPU's cache. */
#ifndef LHB_SLAB_H
#define LHB_SLAB_H

#include <stddef.h>
#include <stdint.h>

#include "lhb_contract.h"
#include "lhb_limits.h"

struct lhb_slab_class {
  char *memory;
  uint32_t blocks, count, free_count;
  uint16_t *free;               /* indices */
};

struct lhb_slabs {
  char *memory;
  size_t memory_bytes;
  struct lhb_slab_class classes[LHB_CONN_SLAB_CLASSES];
  uint16_t indices[1024];
};

int lhb_slabs_open (struct lhb_slabs *slabs);
void lhb_slabs_close (struct lhb_slabs *slabs);
/* A buffer of at least 'blocks' blocks, or NULL when none is free now. */
char *lhb_slabs_take (struct lhb_slabs *slabs, uint32_t blocks);
void lhb_slabs_give (struct lhb_slabs *slabs, char *slab);

#endif
