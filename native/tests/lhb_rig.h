/* A volume on several replicas, and threads that make requests of it. */
#ifndef LHB_RIG_H
#define LHB_RIG_H

#include <sched.h>

#include "lhb_replica.h"

struct rig {
  lhb_engine *engine;
  lhb_volume *volume;
  uint32_t count;
  uint64_t blocks;
  uint32_t store_flags;
  struct replica replicas[LHB_STORES_MAX];
  lhb_store *stores[LHB_STORES_MAX];
  const char *const *images;
};

static const char *const rig_images[] = { "base", "head", NULL };

static inline void
rig_open_stores (struct rig *rig)
{
  for (uint32_t i = 0; i < rig->count; i++)
    rig->stores[i]
        = store_open (rig->engine, &rig->replicas[i], rig->blocks * BLOCK,
                      rig->store_flags, rig->images);
}

/* Two layers a replica.  The lower third of the base is 'b'. */
static inline void
rig_open (struct rig *rig, uint32_t driver, uint32_t store_flags,
          uint32_t count, uint64_t blocks)
{
  *rig = (struct rig){ .engine = engine_make (driver, 2),
                       .count = count,
                       .blocks = blocks,
                       .store_flags = store_flags,
                       .images = rig_images };
  for (uint32_t i = 0; i < count; i++)
    {
      replica_make (&rig->replicas[i]);
      for (int layer = 0; rig_images[layer] != NULL; layer++)
        replica_image (&rig->replicas[i], rig_images[layer], blocks * BLOCK);
      replica_fill (&rig->replicas[i], "base", 0, blocks / 3, 'b');
    }
  rig_open_stores (rig);
  CHECK_EQUAL (lhb_volume_open (rig->engine, blocks * BLOCK, 0, &rig->volume),
               0);
  CHECK_EQUAL (lhb_volume_publish (rig->volume, rig->stores, NULL, count), 0);
}

static inline char *
rig_model (const struct rig *rig)
{
  char *model = blocks_alloc (rig->blocks);

  memset (model, 'b', rig->blocks / 3 * BLOCK);
  return model;
}

static inline void
rig_close_volume (struct rig *rig)
{
  lhb_volume_close (rig->volume);
  rig->volume = NULL;
}

static inline void
rig_close (struct rig *rig)
{
  lhb_fault_clear ();
  if (rig->volume != NULL)
    rig_close_volume (rig);
  for (uint32_t i = 0; i < rig->count; i++)
    {
      lhb_store_close (rig->stores[i]);
      replica_remove (&rig->replicas[i]);
    }
  lhb_engine_close (rig->engine);
}

/* Every replica shows 'want', now and to those who open it anew. */
static inline void
rig_check (struct rig *rig, const char *want)
{
  for (uint32_t i = 0; i < rig->count; i++)
    {
      store_check (rig->stores[i], want, rig->blocks);
      replica_check (rig->engine, &rig->replicas[i], rig->images, want,
                     rig->blocks);
    }
}

/* Every replica shows the same. */
static inline void
rig_check_equal (struct rig *rig)
{
  char *first = blocks_alloc (rig->blocks);

  CHECK_EQUAL (
      lhb_store_read (rig->stores[0], 0, (uint32_t) rig->blocks, first), 0);
  rig_check (rig, first);
  free (first);
}

static inline bool
rig_has_event (struct rig *rig)
{
  struct lhb_event event;

  return lhb_engine_next_event (rig->engine, &event) != 0;
}

static inline uint32_t
rig_held (struct rig *rig)
{
  uint32_t count = 0;

  pthread_mutex_lock (&rig->volume->lock);
  for (struct lhb_request *request = rig->volume->held; request != NULL;
       request = request->next)
    count++;
  pthread_mutex_unlock (&rig->volume->lock);
  return count;
}

static inline uint32_t
rig_gated (struct rig *rig)
{
  uint32_t count = 0;

  pthread_mutex_lock (&rig->volume->lock);
  for (struct lhb_request *request = rig->volume->gated; request != NULL;
       request = request->next)
    count++;
  pthread_mutex_unlock (&rig->volume->lock);
  return count;
}

/* Wait for a state that another thread is about to make. */
#define AWAIT(condition)                                                      \
  do                                                                          \
    {                                                                         \
      while (!(condition))                                                    \
        sched_yield ();                                                       \
    }                                                                         \
  while (0)

