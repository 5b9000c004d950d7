// Causal convolution along routes, and SiLU; the equation and its letters are in route_conv.py.
//
// A thread has VECTOR neighbouring channels of a route and walks STEPS of its steps, a window of TAPS rows in
// registers: a row is read once, 16 bytes at a time where channels allow it, AHEAD rows before they are needed.
//
// Compile-time: T_BF16, T_FP16 or T_FP32 (x and u), TAPS, VECTOR, STEPS (a multiple of AHEAD).

constexpr int AHEAD = 4, BEFORE = TAPS - 1;

// VECTOR numbers as they lie in memory, in words of 32 bits where they fill them
constexpr int BYTES = VECTOR * sizeof(real_t), PER_WORD = BYTES < 4 ? 1 : 4 / sizeof(real_t);
struct __align__(BYTES) Row {
#if VECTOR == 1 && !defined(T_FP32)
    unsigned short word[1];
#else
    unsigned word[BYTES / 4];
#endif
};
struct __align__(VECTOR < 4 ? VECTOR * 4 : 16) Floats { float at[VECTOR]; };

// Row numbers of AHEAD steps from `begin`; steps outside the route read row `pixels`, which stands for zeros
template <int COUNT>
__device__ __forceinline__ void look(const int* route, int begin, int length, int pixels, int (&rows)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        rows[i] = begin + i >= 0 && begin + i < length ? __ldg(route + begin + i) : pixels;
}

template <int COUNT>
__device__ __forceinline__ void fetch(
    const real_t* x, long long stride, int pixels, const int (&rows)[COUNT], Row (&to)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        to[i] = rows[i] < pixels ? *reinterpret_cast<const Row*>(x + rows[i] * stride) : Row{};
}

__device__ __forceinline__ void spread(const Row& row, float (&to)[VECTOR]) {
#pragma unroll
    for (int c = 0; c < VECTOR; c++) {
#ifdef T_FP32
        to[c] = __uint_as_float(row.word[c]);
#else
        to[c] = real((unsigned short)(row.word[c / PER_WORD] >> c % PER_WORD * 16));
#endif
    }
}

__device__ __forceinline__ Row packed(const float (&from)[VECTOR]) {
    Row row = {};
#pragma unroll
    for (int c = 0; c < VECTOR; c++) {
#ifdef T_FP32
        row.word[c] = __float_as_uint(from[c]);
#else
        row.word[c / PER_WORD] |= stored<real_t>(from[c]) << c % PER_WORD * 16;
#endif
    }
    return row;
}

// x (b, p, d) with `stride` from pixel to pixel; weight (k, TAPS, d); bias (k, d); u (b, k, l, d)
extern "C" __global__ void __launch_bounds__(128, 4) forward(
    const real_t* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
    const int* __restrict__ routes, real_t* __restrict__ u,
    int batch, int count, int length, int pixels, int channels, int stride) {
    unsigned lanes = channels / VECTOR, tiles = (length + STEPS - 1) / STEPS;
    unsigned g = blockIdx.x * blockDim.x + threadIdx.x;
    int c = g % lanes * VECTOR;
    g /= lanes;
    int begin = g % tiles * STEPS;
    g /= tiles;
    int k = g % count, b = g / count;
    if (b >= batch) return;
    x += (long long)b * pixels * stride + c;
    u += (((long long)b * count + k) * length + begin) * channels + c;
    const int* route = routes + (long long)k * length;
    Floats w[TAPS], offset = *reinterpret_cast<const Floats*>(bias + k * channels + c);
#pragma unroll
    for (int j = 0; j < TAPS; j++) w[j] = *reinterpret_cast<const Floats*>(weight + (k * TAPS + j) * channels + c);

    float window[BEFORE + AHEAD][VECTOR];
    int old[BEFORE > 0 ? BEFORE : 1], rows[AHEAD];
    Row past[BEFORE > 0 ? BEFORE : 1], next[AHEAD];
    look(route, begin - BEFORE, length, pixels, old);
    look(route, begin, length, pixels, rows);
    fetch(x, stride, pixels, old, past);
    fetch(x, stride, pixels, rows, next);
    look(route, begin + AHEAD, length, pixels, rows);
#pragma unroll
    for (int j = 0; j < BEFORE; j++) spread(past[j], window[j]);
#pragma unroll 1
    for (int s = 0; s < STEPS; s += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) spread(next[i], window[BEFORE + i]);
        if (s + AHEAD < STEPS) fetch(x, stride, pixels, rows, next);
        if (s + 2 * AHEAD < STEPS) look(route, begin + s + 2 * AHEAD, length, pixels, rows);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            float result[VECTOR];
#pragma unroll
            for (int v = 0; v < VECTOR; v++) {
                float total = offset.at[v];
#pragma unroll
                for (int j = 0; j < TAPS; j++) total += w[j].at[v] * window[i + j][v];
                result[v] = __fdividef(total, 1 + power2(-LOG2E * total));
            }
            if (begin + s + i < length) *reinterpret_cast<Row*>(u + (long long)(s + i) * channels) = packed(result);
        }
#pragma unroll
        for (int j = 0; j < BEFORE; j++)
#pragma unroll
            for (int v = 0; v < VECTOR; v++) window[j][v] = window[AHEAD + j][v];
    }
}
