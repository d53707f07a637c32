/* Fuzz target: what is on disk.
 *
 * Two layers of 64 blocks: eight bytes of the input say where the base has
 * data, eight where the head has, one how long the base's discard file is; the
 * rest are the bytes of the two discard files.  A store that opens them must
 * show what a plain reading of the format says, before and after it trimmed
 * and wrote.
 */

#include "lhb_fuzz.h"
#include "../tests/lhb_replica.h"

#define BLOCKS 64
#define SIZE ((uint64_t) BLOCKS * BLOCK)
#define HEADER_BYTES 19

static const char *const chain[] = { "base", "head", NULL };

static lhb_engine *engine;
static struct replica replica;

static void
close_all (void)
{
  replica_remove (&replica);
  lhb_engine_close (engine);
}

static void
open_all (void)
{
  if (engine != NULL)
    return;
  lhb_test_name = "fuzz_layers";
  engine = engine_make (LHB_DRIVER_POOL, 1);
  replica_make (&replica);
  for (int layer = 0; layer < 2; layer++)
    replica_image (&replica, chain[layer], SIZE);
  CHECK_EQUAL (atexit (close_all), 0);
}

static void
make_layer (const char *image, uint64_t data_bits, const uint8_t *discard,
            size_t discard_bytes)
{
  char name[LHB_NAME_BYTES_MAX];
  int fd = replica_open_image (&replica, image);

  CHECK_EQUAL (ftruncate (fd, 0), 0);
  CHECK_EQUAL (ftruncate (fd, (off_t) SIZE), 0);
  close (fd);
  for (uint64_t block = 0; block < BLOCKS; block++)
    if (data_bits >> block & 1)
      replica_fill (&replica, image, block, 1, image[0]);
  replica_discard_name (image, name);
  if (discard_bytes == 0)
    {
      (void) unlinkat (replica.fd, name, 0);
      return;
    }
  fd = openat (replica.fd, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC,
               0600);
  CHECK (fd >= 0);
  CHECK_EQUAL (write (fd, discard, discard_bytes), (ssize_t) discard_bytes);
  close (fd);
}

static void
apply_layer (char *model, int byte, uint64_t data_bits, const uint8_t *discard,
             size_t discard_bytes)
{
  for (uint64_t block = 0; block < BLOCKS; block++)
    if (data_bits >> block & 1)
      memset (model + block * BLOCK, byte, BLOCK);
    else if (block / 8 < discard_bytes
             && discard[block / 8] >> (block % 8) & 1)
      memset (model + block * BLOCK, 0, BLOCK);
}

static void
change (lhb_store *store, char *model, uint8_t where, uint8_t how)
{
  uint64_t offset = where * (SIZE / 256) + how;
  uint64_t length = 1 + how * (uint64_t) 97;

  if (length > SIZE - offset)
    length = SIZE - offset;
  CHECK_EQUAL (lhb_store_zero (store, offset, length, how & 1, 0), 0);
  memset (model + offset, 0, length);
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t length)
{
  uint64_t base_bits, head_bits;
  size_t base_bytes, head_bytes;
  const uint8_t *discards = data + HEADER_BYTES;
  lhb_store *store;
  char *model;

  if (length < HEADER_BYTES)
    return 0;
  open_all ();
  memcpy (&base_bits, data, 8);
  memcpy (&head_bits, data + 8, 8);
  base_bytes = data[16];
  if (base_bytes > length - HEADER_BYTES)
    base_bytes = length - HEADER_BYTES;
  head_bytes = length - HEADER_BYTES - base_bytes;
  make_layer ("base", base_bits, discards, base_bytes);
  make_layer ("head", head_bits, discards + base_bytes, head_bytes);
  model = blocks_alloc (BLOCKS);
  apply_layer (model, 'b', base_bits, discards, base_bytes);
  apply_layer (model, 'h', head_bits, discards + base_bytes, head_bytes);
  replica_check (engine, &replica, chain, model, BLOCKS);
  store = store_open (engine, &replica, SIZE, 0, chain);
  store_check (store, model, BLOCKS);
  change (store, model, data[17], data[18]);
  store_check (store, model, BLOCKS);
  lhb_store_close (store);
  replica_check (engine, &replica, chain, model, BLOCKS);
  free (model);
  return 0;
}