/* ---- One request in a thread of its own. */

struct rig_call {
  struct rig *rig;
  pthread_t thread;
  uint32_t op, flags;
  uint64_t offset, length;
  char *data;
  int result;
  _Atomic bool done;
};

static inline void *
rig_run_call (void *argument)
{
  struct rig_call *call = argument;

  call->result = lhb_volume_io (call->rig->volume, call->op, call->flags,
                                call->offset, call->length, call->data);
  atomic_store (&call->done, true);
  return NULL;
}

static inline void
rig_start (struct rig *rig, struct rig_call *call, uint32_t op, uint32_t flags,
           uint64_t offset, uint64_t length, int byte)
{
  *call = (struct rig_call){ .rig = rig,
                             .op = op,
                             .flags = flags,
                             .offset = offset,
                             .length = length,
                             .data = malloc (length + 1) };
  CHECK (call->data != NULL);
  memset (call->data, byte, length);
  CHECK_EQUAL (pthread_create (&call->thread, NULL, rig_run_call, call), 0);
}

static inline int
rig_finish (struct rig_call *call)
{
  CHECK_EQUAL (pthread_join (call->thread, NULL), 0);
  free (call->data);
  return call->result;
}

/* One request now. */
static inline int
rig_io (struct rig *rig, uint32_t op, uint32_t flags, uint64_t offset,
        uint64_t length, int byte)
{
  char *data = malloc (length + 1);
  int result;

  CHECK (data != NULL);
  memset (data, byte, length);
  result = lhb_volume_io (rig->volume, op, flags, offset, length, data);
  free (data);
  return result;
}

/* ---- Threads that write over each other until told to stop. */

enum { RIG_WRITERS = 3 };

struct rig_load {
  struct rig *rig;
  pthread_t threads[RIG_WRITERS];
  uint64_t blocks;              /* they stay below */
  _Atomic uint32_t started;
  _Atomic uint64_t requests;
  _Atomic bool stop;
};

static inline void *
rig_run_load (void *argument)
{
  struct rig_load *load = argument;
  uint64_t state
      = lhb_test_seed + 100 * (1 + atomic_fetch_add (&load->started, 1));
  const uint64_t size = load->blocks * BLOCK;

  while (!atomic_load (&load->stop))
    {
      static const uint32_t ops[]
          = { LHB_OP_WRITE, LHB_OP_WRITE, LHB_OP_WRITE, LHB_OP_READ,
              LHB_OP_TRIM,  LHB_OP_ZERO,  LHB_OP_FLUSH };
      uint32_t op = ops[lhb_test_below (&state, sizeof ops / sizeof *ops)];
      uint64_t offset = lhb_test_below (&state, size);
      uint64_t length = 1 + lhb_test_below (&state, 4 * BLOCK);
      uint32_t flags = lhb_test_below (&state, 8) == 0 ? LHB_IO_FUA : 0;

      if (lhb_test_below (&state, 2))
        offset &= ~(uint64_t) (BLOCK - 1);
      if (lhb_test_below (&state, 2))
        length = (length + BLOCK - 1) & ~(uint64_t) (BLOCK - 1);
      if (length > size - offset)
        length = size - offset;
      CHECK_EQUAL (rig_io (load->rig, op, flags, offset, length,
                           (int) lhb_test_below (&state, 256)),
                   0);
      atomic_fetch_add (&load->requests, 1);
    }
  return NULL;
}

static inline void
rig_load_start (struct rig *rig, struct rig_load *load, uint64_t blocks)
{
  *load = (struct rig_load){ .rig = rig, .blocks = blocks };
  for (int i = 0; i < RIG_WRITERS; i++)
    CHECK_EQUAL (
        pthread_create (&load->threads[i], NULL, rig_run_load, load), 0);
}

/* So many more requests. */
static inline void
rig_load_await (struct rig_load *load, uint64_t requests)
{
  uint64_t until = atomic_load (&load->requests) + requests;

  AWAIT (atomic_load (&load->requests) >= until);
}

static inline void
rig_load_stop (struct rig_load *load)
{
  atomic_store (&load->stop, true);
  for (int i = 0; i < RIG_WRITERS; i++)
    CHECK_EQUAL (pthread_join (load->threads[i], NULL), 0);
}

#endif
