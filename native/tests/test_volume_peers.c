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

static const struct lhb_test tests[] = {
  LHB_TEST (peers_show_what_was_written),
  LHB_TEST (overlapping_writers_leave_equal_peers),
  LHB_TEST (large_requests_reach_every_peer),
};

LHB_TEST_MAIN (tests)
