/* Sizes, and sums of products of rows, 16 at a time where there are vectors of 16. */
#pragma once
#include <stdint.h>

typedef int64_t Size;

enum { LANES = 16 };

static Size padded(Size n) { return (n + LANES - 1) / LANES * LANES; }

#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__) /* the vectors are in the dialect of gcc */
#define HAS_VECTORS 1
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

typedef float Vector __attribute__((vector_size(64)));
typedef float Unaligned __attribute__((vector_size(64), aligned(4)));
typedef int32_t Lanes __attribute__((vector_size(64)));

/* One of four steps: lanes whose number has this bit change places with those of the first rows whose number has it. */
#define EXCHANGE(bit, rows) \
    _Pragma("GCC unroll 16") for (int i = 0; i < rows; i++) if (!(i & bit)) { \
        Vector x = r[i], y = r[i + bit]; \
        Lanes first, second; \
        for (int l = 0; l < LANES; l++) { \
            first[l] = l & bit ? LANES + l - bit : l; \
            second[l] = l & bit ? LANES + l : l + bit; \
        } \
        r[i] = __builtin_shuffle(x, y, first); \
        r[i + bit] = __builtin_shuffle(x, y, second); \
    }

#define ADD(bit) _Pragma("GCC unroll 16") for (int i = 0; i < bit; i++) r[i] += r[i + bit];

INLINE void transpose(Vector *r) { EXCHANGE(8, 16) EXCHANGE(4, 16) EXCHANGE(2, 16) EXCHANGE(1, 16) }

/* The sum of each of 16 vectors, in order: the rows of the transpose are added up while it is made. */
INLINE Vector sums(Vector *r) {
    EXCHANGE(8, 16) ADD(8) EXCHANGE(4, 8) ADD(4) EXCHANGE(2, 4) ADD(2) EXCHANGE(1, 2) ADD(1)
    return r[0];
}

/* n <= 16 numbers, and zeros. */
INLINE Vector first_of(const float *x, Size n) {
    return (Vector)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), x);
}

/* 16 rows of w, of n numbers, the next one `step` floats on, times x. Eight rows at a time come faster from memory than
 * sixteen, or four. */
INLINE Vector dots(const float *w, Size step, const float *x, Size n) {
    Vector sum[LANES];
    Size whole = n / LANES * LANES, rest = n - whole;
    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) sum[i] = (Vector){0};
    _Pragma("GCC unroll 2") for (int half = 0; half < LANES; half += 8)
        for (Size d = 0; d < whole; d += LANES) {
            Vector part = *(const Unaligned *)(x + d);
            _Pragma("GCC unroll 8") for (int i = half; i < half + 8; i++)
                sum[i] += *(const Unaligned *)(w + i * step + d) * part;
        }
    if (rest) {
        Vector part = first_of(x + whole, rest);
        _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) sum[i] += first_of(w + i * step + whole, rest) * part;
    }
    return sums(sum);
}
#endif
