// Training's element-wise chains on CPU, each in one pass over memory: what torch runs as a dozen operations that write
// float32 tensors of their own. Sums over tokens are made block by block and then in the order of the blocks, so that a
// result does not depend on the number of threads.
//
// Shapes: B rows, T tokens, c channels, K taps, n = B T, h heads, P head width. Strides count elements; the last
// dimension of every tensor is contiguous.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu_numbers.h"

namespace {

struct Block {
    int64_t row, start, stop;
};

// Runs of tokens, of every row: at most some 64 in all, so that sums of each are few, and no fewer than 64 tokens.
std::vector<Block> blocks(int64_t B, int64_t T) {
    int64_t size = std::max<int64_t>(64, (B * T + 63) / 64);
    std::vector<Block> found;
    for (int64_t row = 0; row < B; ++row)
        for (int64_t start = 0; start < T; start += size) found.push_back({row, start, std::min(start + size, T)});
    return found;
}

// The convolution before its activation, of one row.
template <typename T>
struct Row {
    const T* x;  // token t lies at x + t stride
    int64_t stride;
    const float* before;  // [K-1,c] or null: zeros
    const bool* reset;    // [T] or null
    const float* weight;  // [K,c], the last for the current token
    const float* bias;    // [c] or null
    int64_t c, K;

    // How many entries token t reads, itself included: up to the last reset, or to what lies before the row.
    int64_t readable(int64_t t) const {
        int64_t most = std::min(K, t + 1 + (before ? K - 1 : 0)), count = 1;
        while (count < most && !(reset && t - count + 1 >= 0 && reset[t - count + 1])) ++count;
        return count;
    }

    void add_tap(int64_t t, int64_t back, float* out) const {
        const float* w = weight + (K - 1 - back) * c;
        if (t >= back) {
            const T* entry = x + (t - back) * stride;
#pragma omp simd
            for (int64_t i = 0; i < c; ++i) out[i] += w[i] * value(entry[i]);
        } else {
            const float* entry = before + (K - 1 + t - back) * c;
#pragma omp simd
            for (int64_t i = 0; i < c; ++i) out[i] += w[i] * entry[i];
        }
    }

    void output(int64_t t, float* out) const {
        if (bias)
            std::memcpy(out, bias, c * sizeof(float));
        else
            std::fill(out, out + c, 0.0f);
        if (K == 4 && t >= 3 && readable(t) == 4) {  // nearly all tokens: one pass
            const T *x0 = x + t * stride, *x1 = x0 - stride, *x2 = x1 - stride, *x3 = x2 - stride;
            const float *w3 = weight, *w2 = w3 + c, *w1 = w2 + c, *w0 = w1 + c;
#pragma omp simd
            for (int64_t i = 0; i < c; ++i)
                out[i] += w0[i] * value(x0[i]) + w1[i] * value(x1[i]) + w2[i] * value(x2[i]) + w3[i] * value(x3[i]);
        } else {
            for (int64_t back = 0, count = readable(t); back < count; ++back) add_tap(t, back, out);
        }
    }
};

template <typename T>
void conv_forward(const Row<T>* rows, T* y, int64_t B, int64_t length, bool silu, int threads) {
    auto work = blocks(B, length);
    int64_t c = rows[0].c;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> out(c);
#pragma omp for schedule(static)
        for (size_t index = 0; index < work.size(); ++index) {
            const Block& block = work[index];
            for (int64_t t = block.start; t < block.stop; ++t) {
                rows[block.row].output(t, out.data());
                T* to = y + (block.row * length + t) * c;
                const float* from = out.data();
                if (silu)
#pragma omp simd
                    for (int64_t i = 0; i < c; ++i) put(to[i], from[i] * sigmoid(from[i]));
                else
#pragma omp simd
                    for (int64_t i = 0; i < c; ++i) put(to[i], from[i]);
            }
        }
    }
}

