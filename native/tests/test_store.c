/* Store: layers and their map, zeros and discards, failures, refused files. */

#include "lhb_replica.h"

/* Two windows of a discard file would be 64 Ki blocks; here the numbers only
 * have to give every alignment a neighbour. */
#define BLOCKS 48
#define SIZE ((uint64_t) BLOCKS * BLOCK)

static const char *const base_and_head[] = { "base", "head", NULL };
static const char *const three[] = { "base", "middle", "head", NULL };

static void
put (lhb_store *store, char *model, uint64_t block, uint32_t blocks, int byte)
{
  char *data = blocks_alloc (blocks);
  int error;

  memset (data, byte, blocks * BLOCK);
  CHECK_EQUAL (lhb_map_reserve_head (store->map, block, blocks), 0);
  CHECK_EQUAL (lhb_store_write (store, block, blocks, data, 0, &error),
               blocks * BLOCK);
  CHECK_EQUAL (error, 0);
  lhb_store_wrote (store, block, blocks * BLOCK);
  memset (model + block * BLOCK, byte, blocks * BLOCK);
  free (data);
}

static void
newest_layer_with_a_block_is_read (void)
{
  struct replica replica;
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  char *model = blocks_alloc (BLOCKS);
  lhb_store *store;

  replica_make (&replica);
  for (int i = 0; i < 3; i++)
    replica_image (&replica, three[i], SIZE);
  replica_fill (&replica, "base", 0, 12, 'b');
  replica_fill (&replica, "middle", 4, 12, 'm');
  replica_fill (&replica, "head", 8, 12, 'h');
  memset (model, 'b', 4 * BLOCK);
  memset (model + 4 * BLOCK, 'm', 4 * BLOCK);
  memset (model + 8 * BLOCK, 'h', 12 * BLOCK);
  store = store_open (engine, &replica, SIZE, 0, three);
  store_check (store, model, BLOCKS);
  put (store, model, 2, 20, 'n');
  put (store, model, BLOCKS - 1, 1, 'e');
  store_check (store, model, BLOCKS);
  lhb_store_close (store);
  for (uint32_t flags = 0; flags <= LHB_STORE_DIRECT; flags++)
    {
      store = store_open (engine, &replica, SIZE, flags, three);
      store_check (store, model, BLOCKS);
      lhb_store_close (store);
    }
  replica_check (engine, &replica, three, model, BLOCKS);
  replica_remove (&replica);
  free (model);
  lhb_engine_close (engine);
}

static void
older_layers_may_be_shorter_or_longer (void)
{
  struct replica replica;
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  char *model = blocks_alloc (BLOCKS);

  replica_make (&replica);
  replica_image (&replica, "base", 2 * SIZE);
  replica_image (&replica, "middle", SIZE / 2);
  replica_image (&replica, "head", SIZE);
  replica_fill (&replica, "base", BLOCKS - 2, 4, 'b');
  replica_fill (&replica, "middle", BLOCKS / 2 - 1, 1, 'm');
  memset (model + (BLOCKS - 2) * BLOCK, 'b', 2 * BLOCK);
  memset (model + (BLOCKS / 2 - 1) * BLOCK, 'm', BLOCK);
  replica_check (engine, &replica, three, model, BLOCKS);
  replica_remove (&replica);
  free (model);
  lhb_engine_close (engine);
}

static void
allocate (const struct replica *replica, const char *name, uint64_t block,
          uint64_t blocks)
{
  int fd = replica_open_image (replica, name);

  CHECK_EQUAL (fallocate (fd, FALLOC_FL_KEEP_SIZE, (off_t) (block * BLOCK),
                          (off_t) (blocks * BLOCK)),
               0);
  close (fd);
}

/* A power loss after a write's space was allocated, before it was written. */
static void
unwritten_extents_of_our_layers_are_no_data (void)
{
  struct replica replica;
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  char *model = blocks_alloc (BLOCKS);
  struct lhb_extent extent;
  int fd;

  replica_make (&replica);
  for (int i = 0; i < 3; i++)
    replica_image (&replica, three[i], SIZE);
  replica_fill (&replica, "base", 0, BLOCKS, 'b');
  memset (model, 'b', SIZE);
  for (int i = 1; i < 3; i++)
    {
      const char *const until[] = { "base", three[1], i > 1 ? three[2] : NULL,
                                    NULL };
      lhb_store *store = store_open (engine, &replica, SIZE, 0, until);

      put (store, model, 10, 2, 'h');
      CHECK_EQUAL (lhb_store_zero (store, 20 * BLOCK, 2 * BLOCK, false, 0), 0);
      memset (model + 20 * BLOCK, 0, 2 * BLOCK);
      CHECK_EQUAL (lhb_store_sync (store), 0);
      lhb_store_close (store);
      allocate (&replica, three[i], 5, 3);
      allocate (&replica, three[i], 12, 1);
      replica_check (engine, &replica, until, model, BLOCKS);
    }
  lhb_store_close (store_open (engine, &replica, SIZE, 0, three));
  replica_check (engine, &replica, three, model, BLOCKS);
  /* Nor for another program, which knows no difference. */
  fd = replica_open_image (&replica, three[2]);
  CHECK_EQUAL (lhb_file_extents (fd, 0, &extent, 1), 1);
  CHECK_EQUAL (extent.offset_bytes, 10 * BLOCK);
  CHECK_EQUAL (extent.length_bytes, 2 * BLOCK);
  close (fd);
  replica_remove (&replica);
  free (model);
  lhb_engine_close (engine);
}

