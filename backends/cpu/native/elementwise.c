/* What lies between the products, on bfloat16 values, computed in float32 and rounded once. Dimensions are multiples
   of 16. Few elements are handled by the calling thread alone. */
#include <math.h>

#include "tile.h"

#define SPREAD_FROM 32768 /* elements: less is not worth waking the other threads */

/* residual += x (x may be null), then out = residual / rms(residual) * weight. There are tokens * heads rows of dim
   elements: a token's lie close, tokens are so many elements apart, out's not at all; weight is [heads][dim]. */
EXPORT void sagellm_rms_norm(const bf16 *x, long x_stride, bf16 *residual, long residual_stride, const bf16 *weight,
                             bf16 *out, long tokens, long heads, long dim, float eps, long threads)
{
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && tokens * heads * dim >= SPREAD_FROM)
    for (long row = 0; row < tokens * heads; row++) {
        long token = row / heads, inside = row % heads * dim;
        bf16 *sum = residual + token * residual_stride + inside;
        __m512 squares = _mm512_setzero_ps();
        for (long at = 0; at < dim; at += 16) {
            __m512 y = load_bf16(sum + at);
            if (x) {
                store_bf16(sum + at, _mm512_add_ps(y, load_bf16(x + token * x_stride + inside + at)));
                y = load_bf16(sum + at);
            }
            squares = _mm512_fmadd_ps(y, y, squares);
        }
        __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)dim + eps));
        for (long at = 0; at < dim; at += 16) {
            __m512 y = _mm512_mul_ps(_mm512_mul_ps(load_bf16(sum + at), scale), load_bf16(weight + inside + at));
            store_bf16(out + row * dim + at, y);
        }
    }
}

/* x [tokens][heads][dim] in place, tokens x_stride elements apart: pairs (i, i + dim / 2) are rotated. cos and sin
   [tokens][dim], sin negated in its first half. */
EXPORT void sagellm_rope(bf16 *x, long x_stride, const bf16 *cos, const bf16 *sin, long tokens, long heads, long dim,
                         long threads)
{
    long half = dim / 2;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && tokens * heads * dim >= SPREAD_FROM)
    for (long token = 0; token < tokens; token++) {
        const bf16 *c = cos + token * dim, *s = sin + token * dim;
        for (long head = 0; head < heads; head++) {
            bf16 *low = x + token * x_stride + head * dim, *high = low + half;
            for (long at = 0; at < half; at += 16) {
                __m512 a = load_bf16(low + at), b = load_bf16(high + at);
                store_bf16(low + at, _mm512_fmadd_ps(a, load_bf16(c + at), _mm512_mul_ps(b, load_bf16(s + at))));
                store_bf16(high + at, _mm512_fmadd_ps(b, load_bf16(c + half + at),
                                                      _mm512_mul_ps(a, load_bf16(s + half + at))));
            }
        }
    }
}
