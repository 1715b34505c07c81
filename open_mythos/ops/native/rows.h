/* Functions of rows one by one: norms and the SwiGLU, forward and backward, and the places of the greatest. */
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

/* The places of the K greatest of n numbers with their bias; of equal ones the first. */
static void greatest(int64_t *restrict out, const float *restrict x, const float *restrict bias, Size n, Size K) {
    for (Size k = 0; k < K; k++) {
        float most = -INFINITY;
        Size at = -1;
        for (Size first = 0; first < n; first += LANES) {
            Size wide = least(LANES, n - first);
            __mmask16 left = (__mmask16)((1u << wide) - 1);
            for (Size j = 0; j < k; j++)
                if (out[j] >= first && out[j] < first + wide) left &= ~(__mmask16)(1u << (out[j] - first));
            __m512 value = (__m512)(first_of(x + first, wide) + first_of(bias + first, wide));
            value = _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), _mm512_set1_ps(INFINITY));
            if (!left) continue;
            float here = _mm512_mask_reduce_max_ps(left, value);
            if (at >= 0 && here <= most) continue;
            most = here;
            at = first + __builtin_ctz(_mm512_mask_cmp_ps_mask(left, value, _mm512_set1_ps(here), _CMP_EQ_OQ));
        }
        out[k] = at;
    }
}