static void
foreign_head_keeps_its_zeros_when_it_becomes_ours (void)
{
  struct replica replica;
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  char *model = blocks_alloc (BLOCKS);

  replica_make (&replica);
  replica_image (&replica, "base", SIZE);
  replica_image (&replica, "head", SIZE);
  replica_fill (&replica, "base", 0, BLOCKS, 'b');
  allocate (&replica, "head", 5, 3);
  memset (model, 'b', SIZE);
  memset (model + 5 * BLOCK, 0, 3 * BLOCK);
  for (int time = 0; time < 2; time++)
    {
      lhb_store *store = store_open (engine, &replica, SIZE, 0, base_and_head);

      store_check (store, model, BLOCKS);
      lhb_store_close (store);
      allocate (&replica, "head", 7, 4);
      replica_check (engine, &replica, base_and_head, model, BLOCKS);
    }
  replica_remove (&replica);
  free (model);
  lhb_engine_close (engine);
}

/* Bits that were cut off would turn zeros into what lies below. */
static void
layer_becomes_ours_completely_or_not_at_all (void)
{
  struct replica replica;
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  lhb_store *store;

  replica_make (&replica);
  replica_image (&replica, "head", SIZE);
  allocate (&replica, "head", 5, 3);
  CHECK_EQUAL (lhb_store_open (engine, replica.fd, SIZE, 0, &store), 0);
  CHECK (lhb_store_add_layer (store, "head", "discard.head") > 0);
  CHECK_EQUAL (lhb_fault_arm ("store.discard_write", ENOSPC, 0, 0, 1), 0);
  CHECK_EQUAL (lhb_store_start (store), -ENOSPC);
  CHECK_EQUAL (faccessat (replica.fd, "discard.head", F_OK, 0), -1);
  lhb_fault_clear ();
  lhb_store_close (store);
  replica_remove (&replica);
  lhb_engine_close (engine);
}

static void
unwritten_extents_of_foreign_layers_are_data (void)
{
  struct replica replica;
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  char *model = blocks_alloc (BLOCKS);
  int fd;

  replica_make (&replica);
  replica_image (&replica, "base", SIZE);
  replica_image (&replica, "head", SIZE);
  replica_fill (&replica, "base", 0, BLOCKS, 'b');
  fd = replica_open_image (&replica, "head");
  CHECK_EQUAL (fallocate (fd, FALLOC_FL_KEEP_SIZE, 5 * BLOCK, 3 * BLOCK), 0);
  close (fd);
  memset (model, 'b', SIZE);
  memset (model + 5 * BLOCK, 0, 3 * BLOCK);
  replica_check (engine, &replica, base_and_head, model, BLOCKS);
  replica_remove (&replica);
  free (model);
  lhb_engine_close (engine);
}

/* ---- Zeros and discards. */

static const uint64_t edges[] = { 0, 1, 511, 512, BLOCK - 1 };
enum { EDGES = sizeof edges / sizeof edges[0] };

/* A layer below half of the blocks, data in the head in every other block:
 * the four kinds of blocks there are, in runs of different lengths. */
static void
fill_kinds (lhb_store *store, char *model)
{
  memset (model, 0, SIZE);
  memset (model, 'b', SIZE / 2);
  for (uint64_t block = 1; block < BLOCKS; block += 3)
    put (store, model, block, 1 + block % 2, 'h');
}

