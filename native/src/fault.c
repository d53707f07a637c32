/* Fault points: the rules that lhb_fault_arm adds, and the pass that asks them.
 *
 * A slow path by design: it runs only in tests, so one mutex guards all rules.
 */
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <string.h>

#include "lhb_fault.h"
#include "lhb_contract.h"

#define FAULT_RULES_MAX 32
#define FAULT_ERRNO_MAX 4095            /* what the kernel calls an errno */

struct fault_rule {
  uint64_t store_id;                    /* 0: any store */
  uint64_t skip, times;                 /* passes left; times 0: free slot */
  enum lhb_fault_point point;
  int error;
};

_Atomic uint32_t lhb_faults_armed;

static const char *const fault_names[LHB_FAULT_POINT_COUNT] = {
#define X(name, text) [LHB_FAULT_##name] = text,
  LHB_FAULT_POINTS (X)
#undef X
};

static pthread_mutex_t fault_lock = PTHREAD_MUTEX_INITIALIZER;
static struct fault_rule fault_rules[FAULT_RULES_MAX];

/* The rules of one point stand beside each other: each of them counts a pass
 * until one fires, and that one ends the search.  So the rules armed earlier
 * fire before the later ones do.
 */
int
lhb_fault_hit (enum lhb_fault_point point, uint64_t store_id)
{
  int result = 0;

  pthread_mutex_lock (&fault_lock);
  for (size_t i = 0; i < FAULT_RULES_MAX && result == 0; i++)
    {
      struct fault_rule *rule = &fault_rules[i];

      if (rule->times == 0 || rule->point != point
          || (rule->store_id != 0 && rule->store_id != store_id))
        continue;
      if (rule->skip > 0)
        {
          rule->skip--;
          continue;
        }
      result = -rule->error;
      if (--rule->times == 0)
        atomic_fetch_sub (&lhb_faults_armed, 1);
    }
  pthread_mutex_unlock (&fault_lock);
  return result;
}

/* Also -EINVAL for an error that is no errno or for zero times, and -ENOSPC
 * when FAULT_RULES_MAX rules are armed.
 */
int
lhb_fault_arm (const char *point, int error, uint64_t store_id, uint64_t skip,
               uint64_t times)
{
  int result = -ENOSPC;
  size_t found;

  for (found = 0; found < LHB_FAULT_POINT_COUNT; found++)
    if (strcmp (fault_names[found], point) == 0)
      break;
  if (found == LHB_FAULT_POINT_COUNT)
    return -ENOENT;
  if (error < 1 || error > FAULT_ERRNO_MAX || times == 0)
    return -EINVAL;

  pthread_mutex_lock (&fault_lock);
  for (size_t i = 0; i < FAULT_RULES_MAX; i++)
    if (fault_rules[i].times == 0)
      {
        fault_rules[i] = (struct fault_rule) {
          .store_id = store_id, .skip = skip, .times = times,
          .point = (enum lhb_fault_point) found, .error = error,
        };
        atomic_fetch_add (&lhb_faults_armed, 1);
        result = 0;
        break;
      }
  pthread_mutex_unlock (&fault_lock);
  return result;
}

void
lhb_fault_clear (void)
{
  pthread_mutex_lock (&fault_lock);
  memset (fault_rules, 0, sizeof fault_rules);
  atomic_store (&lhb_faults_armed, 0);
  pthread_mutex_unlock (&fault_lock);
}
