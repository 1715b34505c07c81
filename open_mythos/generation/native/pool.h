/* What is decoded, by whom, and how they wait for each other.
 *
 * Letters are sizes: H query heads, G groups of them with a cached row (in MLA 1), W numbers of such a row, of which
 * scores read the first K, and which holds a value of D numbers from `value_at` on. V of a head's output, P rotary
 * channels; in MLA also Q of the query latent, and N channels of a query that are not rotated, while D is the latent.
 * The first five structs are mirrored by engine.py, field by field.
 */
#pragma once
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "arithmetic.h"

typedef struct {
    const float *w_in;             /* GQA: queries, keys, values (H D + 2 G D, dim); MLA: (Q + D + P, dim) */
    const float *w_q;              /* MLA (H (N + P), Q) */
    const float *kv_norm;          /* MLA (D) */
    const float *up_k, *up_v;      /* MLA (H, D, N) and (H, V, D) */
    const float *taps;             /* (n_taps, G, W) */
    const float *w_out;            /* (dim, H V) */
    const float *w_ffn;            /* dense or shared gate and up, router: (2 ffn + n_experts, dim) */
    const float *w_down;           /* (dim, ffn) */
    const float *router_bias;      /* (n_experts) */
    const float *expert_norm;      /* (dim), factor of the experts' input */
    const float *gate_up, *down;   /* (n_experts, 2 expert_dim, dim), (n_experts, dim, expert_dim) */
    Size n_local, window;          /* the first n_local heads see the last `window` rows alone */
    Size ffn, n_experts, topk, expert_dim;
    float down_scale;
} Block;

typedef struct {
    const float *hidden;           /* of the gate (n_hidden, dim) */
    const float *motion, *halt;    /* (n_hidden) each: what a hidden unit makes of the change, and the gate of it */
    Size n_hidden;                 /* 0: not the gate is asked, but whether the state is at rest */
    Size patience;                 /* loops in a row at rest */
    float threshold, bias;
} Exit;

typedef struct {
    Size dim, vocab, H, G, W, K, value_at, D, V, P, Q, N;
    Size mla, n_taps, ring;        /* raw rows that the cache keeps for the convolution */
    Size n_prelude, n_core, n_coda, rank;
    Size start_from_input;
    float eps, score_scale;
    const double *frequencies;     /* (P / 2) */
    const float *embed, *head;     /* (vocab, dim) each, one and the same in a model with a tied head */
    const float *input_norm, *A, *B, *state_norm, *norm; /* (dim) each; both norms of the loops may be NULL */
    const float *loop_codes;       /* (loops, dim) or NULL */
    const float *lora_down, *lora_up, *lora_scale; /* (rank, dim), (dim, rank), (loops, rank) */
    const Block *blocks;           /* prelude, core, coda */
    const Exit *exit;              /* NULL: every row runs every loop */
} Model;

typedef struct {
    float *rows;                   /* final (batch, G, room, W) */
    float *raw;                    /* before the convolution (batch, ring, G, W), position p at p % ring; or NULL */
    Size room;
} Slot;                            /* or the part of one row of the batch */

typedef struct {
    const int64_t *ids;            /* (batch) */
    const float *h;                /* (batch, dim), the state to start from; NULL for the model's own */
    float *state, *logits;         /* (batch, dim) and (batch, vocab), to be written */
    const Slot *slots;             /* prelude, core for each of n_slots loops, coda */
    int64_t *used;                 /* (batch), loops that each row ran, to be written */
    const int64_t *starts;         /* (batch), cached tokens before each row's first real one */
    Size batch, position, n_loops;
    Size n_slots;                  /* that the loops use in turn */
} Step;

typedef struct WorkerPool WorkerPool;

typedef struct {
    WorkerPool *pool;
    Size id;
    Size start, position;          /* of the row at hand: its padding, and the new token's place behind that */
    pthread_t thread;
    float *x, *normed, *e;         /* (dim) each: residual stream, what a layer reads, the encoded input */
    float *before;                 /* (dim), the state before a loop */
    float *attended;               /* (H V) */
    float *queries;                /* GQA: (H, K) */
    float *raw;                    /* (G, W), a new row for a cache that keeps no raw ones */
    float *rotary;                 /* (P / 2, 2), cosine and sine */
    float *hidden, *low_rank;      /* of the feed-forward; LoRA's, before and behind a loop's scale: (2, rank) */
    float *router, *expert_weight; /* (n_experts), (topk) */
    Size *experts;                 /* (topk) */
} Worker;

struct WorkerPool {
    Model model;
    Step step;
    Size n, partial_width;
    float *x, *y, *expert_y;        /* written by all, a part each: residual stream, products, experts' products */
    float *q, *absorbed;            /* MLA: queries (H, N + P), and (H, K) for the latents */
    float *partial;                 /* (n, H, partial_width), see attention.h */
    float *gate_hidden;             /* (n_hidden) */
    float *memory;                  /* that all of these lie in */
    Worker *workers;
    atomic_uint jobs, arrived, phase;
    atomic_int closing;
    pthread_mutex_t lock;
    pthread_cond_t wake;
};

static inline void relax(unsigned *spins) {
    if (++*spins > 128) sched_yield(); /* someone may need this core, perhaps the one waited for */
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void barrier(WorkerPool *pool) {
    unsigned phase = atomic_load(&pool->phase), spins = 0;
    if (atomic_fetch_add(&pool->arrived, 1) + 1 == pool->n) {
        atomic_store(&pool->arrived, 0);
        atomic_store(&pool->phase, phase + 1);
    } else {
        while (atomic_load_explicit(&pool->phase, memory_order_acquire) == phase) relax(&spins);
    }
}

/* This worker's part of n rows, in whole groups of LANES. */
static void own_part(const Worker *w, Size n, Size *lo, Size *hi) {
    Size groups = (n + LANES - 1) / LANES, of = w->pool->n;
    *lo = groups * w->id / of * LANES;
    *hi = groups * (w->id + 1) / of * LANES;
    if (*hi > n) *hi = n;
    if (*lo > n) *lo = n;
}

static void shared_product(Worker *w, float *y, const float *matrix, const float *x, Size n_in, Size n_out) {
    Size lo, hi;
    own_part(w, n_out, &lo, &hi);
    product(y, matrix, x, n_in, lo, hi);
}
