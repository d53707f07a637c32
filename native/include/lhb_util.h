/* The few helpers that every file needs. */
#ifndef LHB_UTIL_H
#define LHB_UTIL_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#define lhb_container_of(pointer, type, member)                               \
  ((type *) (void *) ((char *) (pointer) - offsetof (type, member)))

static inline uint64_t
lhb_now_ns (void)
{
  struct timespec now;

  clock_gettime (CLOCK_MONOTONIC, &now);
  return (uint64_t) now.tv_sec * 1000000000u + (uint64_t) now.tv_nsec;
}

/* A default mutex can not fail to be made; if it does, nothing holds. */
static inline void
lhb_mutex_init (pthread_mutex_t *mutex)
{
  if (pthread_mutex_init (mutex, NULL) != 0)
    abort ();
}

#endif
