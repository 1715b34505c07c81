/* Products of float32 matrices.
 *
 * The usual way (Goto and van de Geijn 2008): strips of both matrices are copied to where they can be read in order, and
 * a kernel multiplies a strip of up to TALL rows by one of WIDE columns with all of its sums in registers. Any strides
 * will do, so nothing has to be transposed before. Every number is summed in the same order whatever stands beside it
 * and however many threads there are.
 *
 * FEW rows need no copies where the numbers that are summed lie together: their time goes by how fast a matrix comes
 * from memory, and their sums are in an order of their own.
 */
#pragma once
#include "vectors.h"

enum { TALL = 14, WIDE = 2 * LANES, DEEP = 256, BROAD = 512, FEW = 32 };

typedef struct { const float *at; Size row, column; } Matrix; /* strides */

static Matrix part(Matrix x, Size row, Size column) {
    return (Matrix){x.at + row * x.row + column * x.column, x.row, x.column};
}

/* -- copies in the order of reading */

/* Each lane of both, rounded to the nearest even bfloat16, in one cell. */
INLINE Vector pair(Vector even, Vector odd) {
    Lanes low = (Lanes)even, high = (Lanes)odd;
    low = (low + 0x7fff + ((low >> 16) & 1)) >> 16 & 0xffff;
    high = (high + 0x7fff + ((high >> 16) & 1)) & (int32_t)0xffff0000;
    return (Vector)(low | high);
}

static float pair_of(float even, float odd) {
    Vector x = pair((Vector){even}, (Vector){odd});
    return x[0];
}

/* 16 cells of a row of x from number k on. */
INLINE Vector cells(const float *x, int half) {
#ifdef __AVX512BF16__
    if (half) return (Vector)_mm512_cvtne2ps_pbh((__m512)*(const Unaligned *)(x + LANES), (__m512)*(const Unaligned *)x);
#endif
    (void)half;
    return *(const Unaligned *)x;
}

/* Cells of a sum of `deep` numbers. */
static Size cells_of(Size deep, int half) { return half ? (deep + 1) / 2 : deep; }

/* strip[c * width + i] = cell c of x[i] for i < n, and zero for n <= i < width. Writes up to LANES floats more. */
INLINE void pack(float *strip, Matrix x, Size n, Size width, Size deep, int half) {
    Size c = 0, each = half ? 2 : 1;
    if (x.column == 1)
        for (; (c + LANES) * each <= deep; c += LANES)
            for (Size first = 0; first < width; first += LANES) {
                Vector r[LANES];
                _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++)
                    r[i] = first + i < n ? cells(x.at + (first + i) * x.row + c * each, half) : (Vector){0};
                transpose(r);
                _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++)
                    *(Unaligned *)(strip + (c + i) * width + first) = r[i];
            }
    for (; c < cells_of(deep, half); c++)
        for (Size i = 0; i < width; i++) {
            const float *at = x.at + i * x.row + c * each * x.column;
            float odd = half && i < n && 2 * c + 1 < deep ? at[x.column] : 0;
            strip[c * width + i] = i >= n ? 0 : half ? pair_of(*at, odd) : *at;
        }
}

/* -- kernels: `rows` is known when they are compiled */

INLINE Vector add_multiplied(Vector sum, float a, Vector b, int half) {
#ifdef __AVX512BF16__
    if (half) return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
#endif
    (void)half;
    return sum + a * b;
}

