/* Products, norms and functions of a few vectors. Matrices are row-major (out, in). */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t Size;

/* Numbers of a vector register; compilers make vectors of this dialect for every machine. */
#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t Indices __attribute__((vector_size(LANES * 4)));

#define LANES_OF_4(f, bit, l) f(bit, l), f(bit, l + 1), f(bit, l + 2), f(bit, l + 3)
#if LANES == 16
#define ALL_LANES(f, bit) \
    LANES_OF_4(f, bit, 0), LANES_OF_4(f, bit, 4), LANES_OF_4(f, bit, 8), LANES_OF_4(f, bit, 12)
#elif LANES == 8
#define ALL_LANES(f, bit) LANES_OF_4(f, bit, 0), LANES_OF_4(f, bit, 4)
#else
#define ALL_LANES(f, bit) LANES_OF_4(f, bit, 0)
#endif

#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#define SHUFFLE(x, y, f, bit) __builtin_shufflevector(x, y, ALL_LANES(f, bit))
#else
#define UNROLL _Pragma("GCC unroll 16")
#define SHUFFLE(x, y, f, bit) __builtin_shuffle(x, y, (Indices){ALL_LANES(f, bit)})
#endif

/* One step of a transpose, whose rows are added up as it is made: lanes whose number has this bit change places with
 * those of the first rows whose number has it. */
#define FIRST(bit, l) ((l) & (bit) ? LANES + (l) - (bit) : (l))
#define SECOND(bit, l) ((l) & (bit) ? LANES + (l) : (l) + (bit))
#define FOLD(bit) \
    UNROLL for (int i = 0; i < bit; i++) r[i] = \
        SHUFFLE(r[i], r[i + bit], FIRST, bit) + SHUFFLE(r[i], r[i + bit], SECOND, bit);

/* The sum of each of LANES vectors, in order. */
INLINE Vector sums(Vector *r) {
#if LANES >= 16
    FOLD(8)
#endif
#if LANES >= 8
    FOLD(4)
#endif
    FOLD(2) FOLD(1)
    return r[0];
}

/* n < LANES numbers, and zeros. */
INLINE Vector first_of(const float *x, Size n) {
#if LANES == 16
    return (Vector)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), x);
#else
    Vector found = {0};
    for (int l = 0; l < LANES - 1; l++)
        if (l < n) found[l] = x[l];
    return found;
#endif
}

/* LANES rows of w, of n numbers, the next one `step` floats on, times x. Eight rows at a time come faster from memory
 * than sixteen, or four. */
INLINE Vector dots(const float *w, Size step, const float *x, Size n) {
    enum { TOGETHER = LANES < 8 ? LANES : 8 };
    Vector sum[LANES];
    Size whole = n / LANES * LANES, rest = n - whole;
    UNROLL for (int i = 0; i < LANES; i++) sum[i] = (Vector){0};
    UNROLL for (int first = 0; first < LANES; first += TOGETHER)
        for (Size d = 0; d < whole; d += LANES) {
            Vector part = *(const Unaligned *)(x + d);
            UNROLL for (int i = 0; i < TOGETHER; i++)
                sum[first + i] += *(const Unaligned *)(w + (first + i) * step + d) * part;
        }
    if (rest) {
        Vector part = first_of(x + whole, rest);
        UNROLL for (int i = 0; i < LANES; i++) sum[i] += first_of(w + i * step + whole, rest) * part;
    }
    return sums(sum);
}

/* y[o] += w[o] . x for rows lo <= o < hi of w, of n numbers, the next row `step` floats on. */
static void add_product_of(float *restrict y, const float *restrict w, Size step, const float *restrict x, Size n,
                           Size lo, Size hi) {
    Size o = lo;
    for (; o + LANES <= hi; o += LANES) *(Unaligned *)(y + o) += dots(w + o * step, step, x, n);
    for (; o < hi; o++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (Size i = 0; i < n; i++) sum += w[o * step + i] * x[i];
        y[o] += sum;
    }
}

static void add_product(float *y, const float *w, const float *x, Size n, Size lo, Size hi) {
    add_product_of(y, w, n, x, n, lo, hi);
}

static void product(float *y, const float *w, const float *x, Size n, Size lo, Size hi) {
    if (hi > lo) memset(y + lo, 0, (hi - lo) * sizeof(float));
    add_product(y, w, x, n, lo, hi);
}

/* y = rescale y + weights of n rows times the rows, of `width` numbers, the next one `step` floats on. */
static void add_rows(float *restrict y, const float *restrict weights, const float *restrict rows, Size step,
                     Size width, Size n, float rescale) {
    Size at = 0;
    for (; at + LANES <= width; at += LANES) {
        const float *restrict r = rows + at;
        Vector sum = *(const Unaligned *)(y + at) * rescale;
        Size i = 0;
#define ROW(j) (*(const Unaligned *)(r + (j) * step) * weights[i + (j)])
        for (; i + 4 <= n; i += 4, r += 4 * step) sum += (ROW(0) + ROW(1)) + (ROW(2) + ROW(3));
        for (; i < n; i++, r += step) sum += ROW(0);
#undef ROW
        *(Unaligned *)(y + at) = sum;
    }
    for (; at < width; at++) {
        float sum = y[at] * rescale;
        for (Size i = 0; i < n; i++) sum += weights[i] * rows[i * step + at];
        y[at] = sum;
    }
}

/* e^x to about 2 units in the last place, without branches, so that loops over it become vectors (after Cephes). */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float rounded = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the integer lands in the low bits */
    float n = rounded - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { float f; int32_t i; } power = {.i = ((int32_t)n + 127) << 23};
    return p * power.f;
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

/* Rotate channel pairs (2i, 2i + 1) by (cos, sin); times a scale. */
static void rotate(float *y, const float *x, const float *rotary, Size n, float scale) {
    for (Size i = 0; i < n; i += 2) {
        float even = x[i], odd = x[i + 1];
        y[i] = (even * rotary[i] - odd * rotary[i + 1]) * scale;
        y[i + 1] = (even * rotary[i + 1] + odd * rotary[i]) * scale;
    }
}
