/* Dirty maps; see lhb_dirty.h. */

#include <assert.h>
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "lhb_dirty.h"
#include "lhb_util.h"
#include "lhb_volume.h"

enum {
  CHUNK_GRANULES = 1 << LHB_DIRTY_CHUNK_SHIFT,
  CHUNK_WORDS = CHUNK_GRANULES / 64,
};

#define GRANULE_SHIFT 16
_Static_assert (1u << GRANULE_SHIFT == LHB_DIRTY_GRANULE_BYTES, "the shift");

/* Stands for a chunk of ones. */
static uint64_t all[1];

static uint64_t
granules_of (uint64_t bytes)
{
  return (bytes >> GRANULE_SHIFT)
         + ((bytes & (LHB_DIRTY_GRANULE_BYTES - 1)) != 0);
}

static size_t
chunks_of (uint64_t size_bytes)
{
  return (size_t) ((granules_of (size_bytes) + CHUNK_GRANULES - 1)
                   >> LHB_DIRTY_CHUNK_SHIFT);
}

static void
drop_chunk (uint64_t **chunk)
{
  if (*chunk != all)
    free (*chunk);
  *chunk = NULL;
}

static void
drop_tracker (struct lhb_trackers *trackers, struct lhb_tracker *tracker)
{
  size_t count = chunks_of (trackers->size_bytes);

  for (size_t i = 0; i < count; i++)
    drop_chunk (&tracker->chunks[i]);
  free (tracker->chunks);
  tracker->chunks = NULL;
  tracker->id = 0;
  atomic_fetch_sub (&trackers->count, 1);
}

/* Set or clear bits of one chunk.  -ENOMEM: the chunk is as it was, or, when
 * bits were to be set, all of them are. */
static int
change_chunk (uint64_t **chunk, uint64_t first, uint64_t end, bool set)
{
  const bool whole = end - first == CHUNK_GRANULES;

  if (*chunk == (set ? all : NULL))
    return 0;
  if (whole)
    {
      drop_chunk (chunk);
      *chunk = set ? all : NULL;
      return 0;
    }
  if (*chunk == NULL || *chunk == all)
    {
      uint64_t *words = malloc (CHUNK_WORDS * sizeof *words);

      if (words == NULL)
        {
          if (set)
            *chunk = all;
          return set ? 0 : -ENOMEM;
        }
      memset (words, set ? 0 : 0xff, CHUNK_WORDS * sizeof *words);
      *chunk = words;
    }
  while (first < end)
    {
      uint64_t bit = first % 64, count = 64 - bit;
      uint64_t mask;

      if (count > end - first)
        count = end - first;
      mask = (count == 64 ? UINT64_MAX : (UINT64_C (1) << count) - 1) << bit;
      if (set)
        (*chunk)[first / 64] |= mask;
      else
        (*chunk)[first / 64] &= ~mask;
      first += count;
    }
  return 0;
}

static int
change_range (struct lhb_tracker *tracker, uint64_t first, uint64_t end,
              bool set)
{
  int err = 0;

  while (err == 0 && first < end)
    {
      uint64_t chunk = first >> LHB_DIRTY_CHUNK_SHIFT;
      uint64_t base = chunk << LHB_DIRTY_CHUNK_SHIFT;
      uint64_t stop = end < base + CHUNK_GRANULES ? end : base + CHUNK_GRANULES;

      err = change_chunk (&tracker->chunks[chunk], first - base, stop - base,
                          set);
      first = stop;
    }
  return err;
}

static struct lhb_tracker *
find_tracker (struct lhb_trackers *trackers, uint64_t id)
{
  for (int i = 0; i < LHB_TRACKERS_MAX; i++)
    if (trackers->list[i].id == id)
      return &trackers->list[i];
  return NULL;
}

void
lhb_trackers_init (struct lhb_trackers *trackers, uint64_t size_bytes)
{
  trackers->size_bytes = size_bytes;
  lhb_mutex_init (&trackers->lock);
}

void
lhb_trackers_free (struct lhb_trackers *trackers)
{
  for (int i = 0; i < LHB_TRACKERS_MAX; i++)
    if (trackers->list[i].id != 0)
      drop_tracker (trackers, &trackers->list[i]);
  pthread_mutex_destroy (&trackers->lock);
}

