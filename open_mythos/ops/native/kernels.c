/* What open_mythos.ops calls, and how it is divided among PyTorch's threads. */
#include "attention.h"
#include "few.h"
#include "rows.h"

/* Whether products may be `half`. */
int mythos_has_half(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

/* c = alpha * a b, or that is added to c; a is (M, K), c (M, N), and b is given by its columns, (N, K), all by their
 * strides. With `half`, factors are rounded to bfloat16. */
void mythos_product(float *c, Size c_row, const float *a, Size a_row, Size a_column, const float *b, Size b_row,
                    Size b_column, Size M, Size N, Size K, float alpha, int add, int half, int threads) {
    Matrix left = {a, a_row, a_column}, right = {b, b_row, b_column};
    int rows_first = M / TALL >= N / WIDE;
    Size extent = rows_first ? M : N, unit = rows_first ? TALL : WIDE, units = (extent + unit - 1) / unit;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int p = 0; p < threads; p++) {
        Size lo = units * p / threads * unit, hi = least(units * (p + 1) / threads * unit, extent);
        if (lo >= hi) continue;
        if (rows_first) product(c + lo * c_row, c_row, part(left, lo, 0), right, hi - lo, N, K, alpha, add, half);
        else product(c + lo, c_row, left, part(right, lo, 0), M, hi - lo, K, alpha, add, half);
    }
}

/* c = x times the matrix of each row's group: the rows of x (.., K) and c (.., N) stand group behind group, up to
 * ends (E); w (E, N, K) by its strides. */
void mythos_grouped(float *c, const float *x, Size x_row, Size x_column, const float *w, Size w_each, Size w_row,
                    Size w_column, const int32_t *ends, Size E, Size N, Size K, int half, int threads) {
    Size parts = (2 * threads + E - 1) / E;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (Size task = 0; task < E * parts; task++) {
        Size e = task / parts, p = task % parts, start = e ? ends[e - 1] : 0, m = ends[e] - start;
        Size units = (m + TALL - 1) / TALL;
        Size lo = units * p / parts * TALL, hi = least(units * (p + 1) / parts * TALL, m);
        Matrix left = {x + (start + lo) * x_row, x_row, x_column}, right = {w + e * w_each, w_row, w_column};
        float *to = c + (start + lo) * N;
        if (lo >= hi) continue;
        if (is_of_few(left, right, m, half)) product_of_few(to, N, left, right, hi - lo, N, K, 1.0f, 0);
        else product(to, N, left, right, hi - lo, N, K, 1.0f, 0, half);
    }
}

/* c (E, M, N) = the sum of x^T y of each group's rows over U pairs of x (.., M) and y (.., N), or that is added to c. Pairs
 * go one behind the other, so that a matrix is brought from memory and back once for all of them. */
void mythos_outers(float *c, const float *const *x, const float *const *y, const int32_t *const *ends, Size U,
                       Size E, Size M, Size N, int add, int half, int threads) {
    Size parts = (2 * threads + E - 1) / E, units = (M + TALL - 1) / TALL;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (Size task = 0; task < E * parts; task++) {
        Size e = task / parts, p = task % parts;
        Size lo = units * p / parts * TALL, hi = least(units * (p + 1) / parts * TALL, M);
        for (Size u = 0; lo < hi && u < U; u++) {
            Size start = e ? ends[u][e - 1] : 0;
            product(c + (e * M + lo) * N, N, (Matrix){x[u] + start * M + lo, 1, M}, (Matrix){y[u] + start * N, 1, N},
                    hi - lo, N, ends[u][e] - start, 1.0f, add || u, half);
        }
    }
}

/* out (N, K) = the places of the K greatest of x (N, E) + bias (E), the greatest first; NaN is greater than all. */
void mythos_greatest(int64_t *out, const float *x, const float *bias, Size N, Size E, Size K, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (Size i = 0; i < N; i++) greatest(out + i * K, x + i * E, bias, E, K);
}

/* out (N, O) = scale x (N, I) times the rows of w (O, I), added to out or written there. */
void mythos_rows(float *out, const float *x, const float *w, Size N, Size I, Size O, float scale, int add,
                 int threads) {
    if (N > FEW) {
        mythos_product(out, O, x, I, 1, w, I, 1, N, O, I, scale, add, 0, threads);
        return;
    }
    Size units = (O + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int p = 0; p < threads; p++) {
        Size lo = units * p / threads * LANES, hi = least(units * (p + 1) / threads * LANES, O);
        product_of_few(out + lo, O, (Matrix){x, I, 1}, (Matrix){w + lo * I, I, 1}, N, hi - lo, I, scale, add);
    }
}

/* Forward by heads, backward by key heads, of which each has one writer. -1 if memory ran out, else 0. */
int mythos_attend(Attention *a, float scale, int backward, int threads) {
    int failed = 0;
    a->scale = scale;
    Size heads = backward ? a->G : a->H;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *scores = room_for(a);
        failed = !scores;
#pragma omp for schedule(dynamic, 1)
        for (Size task = 0; task < a->B * heads; task++)
            if (scores) (backward ? attend_backward : attend)(a, scores, task / heads, task % heads);
    }
    return -failed;
}

/* Rows (N, n) of all; weight may be NULL. */
void mythos_norm(float *y, const float *x, const float *weight, Size N, Size n, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (Size i = 0; i < N; i++) norm(y + i * n, x + i * n, weight, n, eps);
}

/* grad_weights (threads, n) are zero before, a row of each thread; weight, and then they, may be NULL. */
void mythos_norm_backward(float *grad_x, float *grad_weights, const float *grad, const float *x, const float *weight,
                          Size N, Size n, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++)
        for (Size i = N * thread / threads; i < N * (thread + 1) / threads; i++)
            norm_backward(grad_x + i * n, grad_weights ? grad_weights + thread * n : NULL, grad + i * n, x + i * n,
                          weight, n, eps);
}

