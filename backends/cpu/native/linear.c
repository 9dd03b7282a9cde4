/* y = x * W^T + bias with a packed bfloat16 weight: sums in float32, result in bfloat16.

   The weight lies in panels of 64 outputs, [panel][pair of inputs][64][2]: one sequential stream through memory. A
   panel is taken DEPTH pairs at a time over all rows of a chunk, while the next part is being fetched. */
#include "tile.h"

#define CHUNK_ROWS 192 /* a multiple of 16, for AMX */
#define STREAM_AHEAD 4096 /* bytes, for the one tile that a few rows make */

static void multiply(const bf16 *x, long x_stride, const bf16 *panel, int rows, long pairs, float (*sums)[PANEL])
{
    int tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (long start = 0; start < pairs; start += DEPTH) {
        long depth = pairs - start < DEPTH ? pairs - start : DEPTH;
        const bf16 *right = panel + start * 2 * PANEL;
        const char *next = (const char *)(right + depth * 2 * PANEL);
        for (int row = 0, count, index = 0; row < rows; row += count, index++) {
            const bf16 *left = x + row * x_stride + 2 * start;
            float *c = sums[row];
            count = next_rows(rows - row);
            if (tiles == 1)
                tile(count, 4, left, x_stride, right, 2 * PANEL, depth, c, PANEL, start > 0,
                     (const char *)right + STREAM_AHEAD, STREAM);
            else if (tiles < 4)
                tile(count, 4, left, x_stride, right, 2 * PANEL, depth, c, PANEL, start > 0,
                     index < 2 ? next + index * depth * STREAM / 2 : 0, STREAM / 2);
            else
                tile(count, 4, left, x_stride, right, 2 * PANEL, depth, c, PANEL, start > 0,
                     index < 4 ? next + index * depth * STREAM / 4 : 0, STREAM / 4);
        }
    }
}

/* silu(g) is g / (1 + e^-g), written with e^-|g| so that nothing overflows. */
INLINE __m512 silu(__m512 gate)
{
    __m512 e = exp2_of(_mm512_mul_ps(_mm512_abs_ps(gate), _mm512_set1_ps(-1.44269504f))), one = _mm512_set1_ps(1.0f);
    __m512 top = _mm512_mask_mov_ps(one, _mm512_cmp_ps_mask(gate, _mm512_setzero_ps(), _CMP_LT_OQ), e);
    return _mm512_mul_ps(gate, _mm512_div_ps(top, _mm512_add_ps(one, e)));
}

INLINE __m512 with_bias(const float *sums, const float *bias)
{
    __m512 y = _mm512_loadu_ps(sums);
    return bias ? _mm512_add_ps(y, _mm512_loadu_ps(bias)) : y;
}

/* A gated panel holds 32 outputs of the gate and the 32 of `up` that belong to them: out = silu(gate) * up. */
static void finish(float (*sums)[PANEL], int rows, const float *bias, bf16 *out, long out_stride, int width, long gated)
{
    for (int row = 0; row < rows; row++)
        for (int at = 0; at < width; at += 16) {
            __m512 y = with_bias(sums[row] + at, bias ? bias + at : 0);
            if (gated)
                y = _mm512_mul_ps(silu(y), with_bias(sums[row] + PANEL / 2 + at, bias ? bias + PANEL / 2 + at : 0));
            __mmask16 inside = width - at < 16 ? (__mmask16)((1u << (width - at)) - 1) : (__mmask16)0xFFFF;
            _mm256_mask_storeu_epi16(out + row * out_stride + at, inside, (__m256i)_mm512_cvtneps_pbh(y));
        }
}

EXPORT long sagellm_abi(void)
{
    return ABI;
}

/* What the processor and the system allow: 1 for the kernels, 2 for AMX in them. */
EXPORT long sagellm_supported(void)
{
    int kernels = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("fma");
    return kernels ? 1 + 2 * (__builtin_cpu_supports("amx-bf16") && amx_allowed()) : 0;
}

/* x [rows][2 * pairs], rows x_stride elements apart; bias [panels][64] float32 or null, in the panels' order;
   out [rows][width], rows out_stride elements apart. */
EXPORT void sagellm_linear(const bf16 *x, long x_stride, const bf16 *weight, const float *bias, bf16 *out,
                           long out_stride, long rows, long pairs, long width, long gated, long amx, long threads)
{
    long outputs = gated ? PANEL / 2 : PANEL, panels = (width + outputs - 1) / outputs;
    long chunks = (rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        float sums[CHUNK_ROWS][PANEL] __attribute__((aligned(64)));
        if (amx)
            amx_begin();
#pragma omp for schedule(static) nowait
        for (long task = 0; task < panels * chunks; task++) {
            long panel = task / chunks, first = task % chunks * CHUNK_ROWS;
            int count = (int)(rows - first < CHUNK_ROWS ? rows - first : CHUNK_ROWS);
            int inside = (int)(width - panel * outputs < outputs ? width - panel * outputs : outputs);
            const bf16 *from = x + first * x_stride, *own_weight = weight + panel * pairs * 2 * PANEL;
            if (amx)
                amx_multiply(from, x_stride, own_weight, count, pairs, sums);
            else
                multiply(from, x_stride, own_weight, count, pairs, sums);
            finish(sums, count, bias ? bias + panel * PANEL : 0, out + first * out_stride + panel * outputs, out_stride,
                   inside, gated);
        }
        if (amx)
            amx_end();
    }
}