static void
zero_and_check (lhb_engine *engine, const struct replica *replica,
                uint32_t flags, bool trim, uint32_t io_flags, uint64_t offset,
                uint64_t length)
{
  char *model = blocks_alloc (BLOCKS);
  lhb_store *store;

  replica_image (replica, "head", SIZE);
  store = store_open (engine, replica, SIZE, flags, base_and_head);
  fill_kinds (store, model);
  CHECK_EQUAL (lhb_store_zero (store, offset, length, trim, io_flags), 0);
  memset (model + offset, 0, length);
  store_check (store, model, BLOCKS);
  lhb_store_close (store);
  replica_check (engine, replica, base_and_head, model, BLOCKS);
  /* The format knows no discards: WRITE_ZEROES is seen without them. */
  CHECK_EQUAL (unlinkat (replica->fd, "discard.head", 0), 0);
  if (!trim)
    replica_check (engine, replica, base_and_head, model, BLOCKS);
  CHECK_EQUAL (unlinkat (replica->fd, "head", 0), 0);
  free (model);
}

static void
zero_at_all_alignments (bool trim, uint32_t io_flags)
{
  static const uint64_t firsts[] = { 0, 3, BLOCKS / 2 - 2 };
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  struct replica replica;

  replica_make (&replica);
  replica_image (&replica, "base", SIZE);
  replica_fill (&replica, "base", 0, BLOCKS / 2, 'b');
  for (int i = 0; i < 3; i++)
    for (int first = 0; first < EDGES; first++)
      for (uint64_t blocks = 0; blocks <= 4; blocks += 2)
        for (int last = 0; last < EDGES; last++)
          {
            uint64_t begin = firsts[i] * BLOCK + edges[first];
            uint64_t end = (firsts[i] + blocks) * BLOCK + edges[last];

            if (begin < end)
              zero_and_check (engine, &replica,
                              last % 2 ? LHB_STORE_DIRECT : 0, trim, io_flags,
                              begin, end - begin);
          }
  zero_and_check (engine, &replica, 0, trim, io_flags, 0, SIZE);
  zero_and_check (engine, &replica, 0, trim, io_flags, SIZE - 1, 1);
  replica_remove (&replica);
  lhb_engine_close (engine);
}

static void
trim_equals_a_model_at_all_alignments (void)
{
  zero_at_all_alignments (true, 0);
}

static void
zeroes_equal_a_model_at_all_alignments (void)
{
  zero_at_all_alignments (false, 0);
}

static void
zeroes_without_holes_equal_a_model_at_all_alignments (void)
{
  zero_at_all_alignments (false, LHB_IO_NO_HOLE);
}

/* The file system can not punch or zero: zeros are written. */
static void
zeroes_are_written_where_they_can_not_be_made (void)
{
  CHECK_EQUAL (
      lhb_fault_arm ("store.punch", EOPNOTSUPP, 0, 0, UINT64_MAX), 0);
  zero_at_all_alignments (false, 0);
  lhb_fault_clear ();
}

static void
fast_zeroes_are_refused_where_they_would_be_written (void)
{
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  char *model = blocks_alloc (BLOCKS);
  struct replica replica;
  lhb_store *store;

  replica_make (&replica);
  replica_image (&replica, "base", SIZE);
  replica_image (&replica, "head", SIZE);
  replica_fill (&replica, "base", 0, BLOCKS / 2, 'b');
  store = store_open (engine, &replica, SIZE, 0, base_and_head);
  fill_kinds (store, model);
  CHECK_EQUAL (
      lhb_fault_arm ("store.punch", EOPNOTSUPP, 0, 0, UINT64_MAX), 0);
  for (uint64_t block = 0; block < BLOCKS; block += 6)
    CHECK_EQUAL (lhb_store_zero (store, block * BLOCK + 7, 4 * BLOCK, false,
                                 LHB_IO_FAST_ZERO),
                 -EOPNOTSUPP);
  store_check (store, model, BLOCKS);
  lhb_fault_clear ();
  CHECK_EQUAL (lhb_store_zero (store, 7, SIZE - 7, false, LHB_IO_FAST_ZERO),
               0);
  memset (model + 7, 0, SIZE - 7);
  store_check (store, model, BLOCKS);
  lhb_store_close (store);
  replica_remove (&replica);
  free (model);
  lhb_engine_close (engine);
}

static uint64_t
allocated_bytes (const struct replica *replica, const char *name)
{
  struct stat st;

  CHECK_EQUAL (fstatat (replica->fd, name, &st, 0), 0);
  return (uint64_t) st.st_blocks * 512;
}

