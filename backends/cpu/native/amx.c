/* A panel's products on AMX: the same packed weight, whose pairs are what a tile register takes.

   32 rows by 32 columns at a time: four tiles of sums, two of rows, two of weights. A tile always has 16 rows, those
   that are missing are zeros: every row of every batch is summed in the same way. */
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tile.h"

#define ROWS 16  /* of a tile register */
#define STEP 16  /* pairs of k in it */

int amx_allowed(void)
{
    return !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILEDATA */);
}

void amx_begin(void)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++)
        shape.row_bytes[i] = 64, shape.rows[i] = 16;
    /* Not _tile_loadconfig: GCC 12's tells the compiler of 8 of the 64 bytes, which then drops the others. */
    __asm__ volatile("ldtilecfg %0" ::"m"(shape));
}

void amx_end(void)
{
    _tile_release();
}

/* 16 rows, or 32 with a second run of rows, times 32 columns; meanwhile `lines` cache lines from `ahead` are fetched
   for each step. */
INLINE void block(const int two, const bf16 *a, const bf16 *a2, long a_stride, const bf16 *b, long pairs, float *c,
                  int resume, const char *ahead, long lines)
{
    const long row = a_stride * sizeof(bf16), right = 2 * PANEL * sizeof(bf16), out = PANEL * sizeof(float);
    if (resume) {
        _tile_loadd(0, c, out);
        _tile_loadd(1, c + 16, out);
        if (two) {
            _tile_loadd(2, c + ROWS * PANEL, out);
            _tile_loadd(3, c + ROWS * PANEL + 16, out);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long i = 0; i < pairs; i += STEP) {
        for (long line = 0; line < lines; line++, ahead += 64)
            _mm_prefetch(ahead, _MM_HINT_T1);
        _tile_loadd(6, b + i * 2 * PANEL, right);
        _tile_loadd(7, b + i * 2 * PANEL + 32, right);
        _tile_loadd(4, a + 2 * i, row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
            _tile_loadd(5, a2 + 2 * i, row);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, out);
    _tile_stored(1, c + 16, out);
    if (two) {
        _tile_stored(2, c + ROWS * PANEL, out);
        _tile_stored(3, c + ROWS * PANEL + 16, out);
    }
}

void amx_multiply(const bf16 *x, long x_stride, const bf16 *panel, int rows, long pairs, float (*sums)[PANEL])
{
    bf16 rest[ROWS * 2 * DEPTH] __attribute__((aligned(64)));
    int whole = rows / ROWS * ROWS;
    if (whole < rows)
        memset(rest, 0, sizeof rest);
    int blocks = (rows + 2 * ROWS - 1) / (2 * ROWS) * 2;
    long lines = 64 / blocks; /* of a step's 64 in the next part of the panel, one share for each block of this part */
    for (long start = 0; start < pairs; start += DEPTH) {
        long depth = pairs - start < DEPTH ? pairs - start : DEPTH;
        const bf16 *part = panel + start * 2 * PANEL;
        const char *ahead = (const char *)(part + depth * 2 * PANEL);
        for (int row = whole; row < rows; row++)
            memcpy(rest + (row - whole) * 2 * DEPTH, x + row * x_stride + 2 * start, depth * 2 * sizeof(bf16));
        __asm__ volatile("" ::: "memory"); /* tile loads do not say what they read */
        for (int row = 0; row < rows; row += 2 * ROWS)
            for (int column = 0; column < PANEL; column += 32, ahead += depth / STEP * lines * 64) {
                const bf16 *a = x + row * x_stride + 2 * start, *b = part + 2 * column;
                float *c = sums[row] + column;
                if (row + 2 * ROWS <= rows) {
                    block(1, a, a + ROWS * x_stride, x_stride, b, depth, c, start > 0, ahead, lines);
                    continue;
                }
                if (row + ROWS <= rows) {
                    block(0, a, a, x_stride, b, depth, c, start > 0, ahead, lines);
                    c += ROWS * PANEL;
                }
                if (whole < rows)
                    block(0, rest, rest, 2 * DEPTH, b, depth, c, start > 0, ahead, row + ROWS <= rows ? 0 : lines);
            }
    }
}
