/* Whether a row of the batch may stop looping: the arithmetic of nn/exits.py and nn/halting.py.
 *
 * Every worker asks for itself, and all must get the same answer: they have the same numbers, as far from a multiple of
 * 64 bytes, and the same code adds them up in the same order.
 */
#pragma once
#include <float.h>

#include "attention.h"

/* |after - before| / |after|, 0 where both are 0. */
static float relative_change(const float *restrict before, const float *restrict after, Size n) {
    float moved = 0, size = 0;
#pragma omp simd reduction(+ : moved, size)
    for (Size i = 0; i < n; i++) {
        moved += (after[i] - before[i]) * (after[i] - before[i]);
        size += after[i] * after[i];
    }
    return sqrtf(moved) / fmaxf(sqrtf(size), FLT_MIN);
}

/* The gate's probability. `gate_hidden` is the gate's alone: until it is written again there are a whole loop's
 * barriers. */
static float halting_probability(Worker *w, const Exit *exit, float change) {
    WorkerPool *pool = w->pool;
    float motion = logf(change + 1e-3f), logit = exit->bias;
    rms_norm(w->normed, w->x, NULL, pool->model.dim, 1e-6f);
    shared_product(w, pool->gate_hidden, exit->hidden, w->normed, pool->model.dim, exit->n_hidden);
    barrier(pool);
#pragma omp simd reduction(+ : logit)
    for (Size i = 0; i < exit->n_hidden; i++) {
        float hidden = pool->gate_hidden[i] + motion * exit->motion[i];
        logit += exit->halt[i] * hidden / (1.0f + exponential(-hidden));
    }
    return 1.0f / (1.0f + expf(-logit));
}

/* Whether the row stops after the loop from w->before to w->x. `carried` goes from loop to loop: the sum of the gate's
 * probabilities, or the number of loops at rest. */
static int stops(Worker *w, const Exit *exit, float *carried) {
    float change = relative_change(w->before, w->x, w->pool->model.dim);
    if (exit->n_hidden) return (*carried += halting_probability(w, exit, change)) >= exit->threshold;
    *carried = change < exit->threshold ? *carried + 1 : 0;
    return *carried >= exit->patience;
}

/* Let what the row wrote at loop `last` stand for the loops behind it. Loops that share slots take them in turn. */
static void fill_skipped_loops(Worker *w, const Slot *loops, Size row, Size last) {
    const Model *m = &w->pool->model;
    const Step *step = &w->pool->step;
    Size end = last + step->n_slots < step->n_loops ? last + step->n_slots : step->n_loops;
    for (Size loop = last + 1 + w->id; loop < end; loop += w->pool->n)
        for (Size i = 0; i < m->n_core; i++) {
            Slot from = slot_of_row(w, loops + last % step->n_slots * m->n_core + i, row);
            Slot to = slot_of_row(w, loops + loop % step->n_slots * m->n_core + i, row);
            for (Size g = 0; g < m->G; g++)
                memcpy(to.rows + (g * to.room + w->position) * m->W, from.rows + (g * from.room + w->position) * m->W,
                       m->W * sizeof(float));
            if (to.raw) memcpy(raw_row(w, &to, 0), raw_row(w, &from, 0), m->G * m->W * sizeof(float));
        }
}
