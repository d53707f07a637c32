/* The seeds of fuzz_nbd, in every variant of the native tests. */

#include "../fuzz/fuzz_nbd.c"
#include "lhb_corpus.h"

static void
connections_of_the_corpus_break_nothing (void)
{
  corpus_replay (__FILE__, "nbd");
}

static const struct lhb_test tests[]
    = { LHB_TEST (connections_of_the_corpus_break_nothing) };

LHB_TEST_MAIN (tests)
