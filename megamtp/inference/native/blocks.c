/* Transformer blocks over few new positions, in fp32 on a CPU.
 *
 * Decoding is bound by reading the weights, and a general matrix product reads them badly for few rows. Here a weight
 * (outputs, inputs) is stored in panels of 64 outputs, [outputs / 64][inputs][64], which one pass reads in order, for
 * several rows at a time; keys are stored as panels of 32 slots, values as panels of 32 channels, so that attention is
 * the same product twice.
 *
 * The order of every sum is fixed: it depends neither on the number of rows nor on what else is computed beside. So a
 * position's result has the same bits alone, in a batch, as a draft or in a prompt. (Not compiled with -ffast-math.)
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define WIDE 64      /* columns of a weight's panel: enough sums for one row not to wait for its own */
#define PANEL 32     /* columns of the cache's panels */
#define LANES 16     /* partial sums of a norm, partial maxima of a softmax */
#define FFN_ROWS 128 /* rows of hidden units that exist at a time */
#define THREAD_WORK (1l << 20) /* multiplications that are worth meeting for: some 30 microseconds of one thread */

/* Numbers in a register, and rows at a time such that the sums fit into the registers. */
#if defined(__AVX512F__)
#define VECTOR 16
#define WIDE_TILE 4
#define TILE 8
#elif defined(__AVX__)
#define VECTOR 8
#define WIDE_TILE 1
#define TILE 2
#else
#define VECTOR 4
#define WIDE_TILE 1
#define TILE 2
#endif

typedef float vec __attribute__((vector_size(VECTOR * sizeof(float)), aligned(sizeof(float))));

struct block {
    const float *attention_norm, *wqkv, *wo, *ffn_norm, *w13, *w2; /* matrices in panels */
    const float *unembedding;                                      /* of a head */
};

struct model {
    int dim, n_heads, n_kv_heads, head_dim, ffn_dim, vocab_size, n_threads;
    float norm_eps;
    const struct block *blocks;        /* the trunk's, then the heads' */
    const float *norm;                 /* of all heads */
    const float *cos, *sin;            /* (positions, head_dim / 2) */
};

struct cache {
    float *const *keys;   /* per layer (rows, n_kv_heads, capacity / 32, head_dim, 32) */
    float *const *values; /* per layer (rows, n_kv_heads, padded head_dim / 32, capacity, 32) */
    int capacity;         /* a multiple of 32 */
};

/* New positions: n_new behind the lengths[b] that row first_row + b of the cache holds. */
struct positions {
    int n_rows, n_new, first_row;
    const int *lengths;       /* (n_rows,) */
    const int *depths;        /* (n_new,) place behind the length; NULL: 0, 1, 2 ... */
    const uint8_t *ancestors; /* (n_new, n_new) which new ones each sees; NULL: those before it, and itself */
};

static inline int threads_for(long work, int n_threads) { return work < THREAD_WORK ? 1 : n_threads; }

static inline int padded(int n, int panel) { return (n + panel - 1) / panel * panel; }

/* out (rows, columns) = x (rows, k) times one panel (k, columns). `rows`, `columns`: constants where this is inlined. */
static inline __attribute__((always_inline)) void tile(int rows, int columns, int k, const float *x, long x_stride,
                                                       const float *w, float *out, long out_stride)
{
    vec sums[TILE][WIDE / VECTOR];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < columns / VECTOR; v++)
            sums[r][v] = (vec){0};
    for (int i = 0; i < k; i++)
        for (int v = 0; v < columns / VECTOR; v++) {
            const vec weights = *(const vec *)(w + (long)i * columns + v * VECTOR);
            for (int r = 0; r < rows; r++)
                sums[r][v] += x[r * x_stride + i] * weights;
        }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < columns / VECTOR; v++)
            *(vec *)(out + r * out_stride + v * VECTOR) = sums[r][v];
}

#define CASE(n, columns) case n: tile(n, columns, k, x, x_stride, w, out, out_stride); break;

static void wide_panel(int rows, int k, const float *x, long x_stride, const float *w, float *out, long out_stride)
{
    switch (rows) {
        CASE(1, WIDE)
#if WIDE_TILE == 4
        CASE(2, WIDE) CASE(3, WIDE) CASE(4, WIDE)
#endif
    }
}

static void panel(int rows, int k, const float *x, long x_stride, const float *w, float *out, long out_stride)
{
    switch (rows) {
        CASE(1, PANEL) CASE(2, PANEL)
#if TILE == 8
        CASE(3, PANEL) CASE(4, PANEL) CASE(5, PANEL) CASE(6, PANEL) CASE(7, PANEL) CASE(8, PANEL)
#endif
    }
}

