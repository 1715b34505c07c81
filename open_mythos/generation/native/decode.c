/* One token through a whole model: embedding, prelude, loops until an exit, coda, head. float32, a few threads.
 *
 * A token at a time, decoding is matrix-vector products, and those are reading weights. All threads walk through the
 * same code; rows of every matrix are divided among them, always the same way, so that a thread finds its share of the
 * loop's weights in its own cache again. What is small (norms, activations, the choice of experts) every thread
 * computes for itself, and a barrier stands only where one needs what others made.
 */
#include <stdlib.h>

#include "attention.h"
#include "exits.h"
#include "feed_forward.h"

enum { PATIENCE = 2000 }; /* turns, each below a microsecond, that a worker waits for the next token before it sleeps */

static void run_block(Worker *w, const Block *block, const Slot *whole_slot, Size row) {
    WorkerPool *pool = w->pool;
    const Model *m = &pool->model;
    Size lo, hi;
    Slot slot = slot_of_row(w, whole_slot, row);
    rms_norm(w->normed, w->x, NULL, m->dim, m->eps);
    (m->mla ? attention_mla : attention_gqa)(w, block, &slot);
    own_part(w, m->dim, &lo, &hi);
    memcpy(pool->x + lo, w->x + lo, (hi - lo) * sizeof(float));
    add_product(pool->x, block->w_out, w->attended, m->H * m->V, lo, hi);
    barrier(pool);
    memcpy(w->x, pool->x, m->dim * sizeof(float));
    feed_forward(w, block);
}

/* x <- A x + B e + code of the loop, which the block then reads */
static void inject(Worker *w, Size loop) {
    const Model *m = &w->pool->model;
    for (Size i = 0; i < m->dim; i++) w->x[i] = m->A[i] * w->x[i] + m->B[i] * w->e[i];
    if (m->loop_codes)
        for (Size i = 0; i < m->dim; i++) w->x[i] += m->loop_codes[loop * m->dim + i];
}

/* The place of the row's new token, and the rotation that goes with it. */
static void set_position(Worker *w, Size row) {
    const Model *m = &w->pool->model;
    const Step *step = &w->pool->step;
    if (row && step->starts[row] == w->start) return;
    w->start = step->starts[row];
    w->position = step->position - w->start;
    for (Size i = 0; i < m->P / 2; i++) {
        double angle = w->position * m->frequencies[i];
        w->rotary[2 * i] = (float)cos(angle);
        w->rotary[2 * i + 1] = (float)sin(angle);
    }
}

static void run_row(Worker *w, Size row) {
    WorkerPool *pool = w->pool;
    const Model *m = &pool->model;
    const Step *step = &pool->step;
    const Slot *loops = step->slots + m->n_prelude, *coda = loops + step->n_slots * m->n_core;
    const Block *block = m->blocks;
    Size dim = m->dim, loop = 0;
    float carried = 0;
    int stopped = 0;
    const float *embedding = m->embed + step->ids[row] * dim;
    for (Size i = 0; i < dim; i++) w->x[i] = embedding[i] * sqrtf((float)dim);
    for (Size i = 0; i < m->n_prelude; i++) run_block(w, block++, step->slots + i, row);
    if (m->input_norm) rms_norm(w->e, w->x, m->input_norm, dim, m->eps);
    else memcpy(w->e, w->x, dim * sizeof(float));
    if (step->h) memcpy(w->x, step->h + row * dim, dim * sizeof(float));
    else if (m->start_from_input) memcpy(w->x, w->e, dim * sizeof(float));
    else memset(w->x, 0, dim * sizeof(float));
    product(w->low_rank, m->lora_down, w->e, dim, 0, m->rank);
    for (; loop < step->n_loops && !stopped; loop++) {
        if (m->exit) memcpy(w->before, w->x, dim * sizeof(float));
        inject(w, loop);
        for (Size i = 0; i < m->n_core; i++)
            run_block(w, block + i, loops + loop % step->n_slots * m->n_core + i, row);
        float *scaled = w->low_rank + m->rank;
        for (Size r = 0; r < m->rank; r++) scaled[r] = w->low_rank[r] * m->lora_scale[loop * m->rank + r];
        if (m->rank) add_product(w->x, m->lora_up, scaled, m->rank, 0, dim);
        if (m->state_norm) rms_norm(w->x, w->x, m->state_norm, dim, m->eps);
        stopped = m->exit && loop + 1 < step->n_loops && stops(w, m->exit, &carried);
    }
    fill_skipped_loops(w, loops, row, loop - 1);
    block += m->n_core;
    if (w->id == 0) {
        memcpy(step->state + row * dim, w->x, dim * sizeof(float));
        step->used[row] = loop;
    }
    for (Size i = 0; i < m->n_coda; i++) run_block(w, block++, coda + i, row);
    rms_norm(w->normed, w->x, m->norm, dim, m->eps);
    shared_product(w, step->logits + row * m->vocab, m->head, w->normed, dim, m->vocab);
}

static void run(Worker *w) {
    for (Size row = 0; row < w->pool->step.batch; row++) {
        set_position(w, row);
        run_row(w, row);
    }
    barrier(w->pool);
}

