/* One token through a whole model: embedding, prelude, loops, coda, head. float32, a few threads.
 *
 * A token at a time, decoding is matrix-vector products, and those are reading weights. All threads walk through the
 * same code; rows of every matrix are divided among them, always the same way, so that a thread finds its share of the
 * loop's weights in its own cache again. What is small (norms, softmax sums, the choice of experts) every thread computes
 * for itself, and a barrier stands only where one needs what others made.
 *
 * Matrices are row-major (out, in). A letter stands for a size: H heads, G key/value heads, Q, R, N, P, V: MLA's query
 * latent, latent, unturned, rotary and value channels. Structs are mirrored by decoder.py, field by field.
 */
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t Size;

enum {
    LANES = 16,      /* scratch rows are padded to so many floats */
    CHUNK = 32,      /* context rows read at a time */
    PATIENCE = 2000, /* turns, of about half a microsecond, that a worker waits for the next token before it sleeps */
};

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
    Size dim, vocab, H, G, D, V;   /* D: a cached key's width, of which nothing is turned in MLA, where it is R */
    Size mla, Q, N, P;             /* P: channels of a head that rotary positions turn; D in GQA */
    Size n_prelude, n_coda, rank;
    Size start_from_input;
    float eps, score_scale;
    const double *frequencies;     /* (P / 2) */
    const float *embed, *head;     /* (vocab, dim) each, one and the same in a model with a tied head */
    const float *input_norm, *A, *B, *state_norm, *norm; /* (dim) each; state_norm may be NULL */
    const float *codes;            /* (loops, dim) or NULL */
    const float *lora_down, *lora_up, *lora_scale; /* (rank, dim), (dim, rank), (loops, rank) */
    const Block *blocks;           /* prelude, the recurrent one, coda */
} Model;

typedef struct {
    float *first, *second;         /* keys and values (batch, capacity, G D); MLA: latents and rotary keys */
    Size capacity;
} Slot;

typedef struct {
    const int64_t *ids;            /* (batch) */
    const float *h;                /* (batch, dim), the state to start from; NULL for the model's own */
    float *state, *logits;         /* (batch, dim) and (batch, vocab), to be written */
    const Slot *slots;             /* prelude, loops, coda */
    Size batch, position, n_loops;
} Step;

typedef struct Team Team;

typedef struct {
    Team *team;
    Size id;
    pthread_t thread;
    float *x, *normed, *e, *mixed, *hidden, *queries, *keys, *values, *turns, *adapted, *rank;
    Size *chosen;
    float *chosen_weight;
} Worker;

struct Team {
    Model model;
    Step step;
    Size n, key_width, value_width; /* of padded scratch rows */
    float *x, *y, *q, *expert_y, *partial, *heads_out, *memory; /* what workers share */
    Worker *workers;
    atomic_uint jobs, arrived, phase;
    atomic_int closing;
    pthread_mutex_t lock;
    pthread_cond_t wake;
};

/* -- arithmetic */

static Size padded(Size n) { return (n + LANES - 1) / LANES * LANES; }

/* e^x to about 2 units in the last place, without branches, so that loops over it become vectors (after Cephes). */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float rounded = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the integer lands in the low bits */
    float n = rounded - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { float f; int32_t i; } power = {.i = ((int32_t)n + 127) << 23};
    return p * power.f;
}

/* y[o] += w[o] . x for rows lo <= o < hi of w, (.., n). */
static void add_product(float *restrict y, const float *restrict w, const float *restrict x, Size n, Size lo, Size hi) {
    Size o = lo;
    for (; o + 8 <= hi; o += 8) {
        const float *restrict r = w + o * n;
        float a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, h = 0;
#pragma omp simd reduction(+ : a, b, c, d, e, f, g, h)
        for (Size i = 0; i < n; i++) {
            a += r[i] * x[i];
            b += r[n + i] * x[i];
            c += r[2 * n + i] * x[i];
            d += r[3 * n + i] * x[i];
            e += r[4 * n + i] * x[i];
            f += r[5 * n + i] * x[i];
            g += r[6 * n + i] * x[i];
            h += r[7 * n + i] * x[i];
        }
        y[o] += a, y[o + 1] += b, y[o + 2] += c, y[o + 3] += d;
        y[o + 4] += e, y[o + 5] += f, y[o + 6] += g, y[o + 7] += h;
    }
    for (; o < hi; o++) {
        float a = 0;
#pragma omp simd reduction(+ : a)
        for (Size i = 0; i < n; i++) a += w[o * n + i] * x[i];
        y[o] += a;
    }
}

