/* Matrix products in float32, for processors with vectors of 512 bits: of two matrices, of batches, or of groups of rows.
 *
 * The usual way (Goto and van de Geijn 2008): strips of both matrices are copied to where they can be read in order, and
 * a kernel multiplies a strip of up to TALL rows by one of WIDE columns with all of its sums in registers. Any strides
 * will do, so nothing has to be transposed before. Every number is summed in the same order whatever stands beside it
 * and however many threads there are.
 */
#pragma once
#include "vectors.h"

enum { TALL = 14, WIDE = 2 * LANES, DEEP = 256, BROAD = 512 };

typedef struct { const float *at; Size row, column; } Matrix; /* strides */

static Matrix part(Matrix x, Size row, Size column) {
    return (Matrix){x.at + row * x.row + column * x.column, x.row, x.column};
}

/* -- copies in the order of reading */

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

/* strip[k * width + i] = x[i][k] for i < n and k < deep, and zero for n <= i < width. Writes up to LANES floats more. */
static void pack(float *strip, Matrix x, Size n, Size width, Size deep) {
    Size k = 0;
    if (x.column == 1)
        for (; k + LANES <= deep; k += LANES)
            for (Size first = 0; first < width; first += LANES) {
                Vector r[LANES];
                _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++)
                    r[i] = first + i < n ? *(const Unaligned *)(x.at + (first + i) * x.row + k) : (Vector){0};
                transpose(r);
                _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++)
                    *(Unaligned *)(strip + (k + i) * width + first) = r[i];
            }
    for (; k < deep; k++)
        for (Size i = 0; i < width; i++) strip[k * width + i] = i < n ? x.at[i * x.row + k * x.column] : 0;
}

/* -- kernels: `rows` is known when they are compiled */

/* c = alpha * a strip of a times one of b; the next line of b is b_step floats on. */
INLINE void multiply(int rows, const float *restrict a, const float *restrict b, Size b_step, Size deep,
                     float *restrict c, Size c_row, float alpha, int add) {
    Vector sum[TALL][2];
    _Pragma("GCC unroll 16") for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (Vector){0};
    for (Size k = 0; k < deep; k++, a += rows, b += b_step) {
        Vector left = *(const Unaligned *)b, right = *(const Unaligned *)(b + LANES);
        _Pragma("GCC unroll 16") for (int i = 0; i < rows; i++) {
            sum[i][0] += a[i] * left;
            sum[i][1] += a[i] * right;
        }
    }
    _Pragma("GCC unroll 16") for (int i = 0; i < rows; i++) {
        Unaligned *to = (Unaligned *)(c + i * c_row);
        Vector left = alpha * sum[i][0], right = alpha * sum[i][1];
        if (add) left += to[0], right += to[1];
        to[0] = left, to[1] = right;
    }
}

/* As pack, where the n = width numbers that go together lie together. */
INLINE void copy(int n, float *restrict strip, Matrix x, Size deep) {
    for (Size k = 0; k < deep; k++) memcpy(strip + k * n, x.at + k * x.column, n * sizeof(float));
}

typedef void Multiply(const float *, const float *, Size, Size, float *, Size, float, int);
typedef void Copy(float *, Matrix, Size);

#define KERNELS(rows) \
    static void multiply_##rows(const float *a, const float *b, Size b_step, Size deep, float *c, Size c_row, \
                                float alpha, int add) { \
        multiply(rows, a, b, b_step, deep, c, c_row, alpha, add); \
    } \
    static void copy_##rows(float *strip, Matrix x, Size deep) { copy(rows, strip, x, deep); }
KERNELS(1) KERNELS(2) KERNELS(3) KERNELS(4) KERNELS(5) KERNELS(6) KERNELS(7)
KERNELS(8) KERNELS(9) KERNELS(10) KERNELS(11) KERNELS(12) KERNELS(13) KERNELS(14)

static Multiply *const multiplies[] = {
    NULL, multiply_1, multiply_2, multiply_3, multiply_4, multiply_5, multiply_6, multiply_7, multiply_8, multiply_9,
    multiply_10, multiply_11, multiply_12, multiply_13, multiply_14,
};
static Copy *const copies[] = {
    NULL, copy_1, copy_2, copy_3, copy_4, copy_5, copy_6, copy_7, copy_8, copy_9, copy_10, copy_11, copy_12, copy_13,
    copy_14,
};

/* -- one product, by one thread */

static _Thread_local struct {
    _Alignas(64) float a[TALL * DEEP + LANES], b[BROAD * DEEP + LANES], edge[TALL * WIDE];
} scratch;

static void pack_columns(float *strip, Matrix b, Size n, Size deep) {
    if (b.row == 1 && n == WIDE) copy(WIDE, strip, b, deep);
    else pack(strip, b, n, WIDE, deep);
}

/* A strip of rows of c, for columns that are packed, or that lie in order as they are. */
static void multiply_strip(float *c, Size c_row, Size rows, Matrix b, int packed, Size columns, Size deep, float alpha,
                           int add) {
    for (Size n = 0; n < columns; n += WIDE) {
        Size wide = least(WIDE, columns - n);
        const float *strip = scratch.b + n * deep;
        if (wide == WIDE) {
            const float *from = packed ? strip : b.at + n;
            multiplies[rows](scratch.a, from, packed ? WIDE : b.column, deep, c + n, c_row, alpha, add);
            continue;
        }
        multiplies[rows](scratch.a, strip, WIDE, deep, scratch.edge, WIDE, alpha, 0);
        for (Size i = 0; i < rows; i++)
            for (Size j = 0; j < wide; j++)
                c[i * c_row + n + j] = scratch.edge[i * WIDE + j] + (add ? c[i * c_row + n + j] : 0);
    }
}

/* b by its columns: (N, K). */
static void product(float *c, Size c_row, Matrix a, Matrix b, Size M, Size N, Size K, float alpha, int add) {
    Size n_strips = (M + TALL - 1) / TALL;
    int packed = b.row != 1 || n_strips > 1; /* what is read once is read where it lies */
    if (K == 0 && !add)
        for (Size i = 0; i < M; i++) memset(c + i * c_row, 0, N * sizeof(float));
    for (Size k = 0; k < K; k += DEEP) {
        Size deep = least(DEEP, K - k);
        for (Size first = 0; first < N; first += BROAD) {
            Size columns = least(BROAD, N - first);
            for (Size n = packed ? 0 : columns / WIDE * WIDE; n < columns; n += WIDE)
                pack_columns(scratch.b + n * deep, part(b, first + n, k), least(WIDE, columns - n), deep);
            for (Size strip = 0; strip < n_strips; strip++) {
                Size m = M * strip / n_strips, rows = M * (strip + 1) / n_strips - m;
                Matrix of_a = part(a, m, k);
                if (a.row == 1) copies[rows](scratch.a, of_a, deep);
                else pack(scratch.a, of_a, rows, rows, deep);
                multiply_strip(c + m * c_row + first, c_row, rows, part(b, first, k), packed, columns, deep, alpha,
                               add || k);
            }
        }
    }
}
