/* A small lock for sections of some tens of nanoseconds.
 *
 * It spins briefly and then sleeps in a futex.  Taken and dropped inline it
 * costs half of a pthread mutex, it is four bytes, and a thread may hold any
 * number of them: a wide range claim holds every shard of its table, which is
 * more than ThreadSanitizer's deadlock detector accepts of pthread mutexes.
 * Zero-filled memory is a free lock.
 */
#ifndef LHB_LOCK_H
#define LHB_LOCK_H

#include <stdatomic.h>
#include <stdint.h>

struct lhb_lock {
  _Atomic uint32_t state;               /* 0 free, 1 held, 2 held and wanted */
};

void lhb_lock_wait (struct lhb_lock *lock);
void lhb_lock_wake (struct lhb_lock *lock);

static inline void
lhb_lock_take (struct lhb_lock *lock)
{
  uint32_t expected = 0;

  if (!atomic_compare_exchange_strong_explicit (&lock->state, &expected, 1,
                                                memory_order_acquire,
                                                memory_order_relaxed))
    lhb_lock_wait (lock);
}

static inline void
lhb_lock_drop (struct lhb_lock *lock)
{
  if (atomic_exchange_explicit (&lock->state, 0, memory_order_release) == 2)
    lhb_lock_wake (lock);
}

#endif
