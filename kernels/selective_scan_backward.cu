// Selective scan, backward, for many sequences: lanes share states. The equation and its letters are in
// selective_scan_reference.py.
//
// As in the forward (selective_scan.cu), LANES lanes of a warp share a channel, each with S of its states in registers, and a
// block works on CHANNELS channels of a route, a tile of 64 steps at a time, from the last to the first. It starts each from
// the state that the forward kept, and recomputes it inside. Sums over states (the gradients of u and delta) and over channels
// (those of B and C) are taken for several steps at once, so that each exchange between lanes halves the number of values.
// Nothing is atomic.
//
// Compile-time: T_BF16, T_FP16 or T_FP32 (u, delta, B, C and z), N states, S states of a lane, WIDE channels that are read at
// once, THREADS of a block, HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS, BYTES of shared memory.

#include "selective_scan_common.cu"

constexpr int LANES = lanes_of(N), STATES = LANES * S;          // the states past N are zeros
constexpr int PLACES = 32 / LANES, CHANNELS = THREADS / LANES;  // channels of a warp, and of a block
constexpr int WARPS = THREADS / 32, ACROSS = CHANNELS / WIDE, DOWN = THREADS / ACROSS;
constexpr int SUB = 8;  // steps that are in registers at once

__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Where a state's B (and, with S added, its C) stands among the 2 * STATES numbers of a step: by lane
__device__ __forceinline__ int place_of(int n) { return n / S * 2 * S + n % S; }

template <int V, int P>
__device__ __forceinline__ int first_of(int place) {
    return V >= P ? place * (V / P) : place / (P / V);
}

constexpr int PARTS = CHUNK / SUB;  // of a tile of CHUNK steps
constexpr int VALUES = 2 * S;       // B's and C's gradients of a lane in a step
constexpr int LEFT = VALUES > PLACES ? VALUES / PLACES : 1;
constexpr int EACH = SUB > LANES ? SUB / LANES : 1;  // steps whose gradients of u and delta a lane ends up with,
constexpr int TWINS = LANES > SUB ? LANES / SUB : 1;  // and lanes that end up with the same

struct Backward {  // shared memory
    float step[CHUNK][CHANNELS], u[CHUNK][CHANNELS], dy[CHUNK][CHANNELS];  // the first two become their gradients
    alignas(16) float maps[CHUNK][2 * STATES];  // B and C
    float before[PARTS][S][THREADS];           // states before each part
    float d_maps[2][WARPS][SUB][2 * STATES];   // their gradients from a warp's channels
#if HAS_Z
    float y[CHUNK][CHANNELS];  // before the gate
#endif
};

static_assert(sizeof(Backward) == BYTES, "the launch reserves as much");