static void
trim_gives_space_back_and_no_hole_keeps_it (void)
{
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  char *model = blocks_alloc (BLOCKS);
  struct replica replica;
  lhb_store *store;

  replica_make (&replica);
  replica_image (&replica, "base", SIZE);
  replica_image (&replica, "head", SIZE);
  store = store_open (engine, &replica, SIZE, 0, base_and_head);
  put (store, model, 0, BLOCKS, 'h');
  CHECK_EQUAL (lhb_store_sync (store), 0);
  CHECK (allocated_bytes (&replica, "head") >= SIZE);
  CHECK_EQUAL (lhb_store_zero (store, 0, SIZE / 2, true, 0), 0);
  CHECK (allocated_bytes (&replica, "head") <= SIZE / 2);
  CHECK_EQUAL (lhb_store_zero (store, 0, SIZE, false, LHB_IO_NO_HOLE), 0);
  CHECK (allocated_bytes (&replica, "head") >= SIZE);
  CHECK_EQUAL (lhb_store_zero (store, 0, SIZE, false, 0), 0);
  CHECK (allocated_bytes (&replica, "head") < SIZE / 2);
  lhb_store_close (store);
  replica_remove (&replica);
  free (model);
  lhb_engine_close (engine);
}

/* Random writes, trims and zeros, opened anew again and again. */
static void
long_history_equals_a_model (void)
{
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  char *model = blocks_alloc (BLOCKS);
  uint64_t state = lhb_test_seed;
  struct replica replica;

  replica_make (&replica);
  replica_image (&replica, "base", SIZE);
  replica_image (&replica, "middle", SIZE);
  replica_image (&replica, "head", SIZE);
  replica_fill (&replica, "base", 4, 30, 'b');
  replica_fill (&replica, "middle", 20, 8, 'm');
  memset (model + 4 * BLOCK, 'b', 30 * BLOCK);
  memset (model + 20 * BLOCK, 'm', 8 * BLOCK);
  for (int round = 0; round < 40; round++)
    {
      lhb_store *store
          = store_open (engine, &replica, SIZE,
                        round % 2 ? LHB_STORE_DIRECT : 0, three);

      store_check (store, model, BLOCKS);
      for (int step = 0; step < 12; step++)
        {
          uint64_t offset = lhb_test_below (&state, SIZE);
          uint64_t length = 1 + lhb_test_below (&state, SIZE - offset);
          uint64_t kind = lhb_test_below (&state, 4);

          if (kind > 0 && length > SIZE / 4)
            length = SIZE / 4;
          if (kind == 0)
            put (store, model, offset / BLOCK,
                 (uint32_t) ((length + BLOCK - 1) / BLOCK), round);
          else
            {
              CHECK_EQUAL (lhb_store_zero (store, offset, length, kind == 1,
                                           kind == 2 ? LHB_IO_NO_HOLE : 0),
                           0);
              memset (model + offset, 0, length);
            }
        }
      store_check (store, model, BLOCKS);
      lhb_store_close (store);
    }
  replica_remove (&replica);
  free (model);
  lhb_engine_close (engine);
}

/* Bits on both sides of the 32 Ki blocks that one read of the file covers. */
static void
discard_bits_are_found_across_windows (void)
{
  static const struct { uint64_t first, count; } runs[]
      = { { 0, 1 }, { 7, 2 }, { 32760, 20 }, { 65535, 1 }, { 70000, 40000 } };
  const uint64_t blocks = 200000;
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  uint64_t first, count, at = 0;
  struct replica replica;
  lhb_store *store;

  replica_make (&replica);
  replica_image (&replica, "head", blocks * BLOCK);
  for (int pass = 0; pass < 2; pass++)
    {
      store = store_open (engine, &replica, blocks * BLOCK, 0,
                          (const char *const[]){ "head", NULL });
      for (int i = 4; pass == 0 && i >= 0; i--)
        CHECK_EQUAL (lhb_discard_set (store, &store->layers[store->head],
                                      runs[i].first, runs[i].count),
                     0);
      at = 0;
      for (int i = 0; i < 5; i++)
        {
          CHECK_EQUAL (lhb_discard_next (store, &store->layers[store->head],
                                         at, blocks, &first, &count),
                       1);
          CHECK_EQUAL (first, runs[i].first);
          CHECK_EQUAL (count, runs[i].count);
          at = first + count;
        }
      CHECK_EQUAL (lhb_discard_next (store, &store->layers[store->head], at,
                                     blocks, &first, &count),
                   0);
      /* The end cuts a run, and so does the beginning. */
      CHECK_EQUAL (lhb_discard_next (store, &store->layers[store->head],
                                     32763, 32770, &first, &count),
                   1);
      CHECK_EQUAL (first, 32763);
      CHECK_EQUAL (count, 7);
      lhb_store_close (store);
    }
  replica_remove (&replica);
  lhb_engine_close (engine);
}

