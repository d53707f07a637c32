/* The slow half of lhb_lock.h: U. Drepper's three-state futex lock. */
#include <linux/futex.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "lhb_lock.h"

/* About as long as the longest usual section (a run of a map chunk); after
 * that the holder has probably lost its CPU. */
#define LHB_LOCK_SPINS 100

static inline void
relax_cpu (void)
{
#if defined (__x86_64__) || defined (__i386__)
  __builtin_ia32_pause ();
#elif defined (__aarch64__)
  __asm__ volatile ("yield");
#endif
}

void
lhb_lock_wait (struct lhb_lock *lock)
{
  for (unsigned i = 0; i < LHB_LOCK_SPINS; i++) {
    uint32_t expected = 0;

    relax_cpu ();
    if (atomic_load_explicit (&lock->state, memory_order_relaxed) == 0
        && atomic_compare_exchange_strong_explicit (&lock->state, &expected, 1,
                                                    memory_order_acquire,
                                                    memory_order_relaxed))
      return;
  }
  /* A sleeper can not know whether others sleep too, so it takes the lock as
   * "wanted": its own drop may wake once too often, never too seldom. */
  while (atomic_exchange_explicit (&lock->state, 2, memory_order_acquire) != 0)
    syscall (SYS_futex, &lock->state, FUTEX_WAIT_PRIVATE, 2, NULL, NULL, 0);
}

void
lhb_lock_wake (struct lhb_lock *lock)
{
  syscall (SYS_futex, &lock->state, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}
