/* What the kernels share: bfloat16 values, and the register tile that every product is made of.

   A tile is R rows (up to TILE_ROWS) by 16 * V columns of float32 sums. The right operand lies in pairs:
   [pair of k][column][2], so that one VDPBF16PS multiplies 16 columns by two k; the left one is row-major. Each sum is
   taken in the order of k, whatever R is: a row's result does not depend on the rows beside it. */
#ifndef SAGELLM_TILE_H
#define SAGELLM_TILE_H

#include <immintrin.h>
#include <stdint.h>

typedef uint16_t bf16;
typedef int32_t __attribute__((may_alias, aligned(2))) bf16_pair;

#define ABI 3 /* one more with every change of an exported function: kernels.py loads no other */
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define TILE_ROWS 6
#define PANEL 64           /* columns of a packed weight that lie together */
#define STREAM (4 * PANEL) /* bytes of a panel for one pair */

INLINE __m512 load_bf16(const bf16 *from)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}

INLINE void store_bf16(bf16 *to, __m512 value)
{
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(value));
}

/* c[R][16 * V] = (resume ? c : 0) + a[R][2 * pairs] * b. `ahead`, if any, is fetched meanwhile, `step` bytes for each
   pair: as many as are used up (STREAM) go to the nearest cache, what is for later to the second one. */
INLINE void tile_of(const int R, const int V, const bf16 *a, long a_stride, const bf16 *b, long b_stride, long pairs,
                    float *c, long c_stride, int resume, const char *ahead, long step)
{
    __m512 sums[TILE_ROWS][4];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
            sums[r][v] = resume ? _mm512_loadu_ps(c + r * c_stride + 16 * v) : _mm512_setzero_ps();
    for (long i = 0; i < pairs; i++) {
        __m512bh right[4];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
            right[v] = (__m512bh)_mm512_loadu_si512(b + i * b_stride + 32 * v);
        for (long at = 0; ahead && at < step; at += 64) {
            if (step == STREAM)
                _mm_prefetch(ahead + i * step + at, _MM_HINT_T0);
            else
                _mm_prefetch(ahead + i * step + at, _MM_HINT_T1);
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            __m512bh left = (__m512bh)_mm512_set1_epi32(((const bf16_pair *)(a + r * a_stride))[i]);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++)
                sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, right[v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
            _mm512_storeu_ps(c + r * c_stride + 16 * v, sums[r][v]);
}

INLINE void tile(int rows, const int V, const bf16 *a, long a_stride, const bf16 *b, long b_stride, long pairs,
                 float *c, long c_stride, int resume, const char *ahead, const long step)
{
    switch (rows) {
    case 1: tile_of(1, V, a, a_stride, b, b_stride, pairs, c, c_stride, resume, ahead, step); break;
    case 2: tile_of(2, V, a, a_stride, b, b_stride, pairs, c, c_stride, resume, ahead, step); break;
    case 3: tile_of(3, V, a, a_stride, b, b_stride, pairs, c, c_stride, resume, ahead, step); break;
    case 4: tile_of(4, V, a, a_stride, b, b_stride, pairs, c, c_stride, resume, ahead, step); break;
    case 5: tile_of(5, V, a, a_stride, b, b_stride, pairs, c, c_stride, resume, ahead, step); break;
    case 6: tile_of(6, V, a, a_stride, b, b_stride, pairs, c, c_stride, resume, ahead, step); break;
    }
}

/* amx.c, for linear.c: whether the system gives the tile registers; sums[rows][64] of a panel, `amx_multiply` between `amx_begin` and `amx_end`, with pairs a multiple
   of 16 and room for rows rounded up to 16. DEPTH pairs at a time, 128 KiB, which the second-level cache keeps. */
#define DEPTH 512
int amx_allowed(void);
void amx_begin(void);
void amx_multiply(const bf16 *x, long x_stride, const bf16 *panel, int rows, long pairs, float (*sums)[PANEL]);
void amx_end(void);

/* How many rows the next tile takes when `left` remain: tiles are as even as can be. */
INLINE int next_rows(int left)
{
    int tiles = (left + TILE_ROWS - 1) / TILE_ROWS;
    return (left + tiles - 1) / tiles;
}

/* 2^x for x <= 0, -inf or NaN, to float32's last bits: 2^fraction by its Taylor series, the integer part by the exponent.
   Below 2^-126 it is 0. */
INLINE __m512 exp2_of(__m512 x)
{
    __mmask16 visible = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLE_UQ);
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.5403530e-4f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.3333558e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.6181291e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.5504109e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4022651e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9314718e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(visible, y, whole);
}

#endif
