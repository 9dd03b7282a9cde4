/* Causal attention over a paged pool: the K and V of the step are written to it, then each query reads its own sequence.

   A task is a run of queries of one sequence, with the heads that share a K/V head as further rows, over one K/V head.
   It walks the sequence in tiles of 64 tokens from its beginning: K and V of a tile are laid out in pairs (tile.h),
   then scores, a running softmax (Milakov and Gimelshein 2018) and the weighted sum are made of register tiles, as in
   FlashAttention (Dao et al. 2022). Tiles begin at fixed positions, so that a row's bits depend neither on the batch
   nor on how its prompt was cut into chunks. */
#include <math.h>
#include <string.h>

#include "tile.h"

#define TOKENS 64   /* of a tile */
#define MAX_ROWS 64 /* queries times heads of a task */
#define MAX_DIM 256

typedef struct {
    const bf16 *q;             /* [T][H][D], tokens q_stride elements apart */
    const bf16 *k, *v;         /* [T][K][D], tokens k_stride and v_stride elements apart */
    bf16 *pool;                /* this layer's K in block 0; blocks block_stride elements apart */
    bf16 *out;                 /* [T][H][D] */
    const int64_t *slots;      /* [T] where a token's K and V go: block * block_size + offset */
    const int64_t *tables;     /* [S][width] block ids */
    const int64_t *contexts;   /* [S] tokens, the step's included */
    const int64_t *starts;     /* [S + 1] first token of each sequence in the step */
    const int64_t *first_runs; /* [S + 1] of each sequence: runs have run_tokens queries, the last may have fewer */
    int64_t q_stride, k_stride, v_stride, block_stride, width, sequences, tokens, kv_heads, group, dim, block_size, run_tokens;
    int64_t threads;
    float scale;
} Attention;

typedef struct {
    long sequence, head, run; /* see Attention.first_runs */
} Task;

typedef struct {
    bf16 keys[MAX_DIM / 2 * TOKENS * 2];
    bf16 values[TOKENS / 2 * MAX_DIM * 2];
    bf16 queries[MAX_ROWS * MAX_DIM];
    bf16 weights[MAX_ROWS * TOKENS];
    float scores[MAX_ROWS * TOKENS];
    float sums[MAX_ROWS * MAX_DIM];
    float highest[MAX_ROWS], total[MAX_ROWS];
} __attribute__((aligned(64))) Scratch; /* 185 KiB on each thread's stack */

static const bf16 zeros[MAX_DIM];

static void write_kv(const Attention *a, long token)
{
    long block = a->slots[token] / a->block_size, offset = a->slots[token] % a->block_size;
    for (long head = 0; head < a->kv_heads; head++) {
        bf16 *key = a->pool + block * a->block_stride + (head * a->block_size + offset) * a->dim;
        bf16 *value = key + a->kv_heads * a->block_size * a->dim;
        memcpy(key, a->k + token * a->k_stride + head * a->dim, a->dim * sizeof(bf16));
        memcpy(value, a->v + token * a->v_stride + head * a->dim, a->dim * sizeof(bf16));
    }
}

