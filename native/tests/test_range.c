/* Range ordering. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "lhb_limits.h"
#include "lhb_range.h"
#include "lhb_test.h"

#define REGION (1u << LHB_RANGE_REGION_SHIFT)

/* ---- One thread: who waits for whom. */

struct probe {
  struct lhb_range_claim claim;         /* first: granted() casts back */
  int granted;                          /* times, by the callback */
  struct probe **order;                 /* where the callback notes itself */
};

static void
note_granted (struct lhb_range_claim *claim)
{
  struct probe *probe = (struct probe *) claim;

  probe->granted++;
  if (probe->order != NULL)
    *probe->order++ = probe;
}

static struct probe
probe_of (enum lhb_range_kind kind, uint64_t first, uint64_t last)
{
  return (struct probe) {
    .claim = { .first_block = first, .last_block = last, .kind = kind,
               .granted = note_granted },
  };
}

static struct lhb_range_table *
open_table (void)
{
  struct lhb_range_table *table;

  CHECK_EQUAL (lhb_range_open (&table), 0);
  return table;
}

/* Claim both in this order and say whether the second one had to wait. */
static bool
second_waits (struct probe first, struct probe second)
{
  struct lhb_range_table *table = open_table ();
  bool waits;

  CHECK (lhb_range_acquire (table, &first.claim));
  waits = !lhb_range_acquire (table, &second.claim);
  CHECK_EQUAL (lhb_range_count (table), 2);
  lhb_range_release (table, &first.claim);
  CHECK_EQUAL (second.granted, waits);
  lhb_range_release (table, &second.claim);
  CHECK_EQUAL (lhb_range_count (table), 0);
  CHECK_EQUAL (first.granted, 0);
  lhb_range_close (table);
  return waits;
}

static void
reads_share_and_writes_exclude (void)
{
  struct probe read = probe_of (LHB_RANGE_READ, 5, 9);
  struct probe write = probe_of (LHB_RANGE_WRITE, 9, 12);

  CHECK (!second_waits (read, read));
  CHECK (second_waits (read, write));
  CHECK (second_waits (write, read));
  CHECK (second_waits (write, write));
  CHECK (!second_waits (write, probe_of (LHB_RANGE_WRITE, 8, 8)));
  CHECK (!second_waits (write, probe_of (LHB_RANGE_WRITE, 13, 20)));
}

static void
flush_waits_for_a_freeze_only_and_freeze_for_all (void)
{
  struct probe flush = probe_of (LHB_RANGE_FLUSH, 0, 0);
  struct probe freeze = probe_of (LHB_RANGE_FREEZE, 0, 0);
  struct probe others[] = {
    probe_of (LHB_RANGE_READ, 0, 0),
    probe_of (LHB_RANGE_WRITE, 0, 0),
    probe_of (LHB_RANGE_WRITE, REGION - 1, REGION),
    probe_of (LHB_RANGE_WRITE, 0, 100 * REGION),
    flush,
  };

  for (unsigned i = 0; i < sizeof others / sizeof others[0]; i++) {
    CHECK (!second_waits (flush, others[i]));
    CHECK (!second_waits (others[i], flush));
    CHECK (second_waits (freeze, others[i]));
    CHECK (second_waits (others[i], freeze));
  }
  CHECK (second_waits (freeze, freeze));
}

/* Shard borders: neighbouring regions, the wrap from the last shard to the
 * first, the same shard for far regions, and wide claims. */
