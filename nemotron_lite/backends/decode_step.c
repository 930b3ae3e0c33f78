/* A few tokens through all layers of a model, in one call.

   The equations are those of layers/ and ops/; this file only puts them into one piece, so that a
   decoded token costs its arithmetic and no calls. compiled_step.py compiles it (once with weights
   in float32, once with -DBF16), fills the structs below, and says when it may be used.

   All threads run the same code from the first layer to the last. `share` says which part of a loop
   is a thread's own, and a barrier stands wherever one thread reads what another has written. What
   is cheap (norms, the choice of experts) every thread computes for itself.

   Activations, sums and the residual stream are float32, with either kind of weights. Rounding
   differs from the PyTorch path, which rounds each activation of a BF16 model to BF16.

   Rows: row r of the batch and its token t are row r * tokens + t of every activation. */

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef __AVX512F__
enum { LANES = 16, ROWS = 4 };
#else
enum { LANES = 8, ROWS = 2 }; /* 8 sums of 4 x 2 fit into the registers of AVX2 */
#endif
enum { OUTPUTS = 4 };

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

static inline Vector load(const float *from) {
    Vector v;
    memcpy(&v, from, sizeof v);
    return v;
}

#ifdef BF16
typedef uint16_t Number;

static inline float widen(Number half) {
    uint32_t bits = (uint32_t)half << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

static inline Number narrow(float wide) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &wide, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (Number)(bits >> 16 | 0x40);
    return (Number)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline Vector load_weights(const Number *from) {
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    Bits bits = __builtin_convertvector(halves, Bits) << 16;
    Vector v;
    memcpy(&v, &bits, sizeof v);
    return v;
}
#else
typedef float Number;

static inline float widen(Number number) { return number; }
static inline Number narrow(float wide) { return wide; }
static inline Vector load_weights(const Number *from) { return load(from); }
#endif

static inline float sum_of(Vector v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

/* ---- What Python fills. Every field has 8 bytes. ---- */

typedef struct {
    const Number *matrix; /* out in; null if the layer has none */
    const Number *bias;   /* out, or null */
    int64_t out, in;
} Linear;

typedef struct {
    Linear in_proj, out_proj;
    const Number *taps, *tap_bias; /* c k; c or null */
    const Number *A_log, *D, *dt_bias, *scales;
    int64_t heads, width, groups, state, kernel; /* h p g n k */
    double eps, dt_low, dt_high;
} Mamba;

typedef struct {
    Linear q, k, v, o;
    int64_t heads, kv_heads, width;
} Attention;

typedef struct {
    Linear router, fc1, fc2, shared_up, shared_down;
    const float *bias;       /* of the selection, e */
    const Number *up, *down; /* e f l, e l f */
    int64_t experts, chosen, hidden, latent, normalize;
    double scale;
} Moe;

typedef struct {
    Linear up, down;
} Mlp;

typedef struct {
    int64_t kind; /* 0 Mamba, 1 attention, 2 experts, 3 MLP */
    const Number *norm;
    double eps;
    const void *mixer;
} Layer;

typedef struct {
    Number *first;    /* inputs of the convolution b k-1 c; or keys b j capacity p */
    void *second;     /* SSM states b h p n in float32; or values */
    int64_t capacity; /* of keys and values */
    /* What a draft leaves for `accept` (layers/mamba2.py); null where no draft is read. */
    Number *window;   /* b k-1+t c */
    Number *x, *B;    /* b t h p, b t g n */
    float *dt;        /* b t h */
} State;

typedef struct {
    const Layer *layers;
    const State *states;
    const int64_t *starts; /* tokens before, b */
    float *stream;         /* b*t d */
    float *scratch;
    int64_t count, rows, tokens, d, wide, keys, threads;
} Call;

/* ---- Threads ---- */

/* Where all threads wait for each other. OpenMP's own barrier lets a thread sleep after a short
   while wherever a process has more threads than cores, and waking it takes longer than a layer of
   a small model. Here it waits actively for about as long as a layer takes, and then gives its core
   away again and again: beside a busy neighbour the other thread needs it. */
typedef struct {
    atomic_int arrived, rounds;
} Meeting;

enum { ACTIVE = 2000 };

typedef struct {
    int64_t thread, threads;
    Meeting *meeting;
    float *shared[3];  /* rows of activations that all threads see, `wide` numbers each */
    float *private[2]; /* the same of this thread alone */
    float *scores;     /* `keys` numbers of this thread, then one state */
} Team;

typedef struct {
    int64_t begin, end;
} Range;

static inline Range share(const Team *team, int64_t count, int64_t block) {
    int64_t blocks = (count + block - 1) / block;
    Range mine = {team->thread * blocks / team->threads * block,
                  (team->thread + 1) * blocks / team->threads * block};
    if (mine.end > count) mine.end = count;
    return mine;
}

static inline void pause_core(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void wait_for_all(const Team *team) {
    if (team->threads == 1) return;
    Meeting *m = team->meeting;
    int round = atomic_load_explicit(&m->rounds, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&m->arrived, 1, memory_order_acq_rel) + 1 == team->threads) {
        atomic_store_explicit(&m->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&m->rounds, round + 1, memory_order_release);
        return;
    }
    for (int64_t i = 0; atomic_load_explicit(&m->rounds, memory_order_acquire) == round; i++) {
        if (i < ACTIVE)
            pause_core();
        else
            sched_yield();
    }
}

/* ---- Products ---- */

/* sums[o][r] = row o of a matrix times input r, for OUTPUTS rows and `rows` inputs, a constant. */
static inline __attribute__((always_inline)) void tile(
    const Number *matrix, int64_t in, const float *const *inputs, int rows, int outputs,
    float sums[OUTPUTS][ROWS]) {
    Vector parts[OUTPUTS][ROWS];
    for (int o = 0; o < outputs; o++)
        for (int r = 0; r < rows; r++) parts[o][r] = (Vector){0};
    int64_t i = 0;
    for (; i + LANES <= in; i += LANES) {
        Vector x[ROWS];
        for (int r = 0; r < rows; r++) x[r] = load(inputs[r] + i);
        for (int o = 0; o < outputs; o++) {
            const Number *at = matrix + o * in + i;
            /* Rows are read once: the next ones are fetched while these are multiplied. */
            if (outputs > 1) __builtin_prefetch(at + outputs * in);
            Vector w = load_weights(at);
            for (int r = 0; r < rows; r++) parts[o][r] += w * x[r];
        }
    }
    for (int o = 0; o < outputs; o++)
        for (int r = 0; r < rows; r++) {
            float sum = sum_of(parts[o][r]);
            for (int64_t j = i; j < in; j++) sum += widen(matrix[o * in + j]) * inputs[r][j];
            sums[o][r] = sum;
        }
}

static inline void tile_of(const Number *matrix, int64_t in, const float *const *inputs, int rows,
                           int outputs, float sums[OUTPUTS][ROWS]) {
    if (outputs == OUTPUTS) {
        switch (rows) {
            case 1: tile(matrix, in, inputs, 1, OUTPUTS, sums); return;
            case 2: tile(matrix, in, inputs, 2, OUTPUTS, sums); return;
#ifdef __AVX512F__
            case 3: tile(matrix, in, inputs, 3, OUTPUTS, sums); return;
            case 4: tile(matrix, in, inputs, 4, OUTPUTS, sums); return;
#endif
        }
    }
    for (int o = 0; o < outputs; o++) /* the last outputs of a matrix */
        for (int r = 0; r < rows; r++) {
            float sum[OUTPUTS][ROWS];
            tile(matrix + o * in, in, inputs + r, 1, 1, sum);
            sums[o][r] = sum[0][0];
        }
}

typedef enum { SET, ADD, SQUARED_RELU } Then;

static inline float squared_relu(float x) {
    x = x < 0 ? 0 : x; /* this way round NaN stays NaN */
    return x * x;
}

/* Outputs `mine` of some inputs, which are `step` numbers apart: set, added or activated. */
static void multiply(const Linear *linear, Range mine, const float *x, int64_t step, int64_t rows,
                     float *y, int64_t y_step, Then then) {
    for (int64_t o = mine.begin; o < mine.end; o += OUTPUTS) {
        int outputs = mine.end - o < OUTPUTS ? (int)(mine.end - o) : OUTPUTS;
        for (int64_t r = 0; r < rows; r += ROWS) {
            int some = rows - r < ROWS ? (int)(rows - r) : ROWS;
            const float *inputs[ROWS];
            float sums[OUTPUTS][ROWS];
            for (int i = 0; i < some; i++) inputs[i] = x + (r + i) * step;
            tile_of(linear->matrix + o * linear->in, linear->in, inputs, some, outputs, sums);
            for (int i = 0; i < outputs; i++)
                for (int j = 0; j < some; j++) {
                    float sum = sums[i][j] + (linear->bias ? widen(linear->bias[o + i]) : 0);
                    float *to = y + (r + j) * y_step + o + i;
                    *to = then == ADD ? *to + sum : then == SET ? sum : squared_relu(sum);
                }
        }
    }
}

/* A whole linear layer, divided among the threads. */
static void times(const Team *team, const Linear *linear, const float *x, int64_t step,
                  int64_t rows, float *y, int64_t y_step, Then then) {
    multiply(linear, share(team, linear->out, OUTPUTS), x, step, rows, y, y_step, then);
}

/* ---- Small functions ---- */

static void rms_norm(const float *x, const Number *scales, double eps, int64_t n, float *y) {
    float squares = 0;
    for (int64_t i = 0; i < n; i++) squares += x[i] * x[i];
    float scale = 1 / sqrtf(squares / n + (float)eps);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * widen(scales[i]);
}

static float *normed(const Team *team, const Call *call, const Layer *layer) {
    float *to = team->private[0];
    for (int64_t r = 0; r < call->rows * call->tokens; r++)
        rms_norm(call->stream + r * call->d, layer->norm, layer->eps, call->d, to + r * call->d);
    return to;
}

static inline float silu(float x) { return x / (1 + expf(-x)); }
static inline float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

/* ---- Mixers ---- */

/* One channel of the convolution after another; the inputs of a row stay in `first` or `window`. */
static void convolve(const Team *team, const Call *call, const Mamba *mamba, const State *state,
                     const float *projected, int64_t step, float *out, int64_t channels) {
    int64_t before = mamba->kernel - 1, tokens = call->tokens;
    Range mine = share(team, channels, LANES);
    for (int64_t r = 0; r < call->rows; r++) {
        Number *kept = state->first + r * before * channels;
        Number *window = state->window ? state->window + r * (before + tokens) * channels : 0;
        if (window)
            for (int64_t i = 0; i < before; i++)
                memcpy(window + i * channels + mine.begin, kept + i * channels + mine.begin,
                       (mine.end - mine.begin) * sizeof(Number));
        for (int64_t t = 0; t < tokens; t++) {
            const float *x = projected + (r * tokens + t) * step;
            float *y = out + (r * tokens + t) * channels;
            const Number *past = window ? window + t * channels : kept;
            Number *next = window ? window + (before + t) * channels : 0;
            for (int64_t c = mine.begin; c < mine.end; c++) {
                const Number *taps = mamba->taps + c * mamba->kernel;
                Number now = narrow(x[c]); /* the cache has the dtype of the weights */
                float sum = mamba->tap_bias ? widen(mamba->tap_bias[c]) : 0;
                for (int64_t i = 0; i < before; i++)
                    sum += widen(past[i * channels + c]) * widen(taps[i]);
                sum += widen(now) * widen(taps[before]);
                y[c] = silu(sum);
                if (next) {
                    next[c] = now;
                } else {
                    for (int64_t i = 0; i + 1 < before; i++)
                        kept[i * channels + c] = kept[(i + 1) * channels + c];
                    if (before) kept[(before - 1) * channels + c] = now;
                }
            }
        }
    }
}

/* The recurrence of one head of one row, token after token. */
static void scan(const Call *call, const Mamba *m, const State *state, int64_t r, int64_t head,
                 const float *projected, int64_t step, const float *xBC, int64_t channels,
                 float *spare, float *y) {
    int64_t inner = m->heads * m->width, size = m->width * m->state, tokens = call->tokens;
    int64_t group = head / (m->heads / m->groups);
    float *S = (float *)state->second + (r * m->heads + head) * size;
    if (state->window) { /* a draft does not change the state */
        memcpy(spare, S, size * sizeof(float));
        S = spare;
    }
    float A = -expf(widen(m->A_log[head]));
    for (int64_t t = 0; t < tokens; t++) {
        int64_t row = r * tokens + t;
        const float *z = projected + row * step + head * m->width;
        const float *x = xBC + row * channels + head * m->width;
        const float *B = xBC + row * channels + inner + group * m->state;
        const float *C = B + m->groups * m->state;
        float dt = softplus(projected[row * step + inner + channels + head]
                            + widen(m->dt_bias[head]));
        if (dt < (float)m->dt_low) dt = (float)m->dt_low; /* fmaxf would drop NaN */
        if (dt > (float)m->dt_high) dt = (float)m->dt_high;
        float fade = expf(dt * A), skip = widen(m->D[head]);
        float *out = y + row * inner + head * m->width;
        for (int64_t p = 0; p < m->width; p++) {
            float write = dt * x[p], sum = 0, *s = S + p * m->state;
            for (int64_t n = 0; n < m->state; n++) {
                s[n] = s[n] * fade + write * B[n];
                sum += s[n] * C[n];
            }
            out[p] = (sum + skip * x[p]) * silu(z[p]);
        }
        if (state->window) {
            state->dt[row * m->heads + head] = dt;
            for (int64_t p = 0; p < m->width; p++)
                state->x[row * inner + head * m->width + p] = narrow(x[p]);
            if (head % (m->heads / m->groups) == 0)
                for (int64_t n = 0; n < m->state; n++)
                    state->B[(row * m->groups + group) * m->state + n] = narrow(B[n]);
        }
    }
}

static void run_mamba(const Team *team, const Call *call, const Layer *layer, const State *state) {
    const Mamba *m = layer->mixer;
    int64_t rows = call->rows * call->tokens, inner = m->heads * m->width;
    int64_t step = m->in_proj.out, channels = inner + 2 * m->groups * m->state;
    float *projected = team->shared[0], *xBC = team->shared[1], *y = team->shared[2];
    times(team, &m->in_proj, normed(team, call, layer), call->d, rows, projected, step, SET);
    wait_for_all(team);
    convolve(team, call, m, state, projected + inner, step, xBC, channels);
    wait_for_all(team);
    Range mine = share(team, call->rows * m->heads, 1);
    for (int64_t i = mine.begin; i < mine.end; i++)
        scan(call, m, state, i / m->heads, i % m->heads, projected, step, xBC, channels,
             team->scores + call->keys, y);
    wait_for_all(team);
    int64_t each = inner / m->groups;
    float *gated = team->private[0];
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < m->groups; g++)
            rms_norm(y + r * inner + g * each, m->scales + g * each, m->eps, each,
                     gated + r * inner + g * each);
    times(team, &m->out_proj, gated, inner, rows, call->stream, call->d, ADD);
    wait_for_all(team);
}

/* One query against all keys it sees. */
static void attend(const float *query, const Number *keys, const Number *values, int64_t seen,
                   int64_t width, float *scores, float *y) {
    float scale = 1 / sqrtf((float)width), highest = -INFINITY, total = 0;
    for (int64_t s = 0; s < seen; s++) {
        const float *inputs[ROWS] = {query};
        float sums[OUTPUTS][ROWS];
        int some = seen - s < OUTPUTS ? 1 : OUTPUTS;
        tile_of(keys + s * width, width, inputs, 1, some, sums);
        for (int i = 0; i < some; i++) {
            scores[s + i] = sums[i][0] * scale;
            highest = fmaxf(highest, scores[s + i]);
        }
        s += some - 1;
    }
    for (int64_t s = 0; s < seen; s++) {
        scores[s] = expf(scores[s] - highest);
        total += scores[s];
    }
    for (int64_t p = 0; p < width; p++) y[p] = 0;
    for (int64_t s = 0; s < seen; s++) {
        float weight = scores[s] / total;
        for (int64_t p = 0; p < width; p++) y[p] += weight * widen(values[s * width + p]);
    }
}

static void run_attention(const Team *team, const Call *call, const Layer *layer,
                          const State *state) {
    const Attention *a = layer->mixer;
    int64_t rows = call->rows * call->tokens, tokens = call->tokens;
    int64_t q_wide = a->heads * a->width, kv_wide = a->kv_heads * a->width;
    float *x = normed(team, call, layer), *q = team->shared[0], *k = team->shared[1];
    float *v = k + rows * kv_wide, *y = team->shared[2];
    times(team, &a->q, x, call->d, rows, q, q_wide, SET);
    times(team, &a->k, x, call->d, rows, k, kv_wide, SET);
    times(team, &a->v, x, call->d, rows, v, kv_wide, SET);
    wait_for_all(team);
    Number *keys = state->first, *values = state->second;
    Range mine = share(team, call->rows * a->kv_heads, 1);
    for (int64_t i = mine.begin; i < mine.end; i++)
        for (int64_t t = 0; t < tokens; t++) {
            int64_t r = i / a->kv_heads, j = i % a->kv_heads;
            int64_t from = (r * tokens + t) * kv_wide + j * a->width;
            int64_t to = (i * state->capacity + call->starts[r] + t) * a->width;
            for (int64_t p = 0; p < a->width; p++) {
                keys[to + p] = narrow(k[from + p]);
                values[to + p] = narrow(v[from + p]);
            }
        }
    wait_for_all(team);
    mine = share(team, rows * a->heads, 1);
    for (int64_t i = mine.begin; i < mine.end; i++) {
        int64_t row = i / a->heads, head = i % a->heads, r = row / tokens, t = row % tokens;
        int64_t kv = r * a->kv_heads + head / (a->heads / a->kv_heads);
        int64_t at = row * q_wide + head * a->width;
        attend(q + at, keys + kv * state->capacity * a->width,
               values + kv * state->capacity * a->width, call->starts[r] + t + 1, a->width,
               team->scores, y + at);
    }
    wait_for_all(team);
    times(team, &a->o, y, q_wide, rows, call->stream, call->d, ADD);
    wait_for_all(team);
}

/* The experts of one token: those with the highest scores + bias, the first of equal ones. */
static void choose(const Moe *moe, const float *logits, int64_t *chosen, float *weights,
                   float *biased) {
    float total = 0;
    for (int64_t e = 0; e < moe->experts; e++)
        biased[e] = 1 / (1 + expf(-logits[e])) + moe->bias[e];
    for (int64_t k = 0; k < moe->chosen; k++) {
        int64_t found = 0;
        for (int64_t e = 1; e < moe->experts; e++)
            if (biased[e] > biased[found]) found = e;
        biased[found] = -INFINITY;
        chosen[k] = found;
        weights[k] = 1 / (1 + expf(-logits[found]));
        total += weights[k];
    }
    float scale = (float)moe->scale / (moe->normalize ? total + 1e-20f : 1);
    for (int64_t k = 0; k < moe->chosen; k++) weights[k] *= scale;
}

/* Rows [begin, end) of the outputs of one expert's matrix, for the pairs of `order` that chose it.
   `inputs` and `outputs` hold a row per pair; inputs of the first matrix are rows per token. */
static void run_pairs(const Number *matrices, int64_t out, int64_t in, Range mine,
                      const int64_t *order, const int64_t *experts, int64_t pairs,
                      int64_t per_input, const float *x, float *y, const float *weights) {
    for (int64_t unit = mine.begin; unit < mine.end;) { /* a unit is an output of a pair */
        int64_t first = unit / out, o = unit % out, expert = experts[order[first]], last = first;
        int64_t until = (first + 1) * out < mine.end ? out : o + mine.end - unit;
        if (o == 0) /* further pairs of the same expert whose outputs are all this thread's */
            while (last + 1 < pairs && experts[order[last + 1]] == expert
                   && (last + 2) * out <= mine.end && last - first + 1 < ROWS)
                last++;
        const float *inputs[ROWS];
        for (int64_t i = first; i <= last; i++) inputs[i - first] = x + order[i] / per_input * in;
        int some = (int)(last - first + 1);
        for (; o < until; o += OUTPUTS) {
            float sums[OUTPUTS][ROWS];
            int outputs = until - o < OUTPUTS ? (int)(until - o) : OUTPUTS;
            tile_of(matrices + (expert * out + o) * in, in, inputs, some, outputs, sums);
            for (int j = 0; j < some; j++)
                for (int i = 0; i < outputs; i++) {
                    int64_t pair = order[first + j];
                    float sum = sums[i][j];
                    y[pair * out + o + i] = weights ? squared_relu(sum) * weights[pair] : sum;
                }
        }
        unit = last > first ? (last + 1) * out : unit - unit % out + until;
    }
}

static void run_moe(const Team *team, const Call *call, const Layer *layer) {
    const Moe *moe = layer->mixer;
    int64_t rows = call->rows * call->tokens, pairs = rows * moe->chosen, d = call->d;
    int64_t latent = moe->latent, hidden_wide = moe->shared_up.out;
    float *x = normed(team, call, layer), *logits = team->shared[0];
    float *z = logits + rows * moe->experts, *shared = z + rows * latent;
    float *hidden = team->shared[1], *answers = team->shared[2];
    times(team, &moe->router, x, d, rows, logits, moe->experts, SET);
    if (moe->fc1.matrix) times(team, &moe->fc1, x, d, rows, z, latent, SET);
    if (moe->shared_up.matrix)
        times(team, &moe->shared_up, x, d, rows, shared, hidden_wide, SQUARED_RELU);
    wait_for_all(team);
    int64_t *experts = (int64_t *)team->private[1], *order = experts + pairs;
    float *weights = (float *)(order + pairs);
    for (int64_t r = 0; r < rows; r++)
        choose(moe, logits + r * moe->experts, experts + r * moe->chosen,
               weights + r * moe->chosen, weights + pairs);
    for (int64_t i = 0; i < pairs; i++) { /* sorted by expert */
        int64_t at = i;
        for (; at && experts[order[at - 1]] > experts[i]; at--) order[at] = order[at - 1];
        order[at] = i;
    }
    run_pairs(moe->up, moe->hidden, latent, share(team, pairs * moe->hidden, OUTPUTS), order,
              experts, pairs, moe->chosen, moe->fc1.matrix ? z : x, hidden, weights);
    wait_for_all(team);
    run_pairs(moe->down, latent, moe->hidden, share(team, pairs * latent, OUTPUTS), order, experts,
              pairs, 1, hidden, answers, 0);
    wait_for_all(team);
    float *sums = team->private[0]; /* x is not needed any more */
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < latent; i++) {
            float sum = 0;
            for (int64_t k = 0; k < moe->chosen; k++)
                sum += answers[(r * moe->chosen + k) * latent + i];
            sums[r * latent + i] = sum;
        }
    if (moe->fc2.matrix) {
        times(team, &moe->fc2, sums, latent, rows, call->stream, d, ADD);
    } else {
        Range mine = share(team, d, OUTPUTS);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = mine.begin; i < mine.end; i++)
                call->stream[r * d + i] += sums[r * d + i];
    }
    if (moe->shared_down.matrix)
        times(team, &moe->shared_down, shared, hidden_wide, rows, call->stream, d, ADD);
    wait_for_all(team);
}

