// Selective scan, forward and backward; the equation and its letters are in selective_scan_reference.py.
//
// LANES lanes of a warp share a channel, each with S of its states in registers, and walk it step by step: no tree over
// steps, and as many lanes as it takes to fill the GPU. A block works on CHANNELS channels of a route, a tile of steps at a
// time: its threads load the tile together, the lanes then read step sizes, B and C from shared memory. Sums over states
// (y, the gradients of u and delta) and over channels (those of B and C) are taken for several steps at once, so that
// each exchange between lanes halves the number of values.
//
// Where there are few sequences, the forward cuts each into segments: `ends` finds how every segment maps a state (a step
// multiplies by exp(delta A), so a segment by exp(A sum delta)), and `forward` starts from what the segments before it
// leave. The backward starts each tile from the state that the forward kept, and recomputes it inside. Nothing is atomic.
//
// Compile-time: T_BF16, T_FP16 or T_FP32 (u, delta, B, C and z), N states, S states of a lane, WIDE channels read at
// once, THREADS of a block, HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS, KEEP (the states before each chunk), NARROW (y has u's type, not float32).

__host__ __device__ constexpr int lanes_of(int states) {
    int lanes = 1;
    while (lanes * S < states) lanes *= 2;
    return lanes;
}

constexpr int CHUNK = 64, LANES = lanes_of(N), STATES = LANES * S;  // the states past N are zeros
constexpr int CHANNELS = THREADS / LANES, WARPS = THREADS / 32;
constexpr int T = CHANNELS > 64 ? 8 : 16, AHEAD = 4;  // steps of a tile of the forward; tiles that are fetched ahead
constexpr int SUB = 8;  // steps that are in registers at once
constexpr unsigned ALL = ~0u;

#if WIDE == 2 && !defined(T_FP32)
struct Row {  // channels next to each other, in one register
    unsigned bits;
};
__device__ __forceinline__ float at(Row row, int w) {
#ifdef T_BF16
    return __uint_as_float(w ? row.bits & 0xffff0000u : row.bits << 16);
#else
    return real((unsigned short)(w ? row.bits >> 16 : row.bits));
#endif
}
__device__ __forceinline__ Row row_of(const float (&v)[WIDE]) {
    return {stored<real_t>(v[0]) | (unsigned)stored<real_t>(v[1]) << 16};
}
#else
struct alignas(sizeof(real_t) * WIDE) Row {
    real_t v[WIDE];
};
__device__ __forceinline__ float at(const Row& row, int w) { return real(row.v[w]); }
__device__ __forceinline__ Row row_of(const float (&v)[WIDE]) {
    Row row;
    for (int w = 0; w < WIDE; w++) row.v[w] = stored<real_t>(v[w]);
    return row;
}
#endif

struct alignas(4 * WIDE) Floats {
    float v[WIDE];
};

__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

struct Maps {  // B or C: its strides in elements
    int b, k, l, n;
};

// Floats from shared memory
template <int COUNT> __device__ __forceinline__ void read(float (&to)[COUNT], const float* from) {
    if constexpr (COUNT % 4 == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            float4 v = *(float4*)(from + i);
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        }
    } else if constexpr (COUNT % 2 == 0) {
        float2 v = *(float2*)from;
        to[0] = v.x, to[1] = v.y;
    } else {
        to[0] = *from;
    }
}

// Where a state's B (and, with S added, its C) stands among the 2 * STATES numbers of a step: by lane
__device__ __forceinline__ int place_of(int n) { return n / S * 2 * S + n % S; }

// Sums of V values over the P lanes whose numbers differ in the bits from `bit` on. A lane ends up with
// max(1, V / P) of them, the first of which has the number `first_of`.
template <int V, int P>
__device__ __forceinline__ void sums(float (&v)[V], int place, int bit) {
    constexpr int HALF = P / 2;
    if constexpr (P > 1) {
        if constexpr (V > 1) {
            float half[V / 2];
            bool upper = place & HALF;
#pragma unroll
            for (int i = 0; i < V / 2; i++) {
                float send = upper ? v[i] : v[i + V / 2], keep = upper ? v[i + V / 2] : v[i];
                half[i] = keep + __shfl_xor_sync(ALL, send, HALF * bit);
            }
            sums<V / 2, HALF>(half, place, bit);
#pragma unroll
            for (int i = 0; i < V / 2; i++) v[i] = half[i];
        } else {
            v[0] += __shfl_xor_sync(ALL, v[0], HALF * bit);
            sums<V, HALF>(v, place, bit);
        }
    }
}

