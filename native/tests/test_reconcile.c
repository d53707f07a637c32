/* Reconcile: a layer becomes equal to another in data, holes and discards.
 *
 * Every combination of what source and target can have of a block is there: a
 * hole, zeros that were written, space that a power loss left unwritten, or
 * data, each with or without a discard bit.  Below both lies a layer of 'b', so
 * a hole that ought to be zeros shows.
 */

#include "lhb_replica.h"

enum { COMBINATIONS = 64, BLOCKS = 4 * COMBINATIONS };

#define SIZE ((uint64_t) BLOCKS * BLOCK)

static const char *const chain[] = { "base", "head", NULL };

enum content { HOLE, ZEROS, ALLOCATED, DATA };

struct kind {
  enum content content;
  bool discarded;
};

/* The combinations alone, then in runs of two, three and more. */
static unsigned
combination (uint64_t block)
{
  static const uint64_t runs[] = { 1, 2, 3, 7 };

  return (unsigned) (block / runs[block / COMBINATIONS] % COMBINATIONS);
}

static struct kind
source_kind (uint64_t block)
{
  unsigned c = combination (block);

  return (struct kind){ (enum content) (c & 3), (c >> 4 & 1) != 0 };
}

static struct kind
target_kind (uint64_t block)
{
  unsigned c = combination (block);

  return (struct kind){ (enum content) (c >> 2 & 3), (c >> 5 & 1) != 0 };
}

/* Half of the data of both sides is alike. */
static int
target_byte (uint64_t block)
{
  return block % 2 ? 's' : 't';
}

static void
make_head (const struct replica *replica, bool is_target,
           struct kind (*kind) (uint64_t))
{
  uint8_t bits[BLOCKS / 8] = { 0 };
  int fd;

  replica_image (replica, "base", SIZE);
  replica_image (replica, "head", SIZE);
  replica_fill (replica, "base", 0, BLOCKS, 'b');
  fd = replica_open_image (replica, "head");
  for (uint64_t block = 0; block < BLOCKS; block++)
    {
      struct kind k = kind (block);

      if (k.content == ALLOCATED)
        CHECK_EQUAL (fallocate (fd, FALLOC_FL_KEEP_SIZE,
                                (off_t) (block * BLOCK), BLOCK),
                     0);
      else if (k.content != HOLE)
        replica_fill (replica, "head", block, 1,
                      k.content == ZEROS ? 0
                      : is_target        ? target_byte (block)
                                         : 's');
      if (k.discarded)
        bits[block / 8] |= (uint8_t) (1u << (block % 8));
    }
  close (fd);
  fd = openat (replica->fd, "discard.head", O_WRONLY | O_CREAT | O_CLOEXEC,
               0600);
  CHECK_EQUAL (write (fd, bits, sizeof bits), sizeof bits);
  close (fd);
}

static char *
make_model (void)
{
  char *model = blocks_alloc (BLOCKS);

  for (uint64_t block = 0; block < BLOCKS; block++)
    {
      struct kind k = source_kind (block);

      if (k.content == DATA)
        memset (model + block * BLOCK, 's', BLOCK);
      else if (k.content != ZEROS && !k.discarded)
        memset (model + block * BLOCK, 'b', BLOCK);
    }
  return model;
}

struct pair {
  lhb_engine *engine;
  struct replica source, target;
  lhb_store *from, *to;
};

static void
open_stores (struct pair *pair, uint32_t flags)
{
  pair->from = store_open (pair->engine, &pair->source, SIZE, flags, chain);
  pair->to = store_open (pair->engine, &pair->target, SIZE, flags, chain);
}

static void
open_pair (struct pair *pair, uint32_t flags)
{
  pair->engine = engine_make (LHB_DRIVER_POOL, 1);
  replica_make (&pair->source);
  replica_make (&pair->target);
  make_head (&pair->source, false, source_kind);
  make_head (&pair->target, true, target_kind);
  open_stores (pair, flags);
}

