/* Functions of rows one by one: norms and the SwiGLU, forward and backward. */
#pragma once
#include "change.h"
#include "vectors.h"

/* y = weight * x / rms(x) */
static void norm(float *restrict y, const float *restrict x, const float *restrict weight, Size n, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (Size i = 0; i < n; i++) sum += x[i] * x[i];
    float rms = sqrtf(sum / n + eps);
    if (weight)
        for (Size i = 0; i < n; i++) y[i] = x[i] / rms * weight[i];
    else
        for (Size i = 0; i < n; i++) y[i] = x[i] / rms;
}

/* Gradients of x, and of the weight, which is added to, unless that is NULL. */
static void norm_backward(float *restrict grad_x, float *restrict grad_weight, const float *restrict grad,
                          const float *restrict x, const float *restrict weight, Size n, float eps) {
    float sum = 0, along = 0;
#pragma omp simd reduction(+ : sum)
    for (Size i = 0; i < n; i++) sum += x[i] * x[i];
    float inverse = 1.0f / sqrtf(sum / n + eps);
    if (weight) {
#pragma omp simd reduction(+ : along)
        for (Size i = 0; i < n; i++) along += grad[i] * weight[i] * x[i];
        along *= inverse * inverse / n;
        for (Size i = 0; i < n; i++) grad_x[i] = inverse * (grad[i] * weight[i] - along * x[i]);
        if (grad_weight)
            for (Size i = 0; i < n; i++) grad_weight[i] += grad[i] * x[i] * inverse;
    } else {
#pragma omp simd reduction(+ : along)
        for (Size i = 0; i < n; i++) along += grad[i] * x[i];
        along *= inverse * inverse / n;
        for (Size i = 0; i < n; i++) grad_x[i] = inverse * (grad[i] - along * x[i]);
    }
}

/* y = factor * silu(gate) * up */
static void swiglu(float *restrict y, const float *restrict gate, const float *restrict up, Size n, float factor) {
    for (Size i = 0; i < n; i++) y[i] = factor * gate[i] * up[i] / (1.0f + exponential(-gate[i]));
}

/* Gradients of gate and up; y, for whoever needs it again, unless that is NULL; and the sum of grad times y without the
 * factor. */
static float swiglu_backward(float *restrict grad_gate, float *restrict grad_up, float *restrict y,
                             const float *restrict grad, const float *restrict gate, const float *restrict up, Size n,
                             float factor) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (Size i = 0; i < n; i++) {
        float open = 1.0f / (1.0f + exponential(-gate[i])), silu = gate[i] * open;
        sum += grad[i] * silu * up[i];
        grad_up[i] = factor * grad[i] * silu;
        grad_gate[i] = factor * grad[i] * up[i] * (open + silu * (1.0f - open));
    }
    if (y) swiglu(y, gate, up, n, factor);
    return sum;
}

/* Channel pairs (2 i, 2 i + 1) of y turn by (cos, sin) pairs, or back. */
static void turn(float *restrict y, const float *restrict x, const float *restrict turns, Size n, float sign) {
    for (Size i = 0; i < n; i += 2) {
        float cosine = turns[i], sine = sign * turns[i + 1];
        y[i] = x[i] * cosine - x[i + 1] * sine;
        y[i + 1] = x[i + 1] * cosine + x[i] * sine;
    }
}
