// What the scans in CUDA C++ share: numbers as they are stored, softplus and its slope, sums over lanes. It is compiled in
// front of each source.
//
// Compile-time: T_BF16, T_FP16 or T_FP32, the inputs' type.

#ifdef T_FP32
typedef float real_t;
__device__ __forceinline__ float real(float v) { return v; }
#else
typedef unsigned short real_t;
__device__ __forceinline__ float real(unsigned short v) {
#ifdef T_BF16
    return __uint_as_float(unsigned(v) << 16);
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
#endif
}
#endif

constexpr float LOG2E = 1.4426950408889634f;
constexpr unsigned ALL = ~0u;  // lanes of a warp

__device__ __forceinline__ float power2(float v) {
    float f;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(f) : "f"(v));
    return f;
}

// softplus(raw), raw itself above 20; log(1 + s) / s on [0, 1] is a Chebyshev fit, 2e-7 relative, also near 0
__device__ __forceinline__ float softplus(float raw) {
    float s = power2(-LOG2E * fabsf(raw));
    float f = s * 0.0051058256067335606f - 0.028991956263780594f;
    f = f * s + 0.07738073915243149f;
    f = f * s - 0.13590599596500397f;
    f = f * s + 0.1907130926847458f;
    f = f * s - 0.2483394593000412f;
    f = f * s + 0.3331793546676636f;
    f = f * s - 0.4999943673610687f;
    f = f * s + 0.9999999403953552f;
    return fmaxf(raw, 0.f) + f * s;
}

// The derivative of softplus where softplus is `step`: 1 - exp(-step)
__device__ __forceinline__ float slope_at(float step) {
    float small = step * (1 - step * (0.5f - step * (1 / 6.f)));
    return step < 0.02f ? small : 1 - power2(-LOG2E * step);
}

// A number as it is stored: itself, or rounded to the inputs' type
template <typename V> __device__ __forceinline__ V stored(float v);
template <> __device__ __forceinline__ float stored<float>(float v) { return v; }
#ifndef T_FP32
template <> __device__ __forceinline__ real_t stored<real_t>(float v) {
    real_t f;
#ifdef T_BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(f) : "f"(v));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(f) : "f"(v));
#endif
    return f;
}
#endif

// Sums of COUNT values over the OVER lanes whose numbers differ in the bits from `bit` on. A lane ends up with COUNT / OVER of
// them, from place * COUNT / OVER on.
template <int COUNT, int OVER> __device__ __forceinline__ void sums(float (&v)[COUNT], int place, int bit) {
    if constexpr (OVER > 1 && COUNT > 1) {
        float half[COUNT / 2];
        bool upper = place & OVER / 2;
#pragma unroll
        for (int i = 0; i < COUNT / 2; i++) {
            float send = upper ? v[i] : v[i + COUNT / 2], keep = upper ? v[i + COUNT / 2] : v[i];
            half[i] = keep + __shfl_xor_sync(ALL, send, OVER / 2 * bit);
        }
        sums<COUNT / 2, OVER / 2>(half, place, bit);
#pragma unroll
        for (int i = 0; i < COUNT / 2; i++) v[i] = half[i];
    } else if constexpr (OVER > 1) {
        v[0] += __shfl_xor_sync(ALL, v[0], OVER / 2 * bit);
        sums<COUNT, OVER / 2>(v, place, bit);
    }
}