static void
close_stores (struct pair *pair)
{
  lhb_store_close (pair->from);
  lhb_store_close (pair->to);
}

static void
close_pair (struct pair *pair)
{
  lhb_fault_clear ();
  close_stores (pair);
  replica_remove (&pair->source);
  replica_remove (&pair->target);
  lhb_engine_close (pair->engine);
}

static const struct lhb_extent everything = { 0, INT64_MAX };

static int64_t
reconcile (struct pair *pair, int source_layer, int target_layer)
{
  return lhb_store_reconcile (pair->from, source_layer, pair->to,
                              target_layer, &everything, 1);
}

static int64_t
reconcile_heads (struct pair *pair)
{
  return reconcile (pair, pair->from->head, pair->to->head);
}

/* The files say the same of every block, not just what is above 'b'. */
static void
check_same_extents (struct pair *pair)
{
  int a = replica_open_image (&pair->source, "head");
  int b = replica_open_image (&pair->target, "head");
  struct lhb_extent want[BLOCKS], got[BLOCKS];
  int count
      = lhb_file_extents_of (a, LHB_EXTENTS_WRITTEN, 0, want, BLOCKS);

  CHECK (count > 0);
  CHECK_EQUAL (lhb_file_extents (b, 0, got, BLOCKS), count);
  for (int i = 0; i < count; i++)
    {
      CHECK_EQUAL (got[i].offset_bytes, want[i].offset_bytes);
      CHECK_EQUAL (got[i].length_bytes, want[i].length_bytes);
    }
  close (a);
  close (b);
}

static void
check_equal (struct pair *pair)
{
  char *model = make_model ();

  check_same_extents (pair);
  replica_check (pair->engine, &pair->source, chain, model, BLOCKS);
  replica_check (pair->engine, &pair->target, chain, model, BLOCKS);
  free (model);
}

static void
target_becomes_equal_to_the_source (void)
{
  for (uint32_t flags = 0; flags <= LHB_STORE_DIRECT; flags++)
    {
      struct pair pair;

      open_pair (&pair, flags);
      CHECK (reconcile_heads (&pair) > 0);
      check_equal (&pair);
      CHECK_EQUAL (reconcile_heads (&pair), 0);
      check_equal (&pair);
      close_pair (&pair);
    }
}

/* More than one slice of 256 blocks, and extents beyond one batch. */
static void
long_layers_become_equal (void)
{
  const uint64_t blocks = 1500;
  struct pair pair = { .engine = engine_make (LHB_DRIVER_POOL, 1) };
  char *want = blocks_alloc (blocks);

  replica_make (&pair.source);
  replica_make (&pair.target);
  for (int layer = 0; layer < 2; layer++)
    {
      replica_image (&pair.source, chain[layer], blocks * BLOCK);
      replica_image (&pair.target, chain[layer], blocks * BLOCK);
    }
  for (uint64_t block = 0; block < 400; block += 2)
    {
      replica_fill (&pair.source, "head", block, 1, 's');
      replica_fill (&pair.target, "head", block + 1, 1, 't');
    }
  replica_fill (&pair.source, "head", 500, 700, 's');
  replica_fill (&pair.target, "head", 450, 900, 't');
  pair.from = store_open (pair.engine, &pair.source, blocks * BLOCK, 0, chain);
  pair.to = store_open (pair.engine, &pair.target, blocks * BLOCK, 0, chain);
  CHECK_EQUAL (lhb_store_read (pair.from, 0, (uint32_t) blocks, want), 0);
  CHECK (reconcile_heads (&pair) > 0);
  check_same_extents (&pair);
  replica_check (pair.engine, &pair.target, chain, want, blocks);
  CHECK_EQUAL (reconcile_heads (&pair), 0);
  free (want);
  close_pair (&pair);
}

