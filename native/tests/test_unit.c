/* Units: a layer becomes equal to another, piece by piece. */

#include "lhb_replica.h"
#include "lhb_unit.h"

/* Two units and a piece of a third. */
enum { BLOCKS = 2 * LHB_UNIT_BLOCKS + 5 };

#define SIZE ((uint64_t) BLOCKS * BLOCK)

static const char *const chain[] = { "base", "layer", "head", NULL };

struct pair {
  lhb_engine *engine;
  struct replica source, target;
  lhb_store *from, *to;
  lhb_unit *unit;
};

enum { LAYER = 2 };             /* ids are given in the order of the chain */

static void
set_discard (const struct replica *replica, uint64_t block)
{
  uint8_t byte = (uint8_t) (1u << (block % 8));
  int fd = openat (replica->fd, "discard.layer", O_WRONLY | O_CREAT | O_CLOEXEC,
                   0600);

  CHECK_EQUAL (pwrite (fd, &byte, 1, (off_t) (block / 8)), 1);
  close (fd);
}

/* Data, zeros, space without data, holes and discards on both sides. */
static void
open_pair (struct pair *pair, uint32_t flags)
{
  int fd;

  pair->engine = engine_make (LHB_DRIVER_POOL, 1);
  replica_make (&pair->source);
  replica_make (&pair->target);
  for (int i = 0; i < 3; i++)
    {
      replica_image (&pair->source, chain[i], SIZE);
      replica_image (&pair->target, chain[i], SIZE);
    }
  for (uint64_t block = 0; block < LHB_UNIT_BLOCKS; block += 2)
    replica_fill (&pair->source, "layer", block, 1, 's');
  replica_fill (&pair->source, "layer", LHB_UNIT_BLOCKS + 10, 20, 0);
  replica_fill (&pair->source, "layer", BLOCKS - 1, 1, 'e');
  set_discard (&pair->source, 3);
  set_discard (&pair->source, BLOCKS - 2);
  replica_fill (&pair->target, "layer", 1, 100, 't');
  replica_fill (&pair->target, "layer", 200, 1, 's');
  set_discard (&pair->target, 5);
  fd = replica_open_image (&pair->target, "layer");
  CHECK_EQUAL (fallocate (fd, FALLOC_FL_KEEP_SIZE,
                          (LHB_UNIT_BLOCKS + 5) * BLOCK, 10 * BLOCK),
               0);
  close (fd);
  pair->from = store_open (pair->engine, &pair->source, SIZE, flags, chain);
  pair->to = store_open (pair->engine, &pair->target, SIZE,
                         flags | LHB_STORE_WRITE_ONLY, chain);
  CHECK_EQUAL (lhb_unit_open (&pair->unit), 0);
}

static void
close_pair (struct pair *pair)
{
  lhb_fault_clear ();
  lhb_unit_close (pair->unit);
  lhb_store_close (pair->from);
  lhb_store_close (pair->to);
  replica_remove (&pair->source);
  replica_remove (&pair->target);
  lhb_engine_close (pair->engine);
}

static int64_t
copy_all (struct pair *pair)
{
  int64_t changed = 0;

  CHECK_EQUAL (lhb_unit_begin (pair->to, LAYER, SIZE), 0);
  for (uint64_t offset = 0; offset < SIZE; offset += LHB_UNIT_BYTES)
    {
      int64_t r;

      CHECK (lhb_unit_read (pair->from, LAYER, offset, pair->unit) >= 0);
      r = lhb_unit_write (pair->to, LAYER, offset, pair->unit, 0);
      CHECK (r >= 0);
      changed += r;
    }
  CHECK_EQUAL (lhb_unit_sync (pair->to, LAYER), 0);
  return changed;
}

static uint64_t
hash_of (struct pair *pair, lhb_store *store, uint64_t offset, int shape_only)
{
  CHECK (lhb_unit_read (store, LAYER, offset, pair->unit) >= 0);
  return lhb_unit_hash (pair->unit, shape_only);
}

static void
check_equal (struct pair *pair)
{
  for (uint64_t offset = 0; offset < SIZE; offset += LHB_UNIT_BYTES)
    CHECK_EQUAL (hash_of (pair, pair->to, offset, 0),
                 hash_of (pair, pair->from, offset, 0));
}

static void
layer_becomes_equal (void)
{
  for (uint32_t flags = 0; flags <= LHB_STORE_DIRECT; flags++)
    {
      struct pair pair;

      open_pair (&pair, flags);
      CHECK (hash_of (&pair, pair.to, 0, 1) != hash_of (&pair, pair.from, 0, 1));
      CHECK (copy_all (&pair) > 0);
      check_equal (&pair);
      CHECK_EQUAL (copy_all (&pair), 0);
      close_pair (&pair);
    }
}

