/* Volume on remote replicas: they stay equal to each other and to local ones,
 * whatever they understand, and one that is lost harms nothing. */

#include "lhb_client.h"
#include "lhb_mesh.h"

#define BLOCKS 66
#define SIZE ((uint64_t) BLOCKS * BLOCK)

static const struct {
  uint32_t flags, locals, count;
} shapes[] = {
  { LHB_PEER_OURS, 0, 1 }, { LHB_PEER_OURS, 0, 3 }, { LHB_PEER_OURS, 1, 3 },
  { 0, 0, 2 },             { 0, 1, 2 },
};

enum { SHAPES = sizeof shapes / sizeof shapes[0] };

/* ---- What is written is read. */

static void
check_step (struct mesh *mesh, uint64_t *state, uint64_t step, char *model,
            char *data)
{
  uint32_t op = (uint32_t) lhb_test_below (state, LHB_OP_ZERO + 1);
  uint32_t flags = (uint32_t) lhb_test_below (state, 4);
  uint64_t offset = lhb_test_below (state, SIZE);
  uint64_t length = 1 + lhb_test_below (state, SIZE - offset);

  if (op != LHB_OP_READ && length > SIZE / 8)
    length = SIZE / 8;
  if (step % 3 == 0)
    {
      offset &= ~(uint64_t) (BLOCK - 1);
      length = (length + BLOCK - 1) & ~(uint64_t) (BLOCK - 1);
    }
  memset (data, (int) step, SIZE);
  CHECK_EQUAL (lhb_volume_io (mesh->rig.volume, op, flags, offset, length,
                              data),
               0);
  if (op == LHB_OP_READ)
    CHECK (memcmp (data, model + offset, length) == 0);
  else if (op == LHB_OP_WRITE)
    memcpy (model + offset, data, length);
  else if (op != LHB_OP_FLUSH)
    memset (model + offset, 0, length);
}

static void
peers_show_what_was_written (void)
{
  for (int i = 0; i < SHAPES; i++)
    {
      uint64_t state = lhb_test_seed;
      char *model, *data = blocks_alloc (BLOCKS);
      struct mesh mesh;

      mesh_open (&mesh, shapes[i].flags, shapes[i].locals, shapes[i].count,
                 BLOCKS);
      model = rig_model (&mesh.rig);
      for (uint64_t step = 0; step < 300; step++)
        check_step (&mesh, &state, step, model, data);
      rig_check (&mesh.rig, model);
      CHECK (!rig_has_event (&mesh.rig));
      free (model);
      free (data);
      mesh_close (&mesh);
    }
}

static void
overlapping_writers_leave_equal_peers (void)
{
  for (int i = 0; i < SHAPES; i++)
    {
      struct mesh mesh;
      struct rig_load load;

      mesh_open (&mesh, shapes[i].flags, shapes[i].locals, shapes[i].count,
                 BLOCKS);
      rig_load_start (&mesh.rig, &load, 12);
      rig_load_await (&load, 1000);
      rig_load_stop (&load);
      rig_check_equal (&mesh.rig);
      CHECK (!rig_has_event (&mesh.rig));
      mesh_close (&mesh);
    }
}

/* More than one frame may carry, than the socket takes at once, and than the
 * largest slab of the replica holds. */
static void
large_requests_reach_every_peer (void)
{
  const uint64_t blocks = 2 * LHB_SPAN_BLOCKS_MAX, size = blocks * BLOCK;
  const uint32_t most = LHB_PAYLOAD_BYTES_MAX;
  char *data = malloc (most), *got = malloc (most);
  struct client client;
  struct mesh mesh;

  CHECK (data != NULL && got != NULL);
  for (uint32_t i = 0; i < most; i++)
    data[i] = (char) (i / 7);
  for (uint32_t flags = 0; flags <= LHB_PEER_OURS; flags++)
    {
      mesh_open (&mesh, flags, 0, 2, blocks);
      client = client_open (&mesh.rig, 0);
      CHECK_EQUAL (client_write (&client, 0, 5, most, data), 0);
      memset (got, 0, most);
      CHECK_EQUAL (client_read (&client, 5, most, got), 0);
      CHECK (memcmp (data, got, most) == 0);
      /* Longer than a step, and it ends inside blocks. */
      CHECK_EQUAL (rig_io (&mesh.rig, LHB_OP_TRIM, LHB_IO_FUA, 9, size - 11,
                           0),
                   0);
      CHECK_EQUAL (client_read (&client, 4, most, got), 0);
      CHECK_EQUAL (got[0], 'b');
      CHECK (memcmp (got + 1, data, 4) == 0);
      for (uint32_t i = 5; i < most; i++)
        CHECK_EQUAL (got[i], 0);
      rig_check_equal (&mesh.rig);
      close (client.fd);
      mesh_close (&mesh);
    }
  free (data);
  free (got);
}

