/* Vectors of 16 floats, and functions of them. */
#pragma once
#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "exponential.h"

#ifndef __AVX512F__
#error "this is for processors with AVX-512; PyTorch's own functions are as fast elsewhere"
#endif

typedef int64_t Size;
typedef float Vector __attribute__((vector_size(64)));
typedef float Unaligned __attribute__((vector_size(64), aligned(4)));
typedef int32_t Lanes __attribute__((vector_size(64)));

enum { LANES = 16 };
#define INLINE static inline __attribute__((always_inline))

static Size least(Size a, Size b) { return a < b ? a : b; }

typedef struct { float *at; Size batch, token, head; } Rows; /* (B, tokens, heads, D) by its strides; D's is 1 */

static float *row_at(const Rows *x, Size b, Size t, Size h) {
    return x->at + b * x->batch + t * x->token + h * x->head;
}