/* A file longer than the layer, with bits where no block is. */
static void
discard_bits_beyond_the_end_are_ignored (void)
{
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  char *model = blocks_alloc (BLOCKS);
  struct replica replica;
  char ones[BLOCK];
  int fd;

  replica_make (&replica);
  replica_image (&replica, "base", SIZE);
  replica_image (&replica, "head", SIZE);
  replica_fill (&replica, "base", 0, BLOCKS, 'b');
  fd = openat (replica.fd, "discard.head", O_RDWR | O_CREAT, 0600);
  memset (ones, 0xff, sizeof ones);
  CHECK_EQUAL (pwrite (fd, ones, BLOCK, BLOCKS / 8 - 1), BLOCK);
  close (fd);
  memset (model, 'b', SIZE - 8 * BLOCK);
  replica_check (engine, &replica, base_and_head, model, BLOCKS);
  replica_remove (&replica);
  free (model);
  lhb_engine_close (engine);
}

static void
discard_that_is_not_durable_changes_nothing (void)
{
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  char *model = blocks_alloc (BLOCKS);
  struct replica replica;
  lhb_store *store;

  replica_make (&replica);
  replica_image (&replica, "base", SIZE);
  replica_image (&replica, "head", SIZE);
  replica_fill (&replica, "base", 0, BLOCKS, 'b');
  store = store_open (engine, &replica, SIZE, 0, base_and_head);
  memset (model, 'b', SIZE);
  put (store, model, 3, 5, 'h');
  CHECK_EQUAL (lhb_fault_arm ("store.discard_write", EIO,
                              lhb_store_id (store), 0, 1),
               0);
  CHECK_EQUAL (lhb_store_zero (store, 0, SIZE, true, 0), -EIO);
  store_check (store, model, BLOCKS);
  lhb_store_close (store);
  replica_check (engine, &replica, base_and_head, model, BLOCKS);
  replica_remove (&replica);
  free (model);
  lhb_engine_close (engine);
}

/* ---- Heads. */

static void
head_becomes_a_layer_and_the_volume_grows (void)
{
  const char *const after[] = { "base", "head", "next", NULL };
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  char *model = blocks_alloc (2 * BLOCKS), *before = blocks_alloc (BLOCKS);
  struct replica replica;
  lhb_store *store;
  int old;

  replica_make (&replica);
  replica_image (&replica, "base", SIZE);
  replica_image (&replica, "head", SIZE);
  replica_image (&replica, "next", 2 * SIZE);
  replica_fill (&replica, "base", 0, 4, 'b');
  store = store_open (engine, &replica, SIZE, 0, base_and_head);
  memset (model, 'b', 4 * BLOCK);
  put (store, model, 3, 2, 'h');
  CHECK_EQUAL (lhb_store_commit_head (store, SIZE), -EINVAL);
  CHECK_EQUAL (lhb_store_prepare_head (store, "next", "discard.next"), 0);
  CHECK_EQUAL (lhb_store_prepare_head (store, "next", "discard.next"),
               -EBUSY);
  CHECK_EQUAL (lhb_store_commit_head (store, SIZE), -EINVAL);
  CHECK_EQUAL (lhb_store_commit_head (store, SIZE / 2), -EINVAL);
  put (store, model, 5, 1, 'l');        /* still the old head */
  old = store->head;
  memcpy (before, model, SIZE);
  CHECK (lhb_store_commit_head (store, 2 * SIZE) > 0);
  CHECK_EQUAL (lhb_store_rename_discard (store, old, "discard.head"), 0);
  CHECK_EQUAL (lhb_store_rename_discard (store, old, "a/b"), -EINVAL);
  CHECK_EQUAL (lhb_store_rename_discard (store, 200, "x"), -EINVAL);
  store_check (store, model, 2 * BLOCKS);
  put (store, model, 0, 1, 'n');
  put (store, model, 2 * BLOCKS - 1, 1, 'n');
  CHECK_EQUAL (lhb_store_zero (store, BLOCK, 3 * BLOCK, true, 0), 0);
  memset (model + BLOCK, 0, 3 * BLOCK);
  store_check (store, model, 2 * BLOCKS);
  CHECK_EQUAL (lhb_store_sync (store), 0);
  lhb_store_close (store);
  replica_check (engine, &replica, after, model, 2 * BLOCKS);
  replica_check (engine, &replica, base_and_head, before, BLOCKS);
  replica_remove (&replica);
  free (model);
  free (before);
  lhb_engine_close (engine);
}

