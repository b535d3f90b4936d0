// Attention of bfloat16 queries on CPUs with AMX, one head of one row after the other: scores of a few queries and keys
// never leave the cache of a core (Dao et al. 2022, "FlashAttention"; the gradients: its appendix B). A query i sees the
// keys first[i] ... i, where first grows with i: the beginning of its document, or of its window.
//
// Scores are kept with keys as rows and queries as columns, S^T = K Q^T: what belongs to a query (its maximum, sum,
// delta) is then a vector beside every row.
//
// Shapes: B rows, T tokens, H heads of which Hkv share keys, D head width (a multiple of 32).

#include "cpu_tiles.h"

#ifdef FUSIONTREE_TILES

#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

namespace {

constexpr int64_t FORWARD_QUERIES = 64, QUERIES = 128, KEYS = 128;  // of one block
constexpr int32_t NOTHING = INT32_MAX;
constexpr float LOG2E = 1.44269504088896341f;

struct Heads {
    const bf16* at;
    int64_t row, token, head;

    Rows operator()(int64_t b, int64_t h, int64_t T) const { return {at + b * row + h * head, token, T}; }
};

struct Sizes {
    int64_t B, T, H, Hkv, D, window, windowed;  // the first `windowed` heads see so many keys
};

// The first key of each query of a head, and none behind the last query, for n queries.
void first_keys(int32_t* first, const int64_t* starts, const Sizes& s, int64_t b, int64_t h, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        int64_t start = starts && i < s.T ? starts[b * s.T + i] : 0;
        if (h < s.windowed && i - s.window + 1 > start) start = i - s.window + 1;
        first[i] = i < s.T ? int32_t(start) : NOTHING;
    }
}

// Which of 16 queries from `query` on see `key`.
inline __mmask16 sees(const int32_t* first, int64_t query, int64_t key) {
    __m512i index = _mm512_add_epi32(_mm512_set1_epi32(int32_t(query)), lanes());
    __m512i key_v = _mm512_set1_epi32(int32_t(key));
    return _mm512_cmple_epi32_mask(key_v, index) & _mm512_cmple_epi32_mask(_mm512_loadu_si512(first + query), key_v);
}

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Scores to weights, and their pairs: the weights of `keys` keys from `key` on for FORWARD_QUERIES queries. Updates the
// queries' maxima (of scores in units of log 2) and sums; says by how much sums and outputs until now are too large.
template <bool masked>
void soften(bf16* weights, const float* scores, float scale, const int32_t* first, int64_t query, int64_t key,
            int64_t keys, float* most, float* sums, float* factors) {
    for (int64_t i = 0; i < FORWARD_QUERIES; i += TILE) {
        __m512 top = _mm512_set1_ps(-1e30f), factor_v = _mm512_set1_ps(scale);
        for (int64_t j = 0; j < keys; ++j) {
            __m512 score = _mm512_load_ps(scores + j * FORWARD_QUERIES + i);
            __mmask16 there = masked ? sees(first, query + i, key + j) : 0xffff;
            top = _mm512_mask_max_ps(top, there, top, score);
        }
        __m512 before = _mm512_load_ps(most + i);
        __m512 now = _mm512_max_ps(before, _mm512_mul_ps(top, factor_v));
        __m512 factor = power(_mm512_sub_ps(before, now));
        __m512 sum = _mm512_mul_ps(_mm512_load_ps(sums + i), factor);
        _mm512_store_ps(most + i, now);
        _mm512_store_ps(factors + i, factor);
        for (int64_t j = 0; j < keys; j += 2) {
            __m512 w[2];
            for (int64_t one = 0; one < 2; ++one) {
                __m512 score = _mm512_load_ps(scores + (j + one) * FORWARD_QUERIES + i);
                w[one] = power(_mm512_fmsub_ps(score, factor_v, now));
                if (masked) w[one] = _mm512_maskz_mov_ps(sees(first, query + i, key + j + one), w[one]);
                sum = _mm512_add_ps(sum, w[one]);
            }
            _mm512_store_si512(weights + j * FORWARD_QUERIES + 2 * i, in_pairs(rounded(w[0], w[1])));
        }
        _mm512_store_ps(sums + i, sum);
    }
}

