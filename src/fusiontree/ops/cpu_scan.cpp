// Mamba-2's chunked scan on CPU (see ssd_chunks.py for its equations), one head of one row after the other: the matrices
// of a chunk then never leave the cache of a core. Nothing but the inputs is kept for the backward pass, which makes the
// states before the chunks anew.
//
// Shapes: B rows, T tokens in chunks of L, h heads, G groups, P head width, N state. Matrices of one chunk are float32
// with rows padded to whole vectors, whose ends are zeros. ST is a state [N,P], the transpose of the model's.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu_numbers.h"

namespace {

constexpr int64_t WIDTH = 16;
typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));

inline int64_t padded(int64_t n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

struct Matrix {
    std::vector<float> values;
    int64_t rows, stride;

    Matrix(int64_t rows, int64_t columns) : values(rows * padded(columns), 0.0f), rows(rows), stride(padded(columns)) {}
    float* operator[](int64_t row) { return values.data() + row * stride; }
    const float* operator[](int64_t row) const { return values.data() + row * stride; }
};

// Which k of a sum over A[i,k] B[k,:] are there: all, those up to i, those from i on.
enum class Terms { all, until, from };

template <int R, int V>
inline void tile(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_stride, float* c,
                 int64_t c_stride, int64_t first, int64_t last) {
    Vector sum[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sum[r][v] = *reinterpret_cast<const Vector*>(c + r * c_stride + v * WIDTH);
    for (int64_t k = first; k < last; ++k) {
        Vector row[V];
        for (int v = 0; v < V; ++v) row[v] = *reinterpret_cast<const Vector*>(b + k * b_stride + v * WIDTH);
        for (int r = 0; r < R; ++r) {
            float factor = a[r * a_row + k * a_column];
            for (int v = 0; v < V; ++v) sum[r][v] += factor * row[v];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) *reinterpret_cast<Vector*>(c + r * c_stride + v * WIDTH) = sum[r][v];
}

template <int R>
inline void strip(const float* a, int64_t a_row, int64_t a_column, const Matrix& b, Matrix& c, int64_t i, int64_t first,
                  int64_t last) {
    int64_t j = 0;
    for (; j + 4 * WIDTH <= c.stride; j += 4 * WIDTH)
        tile<R, 4>(a, a_row, a_column, b[0] + j, b.stride, c[i] + j, c.stride, first, last);
    for (; j < c.stride; j += WIDTH)
        tile<R, 1>(a, a_row, a_column, b[0] + j, b.stride, c[i] + j, c.stride, first, last);
}

// C += A B for the first `m` rows of C and `inner` terms; with `transposed`, A's transpose in place of A.
inline void multiply(Matrix& c, const Matrix& a, const Matrix& b, int64_t m, int64_t inner, bool transposed = false,
                     Terms terms = Terms::all) {
    int64_t row = transposed ? 1 : a.stride, column = transposed ? a.stride : 1;
    for (int64_t i = 0; i < m;) {
        int64_t many = i + 4 <= m ? 4 : 1;
        int64_t first = terms == Terms::from ? i : 0, last = terms == Terms::until ? std::min(inner, i + many) : inner;
        if (many == 4)
            strip<4>(a[0] + i * row, row, column, b, c, i, first, last);
        else
            strip<1>(a[0] + i * row, row, column, b, c, i, first, last);
        i += many;
    }
}

inline void transpose(Matrix& to, const Matrix& from, int64_t rows, int64_t columns) {
    for (int64_t j = 0; j < columns; ++j)
#pragma omp simd
        for (int64_t i = 0; i < rows; ++i) to[j][i] = from[i][j];
}

inline float dot(const float* a, const float* b, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

struct Sizes {
    int64_t B, T, h, G, P, N, L;
};

// Strides of tokens and rows; a token's heads (or groups) lie side by side.
template <typename T>
struct Tokens {
    const T* at;
    int64_t row, token;

    const T* operator()(int64_t b, int64_t t, int64_t part) const { return at + b * row + t * token + part; }
};

template <typename T>
struct Inputs {
    Tokens<T> x, B, C;
    const float *dt, *A, *D;  // [B,T,h]; [h]; [h] or null
    const bool* reset;        // [B,T] or null
    const float* first;       // [B,h,P,N] or null: zeros
    float floor;              // least logarithm of a decay
};

template <typename T>
inline void read(Matrix& to, const Tokens<T>& from, int64_t b, int64_t start, int64_t count, int64_t part, int64_t n) {
    for (int64_t t = 0; t < count; ++t) {
        const T* entry = from(b, start + t, part);
        float* row = to[t];
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) row[i] = value(entry[i]);
    }
}

// C_t . B_s of the tokens of each chunk: [B,G,T,L].
template <typename T>
std::vector<float> products(const Inputs<T>& in, const Sizes& n, int threads) {
    std::vector<float> found(n.B * n.G * n.T * n.L);
    int64_t chunks = (n.T + n.L - 1) / n.L;
#pragma omp parallel num_threads(threads)
    {
        Matrix B(n.L, n.N), C(n.L, n.N), BT(n.N, n.L), product(n.L, n.L);
#pragma omp for schedule(static) collapse(2)
        for (int64_t group = 0; group < n.B * n.G; ++group)
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                int64_t start = chunk * n.L, count = std::min(n.L, n.T - start);
                read(B, in.B, group / n.G, start, count, group % n.G * n.N, n.N);
                read(C, in.C, group / n.G, start, count, group % n.G * n.N, n.N);
                transpose(BT, B, count, n.N);
                std::fill(product.values.begin(), product.values.end(), 0.0f);
                multiply(product, C, BT, count, n.N);
                for (int64_t t = 0; t < count; ++t)
                    std::memcpy(found.data() + (group * n.T + start + t) * n.L, product[t], n.L * sizeof(float));
            }
    }
    return found;
}

// One chunk of one head.
template <typename T>
struct Chunk {
    const Inputs<T>& in;
    const Sizes& n;
    const std::vector<float>& products_BGTL;
    int64_t b = 0, head = 0, start = 0, count = 0, group = 0;
    Matrix x, dtx, B, C, decay, mixing;
    // Sums of dt A in two floats: differences of one lose the digits that tell neighbours apart where decays are strong.
    std::vector<float> dt, high, low, from_start, to_end, segment;
    float through = 0.0f;

    Chunk(const Inputs<T>& in, const Sizes& n, const std::vector<float>& products)
        : in(in), n(n), products_BGTL(products), x(n.L, n.P), dtx(n.L, n.P), B(n.L, n.N), C(n.L, n.N), decay(n.L, n.L),
          mixing(n.L, n.L), dt(n.L), high(n.L), low(n.L), from_start(n.L), to_end(n.L), segment(n.L), exact(n.L) {}

    void at(int64_t row, int64_t head_, int64_t chunk) {
        b = row, head = head_, start = chunk * n.L, count = std::min(n.L, n.T - start), group = head / (n.h / n.G);
        read(x, in.x, b, start, count, head * n.P, n.P);
        read(B, in.B, b, start, count, group * n.N, n.N);
        double sum = 0.0;
        float documents = 0.0f;
        for (int64_t t = 0; t < count; ++t) {
            dt[t] = in.dt[(b * n.T + start + t) * n.h + head];
            sum += double(dt[t]) * double(in.A[head]);
            exact[t] = sum;
            high[t] = float(sum);
            low[t] = float(sum - double(high[t]));
            if (in.reset && in.reset[b * n.T + start + t]) documents += 1.0f;
            segment[t] = documents;
            float* row_P = dtx[t];
            const float* x_P = x[t];
#pragma omp simd
            for (int64_t i = 0; i < n.P; ++i) row_P[i] = x_P[i] * dt[t];
        }
        for (int64_t t = 0; t < count; ++t) {
            from_start[t] = segment[t] == 0.0f ? decayed(exact[t]) : 0.0f;
            to_end[t] = segment[t] == documents ? decayed(sum - exact[t]) : 0.0f;
        }
        through = from_start[count - 1];
    }

    // What tokens take of each other; with C.
    void mix() {
        read(C, in.C, b, start, count, group * n.N, n.N);
        for (int64_t t = 0; t < count; ++t) {
            const float* product = products_BGTL.data() + ((b * n.G + group) * n.T + start + t) * n.L;
            float *d = decay[t], *m = mixing[t], high_t = high[t], low_t = low[t], segment_t = segment[t];
#pragma omp simd
            for (int64_t s = 0; s <= t; ++s) {
                float log = (high_t - high[s]) + (low_t - low[s]);
                float e = exponential(log < in.floor ? in.floor : (log > 0.0f ? 0.0f : log));
                d[s] = segment[s] == segment_t ? e : 0.0f;
                m[s] = d[s] * product[s];
            }
            std::fill(d + t + 1, d + decay.stride, 0.0f);
            std::fill(m + t + 1, m + mixing.stride, 0.0f);
        }
    }

    // The state after the chunk in place of the one before it. `scaled` is memory for [L,P].
    void pass(Matrix& ST, Matrix& scaled) const {
        for (float& entry : ST.values) entry *= through;
        scale(scaled, dtx, to_end);
        multiply(ST, B, scaled, n.N, count, true);
    }

    void scale(Matrix& to, const Matrix& from, const std::vector<float>& factor) const {
        for (int64_t t = 0; t < count; ++t) {
            float *row = to[t], f = factor[t];
            const float* entry = from[t];
#pragma omp simd
            for (int64_t i = 0; i < from.stride; ++i) row[i] = f * entry[i];
        }
    }

   private:
    std::vector<double> exact;  // the same sums

    float decayed(double log) const {
        if (log < double(in.floor)) return exponential(in.floor);
        float near = float(log);
        return exponential(near) * (1.0f + float(log - double(near)));
    }
};

inline void read_state(Matrix& ST, const float* state_BHPN, int64_t place, const Sizes& n) {
    std::fill(ST.values.begin(), ST.values.end(), 0.0f);
    if (!state_BHPN) return;
    const float* state = state_BHPN + place * n.P * n.N;
    for (int64_t i = 0; i < n.N; ++i)
        for (int64_t p = 0; p < n.P; ++p) ST[i][p] = state[p * n.N + i];
}

inline void write_state(float* state_BHPN, const Matrix& ST, int64_t place, const Sizes& n) {
    float* state = state_BHPN + place * n.P * n.N;
    for (int64_t p = 0; p < n.P; ++p)
        for (int64_t i = 0; i < n.N; ++i) state[p * n.N + i] = ST[i][p];
}

template <typename T>
void forward(const Inputs<T>& in, const Sizes& n, T* y, float* last, int threads) {
    auto product = products(in, n, threads);
    int64_t chunks = (n.T + n.L - 1) / n.L;
#pragma omp parallel num_threads(threads)
    {
        Chunk<T> chunk(in, n, product);
        Matrix ST(n.N, n.P), out(n.L, n.P), scaled_C(n.L, n.N), scaled(n.L, n.P);
#pragma omp for schedule(static)
        for (int64_t place = 0; place < n.B * n.h; ++place) {
            int64_t b = place / n.h, head = place % n.h;
            read_state(ST, in.first, place, n);
            for (int64_t c = 0; c < chunks; ++c) {
                chunk.at(b, head, c);
                chunk.mix();
                // y = from_start C S + mixing dtx + D x
                for (int64_t t = 0; t < chunk.count; ++t) {
                    float *row = out[t], skip = in.D ? in.D[head] : 0.0f;
                    const float* x_P = chunk.x[t];
#pragma omp simd
                    for (int64_t i = 0; i < out.stride; ++i) row[i] = skip * x_P[i];
                }
                chunk.scale(scaled_C, chunk.C, chunk.from_start);
                multiply(out, scaled_C, ST, chunk.count, n.N);
                multiply(out, chunk.mixing, chunk.dtx, chunk.count, chunk.count, false, Terms::until);
                for (int64_t t = 0; t < chunk.count; ++t) {
                    T* to = y + ((b * n.T + chunk.start + t) * n.h + head) * n.P;
                    const float* row = out[t];
#pragma omp simd
                    for (int64_t i = 0; i < n.P; ++i) put(to[i], row[i]);
                }
                chunk.pass(ST, scaled);
            }
            write_state(last, ST, place, n);
        }
    }
}

template <typename T>
struct Gradients {
    Tokens<T> dy;
    const float* dlast;                // [B,h,P,N] or null: zeros
    T* dx;                             // [B,T,h,P]
    float *ddt, *dA, *dB, *dC, *dD;    // [B,T,h]; [B,h]; of each head [B,h,T,N], twice; [B,h]
    float* dfirst;                     // [B,h,P,N]
};

template <typename T>
void backward(const Inputs<T>& in, const Sizes& n, const Gradients<T>& out, int threads) {
    auto product = products(in, n, threads);
    int64_t chunks = (n.T + n.L - 1) / n.L;
#pragma omp parallel num_threads(threads)
    {
        Chunk<T> chunk(in, n, product);
        Matrix ST(n.N, n.P), dST(n.N, n.P), S(n.P, n.N), dS(n.P, n.N), dtxT(n.P, n.L);
        Matrix dy(n.L, n.P), dy_decayed(n.L, n.P), scaled(n.L, n.P), ddtx(n.L, n.P);
        Matrix dB(n.L, n.N), dC(n.L, n.N), dmixing(n.L, n.L);
        std::vector<float> states(chunks * ST.values.size()), net(n.L), inner(n.L), into(n.L);
#pragma omp for schedule(static)
        for (int64_t place = 0; place < n.B * n.h; ++place) {
            int64_t b = place / n.h, head = place % n.h;
            read_state(ST, in.first, place, n);
            for (int64_t c = 0; c < chunks; ++c) {
                std::copy(ST.values.begin(), ST.values.end(), states.begin() + c * ST.values.size());
                if (c + 1 == chunks) break;
                chunk.at(b, head, c);
                chunk.pass(ST, scaled);
            }
            read_state(dST, out.dlast, place, n);
            double dA = 0.0, dD = 0.0;
            for (int64_t c = chunks - 1; c >= 0; --c) {
                chunk.at(b, head, c);
                chunk.mix();
                std::copy_n(states.begin() + c * ST.values.size(), ST.values.size(), ST.values.begin());
                int64_t count = chunk.count;
                read(dy, out.dy, b, chunk.start, count, head * n.P, n.P);
                for (Matrix* sum : {&ddtx, &dB, &dC, &dmixing}) std::fill(sum->values.begin(), sum->values.end(), 0.0f);

                // Through the states: y = from_start C S, and the state after the chunk.
                chunk.scale(dy_decayed, dy, chunk.from_start);
                transpose(S, ST, n.N, n.P);
                multiply(dC, dy_decayed, S, count, n.P);
                for (int64_t t = 0; t < count; ++t) net[t] = dot(dC[t], chunk.C[t], n.N);
                transpose(dS, dST, n.N, n.P);
                chunk.scale(scaled, chunk.dtx, chunk.to_end);
                multiply(dB, scaled, dS, count, n.P);
                multiply(ddtx, chunk.B, dST, count, n.N);
                chunk.scale(ddtx, ddtx, chunk.to_end);
                float carried = chunk.through * dot(dST.values.data(), ST.values.data(), ST.values.size());
                for (int64_t t = 0; t < count; ++t) inner[t] = carried, carried += chunk.dt[t] * dot(chunk.x[t], ddtx[t], n.P);
                for (float& entry : dST.values) entry *= chunk.through;
                multiply(dST, chunk.C, dy_decayed, n.N, count, true);

                // Within the chunk: y = mixing dtx, mixing = decay o product.
                transpose(dtxT, chunk.dtx, count, n.P);
                multiply(dmixing, dy, dtxT, count, n.P);
                multiply(ddtx, chunk.mixing, dy, count, count, true, Terms::from);
                std::fill(into.begin(), into.end(), 0.0f);
                for (int64_t t = 0; t < count; ++t) {
                    const float *d = chunk.decay[t], *m = chunk.mixing[t];
                    float *row = dmixing[t], *passed = into.data(), from = 0.0f;
                    // A token's pair with itself passes no decay, and would drown the others where decays are strong.
#pragma omp simd reduction(+ : from)
                    for (int64_t s = 0; s < t; ++s) {
                        float pair = row[s] * m[s];
                        from += pair;
                        passed[s] += pair;
                        row[s] *= d[s];
                    }
                    row[t] *= d[t];
                    std::fill(row + t + 1, row + dmixing.stride, 0.0f);
                    net[t] += from;
                }
                multiply(dC, dmixing, chunk.B, count, count, false, Terms::until);
                multiply(dB, dmixing, chunk.C, count, count, true, Terms::from);

                // The gradient of dt A at t is the sum over all that passes t's decay.
                float after = 0.0f;
                for (int64_t t = count - 1; t >= 0; --t) {
                    after += net[t] - into[t];
                    float dlog = after + inner[t];
                    const float *x_P = chunk.x[t], *dy_P = dy[t], *ddtx_P = ddtx[t];
                    out.ddt[(b * n.T + chunk.start + t) * n.h + head] = dot(x_P, ddtx_P, n.P) + dlog * in.A[head];
                    dA += double(dlog) * double(chunk.dt[t]);
                    dD += double(dot(x_P, dy_P, n.P));
                    T* to = out.dx + ((b * n.T + chunk.start + t) * n.h + head) * n.P;
                    float dt = chunk.dt[t], skip = in.D ? in.D[head] : 0.0f;
#pragma omp simd
                    for (int64_t i = 0; i < n.P; ++i) put(to[i], ddtx_P[i] * dt + dy_P[i] * skip);
                    int64_t at = (place * n.T + chunk.start + t) * n.N;
                    std::memcpy(out.dB + at, dB[t], n.N * sizeof(float));
                    std::memcpy(out.dC + at, dC[t], n.N * sizeof(float));
                }
            }
            out.dA[place] = float(dA);
            out.dD[place] = float(dD);
            write_state(out.dfirst, dST, place, n);
        }
    }
}

}  // namespace

#define FUSIONTREE_SCAN(T, suffix)                                                                                     \
    extern "C" void scan_forward_##suffix(                                                                             \
        const T* x, int64_t x_row, int64_t x_token, const T* B, int64_t B_row, int64_t B_token, const T* C,            \
        int64_t C_row, int64_t C_token, const float* dt, const float* A, const float* D, const bool* reset,            \
        const float* first, float floor, int64_t rows, int64_t length, int64_t h, int64_t P, int64_t G, int64_t N,     \
        int64_t L, T* y, float* last, int threads) {                                                                   \
        Inputs<T> in{{x, x_row, x_token}, {B, B_row, B_token}, {C, C_row, C_token}, dt, A, D, reset, first, floor};    \
        forward(in, Sizes{rows, length, h, G, P, N, L}, y, last, threads);                                             \
    }                                                                                                                  \
    extern "C" void scan_backward_##suffix(                                                                            \
        const T* x, int64_t x_row, int64_t x_token, const T* B, int64_t B_row, int64_t B_token, const T* C,            \
        int64_t C_row, int64_t C_token, const float* dt, const float* A, const float* D, const bool* reset,            \
        const float* first, float floor, int64_t rows, int64_t length, int64_t h, int64_t P, int64_t G, int64_t N,     \
        int64_t L, const T* dy, int64_t dy_row, int64_t dy_token, const float* dlast, T* dx, float* ddt, float* dA,    \
        float* dB, float* dC, float* dD, float* dfirst, int threads) {                                                 \
        Inputs<T> in{{x, x_row, x_token}, {B, B_row, B_token}, {C, C_row, C_token}, dt, A, D, reset, first, floor};    \
        Gradients<T> out{{dy, dy_row, dy_token}, dlast, dx, ddt, dA, dB, dC, dD, dfirst};                              \
        backward(in, Sizes{rows, length, h, G, P, N, L}, out, threads);                                                \
    }

FUSIONTREE_SCAN(float, float32)
FUSIONTREE_SCAN(bf16, bfloat16)