static void
abandoned_head_leaves_the_old_one (void)
{
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  char *model = blocks_alloc (BLOCKS);
  struct replica replica;
  lhb_store *store;

  replica_make (&replica);
  replica_image (&replica, "base", SIZE);
  replica_image (&replica, "head", SIZE);
  replica_image (&replica, "next", SIZE);
  store = store_open (engine, &replica, SIZE, 0, base_and_head);
  CHECK_EQUAL (lhb_store_prepare_head (store, "missing", "d"), -ENOENT);
  CHECK_EQUAL (lhb_store_prepare_head (store, "next", "d"), 0);
  lhb_store_abandon_head (store);
  lhb_store_abandon_head (store);
  CHECK_EQUAL (lhb_store_commit_head (store, SIZE), -EINVAL);
  put (store, model, 0, 3, 'h');
  CHECK_EQUAL (lhb_store_sync (store), 0);
  lhb_store_close (store);
  replica_check (engine, &replica, base_and_head, model, BLOCKS);
  replica_remove (&replica);
  free (model);
  lhb_engine_close (engine);
}

/* ---- Failures. */

static void
short_write_keeps_its_whole_blocks_only (void)
{
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  char *model = blocks_alloc (BLOCKS), *data = blocks_alloc (4);
  struct replica replica;
  lhb_store *store;
  uint32_t written;
  int error;

  replica_make (&replica);
  replica_image (&replica, "base", SIZE);
  replica_image (&replica, "head", SIZE);
  replica_fill (&replica, "base", 0, BLOCKS, 'b');
  memset (model, 'b', SIZE);
  memset (data, 's', 4 * BLOCK);
  store = store_open (engine, &replica, SIZE, 0, base_and_head);
  CHECK_EQUAL (lhb_map_reserve_head (store->map, 8, 4), 0);
  CHECK_EQUAL (lhb_fault_arm ("store.short_write", ENOSPC, 0, 0, 1), 0);
  written = lhb_store_write (store, 8, 4, data, 0, &error);
  CHECK_EQUAL (written, BLOCK);
  CHECK_EQUAL (error, -ENOSPC);
  lhb_store_wrote (store, 8, written);
  memset (model + 8 * BLOCK, 's', BLOCK);
  store_check (store, model, BLOCKS);
  /* Cut inside a block: no block is the head's. */
  lhb_store_wrote (store, 9, BLOCK - 1);
  store_check (store, model, BLOCKS);
  for (uint32_t blocks = 1; blocks <= 4; blocks += 3)
    {
      CHECK_EQUAL (lhb_fault_arm ("store.write", ENOSPC, 0, 0, 1), 0);
      CHECK_EQUAL (lhb_store_write (store, 20, blocks, data, 0, &error), 0);
      CHECK_EQUAL (error, -ENOSPC);
    }
  store_check (store, model, BLOCKS);
  lhb_store_close (store);
  replica_check (engine, &replica, base_and_head, model, BLOCKS);
  replica_remove (&replica);
  free (model);
  free (data);
  lhb_engine_close (engine);
}

static void
failed_sync_is_never_forgotten (void)
{
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  char *model = blocks_alloc (BLOCKS);
  struct replica replica;
  lhb_store *store;

  replica_make (&replica);
  replica_image (&replica, "base", SIZE);
  replica_image (&replica, "head", SIZE);
  store = store_open (engine, &replica, SIZE, 0, base_and_head);
  CHECK_EQUAL (lhb_store_sync (store), 0);
  CHECK_EQUAL (lhb_fault_arm ("store.sync", EIO, 0, 0, 1), 0);
  CHECK_EQUAL (lhb_store_sync (store), 0);      /* nothing to sync */
  put (store, model, 0, 1, 'h');
  CHECK_EQUAL (lhb_store_sync (store), -EIO);
  CHECK_EQUAL (lhb_store_sync (store), -EIO);
  CHECK_EQUAL (
      lhb_store_sync_layer (store, &store->layers[store->head]), -EIO);
  lhb_store_close (store);
  replica_remove (&replica);
  free (model);
  lhb_engine_close (engine);
}

struct closer {
  lhb_engine *engine;
  const struct replica *replica;
  lhb_store *store;
  _Atomic bool stop;
};

static void *
open_and_drop_side_layers (void *argument)
{
  struct closer *closer = argument;

  for (int i = 0; i < 2000; i++)
    {
      int id = lhb_store_add_side_layer (closer->store, "side", "d.side");

      CHECK (id > 0);
      CHECK_EQUAL (lhb_store_drop_layer (NULL, closer->store, id), 0);
    }
  atomic_store (&closer->stop, true);
  return NULL;
}

/* A layer that goes while a flush is under way is not a failed flush. */
static void
sync_beside_layers_that_come_and_go_succeeds (void)
{
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  struct replica replica;
  struct closer closer = { .engine = engine, .replica = &replica };
  pthread_t thread;

  replica_make (&replica);
  replica_image (&replica, "base", SIZE);
  replica_image (&replica, "head", SIZE);
  replica_image (&replica, "side", SIZE);
  closer.store = store_open (engine, &replica, SIZE, 0, base_and_head);
  CHECK_EQUAL (
      pthread_create (&thread, NULL, open_and_drop_side_layers, &closer), 0);
  while (!atomic_load (&closer.stop))
    CHECK_EQUAL (lhb_store_sync (closer.store), 0);
  CHECK_EQUAL (pthread_join (thread, NULL), 0);
  lhb_store_close (closer.store);
  replica_remove (&replica);
  lhb_engine_close (engine);
}

