/* Vectors of 16 floats, and functions of them. */
#pragma once
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "dots.h"
#include "exponential.h"

#ifndef HAS_VECTORS
#error "this is for gcc and processors with AVX-512; PyTorch's own functions are as fast elsewhere"
#endif

static Size least(Size a, Size b) { return a < b ? a : b; }

typedef struct { float *at; Size batch, token, head; } Rows; /* (B, tokens, heads, D) by its strides; D's is 1 */

static float *row_at(const Rows *x, Size b, Size t, Size h) {
    return x->at + b * x->batch + t * x->token + h * x->head;
}