static void product(float *y, const float *w, const float *x, Size n, Size lo, Size hi) {
    if (hi > lo) memset(y + lo, 0, (hi - lo) * sizeof(float));
    add_product(y, w, x, n, lo, hi);
}

/* x / rms(x), times a weight unless that is NULL; y may be x. */
static void rms_norm(float *y, const float *x, const float *weight, Size n, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (Size i = 0; i < n; i++) sum += x[i] * x[i];
    float scale = 1.0f / sqrtf(sum / n + eps);
    for (Size i = 0; i < n; i++) y[i] = x[i] * scale * (weight ? weight[i] : 1.0f);
}

/* factor * silu(gate) * up */
static void swiglu(float *restrict y, const float *restrict gate, const float *restrict up, Size n, float factor) {
    for (Size i = 0; i < n; i++) y[i] = factor * gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

/* Turn channel pairs (2i, 2i + 1) by (cos, sin); times a scale. */
static void turn(float *y, const float *x, const float *turns, Size n, float scale) {
    for (Size i = 0; i < n; i += 2) {
        float even = x[i], odd = x[i + 1];
        y[i] = (even * turns[i] - odd * turns[i + 1]) * scale;
        y[i + 1] = (even * turns[i + 1] + odd * turns[i]) * scale;
    }
}

/* -- threads */

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

/* -- attention
 *
 * What a head finds in rows is kept as (sum of weights times values, greatest score, sum of weights), which can be
 * merged; so each worker reads a part of the context, for all heads, and convolves what it reads once.
 */

static void convolve(float *restrict y, Size y_width, const float *restrict rows, Size row_width, const float *restrict taps,
                     Size n_taps, Size n, Size first, Size n_rows) {
    for (Size i = 0; i < n_rows; i++, y += y_width) {
        const float *restrict row = rows + (first + i) * row_width;
        for (Size d = 0; d < n; d++) y[d] = taps[d] * row[d];
        for (Size j = 1; j < n_taps && j <= first + i; j++)
            for (Size d = 0; d < n; d++) y[d] += taps[j * row_width + d] * row[d - j * row_width];
    }
}

/* y += weights of n rows times the rows; all widths are multiples of LANES. */
static void add_rows(float *restrict y, const float *restrict weights, const float *restrict rows, Size row_width, Size width,
                     Size n, float rescale) {
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

static void attend(Worker *w, const Block *block, const float *queries, const float *first, const float *second, Size head,
                   Size end_head, Size lo, Size hi) {
    Team *team = w->team;
    const Model *m = &team->model;
    Size per_group = m->H / m->G, key_width = team->key_width, row_width = m->G * m->D;
    Size value_row = m->mla ? key_width : team->value_width;
    const float *values = m->mla ? w->keys : w->values;
    float scores[CHUNK];
    for (Size next; head < end_head && lo < hi; head = next) {
        Size group = head / per_group, at = group * m->D;
        next = (group + 1) * per_group < end_head ? (group + 1) * per_group : end_head;
        for (Size row = lo; row < hi; row += CHUNK) {
            Size n = hi - row < CHUNK ? hi - row : CHUNK;
            convolve(w->keys, key_width, first + at, row_width, block->k_taps + at, block->n_taps, m->D, row, n);
            if (m->mla)
                for (Size i = 0; i < n; i++)
                    memcpy(w->keys + i * key_width + m->D, second + (row + i) * m->P, m->P * sizeof(float));
            else
                convolve(w->values, value_row, second + at, row_width, block->v_taps + at, block->n_taps, m->D, row, n);
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
static void attend_part(Worker *w, const Block *block, const float *queries, const float *first, const float *second, Size last) {
    Team *team = w->team;
    const Model *m = &team->model;
    Size chunks = last / CHUNK + 1, lo = chunks * w->id / team->n * CHUNK, hi = chunks * (w->id + 1) / team->n * CHUNK;
    Size near = last + 1 - block->window;
    if (hi > last + 1) hi = last + 1;
    for (Size h = 0; h < m->H; h++) {
        float *found = team->partial + (w->id * m->H + h) * (team->value_width + LANES);
        memset(found, 0, team->value_width * sizeof(float));
        found[team->value_width] = -1e30f;
        found[team->value_width + 1] = 0;
    }
    attend(w, block, queries, first, second, 0, block->n_local, near > lo ? near : lo, hi);
    attend(w, block, queries, first, second, block->n_local, m->H, lo, hi);
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
static void attention_gqa(Worker *w, const Block *block, float *k, float *v, Size position) {
    Team *team = w->team;
    const Model *m = &team->model;
    Size D = m->D, row = m->G * D;
    shared_product(w, team->y, block->w_in, w->normed, m->dim, m->H * D + 2 * row);
    barrier(team);
    for (Size h = 0; h < m->H; h++) turn(w->queries + h * team->key_width, team->y + h * D, w->turns, D, m->score_scale);
    if (w->id == team->n - 1) {
        for (Size g = 0; g < m->G; g++) turn(k + position * row + g * D, team->y + (m->H + g) * D, w->turns, D, 1.0f);
        memcpy(v + position * row, team->y + m->H * D + row, row * sizeof(float));
    }
    attend_part(w, block, w->queries, k, v, position);
    barrier(team);
    for (Size h = 0; h < m->H; h++) merge(w, h, w->mixed + h * D, D);
}

static void attention_mla(Worker *w, const Block *block, float *latents, float *k_rope, Size position) {
    Team *team = w->team;
    const Model *m = &team->model;
    Size R = m->D, width = m->N + m->P, first = m->H * w->id / team->n, end = m->H * (w->id + 1) / team->n;
    shared_product(w, team->y, block->w_in, w->normed, m->dim, m->Q + R + m->P);
    barrier(team);
    rms_norm(w->hidden, team->y, NULL, m->Q, m->eps);
    shared_product(w, team->q, block->w_q, w->hidden, m->Q, m->H * width);
    barrier(team);
    for (Size h = first; h < end; h++) {
        float *query = team->heads_out + h * team->key_width, *q = team->q + h * width;
        product(query, block->up_k + h * R * m->N, q, m->N, 0, R);
        for (Size i = 0; i < R; i++) query[i] *= m->score_scale;
        turn(query + R, q + m->N, w->turns, m->P, m->score_scale);
    }
    if (w->id == team->n - 1) {
        rms_norm(latents + position * R, team->y + m->Q, block->kv_norm, R, m->eps);
        turn(k_rope + position * m->P, team->y + m->Q + R, w->turns, m->P, 1.0f);
    }
    barrier(team);
    attend_part(w, block, team->heads_out, latents, k_rope, position);
    barrier(team);
    for (Size h = first; h < end; h++) {
        merge(w, h, w->hidden, R);
        product(team->y + h * m->V, block->up_v + h * m->V * R, w->hidden, R, 0, m->V);
    }
    barrier(team);
    memcpy(w->mixed, team->y, m->H * m->V * sizeof(float));
}

/* -- feed-forward */

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
        for (Size k = 0; k < block->topk; k++)
            shared_product(w, team->expert_y + 2 * k * width, block->gate_up + w->chosen[k] * 2 * width * dim, w->normed, dim,
                           2 * width);
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

/* -- the model */

static void run_block(Worker *w, const Block *block, const Slot *slot, Size row) {
    Team *team = w->team;
    const Model *m = &team->model;
    Size lo, hi, position = team->step.position, mixed = m->H * m->V;
    float *first = slot->first + row * slot->capacity * m->G * m->D;
    float *second = slot->second + row * slot->capacity * (m->mla ? m->P : m->G * m->D);
    rms_norm(w->normed, w->x, NULL, m->dim, m->eps);
    (m->mla ? attention_mla : attention_gqa)(w, block, first, second, position);
    share(w, m->dim, &lo, &hi);
    memcpy(team->x + lo, w->x + lo, (hi - lo) * sizeof(float));
    add_product(team->x, block->w_out, w->mixed, mixed, lo, hi);
    barrier(team);
    memcpy(w->x, team->x, m->dim * sizeof(float));
    feed_forward(w, block);
}

/* x <- A x + B e + code of the loop, which the block then reads */
static void inject(Worker *w, Size loop) {
    const Model *m = &w->team->model;
    for (Size i = 0; i < m->dim; i++) w->x[i] = m->A[i] * w->x[i] + m->B[i] * w->e[i];
    if (m->codes)
        for (Size i = 0; i < m->dim; i++) w->x[i] += m->codes[loop * m->dim + i];
}

static void run_row(Worker *w, Size row) {
    Team *team = w->team;
    const Model *m = &team->model;
    const Step *step = &team->step;
    const Slot *slot = step->slots;
    const Block *block = m->blocks;
    Size dim = m->dim;
    const float *embedding = m->embed + step->ids[row] * dim;
    for (Size i = 0; i < dim; i++) w->x[i] = embedding[i] * sqrtf((float)dim);
    for (Size i = 0; i < m->n_prelude; i++) run_block(w, block++, slot++, row);
    rms_norm(w->e, w->x, m->input_norm, dim, m->eps);
    if (step->h) memcpy(w->x, step->h + row * dim, dim * sizeof(float));
    else if (m->start_from_input) memcpy(w->x, w->e, dim * sizeof(float));
    else memset(w->x, 0, dim * sizeof(float));
    product(w->adapted, m->lora_down, w->e, dim, 0, m->rank);
    for (Size loop = 0; loop < step->n_loops; loop++) {
        inject(w, loop);
        run_block(w, block, slot++, row);
        for (Size r = 0; r < m->rank; r++) w->adapted[m->rank + r] = w->adapted[r] * m->lora_scale[loop * m->rank + r];
        if (m->rank) add_product(w->x, m->lora_up, w->adapted + m->rank, m->rank, 0, dim);
        if (m->state_norm) rms_norm(w->x, w->x, m->state_norm, dim, m->eps);
    }
    block++;
    if (w->id == 0) memcpy(step->state + row * dim, w->x, dim * sizeof(float));
    for (Size i = 0; i < m->n_coda; i++) run_block(w, block++, slot++, row);
    rms_norm(w->normed, w->x, m->norm, dim, m->eps);
    shared_product(w, step->logits + row * m->vocab, m->head, w->normed, dim, m->vocab);
}

static void run(Worker *w) {
    const Model *m = &w->team->model;
    for (Size i = 0; i < m->P / 2; i++) {
        double angle = w->team->step.position * m->frequencies[i];
        w->turns[2 * i] = (float)cos(angle);
        w->turns[2 * i + 1] = (float)sin(angle);
    }
    for (Size row = 0; row < w->team->step.batch; row++) run_row(w, row);
    barrier(w->team);
}

/* Between tokens a worker waits for a while at full speed, as waking it would take as long as several loops; then it
 * sleeps. */
static void *work(void *argument) {
    Worker *w = argument;
    Team *team = w->team;
    for (unsigned done = 0;; done++) {
        unsigned spins = 0;
        while (atomic_load_explicit(&team->jobs, memory_order_acquire) == done && spins < PATIENCE) relax(&spins);
        if (atomic_load(&team->jobs) == done) {
            pthread_mutex_lock(&team->lock);
            while (atomic_load(&team->jobs) == done) pthread_cond_wait(&team->wake, &team->lock);
            pthread_mutex_unlock(&team->lock);
        }
        if (atomic_load(&team->closing)) return NULL;
        run(w);
    }
}

static void start_job(Team *team) {
    pthread_mutex_lock(&team->lock);
    atomic_fetch_add(&team->jobs, 1);
    pthread_cond_broadcast(&team->wake);
    pthread_mutex_unlock(&team->lock);
}

/* -- what decoder.py calls */

void mythos_step(Team *team, const Step *step) {
    team->step = *step;
    start_job(team);
    run(&team->workers[0]);
}

void mythos_close(Team *team) {
    atomic_store(&team->closing, 1);
    start_job(team);
    for (Size i = 1; i < team->n; i++) pthread_join(team->workers[i].thread, NULL);
    pthread_cond_destroy(&team->wake);
    pthread_mutex_destroy(&team->lock);
    free(team->memory);
    free(team->workers);
    free(team);
}

/* The next n floats of one allocation, or just their count while there is none. */
static float *take(float *memory, Size *used, Size n) {
    float *taken = memory ? memory + *used : NULL;
    *used += padded(n);
    return taken;
}

static Size lay_out(Team *team, float *memory) {
    const Model *m = &team->model;
    Size used = 0, y = m->mla ? m->Q + m->D + m->P : (m->H + 2 * m->G) * m->D, mixed = m->H * m->V;
    Size hidden = m->mla ? (m->Q > m->D ? m->Q : m->D) : 0, experts = 0, topk = 0, expert_y = 0;
    if (mixed > y) y = mixed;
    for (Size i = 0; i < m->n_prelude + 1 + m->n_coda; i++) {
        const Block *b = &m->blocks[i];
        if (2 * b->ffn + b->n_experts > y) y = 2 * b->ffn + b->n_experts;
        if (b->ffn > hidden) hidden = b->ffn;
        if (b->expert_dim > hidden) hidden = b->expert_dim;
        if (b->n_experts > experts) experts = b->n_experts;
        if (b->topk > topk) topk = b->topk;
        if (2 * b->topk * b->expert_dim > expert_y) expert_y = 2 * b->topk * b->expert_dim;
    }
    team->x = take(memory, &used, m->dim);
    team->y = take(memory, &used, y);
    team->q = take(memory, &used, m->mla ? m->H * (m->N + m->P) : 0);
    team->expert_y = take(memory, &used, expert_y);
    team->heads_out = take(memory, &used, m->H * team->key_width);
    team->partial = take(memory, &used, team->n * m->H * (team->value_width + LANES));
    for (Size i = 0; i < team->n; i++) {
        Worker *w = &team->workers[i];
        w->x = take(memory, &used, m->dim);
        w->normed = take(memory, &used, m->dim);
        w->e = take(memory, &used, m->dim);
        w->mixed = take(memory, &used, mixed);
        w->hidden = take(memory, &used, hidden);
        w->queries = take(memory, &used, m->H * team->key_width);
        w->keys = take(memory, &used, CHUNK * team->key_width);
        w->values = take(memory, &used, CHUNK * team->value_width);
        w->turns = take(memory, &used, m->P);
        w->adapted = take(memory, &used, 2 * m->rank);
        w->rank = take(memory, &used, experts);
        w->chosen_weight = take(memory, &used, topk);
        w->chosen = (Size *)take(memory, &used, 2 * topk);
    }
    return used * sizeof(float);
}

/* A team of workers, of which the caller of mythos_step is the first; NULL if memory or threads ran out. Weights and
 * blocks of the model must outlive it. */
Team *mythos_open(const Model *model, Size n) {
    Team *team = calloc(1, sizeof *team);
    if (!team) return NULL;
    team->model = *model;
    team->n = n;
    team->key_width = padded(model->D + (model->mla ? model->P : 0));
    team->value_width = padded(model->D);
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->wake, NULL);
    team->workers = calloc(n, sizeof *team->workers);
    Size bytes = team->workers ? lay_out(team, NULL) : 0;
    if (bytes && posix_memalign((void **)&team->memory, 64, bytes)) team->memory = NULL;
    if (team->memory) {
        memset(team->memory, 0, bytes);
        lay_out(team, team->memory);
    }
    Size started = 1;
    for (Size i = 0; team->memory && i < n; i++) {
        team->workers[i].team = team;
        team->workers[i].id = i;
        if (i && pthread_create(&team->workers[i].thread, NULL, work, &team->workers[i])) break;
        started = i + 1;
    }
    if (!team->memory || started < n) {
        team->n = started;
        mythos_close(team);
        return NULL;
    }
    return team;
}
