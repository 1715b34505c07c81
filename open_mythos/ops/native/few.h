/* What decoding does with a few new tokens: attention to a cache whose rows have still to be convolved, and experts.
 *
 * Rows of the cache are read once, a chunk at a time: convolved for one key head, and then met by all queries of the
 * heads that read it. What a query finds is kept as (sum of weights times values, greatest score, sum of weights), which
 * can be rescaled and merged, so that threads can read parts of the context.
 */
#pragma once
#include "products.h"

enum { CHUNK = 2 * LANES };     /* rows of the context at a time */

typedef struct {
    Rows q, k, v, out;          /* T, S, S and T tokens; H, G, G and H heads; D, D, V and V channels */
    Rows q_beside, k_beside;    /* P more channels of the scores, which are not convolved; P may be 0 */
    const float *k_taps, *v_taps;/* (n_taps, G, D) and (n_taps, G, V); n_taps may be 1 */
    const uint8_t *valid;       /* (B, S), 0 at padding, or NULL */
    Size B, T, S, H, G, D, V, P, n_taps, n_local, window;
    Size same;                  /* values are the keys */
    float scale;
} Few;

typedef struct { float *query, *keys, *values, *found; } FewScratch;

/* 16 channels of convolve, below, with as many taps as are known when it is compiled. */
INLINE void convolve_lanes(int n_taps, float *restrict to, Size width, const float *restrict rows, Size step,
                           const float *restrict taps, Size taps_step, Size first, Size n) {
    Vector tap[4], seen[4];
    _Pragma("GCC unroll 4") for (int j = 0; j < n_taps; j++) {
        tap[j] = *(const Unaligned *)(taps + j * taps_step);
        seen[j] = j && j <= first ? *(const Unaligned *)(rows + (first - j) * step) : (Vector){0};
    }
    for (Size i = 0; i < n; i++, to += width) {
        const float *row = rows + (first + i) * step;
        seen[0] = *(const Unaligned *)row;
        __builtin_prefetch(row + CHUNK * step); /* past the end it does no harm */
        Vector sum = tap[0] * seen[0];
        _Pragma("GCC unroll 4") for (int j = n_taps - 1; j > 0; j--) {
            sum += tap[j] * seen[j];
            seen[j] = seen[j - 1];
        }
        *(Unaligned *)to = sum;
    }
}

/* to[i] = sum over j of taps[j] * row first + i - j, for n rows; nothing stands before row 0. */
static void convolve(float *restrict to, Size width, const float *restrict rows, Size step, const float *restrict taps,
                     Size n_taps, Size taps_step, Size channels, Size first, Size n) {
    Size done = 0;
    for (; n_taps <= 4 && done + LANES <= channels; done += LANES)
        switch (n_taps) {
            case 1: convolve_lanes(1, to + done, width, rows + done, step, taps + done, taps_step, first, n); break;
            case 2: convolve_lanes(2, to + done, width, rows + done, step, taps + done, taps_step, first, n); break;
            case 3: convolve_lanes(3, to + done, width, rows + done, step, taps + done, taps_step, first, n); break;
            case 4: convolve_lanes(4, to + done, width, rows + done, step, taps + done, taps_step, first, n); break;
        }
    for (Size i = 0; done < channels && i < n; i++, to += width) {
        const float *restrict row = rows + (first + i) * step;
        for (Size d = done; d < channels; d++) to[d] = taps[d] * row[d];
        for (Size j = 1; j < n_taps && j <= first + i; j++)
            for (Size d = done; d < channels; d++) to[d] += taps[j * taps_step + d] * row[d - j * step];
    }
}

/* y = rescale y + sum of weights times rows; width is a multiple of LANES. */
static void add_rows(float *y, const float *weights, const float *rows, Size width, Size n, float rescale) {
    for (Size at = 0; at < width; at += LANES) {
        Vector sum[4] = {*(Unaligned *)(y + at) * rescale};
        Size i = 0;
        for (; i + 4 <= n; i += 4)
            _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++)
                sum[j] += weights[i + j] * *(const Unaligned *)(rows + (i + j) * width + at);
        for (; i < n; i++) sum[0] += weights[i] * *(const Unaligned *)(rows + i * width + at);
        *(Unaligned *)(y + at) = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
}

static Size key_width(const Few *a) { return padded(a->D + a->P); }
static Size value_width(const Few *a) { return a->same ? key_width(a) : padded(a->V); }
static Size found_width(const Few *a) { return value_width(a) + LANES; } /* behind the sum: greatest score, total */

/* e^(x - top) in every lane of `seen`, and 0 in the others. */
INLINE Vector weights(Vector x, float top, __mmask16 seen) {
    Vector y = x - top;
    for (Size i = 0; i < LANES; i++) y[i] = exponential(y[i]);
    return (Vector)_mm512_maskz_mov_ps(seen, (__m512)y);
}