/* 16 rows of 16 pairs, rows anywhere in memory -> 16 columns, to_stride pairs apart. */
INLINE void transpose(const bf16 *const *rows, long at, bf16 *to, long to_stride)
{
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        r[i] = _mm512_loadu_si512(rows[i] + at);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(to + 2 * (i)*to_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_si512(to + 2 * (i + 8) * to_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
        _mm512_storeu_si512(to + 2 * (i + 4) * to_stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
        _mm512_storeu_si512(to + 2 * (i + 12) * to_stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
    }
}

INLINE const bf16 *key_of(const Attention *a, Task task, long token)
{
    return a->pool + a->tables[task.sequence * a->width + token / a->block_size] * a->block_stride +
           (task.head * a->block_size + token % a->block_size) * a->dim;
}

/* Have a tile's K and V brought near: blocks lie far apart, where the processor does not guess them. */
static void fetch(const Attention *a, Task task, long first)
{
    long left = a->contexts[task.sequence] - first, value_offset = a->kv_heads * a->block_size * a->dim;
    for (long i = 0; i < TOKENS && i < left; i++) {
        const bf16 *key = key_of(a, task, first + i);
        for (long at = 0; at < a->dim; at += 32) {
            _mm_prefetch(key + at, _MM_HINT_T1);
            _mm_prefetch(key + value_offset + at, _MM_HINT_T1);
        }
    }
}

/* Lay K out as [pair of dimensions][token][2] and V as [pair of tokens][dimension][2]. */
static void pack(const Attention *a, Task task, long first, long count, Scratch *s)
{
    const bf16 *keys[TOKENS], *values[TOKENS];
    long value_offset = a->kv_heads * a->block_size * a->dim, dim = a->dim;
    for (long i = 0; i < TOKENS; i++) {
        keys[i] = i < count ? key_of(a, task, first + i) : zeros;
        values[i] = i < count ? keys[i] + value_offset : zeros;
    }
    for (long token = 0; token < TOKENS; token += 16)
        for (long at = 0; at < dim; at += 32)
            transpose(keys + token, at, s->keys + at * TOKENS + 2 * token, TOKENS);
    for (long pair = 0; pair < TOKENS / 2; pair++) {
        const bf16 *even = values[2 * pair], *odd = values[2 * pair + 1];
        bf16 *to = s->values + pair * 2 * dim;
        for (long at = 0; at < dim; at += 16) {
            __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(even + at)));
            __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(odd + at)));
            _mm512_storeu_si512(to + 2 * at, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

/* Scores of a tile into weights: those of tokens after the row's own are hidden. Scores are in powers of two. */
static void weigh(const Attention *a, Scratch *s, long rows, long first, long position)
{
    __m512 scale = _mm512_set1_ps(a->scale * 1.44269504f);
    __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (long row = 0; row < rows; row++) {
        __m512 x[4], most = _mm512_set1_ps(-INFINITY);
        int last = (int)(position + row / a->group - first); /* the last token of the tile that the row sees */
        for (int v = 0; v < 4; v++) {
            __mmask16 seen = _mm512_cmple_epi32_mask(lane, _mm512_set1_epi32(last - 16 * v));
            x[v] = _mm512_mul_ps(_mm512_load_ps(s->scores + row * TOKENS + 16 * v), scale);
            x[v] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, x[v]);
            most = _mm512_max_ps(most, x[v]);
        }
        float before = s->highest[row], now = fmaxf(before, _mm512_reduce_max_ps(most));
        __m512 sum = _mm512_setzero_ps(), top = _mm512_set1_ps(now);
        for (int v = 0; v < 4; v++) {
            __m512 weight = exp2_of(_mm512_sub_ps(x[v], top));
            sum = _mm512_add_ps(sum, weight);
            store_bf16(s->weights + row * TOKENS + 16 * v, weight);
        }
        if (now > before) {
            float shrink = exp2f(before - now);
            s->total[row] *= shrink;
            s->highest[row] = now;
            for (long at = 0; at < a->dim; at += 16) {
                float *part = s->sums + row * a->dim + at;
                _mm512_store_ps(part, _mm512_mul_ps(_mm512_load_ps(part), _mm512_set1_ps(shrink)));
            }
        }
        s->total[row] += _mm512_reduce_add_ps(sum);
    }
}

static void attend(const Attention *a, Task task, Task next, Scratch *s)
{
    long dim = a->dim, group = a->group, head = task.head;
    long length = a->starts[task.sequence + 1] - a->starts[task.sequence], from = task.run * a->run_tokens;
    long count = length - from < a->run_tokens ? length - from : a->run_tokens;
    long rows = count * group, token = a->starts[task.sequence] + from;
    long position = a->contexts[task.sequence] - length + from;
    for (long row = 0; row < rows; row++) {
        memcpy(s->queries + row * dim, a->q + (token + row / group) * a->q_stride + (head * group + row % group) * dim,
               dim * sizeof(bf16));
        s->highest[row] = -INFINITY;
        s->total[row] = 0;
    }
    memset(s->sums, 0, rows * dim * sizeof(float));
    for (long first = 0; first < position + count; first += TOKENS) {
        long left = position + count - first;
        if (left > TOKENS)
            fetch(a, task, first + TOKENS);
        else if (next.sequence >= 0)
            fetch(a, next, 0);
        pack(a, task, first, left < TOKENS ? left : TOKENS, s);
        for (long row = 0, take; row < rows; row += take) {
            take = next_rows((int)(rows - row));
            tile((int)take, 4, s->queries + row * dim, dim, s->keys, 2 * TOKENS, dim / 2, s->scores + row * TOKENS,
                 TOKENS, 0, 0, 64);
        }
        weigh(a, s, rows, first, position);
        for (long row = 0, take; row < rows; row += take) {
            take = next_rows((int)(rows - row));
            const bf16 *weights = s->weights + row * TOKENS;
            float *sums = s->sums + row * dim;
            long at = 0;
            for (; at + 64 <= dim; at += 64)
                tile((int)take, 4, weights, TOKENS, s->values + 2 * at, 2 * dim, TOKENS / 2, sums + at, dim, 1, 0, 64);
            if (at < dim)
                tile((int)take, 2, weights, TOKENS, s->values + 2 * at, 2 * dim, TOKENS / 2, sums + at, dim, 1, 0, 64);
        }
    }
    for (long row = 0; row < rows; row++) {
        bf16 *to = a->out + ((token + row / group) * a->kv_heads * group + head * group + row % group) * dim;
        __m512 share = _mm512_set1_ps(1.0f / s->total[row]);
        for (long at = 0; at < dim; at += 16)
            store_bf16(to + at, _mm512_mul_ps(_mm512_load_ps(s->sums + row * dim + at), share));
    }
}

/* The task of that number; its sequence is -1 if there are not so many. */
static Task task_of(const Attention *a, long number)
{
    long run = number / a->kv_heads, low = 0, high = a->sequences;
    if (run >= a->first_runs[high])
        return (Task){-1, 0, 0};
    while (high - low > 1) { /* the sequence whose runs include this one */
        long middle = (low + high) / 2;
        if (a->first_runs[middle] <= run)
            low = middle;
        else
            high = middle;
    }
    return (Task){low, number % a->kv_heads, run - a->first_runs[low]};
}

EXPORT void sagellm_attend(const Attention *a)
{
    long claimed = 0;
#pragma omp parallel num_threads((int)a->threads) if (a->threads > 1)
    {
        Scratch scratch;
        long number, coming;
#pragma omp for schedule(static)
        for (long token = 0; token < a->tokens; token++)
            write_kv(a, token);
        for (;;) {
#pragma omp atomic capture
            number = claimed++;
#pragma omp atomic read
            coming = claimed; /* what this thread is likely to get next */
            Task task = task_of(a, number);
            if (task.sequence < 0)
                break;
            attend(a, task, task_of(a, coming), &scratch);
        }
    }
}
