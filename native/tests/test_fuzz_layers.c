/* The seeds of fuzz_layers, in every variant of the native tests. */

#include "../fuzz/fuzz_layers.c"
#include "lhb_corpus.h"

static void
files_of_the_corpus_break_nothing (void)
{
  corpus_replay (__FILE__, "layers");
}

static const struct lhb_test tests[]
    = { LHB_TEST (files_of_the_corpus_break_nothing) };

LHB_TEST_MAIN (tests)
