/* Products, norms and functions of a few vectors. Matrices are row-major (out, in). */
#pragma once
#include <math.h>
#include <string.h>

#include "dots.h"
#include "exponential.h"

/* y[o] += w[o] . x for rows lo <= o < hi of w, (.., n). */
static void add_product(float *restrict y, const float *restrict w, const float *restrict x, Size n, Size lo, Size hi) {
    Size o = lo;
#ifdef HAS_VECTORS
    for (; o + LANES <= hi; o += LANES) *(Unaligned *)(y + o) += dots(w + o * n, n, x, n);
#endif
    for (; o + 8 <= hi; o += 8) {
        const float *restrict r = w + o * n;
        float a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, h = 0;
#pragma omp simd reduction(+ : a, b, c, d, e, f, g, h)
        for (Size i = 0; i < n; i++) {
            a += r[i] * x[i];
            b += r[n + i] * x[i];
            c += r[2 * n + i] * x[i];
            d += r[3 * n + i] * x[i];
            e += r[4 * n + i] * x[i];
            f += r[5 * n + i] * x[i];
            g += r[6 * n + i] * x[i];
            h += r[7 * n + i] * x[i];
        }
        y[o] += a, y[o + 1] += b, y[o + 2] += c, y[o + 3] += d;
        y[o + 4] += e, y[o + 5] += f, y[o + 6] += g, y[o + 7] += h;
    }
    for (; o < hi; o++) {
        float a = 0;
#pragma omp simd reduction(+ : a)
        for (Size i = 0; i < n; i++) a += w[o * n + i] * x[i];
        y[o] += a;
    }
}

static void product(float *y, const float *w, const float *x, Size n, Size lo, Size hi) {
    if (hi > lo) memset(y + lo, 0, (hi - lo) * sizeof(float));
    add_product(y, w, x, n, lo, hi);
}

/* x / rms(x), times a weight unless that is NULL; y may be x. */
static void rms_norm(float *y, const float *x, const float *weight, Size n, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (Size i = 0; i < n; i++) sum += x[i] * x[i];
    float scale = 1.0f / sqrtf(sum / n + eps);
    for (Size i = 0; i < n; i++) y[i] = x[i] * scale * (weight ? weight[i] : 1.0f);
}

/* factor * silu(gate) * up */
static void swiglu(float *restrict y, const float *restrict gate, const float *restrict up, Size n, float factor) {
    for (Size i = 0; i < n; i++) y[i] = factor * gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

/* Turn channel pairs (2i, 2i + 1) by (cos, sin); times a scale. */
static void turn(float *y, const float *x, const float *turns, Size n, float scale) {
    for (Size i = 0; i < n; i += 2) {
        float even = x[i], odd = x[i + 1];
        y[i] = (even * turns[i] - odd * turns[i + 1]) * scale;
        y[i + 1] = (even * turns[i + 1] + odd * turns[i]) * scale;
    }
}