/* One query looks at rows first + lo to first + hi, which are in scratch; at its own, first + own, even in padding. */
static void look(const Few *a, const FewScratch *s, const float *query, float *found, Size b, Size first, Size lo,
                 Size hi, Size own) {
    Size width = key_width(a), at = value_width(a);
    uint32_t seen = (uint32_t)(((uint64_t)1 << hi) - ((uint64_t)1 << lo));
    if (a->valid)
        for (Size i = lo; i < hi; i++)
            if (!a->valid[b * a->S + first + i] && i != own) seen &= ~((uint32_t)1 << i);
    if (!seen) return;
    __mmask16 low = seen & 0xffff, high = seen >> 16;
    Vector near = dots(s->keys, width, query, width), far = dots(s->keys + LANES * width, width, query, width);
    __m512 none = _mm512_set1_ps(-FLT_MAX);
    float top = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_mask_mov_ps(none, low, (__m512)near),
                                                   _mm512_mask_mov_ps(none, high, (__m512)far)));
    if (found[at] > top) top = found[at];
    near = weights(near, top, low), far = weights(far, top, high);
    float scores[CHUNK], rescale = found[at] == -FLT_MAX ? 0.0f : exponential(found[at] - top);
    *(Unaligned *)scores = near, *(Unaligned *)(scores + LANES) = far;
    add_rows(found, scores + lo, s->values + lo * at, at, hi - lo, rescale);
    found[at] = top;
    found[at + 1] = found[at + 1] * rescale + _mm512_reduce_add_ps((__m512)(near + far));
}

/* All queries of the heads that read key head g, and rows from `start` to `end`. found: (T, heads, found_width). */
static void look_through(const Few *a, const FewScratch *s, Size b, Size g, Size start, Size end) {
    Size heads = a->H / a->G, width = key_width(a), at = value_width(a), step = found_width(a);
    Size first_head = g * heads, near = a->S - a->T + 1 - a->window; /* of the first query's window */
    for (Size i = 0; i < a->T * heads; i++) {
        Size t = i / heads, h = first_head + i % heads;
        const float *q = row_at(&a->q, b, t, h);
        for (Size d = 0; d < a->D; d++) s->query[i * width + d] = q[d] * a->scale;
        if (a->P) q = row_at(&a->q_beside, b, t, h);
        for (Size d = 0; d < a->P; d++) s->query[i * width + a->D + d] = q[d] * a->scale;
        memset(s->found + i * step, 0, step * sizeof(float));
        s->found[i * step + at] = -FLT_MAX;
    }
    if (first_head + heads <= a->n_local && near > start) start = near; /* nobody looks further back */
    for (Size row = start; row < end; row += CHUNK) {
        Size n = least(CHUNK, end - row);
        convolve(s->keys, width, row_at(&a->k, b, 0, g), a->k.token, a->k_taps + g * a->D, a->n_taps, a->G * a->D, a->D,
                 row, n);
        for (Size i = 0; a->P && i < n; i++)
            memcpy(s->keys + i * width + a->D, row_at(&a->k_beside, b, row + i, g), a->P * sizeof(float));
        if (!a->same)
            convolve(s->values, at, row_at(&a->v, b, 0, g), a->v.token, a->v_taps + g * a->V, a->n_taps, a->G * a->V,
                     a->V, row, n);
        for (Size i = 0; i < a->T * heads; i++) {
            Size position = a->S - a->T + i / heads;
            Size lo = first_head + i % heads < a->n_local ? position + 1 - a->window - row : 0;
            Size hi = least(position + 1 - row, n);
            if (lo < 0) lo = 0;
            if (lo < hi) look(a, s, s->query + i * width, s->found + i * step, b, row, lo, hi, position - row);
        }
    }
}

static Size few_floats(const Few *a) {
    Size each = a->T * (a->H / a->G);
    return each * key_width(a) + CHUNK * (key_width(a) + value_width(a)) + each * found_width(a);
}

static FewScratch few_scratch(const Few *a, float *memory) {
    Size each = a->T * (a->H / a->G);
    float *keys = memory + each * key_width(a), *values = keys + CHUNK * key_width(a);
    return (FewScratch){memory, keys, a->same ? keys : values, values + CHUNK * value_width(a)};
}

/* What all parts of the context gave the queries of one key head; part p's scratch lies p times `step` floats on. */
static void merge(const Few *a, float *memory, Size step, Size parts, Size b, Size g) {
    Size heads = a->H / a->G, at = value_width(a);
    for (Size i = 0; i < a->T * heads; i++) {
        float *out = row_at(&a->out, b, i / heads, g * heads + i % heads), top = -FLT_MAX, total = 0;
        for (Size p = 0; p < parts; p++) {
            const float *found = few_scratch(a, memory + p * step).found + i * found_width(a);
            top = found[at] > top ? found[at] : top;
        }
        memset(out, 0, a->V * sizeof(float));
        for (Size pass = 0; pass < 2; pass++)
            for (Size p = 0; p < parts; p++) {
                const float *found = few_scratch(a, memory + p * step).found + i * found_width(a);
                float factor = found[at] == -FLT_MAX ? 0.0f : exponential(found[at] - top);
                if (!pass) total += factor * found[at + 1];
                else
                    for (Size d = 0; d < a->V; d++) out[d] += factor / total * found[d];
            }
    }
}

/* -- experts */

/* y[o] = w[o] . x for n_out rows of w (.., n) */
static void times(float *y, const float *w, const float *x, Size n, Size n_out) {
    product_of_few(y, n_out, (Matrix){x, n, 1}, (Matrix){w, n, 1}, 1, n_out, n, 1.0f, 0);
}