/* -- workers */

/* Between tokens a worker waits for a while at full speed, as waking it would take as long as several loops; then it
 * sleeps. */
static void *work(void *argument) {
    Worker *w = argument;
    WorkerPool *pool = w->pool;
    for (unsigned done = 0;; done++) {
        unsigned spins = 0;
        while (atomic_load_explicit(&pool->jobs, memory_order_acquire) == done && spins < PATIENCE) relax(&spins);
        if (atomic_load(&pool->jobs) == done) {
            pthread_mutex_lock(&pool->lock);
            while (atomic_load(&pool->jobs) == done) pthread_cond_wait(&pool->wake, &pool->lock);
            pthread_mutex_unlock(&pool->lock);
        }
        if (atomic_load(&pool->closing)) return NULL;
        run(w);
    }
}

static void start_job(WorkerPool *pool) {
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->jobs, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
}

/* -- what engine.py calls */

#ifdef __linux__
/* OpenMP's own, if this process has it: gives up the threads of the caller's pool; 1 is "soft". */
extern int omp_pause_resource_all(int kind) __attribute__((weak));
#endif

/* PyTorch's threads, which have just read the prompt, go on waiting at full speed for some 15 ms, on the cores that our
 * workers need; tokens would take three times as long. PyTorch makes new ones when it needs them, in a tenth of a
 * millisecond. */
void mythos_quiet_others(void) {
#ifdef __linux__
    if (omp_pause_resource_all) omp_pause_resource_all(1);
#endif
}

void mythos_step(WorkerPool *pool, const Step *step) {
    pool->step = *step;
    start_job(pool);
    run(&pool->workers[0]);
}

void mythos_close(WorkerPool *pool) {
    atomic_store(&pool->closing, 1);
    start_job(pool);
    for (Size i = 1; i < pool->n; i++) pthread_join(pool->workers[i].thread, NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    free(pool->memory);
    free(pool->workers);
    free(pool);
}

enum { N_SHARED = 6, N_OWN = 13 }; /* arrays of scratch memory: of the pool, of each worker */

static Size max(Size a, Size b) { return a > b ? a : b; }

/* Numbers of the largest array of scratch memory. They all get as many, which is little beside the weights; and an odd
 * number of cache lines, so that they are not kept from each other's places in the cache. */
static Size largest(const Model *m) {
    Size n = max(m->dim, max(m->G * m->W, 2 * m->rank));
    n = max(n, m->H * max(m->V, max(m->K, m->N + m->P)));
    n = max(n, m->mla ? m->Q + m->D + m->P : (m->H + 2 * m->G) * m->D);
    n = max(n, m->exit ? m->exit->n_hidden : 0);
    for (const Block *b = m->blocks; b < m->blocks + m->n_prelude + m->n_core + m->n_coda; b++)
        n = max(n, max(2 * b->ffn + b->n_experts, 2 * b->topk * max(b->expert_dim, 1)));
    return ((n + 15) / 16 | 1) * 16;
}

static void lay_out(WorkerPool *pool, float *next, Size size) {
    float **shared[] = {&pool->x, &pool->y, &pool->q, &pool->expert_y, &pool->absorbed, &pool->gate_hidden};
    for (Size i = 0; i < N_SHARED; i++, next += size) *shared[i] = next;
    for (Worker *w = pool->workers; w < pool->workers + pool->n; w++) {
        float **own[] = {&w->x, &w->normed, &w->e, &w->before, &w->attended, &w->queries, &w->raw, &w->rotary,
                         &w->hidden, &w->low_rank, &w->router, &w->expert_weight};
        for (Size i = 0; i < N_OWN - 1; i++, next += size) *own[i] = next;
        w->experts = (Size *)next;
        next += size;
    }
    pool->partial = next;
}

/* A pool of n workers, of which the caller of mythos_step is the first; NULL if memory or threads ran out. Weights and
 * blocks of the model must outlive it. */
WorkerPool *mythos_open(const Model *model, Size n) {
    WorkerPool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pool->model = *model;
    pool->n = n;
    pool->partial_width = (model->D + 2 + 15) / 16 * 16;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->workers = calloc(n, sizeof *pool->workers);
    Size size = largest(model), n_floats = (N_SHARED + N_OWN * n) * size + n * model->H * pool->partial_width;
    if (pool->workers && posix_memalign((void **)&pool->memory, 64, n_floats * sizeof(float))) pool->memory = NULL;
    if (pool->memory) {
        memset(pool->memory, 0, n_floats * sizeof(float));
        lay_out(pool, pool->memory, size);
    }
    Size started = 1;
    for (Size i = 0; pool->memory && i < n; i++) {
        pool->workers[i].pool = pool;
        pool->workers[i].id = i;
        if (i && pthread_create(&pool->workers[i].thread, NULL, work, &pool->workers[i])) break;
        started = i + 1;
    }
    if (!pool->memory || started < n) {
        pool->n = started;
        mythos_close(pool);
        return NULL;
    }
    return pool;
}
