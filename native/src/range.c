/* Range ordering: see lhb_range.h.
 *
 * A list is in the order of the claims, so the earlier claims a new one has
 * to count are those in the list, and the later ones a release has to take
 * one off are those behind it.  Between a narrow and a wide claim, which stand
 * in different lists, 'sequence' decides: a wide claim's is its own number, a
 * narrow one's is the number of the last wide claim before it.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "lhb_limits.h"
#include "lhb_lock.h"
#include "lhb_range.h"

/* Neighbouring regions are in different shards: see shards_of. */
_Static_assert (LHB_RANGE_SHARDS > 1, "a narrow claim has two nodes");

struct shard {
  _Alignas (64) struct lhb_lock lock;
  struct lhb_range_node list;           /* ends of the ring; has no claim */
};

struct lhb_range_table {
  struct shard shards[LHB_RANGE_SHARDS];
  /* Read under any shard's lock, changed under all of them. */
  struct lhb_range_node wide;
  uint64_t wide_sequence;
};

/* Claims granted by a release, in the order to call them. */
struct granted_list {
  struct lhb_range_claim *first;
  struct lhb_range_claim **end;
};

static void
list_init (struct lhb_range_node *list)
{
  list->prev = list->next = list;
  list->claim = NULL;
}

static inline void
list_append (struct lhb_range_node *list, struct lhb_range_node *node,
             struct lhb_range_claim *claim)
{
  node->claim = claim;
  node->prev = list->prev;
  node->next = list;
  list->prev->next = node;
  list->prev = node;
}

static inline void
list_remove (struct lhb_range_node *node)
{
  node->prev->next = node->next;
  node->next->prev = node->prev;
}

static inline bool
is_wide (const struct lhb_range_claim *claim)
{
  if (claim->kind == LHB_RANGE_FLUSH)
    return false;
  return claim->kind == LHB_RANGE_FREEZE
         || (claim->last_block >> LHB_RANGE_REGION_SHIFT)
            - (claim->first_block >> LHB_RANGE_REGION_SHIFT) > 1;
}

static inline bool
conflicts (const struct lhb_range_claim *a, const struct lhb_range_claim *b)
{
  if (a->kind >= LHB_RANGE_FLUSH || b->kind >= LHB_RANGE_FLUSH)
    return a->kind == LHB_RANGE_FREEZE || b->kind == LHB_RANGE_FREEZE;
  return a->first_block <= b->last_block && b->first_block <= a->last_block
         && (a->kind == LHB_RANGE_WRITE || b->kind == LHB_RANGE_WRITE);
}

/* The shards of a narrow claim, in the order to lock them: one or two. */
static inline uint32_t
shards_of (const struct lhb_range_claim *claim, uint32_t shards_out[2])
{
  uint64_t first, last;
  uint32_t a, b;

  if (claim->kind == LHB_RANGE_FLUSH) {
    shards_out[0] = 0;
    return 1;
  }
  first = claim->first_block >> LHB_RANGE_REGION_SHIFT;
  last = claim->last_block >> LHB_RANGE_REGION_SHIFT;
  a = (uint32_t) (first % LHB_RANGE_SHARDS);
  if (first == last) {
    shards_out[0] = a;
    return 1;
  }
  b = (uint32_t) (last % LHB_RANGE_SHARDS);
  shards_out[0] = a < b ? a : b;
  shards_out[1] = a < b ? b : a;
  return 2;
}

static void
lock_all (struct lhb_range_table *table)
{
  for (uint32_t i = 0; i < LHB_RANGE_SHARDS; i++)
    lhb_lock_take (&table->shards[i].lock);
}

static void
unlock_all (struct lhb_range_table *table)
{
  for (uint32_t i = LHB_RANGE_SHARDS; i-- > 0;)
    lhb_lock_drop (&table->shards[i].lock);
}

/* A claim with two nodes is met twice by a wide one, but counts once. */
static inline bool
is_primary (const struct lhb_range_node *node)
{
  return node == &node->claim->nodes[0];
}

