// The T16 kernels' plain C interface: pointers and sizes, no torch, no C++ types.
//
// A matrix of N rows and K columns is stored in blocks of 16 rows. Within a block, 64-byte vectors follow one another along K; lane n of a
// vector, 4 bytes, belongs to row n, and byte j of a lane holds, in one bit field per width, the code of column (first of the field) + j:
//
//   8 bits   1 field                    4 columns per vector
//   4 bits   0-3, 4-7                   8 columns per vector
//   2 bits   0-1, 2-3, 4-5, 6-7        16 columns per vector
//   3 bits   0-2, 3-5 of vectors 0, 1, 2 are fields 0 to 5; bits 6-7 of vector 0 hold the upper two bits of field 6 and bit 6 of vector 2 its
//            lowest; bits 6-7 of vector 1 and bit 7 of vector 2 are field 7: 32 columns per three vectors
//
// so a weight takes exactly its bits. Scales are [N/16][groups][16], zero points likewise, a byte each.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum t16_float { T16_FLOAT32 = 0, T16_BFLOAT16 = 1, T16_FLOAT16 = 2, T16_E8M0 = 3, T16_E4M3 = 4, T16_E2M1 = 5 };

typedef struct {
    const uint8_t *codes;  // [N/16][K * bits / 8][16]
    const void *scales;    // [N/16][groups][16]
    const uint8_t *zeros;  // [N/16][groups][16], or null: 2^(bits-1) everywhere
    int64_t rows;          // of the matrix; blocks are padded to 16
    int64_t columns;       // padded to whole units of the width
    int64_t group;         // columns per scale
    int64_t step;          // columns per scale of the inputs; divides group
    int32_t bits;
    int32_t scale;         // enum t16_float
} t16_matrix;

typedef struct {
    const int8_t *digits;  // [count][columns], from -127 to 127
    const float *scales;   // [count][columns / step]
    const float *sums;     // [count / per_input][columns / step], of what the digits stand for
    int32_t count;         // columns of the right-hand side: inputs times digits of each
    int32_t per_input;     // digits of each input, 1 or 2, which it is the sum of
} t16_inputs;

// A matrix of small floats, row after row, as it lies on disk: E4M3 a byte each, or E2M1 two to a byte, the even column in the low half.
typedef struct {
    const uint8_t *codes;  // [rows][columns] or [rows][columns / 2]
    const void *scales;    // [rows][columns / group]
    const float *unit;     // what scales were multiplied by, or null: 1
    int64_t rows;
    int64_t columns;
    int64_t group;         // columns per scale; even for E2M1
    int32_t code;          // T16_E4M3 or T16_E2M1
    int32_t scale;         // enum t16_float but T16_E2M1
} t16_small;

// The instruction sets of this build, one per source file, by number, the fastest last: its name, or null from the last on, and whether this
// processor has it.
const char *t16_tier(int32_t number);
int32_t t16_present(int32_t number);

// y [tokens][rows] = x [tokens][given] times W', by one of the instruction sets and so many threads. Columns from `given` on are zero.
// Inputs are rounded, `step` of them to one scale: x ~ scale * digit of 8 bits, or x ~ scale * (128 * first + second), 15 bits together.
void t16_linear(int32_t tier, const t16_matrix *matrix, const float *x, int64_t tokens, int64_t given, int32_t digits, float *y, int32_t threads);

// t16_linear for each of so many experts, whose codes, scales and zeros follow those of the first one, which `matrix` is: the rows of x and y from
// the end of the expert before it up to its own of `ends` are its tokens. An expert without any is not read.
void t16_experts(int32_t tier, const t16_matrix *matrix, int64_t experts, const int64_t *ends, const float *x, int64_t given, int32_t digits,
                 float *y, int32_t threads);

// The same as t16_linear for inputs that are rounded already.
void t16_multiply(int32_t tier, const t16_matrix *matrix, const t16_inputs *inputs, float *y, int32_t threads);

// y [tokens][rows] = x [tokens][columns] times W', W [rows][columns] of the floats `kind` says (enum t16_float).
void t16_dense(int32_t tier, const void *weight, int32_t kind, int64_t rows, int64_t columns, const float *x, int64_t tokens, float *y,
               int32_t threads);

// t16_dense for V:N:M: each `height` rows, which divide `rows`, have all that is not zero in the same `kept` of the columns. `values` [rows][kept] are
// these, `places` [rows / height][kept] say where in x they stand.
void t16_vnm(int32_t tier, const void *values, int32_t kind, int64_t rows, int64_t kept, int64_t height, const int32_t *places, const float *x,
                int64_t columns, int64_t tokens, float *y, int32_t threads);

// t16_dense for small floats. The NaN of E4M3 is taken for 480: whoever loads a matrix has to refuse it.
void t16_small_floats(int32_t tier, const t16_small *matrix, const float *x, int64_t tokens, float *y, int32_t threads);

// Reads `bytes`, a multiple of 4096, from `data` as fast as this processor can, with so many threads; returns a sum so that it has to.
uint64_t t16_read(const void *data, int64_t bytes, int32_t threads);

#ifdef __cplusplus
}
#endif