/* out (rows, n) = x (rows, k) W, or is increased by it. */
static void product(int rows, int k, const float *x, long x_stride, const float *w, int n, float *out, int add,
                    int n_threads)
{
    n_threads = threads_for((long)rows * k * n, n_threads);
#pragma omp parallel for num_threads(n_threads) if (n_threads > 1)
    for (int c = 0; c < n; c += WIDE) {
        float result[WIDE_TILE * WIDE];
        const int width = n - c < WIDE ? n - c : WIDE;
        for (int first = 0; first < rows; first += WIDE_TILE) {
            const int count = rows - first < WIDE_TILE ? rows - first : WIDE_TILE;
            wide_panel(count, k, x + first * x_stride, x_stride, w + (long)c * k, result, WIDE);
            for (int r = 0; r < count; r++) {
                float *row = out + (long)(first + r) * n + c;
                for (int i = 0; i < width; i++)
                    row[i] = add ? row[i] + result[r * WIDE + i] : result[r * WIDE + i];
            }
        }
    }
}

/* exp of x <= 88, to 2 units in the last place; 0 below the smallest normal number. After Cephes' expf. */
static inline float exponential(float x)
{
    const float bounded = x < -87.f ? -87.f : x > 88.f ? 88.f : x;
    const float n = (bounded * 1.44269504f + 12582912.f) - 12582912.f; /* rounds */
    const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.f;
    const int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return x < -87.f ? 0.f : y * power;
}

static void norm(int rows, int dim, const float *x, const float *weight, float eps, float *out, int n_threads)
{
    n_threads = threads_for((long)rows * dim, n_threads);
#pragma omp parallel for num_threads(n_threads) if (n_threads > 1)
    for (int r = 0; r < rows; r++) {
        const float *row = x + (long)r * dim;
        float lanes[LANES] = {0}, sum = 0;
        for (int i = 0; i + LANES <= dim; i += LANES)
            for (int l = 0; l < LANES; l++)
                lanes[l] += row[i + l] * row[i + l];
        for (int i = dim - dim % LANES; i < dim; i++)
            sum += row[i] * row[i];
        for (int l = 0; l < LANES; l++)
            sum += lanes[l];
        const float scale = 1.f / sqrtf(sum / dim + eps);
        for (int i = 0; i < dim; i++)
            out[(long)r * dim + i] = row[i] * scale * weight[i];
    }
}

static void rotate(const struct model *m, float *head, int place)
{
    const int half = m->head_dim / 2;
    const float *cos = m->cos + (long)place * half, *sin = m->sin + (long)place * half;
    for (int i = 0; i < half; i++) {
        const float a = head[i], b = head[half + i];
        head[i] = a * cos[i] - b * sin[i];
        head[half + i] = b * cos[i] + a * sin[i];
    }
}

/* Turn queries and keys of qkv (n_rows * n_new, (n_heads + 2 n_kv_heads) head_dim), put keys and values away. */
static void rotate_and_store(const struct model *m, const struct positions *at, float *qkv, float *keys, float *values,
                             int capacity)
{
    const int hd = m->head_dim, g = m->n_kv_heads, width = (m->n_heads + 2 * g) * hd;
    const int n_threads = threads_for((long)at->n_rows * at->n_new * width, m->n_threads);
#pragma omp parallel for num_threads(n_threads) if (n_threads > 1)
    for (int n = 0; n < at->n_rows * at->n_new; n++) {
        const int b = n / at->n_new, i = n % at->n_new, slot = at->lengths[b] + i;
        const int place = at->lengths[b] + (at->depths ? at->depths[i] : i);
        float *heads = qkv + (long)n * width;
        for (int h = 0; h < m->n_heads + g; h++)
            rotate(m, heads + h * hd, place);
        for (int head = 0; head < g; head++) {
            const long row = (long)(at->first_row + b) * g + head;
            float *to = keys + (row * capacity + slot / PANEL * PANEL) * hd + slot % PANEL;
            const float *key = heads + (m->n_heads + head) * hd, *value = key + g * hd;
            for (int c = 0; c < hd; c++)
                to[(long)c * PANEL] = key[c];
            for (int c = 0; c < hd; c++)
                values[(row * padded(hd, PANEL) + c / PANEL * PANEL) * capacity + (long)slot * PANEL + c % PANEL] = value[c];
        }
    }
}

/* Slots that new position i of a row may look at lie below this. */
static inline int end_of(const struct positions *at, int length, int i)
{
    return at->ancestors ? length + at->n_new : length + i + 1;
}

