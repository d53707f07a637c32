/* The seeds of fuzz_fuse, in every variant of the native tests. */

#include "../fuzz/fuzz_fuse.c"
#include "lhb_corpus.h"

static void
messages_of_the_corpus_break_nothing (void)
{
  corpus_replay (__FILE__, "fuse");
}

static const struct lhb_test tests[]
    = { LHB_TEST (messages_of_the_corpus_break_nothing) };

LHB_TEST_MAIN (tests)
