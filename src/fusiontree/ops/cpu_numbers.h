// Numbers of the C++ kernels: float32 and bfloat16 in memory, float32 in computing.

#pragma once

#include <cstdint>
#include <cstring>

struct bf16 {
    uint16_t bits;
};

inline float value(float v) { return v; }

inline float value(bf16 v) {
    uint32_t bits = uint32_t(v.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}

inline void put(float& to, float v) { to = v; }

inline void put(bf16& to, float v) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof(bits));
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to.bits = uint16_t(v != v ? 0x7fc0u : rounded);
}

// e^v within two units in the last place (polynomial of Cephes' expf); a compiler makes vectors of it.
inline float exponential(float v) {
    v = v < -87.0f ? -87.0f : (v > 88.0f ? 88.0f : v);
    float n = __builtin_rintf(v * 1.44269504088896341f);
    float r = v - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    float y = p * r * r + r + 1.0f;
    uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return y * power;
}

inline float sigmoid(float v) { return 1.0f / (1.0f + exponential(-v)); }