template <typename T>
void conv_backward(const Row<T>* rows, const T* dy, int64_t dy_stride_B, int64_t dy_stride_T, T* dx, float* dbefore,
                   float* dweight, float* dbias, int64_t B, int64_t length, bool silu, int threads) {
    auto work = blocks(B, length);
    int64_t c = rows[0].c, K = rows[0].K, sums = (K + 1) * c;  // of each block: the weight's gradient, then the bias's
    std::vector<float> partial(work.size() * sums, 0.0f);
#pragma omp parallel num_threads(threads)
    {
        // The gradients before the activation of the last K tokens, and how many entries each of them read.
        std::vector<float> ring(K * c), out(c);
        std::vector<int64_t> reach(K);
#pragma omp for schedule(static)
        for (size_t index = 0; index < work.size(); ++index) {
            const Block& block = work[index];
            const Row<T>& row = rows[block.row];
            float* sum = partial.data() + index * sums;
            std::fill(reach.begin(), reach.end(), 0);
            for (int64_t t = block.start; t < block.stop + K - 1; ++t) {
                float* g = ring.data() + t % K * c;
                reach[t % K] = t < length ? row.readable(t) : 0;
                if (t < length) {
                    row.output(t, out.data());
                    const float* pre = out.data();
                    const T* grad = dy + block.row * dy_stride_B + t * dy_stride_T;
                    if (silu)
#pragma omp simd
                        for (int64_t i = 0; i < c; ++i) {
                            float s = sigmoid(pre[i]);
                            g[i] = value(grad[i]) * s * (1.0f + pre[i] * (1.0f - s));
                        }
                    else
#pragma omp simd
                        for (int64_t i = 0; i < c; ++i) g[i] = value(grad[i]);
                }
                if (t < block.stop) {
                    float* db = sum + K * c;
#pragma omp simd
                    for (int64_t i = 0; i < c; ++i) db[i] += g[i];
                    for (int64_t back = 0; back < reach[t % K]; ++back) {
                        float* dw = sum + (K - 1 - back) * c;
                        if (t >= back) {
                            const T* entry = row.x + (t - back) * row.stride;
#pragma omp simd
                            for (int64_t i = 0; i < c; ++i) dw[i] += g[i] * value(entry[i]);
                        } else {
                            const float* entry = row.before + (K - 1 + t - back) * c;
#pragma omp simd
                            for (int64_t i = 0; i < c; ++i) dw[i] += g[i] * entry[i];
                        }
                    }
                }
                // Entry e is now read by all tokens that ever read it.
                int64_t e = t - (K - 1);
                if (e < block.start && !(block.start == 0 && e < 0 && dbefore)) continue;
                float* total = out.data();
                std::fill(total, total + c, 0.0f);
                for (int64_t back = 0; back < K; ++back) {
                    int64_t reader = e + back;
                    if (reader < 0 || reader >= length || reach[reader % K] <= back) continue;
                    const float *w = row.weight + (K - 1 - back) * c, *from = ring.data() + reader % K * c;
#pragma omp simd
                    for (int64_t i = 0; i < c; ++i) total[i] += w[i] * from[i];
                }
                if (e >= 0) {
                    T* to = dx + (block.row * length + e) * c;
#pragma omp simd
                    for (int64_t i = 0; i < c; ++i) put(to[i], total[i]);
                } else {
                    std::memcpy(dbefore + (block.row * (K - 1) + K - 1 + e) * c, total, c * sizeof(float));
                }
            }
        }
    }
    std::fill(dweight, dweight + K * c, 0.0f);
    std::fill(dbias, dbias + c, 0.0f);
    for (size_t index = 0; index < work.size(); ++index) {
        const float* sum = partial.data() + index * sums;
        for (int64_t i = 0; i < K * c; ++i) dweight[i] += sum[i];
        for (int64_t i = 0; i < c; ++i) dbias[i] += sum[K * c + i];
    }
}

template <typename T>
std::vector<Row<T>> conv_rows(const T* x, int64_t stride_B, int64_t stride_T, const float* before,
                              const bool* reset, const float* weight, const float* bias, int64_t B, int64_t length,
                              int64_t c, int64_t K) {
    std::vector<Row<T>> rows;
    for (int64_t b = 0; b < B; ++b)
        rows.push_back({x + b * stride_B, stride_T, before ? before + b * (K - 1) * c : nullptr,
                        reset ? reset + b * length : nullptr, weight, bias, c, K});
    return rows;
}