/* Rows of n gates and ups, the next ones `step` floats on; factors (N) or NULL for 1. y is (N, n). */
void mythos_swiglu(float *y, const float *gate, const float *up, const float *factors, Size N, Size n, Size step,
                   int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Size i = 0; i < N; i++)
        swiglu(y + i * n, gate + i * step, up + i * step, n, factors ? factors[i] : 1.0f);
}

/* grad_gate and grad_up, in rows as gate and up, y (N, n) and grad_factors (N) are written. */
void mythos_swiglu_backward(float *grad_gate, float *grad_up, float *y, float *grad_factors, const float *grad,
                            const float *gate, const float *up, const float *factors, Size N, Size n, Size step,
                            int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Size i = 0; i < N; i++) {
        Size at = i * step;
        float sum = swiglu_backward(grad_gate + at, grad_up + at, y ? y + i * n : NULL, grad + i * n, gate + at,
                                    up + at, n, factors ? factors[i] : 1.0f);
        if (grad_factors) grad_factors[i] = sum;
    }
}

/* -1 if memory ran out, else 0. */
int mythos_attend_few(Few *a, float scale, int threads) {
    a->scale = scale;
    Size tasks = a->B * a->G, rows = a->S * tasks, step = padded(few_floats(a)), n = least(threads, rows / 512 + 1);
    Size parts = least(n, a->S / 256 + 1); /* key heads that all look near have nearly nothing to do */
    float *memory = NULL;
    if (posix_memalign((void **)&memory, 64, tasks * parts * step * sizeof(float))) return -1;
    memset(memory, 0, tasks * parts * step * sizeof(float));
#pragma omp parallel for num_threads(n) schedule(dynamic, 1) if (n > 1)
    for (Size task = 0; task < tasks * parts; task++) {
        Size which = task / parts, p = task % parts, chunks = (a->S + CHUNK - 1) / CHUNK;
        FewScratch s = few_scratch(a, memory + task * step);
        look_through(a, &s, which / a->G, which % a->G, chunks * p / parts * CHUNK,
                     least(chunks * (p + 1) / parts * CHUNK, a->S));
    }
    for (Size which = 0; which < tasks; which++)
        merge(a, memory + which * parts * step, step, parts, which / a->G, which % a->G);
    free(memory);
    return 0;
}

/* out (N, D) = sum over the K experts of each row of weight * down(silu(gate x) * up x); -1 if memory ran out. */
int mythos_experts_few(float *out, const float *x, const float *gate_up, const float *down, const int64_t *experts,
                       const float *weights, Size N, Size K, Size D, Size width, int threads) {
    Size each = padded(3 * width + D);
    float *memory = malloc(N * K * each * sizeof(float));
    if (!memory) return -1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (Size i = 0; i < N * K; i++) {
        float *hidden = memory + i * each, *act = hidden + 2 * width;
        times(hidden, gate_up + experts[i] * 2 * width * D, x + i / K * D, D, 2 * width);
        swiglu(act, hidden, hidden + width, width, weights[i]);
        times(act + width, down + experts[i] * D * width, act, width, D);
    }
    for (Size i = 0; i < N; i++)
        for (Size k = 0; k < K; k++) {
            const float *made = memory + (i * K + k) * each + 3 * width;
            for (Size d = 0; d < D; d++) out[i * D + d] = made[d] + (k ? out[i * D + d] : 0);
        }
    free(memory);
    return 0;
}

/* y (N, H, n) contiguous = heads of x, `x_step` floats from token to token, turned by turns (T, n), token i by those of
 * i % T; sign -1 turns back. */
void mythos_turn(float *y, const float *x, const float *turns, Size N, Size H, Size n, Size x_step, Size T, float sign,
                 int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (Size i = 0; i < N; i++)
        for (Size h = 0; h < H; h++)
            turn(y + (i * H + h) * n, x + i * x_step + h * n, turns + i % T * n, n, sign);
}

/* out (N), from states (N, n). */
void mythos_relative_change(float *out, const float *before, const float *after, Size N, Size n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (Size i = 0; i < N; i++) out[i] = relative_change(before + i * n, after + i * n, n);
}

/* The halting gate of states (N, n): out (N) = sigmoid(sharpness * (bias + halt . silu(seen) / sqrt(m))), where what m
 * hidden units have seen is scale * hidden x / rms(x) + motion * sharpness * log(change + finest); changes (N) may be
 * NULL. -1 if memory ran out. */
int mythos_ask(float *out, const float *x, const float *changes, const float *hidden, const float *motion,
               const float *halt, const float *bias, Size N, Size n, Size m, float finest, float scale,
               float sharpness, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed) if (threads > 1)
    {
        float *normed = malloc((n + m) * sizeof(float)), *seen = normed + n;
        failed = !normed;
#pragma omp for schedule(static)
        for (Size i = 0; i < N; i++) {
            float found = 0, moves = changes ? sharpness * logf(changes[i] + finest) : 0;
            if (!normed) continue;
            norm(normed, x + i * n, NULL, n, 1e-6f);
            times(seen, hidden, normed, n, m);
#pragma omp simd reduction(+ : found)
            for (Size j = 0; j < m; j++) {
                float unit = scale * seen[j] + moves * motion[j];
                found += halt[j] * unit / (1.0f + exponential(-unit));
            }
            out[i] = 1.0f / (1.0f + expf(-sharpness * (*bias + found / sqrtf((float)m))));
        }
        free(normed);
    }
    return -failed;
}