// Outputs [T,D] of one head and, in units of log 2, the logarithm of each query's sum of exponentials.
void attend(bf16* out, int64_t out_token, float* logsumexp, Rows q, Rows k, Rows v, const int32_t* first,
            const Sizes& s) {
    constexpr int64_t N = FORWARD_QUERIES;
    int64_t D = s.D, padded = up(s.T, PAIR);
    float scale = LOG2E / __builtin_sqrtf(float(D));
    Scratch<bf16> keys(padded * D), values(D * padded), queries(D * N), weights(KEYS * N);
    Scratch<float> scores(KEYS * N), sum_out(D * N), most(N), sums(N), factors(N);
    copy(keys, k, padded, D);
    transpose(values, padded, v, padded, D);
    for (int64_t query = 0; query < s.T; query += N) {
        int64_t end = query + N < s.T ? query + N : s.T;
        transpose_in_pairs(queries, q.from(query), N, D);
        std::memset(sum_out, 0, D * N * sizeof(float));
        for (int64_t i = 0; i < N; ++i) most[i] = -1e30f, sums[i] = 0.0f;
        for (int64_t key = first[query] / PAIR * PAIR; key < end; key += KEYS) {
            int64_t many = up(end - key, PAIR) < KEYS ? up(end - key, PAIR) : KEYS;
            multiply<false>(scores, N, keys + key * D, D, queries, 2 * N, many, N, D);
            bool whole = key + many - 1 <= query && query + N <= s.T && key >= first[query + N - 1];
            auto step = whole ? soften<false> : soften<true>;
            step(weights, scores, scale, first, query, key, many, most, sums, factors);
            for (int64_t i = 0; i < N; i += TILE) {
                __m512 factor = _mm512_load_ps(factors + i);
                if (_mm512_cmpneq_ps_mask(factor, _mm512_set1_ps(1.0f)))
                    for (int64_t d = 0; d < D; ++d) {
                        float* at = sum_out + d * N + i;
                        _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), factor));
                    }
            }
            multiply<true>(sum_out, N, values + key, padded, weights, 2 * N, D, N, many);
        }
        for (int64_t i = 0; query + i < end; ++i) {
            put_column(out + (query + i) * out_token, sum_out + i, N, 1.0f / sums[i], D);
            logsumexp[query + i] = most[i] + __builtin_log2f(sums[i]);
        }
    }
}

// A tile of 32 keys and 32 queries: weights by rows, the gradients of their scores by rows and in pairs.
template <bool masked>
void score_gradients(bf16* weights, bf16* rows, bf16* pairs, const float* scores, const float* dweights, float scale,
                     const int32_t* first, const float* logsumexp, const float* delta, int64_t query, int64_t key) {
    for (int64_t i = 0; i < PAIR; i += TILE) {
        __m512 log_v = _mm512_loadu_ps(logsumexp + query + i), delta_v = _mm512_loadu_ps(delta + query + i);
        for (int64_t j = 0; j < PAIR; j += 2) {
            __m512 w[2], g[2];
            for (int64_t one = 0; one < 2; ++one) {
                int64_t at = (j + one) * PAIR + i;
                w[one] = power(_mm512_fmsub_ps(_mm512_load_ps(scores + at), _mm512_set1_ps(scale), log_v));
                if (masked) w[one] = _mm512_maskz_mov_ps(sees(first, query + i, key + j + one), w[one]);
                g[one] = _mm512_mul_ps(w[one], _mm512_sub_ps(_mm512_load_ps(dweights + at), delta_v));
                if (masked) g[one] = _mm512_maskz_mov_ps(sees(first, query + i, key + j + one), g[one]);
            }
            __m512i w16 = rounded(w[0], w[1]), g16 = rounded(g[0], g[1]);
            _mm256_store_si256((__m256i*)(weights + j * QUERIES + i), _mm512_castsi512_si256(w16));
            _mm256_store_si256((__m256i*)(weights + (j + 1) * QUERIES + i), _mm512_extracti64x4_epi64(w16, 1));
            _mm256_store_si256((__m256i*)(rows + j * QUERIES + i), _mm512_castsi512_si256(g16));
            _mm256_store_si256((__m256i*)(rows + (j + 1) * QUERIES + i), _mm512_extracti64x4_epi64(g16, 1));
            _mm512_store_si512(pairs + j * QUERIES + 2 * i, in_pairs(g16));
        }
    }
}

// Which numbers of a block some product has to look at.
struct Range {
    int64_t begin = 0, end = 0;

    void add(int64_t at) {
        if (end == begin) begin = at;
        end = at + PAIR;
    }
};

// What the backward pass reads and writes of one head; dk and dv [T,D] float32.
struct Gradients {
    Rows q, k, v, out, dout;
    const float* logsumexp;
    bf16* dq;
    int64_t dq_token;
    float *dk, *dv;
};

