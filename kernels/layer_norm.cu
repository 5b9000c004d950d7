// Layer normalisation, forward and backward: y = (x - mean) / sqrt(var + eps) weight + bias for each row of c channels.
//
// LANES lanes hold ROWS rows at a time in registers (the backward one), each PER packs of PACK neighbouring channels of
// a row: one pass over memory does. The backward computes mean and variance again; sums over rows stay in registers.
//
// Compile-time: IN, OUT, WEIGHT (float, bf16 or fp16), LANES, ROWS, PER, PACK; T_FP32.

struct bf16 {
    unsigned short bits;
};
struct fp16 {
    unsigned short bits;
};

__device__ __forceinline__ float real(bf16 v) { return __uint_as_float(unsigned(v.bits) << 16); }
__device__ __forceinline__ float real(fp16 v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
    return f;
}
template <> __device__ __forceinline__ bf16 stored<bf16>(float v) {
    bf16 f;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(f.bits) : "f"(v));
    return f;
}
template <> __device__ __forceinline__ fp16 stored<fp16>(float v) {
    fp16 f;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(f.bits) : "f"(v));
    return f;
}

constexpr int THREADS = 256, TEAMS = THREADS / LANES, WARPS = (LANES + 31) / 32;
constexpr unsigned ALL = 0xffffffffu;

template <typename T> struct alignas(sizeof(T) * PACK) Pack {
    T v[PACK];
};
typedef float Row[PER][PACK];

// The first channel of a lane's pack i
__device__ __forceinline__ int channel(int i) { return (i * LANES + threadIdx.x % LANES) * PACK; }

// Zeros where there is no row or channel
template <typename T> __device__ __forceinline__ void load(Row& to, const T* from, int c, bool there) {
#pragma unroll
    for (int i = 0; i < PER; i++) {
        Pack<T> pack;
        bool in = there && channel(i) < c;
        if (in) pack = *(const Pack<T>*)(from + channel(i));
#pragma unroll
        for (int v = 0; v < PACK; v++) to[i][v] = in ? real(pack.v[v]) : 0.f;
    }
}

template <typename T> __device__ __forceinline__ void store(T* to, const Row& from, int c) {
#pragma unroll
    for (int i = 0; i < PER; i++) {
        Pack<T> pack;
#pragma unroll
        for (int v = 0; v < PACK; v++) pack.v[v] = stored<T>(from[i][v]);
        if (channel(i) < c) *(Pack<T>*)(to + channel(i)) = pack;
    }
}

// The sum over the lanes that share a row; with several warps, every thread of the block must come here.
__device__ __forceinline__ float total(float v) {
#pragma unroll
    for (int step = (LANES < 32 ? LANES : 32) / 2; step; step /= 2) v += __shfl_xor_sync(ALL, v, step);
    if (WARPS == 1) return v;
    __shared__ float parts[THREADS / 32];
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) v += parts[threadIdx.x / LANES * WARPS + w];
    return v;
}

// (row - mean) / std in place; returns 1 / std.
__device__ __forceinline__ float normalise(Row& row, int c, float eps) {
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < PER * PACK; i++) sum += row[i / PACK][i % PACK];
    float mean = total(sum) / c;
#pragma unroll
    for (int i = 0; i < PER * PACK; i++) {
        float centred = channel(i / PACK) < c ? row[i / PACK][i % PACK] - mean : 0.f;
        row[i / PACK][i % PACK] = centred;
        squares += centred * centred;
    }
    float scale = rsqrtf(total(squares) / c + eps);
#pragma unroll
    for (int i = 0; i < PER * PACK; i++) row[i / PACK][i % PACK] *= scale;
    return scale;
}

extern "C" __global__ void __launch_bounds__(THREADS)
forward(const IN* __restrict__ x, const WEIGHT* __restrict__ weight, const WEIGHT* __restrict__ bias,
        OUT* __restrict__ y, int rows, int c, float eps) {
    long long first = (blockIdx.x * (long long)TEAMS + threadIdx.x / LANES) * ROWS;
    Row a[ROWS], w, b;
#pragma unroll
    for (int r = 0; r < ROWS; r++) load(a[r], x + (first + r) * c, c, first + r < rows);
    load(w, weight, c, true);
    load(b, bias, c, true);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        normalise(a[r], c, eps);
#pragma unroll
        for (int i = 0; i < PER * PACK; i++) {
            float& a_i = a[r][i / PACK][i % PACK];
            a_i = a_i * w[i / PACK][i % PACK] + b[i / PACK][i % PACK];
        }
        if (first + r < rows) store(y + (first + r) * c, a[r], c);
    }
}

// The sum over teams of what each lane holds, to one row of c channels
__device__ __forceinline__ void leave(float* to, const Row& from, int c) {
    __shared__ float parts[TEAMS][PER * LANES * PACK];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PER * PACK; i++)
        parts[threadIdx.x / LANES][channel(i / PACK) + i % PACK] = from[i / PACK][i % PACK];
    __syncthreads();
    for (int j = threadIdx.x; j < c; j += THREADS) {
        float sum = 0;
#pragma unroll
        for (int t = 0; t < TEAMS; t++) sum += parts[t][j];
        to[j] = sum;
    }
}

// dweight and dbias (blocks, c): the sums over each block's rows
extern "C" __global__ void __launch_bounds__(THREADS, PER * PACK > 16 ? 1 : 2)
backward(const OUT* __restrict__ dy, const IN* __restrict__ x, const WEIGHT* __restrict__ weight,
         IN* __restrict__ dx, float* __restrict__ dweight, float* __restrict__ dbias, int rows, int c, float eps) {
    Row sum_w = {}, sum_b = {};
    for (long long start = blockIdx.x * (long long)TEAMS; start < rows; start += gridDim.x * (long long)TEAMS) {
        long long at = start + threadIdx.x / LANES;
        Row a, g, w;
        load(a, x + at * c, c, at < rows);
        load(g, dy + at * c, c, at < rows);
        load(w, weight, c, true);
        float scale = normalise(a, c, eps), mean = 0, along = 0;
#pragma unroll
        for (int i = 0; i < PER * PACK; i++) {
            float &g_i = g[i / PACK][i % PACK], a_i = a[i / PACK][i % PACK];
            sum_b[i / PACK][i % PACK] += g_i;
            sum_w[i / PACK][i % PACK] += g_i * a_i;
            g_i *= w[i / PACK][i % PACK];
            mean += g_i;
            along += g_i * a_i;
        }
        mean = total(mean) / c;
        along = total(along) / c;
#pragma unroll
        for (int i = 0; i < PER * PACK; i++) {
            float& a_i = a[i / PACK][i % PACK];
            a_i = (g[i / PACK][i % PACK] - mean - a_i * along) * scale;
        }
        if (at < rows) store(dx + at * c, a, c);
    }
    leave(dweight + blockIdx.x * (long long)c, sum_w, c);
    leave(dbias + blockIdx.x * (long long)c, sum_b, c);
}