/* Scores of one query into weights, 0 from its end up to n; they are still to be divided by their sum. */
static void exponentials(const struct positions *at, int length, int i, float *scores, int n)
{
    const int end = end_of(at, length, i);
    if (at->ancestors)
        for (int j = 0; j < at->n_new; j++)
            if (!at->ancestors[i * at->n_new + j])
                scores[length + j] = -INFINITY;
    float lanes[LANES], largest = scores[0];
    for (int l = 0; l < LANES; l++)
        lanes[l] = largest;
    for (int j = 0; j + LANES <= end; j += LANES)
        for (int l = 0; l < LANES; l++)
            lanes[l] = scores[j + l] > lanes[l] ? scores[j + l] : lanes[l];
    for (int j = end - end % LANES; j < end; j++)
        largest = scores[j] > largest ? scores[j] : largest;
    for (int l = 0; l < LANES; l++)
        largest = lanes[l] > largest ? lanes[l] : largest;
    for (int j = 0; j < end; j++)
        scores[j] = exponential(scores[j] - largest);
    for (int j = end; j < n; j++)
        scores[j] = 0;
}

/* Queries [first, first + count) of one row and one key head. They are numbered position by position; with `only`, the
 * row has one position. out (n_rows * positions, n_heads * head_dim). */
static void attend(const struct model *m, const struct positions *at, const float *qkv, const float *keys,
                   const float *values, int capacity, const int *only, int b, int head, int first, int count,
                   float *scratch, float *out)
{
    const int hd = m->head_dim, group = m->n_heads / m->n_kv_heads, width = (m->n_heads + 2 * m->n_kv_heads) * hd;
    const int length = at->lengths[b], n_positions = only ? 1 : at->n_new;
    const int last = only ? only[b] : (first + count - 1) / group;
    const int n = end_of(at, length, last);
    const long row = (long)(at->first_row + b) * m->n_kv_heads + head, stride = padded(n, PANEL);
    float *q = scratch, *result = q + TILE * hd, *scores = result + TILE * PANEL;
    const float scale = 1.f / sqrtf(hd);
    for (int j = 0; j < count; j++) {
        const int i = only ? only[b] : (first + j) / group;
        const float *from = qkv + (long)(b * at->n_new + i) * width + (head * group + (first + j) % group) * hd;
        for (int c = 0; c < hd; c++)
            q[j * hd + c] = from[c] * scale;
    }
    for (int p = 0; p < stride; p += PANEL)
        panel(count, hd, q, hd, keys + (row * capacity + p) * hd, scores + p, stride);
    for (int j = 0; j < count; j++)
        exponentials(at, length, only ? only[b] : (first + j) / group, scores + j * stride, n);
    float sums[TILE] = {0}; /* in the order of the slots, since a branch of a tree has others in between */
    for (int slot = 0; slot < n; slot++)
        for (int j = 0; j < count; j++)
            sums[j] += scores[j * stride + slot];
    for (int c = 0; c < hd; c += PANEL) {
        panel(count, n, scores, stride, values + (row * padded(hd, PANEL) + c) * capacity, result, PANEL);
        for (int j = 0; j < count; j++) {
            const int i = only ? 0 : (first + j) / group;
            float *to = out + ((long)(b * n_positions + i) * m->n_heads + head * group + (first + j) % group) * hd + c;
            for (int k = 0; k < PANEL && c + k < hd; k++)
                to[k] = result[j * PANEL + k] / sums[j];
        }
    }
}

static void feed_forward(const struct model *m, const struct block *w, int rows, float *x, float *scratch)
{
    const int f = m->ffn_dim, d = m->dim;
    float *normed = scratch, *hidden = scratch + (long)(rows < FFN_ROWS ? rows : FFN_ROWS) * d;
    for (int first = 0; first < rows; first += FFN_ROWS) {
        const int count = rows - first < FFN_ROWS ? rows - first : FFN_ROWS;
        norm(count, d, x + (long)first * d, w->ffn_norm, m->norm_eps, normed, m->n_threads);
        product(count, d, normed, d, w->w13, 2 * f, hidden, 0, m->n_threads);
        for (int r = 0; r < count; r++) {
            float *gate = hidden + (long)r * 2 * f;
            for (int i = 0; i < f; i++)
                gate[i] = gate[i] / (1.f + exponential(-gate[i])) * gate[f + i];
        }
        product(count, f, hidden, 2l * f, w->w2, d, x + (long)first * d, 1, m->n_threads);
    }
}