int
lhb_trackers_resize (struct lhb_trackers *trackers, uint64_t size_bytes)
{
  const size_t old = chunks_of (trackers->size_bytes);
  const size_t now = chunks_of (size_bytes);
  int err = 0;

  assert (size_bytes >= trackers->size_bytes);
  pthread_mutex_lock (&trackers->lock);
  for (int i = 0; i < LHB_TRACKERS_MAX && err == 0; i++)
    {
      struct lhb_tracker *tracker = &trackers->list[i];
      uint64_t **chunks;

      if (tracker->id == 0)
        continue;
      chunks = reallocarray (tracker->chunks, now, sizeof *chunks);
      if (chunks == NULL)
        {
          err = -ENOMEM;        /* those that are longer already may be */
          continue;
        }
      memset (chunks + old, 0, (now - old) * sizeof *chunks);
      tracker->chunks = chunks;
    }
  if (err == 0)
    trackers->size_bytes = size_bytes;
  pthread_mutex_unlock (&trackers->lock);
  return err;
}

int
lhb_trackers_add (struct lhb_trackers *trackers, uint64_t id)
{
  struct lhb_tracker *tracker;
  int err = 0;

  assert (id != 0);
  pthread_mutex_lock (&trackers->lock);
  tracker = find_tracker (trackers, 0);
  if (find_tracker (trackers, id) != NULL)
    err = -EEXIST;
  else if (tracker == NULL)
    err = -ENOSPC;
  else
    {
      tracker->chunks
          = calloc (chunks_of (trackers->size_bytes), sizeof *tracker->chunks);
      if (tracker->chunks == NULL)
        err = -ENOMEM;
      else
        {
          tracker->id = id;
          atomic_fetch_add (&trackers->count, 1);
        }
    }
  pthread_mutex_unlock (&trackers->lock);
  return err;
}

/* The granules a range touches; or, to be cleared, those it covers.  Clipped
 * to the volume, whose last granule may be short. */
static void
clip (const struct lhb_trackers *trackers, uint64_t offset_bytes,
      uint64_t length_bytes, bool touched, uint64_t *first_out,
      uint64_t *end_out)
{
  const uint64_t size = trackers->size_bytes;
  uint64_t end;

  if (offset_bytes > size)
    offset_bytes = size;
  if (length_bytes > size - offset_bytes)
    length_bytes = size - offset_bytes;
  end = offset_bytes + length_bytes;
  *first_out = touched ? offset_bytes >> GRANULE_SHIFT
                       : granules_of (offset_bytes);
  *end_out = touched || end == size ? granules_of (end) : end >> GRANULE_SHIFT;
}

int
lhb_trackers_mark (struct lhb_trackers *trackers, uint64_t id,
                   uint64_t offset_bytes, uint64_t length_bytes)
{
  uint64_t first, end;
  int err = id == 0 ? 0 : -ENOENT;

  pthread_mutex_lock (&trackers->lock);
  clip (trackers, offset_bytes, length_bytes, true, &first, &end);
  for (int i = 0; i < LHB_TRACKERS_MAX; i++)
    {
      struct lhb_tracker *tracker = &trackers->list[i];

      if (tracker->id == 0 || (id != 0 && tracker->id != id))
        continue;
      err = change_range (tracker, first, end, true);
      assert (err == 0);
    }
  pthread_mutex_unlock (&trackers->lock);
  return err;
}

/* ---- For Python. */

/* With the volume's lock. */
static bool
was_dropped (const lhb_volume *volume, uint64_t store_id)
{
  for (uint32_t i = 0; i < volume->store_count; i++)
    if (volume->stores[i]->id == store_id)
      {
        uint8_t state = atomic_load (&volume->states[i]);

        return state == LHB_STATE_FAILED || state == LHB_STATE_GONE;
      }
  return false;
}

/* A store that was dropped has its tracker, or never gets one: a map that
 * begins after changes were missed would lack them. */