// RMSNorm(y silu(z)) weight, of every head.
template <typename T>
void norm_forward(const T* y, const T* z, int64_t z_stride, const float* weight, T* out, int64_t n, int64_t h,
                  int64_t P, float eps, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> gated(P);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < n; ++t)
            for (int64_t head = 0; head < h; ++head) {
                const T *y_P = y + (t * h + head) * P, *z_P = z + t * z_stride + head * P;
                float squares = 0.0f, *s = gated.data();
#pragma omp simd reduction(+ : squares)
                for (int64_t i = 0; i < P; ++i) {
                    float gate = value(z_P[i]);
                    s[i] = value(y_P[i]) * gate * sigmoid(gate);
                    squares += s[i] * s[i];
                }
                float r = 1.0f / std::sqrt(squares / float(P) + eps);
                T* to = out + (t * h + head) * P;
                const float* w = weight + head * P;
#pragma omp simd
                for (int64_t i = 0; i < P; ++i) put(to[i], s[i] * r * w[i]);
            }
    }
}

// With s = y silu(z), r = 1 / sqrt(mean s^2 + eps) and g the gradient of s r: ds = r (g - s r^2 mean(g s)).
template <typename T>
void norm_backward(const T* y, const T* z, int64_t z_stride, const float* weight, const T* dout, T* dy, T* dz,
                   float* dweight, int64_t n, int64_t h, int64_t P, float eps, int threads) {
    auto work = blocks(1, n);
    std::vector<float> partial(work.size() * h * P, 0.0f);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> gated(P), silu(P), slope(P);
#pragma omp for schedule(static)
        for (size_t index = 0; index < work.size(); ++index)
            for (int64_t t = work[index].start; t < work[index].stop; ++t)
                for (int64_t head = 0; head < h; ++head) {
                    int64_t at = (t * h + head) * P;
                    const T *y_P = y + at, *z_P = z + t * z_stride + head * P, *dout_P = dout + at;
                    const float* w = weight + head * P;
                    float squares = 0.0f, along = 0.0f, *s = gated.data(), *a = silu.data(), *d = slope.data();
#pragma omp simd reduction(+ : squares, along)
                    for (int64_t i = 0; i < P; ++i) {
                        float gate = value(z_P[i]), sig = sigmoid(gate);
                        a[i] = gate * sig;
                        d[i] = sig * (1.0f + gate * (1.0f - sig));
                        s[i] = value(y_P[i]) * a[i];
                        squares += s[i] * s[i];
                        along += value(dout_P[i]) * w[i] * s[i];
                    }
                    float r = 1.0f / std::sqrt(squares / float(P) + eps);
                    along *= r * r / float(P);
                    float* dw = partial.data() + (index * h + head) * P;
                    T *dy_P = dy + at, *dz_P = dz + at;
#pragma omp simd
                    for (int64_t i = 0; i < P; ++i) {
                        float dnormed = value(dout_P[i]);
                        float ds = (dnormed * w[i] - s[i] * along) * r;
                        dw[i] += dnormed * s[i] * r;
                        put(dy_P[i], a[i] * ds);
                        put(dz_P[i], ds * value(y_P[i]) * d[i]);
                    }
                }
    }
    std::fill(dweight, dweight + h * P, 0.0f);
    for (size_t index = 0; index < work.size(); ++index)
        for (int64_t i = 0; i < h * P; ++i) dweight[i] += partial[index * h * P + i];
}