int
lhb_range_open (struct lhb_range_table **table_out)
{
  struct lhb_range_table *table;

  table = aligned_alloc (_Alignof (struct lhb_range_table), sizeof *table);
  if (table == NULL)
    return -ENOMEM;
  memset (table, 0, sizeof *table);
  for (uint32_t i = 0; i < LHB_RANGE_SHARDS; i++)
    list_init (&table->shards[i].list);
  list_init (&table->wide);
  *table_out = table;
  return 0;
}

void
lhb_range_close (struct lhb_range_table *table)
{
  if (table == NULL)
    return;
  assert (lhb_range_count (table) == 0);
  free (table);
}

/* ---- Claiming: count the earlier conflicting claims. */

static inline uint32_t
count_in_list (const struct lhb_range_node *list,
               const struct lhb_range_claim *claim)
{
  uint32_t count = 0;

  for (const struct lhb_range_node *n = list->next; n != list; n = n->next)
    count += conflicts (n->claim, claim);
  return count;
}

static uint32_t
insert_wide (struct lhb_range_table *table, struct lhb_range_claim *claim)
{
  uint32_t blocked_by = count_in_list (&table->wide, claim);

  for (uint32_t i = 0; i < LHB_RANGE_SHARDS; i++) {
    const struct lhb_range_node *list = &table->shards[i].list;

    for (const struct lhb_range_node *n = list->next; n != list; n = n->next)
      blocked_by += is_primary (n) && conflicts (n->claim, claim);
  }
  claim->node_count = 1;
  claim->sequence = ++table->wide_sequence;
  list_append (&table->wide, &claim->nodes[0], claim);
  return blocked_by;
}

/* Two narrow claims that meet in two shards count twice; the release takes
 * two off. */
static inline uint32_t
insert_narrow (struct lhb_range_table *table, struct lhb_range_claim *claim,
               const uint32_t *shards, uint32_t shard_count)
{
  uint32_t blocked_by = count_in_list (&table->wide, claim);

  claim->node_count = shard_count;
  claim->sequence = table->wide_sequence;
  for (uint32_t i = 0; i < shard_count; i++) {
    struct lhb_range_node *list = &table->shards[shards[i]].list;

    blocked_by += count_in_list (list, claim);
    list_append (list, &claim->nodes[i], claim);
  }
  return blocked_by;
}

/* Nobody else can see the claim before the locks are dropped, and nobody may
 * look at it afterwards unless it is granted: it may be gone by then. */
bool
lhb_range_acquire (struct lhb_range_table *table,
                   struct lhb_range_claim *claim)
{
  uint32_t shards[2], shard_count, blocked_by;

  assert (claim->kind >= LHB_RANGE_FLUSH
          || claim->first_block <= claim->last_block);
  if (is_wide (claim)) {
    lock_all (table);
    blocked_by = insert_wide (table, claim);
    atomic_store_explicit (&claim->blocked_by, blocked_by,
                           memory_order_relaxed);
    unlock_all (table);
    return blocked_by == 0;
  }
  shard_count = shards_of (claim, shards);
  lhb_lock_take (&table->shards[shards[0]].lock);
  if (shard_count == 2)
    lhb_lock_take (&table->shards[shards[1]].lock);
  blocked_by = insert_narrow (table, claim, shards, shard_count);
  atomic_store_explicit (&claim->blocked_by, blocked_by, memory_order_relaxed);
  if (shard_count == 2)
    lhb_lock_drop (&table->shards[shards[1]].lock);
  lhb_lock_drop (&table->shards[shards[0]].lock);
  return blocked_by == 0;
}

/* ---- Releasing: take one off the later conflicting claims. */

/* The releasers of a claim's predecessors need not share a lock, so the count
 * is atomic; it orders all of them before the grant. */
static inline void
take_one_off (struct lhb_range_claim *later, struct granted_list *granted)
{
  uint32_t before = atomic_fetch_sub_explicit (&later->blocked_by, 1,
                                               memory_order_acq_rel);

  assert (before > 0);
  if (before > 1)
    return;
  later->next_granted = NULL;
  *granted->end = later;
  granted->end = &later->next_granted;
}

