// A residual stream and its layer normalisation, forward and backward, for rows of c channels:
//
// stream = x + factor[sample] branch,  y = (stream - mean) / sqrt(var + eps) weight + bias
//
// LANES lanes hold a row in registers, each PER packs of PACK neighbouring channels: one pass over memory does. The
// backward has the next row on its way, and computes mean and variance again; its sums over rows stay in registers, are
// left for each block, and `finish` adds them up.
//
// Compile-time: IN (type of x, the stream and its gradient), ADDED (of the branch), OUT (of y), WEIGHT: float, bf16 or
// fp16; ADD (there is a branch), FACTOR (and a factor), DEEP (the stream has a gradient); LANES, PER, PACK; T_FP32.

#include "half_types.cu"

constexpr int THREADS = 256, TEAMS = THREADS / LANES, WARPS = (LANES + 31) / 32;

template <typename T> struct alignas(sizeof(T) * PACK) Pack {
    T v[PACK];
};
typedef float Row[PER][PACK];

// The first channel of a lane's pack i
__device__ __forceinline__ int channel(int i) { return (i * LANES + threadIdx.x % LANES) * PACK; }

// A row as it lies in memory; zeros where there is no row or channel
template <typename T> __device__ __forceinline__ void fetch(Pack<T> (&to)[PER], const T* from, int c, bool there) {
#pragma unroll
    for (int i = 0; i < PER; i++) {
        to[i] = {};
        if (there && channel(i) < c) to[i] = *(const Pack<T>*)(from + channel(i));
    }
}

template <typename T> __device__ __forceinline__ void widen(Row& to, const Pack<T> (&from)[PER]) {
#pragma unroll
    for (int i = 0; i < PER * PACK; i++) to[i / PACK][i % PACK] = real(from[i / PACK].v[i % PACK]);
}

template <typename T> __device__ __forceinline__ void load(Row& to, const T* from, int c, bool there) {
    Pack<T> packs[PER];
    fetch(packs, from, c, there);
    widen(to, packs);
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

// row - mean in place; returns this lane's sum of squares.
__device__ __forceinline__ float centre(Row& row, int c) {
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
    return squares;
}

// x, branch, stream, y (rows, c); factor (samples), a sample has `each` rows
extern "C" __global__ void __launch_bounds__(THREADS)
forward(const IN* __restrict__ x, const ADDED* __restrict__ branch, const ADDED* __restrict__ factor,
        const WEIGHT* __restrict__ weight, const WEIGHT* __restrict__ bias, IN* __restrict__ stream,
        OUT* __restrict__ y, int rows, int c, int each, float eps) {
    long long at = blockIdx.x * (long long)TEAMS + threadIdx.x / LANES;
    Row a, w, b;
    Pack<ADDED> added[PER];
    load(a, x + at * c, c, at < rows);
    if (ADD) fetch(added, branch + at * c, c, at < rows);
    load(w, weight, c, true);
    load(b, bias, c, true);
    if (ADD) {
        float kept = FACTOR && at < rows ? real(factor[int(at) / each]) : 1.f;
#pragma unroll
        for (int i = 0; i < PER * PACK; i++) {
            float &a_i = a[i / PACK][i % PACK], h = real(added[i / PACK].v[i % PACK]);
            a_i = real(stored<IN>(FACTOR ? fmaf(h, kept, a_i) : a_i + h));
        }
        if (at < rows) store(stream + at * c, a, c);
    }
    float scale = rsqrtf(total(centre(a, c)) / c + eps);
#pragma unroll
    for (int i = 0; i < PER * PACK; i++) {
        float& a_i = a[i / PACK][i % PACK];
        a_i = a_i * scale * w[i / PACK][i % PACK] + b[i / PACK][i % PACK];
    }
    if (at < rows) store(y + at * c, a, c);
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

struct Held {
    Pack<IN> x[PER];
    Pack<OUT> g[PER];
};

// sums (blocks, 2, c): those of the gradients of weight and bias over each block's rows; dstream: the stream's gradient
extern "C" __global__ void __launch_bounds__(THREADS, PER * PACK > 12 ? 1 : 2)
backward(const OUT* __restrict__ dy, const IN* __restrict__ dstream, const IN* __restrict__ stream,
         const ADDED* __restrict__ factor, const WEIGHT* __restrict__ weight, IN* __restrict__ dx,
         ADDED* __restrict__ dbranch, float* __restrict__ sums, int rows, int c, int each, float eps) {
    Row sum_w = {}, sum_b = {}, w;
    Held now, next;
    long long at = blockIdx.x * (long long)TEAMS + threadIdx.x / LANES, step = gridDim.x * (long long)TEAMS;
    auto fetch_all = [&](Held& to, long long row) {
        fetch(to.x, stream + row * c, c, row < rows);
        fetch(to.g, dy + row * c, c, row < rows);
    };
    load(w, weight, c, true);
    fetch_all(now, at);
    for (long long start = blockIdx.x * (long long)TEAMS; start < rows; start += step, at += step) {
        Pack<IN> deep[PER];
        if (DEEP) fetch(deep, dstream + at * c, c, at < rows);
        if (PER * PACK <= 12) fetch_all(next, at + step);
        Row a, g;
        widen(a, now.x);
        widen(g, now.g);
        float squares = centre(a, c), mean = 0, along = 0;
#pragma unroll
        for (int i = 0; i < PER * PACK; i++) {
            float g_i = g[i / PACK][i % PACK] * w[i / PACK][i % PACK];
            mean += g_i;
            along += g_i * a[i / PACK][i % PACK];
        }
        float scale = rsqrtf(total(squares) / c + eps);
        mean = total(mean) / c;
        along = total(along) * scale / c;
#pragma unroll
        for (int i = 0; i < PER * PACK; i++) {
            float &a_i = a[i / PACK][i % PACK], g_i = g[i / PACK][i % PACK];
            a_i *= scale;
            sum_b[i / PACK][i % PACK] += g_i;
            sum_w[i / PACK][i % PACK] += g_i * a_i;
            a_i = (g_i * w[i / PACK][i % PACK] - mean - a_i * along) * scale;
            if (DEEP) a_i += real(deep[i / PACK].v[i % PACK]);
        }
        if (at < rows) {
            store(dx + at * c, a, c);
            if (ADD) {
                float kept = FACTOR ? real(factor[int(at) / each]) : 1.f;
#pragma unroll
                for (int i = 0; i < PER * PACK; i++) a[i / PACK][i % PACK] *= kept;
                store(dbranch + at * c, a, c);
            }
        }
        if (PER * PACK <= 12) now = next;
        else fetch_all(now, at + step);
    }
    leave(sums + blockIdx.x * 2ll * c, sum_w, c);
    leave(sums + (blockIdx.x * 2ll + 1) * c, sum_b, c);
}

// sums (blocks, columns) -> (columns), in a fixed order; 32 columns of a block, an eighth of the rows of a warp
extern "C" __global__ void __launch_bounds__(THREADS)
finish(const float* __restrict__ sums, float* __restrict__ to, int blocks, int columns) {
    __shared__ float parts[THREADS / 32][32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = blockIdx.x * 32 + lane;
    float sum = 0;
    if (column < columns)
#pragma unroll 8
        for (int row = warp; row < blocks; row += THREADS / 32) sum += sums[row * (long long)columns + column];
    parts[warp][lane] = sum;
    __syncthreads();
    if (warp || column >= columns) return;
#pragma unroll
    for (int w = 1; w < THREADS / 32; w++) sum += parts[w][lane];
    to[column] = sum;
}