template <int V, int P>
__device__ __forceinline__ int first_of(int place) {
    return V >= P ? place * (V / P) : place / (P / V);
}

__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1 + power2(-LOG2E * v)); }

__device__ __forceinline__ float step_of(float raw) { return SOFTPLUS ? softplus(raw) : raw; }

// What a thread loads of a tile: WIDE channels of some of its steps, and its share of B and C
constexpr int ACROSS = CHANNELS / WIDE, DOWN = THREADS / ACROSS, MINE = (T + DOWN - 1) / DOWN;
constexpr int SHARE = (T * STATES + THREADS - 1) / THREADS;
static_assert(THREADS % STATES == 0 && THREADS % LANES == 0, "a thread loads one state");

struct Loaded {
    Row u[MINE], delta[MINE], z[MINE];
    real_t B[SHARE], C[SHARE];
};

#ifdef NARROW
typedef real_t out_t;
#else
typedef float out_t;
#endif

template <bool OUT>
__device__ __forceinline__ void scan(const real_t* u, const real_t* delta, const float* A, const real_t* B,
                                     const real_t* C, const float* D, const real_t* z, const float* bias, out_t* y,
                                     float* last, float* states, float* end_states, float* end_steps, int k, int length,
                                     int d, int per, Maps to_B, Maps to_C) {
    __shared__ float4 move[2][T / 2][CHANNELS];      // of two steps: step size, and what it is times u
    __shared__ alignas(16) float maps[2][T][2 * STATES];  // B and C
    __shared__ float y_s[2][T][CHANNELS];
    int blocks = (d + CHANNELS - 1) / CHANNELS, c0 = blockIdx.x % blocks * CHANNELS;
    int row = blockIdx.x / blocks, ki = row % k, segment = blockIdx.y, rows = gridDim.x / blocks;
    int first = segment * per, stop = min(length, first + per);
    long long bi = row / k;
    // the channel and states that this thread scans
    int channel = threadIdx.x / LANES, lane = threadIdx.x % LANES, c = min(c0 + channel, d - 1);
    bool in_c = c0 + channel < d;
    float h[S], rate[S], total = 0;
#pragma unroll
    for (int s = 0; s < S; s++) {
        int n = lane * S + s;
        h[s] = 0, rate[s] = n < N ? A[(ki * d + c) * N + n] * LOG2E : 0.f;
    }
    if (OUT) {
        for (int s = 0; s < segment; s++) {  // what the segments before this one leave
            long long from = ((long long)s * rows + row) * d + c;
            float sum = end_steps[from];
#pragma unroll
            for (int i = 0; i < S; i++) {
                int n = lane * S + i;
                if (n < N) h[i] = power2(rate[i] * sum) * h[i] + end_states[from * N + n];
            }
        }
    }
    // the channels and steps that this thread loads and stores
    int across = threadIdx.x % ACROSS, down = threadIdx.x / ACROSS, cw = min(c0 + across * WIDE, d - WIDE);
    int n_mine = threadIdx.x % STATES, t_mine = threadIdx.x / STATES;
    bool in_cw = c0 + across * WIDE < d, in_n = n_mine < N;
    long long origin = (long long)row * length * d;
    u += origin, delta += origin, y += origin;
    if (HAS_Z) z += origin;
    B += bi * to_B.b + (long long)ki * to_B.k, C += bi * to_C.b + (long long)ki * to_C.k;
    unsigned next_row = (first + down) * d + cw, next_B = (first + t_mine) * to_B.l + min(n_mine, N - 1) * to_B.n;
    unsigned next_C = (first + t_mine) * to_C.l + min(n_mine, N - 1) * to_C.n;
    float shift[WIDE], skip[WIDE];
#pragma unroll
    for (int w = 0; w < WIDE; w++) {
        shift[w] = HAS_BIAS ? bias[ki * d + cw + w] : 0.f, skip[w] = HAS_D ? D[ki * d + cw + w] : 0.f;
    }
    Loaded next = {};
    Row held_u[MINE], held_z[MINE];
    auto load = [&](int start) {  // what is past the end keeps old numbers, which a step of size 0 leaves out
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            if (start + i * DOWN + down >= stop) break;
            unsigned to = next_row + i * DOWN * d;
            next.u[i] = *(const Row*)(u + to), next.delta[i] = *(const Row*)(delta + to);
            if (OUT && HAS_Z) next.z[i] = *(const Row*)(z + to);
        }
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            if (start + i * (THREADS / STATES) + t_mine >= stop) break;
            next.B[i] = B[next_B + i * (THREADS / STATES) * to_B.l];
            if (OUT) next.C[i] = C[next_C + i * (THREADS / STATES) * to_C.l];
        }
        next_row += T * d, next_B += T * to_B.l, next_C += T * to_C.l;
    };
    auto fetch = [&](int start) {  // into the cache, ahead of the loads
        if (threadIdx.x >= T || start + (int)threadIdx.x >= stop) return;
        unsigned t = start + threadIdx.x, to = t * d + c0;
        prefetch(u + to), prefetch(delta + to), prefetch(B + t * to_B.l);
        if (OUT && HAS_Z) prefetch(z + to);
        if (OUT) prefetch(C + t * to_C.l);
    };
    auto emit = [&](int turn, int start) {  // y of a tile that is done
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            int j = i * DOWN + down;
            if (j >= T) break;
            Floats out;
#pragma unroll
            for (int w = 0; w < WIDE; w++) {
                out.v[w] = y_s[turn][j][across * WIDE + w] + skip[w] * at(held_u[i], w);
                if (HAS_Z) out.v[w] *= silu(at(held_z[i], w));
            }
            if (!in_cw || start + j >= stop) continue;
#ifdef NARROW
            *(Row*)(y + (unsigned)((start + j) * d + cw)) = row_of(out.v);
#else
            *(Floats*)(y + (unsigned)((start + j) * d + cw)) = out;
#endif
        }
    };
    auto walk = [&](int turn, int start) {  // one tile
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            int j = i * DOWN + down;
            if (j >= T) break;
#pragma unroll
            for (int w = 0; w < WIDE; w++) {
                float step = step_of(at(next.delta[i], w) + shift[w]);
                step = start + j < stop ? step : 0.f;  // no step past the end
                ((float2*)&move[turn][j / 2][across * WIDE + w])[j % 2] = make_float2(step, step * at(next.u[i], w));
            }
        }
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            int t = i * (THREADS / STATES) + t_mine;
            if (t >= T) break;
            float* to = &maps[turn][t][place_of(n_mine)];
            to[0] = in_n ? real(next.B[i]) : 0.f;
            if (OUT) to[S] = in_n ? real(next.C[i]) : 0.f;
        }
        __syncthreads();
        if (OUT && start > first) emit(turn ^ 1, start - T);
        if (OUT) {
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                held_u[i] = next.u[i];
                if (HAS_Z) held_z[i] = next.z[i];
            }
        }
        load(start + T);
        fetch(start + AHEAD * T);
        if (OUT && KEEP && in_c && start % CHUNK == 0) {
            float* kept = states + (((long long)row * ((length + CHUNK - 1) / CHUNK) + start / CHUNK) * d + c) * N;
#pragma unroll
            for (int s = 0; s < S; s++)
                if (lane * S + s < N) kept[lane * S + s] = h[s];
        }
        float out[T];
