/* How far a state has moved: for the gate and for StateChange, wherever they are asked. */
#pragma once
#include <float.h>
#include <math.h>
#include <stdint.h>

/* |after - before| / |after|, 0 where both are 0. */
static float relative_change(const float *restrict before, const float *restrict after, int64_t n) {
    float moved = 0, size = 0;
#pragma omp simd reduction(+ : moved, size)
    for (int64_t i = 0; i < n; i++) {
        moved += (after[i] - before[i]) * (after[i] - before[i]);
        size += after[i] * after[i];
    }
    return sqrtf(moved) / fmaxf(sqrtf(size), FLT_MIN);
}