/* c = alpha * a strip of a times one of b, of `deep` cells; the next line of b is b_step floats on. */
INLINE void multiply(int rows, int half, const float *restrict a, const float *restrict b, Size b_step, Size deep,
                     float *restrict c, Size c_row, float alpha, int add) {
    Vector sum[TALL][2];
    _Pragma("GCC unroll 16") for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (Vector){0};
    for (Size k = 0; k < deep; k++, a += rows, b += b_step) {
        Vector left = *(const Unaligned *)b, right = *(const Unaligned *)(b + LANES);
        _Pragma("GCC unroll 16") for (int i = 0; i < rows; i++) {
            sum[i][0] = add_multiplied(sum[i][0], a[i], left, half);
            sum[i][1] = add_multiplied(sum[i][1], a[i], right, half);
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
INLINE void copy(int n, int half, float *restrict strip, Matrix x, Size deep) {
    if (!half) {
        for (Size k = 0; k < deep; k++) memcpy(strip + k * n, x.at + k * x.column, n * sizeof(float));
        return;
    }
    for (Size k = 0; k < deep; k += 2) {
        float even[WIDE] = {0}, odd[WIDE] = {0};
        memcpy(even, x.at + k * x.column, n * sizeof(float));
        if (k + 1 < deep) memcpy(odd, x.at + (k + 1) * x.column, n * sizeof(float));
        for (int i = 0; i < n; i += LANES) { /* what it writes beyond n, the next line overwrites */
            Vector found = pair(*(Unaligned *)(even + i), *(Unaligned *)(odd + i));
            *(Unaligned *)(strip + k / 2 * n + i) = found;
        }
    }
}

typedef void Multiply(const float *, const float *, Size, Size, float *, Size, float, int);
typedef void Copy(float *, Matrix, Size);

#define KERNEL(rows, half, name) \
    static void multiply_##name(const float *a, const float *b, Size b_step, Size deep, float *c, Size c_row, \
                                float alpha, int add) { \
        multiply(rows, half, a, b, b_step, deep, c, c_row, alpha, add); \
    } \
    static void copy_##name(float *strip, Matrix x, Size deep) { copy(rows, half, strip, x, deep); }
#define KERNELS(rows) KERNEL(rows, 0, rows) KERNEL(rows, 1, rows##_half)
KERNELS(1) KERNELS(2) KERNELS(3) KERNELS(4) KERNELS(5) KERNELS(6) KERNELS(7)
KERNELS(8) KERNELS(9) KERNELS(10) KERNELS(11) KERNELS(12) KERNELS(13) KERNELS(14)

#define EACH(name) \
    {NULL, name(1), name(2), name(3), name(4), name(5), name(6), name(7), name(8), name(9), name(10), name(11), name(12), \
     name(13), name(14)}
#define MULTIPLY(rows) multiply_##rows
#define MULTIPLY_HALF(rows) multiply_##rows##_half
#define COPY(rows) copy_##rows
#define COPY_HALF(rows) copy_##rows##_half
static Multiply *const multiplies[2][TALL + 1] = {EACH(MULTIPLY), EACH(MULTIPLY_HALF)};
static Copy *const copies[2][TALL + 1] = {EACH(COPY), EACH(COPY_HALF)};

/* -- a product of so few rows that nothing is copied: each row of b, whose numbers lie together, meets them all */

static float dot(const float *w, const float *x, Size n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (Size d = 0; d < n; d++) sum += w[d] * x[d];
    return sum;
}

static int is_of_few(Matrix a, Matrix b, Size M, int half) {
    return !half && M <= FEW && a.column == 1 && b.column == 1;
}

/* As product, below. */
static void product_of_few(float *c, Size c_row, Matrix a, Matrix b, Size M, Size N, Size K, float alpha, int add) {
    Size n = 0;
    for (; n + LANES <= N; n += LANES)
        for (Size m = 0; m < M; m++) {
            Vector y = alpha * dots(b.at + n * b.row, b.row, a.at + m * a.row, K);
            Unaligned *to = (Unaligned *)(c + m * c_row + n);
            *to = add ? *to + y : y;
        }
    for (; n < N; n++)
        for (Size m = 0; m < M; m++) {
            float *to = c + m * c_row + n, y = alpha * dot(b.at + n * b.row, a.at + m * a.row, K);
            *to = add ? *to + y : y;
        }
}

/* -- one product, by one thread */

static _Thread_local struct {
    _Alignas(64) float a[TALL * DEEP + LANES], b[BROAD * DEEP + LANES], edge[TALL * WIDE];
} scratch;

static void pack_strip(float *strip, Matrix x, Size n, Size deep, int half) {
    if (x.row == 1) copies[half][n](strip, x, deep);
    else if (half) pack(strip, x, n, n, deep, 1);
    else pack(strip, x, n, n, deep, 0);
}

static void pack_columns(float *strip, Matrix b, Size n, Size deep, int half) {
    if (b.row == 1 && n == WIDE) copy(WIDE, half, strip, b, deep);
    else if (half) pack(strip, b, n, WIDE, deep, 1);
    else pack(strip, b, n, WIDE, deep, 0);
}

/* A strip of rows of c, for columns that are packed, or that lie in order as they are. */
static void multiply_strip(float *c, Size c_row, Size rows, Matrix b, int packed, Size columns, Size deep, float alpha,
                           int add, int half) {
    Size n_cells = cells_of(deep, half);
    for (Size n = 0; n < columns; n += WIDE) {
        Size wide = least(WIDE, columns - n);
        const float *strip = scratch.b + n * n_cells;
        if (wide == WIDE) {
            const float *from = packed ? strip : b.at + n;
            multiplies[half][rows](scratch.a, from, packed ? WIDE : b.column, n_cells, c + n, c_row, alpha, add);
            continue;
        }
        multiplies[half][rows](scratch.a, strip, WIDE, n_cells, scratch.edge, WIDE, alpha, 0);
        for (Size i = 0; i < rows; i++)
            for (Size j = 0; j < wide; j++)
                c[i * c_row + n + j] = scratch.edge[i * WIDE + j] + (add ? c[i * c_row + n + j] : 0);
    }
}

/* b by its columns: (N, K). */
static void product(float *c, Size c_row, Matrix a, Matrix b, Size M, Size N, Size K, float alpha, int add, int half) {
    Size n_strips = (M + TALL - 1) / TALL, deepest = half ? 2 * DEEP : DEEP;
    int packed = half || b.row != 1 || n_strips > 1; /* what is read once is read where it lies */
    if (K == 0 && !add)
        for (Size i = 0; i < M; i++) memset(c + i * c_row, 0, N * sizeof(float));
    for (Size k = 0; k < K; k += deepest) {
        Size deep = least(deepest, K - k), n_cells = cells_of(deep, half);
        for (Size first = 0; first < N; first += BROAD) {
            Size columns = least(BROAD, N - first);
            for (Size n = packed ? 0 : columns / WIDE * WIDE; n < columns; n += WIDE)
                pack_columns(scratch.b + n * n_cells, part(b, first + n, k), least(WIDE, columns - n), deep, half);
            for (Size strip = 0; strip < n_strips; strip++) {
                Size m = M * strip / n_strips, rows = M * (strip + 1) / n_strips - m;
                pack_strip(scratch.a, part(a, m, k), rows, deep, half);
                multiply_strip(c + m * c_row + first, c_row, rows, part(b, first, k), packed, columns, deep, alpha,
                               add || k, half);
            }
        }
    }
}
