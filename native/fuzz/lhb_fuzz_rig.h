/* The volume of a fuzz target: opened with the first input, closed at exit. */
#ifndef LHB_FUZZ_RIG_H
#define LHB_FUZZ_RIG_H

#include "../tests/lhb_rig.h"

static struct rig rig;

static void
close_rig (void)
{
  rig_close (&rig);
}

static void
open_rig (const char *name, uint64_t blocks)
{
  if (rig.engine != NULL)
    return;
  lhb_test_name = name;
  rig_open (&rig, LHB_DRIVER_POOL, 0, 1, blocks);
  CHECK_EQUAL (atexit (close_rig), 0);
}

#endif
