/* What the native tests share: named tests, CHECK, a seeded random source.
 *
 *   static void adds (void) { CHECK (1 + 1 == 2); }
 *   static const struct lhb_test tests[] = { LHB_TEST (adds) };
 *   LHB_TEST_MAIN (tests)
 *
 * A program runs all its tests, or those whose names are its arguments, and
 * prints "ok NAME" for each.  The first failed CHECK ends it with status 1.
 * LHB_TEST_SEED=n chooses another random sequence; a failure prints the seed.
 */
#ifndef LHB_TEST_H
#define LHB_TEST_H

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A test that hangs is ended by SIGALRM.  Sanitizers on a loaded machine need
 * some ten seconds for the longest one. */
#define LHB_TEST_SECONDS_MAX 300

struct lhb_test {
  const char *name;
  void (*run) (void);
};

#define LHB_TEST(function) { #function, function }

static uint64_t lhb_test_seed = 1;
static const char *lhb_test_name = "";

#define CHECK(condition)                                                      \
  do {                                                                        \
    if (!(condition)) {                                                       \
      fprintf (stderr, "not ok %s: %s:%d: %s (LHB_TEST_SEED=%" PRIu64 ")\n",  \
               lhb_test_name, __FILE__, __LINE__, #condition, lhb_test_seed); \
      _exit (1);                                                              \
    }                                                                         \
  } while (0)

/* Both are printed when they differ. */
#define CHECK_EQUAL(got, want)                                                \
  do {                                                                        \
    long long got_ = (long long) (got), want_ = (long long) (want);           \
    if (got_ != want_) {                                                      \
      fprintf (stderr,                                                        \
               "not ok %s: %s:%d: %s is %lld, not %lld"                       \
               " (LHB_TEST_SEED=%" PRIu64 ")\n",                              \
               lhb_test_name, __FILE__, __LINE__, #got, got_, want_,          \
               lhb_test_seed);                                                \
      _exit (1);                                                              \
    }                                                                         \
  } while (0)

/* splitmix64: '*state' starts anywhere, for example at lhb_test_seed. */
static inline uint64_t
lhb_test_random (uint64_t *state)
{
  uint64_t z = (*state += UINT64_C (0x9e3779b97f4a7c15));

  z = (z ^ (z >> 30)) * UINT64_C (0xbf58476d1ce4e5b9);
  z = (z ^ (z >> 27)) * UINT64_C (0x94d049bb133111eb);
  return z ^ (z >> 31);
}

/* 0 <= result < bound. */
static inline uint64_t
lhb_test_below (uint64_t *state, uint64_t bound)
{
  return lhb_test_random (state) % bound;
}

static inline int
lhb_test_main (int argc, char **argv, const struct lhb_test *tests,
               size_t count)
{
  const char *seed = getenv ("LHB_TEST_SEED");
  int ran = 0;

  if (seed != NULL)
    lhb_test_seed = strtoull (seed, NULL, 10);
  for (size_t i = 0; i < count; i++) {
    int wanted = argc < 2;

    for (int j = 1; j < argc; j++)
      wanted |= strcmp (argv[j], tests[i].name) == 0;
    if (!wanted)
      continue;
    lhb_test_name = tests[i].name;
    alarm (LHB_TEST_SECONDS_MAX);
    tests[i].run ();
    printf ("ok %s\n", tests[i].name);
    fflush (stdout);
    ran++;
  }
  return ran > 0 ? 0 : 1;
}

#define LHB_TEST_MAIN(tests)                                                  \
  int                                                                         \
  main (int argc, char **argv)                                                \
  {                                                                           \
    return lhb_test_main (argc, argv, tests, sizeof tests / sizeof tests[0]); \
  }

#endif