/* Each on a connection of its own, so on all queues. */
static void
connections_that_overlap_leave_equal_peers (void)
{
  enum { CLIENTS = 4, ROUNDS = 300, DEPTH = 16 };
  uint64_t state = lhb_test_seed;
  struct client clients[CLIENTS];
  char data[3 * BLOCK];
  struct mesh mesh;

  mesh_open (&mesh, LHB_PEER_OURS, 0, 3, BLOCKS);
  for (int c = 0; c < CLIENTS; c++)
    clients[c] = client_open (&mesh.rig, 0);
  for (int round = 0; round < ROUNDS; round++)
    {
      for (int i = 0; i < CLIENTS * DEPTH; i++)
        {
          struct client *client = &clients[i % CLIENTS];
          uint64_t offset = lhb_test_below (&state, 8 * BLOCK);
          uint32_t length = 1 + (uint32_t) lhb_test_below (&state, 2 * BLOCK);

          if (i & 1)
            {
              offset &= ~(uint64_t) (BLOCK - 1);
              length = BLOCK;
            }
          memset (data, (int) lhb_test_below (&state, 256), length);
          client_send (client, 0, NBD_CMD_WRITE, offset, length);
          client_send_bytes (client, data, length);
        }
      for (int i = 0; i < CLIENTS * DEPTH; i++)
        CHECK_EQUAL (client_receive (&clients[i % CLIENTS]).error, 0);
    }
  rig_check_equal (&mesh.rig);
  CHECK (!rig_has_event (&mesh.rig));
  for (int c = 0; c < CLIENTS; c++)
    close (clients[c].fd);
  mesh_close (&mesh);
}

static void
block_status_of_peers_alone_is_data (void)
{
  uint32_t pairs[8];

  for (uint32_t locals = 0; locals <= 1; locals++)
    {
      struct mesh mesh;

      mesh_open (&mesh, LHB_PEER_OURS, locals, 2, BLOCKS);
      CHECK_EQUAL (
          lhb_volume_block_status (mesh.rig.volume, 0, SIZE, pairs, 4),
          1 + locals);
      CHECK_EQUAL (pairs[0], locals ? BLOCKS / 3 * BLOCK : SIZE);
      CHECK_EQUAL (pairs[1], 0);
      mesh_close (&mesh);
    }
}

/* ---- A peer is lost. */

static struct lhb_event
expect_failed (struct mesh *mesh, uint32_t index)
{
  struct lhb_event event = engine_wait_event (mesh->rig.engine);

  CHECK_EQUAL (event.type, LHB_EVENT_STORE_FAILED);
  CHECK_EQUAL (event.subject_id, lhb_store_id (mesh->stores[index]));
  return event;
}

static void
check_same (struct mesh *mesh, uint32_t a, uint32_t b)
{
  char *want = blocks_alloc (BLOCKS);

  CHECK_EQUAL (lhb_store_read (mesh->rig.stores[a], 0, BLOCKS, want), 0);
  store_check (mesh->rig.stores[b], want, BLOCKS);
  free (want);
}

static void
peer_lost_under_load_is_dropped_and_the_rest_goes_on (void)
{
  for (uint32_t locals = 0; locals <= 1; locals++)
    {
      struct lhb_event event;
      struct rig_load load;
      struct mesh mesh;

      mesh_open (&mesh, LHB_PEER_OURS, locals, 3, BLOCKS);
      rig_load_start (&mesh.rig, &load, 12);
      rig_load_await (&load, 200);
      mesh_cut (&mesh, 1);
      event = expect_failed (&mesh, 1);
      CHECK (mesh_statistics (&mesh, 1).ended != 0);
      CHECK_EQUAL (lhb_volume_fenced (mesh.rig.volume, event.subject_id), 0);
      rig_load_await (&load, 500);
      rig_load_stop (&load);
      check_same (&mesh, 0, 2);
      CHECK (!rig_has_event (&mesh.rig));
      mesh_close (&mesh);
    }
}

