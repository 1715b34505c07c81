/* Attention of one token to a cache, which it writes its own row to.
 *
 * What a head finds in rows is kept as (sum of weights times values, greatest score, sum of weights), which can be
 * merged; so each worker reads a part of the context, for all heads, and convolves what it reads once.
 */
#pragma once
#include "team.h"

enum { CHUNK = 32 }; /* context rows that are read at a time */

/* y[i] = sum over j of taps[j] * rows[first + i - j] for rows of n channels; nothing stands before row 0. */
static void convolve(float *restrict y, Size y_width, const float *restrict rows, Size n, const float *restrict taps,
                     Size n_taps, Size taps_width, Size first, Size n_rows) {
    for (Size i = 0; i < n_rows; i++, y += y_width) {
        const float *restrict row = rows + (first + i) * n;
        for (Size d = 0; d < n; d += LANES) __builtin_prefetch(row + CHUNK * n + d); /* past the end it does no harm */
        for (Size d = 0; d < n; d++) y[d] = taps[d] * row[d];
        for (Size j = 1; j < n_taps && j <= first + i; j++)
            for (Size d = 0; d < n; d++) y[d] += taps[j * taps_width + d] * row[d - j * n];
    }
}

/* y = rescale y + weights of n rows times the rows; all widths are multiples of LANES. */
static void add_rows(float *restrict y, const float *restrict weights, const float *restrict rows, Size row_width,
                     Size width, Size n, float rescale) {
    for (Size at = 0; at < width; at += LANES) {
        float sum[LANES];
        const float *restrict r = rows + at;
        Size i = 0;
        for (Size d = 0; d < LANES; d++) sum[d] = y[at + d] * rescale;
        for (; i + 4 <= n; i += 4, r += 4 * row_width)
            for (Size d = 0; d < LANES; d++)
                sum[d] += (weights[i] * r[d] + weights[i + 1] * r[row_width + d]) +
                          (weights[i + 2] * r[2 * row_width + d] + weights[i + 3] * r[3 * row_width + d]);
        for (; i < n; i++, r += row_width)
            for (Size d = 0; d < LANES; d++) sum[d] += weights[i] * r[d];
        for (Size d = 0; d < LANES; d++) y[at + d] = sum[d];
    }
}

/* Heads from `head` to `end_head` read rows lo to hi: each group's rows are convolved once, for all its heads. */
static void attend(Worker *w, const Block *block, const float *queries, const Slot *rows, Size head, Size end_head,
                   Size lo, Size hi) {
    Team *team = w->team;
    const Model *m = &team->model;
    Size per_group = m->H / m->G, key_width = team->key_width, taps_width = m->G * m->D;
    Size value_row = m->mla ? key_width : team->value_width;
    const float *values = m->mla ? w->keys : w->values;
    float scores[CHUNK];
    for (Size next; head < end_head && lo < hi; head = next) {
        Size group = head / per_group, tap = group * m->D, at = tap * rows->capacity;
        next = (group + 1) * per_group < end_head ? (group + 1) * per_group : end_head;
        for (Size row = lo; row < hi; row += CHUNK) {
            Size n = hi - row < CHUNK ? hi - row : CHUNK;
            convolve(w->keys, key_width, rows->first + at, m->D, block->k_taps + tap, block->n_taps, taps_width, row, n);
            if (m->mla)
                for (Size i = 0; i < n; i++)
                    memcpy(w->keys + i * key_width + m->D, rows->second + (row + i) * m->P, m->P * sizeof(float));
            else
                convolve(w->values, value_row, rows->second + at, m->D, block->v_taps + tap, block->n_taps, taps_width,
                         row, n);
            for (Size h = head; h < next; h++) {
                float *found = team->partial + (w->id * m->H + h) * (team->value_width + LANES);
                float *greatest = found + team->value_width, *total = greatest + 1, top = *greatest, sum = 0;
                product(scores, w->keys, queries + h * key_width, key_width, 0, n);
                for (Size i = 0; i < n; i++) top = scores[i] > top ? scores[i] : top;
                float rescale = exponential(*greatest - top);
                for (Size i = 0; i < n; i++) scores[i] = exponential(scores[i] - top);
                for (Size i = 0; i < n; i++) sum += scores[i];
                add_rows(found, scores, values, value_row, team->value_width, n, rescale);
                *total = *total * rescale + sum;
                *greatest = top;
            }
        }
    }
}

