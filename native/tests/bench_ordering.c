/* What ordering and the block map cost a request: nanoseconds an operation,
 * memory and time of a fully fragmented TiB.  Needs 600 MiB of memory. */
#include <time.h>

#include "lhb_limits.h"
#include "lhb_map.h"
#include "lhb_range.h"
#include "lhb_test.h"

#define TIB_BLOCKS (UINT64_C (1) << (40 - LHB_BLOCK_SHIFT))
#define OPS 4000000u
#define POSITIONS 4096u                 /* a power of two */

static uint64_t positions[POSITIONS];

static double
now_s (void)
{
  struct timespec t;

  clock_gettime (CLOCK_MONOTONIC, &t);
  return (double) t.tv_sec + (double) t.tv_nsec * 1e-9;
}

static void
report_ops (const char *what, double begin_s)
{
  printf ("%-48s %7.1f ns\n", what, (now_s () - begin_s) * 1e9 / OPS);
}

static void
report_map (const char *what, double begin_s, const struct lhb_map *map)
{
  printf ("%-48s %7.1f ms %9.2f MiB\n", what, (now_s () - begin_s) * 1e3,
          (double) lhb_map_bytes (map) / (1 << 20));
}

/* Random positions in 4 GiB. */
static void
choose_positions (void)
{
  uint64_t random = lhb_test_seed;

  for (unsigned i = 0; i < POSITIONS; i++)
    positions[i] = lhb_test_below (&random, UINT64_C (1) << 20);
}

static void
never_granted (struct lhb_range_claim *claim)
{
  (void) claim;
  abort ();
}

/* 'depth' claims are always in the table. */
static void
bench_range (const char *what, uint64_t blocks, unsigned depth)
{
  struct lhb_range_claim claims[64] = { 0 };
  struct lhb_range_table *table;
  double begin_s;

  CHECK_EQUAL (lhb_range_open (&table), 0);
  for (unsigned i = 0; i < depth; i++) {
    claims[i].kind = LHB_RANGE_READ;
    claims[i].first_block = positions[i];
    claims[i].last_block = positions[i] + blocks - 1;
    claims[i].granted = never_granted;
    CHECK (lhb_range_acquire (table, &claims[i]));
  }
  begin_s = now_s ();
  for (unsigned i = 0; i < OPS; i++) {
    struct lhb_range_claim *claim = &claims[i % depth];
    uint64_t first = positions[i % POSITIONS];

    lhb_range_release (table, claim);
    claim->first_block = first;
    claim->last_block = first + blocks - 1;
    CHECK (lhb_range_acquire (table, claim));
  }
  report_ops (what, begin_s);
  for (unsigned i = 0; i < depth; i++)
    lhb_range_release (table, &claims[i]);
  lhb_range_close (table);
}

static void
bench_lookup (const char *what, struct lhb_map *map, uint32_t blocks)
{
  double begin_s = now_s ();
  uint64_t sum = 0;

  for (unsigned i = 0; i < OPS; i++)
    sum += lhb_map_lookup (map, positions[i % POSITIONS], blocks).blocks;
  CHECK (sum >= OPS);
  report_ops (what, begin_s);
}

static void
bench_hot (void)
{
  struct lhb_map *map;
  double begin_s;

  CHECK_EQUAL (lhb_map_open ((UINT64_C (1) << 20) + 1024, &map), 0);
  for (uint64_t b = 0; b < UINT64_C (1) << 20; b += 2)
    CHECK_EQUAL (lhb_map_add_layer (map, 1, b, 1), 0);
  bench_lookup ("lookup of 1 block, empty head", map, 1);
  begin_s = now_s ();
  for (unsigned i = 0; i < OPS; i++)
    CHECK_EQUAL (lhb_map_reserve_head (map, positions[i % POSITIONS], 1), 0);
  report_ops ("reserve_head of 1 block", begin_s);
  begin_s = now_s ();
  for (unsigned i = 0; i < OPS; i++)
    lhb_map_set_head (map, positions[i % POSITIONS], 1);
  report_ops ("set_head of 1 block", begin_s);
  bench_lookup ("lookup of 1 block, fragmented head", map, 1);
  lhb_map_close (map);

  CHECK_EQUAL (lhb_map_open ((UINT64_C (1) << 20) + 1024, &map), 0);
  CHECK_EQUAL (lhb_map_add_layer (map, 1, 0, UINT64_C (1) << 20), 0);
  bench_lookup ("lookup of 256 blocks, uniform", map, 256);
  for (uint64_t b = 0; b < UINT64_C (1) << 20; b += 32768)
    CHECK_EQUAL (lhb_map_add_layer (map, 2, b, 1), 0);
  bench_lookup ("lookup of 256 blocks, one run of bytes", map, 256);
  lhb_map_close (map);
}

static void
bench_tib (void)
{
  struct lhb_map *map;
  double begin_s = now_s ();

  CHECK_EQUAL (lhb_map_open (TIB_BLOCKS, &map), 0);
  report_map ("TiB: open", begin_s, map);
  begin_s = now_s ();
  for (uint64_t b = 0; b < TIB_BLOCKS; b += 256) {
    CHECK_EQUAL (lhb_map_reserve_head (map, b, 256), 0);
    lhb_map_set_head (map, b, 256);
  }
  report_map ("TiB: written in sequence by 1 MiB", begin_s, map);
  begin_s = now_s ();
  CHECK_EQUAL (lhb_map_fold_head (map, 1), 0);
  report_map ("TiB: fold of that", begin_s, map);
  begin_s = now_s ();
  for (uint64_t b = 0; b < TIB_BLOCKS; b += 2) {
    CHECK_EQUAL (lhb_map_reserve_head (map, b, 1), 0);
    lhb_map_set_head (map, b, 1);
  }
  report_map ("TiB: every second block written", begin_s, map);
  begin_s = now_s ();
  CHECK_EQUAL (lhb_map_fold_head (map, 2), 0);
  report_map ("TiB: fold of that (takes the byte arrays)", begin_s, map);
  for (uint64_t b = 1; b < TIB_BLOCKS; b += 2) {
    CHECK_EQUAL (lhb_map_reserve_head (map, b, 1), 0);
    if (b % 4 == 1)
      lhb_map_set_head (map, b, 1);
  }
  report_map ("TiB: fragmented head over fragmented layers", begin_s, map);
  begin_s = now_s ();
  CHECK_EQUAL (lhb_map_fold_head (map, 3), 0);
  report_map ("TiB: fold of that (arrays are there)", begin_s, map);
  begin_s = now_s ();
  CHECK_EQUAL (lhb_map_relabel (map, 0, TIB_BLOCKS, 3, 4), 0);
  report_map ("TiB: relabel a quarter of the blocks", begin_s, map);
  begin_s = now_s ();
  CHECK_EQUAL (lhb_map_relabel (map, 0, TIB_BLOCKS, 4, LHB_MAP_HEAD), 0);
  report_map ("TiB: relabel them to the head", begin_s, map);
  lhb_map_close (map);
}

int
main (void)
{
  choose_positions ();
  bench_range ("claim + release, 1 block, depth 1", 1, 1);
  bench_range ("claim + release, 1 block, depth 32", 1, 32);
  bench_range ("claim + release, 2 regions, depth 1", 256, 1);
  bench_range ("claim + release, wide (4 MiB), depth 1", 1024, 1);
  bench_hot ();
  bench_tib ();
  return 0;
}
