// Products of bfloat16 matrices in the tile registers of AMX, and what they need: memory, layouts, exponentials.
//
// Of a product A B the tile registers take A by rows, and B with the numbers of two rows side by side, "in pairs":
// [K/2][N][2].

#pragma once

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define FUSIONTREE_TILES

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>

#include "cpu_numbers.h"

namespace {

constexpr int64_t TILE = 16, PAIR = 32;  // rows of one tile; of the two that a product takes at a time

template <typename T>
struct Scratch {
    T* at;
    explicit Scratch(int64_t n) : at(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64))) {
        if (!at) throw std::bad_alloc();
    }
    ~Scratch() { std::free(at); }
    Scratch(const Scratch&) = delete;
    operator T*() const { return at; }
};

// The tile registers of this thread: 16 rows of 64 bytes each. Whoever used them before finds them as they were.
class Tiles {
    struct alignas(64) Setting {
        uint8_t palette, start, unused[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } before{};

  public:
    Tiles() {
        Setting own{};
        own.palette = 1;
        for (int i = 0; i < 8; ++i) own.bytes[i] = 64, own.rows[i] = 16;
        // Not by intrinsics, some of which do not tell the compiler that all 64 bytes are read.
        asm volatile("sttilecfg %0" : "=m"(before));
        asm volatile("ldtilecfg %0" ::"m"(own));
    }
    ~Tiles() { asm volatile("ldtilecfg %0" ::"m"(before)); }
    Tiles(const Tiles&) = delete;
};

// C[M,N] = A[M,K] B[K,N], or C += with `add`: A by rows of `lda` numbers, B in pairs, rows of pairs `ldb` numbers long.
// M, N and K are multiples of 32.
template <bool add>
void multiply(float* c, int64_t ldc, const bf16* a, int64_t lda, const bf16* b, int64_t ldb, int64_t M, int64_t N,
              int64_t K) {
    asm volatile("" ::: "memory");  // the loads of tiles do not say that they read memory
    for (int64_t m = 0; m < M; m += PAIR)
        for (int64_t n = 0; n < N; n += PAIR) {
            float* corner = c + m * ldc + n;
            if (add) {
                _tile_loadd(0, corner, ldc * 4);
                _tile_loadd(1, corner + TILE, ldc * 4);
                _tile_loadd(2, corner + TILE * ldc, ldc * 4);
                _tile_loadd(3, corner + TILE * ldc + TILE, ldc * 4);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int64_t k = 0; k < K; k += PAIR) {
                const bf16 *left = a + m * lda + k, *right = b + k / 2 * ldb + 2 * n;
                _tile_loadd(4, left, lda * 2);
                _tile_loadd(5, left + TILE * lda, lda * 2);
                _tile_loadd(6, right, ldb * 2);
                _tile_loadd(7, right + 2 * TILE, ldb * 2);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, corner, ldc * 4);
            _tile_stored(1, corner + TILE, ldc * 4);
            _tile_stored(2, corner + TILE * ldc, ldc * 4);
            _tile_stored(3, corner + TILE * ldc + TILE, ldc * 4);
        }
    asm volatile("" ::: "memory");
}

// 2^x within 3e-6 of it; of less than -126 as of -126.
inline __m512 power(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);  // in this order what is not a number stays so
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 rest = _mm512_sub_ps(x, whole), sum = _mm512_set1_ps(1.33335581e-3f);
    for (float factor : {9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(sum, whole);
}

// The vectors of two rows as bfloat16, the first in the lower half.
inline __m512i rounded(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

// The halves of a vector, number by number in turns.
inline __m512i in_pairs(__m512i halves) {
    alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), halves);
}

// 0, 1, 2 … 15.
inline __m512i lanes() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

// 0, n, 2 n … 15 n.
inline __m512i multiples(int64_t n) { return _mm512_mullo_epi32(lanes(), _mm512_set1_epi32(int32_t(n))); }

// Some tokens of one head of one row: [count, D], rows `stride` numbers apart. What lies behind `count` reads as zeros.
struct Rows {
    const bf16* at;
    int64_t stride, count;

    Rows from(int64_t token) const { return {at + token * stride, stride, count - token}; }

    // Numbers d and d + 1 of 16 rows.
    __m512i two(int64_t row, int64_t d) const {
        int64_t there = count - row;
        __mmask16 mask = there >= TILE ? 0xffff : there <= 0 ? 0 : (1u << there) - 1;
        return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, multiples(stride), at + row * stride + d, 2);
    }

    __m512i part(int64_t row, int64_t d) const {
        return row < count ? _mm512_loadu_si512(at + row * stride + d) : _mm512_setzero_si512();
    }
};

void copy(bf16* to, Rows x, int64_t n, int64_t D) {  // [n,D]
    for (int64_t row = 0; row < n; ++row)
        for (int64_t d = 0; d < D; d += PAIR) _mm512_store_si512(to + row * D + d, x.part(row, d));
}

void transpose(bf16* to, int64_t stride, Rows x, int64_t n, int64_t D) {  // [D,n], rows `stride` numbers apart
    for (int64_t row = 0; row < n; row += TILE)
        for (int64_t d = 0; d < D; d += 2) {
            __m512i two = x.two(row, d);
            _mm256_storeu_si256((__m256i*)(to + d * stride + row), _mm512_cvtepi32_epi16(two));
            _mm256_storeu_si256((__m256i*)(to + (d + 1) * stride + row),
                                _mm512_cvtepi32_epi16(_mm512_srli_epi32(two, 16)));
        }
}

void transpose_in_pairs(bf16* to, Rows x, int64_t n, int64_t D) {  // [D,n] in pairs
    for (int64_t d = 0; d < D; d += 2)
        for (int64_t row = 0; row < n; row += TILE) _mm512_store_si512(to + d * n + 2 * row, x.two(row, d));
}

void copy_in_pairs(bf16* to, Rows x, int64_t n, int64_t D) {  // [n,D] in pairs
    for (int64_t row = 0; row < n; row += 2)
        for (int64_t d = 0; d < D; d += PAIR) {
            __m512i a = x.part(row, d), b = x.part(row + 1, d);
            __m512i low = _mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1);
            __m512i high = _mm512_shuffle_i64x2(a, b, 0xee);
            _mm512_store_si512(to + row * D + 2 * d, in_pairs(low));
            _mm512_store_si512(to + row * D + 2 * d + PAIR, in_pairs(high));
        }
}

// A column of D numbers, `stride` apart, times a factor.
inline void put_column(bf16* to, const float* column, int64_t stride, float factor, int64_t D) {
    __m512i index = multiples(stride);
    for (int64_t d = 0; d < D; d += PAIR) {
        __m512 part[2];
        for (int64_t half = 0; half < 2; ++half)
            part[half] = _mm512_mul_ps(_mm512_i32gather_ps(index, column + (d + half * TILE) * stride, 4),
                                       _mm512_set1_ps(factor));
        _mm512_storeu_si512(to + d, rounded(part[0], part[1]));
    }
}

}  // namespace

#endif