static void
last_peer_is_never_dropped (void)
{
  struct lhb_event event;
  lhb_store *lost;
  struct mesh mesh;
  int socket;

  mesh_open (&mesh, LHB_PEER_OURS, 0, 1, BLOCKS);
  mesh_cut (&mesh, 0);
  event = engine_wait_event (mesh.rig.engine);
  CHECK_EQUAL (event.type, LHB_EVENT_LAST_PEER_LOST);
  CHECK_EQUAL (event.subject_id, lhb_store_id (mesh.stores[0]));
  CHECK (rig_io (&mesh.rig, LHB_OP_WRITE, 0, 0, 1, 'w') < 0);
  CHECK (rig_io (&mesh.rig, LHB_OP_READ, 0, 0, 1, 0) < 0);
  CHECK (rig_io (&mesh.rig, LHB_OP_TRIM, 0, 0, 1, 0) < 0);
  CHECK (rig_io (&mesh.rig, LHB_OP_FLUSH, 0, 0, 0, 0) < 0);
  CHECK (!rig_has_event (&mesh.rig));
  /* It comes back as a new one. */
  lost = mesh.stores[0];
  socket = mesh.sockets[0];
  mesh_connect (&mesh, 0);
  CHECK_EQUAL (lhb_volume_freeze (mesh.rig.volume), 0);
  mesh_publish (&mesh, NULL);
  lhb_volume_thaw (mesh.rig.volume);
  lhb_store_close (lost);
  close (socket);
  CHECK_EQUAL (rig_io (&mesh.rig, LHB_OP_WRITE, 0, 0, 1, 'w'), 0);
  mesh_close (&mesh);
}

/* ---- All are full. */

static void
full_peers_all_stay (void)
{
  static const struct {
    const char *point;
    uint32_t op;
  } cases[] = { { "store.write", LHB_OP_WRITE },
                { "store.short_write", LHB_OP_WRITE },
                { "store.discard_write", LHB_OP_TRIM } };

  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
    for (uint32_t locals = 0; locals <= 1; locals++)
      {
        struct mesh mesh;

        mesh_open (&mesh, LHB_PEER_OURS, locals, 3, BLOCKS);
        CHECK_EQUAL (lhb_fault_arm (cases[i].point, ENOSPC, 0, 0, 3), 0);
        CHECK_EQUAL (rig_io (&mesh.rig, cases[i].op, 0, BLOCK, 3 * BLOCK, 'w'),
                     -ENOSPC);
        CHECK_EQUAL (engine_wait_event (mesh.rig.engine).type,
                     LHB_EVENT_OUT_OF_SPACE);
        CHECK_EQUAL (rig_io (&mesh.rig, LHB_OP_WRITE, 0, 5 * BLOCK, BLOCK, 'v'),
                     0);
        rig_check_equal (&mesh.rig);
        CHECK (!rig_has_event (&mesh.rig));
        mesh_close (&mesh);
      }
}

/* ---- A store that gets every change and answers no reads. */

static const uint32_t one_wo[] = { LHB_MODE_RW, LHB_MODE_RW, LHB_MODE_WO };

/* What it has before is wrong: nobody may see it, and no block that is touched
 * may keep any of it. */
static void
open_with_wo (struct mesh *mesh, uint32_t locals)
{
  mesh_open (mesh, LHB_PEER_OURS, locals, 3, BLOCKS);
  mesh_publish (mesh, one_wo);
  replica_fill (&mesh->rig.replicas[2], "base", 0, BLOCKS / 3, '?');
}

static void
check_touched (struct mesh *mesh, const char *model, const bool *touched)
{
  char block[BLOCK] __attribute__ ((aligned (BLOCK)));

  for (uint64_t i = 0; i < BLOCKS; i++)
    {
      CHECK_EQUAL (lhb_store_read (mesh->rig.stores[2], i, 1, block), 0);
      if (touched[i])
        CHECK (memcmp (block, model + i * BLOCK, BLOCK) == 0);
      else
        CHECK_EQUAL (block[0], i < BLOCKS / 3 ? '?' : 0);
    }
}

