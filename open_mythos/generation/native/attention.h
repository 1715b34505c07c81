/* Attention of one token to a cache, which it writes its own row to.
 *
 * What a head finds in rows is kept as (sum of weights times values, greatest score, sum of weights), which can be
 * merged; so each worker reads a part of the context, for all heads.
 */
#pragma once
#include "pool.h"

enum { CHUNK = 32 }; /* context rows that are read at a time, by all heads of a group while they are in a cache near by */

/* The part of one row of the batch, final rows from its first real token on: there, nothing knows of padding. */
static Slot slot_of_row(const Worker *w, const Slot *slot, Size row) {
    const Model *m = &w->pool->model;
    float *raw = slot->raw ? slot->raw + row * m->ring * m->G * m->W : NULL;
    return (Slot){slot->rows + (row * m->G * slot->room + w->start) * m->W, raw, slot->room};
}

/* The raw row of the token so many before the new one. */
static float *raw_row(const Worker *w, const Slot *slot, Size back) {
    const Model *m = &w->pool->model;
    return slot->raw ? slot->raw + (w->pool->step.position - back) % m->ring * m->G * m->W : w->raw;
}

/* The new token's final row, from its raw one and those before it. */
static void convolve(const Worker *w, const Block *block, const Slot *slot) {
    const Model *m = &w->pool->model;
    const float *raw = raw_row(w, slot, 0);
    for (Size g = 0; g < m->G; g++) {
        float *restrict row = slot->rows + (g * slot->room + w->position) * m->W;
        if (m->n_taps) memset(row, 0, m->W * sizeof(float));
        else memcpy(row, raw + g * m->W, m->W * sizeof(float));
        for (Size j = 0; j < m->n_taps && j <= w->position; j++) {
            const float *restrict taps = block->taps + (j * m->G + g) * m->W;
            const float *restrict before = raw_row(w, slot, j) + g * m->W;
            for (Size d = 0; d < m->W; d++) row[d] += taps[d] * before[d];
        }
    }
}

/* Heads from `head` to `end_head` read rows lo to hi. */
static void attend(Worker *w, const float *queries, const Slot *slot, Size head, Size end_head, Size lo, Size hi) {
    WorkerPool *pool = w->pool;
    const Model *m = &pool->model;
    Size per_group = m->H / m->G;
    float scores[CHUNK];
    for (Size next; head < end_head && lo < hi; head = next) {
        Size group = head / per_group;
        next = (group + 1) * per_group < end_head ? (group + 1) * per_group : end_head;
        for (Size at = lo; at < hi; at += CHUNK) {
            Size n = hi - at < CHUNK ? hi - at : CHUNK;
            const float *rows = slot->rows + (group * slot->room + at) * m->W;
            for (Size d = 0; d < CHUNK * m->W; d += 16) __builtin_prefetch(rows + CHUNK * m->W + d); /* or past the end */
            for (Size h = head; h < next; h++) {
                float *partial = pool->partial + (w->id * m->H + h) * pool->partial_width;
                float *greatest = partial + m->D, *total = greatest + 1, top = *greatest, sum = 0;
                memset(scores, 0, sizeof scores);
                add_product_of(scores, rows, m->W, queries + h * m->K, m->K, 0, n);
                for (Size i = 0; i < n; i++) top = scores[i] > top ? scores[i] : top;
                float rescale = exponential(*greatest - top);
                for (Size i = 0; i < n; i++) scores[i] = exponential(scores[i] - top);
                for (Size i = 0; i < n; i++) sum += scores[i];
                add_rows(partial, scores, rows + m->value_at, m->W, m->D, n, rescale);
                *total = *total * rescale + sum;
                *greatest = top;
            }
        }
    }
}

/* Attention of this worker to its part of rows 0 to `last`, into its own `partial`. */
static void attend_part(Worker *w, const Block *block, const float *queries, const Slot *slot, Size last) {
    WorkerPool *pool = w->pool;
    const Model *m = &pool->model;
    Size chunks = last / CHUNK + 1;
    Size lo = chunks * w->id / pool->n * CHUNK, hi = chunks * (w->id + 1) / pool->n * CHUNK;
    Size near = last + 1 - block->window;
    if (hi > last + 1) hi = last + 1;
    for (Size h = 0; h < m->H; h++) {
        float *partial = pool->partial + (w->id * m->H + h) * pool->partial_width;
        memset(partial, 0, (m->D + 2) * sizeof(float));
        partial[m->D] = -1e30f;
    }
    attend(w, queries, slot, 0, block->n_local, near > lo ? near : lo, hi);
    attend(w, queries, slot, block->n_local, m->H, lo, hi);
}