static void
overlap_is_found_across_regions_and_shards (void)
{
  const uint64_t turn = (uint64_t) LHB_RANGE_SHARDS * REGION;
  struct probe two = probe_of (LHB_RANGE_WRITE, REGION - 1, REGION);
  struct probe wrap = probe_of (LHB_RANGE_WRITE, turn - 1, turn);
  struct probe wide = probe_of (LHB_RANGE_WRITE, 3, 3 * REGION);

  CHECK (second_waits (two, two));
  CHECK (second_waits (two, probe_of (LHB_RANGE_READ, REGION, REGION)));
  CHECK (second_waits (two, probe_of (LHB_RANGE_READ, 7, REGION - 1)));
  CHECK (!second_waits (two, probe_of (LHB_RANGE_WRITE, REGION + 1,
                                       REGION + 2)));
  CHECK (!second_waits (two, probe_of (LHB_RANGE_WRITE, turn + REGION - 1,
                                       turn + REGION)));
  CHECK (second_waits (wrap, wrap));
  CHECK (second_waits (probe_of (LHB_RANGE_READ, turn, turn), wrap));
  CHECK (second_waits (wide, two));
  CHECK (second_waits (two, wide));
  CHECK (second_waits (wide, wide));
  CHECK (second_waits (wide, probe_of (LHB_RANGE_WRITE, 0, 3)));
  CHECK (!second_waits (wide, probe_of (LHB_RANGE_WRITE, 0, 2)));
  CHECK (!second_waits (wide, probe_of (LHB_RANGE_WRITE, 3 * REGION + 1,
                                        9 * REGION)));
  CHECK (second_waits (probe_of (LHB_RANGE_READ, UINT64_MAX - 1, UINT64_MAX),
                       probe_of (LHB_RANGE_WRITE, 0, UINT64_MAX)));
}

/* A read must not overtake a waiting write, or the write would starve. */
static void
claims_are_granted_in_the_order_of_arrival (void)
{
  struct lhb_range_table *table = open_table ();
  struct probe *order[8] = { NULL };
  struct probe probes[] = {
    probe_of (LHB_RANGE_READ, 0, 9),
    probe_of (LHB_RANGE_WRITE, 5, 5),
    probe_of (LHB_RANGE_READ, 5, 9),
    probe_of (LHB_RANGE_READ, 0, 5),
    probe_of (LHB_RANGE_WRITE, 0, 4 * REGION),
    probe_of (LHB_RANGE_FREEZE, 0, 0),
    probe_of (LHB_RANGE_FLUSH, 0, 0),
  };

  for (unsigned i = 0; i < 7; i++) {
    probes[i].order = &order[i];
    CHECK_EQUAL (lhb_range_acquire (table, &probes[i].claim), i == 0);
  }
  lhb_range_release (table, &probes[0].claim);
  CHECK (order[1] == &probes[1] && order[2] == NULL && order[3] == NULL);
  lhb_range_release (table, &probes[1].claim);
  CHECK (order[2] == &probes[2] && order[3] == &probes[3]);
  CHECK (order[4] == NULL);
  lhb_range_release (table, &probes[3].claim);
  CHECK (order[4] == NULL);
  lhb_range_release (table, &probes[2].claim);
  CHECK (order[4] == &probes[4] && order[5] == NULL);
  lhb_range_release (table, &probes[4].claim);
  CHECK (order[5] == &probes[5] && order[6] == NULL);
  lhb_range_release (table, &probes[5].claim);
  CHECK (order[6] == &probes[6]);
  lhb_range_release (table, &probes[6].claim);
  for (unsigned i = 1; i < 7; i++)
    CHECK_EQUAL (probes[i].granted, 1);
  lhb_range_close (table);
}

static struct lhb_range_table *line_table;
static unsigned line_depth, line_depth_max, line_granted;

static void
release_at_once (struct lhb_range_claim *claim)
{
  line_granted++;
  if (++line_depth > line_depth_max)
    line_depth_max = line_depth;
  lhb_range_release (line_table, claim);
  line_depth--;
}

static void
long_line_of_claims_released_in_their_callbacks_does_not_recurse (void)
{
  enum { LINE = 10000 };
  struct lhb_range_claim *claims = calloc (LINE, sizeof *claims);

  CHECK (claims != NULL);
  line_table = open_table ();
  for (unsigned i = 0; i < LINE; i++) {
    claims[i].kind = LHB_RANGE_WRITE;
    claims[i].granted = release_at_once;
    CHECK_EQUAL (lhb_range_acquire (line_table, &claims[i]), i == 0);
  }
  lhb_range_release (line_table, &claims[0]);
  CHECK_EQUAL (line_granted, LINE - 1);
  CHECK_EQUAL (line_depth_max, 1);
  CHECK_EQUAL (lhb_range_count (line_table), 0);
  lhb_range_close (line_table);
  free (claims);
}