// Halves of each head turned by the token's angle; backwards, by its negative.
template <typename T>
void rotary(const T* x, int64_t x_stride, const float* cos, const float* sin, int64_t angle_rows, T* out, int64_t n,
            int64_t h, int64_t P, bool backwards, int threads) {
    int64_t half = P / 2;
    float sign = backwards ? -1.0f : 1.0f;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < n; ++t) {
        const float *c = cos + t % angle_rows * half, *s = sin + t % angle_rows * half;
        for (int64_t head = 0; head < h; ++head) {
            const T *first = x + t * x_stride + head * P, *second = first + half;
            T *to_first = out + (t * h + head) * P, *to_second = to_first + half;
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                float a = value(first[i]), b = value(second[i]), turn = sign * s[i];
                put(to_first[i], a * c[i] - b * turn);
                put(to_second[i], b * c[i] + a * turn);
            }
        }
    }
}

// log(1 + e^v), by log1p(w) = 2 artanh(w / (2 + w)) for w = e^-|v| <= 1.
inline float softplus(float v) {
    float w = exponential(v < 0.0f ? v : -v), u = w / (2.0f + w), q = u * u;
    float p = 1.0f / 13.0f;
    p = p * q + 1.0f / 11.0f;
    p = p * q + 1.0f / 9.0f;
    p = p * q + 1.0f / 7.0f;
    p = p * q + 1.0f / 5.0f;
    p = p * q + 1.0f / 3.0f;
    return (v > 0.0f ? v : 0.0f) + 2.0f * u * (p * q + 1.0f);
}

// f = b + g (a - b) with g = sigmoid(s), and the means over channels of g and of its entropy softplus(s) - s g.
template <typename T>
void mix_forward(const T* logits, const T* a, const T* b, T* mix, float* mean, float* entropy, int64_t n, int64_t c,
                 int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < n; ++t) {
        float gates = 0.0f, entropies = 0.0f;
        const T *s_c = logits + t * c, *a_c = a + t * c, *b_c = b + t * c;
        T* to = mix + t * c;
#pragma omp simd reduction(+ : gates, entropies)
        for (int64_t i = 0; i < c; ++i) {
            float s = value(s_c[i]), gate = sigmoid(s), other = value(b_c[i]);
            put(to[i], other + gate * (value(a_c[i]) - other));
            gates += gate;
            entropies += softplus(s) - s * gate;
        }
        mean[t] = gates / float(c);
        entropy[t] = entropies / float(c);
    }
}

// dg/ds = g (1-g), and of the entropy H: dH/ds = -s g (1-g).
template <typename T>
void mix_backward(const T* logits, const T* a, const T* b, const T* dmix, const float* dmean, const float* dentropy,
                  T* dlogits, T* da, T* db, int64_t n, int64_t c, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < n; ++t) {
        float of_gate = dmean[t] / float(c), of_entropy = dentropy[t] / float(c);
#pragma omp simd
        for (int64_t i = t * c; i < (t + 1) * c; ++i) {
            float s = value(logits[i]), gate = sigmoid(s), d = value(dmix[i]);
            put(da[i], d * gate);
            put(db[i], d - d * gate);
            float dgate = d * (value(a[i]) - value(b[i])) + of_gate - s * of_entropy;
            put(dlogits[i], gate * (1.0f - gate) * dgate);
        }
    }
}

// silu(gate) up, of gate and up side by side: [n,2c] -> [n,c].
template <typename T>
void swiglu_forward(const T* x, T* out, int64_t n, int64_t c, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < n; ++t) {
        const T *gate = x + 2 * t * c, *up = gate + c;
        T* to = out + t * c;
#pragma omp simd
        for (int64_t i = 0; i < c; ++i) {
            float g = value(gate[i]);
            put(to[i], g * sigmoid(g) * value(up[i]));
        }
    }
}

// With s = sigmoid(g): silu(g) = g s, and its derivative s (1 + g (1 - s)).
template <typename T>
void swiglu_backward(const T* x, const T* dout, T* dx, int64_t n, int64_t c, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < n; ++t) {
        const T *gate = x + 2 * t * c, *up = gate + c, *d_c = dout + t * c;
        T *dgate = dx + 2 * t * c, *dup = dgate + c;
#pragma omp simd
        for (int64_t i = 0; i < c; ++i) {
            float g = value(gate[i]), s = sigmoid(g), d = value(d_c[i]);
            put(dup[i], d * g * s);
            put(dgate[i], d * value(up[i]) * s * (1.0f + g * (1.0f - s)));
        }
    }
}

}  // namespace

