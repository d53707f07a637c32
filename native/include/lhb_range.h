/* Range ordering: requests that overlap are executed one after the other, in
 * the order in which they were claimed.
 *
 * The table is sharded by region (1 << LHB_RANGE_REGION_SHIFT blocks).  A
 * narrow claim covers at most two regions and stands in their shards; a wide
 * one stands in a list of its own, which is read under any shard's lock and
 * changed under all of them.  A claim counts the earlier claims it conflicts
 * with; each of those, when released, takes one off; at zero it is granted.
 */
#ifndef LHB_RANGE_H
#define LHB_RANGE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct lhb_range_table;
struct lhb_range_claim;

enum lhb_range_kind {
  LHB_RANGE_READ,               /* shares with reads */
  LHB_RANGE_WRITE,              /* excludes every overlap */
  LHB_RANGE_FLUSH,              /* no range: conflicts with a freeze only */
  LHB_RANGE_FREEZE,             /* conflicts with everything */
};                              /* FLUSH and FREEZE need no blocks */

struct lhb_range_node {
  struct lhb_range_node *prev, *next;
  struct lhb_range_claim *claim;
};

struct lhb_range_claim {
  /* Set by the caller before lhb_range_acquire. */
  uint64_t first_block, last_block;     /* inclusive */
  enum lhb_range_kind kind;
  /* Called by the releasing thread, without locks, when a claim that had to
   * wait is granted.  It may run before lhb_range_acquire returned false.  It
   * may release this claim or others; what that grants is called back when it
   * has returned, so it must not wait for another claim. */
  void (*granted) (struct lhb_range_claim *claim);
  void *owner;                          /* for 'granted'; not looked at */
  /* The table's own. */
  uint64_t sequence;
  _Atomic uint32_t blocked_by;
  uint32_t node_count;
  struct lhb_range_node nodes[2];
  struct lhb_range_claim *next_granted;
};

int lhb_range_open (struct lhb_range_table **table_out);
/* No claim is left in it. */
void lhb_range_close (struct lhb_range_table *table);
/* True: granted.  False: 'granted' will be called. */
bool lhb_range_acquire (struct lhb_range_table *table,
                        struct lhb_range_claim *claim);
/* 'claim' was granted; it may be freed when this returns. */
void lhb_range_release (struct lhb_range_table *table,
                        struct lhb_range_claim *claim);
/* Claims in the table, waiting ones included. */
uint64_t lhb_range_count (struct lhb_range_table *table);

#endif