// Once per head: its queries and output gradients as the products want them, block by block of QUERIES.
struct QueryBlocks {
    int64_t count, D;
    Scratch<bf16> across, pairs, dout_across, dout_pairs;  // of each block [D,QUERIES] and [QUERIES,D], in pairs
    Scratch<float> logsumexp, delta, dq;                   // dq: of each block [D,QUERIES]

    QueryBlocks(const Gradients& g, const Sizes& s)
        : count(up(s.T, QUERIES) / QUERIES), D(s.D), across(count * QUERIES * D), pairs(count * QUERIES * D),
          dout_across(count * QUERIES * D), dout_pairs(count * QUERIES * D), logsumexp(count * QUERIES),
          delta(count * QUERIES), dq(count * QUERIES * D) {
        for (int64_t block = 0; block < count; ++block) {
            int64_t at = block * QUERIES * D;
            Rows q = g.q.from(block * QUERIES), dout = g.dout.from(block * QUERIES);
            transpose_in_pairs(across + at, q, QUERIES, D);
            copy_in_pairs(pairs + at, q, QUERIES, D);
            transpose_in_pairs(dout_across + at, dout, QUERIES, D);
            copy_in_pairs(dout_pairs + at, dout, QUERIES, D);
        }
        for (int64_t i = 0; i < count * QUERIES; ++i) {
            const bf16 *out = g.out.at + i * g.out.stride, *dout = g.dout.at + i * g.dout.stride;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < (i < s.T ? D : 0); ++d) sum += value(out[d]) * value(dout[d]);
            delta[i] = sum;
            logsumexp[i] = i < s.T ? g.logsumexp[i] : 0.0f;
        }
        std::memset(dq, 0, count * QUERIES * D * sizeof(float));
    }
};

void attend_backwards(const Gradients& g, const int32_t* first, const Sizes& s) {
    int64_t D = s.D;
    float scale = 1.0f / __builtin_sqrtf(float(D));
    QueryBlocks blocks(g, s);
    Scratch<bf16> keys(KEYS * D), keys_across(D * KEYS), values(KEYS * D);
    Scratch<bf16> weights(KEYS * QUERIES), rows(KEYS * QUERIES), pairs(KEYS * QUERIES);
    Scratch<float> scores(PAIR * PAIR), dweights(PAIR * PAIR), dk(KEYS * D), dv(KEYS * D);
    for (int64_t key = 0; key < s.T; key += KEYS) {
        copy(keys, g.k.from(key), KEYS, D);
        transpose(keys_across, KEYS, g.k.from(key), KEYS, D);
        copy(values, g.v.from(key), KEYS, D);
        std::memset(dk, 0, KEYS * D * sizeof(float));
        std::memset(dv, 0, KEYS * D * sizeof(float));
        for (int64_t block = key / QUERIES; block < blocks.count && first[block * QUERIES] < key + KEYS; ++block) {
            int64_t at = block * QUERIES * D;
            Range queries_of[KEYS / PAIR], keys_of[QUERIES / PAIR];
            for (int64_t j = 0; j < KEYS; j += PAIR)
                for (int64_t i = 0; i < QUERIES; i += PAIR) {
                    int64_t query = block * QUERIES + i, least = key + j, greatest = least + PAIR - 1;
                    if (least > query + PAIR - 1 || query >= s.T || greatest < first[query]) continue;
                    queries_of[j / PAIR].add(i);
                    keys_of[i / PAIR].add(j);
                    multiply<false>(scores, PAIR, keys + j * D, D, blocks.across + at + 2 * i, 2 * QUERIES, PAIR, PAIR, D);
                    multiply<false>(dweights, PAIR, values + j * D, D, blocks.dout_across + at + 2 * i, 2 * QUERIES, PAIR,
                                    PAIR, D);
                    bool whole = greatest <= query && least >= first[query + PAIR - 1];
                    auto step = whole ? score_gradients<false> : score_gradients<true>;
                    step(weights + j * QUERIES + i, rows + j * QUERIES + i, pairs + j * QUERIES + 2 * i, scores, dweights,
                         scale * LOG2E, first, blocks.logsumexp, blocks.delta, query, least);
                }
            for (int64_t j = 0; j < KEYS; j += PAIR) {
                Range r = queries_of[j / PAIR];
                int64_t from = j * QUERIES + r.begin, with = at + r.begin * D, many = r.end - r.begin;
                multiply<true>(dv + j * D, D, weights + from, QUERIES, blocks.dout_pairs + with, 2 * D, PAIR, D, many);
                multiply<true>(dk + j * D, D, rows + from, QUERIES, blocks.pairs + with, 2 * D, PAIR, D, many);
            }
            for (int64_t i = 0; i < QUERIES; i += PAIR) {
                Range r = keys_of[i / PAIR];
                multiply<true>(blocks.dq + at + i, QUERIES, keys_across + r.begin, KEYS, pairs + r.begin * QUERIES + 2 * i,
                               2 * QUERIES, D, PAIR, r.end - r.begin);
            }
        }
        for (int64_t j = 0; j < KEYS && key + j < s.T; ++j)
            for (int64_t d = 0; d < D; ++d) {
                g.dk[(key + j) * D + d] = dk[j * D + d] * scale;
                g.dv[(key + j) * D + d] = dv[j * D + d];
            }
    }
    for (int64_t i = 0; i < s.T; ++i) {
        const float* column = blocks.dq + i / QUERIES * QUERIES * D + i % QUERIES;
        put_column(g.dq + i * g.dq_token, column, QUERIES, scale, D);
    }
}

