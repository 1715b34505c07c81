/* What is decoded, by whom, and how they wait for each other.
 *
 * Letters are sizes: H heads, G key/value heads, D channels of a cached key; in MLA, Q of the query latent, R (which is
 * D there) of the latent, N unturned and P rotary channels of a query, V of a value. The first five structs are
 * mirrored by decoder.py, field by field.
 */
#pragma once
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "arithmetic.h"

typedef struct {
    const float *w_in;             /* GQA: queries, keys, values (H D + 2 G D, dim); MLA: (Q + R + P, dim) */
    const float *w_q;              /* MLA (H (N + P), Q) */
    const float *kv_norm;          /* MLA (R) */
    const float *up_k, *up_v;      /* MLA (H, R, N) and (H, V, R) */
    const float *k_taps, *v_taps;  /* (n_taps, G D) each; MLA: (n_taps, R), the first alone */
    const float *w_out;            /* (dim, H V) */
    const float *w_ffn;            /* dense or shared gate and up, router: (2 ffn + n_experts, dim) */
    const float *w_down;           /* (dim, ffn) */
    const float *router_bias;      /* (n_experts) */
    const float *expert_norm;      /* (dim), factor of the experts' input */
    const float *gate_up, *down;   /* (n_experts, 2 expert_dim, dim), (n_experts, dim, expert_dim) */
    Size n_taps, n_local, window;  /* the first n_local heads see the last `window` rows alone */
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
    Size dim, vocab, H, G, D, V;
    Size mla, Q, N, P;             /* in GQA, P is D */
    Size n_prelude, n_core, n_coda, rank;
    Size start_from_input;
    float eps, score_scale;
    const double *frequencies;     /* (P / 2) */
    const float *embed, *head;     /* (vocab, dim) each, one and the same in a model with a tied head */
    const float *input_norm, *A, *B, *state_norm, *norm; /* (dim) each; both norms of the loops may be NULL */
    const float *codes;            /* (loops, dim) or NULL */
    const float *lora_down, *lora_up, *lora_scale; /* (rank, dim), (dim, rank), (loops, rank) */
    const Block *blocks;           /* prelude, core, coda */
    const Exit *exit;              /* NULL: every row runs every loop */
} Model;

typedef struct {
    float *first, *second;         /* keys and values (batch, G, capacity, D); MLA: latents and rotary keys */
    Size capacity;
} Slot;                            /* or the part of one row of the batch */

typedef struct {
    const int64_t *ids;            /* (batch) */
    const float *h;                /* (batch, dim), the state to start from; NULL for the model's own */
    float *state, *logits;         /* (batch, dim) and (batch, vocab), to be written */
    const Slot *slots;             /* prelude, loops with their core's blocks, coda */
    int64_t *used;                 /* (batch), loops that each row ran, to be written */
    const int64_t *starts;         /* (batch), cached tokens before each row's first real one */
    Size batch, position, n_loops;
    Size n_slots;                  /* that the loops use in turn */
} Step;

typedef struct Team Team;

typedef struct {
    Team *team;
    Size id;
    Size start, position;          /* of the row at hand: its padding, and the new token's place behind that */
    pthread_t thread;
    float *x, *normed, *e;         /* (dim) each: residual stream, what a layer reads, the encoded input */
    float *before;                 /* (dim), the state before a loop */
    float *mixed;                  /* (H V), what attention found */
    float *queries;                /* GQA: (H, key_width) */
    float *keys, *values;          /* (CHUNK, key_width), (CHUNK, value_width): convolved rows */
    float *turns;                  /* (P / 2, 2), cosine and sine */
    float *hidden, *adapted;       /* of the feed-forward; LoRA's, before and behind a loop's scale: (2, rank) */
    float *rank, *chosen_weight;   /* (n_experts), (topk) */
    Size *chosen;                  /* (topk) experts */
} Worker;

struct Team {
    Model model;
    Step step;
    Size n, key_width, value_width; /* of padded scratch rows */
    float *x, *y, *expert_y;        /* written by all, a part each: residual stream, products, experts' products */
    float *q, *absorbed;            /* MLA: (H, N + P), and (H, key_width) for the latents */
    float *partial;                 /* (n, H, value_width + LANES), see attention.h */
    float *seen;                    /* by the gate (n_hidden) */
    float *memory;                  /* that all of these lie in */
    Worker *workers;
    atomic_uint jobs, arrived, phase;
    atomic_int closing;
    pthread_mutex_t lock;
    pthread_cond_t wake;
};

/* The part of one row of the batch, from its first real token on: from there, nothing knows of padding. */
static Slot row_of(const Worker *w, const Slot *slot, Size row) {
    const Model *m = &w->team->model;
    Size at = row * slot->capacity * m->G + w->start;
    return (Slot){slot->first + at * m->D, slot->second + at * m->P, slot->capacity};
}

static inline void relax(unsigned *spins) {
    if (++*spins > 128) sched_yield(); /* someone may need this core, perhaps the one waited for */
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void barrier(Team *team) {
    unsigned phase = atomic_load(&team->phase), spins = 0;
    if (atomic_fetch_add(&team->arrived, 1) + 1 == team->n) {
        atomic_store(&team->arrived, 0);
        atomic_store(&team->phase, phase + 1);
    } else {
        while (atomic_load_explicit(&team->phase, memory_order_acquire) == phase) relax(&spins);
    }
}

/* This worker's part of n rows, in whole groups of eight. */
static void share(const Worker *w, Size n, Size *lo, Size *hi) {
    Size groups = (n + 7) / 8, of = w->team->n;
    *lo = groups * w->id / of * 8;
    *hi = groups * (w->id + 1) / of * 8;
    if (*hi > n) *hi = n;
    if (*lo > n) *lo = n;
}

static void shared_product(Worker *w, float *y, const float *matrix, const float *x, Size n_in, Size n_out) {
    Size lo, hi;
    share(w, n_out, &lo, &hi);
    product(y, matrix, x, n_in, lo, hi);
}