/* What a head found in all workers' parts: (D). */
static void merge(const Worker *w, Size head, float *y) {
    WorkerPool *pool = w->pool;
    Size D = pool->model.D, stride = pool->model.H * pool->partial_width;
    const float *partial = pool->partial + head * pool->partial_width;
    float top = -1e30f, total = 0;
    for (Size t = 0; t < pool->n; t++) top = partial[t * stride + D] > top ? partial[t * stride + D] : top;
    for (Size t = 0; t < pool->n; t++)
        total += partial[t * stride + D + 1] * exponential(partial[t * stride + D] - top);
    memset(y, 0, D * sizeof(float));
    for (Size t = 0; t < pool->n; t++) {
        float factor = exponential(partial[t * stride + D] - top) / total;
        for (Size d = 0; d < D; d++) y[d] += factor * partial[t * stride + d];
    }
}

/* From the normed input to w->attended (H V), which the output projection reads. The last worker reads the last row,
 * and so is the one that writes it. */
static void attention_gqa(Worker *w, const Block *block, const Slot *slot) {
    WorkerPool *pool = w->pool;
    const Model *m = &pool->model;
    Size D = m->D;
    const float *queries = pool->y, *keys = queries + m->H * D, *values = keys + m->G * D;
    shared_product(w, pool->y, block->w_in, w->normed, m->dim, (m->H + 2 * m->G) * D);
    barrier(pool);
    for (Size h = 0; h < m->H; h++) rotate(w->queries + h * D, queries + h * D, w->rotary, D, m->score_scale);
    if (w->id == pool->n - 1) {
        float *raw = raw_row(w, slot, 0);
        for (Size g = 0; g < m->G; g++) {
            rotate(raw + g * m->W, keys + g * D, w->rotary, D, 1.0f);
            memcpy(raw + g * m->W + D, values + g * D, D * sizeof(float));
        }
        convolve(w, block, slot);
    }
    attend_part(w, block, w->queries, slot, w->position);
    barrier(pool);
    for (Size h = 0; h < m->H; h++) merge(w, h, w->attended + h * D);
}

/* The same by latents, which are keys and values of all heads at once: queries and outputs are expanded in their place. */
static void attention_mla(Worker *w, const Block *block, const Slot *slot) {
    WorkerPool *pool = w->pool;
    const Model *m = &pool->model;
    Size D = m->D, width = m->N + m->P, first = m->H * w->id / pool->n, end = m->H * (w->id + 1) / pool->n;
    shared_product(w, pool->y, block->w_in, w->normed, m->dim, m->Q + D + m->P);
    barrier(pool);
    rms_norm(w->hidden, pool->y, NULL, m->Q, m->eps);
    shared_product(w, pool->q, block->w_q, w->hidden, m->Q, m->H * width);
    barrier(pool);
    for (Size h = first; h < end; h++) {
        float *query = pool->absorbed + h * m->K, *q = pool->q + h * width;
        product(query, block->up_k + h * D * m->N, q, m->N, 0, D);
        for (Size i = 0; i < D; i++) query[i] *= m->score_scale;
        rotate(query + D, q + m->N, w->rotary, m->P, m->score_scale);
    }
    if (w->id == pool->n - 1) {
        float *raw = raw_row(w, slot, 0);
        rms_norm(raw, pool->y + m->Q, block->kv_norm, D, m->eps);
        rotate(raw + D, pool->y + m->Q + D, w->rotary, m->P, 1.0f);
        convolve(w, block, slot);
    }
    barrier(pool);
    attend_part(w, block, pool->absorbed, slot, w->position);
    barrier(pool);
    for (Size h = first; h < end; h++) {
        merge(w, h, w->hidden);
        product(pool->y + h * m->V, block->up_v + h * m->V * D, w->hidden, D, 0, m->V);
    }
    barrier(pool);
    memcpy(w->attended, pool->y, m->H * m->V * sizeof(float));
}