extern "C" __global__ void __launch_bounds__(THREADS, THREADS <= 128 ? 3 : 1)
backward(const float* __restrict__ dy, const float* __restrict__ states, const real_t* __restrict__ u,
         const real_t* __restrict__ delta, const float* __restrict__ A, const real_t* __restrict__ B,
         const real_t* __restrict__ C, const float* __restrict__ D, const real_t* __restrict__ z,
         const float* __restrict__ bias, real_t* __restrict__ du, real_t* __restrict__ ddelta, real_t* __restrict__ dz,
         float* __restrict__ dA, float* __restrict__ dmaps, float* __restrict__ dD, float* __restrict__ dbias, int k,
         int length, int d, int Bb, int Bk, int Bl, int Bn, int Cb, int Ck, int Cl, int Cn) {
    extern __shared__ float4 memory[];
    Backward& m = *(Backward*)memory;
    int blocks = (d + CHANNELS - 1) / CHANNELS, block = blockIdx.x % blocks, c0 = block * CHANNELS;
    int row = blockIdx.x / blocks, ki = row % k, rows = gridDim.x / blocks, tiles = (length + CHUNK - 1) / CHUNK;
    long long bi = row / k;
    int channel = threadIdx.x / LANES, lane = threadIdx.x % LANES, c = min(c0 + channel, d - 1);
    int warp = threadIdx.x / 32, place = threadIdx.x % 32 / LANES;
    bool in_c = c0 + channel < d;
    float rate[S], carry[S], sum_A[S], skip = HAS_D ? D[ki * d + c] : 0.f, sum_D = 0, sum_bias = 0;
#pragma unroll
    for (int s = 0; s < S; s++) {
        int n = lane * S + s;
        carry[s] = sum_A[s] = 0, rate[s] = n < N ? A[(ki * d + c) * N + n] * LOG2E : 0.f;
    }
    int across = threadIdx.x % ACROSS, down = threadIdx.x / ACROSS, cw = min(c0 + across * WIDE, d - WIDE);
    bool in_cw = c0 + across * WIDE < d;
    long long origin = (long long)row * length * d + cw;
    u += origin, delta += origin, dy += origin, du += origin, ddelta += origin;
    if (HAS_Z) z += origin, dz += origin;
    B += bi * Bb + (long long)ki * Bk, C += bi * Cb + (long long)ki * Ck;
    dmaps += ((long long)block * rows + row) * length * 2 * N;
    float shift[WIDE];
#pragma unroll
    for (int w = 0; w < WIDE; w++) shift[w] = HAS_BIAS ? bias[ki * d + cw + w] : 0.f;
    int turn = 0;
#pragma unroll 1
    for (int tile = tiles - 1; tile >= 0; tile--) {
        int start = tile * CHUNK, size = min(CHUNK, length - start), parts = (size + SUB - 1) / SUB;
#pragma unroll 4
        for (int j = down; j < CHUNK; j += DOWN) {
            bool there = j < size && in_cw;
            long long t = (long long)(start + min(j, size - 1)) * d;
            Row u_t = *(const Row*)(u + t), delta_t = *(const Row*)(delta + t), z_t = {};
            Floats dy_t = *(const Floats*)(dy + t);
            if (HAS_Z) z_t = *(const Row*)(z + t);
#pragma unroll
            for (int w = 0; w < WIDE; w++) {
                float step = step_of(delta_t.at(w) + shift[w]), g = dy_t.v[w];
                if (HAS_Z) g *= silu(z_t.at(w));
                m.step[j][across * WIDE + w] = there ? step : 0.f;
                m.u[j][across * WIDE + w] = there ? u_t.at(w) : 0.f;
                m.dy[j][across * WIDE + w] = there ? g : 0.f;
            }
        }
#pragma unroll 4
        for (int v = threadIdx.x; v < CHUNK * STATES; v += THREADS) {
            int n = v % STATES;
            long long t = start + min(v / STATES, size - 1), n_t = min(n, N - 1);
            float* to = &m.maps[v / STATES][place_of(n)];
            to[0] = n < N ? real(B[t * Bl + n_t * Bn]) : 0.f;
            to[S] = n < N ? real(C[t * Cl + n_t * Cn]) : 0.f;
        }
        if (tile > 0) {  // the next tile, into the cache
            for (int j = threadIdx.x; j < CHUNK; j += THREADS) {
                long long t = start - CHUNK + j, row_t = t * d - across * WIDE;
                prefetch(u + row_t), prefetch(delta + row_t), prefetch(dy + row_t), prefetch(B + t * Bl), prefetch(C + t * Cl);
                if (HAS_Z) prefetch(z + row_t);
            }
        }
        float h[S];
        const float* kept = states + (((long long)row * tiles + tile) * d + c) * N;
#pragma unroll
        for (int s = 0; s < S; s++) h[s] = lane * S + s < N ? kept[lane * S + s] : 0.f;
        __syncthreads();
#pragma unroll 1
        for (int part = 0; part < parts; part++) {  // the state before each part
            float a[SUB][S], gain[SUB][S];
#pragma unroll
            for (int j = 0; j < SUB; j++) {
                int t = part * SUB + j;
                float step = m.step[t][channel], push = step * m.u[t][channel], b[S];
                read(b, &m.maps[t][lane * 2 * S]);
#pragma unroll
                for (int s = 0; s < S; s++) a[j][s] = power2(step * rate[s]), gain[j][s] = push * b[s];
            }
#pragma unroll
            for (int s = 0; s < S; s++) {
                m.before[part][s][threadIdx.x] = h[s];
#pragma unroll
                for (int j = 0; j < SUB; j++) h[s] = a[j][s] * h[s] + gain[j][s];
            }
        }
#pragma unroll 1
        for (int part = parts - 1; part >= 0; part--, turn ^= 1) {
            float a[SUB][S], before[SUB + 1][S], d_step[SUB], d_push[SUB], out[SUB];  // states before each step
            float d_maps[SUB][VALUES];
#pragma unroll
            for (int s = 0; s < S; s++) before[0][s] = m.before[part][s][threadIdx.x];
#pragma unroll
            for (int j = 0; j < SUB; j++) {
                int t = part * SUB + j;
                float step = m.step[t][channel], push = step * m.u[t][channel], bc[HAS_Z ? 2 * S : S];
                read(bc, &m.maps[t][lane * 2 * S]);
                out[j] = 0;
#pragma unroll
                for (int s = 0; s < S; s++) {
                    a[j][s] = power2(step * rate[s]);
                    before[j + 1][s] = a[j][s] * before[j][s] + push * bc[s];
                    if (HAS_Z) out[j] += before[j + 1][s] * bc[HAS_Z ? S + s : s];
                }
            }
#pragma unroll
            for (int j = SUB - 1; j >= 0; j--) {
                int t = part * SUB + j;
                float step = m.step[t][channel], push = step * m.u[t][channel], g = m.dy[t][channel], bc[2 * S];
                read(bc, &m.maps[t][lane * 2 * S]);
                d_step[j] = d_push[j] = 0;
#pragma unroll
                for (int s = 0; s < S; s++) {
                    float dh = g * bc[S + s] + carry[s];
                    carry[s] = a[j][s] * dh;
                    float d_log = carry[s] * before[j][s];
                    d_maps[j][s] = dh * push;
                    d_maps[j][S + s] = g * before[j + 1][s];
                    sum_A[s] += d_log * step;
                    d_step[j] += d_log * rate[s];
                    d_push[j] += dh * bc[s];
                }
            }
#pragma unroll
            for (int j = 0; j < SUB; j++) sums<VALUES, PLACES>(d_maps[j], place, LANES);
#pragma unroll
            for (int j = 0; j < SUB; j++) {
                float* to = &m.d_maps[turn][warp][j][lane * VALUES + first_of<VALUES, PLACES>(place)];
#pragma unroll
                for (int i = 0; i < LEFT; i++) to[i] = d_maps[j][i];
            }
            sums<SUB, LANES>(d_step, lane, 1);
            sums<SUB, LANES>(d_push, lane, 1);
            if (HAS_Z) sums<SUB, LANES>(out, lane, 1);
            __syncwarp();
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                int t = part * SUB + first_of<SUB, LANES>(lane) + i;
                float step = m.step[t][channel], u_t = m.u[t][channel], g = m.dy[t][channel];
                float slope = SOFTPLUS ? slope_at(step) : 1.f;
                float d_raw = (d_step[i] / LOG2E + d_push[i] * u_t) * slope;
                if (TWINS > 1) __syncwarp();  // both have read what one writes over
                if (lane % TWINS == 0) {
                    sum_D += g * u_t, sum_bias += d_raw;
                    m.step[t][channel] = d_raw;
                    m.u[t][channel] = step * d_push[i] + skip * g;
#if HAS_Z
                    m.y[t][channel] = out[i] + skip * u_t;
#endif
                }
            }
            __syncthreads();
            for (int v = threadIdx.x; v < SUB * 2 * STATES; v += THREADS) {
                int t = part * SUB + v / (2 * STATES), of = v % (2 * STATES), n = of / (2 * S) * S + of % S;
                float total = 0;
#pragma unroll
                for (int w = 0; w < WARPS; w++) total += (&m.d_maps[turn][w][0][0])[v];
                if (n < N && t < size) dmaps[(long long)(start + t) * 2 * N + of / S % 2 * N + n] = total;
            }
        }
#pragma unroll 4
        for (int j = down; j < CHUNK; j += DOWN) {
            if (j >= size || !in_cw) break;
            long long t = (long long)(start + j) * d;
            float d_u[WIDE], d_delta[WIDE];
#pragma unroll
            for (int w = 0; w < WIDE; w++) {
                d_u[w] = m.u[j][across * WIDE + w], d_delta[w] = m.step[j][across * WIDE + w];
            }
            ((Row*)(du + t))->set(d_u), ((Row*)(ddelta + t))->set(d_delta);
#if HAS_Z
            Row z_t = *(const Row*)(z + t);
            float d_z[WIDE];
#pragma unroll
            for (int w = 0; w < WIDE; w++) {
                float v = z_t.at(w), gate = __fdividef(1.f, 1 + power2(-LOG2E * v));
                d_z[w] = dy[t + w] * m.y[j][across * WIDE + w] * gate * (1 + v * (1 - gate));
            }
            ((Row*)(dz + t))->set(d_z);
#endif
        }
    }
    long long to = (long long)row * d + c;
    float last[1] = {sum_D}, last_bias[1] = {sum_bias};
    sums<1, LANES>(last, lane, 1);
    sums<1, LANES>(last_bias, lane, 1);
    if (!in_c) return;
    if (HAS_D && lane == 0) dD[to] = last[0];
    if (HAS_BIAS && lane == 0) dbias[to] = last_bias[0];
#pragma unroll
    for (int s = 0; s < S; s++)
        if (lane * S + s < N) dA[to * N + lane * S + s] = sum_A[s];
}