/* ---- Many threads.  Each keeps several claims in the table.  What is granted
 * comes back through its box, then the claim's blocks are entered, checked
 * and left.  A lost wake-up makes the test hang, and the alarm ends it. */

#define STRESS_THREADS 6
#define STRESS_CLAIMS 4                 /* of one thread at a time */
#define STRESS_STEPS 3000               /* claims of one thread */
/* A little more than one turn of the shards, so that regions share them. */
#define STRESS_BLOCKS ((LHB_RANGE_SHARDS + 3u) * REGION)

struct stress {
  struct lhb_range_table *table;
  bool ordered;                         /* tickets tell the order of claims */
  pthread_mutex_t ticket_lock;
  uint64_t next_ticket;
  /* Of every block: -1 a writer, n readers; and who was there last. */
  _Atomic int inside[STRESS_BLOCKS];
  uint64_t last_write[STRESS_BLOCKS];
  _Atomic uint64_t last_read[STRESS_BLOCKS];
  _Atomic int active;                   /* claims, and -1000 for a freeze */
  uint64_t last_freeze;
  _Atomic uint64_t waits, freezes;
};

struct stress_thread;

struct stress_claim {
  struct lhb_range_claim claim;         /* first: granted() casts back */
  struct stress_thread *owner;
  struct stress_claim *next;
  uint64_t ticket;
  bool inside;
};

struct stress_thread {
  struct stress *stress;
  uint64_t random;
  pthread_mutex_t lock;
  pthread_cond_t filled;
  struct stress_claim *box;             /* granted, not yet executed */
  struct stress_claim claims[STRESS_CLAIMS];
};

static void
put_in_box (struct lhb_range_claim *claim)
{
  struct stress_claim *c = (struct stress_claim *) claim;
  struct stress_thread *owner = c->owner;

  pthread_mutex_lock (&owner->lock);
  c->next = owner->box;
  owner->box = c;
  pthread_cond_signal (&owner->filled);
  pthread_mutex_unlock (&owner->lock);
}

/* The plain arrays are what ThreadSanitizer watches.  Only the claims may
 * order the accesses to them, so the test's own atomics order nothing. */
#define ADD(value, n)                                                         \
  atomic_fetch_add_explicit ((value), (n), memory_order_relaxed)
#define LOAD(value) atomic_load_explicit ((value), memory_order_relaxed)

static void
raise_to (_Atomic uint64_t *value, uint64_t to)
{
  uint64_t seen = LOAD (value);

  while (seen < to
         && !atomic_compare_exchange_weak_explicit (value, &seen, to,
                                                    memory_order_relaxed,
                                                    memory_order_relaxed))
    ;
}

static void
enter (struct stress *s, const struct stress_claim *c)
{
  if (c->claim.kind == LHB_RANGE_FREEZE) {
    CHECK_EQUAL (ADD (&s->active, -1000), 0);
    for (uint64_t b = 0; s->ordered && b < STRESS_BLOCKS; b += REGION)
      CHECK (s->last_write[b] < c->ticket
             && LOAD (&s->last_read[b]) < c->ticket);
    CHECK (!s->ordered || s->last_freeze < c->ticket);
    s->last_freeze = c->ticket;
    return;
  }
  CHECK (ADD (&s->active, 1) >= 0);
  CHECK (!s->ordered || s->last_freeze < c->ticket);
  if (c->claim.kind == LHB_RANGE_FLUSH)
    return;
  for (uint64_t b = c->claim.first_block; b <= c->claim.last_block; b++) {
    CHECK (s->last_write[b] < c->ticket || !s->ordered);
    if (c->claim.kind == LHB_RANGE_READ) {
      CHECK (ADD (&s->inside[b], 1) >= 0);
      raise_to (&s->last_read[b], c->ticket);
    }
    else {
      CHECK_EQUAL (ADD (&s->inside[b], -1), 0);
      CHECK (!s->ordered || LOAD (&s->last_read[b]) < c->ticket);
      s->last_write[b] = c->ticket;
    }
  }
}

