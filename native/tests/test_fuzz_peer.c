/* The seeds of fuzz_peer, in every variant of the native tests. */

#include "../fuzz/fuzz_peer.c"
#include "lhb_corpus.h"

static void
replies_of_the_corpus_break_nothing (void)
{
  corpus_replay (__FILE__, "peer");
}

static const struct lhb_test tests[]
    = { LHB_TEST (replies_of_the_corpus_break_nothing) };

LHB_TEST_MAIN (tests)