// The work for every head of every row, the last heads first; false if memory ran out.
template <typename Work>
bool for_each_head(const Sizes& s, int threads, Work work) {
    std::atomic<bool> enough{true};
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < s.B * s.H; ++unit) try {
                work(unit % s.B, s.H - 1 - unit / s.B);
            } catch (const std::bad_alloc&) {
                enough = false;
            }
    }
    return enough;
}

}  // namespace

extern "C" {

// Whether the system lets this process use the tile registers; to be asked before anything else.
bool attention_works() {
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

// out [B,T,H,D] and logsumexp [B,H,T], contiguous; starts [B,T] or null. Heads without a window, the longest, come first.
// Both say whether there was memory enough.
bool attention_forward_bfloat16(const bf16* q, int64_t q_row, int64_t q_token, int64_t q_head, const bf16* k,
                                int64_t k_row, int64_t k_token, int64_t k_head, const bf16* v, int64_t v_row,
                                int64_t v_token, int64_t v_head, const int64_t* starts, bf16* out, float* logsumexp,
                                int64_t B, int64_t T, int64_t H, int64_t Hkv, int64_t D, int64_t window,
                                int64_t windowed, int threads) {
    Sizes s{B, T, H, Hkv, D, window, windowed};
    Heads queries{q, q_row, q_token, q_head}, keys{k, k_row, k_token, k_head}, values{v, v_row, v_token, v_head};
    return for_each_head(s, threads, [&](int64_t b, int64_t h) {
        int64_t shared = h / (H / Hkv);
        Scratch<int32_t> first(up(T, FORWARD_QUERIES));
        first_keys(first, starts, s, b, h, up(T, FORWARD_QUERIES));
        attend(out + b * T * H * D + h * D, H * D, logsumexp + (b * H + h) * T, queries(b, h, T), keys(b, shared, T),
               values(b, shared, T), first, s);
    });
}

// dq like out; dk and dv [B,H,T,D], of each query head its own share.
bool attention_backward_bfloat16(const bf16* q, int64_t q_row, int64_t q_token, int64_t q_head, const bf16* k,
                                 int64_t k_row, int64_t k_token, int64_t k_head, const bf16* v, int64_t v_row,
                                 int64_t v_token, int64_t v_head, const bf16* dout, int64_t dout_row,
                                 int64_t dout_token, int64_t dout_head, const int64_t* starts, const bf16* out,
                                 const float* logsumexp, bf16* dq, float* dk, float* dv, int64_t B, int64_t T, int64_t H,
                                 int64_t Hkv, int64_t D, int64_t window, int64_t windowed, int threads) {
    Sizes s{B, T, H, Hkv, D, window, windowed};
    Heads queries{q, q_row, q_token, q_head}, keys{k, k_row, k_token, k_head}, values{v, v_row, v_token, v_head};
    Heads outs{out, T * H * D, H * D, D}, douts{dout, dout_row, dout_token, dout_head};
    return for_each_head(s, threads, [&](int64_t b, int64_t h) {
        int64_t shared = h / (H / Hkv), head = (b * H + h) * T;
        Scratch<int32_t> first(up(T, QUERIES));
        first_keys(first, starts, s, b, h, up(T, QUERIES));
        attend_backwards({queries(b, h, T), keys(b, shared, T), values(b, shared, T), outs(b, h, T), douts(b, h, T),
                          logsumexp + head, dq + b * T * H * D + h * D, H * D, dk + head * D, dv + head * D},
                         first, s);
    });
}

}  // extern "C"

#else

extern "C" bool attention_works() { return false; }

#endif