/* Other data in the same places: the shape is the same, the content not. */
static void
shape_says_nothing_of_data (void)
{
  struct pair pair;

  open_pair (&pair, 0);
  (void) copy_all (&pair);
  replica_fill (&pair.target, "layer", 0, 1, 'x');
  CHECK_EQUAL (hash_of (&pair, pair.to, 0, 1), hash_of (&pair, pair.from, 0, 1));
  CHECK (hash_of (&pair, pair.to, 0, 0) != hash_of (&pair, pair.from, 0, 0));
  CHECK_EQUAL (copy_all (&pair), BLOCK);
  check_equal (&pair);
  close_pair (&pair);
}

static void
layer_gets_the_size_of_the_source (void)
{
  struct pair pair;

  open_pair (&pair, 0);
  CHECK_EQUAL (lhb_unit_begin (pair.to, LAYER, LHB_UNIT_BYTES), 0);
  CHECK_EQUAL (lhb_unit_read (pair.to, LAYER, LHB_UNIT_BYTES, pair.unit),
               -EINVAL);
  CHECK_EQUAL (lhb_unit_begin (pair.to, LAYER, SIZE), 0);
  CHECK_EQUAL (lhb_unit_read (pair.to, LAYER, LHB_UNIT_BYTES, pair.unit), 0);
  close_pair (&pair);
}

static void
wrong_calls_are_refused (void)
{
  struct pair pair;

  open_pair (&pair, 0);
  CHECK_EQUAL (lhb_unit_read (pair.from, 99, 0, pair.unit), -EINVAL);
  CHECK_EQUAL (lhb_unit_read (pair.from, LAYER + 1, 0, pair.unit), -EINVAL);
  CHECK_EQUAL (lhb_unit_read (pair.from, LAYER, BLOCK, pair.unit), -EINVAL);
  CHECK_EQUAL (lhb_unit_begin (pair.to, LAYER + 1, SIZE), -EINVAL);
  CHECK_EQUAL (lhb_unit_begin (pair.to, LAYER, SIZE + 1), -EINVAL);
  CHECK_EQUAL (lhb_unit_sync (pair.to, 99), -EINVAL);
  close_pair (&pair);
}

static void
errors_are_passed_on (void)
{
  struct pair pair;

  open_pair (&pair, 0);
  CHECK_EQUAL (lhb_fault_arm ("unit.read", EIO, 0, 0, 1), 0);
  CHECK_EQUAL (lhb_unit_read (pair.from, LAYER, 0, pair.unit), -EIO);
  CHECK (lhb_unit_read (pair.from, LAYER, 0, pair.unit) > 0);
  CHECK_EQUAL (lhb_fault_arm ("unit.write", ENOSPC, 0, 0, 1), 0);
  CHECK_EQUAL (lhb_unit_begin (pair.to, LAYER, SIZE), 0);
  CHECK_EQUAL (lhb_unit_write (pair.to, LAYER, 0, pair.unit, 0), -ENOSPC);
  CHECK_EQUAL (lhb_fault_arm ("store.discard_write", EIO, 0, 0, 1), 0);
  CHECK_EQUAL (lhb_unit_write (pair.to, LAYER, 0, pair.unit, 0), -EIO);
  CHECK_EQUAL (lhb_fault_arm ("unit.sync", EIO, 0, 0, 1), 0);
  CHECK_EQUAL (lhb_unit_sync (pair.to, LAYER), -EIO);
  CHECK (copy_all (&pair) > 0);
  check_equal (&pair);
  close_pair (&pair);
}

/* What the layers below will have is unknown, so a TRIM leaves its bit even
 * where they have nothing yet. */
static void
write_only_store_hides_what_will_be_below (void)
{
  struct pair pair;
  struct lhb_layer *head;
  uint64_t first, count;

  open_pair (&pair, 0);
  head = &pair.to->layers[pair.to->head];
  CHECK_EQUAL (lhb_store_zero (pair.to, 8 * BLOCK, 4 * BLOCK, true, 0), 0);
  CHECK_EQUAL (lhb_discard_next (pair.to, head, 0, BLOCKS, &first, &count), 1);
  CHECK_EQUAL (first, 8);
  CHECK_EQUAL (count, 4);
  close_pair (&pair);
}

static const struct lhb_test tests[] = {
  LHB_TEST (layer_becomes_equal),
  LHB_TEST (shape_says_nothing_of_data),
  LHB_TEST (layer_gets_the_size_of_the_source),
  LHB_TEST (wrong_calls_are_refused),
  LHB_TEST (errors_are_passed_on),
  LHB_TEST (write_only_store_hides_what_will_be_below),
};

LHB_TEST_MAIN (tests)