static void run_mlp(const Team *team, const Call *call, const Layer *layer) {
    const Mlp *mlp = layer->mixer;
    int64_t rows = call->rows * call->tokens;
    float *x = normed(team, call, layer), *hidden = team->shared[0];
    times(team, &mlp->up, x, call->d, rows, hidden, mlp->up.out, SQUARED_RELU);
    wait_for_all(team);
    times(team, &mlp->down, hidden, mlp->up.out, rows, call->stream, call->d, ADD);
    wait_for_all(team);
}

/* ---- The whole ---- */

static void run_layers(const Call *call, int64_t thread, int64_t threads, int64_t spare,
                       Meeting *meeting) {
    Team team = {.thread = thread, .threads = threads, .meeting = meeting};
    for (int i = 0; i < 3; i++) team.shared[i] = call->scratch + i * call->wide;
    float *own = call->scratch + 3 * call->wide + thread * (2 * call->wide + call->keys + spare);
    team.private[0] = own;
    team.private[1] = own + call->wide;
    team.scores = own + 2 * call->wide;
    for (int64_t i = 0; i < call->count; i++) {
        const Layer *layer = call->layers + i;
        const State *state = call->states + i;
        switch (layer->kind) {
            case 0: run_mamba(&team, call, layer, state); break;
            case 1: run_attention(&team, call, layer, state); break;
            case 2: run_moe(&team, call, layer); break;
            default: run_mlp(&team, call, layer);
        }
    }
}

/* Tokens through all layers: `stream` holds embeddings before and the residual stream after.
   `spare` is the size of the largest SSM state of a head. */
void decode_step(const Call *call, int64_t spare) {
#ifdef _OPENMP
    if (call->threads > 1) {
        Meeting meeting = {0};
#pragma omp parallel num_threads((int)call->threads)
        run_layers(call, omp_get_thread_num(), omp_get_num_threads(), spare, &meeting);
        return;
    }
#endif
    run_layers(call, 0, 1, spare, 0);
}