static void
layer_cut_behind_our_back_is_an_error (void)
{
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  struct replica replica;
  char *got = blocks_alloc (2);
  lhb_store *store;
  int fd;

  replica_make (&replica);
  replica_image (&replica, "base", SIZE);
  replica_image (&replica, "head", SIZE);
  replica_fill (&replica, "base", BLOCKS - 2, 2, 'b');
  store = store_open (engine, &replica, SIZE, 0, base_and_head);
  fd = replica_open_image (&replica, "base");
  CHECK_EQUAL (ftruncate (fd, (BLOCKS - 1) * BLOCK), 0);
  close (fd);
  CHECK_EQUAL (lhb_store_read (store, BLOCKS - 2, 1, got), 0);
  CHECK_EQUAL (lhb_store_read (store, BLOCKS - 2, 2, got), -EIO);
  CHECK_EQUAL (lhb_store_read (store, BLOCKS - 1, 1, got), -EIO);
  lhb_store_close (store);
  replica_remove (&replica);
  free (got);
  lhb_engine_close (engine);
}

static void
open_fails_as_its_parts_do (void)
{
  static const struct { const char *point; int error; uint64_t skip; } faults[]
      = { { "store.fiemap", EIO, 0 },
          { "store.fiemap", EOPNOTSUPP, 1 },
          { "map.alloc", ENOMEM, 0 } };
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  struct replica replica;

  replica_make (&replica);
  replica_image (&replica, "base", SIZE);
  replica_image (&replica, "head", SIZE);
  replica_fill (&replica, "base", 1, 2, 'b');
  replica_fill (&replica, "head", 2, 2, 'h');
  for (size_t i = 0; i < sizeof faults / sizeof faults[0]; i++)
    {
      lhb_store *store;
      int err;

      CHECK_EQUAL (lhb_store_open (engine, replica.fd, SIZE, 0, &store), 0);
      CHECK_EQUAL (lhb_fault_arm (faults[i].point, faults[i].error, 0,
                                  faults[i].skip, 1),
                   0);
      err = lhb_store_add_layer (store, "base", "discard.base");
      CHECK (err > 0);
      err = lhb_store_add_layer (store, "head", "discard.head");
      if (err > 0)
        err = lhb_store_start (store);
      CHECK_EQUAL (err, -faults[i].error);
      lhb_store_close (store);
      lhb_fault_clear ();
    }
  replica_remove (&replica);
  lhb_engine_close (engine);
}

/* ---- Refused. */

static void
odd_sizes_are_refused (void)
{
  static const uint64_t sizes[]
      = { 0, 1, BLOCK - 1, SIZE + 512, UINT64_MAX - BLOCK + 1 };
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  struct replica replica;
  lhb_store *store;

  replica_make (&replica);
  for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
    CHECK_EQUAL (
        lhb_store_open (engine, replica.fd, sizes[i], 0, &store), -EINVAL);
  replica_image (&replica, "odd", SIZE + 512);
  replica_image (&replica, "small", SIZE - BLOCK);
  CHECK_EQUAL (lhb_store_open (engine, replica.fd, SIZE, 0, &store), 0);
  CHECK_EQUAL (lhb_store_start (store), -EINVAL);
  CHECK_EQUAL (lhb_store_add_layer (store, "odd", ""), -EINVAL);
  CHECK_EQUAL (lhb_store_add_side_layer (store, "odd", ""), -EINVAL);
  CHECK (lhb_store_add_layer (store, "small", "") > 0);
  CHECK_EQUAL (lhb_store_start (store), -EINVAL);       /* as a head */
  lhb_store_close (store);
  replica_remove (&replica);
  lhb_engine_close (engine);
}

