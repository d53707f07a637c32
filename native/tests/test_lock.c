/* The futex lock. */
#include <pthread.h>

#include "lhb_lock.h"
#include "lhb_test.h"

#define THREADS 8
#define STEPS 20000

static struct lhb_lock lock;
static uint64_t counter;                /* plain: the lock protects it */

static void *
count_under_lock (void *unused)
{
  (void) unused;
  for (int i = 0; i < STEPS; i++) {
    lhb_lock_take (&lock);
    counter++;
    lhb_lock_drop (&lock);
  }
  return NULL;
}

static void
threads_never_hold_it_together (void)
{
  pthread_t threads[THREADS];

  for (unsigned i = 0; i < THREADS; i++)
    CHECK_EQUAL (pthread_create (&threads[i], NULL, count_under_lock, NULL),
                 0);
  for (unsigned i = 0; i < THREADS; i++)
    CHECK_EQUAL (pthread_join (threads[i], NULL), 0);
  CHECK_EQUAL (counter, THREADS * STEPS);
}

static void *
wait_for_lock (void *argument)
{
  _Atomic uint32_t *through = argument;

  lhb_lock_take (&lock);
  atomic_fetch_add (through, 1);
  lhb_lock_drop (&lock);
  return NULL;
}

/* Two sleep behind a holder.  The state says when one does: 2 is stored only
 * on the way into the futex. */
static void
every_sleeper_is_woken (void)
{
  _Atomic uint32_t through = 0;
  pthread_t threads[2];

  lhb_lock_take (&lock);
  for (unsigned i = 0; i < 2; i++)
    CHECK_EQUAL (pthread_create (&threads[i], NULL, wait_for_lock, &through),
                 0);
  while (atomic_load (&lock.state) != 2)
    ;
  CHECK_EQUAL (atomic_load (&through), 0);
  lhb_lock_drop (&lock);
  for (unsigned i = 0; i < 2; i++)
    CHECK_EQUAL (pthread_join (threads[i], NULL), 0);
  CHECK_EQUAL (atomic_load (&through), 2);
  CHECK_EQUAL (atomic_load (&lock.state), 0);
}

static const struct lhb_test tests[] = {
  LHB_TEST (threads_never_hold_it_together),
  LHB_TEST (every_sleeper_is_woken),
};

LHB_TEST_MAIN (tests)
