/* Dense or shared SwiGLU, and routed experts. */
#pragma once
#include "pool.h"

/* The experts of largest logit + bias, mixed by the sigmoids of their logits. */
static void route(Worker *w, const Block *block, const float *logits) {
    float total = 0;
    for (Size e = 0; e < block->n_experts; e++) w->router[e] = logits[e] + block->router_bias[e];
    for (Size k = 0; k < block->topk; k++) {
        Size best = 0;
        for (Size e = 1; e < block->n_experts; e++) best = w->router[e] > w->router[best] ? e : best;
        w->router[best] = -INFINITY;
        w->experts[k] = best;
        total += w->expert_weight[k] = 1.0f / (1.0f + expf(-logits[best]));
    }
    if (block->topk > 1)
        for (Size k = 0; k < block->topk; k++) w->expert_weight[k] /= total > 1.17549435e-38f ? total : 1.17549435e-38f;
}

/* w->x goes in and comes out. */
static void feed_forward(Worker *w, const Block *block) {
    WorkerPool *pool = w->pool;
    Size dim = pool->model.dim, ffn = block->ffn, width = block->expert_dim, lo, hi;
    rms_norm(w->normed, w->x, NULL, dim, pool->model.eps);
    shared_product(w, pool->y, block->w_ffn, w->normed, dim, 2 * ffn + block->n_experts);
    barrier(pool);
    swiglu(w->hidden, pool->y, pool->y + ffn, ffn, 1.0f);
    if (block->n_experts) {
        route(w, block, pool->y + 2 * ffn);
        for (Size i = 0; i < dim; i++) w->normed[i] *= block->expert_norm[i];
        for (Size k = 0; k < block->topk; k++) {
            const float *gate_up = block->gate_up + w->experts[k] * 2 * width * dim;
            shared_product(w, pool->expert_y + 2 * k * width, gate_up, w->normed, dim, 2 * width);
        }
        barrier(pool);
    }
    own_part(w, dim, &lo, &hi);
    memcpy(pool->x + lo, w->x + lo, (hi - lo) * sizeof(float));
    add_product(pool->x, block->w_down, w->hidden, ffn, lo, hi);
    for (Size k = 0; k < block->topk; k++) {
        const float *gate = pool->expert_y + 2 * k * width;
        swiglu(w->hidden, gate, gate + width, width, w->expert_weight[k] * block->down_scale);
        add_product(pool->x, block->down + w->experts[k] * dim * width, w->hidden, width, lo, hi);
    }
    barrier(pool);
    memcpy(w->x, pool->x, dim * sizeof(float));
}