static void
leave (struct stress *s, const struct stress_claim *c)
{
  if (c->claim.kind == LHB_RANGE_FREEZE) {
    CHECK_EQUAL (ADD (&s->active, 1000), -1000);
    return;
  }
  if (c->claim.kind != LHB_RANGE_FLUSH) {
    int change = c->claim.kind == LHB_RANGE_READ ? -1 : 1;

    for (uint64_t b = c->claim.first_block; b <= c->claim.last_block; b++)
      CHECK (ADD (&s->inside[b], change) * change < 0);
  }
  CHECK (ADD (&s->active, -1) > 0);
}

/* Half of the claims meet around the borders of shards 0, 1 and the last. */
static void
choose (struct stress_claim *c, uint64_t *random)
{
  static const uint64_t crowded[] = {
    REGION, LHB_RANGE_SHARDS * REGION, (LHB_RANGE_SHARDS + 1) * REGION,
  };
  uint64_t kind = lhb_test_below (random, 100);
  uint64_t blocks = 1 + lhb_test_below (random, 16);
  uint64_t first = lhb_test_below (random, STRESS_BLOCKS);

  if (lhb_test_below (random, 2) == 0)
    first = crowded[lhb_test_below (random, 3)] - 20
            + lhb_test_below (random, 40);
  c->claim.kind = kind < 40 ? LHB_RANGE_READ : LHB_RANGE_WRITE;
  if (kind >= 88 && kind < 94)
    blocks = 1 + lhb_test_below (random, 6 * REGION);
  else if (kind < 97 && kind >= 94)
    c->claim.kind = LHB_RANGE_FLUSH;
  else if (kind == 99)
    c->claim.kind = LHB_RANGE_FREEZE;
  c->claim.first_block = first;
  c->claim.last_block = first + blocks - 1;
  if (c->claim.last_block >= STRESS_BLOCKS)
    c->claim.last_block = STRESS_BLOCKS - 1;
}

static void
submit (struct stress_thread *t, struct stress_claim *c)
{
  struct stress *s = t->stress;
  bool granted;

  choose (c, &t->random);
  if (s->ordered) {
    pthread_mutex_lock (&s->ticket_lock);
    c->ticket = ++s->next_ticket;
    granted = lhb_range_acquire (s->table, &c->claim);
    pthread_mutex_unlock (&s->ticket_lock);
  }
  else
    granted = lhb_range_acquire (s->table, &c->claim);
  if (granted)
    put_in_box (&c->claim);
  else
    ADD (&s->waits, 1);
}

static void *
stress_thread_run (void *argument)
{
  struct stress_thread *t = argument;
  unsigned submitted = 0, done = 0;

  for (; submitted < STRESS_CLAIMS; submitted++)
    submit (t, &t->claims[submitted]);
  while (done < STRESS_STEPS) {
    struct stress_claim *c;

    pthread_mutex_lock (&t->lock);
    while (t->box == NULL)
      pthread_cond_wait (&t->filled, &t->lock);
    c = t->box;
    t->box = c->next;
    pthread_mutex_unlock (&t->lock);

    CHECK (!c->inside);                 /* granted once only */
    c->inside = true;
    enter (t->stress, c);
    if (c->claim.kind == LHB_RANGE_FREEZE)
      ADD (&t->stress->freezes, 1);
    leave (t->stress, c);
    c->inside = false;
    lhb_range_release (t->stress->table, &c->claim);
    /* A claim is its owner's again once released. */
    memset (&c->claim.nodes, 0xa5, sizeof c->claim.nodes);
    done++;
    if (submitted < STRESS_STEPS) {
      submit (t, c);
      submitted++;
    }
  }
  return NULL;
}