/* Of another program, space is zeros: those that compare equal are written, so
 * that they are data of the target, too, and counted, so that it is synced. */
static void
space_of_a_foreign_layer_is_written_as_zeros (void)
{
  struct pair pair = { .engine = engine_make (LHB_DRIVER_POOL, 1) };
  char *want = blocks_alloc (BLOCKS);
  int fd, side;

  replica_make (&pair.source);
  replica_make (&pair.target);
  for (int layer = 0; layer < 2; layer++)
    {
      replica_image (&pair.source, chain[layer], SIZE);
      replica_image (&pair.target, chain[layer], SIZE);
    }
  replica_image (&pair.source, "foreign", SIZE);
  replica_fill (&pair.target, "base", 0, BLOCKS, 'b');
  fd = replica_open_image (&pair.source, "foreign");
  CHECK_EQUAL (fallocate (fd, FALLOC_FL_KEEP_SIZE, 5 * BLOCK, 3 * BLOCK), 0);
  close (fd);
  fd = replica_open_image (&pair.target, "head");
  CHECK_EQUAL (fallocate (fd, FALLOC_FL_KEEP_SIZE, 7 * BLOCK, 3 * BLOCK), 0);
  close (fd);
  replica_fill (&pair.target, "head", 6, 1, 0);
  open_stores (&pair, 0);
  side = lhb_store_add_side_layer (pair.from, "foreign", "discard.foreign");
  CHECK (side > 0);
  CHECK (reconcile (&pair, side, pair.to->head) > 0);
  CHECK_EQUAL (reconcile (&pair, side, pair.to->head), 0);
  memset (want, 'b', SIZE);
  memset (want + 5 * BLOCK, 0, 3 * BLOCK);
  replica_check (pair.engine, &pair.target, chain, want, BLOCKS);
  CHECK_EQUAL (faccessat (pair.source.fd, "discard.foreign", F_OK, 0), -1);
  free (want);
  close_pair (&pair);
}

static void
discard_file_appears_where_there_was_none (void)
{
  for (int missing = 0; missing < 2; missing++)
    {
      struct pair pair;

      open_pair (&pair, 0);
      close_stores (&pair);
      CHECK_EQUAL (unlinkat (missing ? pair.source.fd : pair.target.fd,
                             "discard.head", 0),
                   0);
      open_stores (&pair, 0);
      CHECK (reconcile_heads (&pair) > 0);
      if (missing)
        {
          char *want = blocks_alloc (BLOCKS);

          CHECK_EQUAL (lhb_store_read (pair.from, 0, BLOCKS, want), 0);
          replica_check (pair.engine, &pair.target, chain, want, BLOCKS);
          free (want);
        }
      else
        check_equal (&pair);
      close_pair (&pair);
    }
}

static void
failed_reconcile_is_an_error_and_is_repeated (void)
{
  static const char *const points[] = { "store.sync", "store.discard_write" };

  for (int i = 0; i < 2; i++)
    {
      struct pair pair;

      open_pair (&pair, 0);
      CHECK_EQUAL (lhb_fault_arm (points[i], EIO,
                                  lhb_store_id (pair.to), 0, 1),
                   0);
      CHECK_EQUAL (reconcile_heads (&pair), -EIO);
      close_stores (&pair);
      open_stores (&pair, 0);
      CHECK (reconcile_heads (&pair) >= 0);
      check_equal (&pair);
      close_pair (&pair);
    }
}

static void
layers_of_different_sizes_are_refused (void)
{
  struct pair pair;
  int side;

  open_pair (&pair, 0);
  replica_image (&pair.source, "longer", SIZE + BLOCK);
  side = lhb_store_add_side_layer (pair.from, "longer", "");
  CHECK (side > 0);
  CHECK_EQUAL (reconcile (&pair, side, pair.to->head), -EINVAL);
  CHECK_EQUAL (reconcile (&pair, 0, pair.to->head), -EINVAL);
  CHECK_EQUAL (reconcile (&pair, pair.from->head, 77), -EINVAL);
  close_pair (&pair);
}

