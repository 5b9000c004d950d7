// Fused 2D selective scan of few long sequences, which are cut into segments: what each segment makes of nothing, and the sum of
// its step sizes. A step multiplies by exp(delta A), so a segment by exp(A sum delta): the kernels of the scan start theirs from
// what the segments before it leave (scan2d_segment.cu). The equation is in scan2d_reference.py.
//
// A block finds the end of one segment for 32 channels and up to 16 states: a warp takes an eighth of its steps, 8 at a time, and
// a lane one channel. What the next 8 steps need is loaded while these are taken. Delta is projected by the tensor cores (tf32).
//
// Compile-time: T_BF16 or T_FP16 (the inputs' type), N states, R ranks, LOG_A, WHOLE (a route visits every pixel).

#include "scan2d_common.cu"
#include "scan2d_warp.cu"

constexpr int EACH = N < 16 ? N : 16;           // states of a block
constexpr int MAPS = (STEPS * EACH + 31) / 32;  // numbers of B or C that a lane loads
constexpr int BLOCKS = EACH > 4 ? 2 : 4;        // per multiprocessor, which bounds registers

struct Shared {
    float4 weight[KS][2][32];         // dt_proj as the tensor cores take it
    float raw[WARPS][STEPS * RAW];    // projected delta: step, channel
    float maps[WARPS][STEPS * EACH];  // B or C of each step
    float end[WARPS][EACH][32];       // of a warp's steps
    float steps[WARPS][32];
};

struct Loaded {  // what a warp loads of 8 steps
    u16 factor[2 * KS], maps[MAPS];
    float value[STEPS];  // x or dy, at a lane's channel
};

__device__ __forceinline__ float value_of(const u16* x, unsigned at) { return real(fetch(x, at * 2)); }
__device__ __forceinline__ float value_of(const float* dy, unsigned at) { return fetch(dy, at * 4); }

// FORWARD: of the state, from the inputs x, B. Else of its adjoint, from dy and C, where a segment begins at its last step.
template <bool FORWARD, typename V>
__device__ __forceinline__ void scan(const V* values, const u16* projected, const float* dt_proj, const float* A,
                                     const float* bias, const int* routes, float* end_states, float* end_steps, int p, int k,
                                     int length, int d, int per, int ends, int rows) {
    __shared__ Shared m;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, blocks = (d + 31) / 32;
    int c0 = blockIdx.x % blocks * 32, c = min(c0 + lane, d - 1), ki = blockIdx.y % k, end = blockIdx.y / k % ends;
    int n0 = blockIdx.y / k / ends * EACH, kw = k * WIDTH, segment = FORWARD ? end : end + 1;
    long long bi = blockIdx.x / blocks;
    bool in_c = c0 + lane < d;
    values += bi * p * d + c;
    projected += bi * p * kw + ki * WIDTH;
    A += (ki * d + c) * N + n0;

    int each = per / WARPS, first = segment * per + warp * each, stop = min(length, first + each);
    int tiles = max(0, stop - first + STEPS - 1) / STEPS;
    const int* route = routes + (long long)ki * length;
    auto pixel_at = [&](int tile) {  // lane j holds that of step j % 8
        return tile < tiles ? pixel_of(route, first + (FORWARD ? tile : tiles - 1 - tile) * STEPS + lane % STEPS, stop, p) : p;
    };
    auto load = [&](Loaded& to, int pixel) {  // where there is no pixel, what the last one has
        pixel = min(pixel, p - 1);
        unsigned row = pixel * kw * 2, of_value = pixel * d;
        load_factors(to.factor, projected, row);
#pragma unroll
        for (int i = 0; i < MAPS; i++) {
            int v = i * 32 + lane, n = min(n0 + v % EACH, N - 1);
            to.maps[i] = fetch(projected, __shfl_sync(ALL, row, v / EACH % STEPS) + (R + (FORWARD ? 0 : N) + n) * 2);
        }
#pragma unroll
        for (int j = 0; j < STEPS; j++) to.value[j] = value_of(values, __shfl_sync(ALL, of_value, j));
    };
    Loaded next;
    int pixel = pixel_at(0), ahead = pixel_at(1);
    load(next, pixel);
    load_weights(m.weight, dt_proj + (long long)ki * d * R, c0, d);
    float h[EACH] = {}, rate[EACH], total = 0, shift = bias[ki * d + c];
#pragma unroll
    for (int n = 0; n < EACH; n++) rate[n] = n0 + n < N ? decay(A[n]) * LOG2E : 0.f;
    __syncthreads();

#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
        int at = first + (FORWARD ? tile : tiles - 1 - tile) * STEPS;
        unsigned there = __ballot_sync(ALL, pixel < p);
        float value[STEPS], step[STEPS];
        Projection projection(m.weight, next.factor);
#pragma unroll
        for (int i = 0; i < MAPS; i++)
            if (i * 32 + lane < STEPS * EACH) m.maps[warp][i * 32 + lane] = real(next.maps[i]);
        projection.store(m.raw[warp]);
        memcpy(value, next.value, sizeof value);
        pixel = ahead;
        load(next, pixel);
        ahead = pixel_at(tile + 2);
        __syncwarp();
#pragma unroll
        for (int j = 0; j < STEPS; j++) {
            bool past = at + j >= stop, here = WHOLE || there >> j & 1;
            step[j] = softplus(past ? -1e30f : (here ? m.raw[warp][j * RAW + lane] : 0.f) + shift);  // no step past the end
            total += step[j];
            value[j] = past || !here ? 0.f : FORWARD ? value[j] * step[j] : value[j];
        }
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            int j = FORWARD ? i : STEPS - 1 - i;
#pragma unroll
            for (int n = 0; n < EACH; n++) {
                float a = power2(step[j] * rate[n]), gain = value[j] * m.maps[warp][j * EACH + n];
                h[n] = FORWARD ? a * h[n] + gain : a * (h[n] + gain);
            }
        }
        __syncwarp();
    }
#pragma unroll
    for (int n = 0; n < EACH; n++) m.end[warp][n][lane] = h[n];
    m.steps[warp][lane] = total;
    __syncthreads();
    long long to = ((end * (long long)rows + bi) * k + ki) * d + c;
    for (int n = warp; n < EACH; n += WARPS) {
        float v = 0, sum = 0, by = n0 + n < N ? decay(A[n]) * LOG2E : 0.f;
#pragma unroll
        for (int i = 0; i < WARPS; i++) {
            int w = FORWARD ? i : WARPS - 1 - i;
            v = power2(m.steps[w][lane] * by) * v + m.end[w][n][lane];
            sum += m.steps[w][lane];
        }
        if (in_c && n0 + n < N) end_states[to * N + n0 + n] = v;
        if (in_c && n0 + n == 0) end_steps[to] = sum;
    }
}

#define ARGUMENTS                                                                                                         \
    const u16 *__restrict__ projected, const float *__restrict__ dt_proj, const float *__restrict__ A,                    \
        const float *__restrict__ bias, const int *__restrict__ routes, float *__restrict__ end_states,                   \
        float *__restrict__ end_steps, int p, int k, int length, int d, int per, int ends, int rows
#define PASSED projected, dt_proj, A, bias, routes, end_states, end_steps, p, k, length, d, per, ends, rows

extern "C" __global__ void __launch_bounds__(256, BLOCKS) ends(const u16* __restrict__ x, ARGUMENTS) { scan<true>(x, PASSED); }
extern "C" __global__ void __launch_bounds__(256, BLOCKS) backs(const float* __restrict__ dy, ARGUMENTS) {
    scan<false>(dy, PASSED);
}
