/* Whether a row of the batch may stop looping: the arithmetic of nn/exits.py and nn/halting.py.
 *
 * Every worker asks for itself, and all must get the same answer: they have the same numbers, as far from a multiple of
 * 64 bytes, and the same code adds them up in the same order.
 */
#pragma once
#include "change.h"
#include "team.h"

/* The gate's probability. `seen` is the gate's alone: until it is written again there are a whole loop's barriers. */
static float ask_gate(Worker *w, const Exit *exit, float change) {
    Team *team = w->team;
    float motion = logf(change + 1e-3f), found = exit->bias;
    rms_norm(w->normed, w->x, NULL, team->model.dim, 1e-6f);
    shared_product(w, team->seen, exit->hidden, w->normed, team->model.dim, exit->n_hidden);
    barrier(team);
#pragma omp simd reduction(+ : found)
    for (Size i = 0; i < exit->n_hidden; i++) {
        float seen = team->seen[i] + motion * exit->motion[i];
        found += exit->halt[i] * seen / (1.0f + exponential(-seen));
    }
    return 1.0f / (1.0f + expf(-found));
}

/* Whether the row stops after the loop from w->before to w->x. `carried` goes from loop to loop: the sum of the gate's
 * probabilities, or the number of loops at rest. */
static int stops(Worker *w, const Exit *exit, float *carried) {
    float change = relative_change(w->before, w->x, w->team->model.dim);
    if (exit->n_hidden) return (*carried += ask_gate(w, exit, change)) >= exit->threshold;
    *carried = change < exit->threshold ? *carried + 1 : 0;
    return *carried >= exit->patience;
}

/* Let what the row wrote at loop `last` stand for the loops behind it. Loops that share slots take them in turn. */
static void stand_in(Worker *w, const Slot *loops, Size row, Size last) {
    Team *team = w->team;
    const Model *m = &team->model;
    Size end = last + team->step.n_slots < team->step.n_loops ? last + team->step.n_slots : team->step.n_loops;
    for (Size loop = last + 1 + w->id; loop < end; loop += team->n)
        for (Size i = 0; i < m->n_core; i++) {
            Slot from = row_of(w, loops + last * m->n_core + i, row), to = row_of(w, loops + loop * m->n_core + i, row);
            for (Size g = 0; g < m->G; g++) {
                Size at = g * from.capacity + w->position, there = g * to.capacity + w->position;
                memcpy(to.first + there * m->D, from.first + at * m->D, m->D * sizeof(float));
                memcpy(to.second + there * m->P, from.second + at * m->P, m->P * sizeof(float));
            }
        }
}
