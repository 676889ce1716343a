/* Transformer blocks over few new positions, in fp32 on a CPU.
 *
 * Decoding is bound by reading the weights, and a general matrix product reads them badly for few rows. Here a weight
 * (outputs, inputs) is stored in panels of 32 outputs, [outputs / 32][inputs][32], which one pass reads in order, for
 * up to TILE rows at a time; keys are stored as panels of 32 slots, values as panels of 32 channels, so that attention
 * is the same product twice.
 *
 * The order of every sum is fixed: it depends neither on the number of rows nor on what else is computed beside. So a
 * position's result has the same bits alone, in a batch, as a draft or in a prompt. (Not compiled with -ffast-math.)
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define PANEL 32
#define FFN_ROWS 128 /* rows of hidden units that exist at a time */
#ifdef __AVX512F__
#define TILE 8 /* 16 of 32 registers hold sums */
#else
#define TILE 2
#endif

typedef float vec __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

struct shape {
    int dim, n_heads, n_kv_heads, head_dim, ffn_dim, n_threads;
    float norm_eps;
    const float *cos, *sin; /* (positions, head_dim / 2) */
};

struct block {
    const float *attention_norm, *wqkv, *wo, *ffn_norm, *w13, *w2; /* matrices in panels */
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

static inline int padded(int n) { return (n + PANEL - 1) / PANEL * PANEL; }

/* out (rows, 32) = x (rows, k) times one panel (k, 32). `rows` is a constant wherever this is inlined. */
static inline __attribute__((always_inline)) void tile(int rows, int k, const float *x, long x_stride, const float *w,
                                                       float *out, long out_stride)
{
    vec sums[TILE][2];
    for (int r = 0; r < rows; r++)
        sums[r][0] = sums[r][1] = (vec){0};
    for (int i = 0; i < k; i++) {
        const vec w0 = *(const vec *)(w + (long)i * PANEL), w1 = *(const vec *)(w + (long)i * PANEL + LANES);
        for (int r = 0; r < rows; r++) {
            const float factor = x[r * x_stride + i];
            sums[r][0] += factor * w0;
            sums[r][1] += factor * w1;
        }
    }
    for (int r = 0; r < rows; r++) {
        *(vec *)(out + r * out_stride) = sums[r][0];
        *(vec *)(out + r * out_stride + LANES) = sums[r][1];
    }
}

static void panel(int rows, int k, const float *x, long x_stride, const float *w, float *out, long out_stride)
{
    switch (rows) {
#define CASE(n) case n: tile(n, k, x, x_stride, w, out, out_stride); break;
        CASE(1) CASE(2)
#if TILE == 8
        CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#endif
    }
}

/* out (rows, n) = x (rows, k) W, or is increased by it. */
static void product(int rows, int k, const float *x, long x_stride, const float *w, int n, float *out, int add,
                    int n_threads)
{
#pragma omp parallel for num_threads(n_threads) if (n_threads > 1)
    for (int p = 0; p < padded(n) / PANEL; p++) {
        float result[TILE * PANEL];
        const int width = n - p * PANEL < PANEL ? n - p * PANEL : PANEL;
        for (int first = 0; first < rows; first += TILE) {
            const int count = rows - first < TILE ? rows - first : TILE;
            panel(count, k, x + first * x_stride, x_stride, w + (long)p * PANEL * k, result, PANEL);
            for (int r = 0; r < count; r++) {
                float *row = out + (long)(first + r) * n + p * PANEL;
                for (int c = 0; c < width; c++)
                    row[c] = add ? row[c] + result[r * PANEL + c] : result[r * PANEL + c];
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
#pragma omp parallel for num_threads(n_threads) if (n_threads > 1 && rows > TILE)
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

static void rotate(const struct shape *s, float *head, int place)
{
    const int half = s->head_dim / 2;
    const float *cos = s->cos + (long)place * half, *sin = s->sin + (long)place * half;
    for (int i = 0; i < half; i++) {
        const float a = head[i], b = head[half + i];
        head[i] = a * cos[i] - b * sin[i];
        head[half + i] = b * cos[i] + a * sin[i];
    }
}

/* Turn queries and keys of qkv (n_rows * n_new, (n_heads + 2 n_kv_heads) head_dim), put keys and values away. */
static void rotate_and_store(const struct shape *s, const struct positions *at, float *qkv, float *keys, float *values,
                             int capacity)
{
    const int hd = s->head_dim, g = s->n_kv_heads, width = (s->n_heads + 2 * g) * hd;
#pragma omp parallel for num_threads(s->n_threads) if (s->n_threads > 1 && at->n_rows * at->n_new > TILE)
    for (int n = 0; n < at->n_rows * at->n_new; n++) {
        const int b = n / at->n_new, i = n % at->n_new, slot = at->lengths[b] + i;
        const int place = at->lengths[b] + (at->depths ? at->depths[i] : i);
        float *heads = qkv + (long)n * width;
        for (int h = 0; h < s->n_heads + g; h++)
            rotate(s, heads + h * hd, place);
        for (int head = 0; head < g; head++) {
            const long row = (long)(at->first_row + b) * g + head;
            float *to = keys + (row * capacity + slot / PANEL * PANEL) * hd + slot % PANEL;
            const float *key = heads + (s->n_heads + head) * hd, *value = key + g * hd;
            for (int c = 0; c < hd; c++)
                to[(long)c * PANEL] = key[c];
            for (int c = 0; c < hd; c++)
                values[(row * padded(hd) + c / PANEL * PANEL) * capacity + (long)slot * PANEL + c % PANEL] = value[c];
        }
    }
}

/* Scores of one query, over n slots, into weights that are still to be divided by the sum that is returned. */
static float softmax(const struct positions *at, int length, int i, float *scores, int n)
{
    const int end = at->ancestors ? length + at->n_new : length + i + 1;
    if (at->ancestors)
        for (int m = 0; m < at->n_new; m++)
            if (!at->ancestors[i * at->n_new + m])
                scores[length + m] = -INFINITY;
    float largest = -INFINITY, sum = 0;
    for (int j = 0; j < end; j++)
        largest = scores[j] > largest ? scores[j] : largest;
    for (int j = 0; j < end; j++)
        scores[j] = exponential(scores[j] - largest);
    for (int j = 0; j < end; j++)
        sum += scores[j];
    for (int j = end; j < n; j++)
        scores[j] = 0;
    return sum;
}

/* Queries [first, first + count) of one row and one key head. They are numbered position by position; with `only`, the
 * row has one position. out (n_rows * positions, n_heads * head_dim). */
static void attend(const struct shape *s, const struct positions *at, const float *qkv, const float *keys,
                   const float *values, int capacity, const int *only, int b, int head, int first, int count,
                   float *scratch, float *out)
{
    const int hd = s->head_dim, group = s->n_heads / s->n_kv_heads, width = (s->n_heads + 2 * s->n_kv_heads) * hd;
    const int length = at->lengths[b], n_positions = only ? 1 : at->n_new;
    const int last = only ? only[b] : (first + count - 1) / group;
    const int n = at->ancestors ? length + at->n_new : length + last + 1;
    const long row = (long)(at->first_row + b) * s->n_kv_heads + head, stride = padded(n);
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
    float sums[TILE];
    for (int j = 0; j < count; j++)
        sums[j] = softmax(at, length, only ? only[b] : (first + j) / group, scores + j * stride, n);
    for (int c = 0; c < hd; c += PANEL) {
        panel(count, n, scores, stride, values + (row * padded(hd) + c) * capacity, result, PANEL);
        for (int j = 0; j < count; j++) {
            const int i = only ? 0 : (first + j) / group;
            float *to = out + ((long)(b * n_positions + i) * s->n_heads + head * group + (first + j) % group) * hd + c;
            for (int k = 0; k < PANEL && c + k < hd; k++)
                to[k] = result[j * PANEL + k] / sums[j];
        }
    }
}

static void feed_forward(const struct shape *s, const struct block *w, int rows, float *x, float *scratch)
{
    const int f = s->ffn_dim, d = s->dim;
    float *normed = scratch, *hidden = scratch + (long)FFN_ROWS * d;
    for (int first = 0; first < rows; first += FFN_ROWS) {
        const int count = rows - first < FFN_ROWS ? rows - first : FFN_ROWS;
        norm(count, d, x + (long)first * d, w->ffn_norm, s->norm_eps, normed, s->n_threads);
        product(count, d, normed, d, w->w13, 2 * f, hidden, 0, s->n_threads);
        for (int r = 0; r < count; r++) {
            float *gate = hidden + (long)r * 2 * f;
            for (int i = 0; i < f; i++)
                gate[i] = gate[i] / (1.f + exponential(-gate[i])) * gate[f + i];
        }
        product(count, f, hidden, 2l * f, w->w2, d, x + (long)first * d, 1, s->n_threads);
    }
}

/* Blocks first ... first + n - 1 over x (n_rows, n_new, dim), in place. With `only` (n_rows,), one block whose output
 * is wanted at that position of each row: into out (n_rows, dim), while x stays. 0, or 1 when memory is short. */
int run_blocks(const struct shape *s, const struct block *blocks, const struct cache *cache, int first, int n,
               const struct positions *at, float *x, const int *only, float *out)
{
    const int hd = s->head_dim, d = s->dim, rows = at->n_rows * at->n_new, n_queried = only ? at->n_rows : rows;
    const int width = (s->n_heads + 2 * s->n_kv_heads) * hd, group = s->n_heads / s->n_kv_heads;
    const int per_row = (only ? 1 : at->n_new) * group, n_tiles = (per_row + TILE - 1) / TILE;
    const int ffn_rows = n_queried < FFN_ROWS ? n_queried : FFN_ROWS;
    int failed = 0;
    float *qkv = malloc(sizeof(float) * rows * width), *normed = malloc(sizeof(float) * rows * d);
    float *attended = malloc(sizeof(float) * n_queried * s->n_heads * hd);
    float *scratch = malloc(sizeof(float) * (FFN_ROWS * (long)d + ffn_rows * 2l * s->ffn_dim));
    if (!qkv || !normed || !attended || !scratch)
        failed = 1;
    for (int layer = first; layer < first + n && !failed; layer++) {
        const struct block *w = blocks + layer;
        float *keys = cache->keys[layer], *values = cache->values[layer], *y = x;
        norm(rows, d, x, w->attention_norm, s->norm_eps, normed, s->n_threads);
        product(rows, d, normed, d, w->wqkv, width, qkv, 0, s->n_threads);
        rotate_and_store(s, at, qkv, keys, values, cache->capacity);
#pragma omp parallel for collapse(3) num_threads(s->n_threads) if (s->n_threads > 1)
        for (int b = 0; b < at->n_rows; b++)
            for (int head = 0; head < s->n_kv_heads; head++)
                for (int t = 0; t < n_tiles; t++) {
                    const int count = per_row - t * TILE < TILE ? per_row - t * TILE : TILE;
                    const long size = TILE * (hd + PANEL + (long)padded(at->lengths[b] + at->n_new));
                    float *own = malloc(sizeof(float) * size);
                    if (own)
                        attend(s, at, qkv, keys, values, cache->capacity, only, b, head, t * TILE, count, own, attended);
                    else {
#pragma omp atomic write
                        failed = 1;
                    }
                    free(own);
                }
        if (only) {
            y = out;
            for (int b = 0; b < at->n_rows; b++)
                memcpy(out + (long)b * d, x + (long)(b * at->n_new + only[b]) * d, sizeof(float) * d);
        }
        product(n_queried, s->n_heads * hd, attended, s->n_heads * hd, w->wo, d, y, 1, s->n_threads);
        feed_forward(s, w, n_queried, y, scratch);
    }
    free(qkv), free(normed), free(attended), free(scratch);
    return failed;
}

/* out (rows, n) = norm(x) W. */
int run_logits(const struct shape *s, const float *weight, const float *w, int n, int rows, const float *x, float *out)
{
    float *normed = malloc(sizeof(float) * rows * s->dim);
    if (!normed)
        return 1;
    norm(rows, s->dim, x, weight, s->norm_eps, normed, s->n_threads);
    product(rows, s->dim, normed, s->dim, w, n, out, 0, s->n_threads);
    free(normed);
    return 0;
}
