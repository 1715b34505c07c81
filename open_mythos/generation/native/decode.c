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

static void run_block(Worker *w, const Block *block, const Slot *slot, Size row) {
    Team *team = w->team;
    const Model *m = &team->model;
    Size lo, hi, mixed = m->H * m->V;
    Slot rows = row_of(w, slot, row);
    rms_norm(w->normed, w->x, NULL, m->dim, m->eps);
    (m->mla ? attention_mla : attention_gqa)(w, block, &rows, w->position);
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

/* The place of the row's new token, and the turns that go with it. */
static void take_place(Worker *w, Size row) {
    const Model *m = &w->team->model;
    const Step *step = &w->team->step;
    if (row && step->starts[row] == w->start) return;
    w->start = step->starts[row];
    w->position = step->position - w->start;
    for (Size i = 0; i < m->P / 2; i++) {
        double angle = w->position * m->frequencies[i];
        w->turns[2 * i] = (float)cos(angle);
        w->turns[2 * i + 1] = (float)sin(angle);
    }
}

static void run_row(Worker *w, Size row) {
    Team *team = w->team;
    const Model *m = &team->model;
    const Step *step = &team->step;
    const Slot *slot = step->slots, *loops = slot + m->n_prelude;
    const Block *block = m->blocks;
    Size dim = m->dim, loop = 0;
    float carried = 0;
    int stopped = 0;
    const float *embedding = m->embed + step->ids[row] * dim;
    for (Size i = 0; i < dim; i++) w->x[i] = embedding[i] * sqrtf((float)dim);
    for (Size i = 0; i < m->n_prelude; i++) run_block(w, block++, slot++, row);
    if (m->input_norm) rms_norm(w->e, w->x, m->input_norm, dim, m->eps);
    else memcpy(w->e, w->x, dim * sizeof(float));
    if (step->h) memcpy(w->x, step->h + row * dim, dim * sizeof(float));
    else if (m->start_from_input) memcpy(w->x, w->e, dim * sizeof(float));
    else memset(w->x, 0, dim * sizeof(float));
    product(w->adapted, m->lora_down, w->e, dim, 0, m->rank);
    for (; loop < step->n_loops && !stopped; loop++) {
        if (m->exit) memcpy(w->before, w->x, dim * sizeof(float));
        inject(w, loop);
        for (Size i = 0; i < m->n_core; i++) run_block(w, block + i, slot++, row);
        for (Size r = 0; r < m->rank; r++) w->adapted[m->rank + r] = w->adapted[r] * m->lora_scale[loop * m->rank + r];
        if (m->rank) add_product(w->x, m->lora_up, w->adapted + m->rank, m->rank, 0, dim);
        if (m->state_norm) rms_norm(w->x, w->x, m->state_norm, dim, m->eps);
        stopped = m->exit && loop + 1 < step->n_loops && stops(w, m->exit, &carried);
    }
    stand_in(w, loops, row, loop - 1);
    slot = loops + step->n_loops * m->n_core;
    block += m->n_core;
    if (w->id == 0) {
        memcpy(step->state + row * dim, w->x, dim * sizeof(float));
        step->used[row] = loop;
    }
    for (Size i = 0; i < m->n_coda; i++) run_block(w, block++, slot++, row);
    rms_norm(w->normed, w->x, m->norm, dim, m->eps);
    shared_product(w, step->logits + row * m->vocab, m->head, w->normed, dim, m->vocab);
}

static void run(Worker *w) {
    for (Size row = 0; row < w->team->step.batch; row++) {
        take_place(w, row);
        run_row(w, row);
    }
    barrier(w->team);
}

/* -- workers */

#ifdef __linux__
/* OpenMP's own, if this process has it: gives up the threads of the caller's pool; 1 is "soft". */
extern int omp_pause_resource_all(int kind) __attribute__((weak));
#endif

/* PyTorch's threads, which have just read the prompt, go on waiting at full speed for some 15 ms, on the cores that our
 * workers need; tokens would take three times as long. PyTorch makes new ones when it needs them, in a tenth of a
 * millisecond. */
static void quiet_others(void) {
#ifdef __linux__
    if (omp_pause_resource_all) omp_pause_resource_all(1);
#endif
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
    for (Size i = 0; i < m->n_prelude + m->n_core + m->n_coda; i++) {
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
    team->absorbed = take(memory, &used, m->H * team->key_width);
    team->seen = take(memory, &used, m->exit ? m->exit->n_hidden : 0);
    team->partial = take(memory, &used, team->n * m->H * (team->value_width + LANES));
    for (Size i = 0; i < team->n; i++) {
        Worker *w = &team->workers[i];
        w->x = take(memory, &used, m->dim);
        w->normed = take(memory, &used, m->dim);
        w->e = take(memory, &used, m->dim);
        w->before = take(memory, &used, m->dim);
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
    if (n > 1) quiet_others();
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
