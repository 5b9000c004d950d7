// A depthwise convolution of k x k taps over channels-last maps, then SiLU, forward and backward; the equation is in
// depthwise_silu_reference.py.
//
// A block takes 32 channels, the next block the 32 beside them; their taps lie in shared memory. A thread takes V
// neighbouring channels of a strip of P pixels in a row. Strips are numbered along rows, rows over the whole batch.
// The backward computes the convolution again, leaves the gradient of its result for `transposed`, and keeps the
// gradients of the taps in registers.
//
// Compile-time: T_BF16, T_FP16 or T_FP32 (the maps' type), K (odd), BIAS (0 or 1: whether there is one).

constexpr int THREADS = 256, WARPS = THREADS / 32, SLAB = 32, P = 4, HALO = K / 2, COLUMNS = P + K - 1, TAPS = K * K;

template <int V> struct alignas(sizeof(real_t) * V) Pack {
    real_t v[V];
};

__device__ __forceinline__ float sigmoid(float z) { return __fdividef(1.f, 1.f + power2(-LOG2E * z)); }

// Where a strip begins, and the map around it
struct Strip {
    long long row;  // of the batch
    int x, y, h, w;
    __device__ __forceinline__ Strip(long long strip, int h, int w) : h(h), w(w) {
        int per_row = (w + P - 1) / P;
        row = strip / per_row;
        x = (int)(strip - row * per_row) * P;
        y = (int)(row % h);
    }
    // The strip's row of the map and the halo around it, `below` rows further down; false where there is no such row.
    template <int V> __device__ __forceinline__ bool load(float (&to)[COLUMNS][V], const real_t* map, int pitch,
                                                          int below) const {
        if (y + below < 0 || y + below >= h) return false;
        const real_t* from = map + ((row + below) * w + x - HALO) * (long long)pitch;
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            bool there = x - HALO + j >= 0 && x - HALO + j < w;
            Pack<V> pack = {};
            if (there) pack = *(const Pack<V>*)(from + j * pitch);
#pragma unroll
            for (int v = 0; v < V; v++) to[j][v] = real(pack.v[v]);
        }
        return true;
    }
    template <int V> __device__ __forceinline__ void store(real_t* map, const float (&from)[P][V], int d) const {
#pragma unroll
        for (int p = 0; p < P; p++) {
            Pack<V> pack;
#pragma unroll
            for (int v = 0; v < V; v++) pack.v[v] = stored<real_t>(from[p][v]);
            if (x + p < w) *(Pack<V>*)(map + (row * w + x + p) * d) = pack;
        }
    }
};

// A block's taps from (d, TAPS) to shared memory, (TAPS, SLAB); zeros past the last channel
__device__ __forceinline__ void load_taps(float (*to)[SLAB], const float* weight, int c0, int d, bool flipped) {
    for (int i = threadIdx.x; i < TAPS * SLAB; i += THREADS) {
        int c = i / TAPS, tap = i % TAPS;
        to[flipped ? TAPS - 1 - tap : tap][c] = c0 + c < d ? weight[c0 * TAPS + i] : 0.f;
    }
    __syncthreads();
}

template <int V> __device__ __forceinline__ void convolve(float (&sum)[P][V], const Strip& strip, const real_t* map,
                                                          int pitch, const float (*taps)[SLAB]) {
#pragma unroll
    for (int i = 0; i < K; i++) {
        float row[COLUMNS][V];
        if (!strip.load(row, map, pitch, i - HALO)) continue;
#pragma unroll
        for (int tap = 0; tap < K; tap++)
#pragma unroll
            for (int v = 0; v < V; v++) {
                float w = taps[i * K + tap][v];
#pragma unroll
                for (int p = 0; p < P; p++) sum[p][v] += row[p + tap][v] * w;
            }
    }
}

template <bool FORWARD> __device__ __forceinline__ void convolved(const real_t* x, int pitch, const float* weight,
                                                                  const float* bias, real_t* y, long long strips, int h,
                                                                  int w, int d) {
    constexpr int V = 8, GROUPS = SLAB / V;
    __shared__ __align__(16) float taps[TAPS][SLAB];
    int slabs = (d + SLAB - 1) / SLAB, c0 = blockIdx.x % slabs * SLAB, part = threadIdx.x % GROUPS * V, c = c0 + part;
    load_taps(taps, weight, c0, d, !FORWARD);
    long long at = blockIdx.x / slabs * (long long)(THREADS / GROUPS) + threadIdx.x / GROUPS;
    if (at >= strips || c >= d) return;
    Strip strip(at, h, w);
    float sum[P][V];
#pragma unroll
    for (int i = 0; i < P * V; i++) sum[i / V][i % V] = FORWARD && BIAS ? bias[c + i % V] : 0.f;
    convolve(sum, strip, x + c, pitch, (const float(*)[SLAB])(taps[0] + part));
#pragma unroll
    for (int i = 0; i < P * V; i++)
        if (FORWARD) sum[i / V][i % V] *= sigmoid(sum[i / V][i % V]);
    strip.store(y + c, sum, d);
}