static void
write_only_store_gets_whole_blocks_and_answers_nothing (void)
{
  for (uint32_t locals = 0; locals <= 3; locals += locals == 1 ? 2 : 1)
    {
      bool touched[BLOCKS] = { false };
      uint64_t state = lhb_test_seed;
      char *model, *data = blocks_alloc (BLOCKS);
      struct mesh mesh;

      open_with_wo (&mesh, locals);
      model = rig_model (&mesh.rig);
      for (uint64_t step = 0; step < 200; step++)
        {
          uint32_t op = (uint32_t) lhb_test_below (&state, LHB_OP_ZERO + 1);
          uint64_t offset = lhb_test_below (&state, SIZE - 3 * BLOCK);
          uint64_t length = 1 + lhb_test_below (&state, 3 * BLOCK);

          memset (data, (int) step, length);
          CHECK_EQUAL (lhb_volume_io (mesh.rig.volume, op, step & 1, offset,
                                      length, data),
                       0);
          if (op == LHB_OP_READ)
            CHECK (memcmp (data, model + offset, length) == 0);
          if (op == LHB_OP_READ || op == LHB_OP_FLUSH)
            continue;
          if (op != LHB_OP_WRITE)
            memset (data, 0, length);
          memcpy (model + offset, data, length);
          for (uint64_t i = offset / BLOCK; i <= (offset + length - 1) / BLOCK;
               i++)
            touched[i] = true;
        }
      check_touched (&mesh, model, touched);
      store_check (mesh.rig.stores[0], model, BLOCKS);
      store_check (mesh.rig.stores[1], model, BLOCKS);
      CHECK (!rig_has_event (&mesh.rig));
      free (model);
      free (data);
      mesh_close (&mesh);
    }
}

static void
write_only_store_that_fails_needs_no_fence (void)
{
  struct lhb_event event;
  struct mesh mesh;

  open_with_wo (&mesh, 1);
  mesh_cut (&mesh, 2);
  event = expect_failed (&mesh, 2);
  CHECK_EQUAL (rig_io (&mesh.rig, LHB_OP_WRITE, 0, 0, 9, 'w'), 0);
  CHECK_EQUAL (lhb_volume_fenced (mesh.rig.volume, event.subject_id), -ENOENT);
  CHECK_EQUAL (rig_io (&mesh.rig, LHB_OP_TRIM, 0, 0, 9, 0), 0);
  CHECK (!rig_has_event (&mesh.rig));
  mesh_close (&mesh);
}

/* It alone could not, or it alone could: in both cases it is not like the
 * others. */
static void
write_only_store_that_differs_is_dropped (void)
{
  for (uint32_t alone = 0; alone <= 1; alone++)
    {
      struct mesh mesh;

      open_with_wo (&mesh, 3);
      for (uint32_t i = 0; i < 3; i++)
        if ((i == 2) == alone)
          CHECK_EQUAL (lhb_fault_arm ("store.write", ENOSPC,
                                      lhb_store_id (mesh.stores[i]), 0, 1),
                       0);
      CHECK_EQUAL (rig_io (&mesh.rig, LHB_OP_WRITE, 0, 0, BLOCK, 'w'),
                   alone ? 0 : -ENOSPC);
      (void) expect_failed (&mesh, 2);
      if (!alone)
        CHECK_EQUAL (engine_wait_event (mesh.rig.engine).type,
                     LHB_EVENT_OUT_OF_SPACE);
      CHECK (!rig_has_event (&mesh.rig));
      mesh_close (&mesh);
    }
}

static const struct lhb_test tests[] = {
  LHB_TEST (peers_show_what_was_written),
  LHB_TEST (overlapping_writers_leave_equal_peers),
  LHB_TEST (large_requests_reach_every_peer),
  LHB_TEST (connections_that_overlap_leave_equal_peers),
  LHB_TEST (block_status_of_peers_alone_is_data),
  LHB_TEST (peer_lost_under_load_is_dropped_and_the_rest_goes_on),
  LHB_TEST (last_peer_is_never_dropped),
  LHB_TEST (full_peers_all_stay),
  LHB_TEST (write_only_store_gets_whole_blocks_and_answers_nothing),
  LHB_TEST (write_only_store_that_fails_needs_no_fence),
  LHB_TEST (write_only_store_that_differs_is_dropped),
};

LHB_TEST_MAIN (tests)
