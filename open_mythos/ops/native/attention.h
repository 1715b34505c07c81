/* Causal attention of many queries, forward and backward, for heads that see all and heads that see a window.
 *
 * A block of queries at a time, all of its scores are written; no more is kept for the backward pass than what came in.
 * There the weights are made again from the scores just as they were, so huge scores do no harm.
 */
#pragma once
#include "products.h"

enum { BLOCK = 64 };            /* queries at a time */
enum { SCORES = 1 << 17 };      /* numbers, and fewer queries where they would need more */

typedef struct {
    Rows q, k, v, out;          /* T, S, S and T tokens; H, G, G and H heads; D, D, V and V channels */
    Rows grad_q, grad_k, grad_v;/* to be written; out is then the gradient that came in */
    const uint8_t *valid;       /* (B, S), 0 at padding, or NULL */
    const int64_t *starts;      /* (B, S), where the document of each token starts, or NULL */
    Size B, T, S, H, G, D, V;
    Size n_local, window;       /* the first n_local heads see the last `window` keys alone */
    float scale;
} Attention;

static Matrix by_rows(const Rows *x, Size b, Size t, Size h) { return (Matrix){row_at(x, b, t, h), x->token, 1}; }
static Matrix by_columns(const Rows *x, Size b, Size t, Size h) { return (Matrix){row_at(x, b, t, h), 1, x->token}; }

/* The first key that the query at a position sees. */
static Size first_key(const Attention *a, Size b, Size h, Size position) {
    Size first = h < a->n_local && position + 1 > a->window ? position + 1 - a->window : 0;
    Size start = a->starts ? a->starts[b * a->S + position] : 0;
    return first > start ? first : start;
}

/* scores (n, width) of keys from `from` on become weights. */
static void weigh(const Attention *a, float *scores, Size width, Size b, Size h, Size t, Size n, Size from) {
    for (Size i = 0; i < n; i++, scores += width) {
        Size position = a->S - a->T + t + i, lo = first_key(a, b, h, position) - from, hi = position + 1 - from;
        float top = -FLT_MAX, total = 0;
        if (a->valid)
            for (Size j = lo; j < hi - 1; j++)
                if (!a->valid[b * a->S + from + j]) scores[j] = -FLT_MAX;
#pragma omp simd reduction(max : top)
        for (Size j = lo; j < hi; j++) top = scores[j] > top ? scores[j] : top;
#pragma omp simd reduction(+ : total)
        for (Size j = lo; j < hi; j++) {
            scores[j] = scores[j] == -FLT_MAX ? 0.0f : exponential(scores[j] - top);
            total += scores[j];
        }
        total = 1.0f / total;
        for (Size j = lo; j < hi; j++) scores[j] *= total;
        for (Size j = 0; j < lo; j++) scores[j] = 0;
        for (Size j = hi; j < width; j++) scores[j] = 0;
    }
}

/* How many queries from t on go together, and the keys that any of them sees: from *from on, *n_keys of them. */
static Size block_of(const Attention *a, Size b, Size h, Size t, Size *from, Size *n_keys) {
    Size before = a->S - a->T + t, n = least(a->T - t, BLOCK);
    *from = first_key(a, b, h, before); /* no later query sees more: documents and windows move on */
    while (n > TALL && n * (before + n - *from) > SCORES) n -= TALL;
    *n_keys = before + n - *from;
    return n;
}

static Size room_of_one(const Attention *a) { return (a->S * TALL > SCORES ? a->S * TALL : SCORES) + LANES; }

/* Room for the scores of two blocks, kept by each thread; NULL if memory ran out. */
static float *room_for(const Attention *a) {
    static _Thread_local float *room;
    static _Thread_local Size held;
    Size needed = 2 * room_of_one(a);
    if (held < needed) {
        free(room);
        held = posix_memalign((void **)&room, 64, needed * sizeof(float)) ? 0 : needed;
        if (!held) room = NULL;
    }
    return room;
}

/* One head of one row. */
static void attend(const Attention *a, float *scores, Size b, Size h) {
    Size g = h / (a->H / a->G), from, n_keys, n;
    for (Size t = 0; t < a->T; t += n) {
        n = block_of(a, b, h, t, &from, &n_keys);
        product(scores, n_keys, by_rows(&a->q, b, t, h), by_rows(&a->k, b, from, g), n, n_keys, a->D, a->scale, 0, 0);
        weigh(a, scores, n_keys, b, h, t, n, from);
        product(row_at(&a->out, b, t, h), a->out.token, (Matrix){scores, n_keys, 1}, by_columns(&a->v, b, from, g), n,
                a->V, n_keys, 1.0f, 0, 0);
    }
}

/* All heads that read one key head of one row; its gradients are zero before. */
static void attend_backward(const Attention *a, float *scores, Size b, Size g) {
    float *grads = scores + room_of_one(a);
    Size from, n_keys, n;
    for (Size h = g * (a->H / a->G); h < (g + 1) * (a->H / a->G); h++)
        for (Size t = 0; t < a->T; t += n) {
            n = block_of(a, b, h, t, &from, &n_keys);
            Matrix weights = {scores, 1, n_keys}, grad_scores = {grads, 1, n_keys};
            product(scores, n_keys, by_rows(&a->q, b, t, h), by_rows(&a->k, b, from, g), n, n_keys, a->D, a->scale, 0, 0);
            weigh(a, scores, n_keys, b, h, t, n, from);
            product(row_at(&a->grad_v, b, from, g), a->grad_v.token, weights, by_columns(&a->out, b, t, h), n_keys,
                    a->V, n, 1.0f, 1, 0);
            product(grads, n_keys, by_rows(&a->out, b, t, h), by_rows(&a->v, b, from, g), n, n_keys, a->V, 1.0f, 0, 0);
            for (Size i = 0; i < n; i++) {
                float *restrict grad = grads + i * n_keys, *restrict weight = scores + i * n_keys, sum = 0;
#pragma omp simd reduction(+ : sum)
                for (Size j = 0; j < n_keys; j++) sum += weight[j] * grad[j];
                for (Size j = 0; j < n_keys; j++) grad[j] = weight[j] * (grad[j] - sum);
            }
            product(row_at(&a->grad_q, b, t, h), a->grad_q.token, (Matrix){grads, n_keys, 1},
                    by_columns(&a->k, b, from, g), n, a->D, n_keys, a->scale, 0, 0);
            product(row_at(&a->grad_k, b, from, g), a->grad_k.token, grad_scores, by_columns(&a->q, b, t, h), n_keys,
                    a->D, n, a->scale, 1, 0);
        }
}