/* One block: new keys and values of all positions of x (n_rows, n_new, dim); its output in y, which begins as a copy
 * of x, or, with `only` (n_rows,), of that position of each row: (n_rows, dim). 0, or 1 when memory is short. */
static int run_block(const struct model *m, int layer, const struct cache *cache, const struct positions *at,
                     const float *x, const int *only, float *y)
{
    const int hd = m->head_dim, d = m->dim, rows = at->n_rows * at->n_new, n_queried = only ? at->n_rows : rows;
    const int width = (m->n_heads + 2 * m->n_kv_heads) * hd, group = m->n_heads / m->n_kv_heads;
    const int per_row = (only ? 1 : at->n_new) * group, n_tiles = (per_row + TILE - 1) / TILE;
    const int ffn_rows = n_queried < FFN_ROWS ? n_queried : FFN_ROWS;
    const struct block *w = m->blocks + layer;
    float *keys = cache->keys[layer], *values = cache->values[layer];
    float *qkv = malloc(sizeof(float) * rows * width), *normed = malloc(sizeof(float) * rows * d);
    float *attended = malloc(sizeof(float) * n_queried * m->n_heads * hd);
    float *scratch = malloc(sizeof(float) * ffn_rows * (d + 2l * m->ffn_dim));
    int failed = !qkv || !normed || !attended || !scratch;
    if (!failed) {
        norm(rows, d, x, w->attention_norm, m->norm_eps, normed, m->n_threads);
        product(rows, d, normed, d, w->wqkv, width, qkv, 0, m->n_threads);
        rotate_and_store(m, at, qkv, keys, values, cache->capacity);
        long seen = 0;
        for (int b = 0; b < at->n_rows; b++)
            seen += at->lengths[b] + at->n_new;
        const int n_threads = threads_for(2 * seen * per_row * m->n_kv_heads * hd, m->n_threads);
#pragma omp parallel for collapse(3) num_threads(n_threads) if (n_threads > 1)
        for (int b = 0; b < at->n_rows; b++)
            for (int head = 0; head < m->n_kv_heads; head++)
                for (int t = 0; t < n_tiles; t++) {
                    const int count = per_row - t * TILE < TILE ? per_row - t * TILE : TILE;
                    const long size = TILE * (hd + PANEL + (long)padded(at->lengths[b] + at->n_new, PANEL));
                    float *own = malloc(sizeof(float) * size);
                    if (own)
                        attend(m, at, qkv, keys, values, cache->capacity, only, b, head, t * TILE, count, own, attended);
                    else {
#pragma omp atomic write
                        failed = 1;
                    }
                    free(own);
                }
    }
    if (!failed) {
        product(n_queried, m->n_heads * hd, attended, m->n_heads * hd, w->wo, d, y, 1, m->n_threads);
        feed_forward(m, w, n_queried, y, scratch);
    }
    free(qkv), free(normed), free(attended), free(scratch);
    return failed;
}

/* The first n blocks over x (n_rows, n_new, dim), in place. 0, or 1 when memory is short. */
int run_trunk(const struct model *m, int n, const struct cache *cache, const struct positions *at, float *x)
{
    int failed = 0;
    for (int layer = 0; layer < n && !failed; layer++)
        failed = run_block(m, layer, cache, at, x, NULL, x);
    return failed;
}

/* What each of the blocks [first, first + n) predicts from the trunk's output z (n_rows, n_new, dim): logits
 * (n, n_rows, n_new, vocab_size); with `only` (n_rows,) from that position of each row: (n, n_rows, vocab_size). */
int run_heads(const struct model *m, int first, int n, const struct cache *cache, const struct positions *at,
              const float *z, const int *only, float *logits)
{
    const int d = m->dim, rows = at->n_rows * (only ? 1 : at->n_new);
    float *y = malloc(sizeof(float) * rows * d), *normed = malloc(sizeof(float) * rows * d);
    int failed = !y || !normed;
    for (int k = 0; k < n && !failed; k++) {
        if (only)
            for (int b = 0; b < at->n_rows; b++)
                memcpy(y + (long)b * d, z + (long)(b * at->n_new + only[b]) * d, sizeof(float) * d);
        else
            memcpy(y, z, sizeof(float) * rows * d);
        failed = run_block(m, first + k, cache, at, z, only, y);
        norm(rows, d, y, m->norm, m->norm_eps, normed, m->n_threads);
        product(rows, d, normed, d, m->blocks[first + k].unembedding, m->vocab_size,
                logits + (long)k * rows * m->vocab_size, 0, m->n_threads);
    }
    free(y), free(normed);
    return failed;
}
