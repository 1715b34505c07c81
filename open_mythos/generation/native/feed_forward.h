/* Dense or shared SwiGLU, and routed experts. */
#pragma once
#include "team.h"

/* The experts of largest logit + bias, mixed by the sigmoids of their logits. */
static void choose(Worker *w, const Block *block, const float *logits) {
    float total = 0;
    for (Size e = 0; e < block->n_experts; e++) w->rank[e] = logits[e] + block->router_bias[e];
    for (Size k = 0; k < block->topk; k++) {
        Size best = 0;
        for (Size e = 1; e < block->n_experts; e++) best = w->rank[e] > w->rank[best] ? e : best;
        w->rank[best] = -INFINITY;
        w->chosen[k] = best;
        total += w->chosen_weight[k] = 1.0f / (1.0f + expf(-logits[best]));
    }
    if (block->topk > 1)
        for (Size k = 0; k < block->topk; k++) w->chosen_weight[k] /= total > 1.17549435e-38f ? total : 1.17549435e-38f;
}

/* w->x goes in and comes out. */
static void feed_forward(Worker *w, const Block *block) {
    Team *team = w->team;
    Size dim = team->model.dim, ffn = block->ffn, width = block->expert_dim, lo, hi;
    rms_norm(w->normed, w->x, NULL, dim, team->model.eps);
    shared_product(w, team->y, block->w_ffn, w->normed, dim, 2 * ffn + block->n_experts);
    barrier(team);
    swiglu(w->hidden, team->y, team->y + ffn, ffn, 1.0f);
    if (block->n_experts) {
        choose(w, block, team->y + 2 * ffn);
        for (Size i = 0; i < dim; i++) w->normed[i] *= block->expert_norm[i];
        for (Size k = 0; k < block->topk; k++) {
            const float *gate_up = block->gate_up + w->chosen[k] * 2 * width * dim;
            shared_product(w, team->expert_y + 2 * k * width, gate_up, w->normed, dim, 2 * width);
        }
        barrier(team);
    }
    share(w, dim, &lo, &hi);
    memcpy(team->x + lo, w->x + lo, (hi - lo) * sizeof(float));
    add_product(team->x, block->w_down, w->hidden, ffn, lo, hi);
    for (Size k = 0; k < block->topk; k++) {
        const float *gate = team->expert_y + 2 * k * width;
        swiglu(w->hidden, gate, gate + width, width, w->chosen_weight[k] * block->down_scale);
        add_product(team->x, block->down + w->chosen[k] * dim * width, w->hidden, width, lo, hi);
    }
    barrier(team);
    memcpy(w->x, team->x, dim * sizeof(float));
}