/* 'node' is the first one to look at. */
static inline void
unblock_list (const struct lhb_range_node *node,
              const struct lhb_range_node *list,
              const struct lhb_range_claim *claim,
              struct granted_list *granted)
{
  for (; node != list; node = node->next)
    if (conflicts (claim, node->claim))
      take_one_off (node->claim, granted);
}

static void
remove_wide (struct lhb_range_table *table, struct lhb_range_claim *claim,
             struct granted_list *granted)
{
  list_remove (&claim->nodes[0]);
  unblock_list (claim->nodes[0].next, &table->wide, claim, granted);
  for (uint32_t i = 0; i < LHB_RANGE_SHARDS; i++) {
    const struct lhb_range_node *list = &table->shards[i].list;

    for (const struct lhb_range_node *n = list->next; n != list; n = n->next)
      if (is_primary (n) && n->claim->sequence >= claim->sequence
          && conflicts (claim, n->claim))
        take_one_off (n->claim, granted);
  }
}

static inline void
remove_narrow (struct lhb_range_table *table, struct lhb_range_claim *claim,
               const uint32_t *shards, struct granted_list *granted)
{
  const struct lhb_range_node *wide = &table->wide;

  for (uint32_t i = 0; i < claim->node_count; i++) {
    list_remove (&claim->nodes[i]);
    unblock_list (claim->nodes[i].next, &table->shards[shards[i]].list, claim,
                  granted);
  }
  for (const struct lhb_range_node *n = wide->next; n != wide; n = n->next)
    if (n->claim->sequence > claim->sequence && conflicts (claim, n->claim))
      take_one_off (n->claim, granted);
}

/* A granted claim may be executed and released inside its callback.  Only the
 * outermost release of a thread calls back, so that a long line of waiting
 * claims is a loop and not a recursion. */
static void
call_granted (struct lhb_range_claim *first)
{
  static _Thread_local struct granted_list *outer;
  struct granted_list list = { .first = first };

  if (outer != NULL) {
    *outer->end = first;
    while (*outer->end != NULL)
      outer->end = &(*outer->end)->next_granted;
    return;
  }
  list.end = &list.first;
  while (*list.end != NULL)
    list.end = &(*list.end)->next_granted;
  outer = &list;
  while (list.first != NULL) {
    struct lhb_range_claim *claim = list.first;

    list.first = claim->next_granted;
    if (list.first == NULL)
      list.end = &list.first;
    claim->granted (claim);
  }
  outer = NULL;
}

void
lhb_range_release (struct lhb_range_table *table,
                   struct lhb_range_claim *claim)
{
  struct granted_list granted = { .first = NULL };
  uint32_t shards[2], shard_count;

  granted.end = &granted.first;
  assert (atomic_load_explicit (&claim->blocked_by, memory_order_relaxed)
          == 0);
  if (is_wide (claim)) {
    lock_all (table);
    remove_wide (table, claim, &granted);
    unlock_all (table);
  }
  else {
    shard_count = shards_of (claim, shards);
    assert (shard_count == claim->node_count);
    lhb_lock_take (&table->shards[shards[0]].lock);
    if (shard_count == 2)
      lhb_lock_take (&table->shards[shards[1]].lock);
    remove_narrow (table, claim, shards, &granted);
    if (shard_count == 2)
      lhb_lock_drop (&table->shards[shards[1]].lock);
    lhb_lock_drop (&table->shards[shards[0]].lock);
  }
  if (granted.first != NULL)
    call_granted (granted.first);
}

uint64_t
lhb_range_count (struct lhb_range_table *table)
{
  uint64_t count = 0;

  lock_all (table);
  for (const struct lhb_range_node *n = table->wide.next; n != &table->wide;
       n = n->next)
    count++;
  for (uint32_t i = 0; i < LHB_RANGE_SHARDS; i++) {
    const struct lhb_range_node *list = &table->shards[i].list;

    for (const struct lhb_range_node *n = list->next; n != list; n = n->next)
      count += is_primary (n);
  }
  unlock_all (table);
  return count;
}
