/* cdef.h for C: cffi wants it without preprocessor conditionals. */
#ifndef LHB_CONTRACT_H
#define LHB_CONTRACT_H

#include <stddef.h>
#include <stdint.h>

#include "../cdef.h"

#endif