#pragma unroll
        for (int part = 0; part < T; part += SUB) {
            float a[SUB][S], gain[SUB][S], c[SUB][S];
#pragma unroll
            for (int j = 0; j < SUB; j++) {
                int t = part + j;
                float4 two = move[turn][t / 2][channel];
                float step = t % 2 ? two.z : two.x, push = t % 2 ? two.w : two.y, bc[OUT ? 2 * S : S];
                read(bc, &maps[turn][t][lane * 2 * S]);
                if (!OUT) total += step;
#pragma unroll
                for (int s = 0; s < S; s++) {
                    a[j][s] = power2(step * rate[s]), gain[j][s] = push * bc[s];
                    if (OUT) c[j][s] = bc[OUT ? S + s : s];
                }
            }
#pragma unroll
            for (int j = 0; j < SUB; j++) {
                out[part + j] = 0;
#pragma unroll
                for (int s = 0; s < S; s++) {
                    h[s] = a[j][s] * h[s] + gain[j][s];
                    if (OUT) out[part + j] += h[s] * c[j][s];
                }
            }
        }
        if (OUT) {  // after all steps: exchanges between lanes would hold up what follows them
            sums<T, LANES>(out, lane, 1);
#pragma unroll
            for (int i = 0; i < T / LANES; i++) y_s[turn][first_of<T, LANES>(lane) + i][channel] = out[i];
        }
    };
    load(first);
    for (int ahead = 1; ahead < AHEAD; ahead++) fetch(first + ahead * T);
