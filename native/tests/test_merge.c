/* Merges: at every step, what snapshots and the volume show stays the same.
 *
 * Four layers of 256 blocks, so that every combination of what a layer can
 * have of a block is there: two bits of the block's number for each layer say
 * whether it has data, a discard, both or nothing.
 */

#include "lhb_rig.h"

enum {
  LAYERS = 4,
  BLOCKS = 256,
  SHORT_BLOCKS = 192,           /* the two older layers: the volume grew */
  STEP = 16,                    /* blocks of one call */
};

static const char *const names[] = { "l0", "l1", "l2", "l3", NULL };

static uint64_t
layer_blocks (int layer)
{
  return layer < 2 ? SHORT_BLOCKS : BLOCKS;
}

static bool
has_data (int layer, uint64_t block)
{
  return block < layer_blocks (layer) && block >> (2 * layer) & 1;
}

static bool
has_discard (int layer, uint64_t block)
{
  return block < layer_blocks (layer) && block >> (2 * layer) & 2;
}

/* What the chain up to a layer shows. */
static char *
make_model (int newest)
{
  char *model = blocks_alloc (BLOCKS);

  for (uint64_t block = 0; block < BLOCKS; block++)
    for (int layer = newest; layer >= 0; layer--)
      {
        if (has_data (layer, block))
          memset (model + block * BLOCK, 'A' + layer, BLOCK);
        if (has_data (layer, block) || has_discard (layer, block))
          break;
      }
  return model;
}

