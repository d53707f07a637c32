/* Fault points: armed rules fire on the passes they name, and on no others. */
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stddef.h>

#include "lhb_fault.h"
#include "lhb_contract.h"
#include "lhb_test.h"

static void
nothing_armed_nothing_fails (void)
{
  CHECK_EQUAL (lhb_fault (LHB_FAULT_STORE_READ, 1), 0);
  CHECK_EQUAL (atomic_load (&lhb_faults_armed), 0);
}

static void
rule_skips_then_fires_then_is_spent (void)
{
  CHECK_EQUAL (lhb_fault_arm ("store.write", EIO, 0, 2, 3), 0);
  CHECK_EQUAL (lhb_fault (LHB_FAULT_STORE_READ, 1), 0);
  for (int pass = 0; pass < 7; pass++)
    CHECK_EQUAL (lhb_fault (LHB_FAULT_STORE_WRITE, 1),
                 pass >= 2 && pass < 5 ? -EIO : 0);
  CHECK_EQUAL (atomic_load (&lhb_faults_armed), 0);
}

static void
rule_of_one_store_ignores_the_others (void)
{
  CHECK_EQUAL (lhb_fault_arm ("store.sync", ENOSPC, 7, 0, 1), 0);
  CHECK_EQUAL (lhb_fault (LHB_FAULT_STORE_SYNC, 6), 0);
  CHECK_EQUAL (lhb_fault (LHB_FAULT_STORE_SYNC, 0), 0);
  CHECK_EQUAL (lhb_fault (LHB_FAULT_STORE_SYNC, 7), -ENOSPC);
  CHECK_EQUAL (lhb_fault (LHB_FAULT_STORE_SYNC, 7), 0);
}

static void
rules_of_one_point_fire_in_the_order_of_arming (void)
{
  CHECK_EQUAL (lhb_fault_arm ("store.read", EIO, 0, 0, 1), 0);
  CHECK_EQUAL (lhb_fault_arm ("store.read", EROFS, 0, 0, 1), 0);
  CHECK_EQUAL (lhb_fault (LHB_FAULT_STORE_READ, 1), -EIO);
  CHECK_EQUAL (lhb_fault (LHB_FAULT_STORE_READ, 1), -EROFS);
  CHECK_EQUAL (lhb_fault (LHB_FAULT_STORE_READ, 1), 0);
}

static void
clear_disarms_everything (void)
{
  CHECK_EQUAL (lhb_fault_arm ("map.alloc", ENOMEM, 0, 0, UINT64_MAX), 0);
  CHECK_EQUAL (lhb_fault_arm ("socket.send", EPIPE, 0, 0, 1), 0);
  CHECK_EQUAL (lhb_fault (LHB_FAULT_MAP_ALLOC, 1), -ENOMEM);
  lhb_fault_clear ();
  CHECK_EQUAL (atomic_load (&lhb_faults_armed), 0);
  CHECK_EQUAL (lhb_fault (LHB_FAULT_MAP_ALLOC, 1), 0);
  CHECK_EQUAL (lhb_fault (LHB_FAULT_SOCKET_SEND, 1), 0);
}

static void
every_named_point_can_be_armed (void)
{
  static const char *const names[] = {
#define X(name, text) text,
    LHB_FAULT_POINTS (X)
#undef X
  };

  for (unsigned i = 0; i < LHB_FAULT_POINT_COUNT; i++)
    {
      CHECK_EQUAL (lhb_fault_arm (names[i], EIO, 0, 0, 1), 0);
      CHECK_EQUAL (lhb_fault ((enum lhb_fault_point) i, 1), -EIO);
    }
}

static void
bad_rules_are_refused (void)
{
  CHECK_EQUAL (lhb_fault_arm ("store.nothing", EIO, 0, 0, 1), -ENOENT);
  CHECK_EQUAL (lhb_fault_arm ("", EIO, 0, 0, 1), -ENOENT);
  CHECK_EQUAL (lhb_fault_arm ("store.read", 0, 0, 0, 1), -EINVAL);
  CHECK_EQUAL (lhb_fault_arm ("store.read", -EIO, 0, 0, 1), -EINVAL);
  CHECK_EQUAL (lhb_fault_arm ("store.read", EIO, 0, 0, 0), -EINVAL);
  CHECK_EQUAL (atomic_load (&lhb_faults_armed), 0);
}

static void
too_many_rules_are_refused_and_the_others_stay (void)
{
  int armed = 0;

  while (armed < 1000 && lhb_fault_arm ("store.read", EIO, 0, 0, 1) == 0)
    armed++;
  CHECK (armed > 0 && armed < 1000);
  CHECK_EQUAL (lhb_fault_arm ("store.read", EIO, 0, 0, 1), -ENOSPC);
  for (int i = 0; i < armed; i++)
    CHECK_EQUAL (lhb_fault (LHB_FAULT_STORE_READ, 1), -EIO);
  CHECK_EQUAL (lhb_fault (LHB_FAULT_STORE_READ, 1), 0);
}

#define THREADS 4
#define PASSES 1000

static void *
count_hits (void *argument)
{
  uint64_t *hits = argument;

  for (int i = 0; i < PASSES; i++)
    *hits += lhb_fault (LHB_FAULT_STORE_WRITE, 1) != 0;
  return NULL;
}

static void
racing_passes_share_the_times_of_a_rule (void)
{
  pthread_t threads[THREADS];
  uint64_t hits[THREADS] = { 0 }, sum = 0;

  CHECK_EQUAL (lhb_fault_arm ("store.write", EIO, 0, 100, 1234), 0);
  for (int i = 0; i < THREADS; i++)
    CHECK_EQUAL (pthread_create (&threads[i], NULL, count_hits, &hits[i]), 0);
  for (int i = 0; i < THREADS; i++)
    {
      CHECK_EQUAL (pthread_join (threads[i], NULL), 0);
      sum += hits[i];
    }
  CHECK_EQUAL (sum, 1234);
}

static const struct lhb_test tests[] = {
  LHB_TEST (nothing_armed_nothing_fails),
  LHB_TEST (rule_skips_then_fires_then_is_spent),
  LHB_TEST (rule_of_one_store_ignores_the_others),
  LHB_TEST (rules_of_one_point_fire_in_the_order_of_arming),
  LHB_TEST (clear_disarms_everything),
  LHB_TEST (every_named_point_can_be_armed),
  LHB_TEST (bad_rules_are_refused),
  LHB_TEST (too_many_rules_are_refused_and_the_others_stay),
  LHB_TEST (racing_passes_share_the_times_of_a_rule),
};

LHB_TEST_MAIN (tests)
