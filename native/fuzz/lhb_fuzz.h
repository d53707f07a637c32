/* What the fuzz targets share with the programs that replay their corpora. */
#ifndef LHB_FUZZ_H
#define LHB_FUZZ_H

#include <stddef.h>
#include <stdint.h>

/* libFuzzer's entry: feed one input.  The process ends with a message when the
 * core breaks a promise. */
int LLVMFuzzerTestOneInput (const uint8_t *data, size_t length);

#endif
