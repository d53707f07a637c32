/* Memory of the block map of a TiB, printed as three lines "NAME BYTES".
 *
 * The map alone is asked: writing a fragmented TiB through a volume would
 * take hours and measure the disk. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "lhb_map.h"

#define TIB_BLOCKS ((UINT64_C (1) << 40) / 4096)

static struct lhb_map *
open_map (void)
{
  struct lhb_map *map;

  if (lhb_map_open (TIB_BLOCKS, &map) != 0)
    exit (EXIT_FAILURE);
  return map;
}

static void
report (const char *name, struct lhb_map *map)
{
  printf ("%s %llu\n", name, (unsigned long long) lhb_map_bytes (map));
  lhb_map_close (map);
}

static void
write_head (struct lhb_map *map, uint64_t block, uint64_t blocks)
{
  if (lhb_map_reserve_head (map, block, blocks) != 0)
    exit (EXIT_FAILURE);
  lhb_map_set_head (map, block, blocks);
}

int
main (void)
{
  struct lhb_map *map = open_map ();

  report ("untouched", map);

  /* As a copy of a disk would arrive: 1 MiB at a time, to the end. */
  map = open_map ();
  for (uint64_t block = 0; block < TIB_BLOCKS; block += 256)
    write_head (map, block, 256);
  report ("sequential", map);

  /* Neighbours always differ, in the head and in two layers below it. */
  map = open_map ();
  for (uint64_t block = 0; block < TIB_BLOCKS; block += 2)
    if (lhb_map_add_layer (map, (uint8_t) (1 + block / 2 % 2), block, 1) != 0)
      exit (EXIT_FAILURE);
  for (uint64_t block = 1; block < TIB_BLOCKS; block += 2)
    write_head (map, block, 1);
  report ("fragmented", map);
  return EXIT_SUCCESS;
}