#define FUSIONTREE_KERNELS(T, suffix)                                                                                  \
    extern "C" void conv_forward_##suffix(const T* x, int64_t stride_B, int64_t stride_T, const float* before,         \
                                          const bool* reset, const float* weight, const float* bias, T* y, int64_t B,  \
                                          int64_t length, int64_t c, int64_t K, bool silu, int threads) {              \
        auto rows = conv_rows(x, stride_B, stride_T, before, reset, weight, bias, B, length, c, K);                    \
        conv_forward(rows.data(), y, B, length, silu, threads);                                                        \
    }                                                                                                                  \
    extern "C" void conv_backward_##suffix(                                                                            \
        const T* x, int64_t stride_B, int64_t stride_T, const float* before, const bool* reset, const float* weight,   \
        const float* bias, const T* dy, int64_t dy_stride_B, int64_t dy_stride_T, T* dx, float* dbefore,               \
        float* dweight, float* dbias, int64_t B, int64_t length, int64_t c, int64_t K, bool silu, int threads) {       \
        auto rows = conv_rows(x, stride_B, stride_T, before, reset, weight, bias, B, length, c, K);                    \
        conv_backward(rows.data(), dy, dy_stride_B, dy_stride_T, dx, dbefore, dweight, dbias, B, length, silu,         \
                      threads);                                                                                        \
    }                                                                                                                  \
    extern "C" void norm_forward_##suffix(const T* y, const T* z, int64_t z_stride, const float* weight, T* out,       \
                                          int64_t n, int64_t h, int64_t P, float eps, int threads) {                   \
        norm_forward(y, z, z_stride, weight, out, n, h, P, eps, threads);                                              \
    }                                                                                                                  \
    extern "C" void norm_backward_##suffix(const T* y, const T* z, int64_t z_stride, const float* weight,              \
                                           const T* dout, T* dy, T* dz, float* dweight, int64_t n, int64_t h,          \
                                           int64_t P, float eps, int threads) {                                        \
        norm_backward(y, z, z_stride, weight, dout, dy, dz, dweight, n, h, P, eps, threads);                           \
    }                                                                                                                  \
    extern "C" void rotary_##suffix(const T* x, int64_t x_stride, const float* cos, const float* sin,                  \
                                    int64_t angle_rows, T* out, int64_t n, int64_t h, int64_t P, bool backwards,       \
                                    int threads) {                                                                     \
        rotary(x, x_stride, cos, sin, angle_rows, out, n, h, P, backwards, threads);                                   \
    }                                                                                                                  \
    extern "C" void mix_forward_##suffix(const T* logits, const T* a, const T* b, T* mix, float* mean, float* entropy, \
                                         int64_t n, int64_t c, int threads) {                                          \
        mix_forward(logits, a, b, mix, mean, entropy, n, c, threads);                                                  \
    }                                                                                                                  \
    extern "C" void mix_backward_##suffix(const T* logits, const T* a, const T* b, const T* dmix, const float* dmean,  \
                                          const float* dentropy, T* dlogits, T* da, T* db, int64_t n, int64_t c,       \
                                          int threads) {                                                               \
        mix_backward(logits, a, b, dmix, dmean, dentropy, dlogits, da, db, n, c, threads);                             \
    }                                                                                                                  \
    extern "C" void swiglu_forward_##suffix(const T* x, T* out, int64_t n, int64_t c, int threads) {                   \
        swiglu_forward(x, out, n, c, threads);                                                                         \
    }                                                                                                                  \
    extern "C" void swiglu_backward_##suffix(const T* x, const T* dout, T* dx, int64_t n, int64_t c, int threads) {    \
        swiglu_backward(x, dout, dx, n, c, threads);                                                                   \
    }

FUSIONTREE_KERNELS(float, float32)
FUSIONTREE_KERNELS(bf16, bfloat16)
