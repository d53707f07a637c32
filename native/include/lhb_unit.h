/* Unit: a megabyte of one layer, the piece in which a rebuild copies. */
#ifndef LHB_UNIT_H
#define LHB_UNIT_H

#include <stddef.h>

#include "lhb_contract.h"
#include "lhb_limits.h"

#define LHB_UNIT_BLOCKS (LHB_UNIT_BYTES / LHB_BLOCK_BYTES)

/* Bit n of a map is bit n % 8 of byte n / 8, as in a discard file. */
struct lhb_unit {
  uint8_t has[LHB_UNIT_BLOCKS / 8];     /* blocks that are data of the layer */
  uint8_t discarded[LHB_UNIT_BLOCKS / 8];
  char *data;                   /* of the blocks it has; the rest is void */
  char *scratch;                /* what lhb_unit_write compares with */
};

_Static_assert (LHB_UNIT_MAP_BYTES == LHB_UNIT_BLOCKS / 8, "contract");
_Static_assert (offsetof (struct lhb_unit, discarded)
                    == offsetof (struct lhb_unit, has) + LHB_UNIT_MAP_BYTES,
                "lhb_unit_maps");

#endif