/* Attention of this worker to its part of rows 0 to `last`, into its own `partial`. */
static void attend_part(Worker *w, const Block *block, const float *queries, const Slot *rows, Size last) {
    Team *team = w->team;
    const Model *m = &team->model;
    Size chunks = last / CHUNK + 1;
    Size lo = chunks * w->id / team->n * CHUNK, hi = chunks * (w->id + 1) / team->n * CHUNK;
    Size near = last + 1 - block->window;
    if (hi > last + 1) hi = last + 1;
    for (Size h = 0; h < m->H; h++) {
        float *found = team->partial + (w->id * m->H + h) * (team->value_width + LANES);
        memset(found, 0, team->value_width * sizeof(float));
        found[team->value_width] = -1e30f;
        found[team->value_width + 1] = 0;
    }
    attend(w, block, queries, rows, 0, block->n_local, near > lo ? near : lo, hi);
    attend(w, block, queries, rows, block->n_local, m->H, lo, hi);
}

/* What a head found in all workers' parts: (width). */
static void merge(const Worker *w, Size head, float *y, Size width) {
    Team *team = w->team;
    Size stride = team->model.H * (team->value_width + LANES), at = team->value_width;
    const float *found = team->partial + head * (team->value_width + LANES);
    float top = -1e30f, total = 0;
    for (Size t = 0; t < team->n; t++) top = found[t * stride + at] > top ? found[t * stride + at] : top;
    for (Size t = 0; t < team->n; t++) total += found[t * stride + at + 1] * exponential(found[t * stride + at] - top);
    memset(y, 0, width * sizeof(float));
    for (Size t = 0; t < team->n; t++) {
        float factor = exponential(found[t * stride + at] - top) / total;
        for (Size d = 0; d < width; d++) y[d] += factor * found[t * stride + d];
    }
}

/* From the normed input to w->mixed (H V), which the output projection reads. The last worker reads the last row, and
 * so is the one that writes it. */
static void attention_gqa(Worker *w, const Block *block, const Slot *rows, Size position) {
    Team *team = w->team;
    const Model *m = &team->model;
    Size D = m->D;
    shared_product(w, team->y, block->w_in, w->normed, m->dim, (m->H + 2 * m->G) * D);
    barrier(team);
    for (Size h = 0; h < m->H; h++)
        turn(w->queries + h * team->key_width, team->y + h * D, w->turns, D, m->score_scale);
    if (w->id == team->n - 1) {
        for (Size g = 0; g < m->G; g++) {
            Size at = (g * rows->capacity + position) * D;
            turn(rows->first + at, team->y + (m->H + g) * D, w->turns, D, 1.0f);
            memcpy(rows->second + at, team->y + (m->H + m->G + g) * D, D * sizeof(float));
        }
    }
    attend_part(w, block, w->queries, rows, position);
    barrier(team);
    for (Size h = 0; h < m->H; h++) merge(w, h, w->mixed + h * D, D);
}

static void attention_mla(Worker *w, const Block *block, const Slot *rows, Size position) {
    Team *team = w->team;
    const Model *m = &team->model;
    Size R = m->D, width = m->N + m->P, first = m->H * w->id / team->n, end = m->H * (w->id + 1) / team->n;
    shared_product(w, team->y, block->w_in, w->normed, m->dim, m->Q + R + m->P);
    barrier(team);
    rms_norm(w->hidden, team->y, NULL, m->Q, m->eps);
    shared_product(w, team->q, block->w_q, w->hidden, m->Q, m->H * width);
    barrier(team);
    for (Size h = first; h < end; h++) {
        float *query = team->absorbed + h * team->key_width, *q = team->q + h * width;
        product(query, block->up_k + h * R * m->N, q, m->N, 0, R);
        for (Size i = 0; i < R; i++) query[i] *= m->score_scale;
        turn(query + R, q + m->N, w->turns, m->P, m->score_scale);
    }
    if (w->id == team->n - 1) {
        rms_norm(rows->first + position * R, team->y + m->Q, block->kv_norm, R, m->eps);
        turn(rows->second + position * m->P, team->y + m->Q + R, w->turns, m->P, 1.0f);
    }
    barrier(team);
    attend_part(w, block, team->absorbed, rows, position);
    barrier(team);
    for (Size h = first; h < end; h++) {
        merge(w, h, w->hidden, R);
        product(team->y + h * m->V, block->up_v + h * m->V * R, w->hidden, R, 0, m->V);
    }
    barrier(team);
    memcpy(w->mixed, team->y, m->H * m->V * sizeof(float));
}