int
lhb_volume_track (lhb_volume *volume, uint64_t store_id,
                  uint64_t *tracker_id_out)
{
  uint64_t id = store_id ? store_id : lhb_engine_new_id (volume->engine);
  int err;

  pthread_mutex_lock (&volume->lock);
  if (store_id != 0 && was_dropped (volume, store_id))
    err = lhb_dirty_extents (volume, id, 0, NULL, 0);
  else
    err = lhb_trackers_add (&volume->trackers, id);
  pthread_mutex_unlock (&volume->lock);
  *tracker_id_out = id;
  return err == -EEXIST ? 0 : err;
}

int
lhb_volume_untrack (lhb_volume *volume, uint64_t tracker_id)
{
  struct lhb_trackers *trackers = &volume->trackers;
  struct lhb_tracker *tracker;

  if (tracker_id == 0)
    return -ENOENT;
  pthread_mutex_lock (&trackers->lock);
  tracker = find_tracker (trackers, tracker_id);
  if (tracker != NULL)
    drop_tracker (trackers, tracker);
  pthread_mutex_unlock (&trackers->lock);
  return tracker == NULL ? -ENOENT : 0;
}

int
lhb_dirty_mark (lhb_volume *volume, uint64_t tracker_id, uint64_t offset_bytes,
                uint64_t length_bytes)
{
  if (tracker_id == 0)
    return -ENOENT;
  return lhb_trackers_mark (&volume->trackers, tracker_id, offset_bytes,
                            length_bytes);
}

int
lhb_dirty_clear (lhb_volume *volume, uint64_t tracker_id, uint64_t offset_bytes,
                 uint64_t length_bytes)
{
  struct lhb_trackers *trackers = &volume->trackers;
  struct lhb_tracker *tracker;
  uint64_t first, end;
  int err = -ENOENT;

  if (tracker_id == 0)
    return -ENOENT;
  pthread_mutex_lock (&trackers->lock);
  clip (trackers, offset_bytes, length_bytes, false, &first, &end);
  tracker = find_tracker (trackers, tracker_id);
  if (tracker != NULL)
    err = change_range (tracker, first, end, false);
  pthread_mutex_unlock (&trackers->lock);
  return err;
}

/* The first granule at or after 'at' whose bit is 'value', or 'end'. */
static uint64_t
find_granule (const struct lhb_tracker *tracker, uint64_t at, uint64_t end,
              bool value)
{
  while (at < end)
    {
      const uint64_t *chunk = tracker->chunks[at >> LHB_DIRTY_CHUNK_SHIFT];
      uint64_t in_chunk = at & (CHUNK_GRANULES - 1);
      uint64_t word;

      if (chunk == NULL || chunk == all)
        {
          if ((chunk == all) == value)
            return at;
          at += CHUNK_GRANULES - in_chunk;
          continue;
        }
      word = value ? chunk[in_chunk / 64] : ~chunk[in_chunk / 64];
      word >>= at % 64;
      if (word != 0)
        {
          at += (unsigned) __builtin_ctzll (word);
          break;
        }
      at += 64 - at % 64;
    }
  return at < end ? at : end;
}

int
lhb_dirty_extents (lhb_volume *volume, uint64_t tracker_id,
                   uint64_t offset_bytes, struct lhb_extent *extents_out,
                   uint32_t max)
{
  struct lhb_trackers *trackers = &volume->trackers;
  struct lhb_tracker *tracker = NULL;
  int count = 0;

  if (max > INT32_MAX)
    return -EINVAL;
  pthread_mutex_lock (&trackers->lock);
  if (tracker_id != 0)
    tracker = find_tracker (trackers, tracker_id);
  if (tracker != NULL)
    {
      const uint64_t size = trackers->size_bytes, end = granules_of (size);
      uint64_t at = granules_of (offset_bytes), stop;

      while ((uint32_t) count < max
             && (at = find_granule (tracker, at, end, true)) < end)
        {
          struct lhb_extent *extent = &extents_out[count++];

          stop = find_granule (tracker, at, end, false);
          extent->offset_bytes = at << GRANULE_SHIFT;
          extent->length_bytes
              = (stop == end ? size : stop << GRANULE_SHIFT)
                - extent->offset_bytes;
          at = stop;
        }
    }
  pthread_mutex_unlock (&trackers->lock);
  return tracker == NULL ? -ENOENT : count;
}