// y (b, h, w, d) from x, whose pixels lie `pitch` numbers apart
extern "C" __global__ void __launch_bounds__(THREADS)
forward(const real_t* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
        real_t* __restrict__ y, int strips, int h, int w, int d, int pitch) {
    convolved<true>(x, pitch, weight, bias, y, strips, h, w, d);
}

// dx (b, h, w, d) from dz
extern "C" __global__ void __launch_bounds__(THREADS)
transposed(const real_t* __restrict__ dz, const float* __restrict__ weight, real_t* __restrict__ dx, int strips, int h,
           int w, int d) {
    convolved<false>(dz, d, weight, nullptr, dx, strips, h, w, d);
}

// dz (b, h, w, d), the gradient of the convolution's result; sums (blocks, d TAPS + d), each block's share of the
// gradients of weight and bias
extern "C" __global__ void __launch_bounds__(THREADS, 2)
backward(const real_t* __restrict__ dy, const real_t* __restrict__ x, const float* __restrict__ weight,
         const float* __restrict__ bias, real_t* __restrict__ dz, float* __restrict__ sums, int strips, int h, int w,
         int d, int pitch) {
    constexpr int V = 2, GROUPS = SLAB / V;
    __shared__ __align__(16) float taps[TAPS][SLAB];
    __shared__ float parts[WARPS][SLAB];
    int slabs = (d + SLAB - 1) / SLAB, c0 = blockIdx.x % slabs * SLAB, part = threadIdx.x % GROUPS * V, c = c0 + part;
    int block = blockIdx.x / slabs, step = gridDim.x / slabs * (THREADS / GROUPS);
    load_taps(taps, weight, c0, d, false);
    float sum[TAPS + 1][V] = {};
    for (long long at = block * (THREADS / GROUPS) + threadIdx.x / GROUPS; c < d && at < strips; at += step) {
        Strip strip(at, h, w);
        float g[P][V], row[COLUMNS][V];
#pragma unroll
        for (int i = 0; i < P * V; i++) g[i / V][i % V] = BIAS ? bias[c + i % V] : 0.f;
        convolve(g, strip, x + c, pitch, (const float(*)[SLAB])(taps[0] + part));
#pragma unroll
        for (int p = 0; p < P; p++) {
            Pack<V> pack;
            bool there = strip.x + p < w;
            if (there) pack = *(const Pack<V>*)(dy + (strip.row * w + strip.x + p) * d + c);
#pragma unroll
            for (int v = 0; v < V; v++) {
                float z = g[p][v], s = sigmoid(z);
                g[p][v] = there ? real(pack.v[v]) * s * (1.f + z * (1.f - s)) : 0.f;
                sum[TAPS][v] += g[p][v];
            }
        }
        strip.store(dz + c, g, d);
#pragma unroll
        for (int i = 0; i < K; i++) {
            if (!strip.load(row, x + c, pitch, i - HALO)) continue;
#pragma unroll
            for (int j = 0; j < K * P * V; j++) {
                int tap = j / (P * V), p = j / V % P, v = j % V;
                sum[i * K + tap][v] += row[p + tap][v] * g[p][v];
            }
        }
    }
    sums += block * (long long)d * (TAPS + 1);
#pragma unroll
    for (int tap = 0; tap <= TAPS; tap++) {
#pragma unroll
        for (int v = 0; v < V; v++) {
            float total = sum[tap][v];
#pragma unroll
            for (int lanes = GROUPS; lanes < 32; lanes *= 2) total += __shfl_xor_sync(ALL, total, lanes);
            if (threadIdx.x % 32 < GROUPS) parts[threadIdx.x / 32][part + v] = total;
        }
        __syncthreads();
        int own = c0 + threadIdx.x;
        if (threadIdx.x < SLAB && own < d) {
            float total = 0;
            for (int i = 0; i < WARPS; i++) total += parts[i][threadIdx.x];
            sums[tap < TAPS ? own * TAPS + tap : d * TAPS + own] = total;
        }
        __syncthreads();
    }
}