enum { STEP_BLOCKS = LHB_RANGE_STEP_BYTES / BLOCK };

/* What a read finds, and the extents of the head. */
static char *
contents (struct pair *pair, const struct replica *replica)
{
  char *data = blocks_alloc (BLOCKS);
  lhb_store *store = store_open (pair->engine, replica, SIZE, 0, chain);

  CHECK_EQUAL (lhb_store_read (store, 0, BLOCKS, data), 0);
  lhb_store_close (store);
  return data;
}

/* Every range is made equal, and no block beside it is touched, whatever
 * either side has there. */
static void
only_ranges_are_made_equal (void)
{
  static const struct lhb_extent ranges[]
      = { { LHB_RANGE_STEP_BYTES, 2 * LHB_RANGE_STEP_BYTES },
          { 11 * LHB_RANGE_STEP_BYTES, LHB_RANGE_STEP_BYTES },
          { SIZE - 5 * LHB_RANGE_STEP_BYTES, INT64_MAX },
          { SIZE + LHB_RANGE_STEP_BYTES, LHB_RANGE_STEP_BYTES } };
  struct pair pair;
  char *source, *before, *after;

  open_pair (&pair, 0);
  close_stores (&pair);
  source = contents (&pair, &pair.source);
  before = contents (&pair, &pair.target);
  CHECK (memcmp (source, before, SIZE) != 0);
  open_stores (&pair, 0);
  CHECK (lhb_store_reconcile (pair.from, pair.from->head, pair.to,
                              pair.to->head, ranges, 4)
         > 0);
  CHECK_EQUAL (lhb_store_reconcile (pair.from, pair.from->head, pair.to,
                                    pair.to->head, ranges, 4),
               0);
  after = contents (&pair, &pair.target);
  for (uint64_t block = 0; block < BLOCKS; block++)
    {
      uint64_t step = block / STEP_BLOCKS;
      bool inside = step == 1 || step == 2 || step == 11
                    || step >= BLOCKS / STEP_BLOCKS - 5;
      const char *want = inside ? source : before;

      CHECK (memcmp (after + block * BLOCK, want + block * BLOCK, BLOCK) == 0);
    }
  CHECK_EQUAL (lhb_store_reconcile (pair.from, pair.from->head, pair.to,
                                    pair.to->head, NULL, 0),
               0);
  CHECK (reconcile_heads (&pair) > 0);
  check_equal (&pair);
  free (source);
  free (before);
  free (after);
  close_pair (&pair);
}

static void
ranges_that_share_a_byte_of_bits_are_refused (void)
{
  static const struct lhb_extent bad[]
      = { { BLOCK, LHB_RANGE_STEP_BYTES }, { 0, 3 * BLOCK },
          { LHB_RANGE_STEP_BYTES, UINT64_MAX } };
  struct pair pair;

  open_pair (&pair, 0);
  for (int i = 0; i < 3; i++)
    CHECK_EQUAL (lhb_store_reconcile (pair.from, pair.from->head, pair.to,
                                      pair.to->head, &bad[i], 1),
                 -EINVAL);
  close_pair (&pair);
}

static const struct lhb_test tests[] = {
  LHB_TEST (target_becomes_equal_to_the_source),
  LHB_TEST (long_layers_become_equal),
  LHB_TEST (space_of_a_foreign_layer_is_written_as_zeros),
  LHB_TEST (discard_file_appears_where_there_was_none),
  LHB_TEST (failed_reconcile_is_an_error_and_is_repeated),
  LHB_TEST (layers_of_different_sizes_are_refused),
  LHB_TEST (only_ranges_are_made_equal),
  LHB_TEST (ranges_that_share_a_byte_of_bits_are_refused),
};

LHB_TEST_MAIN (tests)