#pragma unroll 1
    for (int start = first; start < stop; start += 2 * T) {
        walk(0, start);
        if (start + T < stop) walk(1, start + T);
    }
    if (OUT) {
        int tile = (stop - first - 1) / T;
        __syncthreads();
        emit(tile % 2, first + tile * T);
    }
    if (!in_c) return;
    long long to = OUT ? (long long)row * d + c : ((long long)segment * rows + row) * d + c;
    if (!OUT && lane == 0) end_steps[to] = total;
    if (OUT && stop < length) return;
    float* end = OUT ? last : end_states;
#pragma unroll
    for (int s = 0; s < S; s++)
        if (lane * S + s < N) end[to * N + lane * S + s] = h[s];
}

#define ARGUMENTS                                                                                                     \
    const real_t *__restrict__ u, const real_t *__restrict__ delta, const float *__restrict__ A,                      \
        const real_t *__restrict__ B, const real_t *__restrict__ C, const float *__restrict__ D,                      \
        const real_t *__restrict__ z, const float *__restrict__ bias, out_t *__restrict__ y, float *__restrict__ last, \
        float *__restrict__ states, float *__restrict__ end_states, float *__restrict__ end_steps, int k, int length,  \
        int d, int per, int Bb, int Bk, int Bl, int Bn, int Cb, int Ck, int Cl, int Cn
#define PASSED                                                                                                  \
    u, delta, A, B, C, D, z, bias, y, last, states, end_states, end_steps, k, length, d, per, {Bb, Bk, Bl, Bn}, \
        {Cb, Ck, Cl, Cn}

extern "C" __global__ void __launch_bounds__(THREADS) forward(ARGUMENTS) { scan<true>(PASSED); }
extern "C" __global__ void __launch_bounds__(THREADS) ends(ARGUMENTS) { scan<false>(PASSED); }

constexpr int PARTS = CHUNK / SUB;                  // of a tile of CHUNK steps
constexpr int PLACES = 32 / LANES, VALUES = 2 * S;  // channels of a warp; B's and C's gradients of a lane in a step
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

#ifdef BACKWARD_BYTES
static_assert(sizeof(Backward) == BACKWARD_BYTES, "the launch reserves as much");
#endif

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
                float step = step_of(at(delta_t, w) + shift[w]), g = dy_t.v[w];
                if (HAS_Z) g *= silu(at(z_t, w));
                m.step[j][across * WIDE + w] = there ? step : 0.f;
                m.u[j][across * WIDE + w] = there ? at(u_t, w) : 0.f;
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
            *(Row*)(du + t) = row_of(d_u), *(Row*)(ddelta + t) = row_of(d_delta);
#if HAS_Z
            Row z_t = *(const Row*)(z + t);
            float d_z[WIDE];
#pragma unroll
            for (int w = 0; w < WIDE; w++) {
                float v = at(z_t, w), gate = __fdividef(1.f, 1 + power2(-LOG2E * v));
                d_z[w] = dy[t + w] * m.y[j][across * WIDE + w] * gate * (1 + v * (1 - gate));
            }
            *(Row*)(dz + t) = row_of(d_z);
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