static void
stress_run (bool ordered)
{
  struct stress *s = calloc (1, sizeof *s);
  struct stress_thread *threads = calloc (STRESS_THREADS, sizeof *threads);
  pthread_t ids[STRESS_THREADS];

  CHECK (s != NULL && threads != NULL);
  s->table = open_table ();
  s->ordered = ordered;
  pthread_mutex_init (&s->ticket_lock, NULL);
  for (unsigned i = 0; i < STRESS_THREADS; i++) {
    threads[i].stress = s;
    threads[i].random = lhb_test_seed * STRESS_THREADS + i;
    pthread_mutex_init (&threads[i].lock, NULL);
    pthread_cond_init (&threads[i].filled, NULL);
    for (unsigned j = 0; j < STRESS_CLAIMS; j++) {
      threads[i].claims[j].owner = &threads[i];
      threads[i].claims[j].claim.granted = put_in_box;
    }
  }
  for (unsigned i = 0; i < STRESS_THREADS; i++)
    CHECK_EQUAL (pthread_create (&ids[i], NULL, stress_thread_run,
                                 &threads[i]), 0);
  for (unsigned i = 0; i < STRESS_THREADS; i++)
    CHECK_EQUAL (pthread_join (ids[i], NULL), 0);
  CHECK_EQUAL (lhb_range_count (s->table), 0);
  CHECK_EQUAL (s->active, 0);
  /* Otherwise the test tested nothing. */
  CHECK (s->waits > STRESS_STEPS / 10);
  CHECK (s->freezes > 0);
  lhb_range_close (s->table);
  for (unsigned i = 0; i < STRESS_THREADS; i++) {
    pthread_cond_destroy (&threads[i].filled);
    pthread_mutex_destroy (&threads[i].lock);
  }
  pthread_mutex_destroy (&s->ticket_lock);
  free (threads);
  free (s);
}

static void
threads_exclude_each_other_and_all_are_granted (void)
{
  stress_run (false);
}

static void
threads_are_granted_overlaps_in_the_order_of_claims (void)
{
  stress_run (true);
}

/* One claim locks the last shard and the first, the other one all of them. */
static void *
claim_again_and_again (void *argument)
{
  struct probe *probe = argument;

  for (int i = 0; i < 100000; i++) {
    CHECK (lhb_range_acquire (line_table, &probe->claim));
    lhb_range_release (line_table, &probe->claim);
  }
  return NULL;
}

static void
claims_around_the_last_shard_do_not_deadlock (void)
{
  const uint64_t turn = (uint64_t) LHB_RANGE_SHARDS * REGION;
  struct probe probes[] = {
    probe_of (LHB_RANGE_READ, turn - 1, turn),
    probe_of (LHB_RANGE_READ, 0, turn),
  };
  pthread_t ids[2];

  line_table = open_table ();
  for (unsigned i = 0; i < 2; i++)
    CHECK_EQUAL (pthread_create (&ids[i], NULL, claim_again_and_again,
                                 &probes[i]), 0);
  for (unsigned i = 0; i < 2; i++)
    CHECK_EQUAL (pthread_join (ids[i], NULL), 0);
  lhb_range_close (line_table);
}

static const struct lhb_test tests[] = {
  LHB_TEST (reads_share_and_writes_exclude),
  LHB_TEST (flush_waits_for_a_freeze_only_and_freeze_for_all),
  LHB_TEST (overlap_is_found_across_regions_and_shards),
  LHB_TEST (claims_are_granted_in_the_order_of_arrival),
  LHB_TEST (long_line_of_claims_released_in_their_callbacks_does_not_recurse),
  LHB_TEST (claims_around_the_last_shard_do_not_deadlock),
  LHB_TEST (threads_exclude_each_other_and_all_are_granted),
  LHB_TEST (threads_are_granted_overlaps_in_the_order_of_claims),
};

LHB_TEST_MAIN (tests)