static void
make_layers (const struct replica *replica)
{
  for (int layer = 0; layer < LAYERS; layer++)
    {
      uint8_t bits[BLOCKS / 8] = { 0 };
      char discard[LHB_NAME_BYTES_MAX];
      int fd;

      replica_image (replica, names[layer], layer_blocks (layer) * BLOCK);
      for (uint64_t block = 0; block < BLOCKS; block++)
        {
          if (has_data (layer, block))
            replica_fill (replica, names[layer], block, 1, 'A' + layer);
          if (has_discard (layer, block))
            bits[block / 8] |= (uint8_t) (1u << (block % 8));
        }
      replica_discard_name (names[layer], discard);
      fd = openat (replica->fd, discard, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
      CHECK (fd >= 0);
      CHECK_EQUAL (write (fd, bits, sizeof bits), sizeof bits);
      close (fd);
    }
}

/* ---- What is served, and by whom. */

struct merge_rig {
  struct rig rig;
  char *models[LAYERS];
  const char *chain[LAYERS + 1];        /* as it is now */
  int ids[LAYERS];
  bool gone[LAYERS];
};

static void
open_rig (struct merge_rig *m, uint32_t flags, bool serves)
{
  struct rig *rig = &m->rig;

  *m = (struct merge_rig){ .rig = { .count = 1,
                                    .blocks = BLOCKS,
                                    .store_flags = flags,
                                    .images = m->chain } };
  memcpy (m->chain, names, sizeof names);
  rig->engine = engine_make (LHB_DRIVER_AUTO, 1);
  replica_make (&rig->replicas[0]);
  make_layers (&rig->replicas[0]);
  for (int layer = 0; layer < LAYERS; layer++)
    {
      m->models[layer] = make_model (layer);
      m->ids[layer] = layer + 1;
    }
  rig_open_stores (rig);
  if (serves)
    {
      CHECK_EQUAL (lhb_volume_open (rig->engine, BLOCKS * BLOCK, 0,
                                    &rig->volume),
                   0);
      CHECK_EQUAL (lhb_volume_publish (rig->volume, rig->stores, NULL, 1), 0);
    }
}

static void
close_rig (struct merge_rig *m)
{
  for (int layer = 0; layer < LAYERS; layer++)
    free (m->models[layer]);
  rig_close (&m->rig);
}

/* As after a crash: the merge is only what it left in the files. */
static void
reopen_store (struct merge_rig *m)
{
  lhb_store_close (m->rig.stores[0]);
  rig_open_stores (&m->rig);
}

/* Those who open the snapshot now see what it is.  A removed layer itself is
 * nobody's to see. */
static void
check_snapshot (struct merge_rig *m, int newest, int removed)
{
  const char *chain[LAYERS + 1] = { NULL };
  int count = 0;

  if (newest == removed || m->gone[newest])
    return;
  for (int layer = 0; layer <= newest; layer++)
    if (!m->gone[layer])
      chain[count++] = names[layer];
  replica_check (m->rig.engine, &m->rig.replicas[0], chain, m->models[newest],
                 BLOCKS);
}

static void
check_frozen (struct merge_rig *m, int removed)
{
  for (int layer = 0; layer < LAYERS - 1; layer++)
    check_snapshot (m, layer, removed);
}

/* The head, too: nobody writes. */
static void
check_all (struct merge_rig *m, int removed)
{
  check_frozen (m, removed);
  check_snapshot (m, LAYERS - 1, removed);
  store_check (m->rig.stores[0], m->models[LAYERS - 1], BLOCKS);
}

/* ---- The steps. */

enum kind { PRUNE, UP, DOWN };

static int64_t
merge_step (struct merge_rig *m, enum kind kind, int lower, uint64_t block)
{
  lhb_store *store = m->rig.stores[0];
  uint64_t offset = block * BLOCK, length = STEP * BLOCK;
  int from = m->ids[lower], to = m->ids[lower + 1];

  if (kind == PRUNE)
    return lhb_merge_prune (store, from, to, offset, length);
  if (kind == UP)
    return lhb_merge_up (m->rig.volume, store, from, to, offset, length);
  return lhb_merge_down (store, from, to, offset, length);
}

static void
remove_layer_files (struct merge_rig *m, int layer)
{
  char discard[LHB_NAME_BYTES_MAX];

  replica_discard_name (names[layer], discard);
  CHECK_EQUAL (unlinkat (m->rig.replicas[0].fd, names[layer], 0), 0);
  (void) unlinkat (m->rig.replicas[0].fd, discard, 0);
}

static void
forget_in_chain (struct merge_rig *m, int lower)
{
  int count = 0;

  m->gone[lower] = true;
  for (int layer = 0; layer < LAYERS; layer++)
    if (!m->gone[layer])
      m->chain[count++] = names[layer];
  m->chain[count] = NULL;
}

static void
finish_up (struct merge_rig *m, int lower)
{
  CHECK_EQUAL (lhb_store_drop_layer (m->rig.volume, m->rig.stores[0],
                                     m->ids[lower]),
               0);
  remove_layer_files (m, lower);
  forget_in_chain (m, lower);
}

static void
finish_down (struct merge_rig *m, int lower)
{
  lhb_store *store = m->rig.stores[0];
  int from = m->ids[lower], to = m->ids[lower + 1];
  int dir = m->rig.replicas[0].fd;
  char from_discard[LHB_NAME_BYTES_MAX], to_discard[LHB_NAME_BYTES_MAX];

  replica_discard_name (names[lower], from_discard);
  replica_discard_name (names[lower + 1], to_discard);
  CHECK_EQUAL (lhb_merge_down_finish (store, from, to), 0);
  CHECK_EQUAL (renameat (dir, names[lower], dir, names[lower + 1]), 0);
  CHECK_EQUAL (renameat (dir, from_discard, dir, to_discard), 0);
  CHECK_EQUAL (lhb_store_replace_layer (m->rig.volume, store, from, to), 0);
  forget_in_chain (m, lower);
}

static void
finish (struct merge_rig *m, enum kind kind, int lower)
{
  if (kind == UP)
    finish_up (m, lower);
  else if (kind == DOWN)
    finish_down (m, lower);
}

/* ---- Without anybody who writes. */

static void
merge_in_steps (enum kind kind, int lower, uint32_t flags, bool reopens)
{
  struct merge_rig m;

  open_rig (&m, flags, false);
  check_all (&m, -1);
  for (uint64_t block = 0; block < BLOCKS; block += STEP)
    {
      CHECK (merge_step (&m, kind, lower, block) >= 0);
      check_all (&m, lower);
      if (reopens && block % (4 * STEP) == 0)
        {
          reopen_store (&m);
          check_all (&m, lower);
          block = 0;            /* a new process begins anew */
          reopens = false;
        }
    }
  finish (&m, kind, lower);
  check_all (&m, kind == PRUNE ? lower : -1);
  reopen_store (&m);
  check_all (&m, kind == PRUNE ? lower : -1);
  close_rig (&m);
}

static void
for_every_pair (enum kind kind, void (*merge) (enum kind, int, uint32_t, bool))
{
  for (int lower = 0; lower < (kind == DOWN ? LAYERS - 2 : LAYERS - 1);
       lower++)
    for (uint32_t flags = 0; flags <= LHB_STORE_DIRECT; flags++)
      for (int reopens = 0; reopens < 2; reopens++)
        merge (kind, lower, flags, reopens != 0);
}

static void
merge_up_changes_no_snapshot_at_any_step (void)
{
  for_every_pair (UP, merge_in_steps);
}

static void
merge_down_changes_no_snapshot_at_any_step (void)
{
  for_every_pair (DOWN, merge_in_steps);
}

static void
prune_changes_no_snapshot_at_any_step (void)
{
  for_every_pair (PRUNE, merge_in_steps);
}

static uint64_t
allocated_blocks (struct merge_rig *m, int layer)
{
  struct stat st;

  CHECK_EQUAL (fstatat (m->rig.replicas[0].fd, names[layer], &st, 0), 0);
  return (uint64_t) st.st_blocks * 512 / BLOCK;
}

static void
prune_and_merge_up_free_what_they_say (void)
{
  struct merge_rig m;
  int64_t freed = 0, copied = 0;
  uint64_t hidden = 0, missing = 0, before;

  open_rig (&m, 0, false);
  for (uint64_t block = 0; block < BLOCKS; block++)
    {
      hidden += has_data (1, block) && has_data (2, block);
      missing += has_data (1, block) && !has_data (2, block)
                 && !has_discard (2, block);
    }
  before = allocated_blocks (&m, 1);
  for (uint64_t block = 0; block < BLOCKS; block += STEP)
    freed += merge_step (&m, PRUNE, 1, block);
  /* The file system may free blocks of its own besides. */
  CHECK (freed >= (int64_t) (hidden * BLOCK));
  CHECK (allocated_blocks (&m, 1) <= before - hidden);
  for (uint64_t block = 0; block < BLOCKS; block += STEP)
    copied += merge_step (&m, UP, 1, block);
  CHECK_EQUAL (copied, missing * BLOCK);
  CHECK (allocated_blocks (&m, 1) < STEP);
  close_rig (&m);
}

static void
merges_of_all_pairs_leave_one_layer (void)
{
  struct merge_rig m;

  for (int last = 0; last < 2; last++)
    {
      open_rig (&m, 0, true);
      for (int lower = 0; lower < LAYERS - 1; lower++)
        {
          enum kind kind = lower < LAYERS - 2 && last ? DOWN : UP;

          for (uint64_t block = 0; block < BLOCKS; block += STEP)
            CHECK (merge_step (&m, kind, lower, block) >= 0);
          finish (&m, kind, lower);
          check_all (&m, -1);
        }
      rig_close_volume (&m.rig);
      reopen_store (&m);
      check_all (&m, -1);
      CHECK (m.chain[0] == names[LAYERS - 1] && m.chain[1] == NULL);
      close_rig (&m);
    }
}

/* ---- Failures. */

static void
failed_step_changes_no_snapshot_and_is_repeated (void)
{
  static const struct { const char *point; enum kind kind; int lower; } faults[]
      = { { "merge.copy", UP, 1 },          { "merge.copy", UP, 2 },
          { "merge.copy", DOWN, 1 },        { "store.sync", UP, 1 },
          { "store.discard_write", UP, 1 }, { "store.discard_write", DOWN, 0 },
          { "store.sync", PRUNE, 2 } };

  for (size_t i = 0; i < sizeof faults / sizeof faults[0]; i++)
    {
      enum kind kind = faults[i].kind;
      int lower = faults[i].lower;
      struct merge_rig m;

      open_rig (&m, 0, false);
      for (uint64_t block = 0; block < BLOCKS; block += STEP)
        {
          int64_t result;

          CHECK_EQUAL (lhb_fault_arm (faults[i].point, EIO, 0, 0, 1), 0);
          result = merge_step (&m, kind, lower, block);
          check_all (&m, lower);
          lhb_fault_clear ();
          if (result < 0)
            {
              CHECK_EQUAL (result, -EIO);
              reopen_store (&m);        /* a failed sync is not forgotten */
              check_all (&m, lower);
            }
          CHECK (merge_step (&m, kind, lower, block) >= 0);
        }
      finish (&m, kind, lower);
      check_all (&m, kind == PRUNE ? lower : -1);
      close_rig (&m);
    }
}

static void
wrong_merges_are_refused (void)
{
  struct merge_rig m;
  lhb_store *store;

  open_rig (&m, 0, false);
  store = m.rig.stores[0];
  CHECK_EQUAL (lhb_merge_up (NULL, store, 1, 1, 0, BLOCK), -EINVAL);
  CHECK_EQUAL (lhb_merge_up (NULL, store, 4, 3, 0, BLOCK), -EINVAL);
  CHECK_EQUAL (lhb_merge_up (NULL, store, 1, 9, 0, BLOCK), -EINVAL);
  CHECK_EQUAL (lhb_merge_up (NULL, store, 0, 1, 0, BLOCK), -EINVAL);
  CHECK_EQUAL (lhb_merge_up (NULL, store, -1, 300, 0, BLOCK), -EINVAL);
  CHECK_EQUAL (lhb_merge_up (NULL, store, 1, 2, 1, BLOCK), -EINVAL);
  CHECK_EQUAL (lhb_merge_up (NULL, store, 1, 2, 0, BLOCK + 1), -EINVAL);
  CHECK_EQUAL (
      lhb_merge_up (NULL, store, 1, 2, 0, LHB_MERGE_STEP_BYTES + BLOCK),
      -EINVAL);
  CHECK_EQUAL (lhb_merge_down (store, 3, 4, 0, BLOCK), -EINVAL);
  CHECK_EQUAL (lhb_merge_down_finish (store, 9, 1), -EINVAL);
  CHECK_EQUAL (lhb_merge_prune (store, 4, 3, 0, BLOCK), -EINVAL);
  CHECK_EQUAL (lhb_store_drop_layer (NULL, store, 4), -EINVAL);
  CHECK_EQUAL (lhb_store_replace_layer (NULL, store, 3, 4), -EINVAL);
  CHECK_EQUAL (lhb_store_replace_layer (NULL, store, 2, 2), -EINVAL);
  /* Beyond the end there is nothing to do. */
  for (int kind = PRUNE; kind <= DOWN; kind++)
    CHECK_EQUAL (merge_step (&m, (enum kind) kind, 0, 1u << 20), 0);
  check_all (&m, -1);
  close_rig (&m);
}

/* ---- Layers beside the live chain. */

static void
merge_beside_the_live_chain (enum kind kind)
{
  struct merge_rig m;
  char discard[LHB_NAME_BYTES_MAX];
  const char *const live[] = { "l0", "l3", NULL };
  char *served;

  open_rig (&m, 0, false);
  lhb_store_close (m.rig.stores[0]);
  m.rig.images = live;
  rig_open_stores (&m.rig);
  served = blocks_alloc (BLOCKS);
  CHECK_EQUAL (lhb_store_read (m.rig.stores[0], 0, BLOCKS, served), 0);
  for (int layer = 1; layer <= 2; layer++)
    {
      replica_discard_name (names[layer], discard);
      m.ids[layer] = lhb_store_add_side_layer (m.rig.stores[0], names[layer],
                                               discard);
      CHECK (m.ids[layer] > 0);
    }
  for (uint64_t block = 0; block < BLOCKS; block += STEP)
    {
      CHECK (merge_step (&m, kind, 1, block) >= 0);
      check_snapshot (&m, 0, 1);
      check_snapshot (&m, 2, 1);
      store_check (m.rig.stores[0], served, BLOCKS);
    }
  finish (&m, kind, 1);
  CHECK_EQUAL (lhb_store_drop_layer (NULL, m.rig.stores[0], m.ids[2]), 0);
  check_snapshot (&m, 0, -1);
  check_snapshot (&m, 2, -1);
  store_check (m.rig.stores[0], served, BLOCKS);
  CHECK_EQUAL (lhb_store_sync (m.rig.stores[0]), 0);
  free (served);
  close_rig (&m);
}

static void
side_layers_merge_without_the_live_chain (void)
{
  merge_beside_the_live_chain (PRUNE);
  merge_beside_the_live_chain (UP);
  merge_beside_the_live_chain (DOWN);
}

/* ---- With a client that writes. */

struct writer {
  struct merge_rig *m;
  pthread_t thread;
  _Atomic uint64_t requests;
  _Atomic bool stop;
};

/* The only one who changes the model of the head. */
static void *
run_writer (void *argument)
{
  struct writer *writer = argument;
  char *model = writer->m->models[LAYERS - 1], *data = blocks_alloc (8);
  const uint64_t size = BLOCKS * BLOCK;
  uint64_t state = lhb_test_seed;

  while (!atomic_load (&writer->stop))
    {
      static const uint32_t ops[]
          = { LHB_OP_WRITE, LHB_OP_READ, LHB_OP_TRIM,
              LHB_OP_ZERO,  LHB_OP_READ, LHB_OP_FLUSH };
      uint32_t op = ops[lhb_test_below (&state, sizeof ops / sizeof *ops)];
      uint64_t offset = lhb_test_below (&state, size);
      uint64_t length = 1 + lhb_test_below (&state, 3 * BLOCK);

      if (lhb_test_below (&state, 2))
        offset &= ~(uint64_t) (BLOCK - 1);
      if (length > size - offset)
        length = size - offset;
      memset (data, (int) lhb_test_below (&state, 256), 8 * BLOCK);
      CHECK_EQUAL (lhb_volume_io (writer->m->rig.volume, op, 0, offset, length,
                                  data),
                   0);
      if (op == LHB_OP_READ)
        CHECK (memcmp (data, model + offset, length) == 0);
      else if (op == LHB_OP_WRITE)
        memcpy (model + offset, data, length);
      else if (op != LHB_OP_FLUSH)
        memset (model + offset, 0, length);
      atomic_fetch_add (&writer->requests, 1);
    }
  free (data);
  return NULL;
}

static void
merge_while_writing (enum kind kind, int lower, uint32_t flags, bool twice)
{
  struct merge_rig m;
  struct writer writer = { .m = &m };

  open_rig (&m, flags, true);
  CHECK_EQUAL (pthread_create (&writer.thread, NULL, run_writer, &writer), 0);
  for (int pass = 0; pass <= twice; pass++)
    for (uint64_t block = 0; block < BLOCKS; block += STEP)
      {
        uint64_t until = atomic_load (&writer.requests) + 3;

        CHECK (merge_step (&m, kind, lower, block) >= 0);
        check_frozen (&m, lower);
        AWAIT (atomic_load (&writer.requests) >= until);
      }
  finish (&m, kind, lower);
  check_frozen (&m, kind == PRUNE ? lower : -1);
  AWAIT (atomic_load (&writer.requests) >= 300);
  atomic_store (&writer.stop, true);
  CHECK_EQUAL (pthread_join (writer.thread, NULL), 0);
  rig_close_volume (&m.rig);
  check_all (&m, kind == PRUNE ? lower : -1);
  close_rig (&m);
}

static void
merge_up_beside_a_client_loses_nothing (void)
{
  for_every_pair (UP, merge_while_writing);
}

static void
merge_down_beside_a_client_loses_nothing (void)
{
  for_every_pair (DOWN, merge_while_writing);
}

static void
prune_beside_a_client_loses_nothing (void)
{
  for_every_pair (PRUNE, merge_while_writing);
}

struct step {
  struct merge_rig *m;
  int lower;
  uint64_t block;
  int64_t result;
  _Atomic bool done;
};

static void *
run_step (void *argument)
{
  struct step *step = argument;

  step->result = merge_step (step->m, UP, step->lower, step->block);
  atomic_store (&step->done, true);
  return NULL;
}

/* Whoever has a block claimed is waited for: it may be about to read it from
 * the lower layer, or to write it above. */
static void
merge_up_waits_for_requests_on_its_blocks (void)
{
  for (int lower = 1; lower < LAYERS - 1; lower++)
    {
      struct merge_rig m;
      /* Where the lower layer has data. */
      struct step step
          = { .m = &m, .lower = lower, .block = lower == 1 ? 0 : STEP };
      struct lhb_range_claim claim;
      pthread_t thread;

      open_rig (&m, 0, true);
      lhb_volume_claim (m.rig.volume, LHB_RANGE_READ, step.block, STEP,
                        &claim);
      CHECK_EQUAL (pthread_create (&thread, NULL, run_step, &step), 0);
      AWAIT (lhb_range_count (m.rig.volume->ranges) == 2
             || atomic_load (&step.done));
      CHECK (!atomic_load (&step.done));
      lhb_range_release (m.rig.volume->ranges, &claim);
      CHECK_EQUAL (pthread_join (thread, NULL), 0);
      CHECK (step.result >= 0);
      check_all (&m, lower);
      close_rig (&m);
    }
}

/* An extent that no finished write made hides nothing. */
static void
prune_below_the_head_spares_what_a_failed_write_left (void)
{
  struct merge_rig m;
  int fd;

  open_rig (&m, 0, false);
  fd = replica_open_image (&m.rig.replicas[0], names[LAYERS - 1]);
  CHECK_EQUAL (fallocate (fd, FALLOC_FL_KEEP_SIZE, 0, BLOCKS * BLOCK), 0);
  close (fd);
  for (uint64_t block = 0; block < BLOCKS; block += STEP)
    CHECK (merge_step (&m, PRUNE, LAYERS - 2, block) >= 0);
  store_check (m.rig.stores[0], m.models[LAYERS - 1], BLOCKS);
  close_rig (&m);
}

/* What hides is synced after it was found, also when nothing says that the
 * head has anything to sync. */
static void
prune_syncs_what_hides_before_it_frees (void)
{
  struct merge_rig m;
  uint64_t before;

  open_rig (&m, 0, false);
  CHECK_EQUAL (lhb_store_sync (m.rig.stores[0]), 0);
  before = allocated_blocks (&m, LAYERS - 2);
  CHECK_EQUAL (lhb_fault_arm ("store.sync", EIO, 0, 0, 1), 0);
  CHECK_EQUAL (merge_step (&m, PRUNE, LAYERS - 2, BLOCKS - STEP), -EIO);
  CHECK_EQUAL (allocated_blocks (&m, LAYERS - 2), before);
  check_all (&m, LAYERS - 2);
  close_rig (&m);
}

/* ---- Unwritten space. */

/* Layers 0 to 2: 'b', the lower one and the upper one of a merge.  Each of the
 * two has space in eight of 32 blocks, which is zeros in one of another
 * program and nothing in ours. */
static void
check_unwritten (lhb_engine *engine, int ours, bool up)
{
  enum { COUNT = 32 };
  static const char *const chain[] = { "l0", "l1", "l2", "l3", NULL };
  static const char *const short_chain[] = { "l0", "l1", "l2", NULL };
  static const char *const merged_up[] = { "l0", "l2", NULL };
  static const char *const merged_down[] = { "l0", "l1", NULL };
  char *model = blocks_alloc (COUNT);
  struct replica replica;
  lhb_store *store;
  int fd;

  replica_make (&replica);
  for (int layer = 0; layer < 4; layer++)
    replica_image (&replica, chain[layer], COUNT * BLOCK);
  replica_fill (&replica, "l0", 0, COUNT, 'b');
  memset (model, 'b', COUNT * BLOCK);
  for (int layer = 1; layer <= 2; layer++)
    {
      bool is_ours = ours & layer;
      uint64_t block = (uint64_t) layer * 8;

      fd = replica_open_image (&replica, chain[layer]);
      CHECK_EQUAL (fallocate (fd, FALLOC_FL_KEEP_SIZE, (off_t) (block * BLOCK),
                              8 * BLOCK),
                   0);
      close (fd);
      replica_fill (&replica, chain[layer], 0, 2, 'A' + layer);
      if (is_ours)
        close (openat (replica.fd, layer == 1 ? "discard.l1" : "discard.l2",
                       O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
      else
        memset (model + block * BLOCK, 0, 8 * BLOCK);
    }
  memset (model, 'C', 2 * BLOCK);
  replica_check (engine, &replica, short_chain, model, COUNT);
  store = store_open (engine, &replica, COUNT * BLOCK, 0, chain);
  if (up)
    {
      CHECK (lhb_merge_up (NULL, store, 2, 3, 0, COUNT * BLOCK) >= 0);
      store_check (store, model, COUNT);
      CHECK_EQUAL (lhb_store_drop_layer (NULL, store, 2), 0);
    }
  else
    {
      CHECK (lhb_merge_down (store, 2, 3, 0, COUNT * BLOCK) >= 0);
      store_check (store, model, COUNT);
      CHECK_EQUAL (lhb_merge_down_finish (store, 2, 3), 0);
      CHECK_EQUAL (lhb_store_replace_layer (NULL, store, 2, 3), 0);
    }
  store_check (store, model, COUNT);
  lhb_store_close (store);
  replica_check (engine, &replica, up ? merged_up : merged_down, model, COUNT);
  replica_remove (&replica);
  free (model);
}

static void
unwritten_space_merges_as_what_it_is_in_each_layer (void)
{
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);

  for (int ours = 0; ours < 4; ours++)
    for (int up = 0; up < 2; up++)
      check_unwritten (engine, ours, up);
  lhb_engine_close (engine);
}

static void
lower_layer_longer_than_the_volume_is_clipped (void)
{
  static const char *const chain[] = { "lower", "head", NULL };
  lhb_engine *engine = engine_make (LHB_DRIVER_POOL, 1);
  char *model = blocks_alloc (16);
  struct replica replica;
  lhb_store *store;
  struct stat st;

  replica_make (&replica);
  replica_image (&replica, "lower", 32 * BLOCK);
  replica_image (&replica, "head", 16 * BLOCK);
  replica_fill (&replica, "lower", 8, 20, 'l');
  memset (model + 8 * BLOCK, 'l', 8 * BLOCK);
  store = store_open (engine, &replica, 16 * BLOCK, 0, chain);
  for (uint64_t at = 0; at < 32; at += 8)
    CHECK (lhb_merge_up (NULL, store, 1, 2, at * BLOCK, 8 * BLOCK) >= 0);
  store_check (store, model, 16);
  lhb_store_close (store);
  CHECK_EQUAL (fstatat (replica.fd, "head", &st, 0), 0);
  CHECK_EQUAL (st.st_size, 16 * BLOCK);
  replica_check (engine, &replica, chain + 1, model, 16);
  replica_remove (&replica);
  free (model);
  lhb_engine_close (engine);
}

static const struct lhb_test tests[] = {
  LHB_TEST (merge_up_changes_no_snapshot_at_any_step),
  LHB_TEST (merge_down_changes_no_snapshot_at_any_step),
  LHB_TEST (prune_changes_no_snapshot_at_any_step),
  LHB_TEST (prune_and_merge_up_free_what_they_say),
  LHB_TEST (merges_of_all_pairs_leave_one_layer),
  LHB_TEST (failed_step_changes_no_snapshot_and_is_repeated),
  LHB_TEST (wrong_merges_are_refused),
  LHB_TEST (side_layers_merge_without_the_live_chain),
  LHB_TEST (merge_up_beside_a_client_loses_nothing),
  LHB_TEST (merge_down_beside_a_client_loses_nothing),
  LHB_TEST (prune_beside_a_client_loses_nothing),
  LHB_TEST (merge_up_waits_for_requests_on_its_blocks),
  LHB_TEST (prune_below_the_head_spares_what_a_failed_write_left),
  LHB_TEST (prune_syncs_what_hides_before_it_frees),
  LHB_TEST (unwritten_space_merges_as_what_it_is_in_each_layer),
  LHB_TEST (lower_layer_longer_than_the_volume_is_clipped),
};

LHB_TEST_MAIN (tests)