static void
only_regular_files_of_the_directory_are_opened (void)
{
  char long_name[LHB_NAME_BYTES_MAX + 1];
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  struct replica replica;

  memset (long_name, 'x', sizeof long_name - 1);
  long_name[sizeof long_name - 1] = '\0';
  replica_make (&replica);
  replica_image (&replica, "head", SIZE);
  CHECK_EQUAL (symlinkat ("head", replica.fd, "link"), 0);
  CHECK_EQUAL (mkfifoat (replica.fd, "fifo", 0600), 0);
  CHECK_EQUAL (mkdirat (replica.fd, "directory", 0700), 0);
  for (uint32_t flags = 0; flags <= LHB_STORE_READ_ONLY; flags++)
    {
      bool writes = (flags & LHB_STORE_READ_ONLY) == 0;
      const char *const discards[] = { "link", "fifo", "directory" };
      const int errors[]
          = { -ELOOP, -EINVAL, writes ? -EISDIR : -EINVAL };
      lhb_store *store;

      CHECK_EQUAL (lhb_store_open (engine, replica.fd, SIZE, flags, &store),
                   0);
      CHECK_EQUAL (lhb_store_add_layer (store, "link", ""), -ELOOP);
      CHECK (lhb_store_add_layer (store, "fifo", "") < 0);
      CHECK (lhb_store_add_layer (store, "directory", "") < 0);
      CHECK_EQUAL (lhb_store_add_layer (store, "missing", ""), -ENOENT);
      CHECK_EQUAL (lhb_store_add_layer (store, "./head", ""), -EINVAL);
      CHECK_EQUAL (lhb_store_add_layer (store, "head", "./d"), -EINVAL);
      CHECK_EQUAL (lhb_store_add_layer (store, "head", long_name), -EINVAL);
      lhb_store_close (store);
      for (int i = 0; i < 3; i++)
        {
          CHECK_EQUAL (
              lhb_store_open (engine, replica.fd, SIZE, flags, &store), 0);
          CHECK (lhb_store_add_layer (store, "head", discards[i]) > 0);
          CHECK_EQUAL (lhb_store_start (store), errors[i]);
          lhb_store_close (store);
        }
    }
  replica_remove (&replica);
  lhb_engine_close (engine);
}

static void
more_layers_than_ids_are_refused (void)
{
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  struct replica replica;
  lhb_store *store;
  int id = 0;

  replica_make (&replica);
  replica_image (&replica, "head", SIZE);
  CHECK_EQUAL (lhb_store_open (engine, replica.fd, SIZE, 0, &store), 0);
  for (int i = 1; i < LHB_MAP_HEAD; i++)
    {
      id = lhb_store_add_side_layer (store, "head", "");
      CHECK_EQUAL (id, i);
    }
  CHECK_EQUAL (lhb_store_add_side_layer (store, "head", ""), -EMFILE);
  CHECK_EQUAL (lhb_store_drop_layer (NULL, store, 7), 0);
  CHECK_EQUAL (lhb_store_drop_layer (NULL, store, 7), -EINVAL);
  CHECK_EQUAL (lhb_store_add_side_layer (store, "head", ""), 7);
  lhb_store_close (store);
  replica_remove (&replica);
  lhb_engine_close (engine);
}

static const struct lhb_test tests[] = {
  LHB_TEST (newest_layer_with_a_block_is_read),
  LHB_TEST (older_layers_may_be_shorter_or_longer),
  LHB_TEST (unwritten_extents_of_our_layers_are_no_data),
  LHB_TEST (foreign_head_keeps_its_zeros_when_it_becomes_ours),
  LHB_TEST (layer_becomes_ours_completely_or_not_at_all),
  LHB_TEST (unwritten_extents_of_foreign_layers_are_data),
  LHB_TEST (trim_equals_a_model_at_all_alignments),
  LHB_TEST (zeroes_equal_a_model_at_all_alignments),
  LHB_TEST (zeroes_without_holes_equal_a_model_at_all_alignments),
  LHB_TEST (zeroes_are_written_where_they_can_not_be_made),
  LHB_TEST (fast_zeroes_are_refused_where_they_would_be_written),
  LHB_TEST (trim_gives_space_back_and_no_hole_keeps_it),
  LHB_TEST (long_history_equals_a_model),
  LHB_TEST (discard_bits_are_found_across_windows),
  LHB_TEST (discard_bits_beyond_the_end_are_ignored),
  LHB_TEST (discard_that_is_not_durable_changes_nothing),
  LHB_TEST (head_becomes_a_layer_and_the_volume_grows),
  LHB_TEST (abandoned_head_leaves_the_old_one),
  LHB_TEST (short_write_keeps_its_whole_blocks_only),
  LHB_TEST (failed_sync_is_never_forgotten),
  LHB_TEST (sync_beside_layers_that_come_and_go_succeeds),
  LHB_TEST (layer_cut_behind_our_back_is_an_error),
  LHB_TEST (open_fails_as_its_parts_do),
  LHB_TEST (odd_sizes_are_refused),
  LHB_TEST (only_regular_files_of_the_directory_are_opened),
  LHB_TEST (more_layers_than_ids_are_refused),
};

LHB_TEST_MAIN (tests)
