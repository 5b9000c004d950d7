// Selective scan, backward, for few sequences: lanes share steps. The equation and its letters are in
// selective_scan_reference.py.
//
// A block works on CHANNELS channels of a route, a chunk of 64 steps at a time, from the last to the first; the forward kept
// the states before each. 8 lanes of a warp share the steps of a channel, and a thread has S of its states, one after the
// other: it finds what its steps make of no state, and their adjoint of no gradient, learns from the lanes before and
// behind it what enters (`enter`), and then walks its steps. So few long sequences keep many threads busy, and
// sums over states (the gradients of u and delta) are sums in registers, which the GROUPS threads that have other states of
// the same steps put together in shared memory. Sums over channels (the gradients of B and C) are exchanges between the
// lanes of other channels. Nothing is atomic.
//
// Where all channels together are few, sequences are cut into segments, as in the forward: `backs` finds the adjoint that
// every segment leaves if none enters, and its sum of step sizes; `backward` begins with what the segments after it leave.
//
// Compile-time: T_BF16, T_FP16 or T_FP32 (u, delta, B, C and z), N states, S, CHANNELS, WIDE channels and MAPS numbers of B or
// C that are read at once, HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS, TAIL steps of a lane in the last chunk, BYTES of shared memory.

#include "selective_scan_common.cu"
#include "selective_scan_lanes.cu"

constexpr int GROUPS = (N + S - 1) / S, STATES = GROUPS * S;  // the states past N are zeros
constexpr int COLUMNS = CHANNELS / PLACES, WARPS = COLUMNS * GROUPS, THREADS = 32 * WARPS;
static_assert(CHANNELS % PLACES == 0, "whole warps");

template <int COUNT> __device__ __forceinline__ float sum_of(const float (&v)[COUNT]) {
    float sum = v[0];
#pragma unroll
    for (int i = 1; i < COUNT; i++) sum += v[i];
    return sum;
}

// What a thread loads and stores of a chunk: WIDE channels of every DOWN-th step; MAPS numbers of B or C of every
// MAP_DOWN-th step; kept states; and what it sums up: the gradients of 4 steps of a state's B or C
constexpr int ACROSS = CHANNELS / WIDE, DOWN = THREADS / ACROSS, MINE = (CHUNK + DOWN - 1) / DOWN;
constexpr int MAP_ACROSS = 2 * STATES / MAPS, MAP_DOWN = THREADS / MAP_ACROSS, SHARE = (CHUNK + MAP_DOWN - 1) / MAP_DOWN;
constexpr int KEPT = (CHANNELS * N + THREADS - 1) / THREADS, QUADS = THREADS / (2 * N);
constexpr int MAP_ROW = CHUNK + 4, B_ROWS = STATES * MAP_ROW + 8;  // in shared memory: a state's B or C, and all of B
constexpr int SUM_ROWS = STATES * MAP_ROW + 16;                    // the gradients of B, or of C, from a warp's channels
static_assert(MAP_DOWN > 0 && DOWN > 0 && QUADS > 0 && STATES % MAPS == 0 && N % MAPS == 0, "threads for every column");
static_assert(GROUPS * CHUNK >= 2 * DOWN, "room for the last sums");

struct Shared {
    float step[CHANNELS][CHUNK], push[CHANNELS][CHUNK];  // a step's size, and what it is times u
    float dy[CHANNELS][CHUNK];                           // through the gate
    float maps[2][B_ROWS];                               // B and C
    float h[CHANNELS][N];                                // states before the chunk
    float d_maps[COLUMNS][2][SUM_ROWS];
    float d_step[GROUPS][CHANNELS][CHUNK], d_push[GROUPS][CHANNELS][CHUNK];
#if HAS_Z
    float y[GROUPS][CHANNELS][CHUNK];  // before the gate, without D
#endif
};
static_assert(sizeof(Shared) == BYTES, "the launch reserves as much");

struct Thread {  // what a thread walks: steps of `lane`, of a channel of the block; states from `first` on
    int lane, place, column, channel, group, first;
    float rate[S], carry[S], sum_A[S];

    __device__ __forceinline__ Thread() : carry{}, sum_A{} {
        int warp = threadIdx.x / 32;
        lane = threadIdx.x % 32 / PLACES, place = threadIdx.x % PLACES, column = warp % COLUMNS, group = warp / COLUMNS;
        channel = column * PLACES + place, first = group * S;
    }
    template <int COUNT> __device__ __forceinline__ void walk(Shared& m) {  // a chunk with COUNT steps of a lane
        Places<COUNT> own(channel * CHUNK, channel, lane), of_map(first * MAP_ROW, 0, lane);
        int to_map = (column * 2 + place / 2) * SUM_ROWS + first * MAP_ROW + lane * COUNT + place % 2 * (COUNT / 2);
        hold(to_map);
        float step[COUNT], push[COUNT], g[COUNT], d_step[COUNT] = {}, d_push[COUNT] = {}, out[COUNT] = {};
        own.read(step, m.step[0]), own.read(push, m.push[0]), own.read(g, m.dy[0]);
        Reach<true> right(sum_of(step));
        Reach<false> left(right.sums[0]);
#pragma unroll
        for (int s = 0; s < S; s++) {
            float b[COUNT], c[COUNT], a[COUNT], before[COUNT + 1], d_maps[2 * COUNT], end = 0, back = 0;
            of_map.read(b, m.maps[0] + s * MAP_ROW), of_map.read(c, m.maps[1] + s * MAP_ROW);
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                float gain = push[i] * b[i];
                a[i] = power2(step[i] * rate[s]), end = i ? a[i] * end + gain : gain;
            }
#pragma unroll
            for (int i = COUNT - 1; i >= 0; i--) back = a[i] * (i < COUNT - 1 ? g[i] * c[i] + back : g[i] * c[i]);
            float h = lane == 0 && first + s < N ? m.h[channel][first + s] : 0.f;
            before[0] = right.enter(end, rate[s], lane, h), back = left.enter(back, rate[s], lane, carry[s]);
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                before[i + 1] = a[i] * before[i] + push[i] * b[i];
                if (HAS_Z) out[i] += before[i + 1] * c[i];
            }
#pragma unroll
            for (int i = COUNT - 1; i >= 0; i--) {
                float dh = g[i] * c[i] + back;
                back = a[i] * dh;
                float d_log = back * before[i];
                sum_A[s] += d_log * step[i], d_step[i] += d_log * rate[s], d_push[i] += dh * b[i];
                d_maps[i] = dh * push[i], d_maps[COUNT + i] = g[i] * before[i + 1];
            }
            sums<2 * COUNT, PLACES>(d_maps, place, 1);
            float* to = m.d_maps[0][0] + to_map + s * MAP_ROW;
            if constexpr (COUNT == 8) *(float4*)to = make_float4(d_maps[0], d_maps[1], d_maps[2], d_maps[3]);
            else if constexpr (COUNT == 4) *(float2*)to = make_float2(d_maps[0], d_maps[1]);
            else if (COUNT == 2 || place % 2 == 0) to[0] = d_maps[0];
        }
        own.write(m.d_step[group][0], d_step), own.write(m.d_push[group][0], d_push);
#if HAS_Z
        own.write(m.y[group][0], out);
#endif
    }
    __device__ __forceinline__ float walk_back(Shared& m) {  // the adjoint alone; the sum of the lane's step sizes
        Places<STEPS> own(channel * CHUNK, channel, lane), of_map(first * MAP_ROW, 0, lane);
        float step[STEPS], g[STEPS];
        own.read(step, m.step[0]), own.read(g, m.dy[0]);
        Reach<false> left(sum_of(step));
#pragma unroll
        for (int s = 0; s < S; s++) {
            float c[STEPS], back = 0;
            of_map.read(c, m.maps[1] + s * MAP_ROW);
#pragma unroll
            for (int i = STEPS - 1; i >= 0; i--) back = power2(step[i] * rate[s]) * (g[i] * c[i] + back);
            left.enter(back, rate[s], lane, carry[s]);
        }
        return left.sums[0];
    }
};

// OUT: all gradients of a segment; else what `backs` finds of the segments but the first
template <bool OUT>
__device__ __forceinline__ void scan(const float* dy, const float* states, const real_t* u, const real_t* delta,
                                     const float* A, const real_t* B, const real_t* C, const float* D, const real_t* z,
                                     const float* bias, real_t* du, real_t* ddelta, real_t* dz, float* dA, float* dmaps,
                                     float* dD, float* dbias, float* backs, float* back_steps, int routes, int length,
                                     int d, int per, int Bb, int Bk, int Bl, int Bn, int Cb, int Ck, int Cl, int Cn) {
    extern __shared__ float4 memory[];
    Shared& m = *(Shared*)memory;
    int blocks = (d + CHANNELS - 1) / CHANNELS, block = blockIdx.x % blocks, c0 = block * CHANNELS;
    int row = blockIdx.x / blocks, ki = row % routes, rows = gridDim.x / blocks;
    int segments = gridDim.y + !OUT, segment = blockIdx.y + !OUT, begins = segment * per, ends = min(length, begins + per);
    int tiles = (length + CHUNK - 1) / CHUNK, start = (ends - 1) / CHUNK * CHUNK;  // of the last chunk
    Thread thread;
    int c = min(c0 + thread.channel, d - 1);
#pragma unroll
    for (int s = 0; s < S; s++) {
        int n = thread.first + s;
        thread.rate[s] = n < N ? A[(ki * d + c) * N + n] * LOG2E : 0.f;
    }
    for (int i = segments - 1; OUT && i > segment; i--) {  // what the segments after this one leave
        long long from = ((long long)(i - 1) * rows + row) * d + c;
        float sum = back_steps[from];
#pragma unroll
        for (int s = 0; s < S; s++) {
            int n = thread.first + s;
            if (n < N) thread.carry[s] = power2(thread.rate[s] * sum) * thread.carry[s] + backs[from * N + n];
        }
    }
    // the channels and steps that this thread loads and stores
    int across = threadIdx.x % ACROSS, down = threadIdx.x / ACROSS, cw = min(c0 + across * WIDE, d - WIDE);
    bool in_cw = c0 + across * WIDE < d;
    long long origin = ((long long)row * length + start + down) * d + cw;
    u += origin, delta += origin, dy += origin, du += origin, ddelta += origin;
    if (HAS_Z) z += origin, dz += origin;
    states += (((long long)row * tiles + start / CHUNK) * d + c0) * N;
    float shift[WIDE], skip[WIDE], sum_D[WIDE] = {}, sum_bias[WIDE] = {};
#pragma unroll
    for (int w = 0; w < WIDE; w++) {
        shift[w] = HAS_BIAS ? bias[ki * d + cw + w] : 0.f, skip[w] = HAS_D ? D[ki * d + cw + w] : 0.f;
    }
    // and its share of B, C and their gradients
    int map_down = threadIdx.x / MAP_ACROSS, is_C = threadIdx.x % MAP_ACROSS / (STATES / MAPS);
    int n_mine = threadIdx.x % (STATES / MAPS) * MAPS, map_l = is_C ? Cl : Bl;
    const real_t* map = is_C ? C + (long long)(row / routes) * Cb + (long long)ki * Ck + min(n_mine, N - MAPS) * Cn
                             : B + (long long)(row / routes) * Bb + (long long)ki * Bk + min(n_mine, N - MAPS) * Bn;
    map += (long long)(start + map_down) * map_l;
    int d_map = threadIdx.x % (2 * N), d_quad = threadIdx.x / (2 * N);
    int from_map = d_map / N * SUM_ROWS + d_map % N * MAP_ROW + d_quad * 4;
    dmaps += (((long long)block * rows + row) * length + start + d_quad * 4) * 2 * N + d_map;
    int slots[MINE][WIDE], map_slots[SHARE];  // where the numbers stand in shared memory
    auto arrange = [&](int count) {
#pragma unroll
        for (int i = 0; i < MINE; i++) {
#pragma unroll
            for (int w = 0; w < WIDE; w++) {
                int channel = across * WIDE + w;
                slots[i][w] = channel * CHUNK + place_of(channel, min(i * DOWN + down, CHUNK - 1), count);
                hold(slots[i][w]);
            }
        }
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            map_slots[i] = is_C * B_ROWS + n_mine * MAP_ROW + place_of(0, min(i * MAP_DOWN + map_down, CHUNK - 1), count);
            hold(map_slots[i]);
        }
    };
    auto is_mine = [&](int i) {  // the i-th of the rows; of those of B and C
        return (THREADS % ACROSS == 0 || down < DOWN) && (CHUNK % DOWN == 0 || i * DOWN + down < CHUNK);
    };
    auto map_is_mine = [&](int i) {
        return (THREADS % MAP_ACROSS == 0 || map_down < MAP_DOWN) && (CHUNK % MAP_DOWN == 0 || i * MAP_DOWN + map_down < CHUNK);
    };
    Row next_u[MINE] = {}, next_delta[MINE] = {}, next_z[MINE] = {}, held_u[MINE], held_z[MINE];
    Floats next_dy[MINE] = {}, held_dy[MINE];
    Few next_map[SHARE] = {};
    float next_h[KEPT] = {};
    auto load = [&](int size) {  // a chunk of so many steps; the one before it comes next
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            if (i * DOWN + down >= size || !is_mine(i)) continue;
            if (OUT) next_u[i] = fetched((const Row*)(u + i * DOWN * d));
            next_delta[i] = fetched((const Row*)(delta + i * DOWN * d));
            next_dy[i] = fetched((const Floats*)(dy + i * DOWN * d));
            if (HAS_Z) next_z[i] = fetched((const Row*)(z + i * DOWN * d));
        }
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            if (i * MAP_DOWN + map_down >= size || !map_is_mine(i) || !(OUT || is_C)) continue;
            next_map[i] = fetched((const Few*)(map + i * MAP_DOWN * map_l));
        }
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            int v = i * THREADS + threadIdx.x;
            if (OUT && v < min(CHANNELS, d - c0) * N) next_h[i] = fetched(states + v);
        }
        u -= CHUNK * d, delta -= CHUNK * d, dy -= CHUNK * d, map -= CHUNK * map_l, states -= (long long)d * N;
        if (HAS_Z) z -= CHUNK * d;
    };
    auto store = [&](int size) {
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            held_u[i] = next_u[i], held_z[i] = next_z[i], held_dy[i] = next_dy[i];
            bool there = i * DOWN + down < size && in_cw;
            if (!is_mine(i)) continue;
#pragma unroll
            for (int w = 0; w < WIDE; w++) {
                float step = step_of(next_delta[i].at(w) + shift[w]), g = next_dy[i].v[w];
                if (HAS_Z) g *= silu(next_z[i].at(w));
                step = there ? step : 0.f;
                int to = slots[i][w];
                m.step[0][to] = step, m.dy[0][to] = there ? g : 0.f;
                if (OUT) m.push[0][to] = step * next_u[i].at(w);
            }
        }
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            if (!map_is_mine(i) || !(OUT || is_C)) continue;
#pragma unroll
            for (int k = 0; k < MAPS; k++) m.maps[0][map_slots[i] + k * MAP_ROW] = n_mine + k < N ? next_map[i].at(k) : 0.f;
        }
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            int v = i * THREADS + threadIdx.x;
            if (OUT && v < CHANNELS * N) m.h[0][v] = next_h[i];
        }
    };
    auto emit = [&](int size) {  // the gradients of u, delta and z
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            if (i * DOWN + down >= size || !in_cw || !is_mine(i)) continue;
            float d_u[WIDE], d_delta[WIDE], d_z[WIDE];
#pragma unroll
            for (int w = 0; w < WIDE; w++) {
                int from = slots[i][w];
                float d_step = 0, d_push = 0, step = m.step[0][from], g = m.dy[0][from], u_t = held_u[i].at(w);
#pragma unroll
                for (int k = 0; k < GROUPS; k++) d_step += m.d_step[k][0][from], d_push += m.d_push[k][0][from];
                d_delta[w] = (d_step / LOG2E + d_push * u_t) * (SOFTPLUS ? slope_at(step) : 1.f);
                d_u[w] = step * d_push + skip[w] * g;
                sum_D[w] += g * u_t, sum_bias[w] += d_delta[w];
#if HAS_Z
                float y = skip[w] * u_t, v = held_z[i].at(w), gate = __fdividef(1.f, 1 + power2(-LOG2E * v));
#pragma unroll
                for (int k = 0; k < GROUPS; k++) y += m.y[k][0][from];
                d_z[w] = held_dy[i].v[w] * y * gate * (1 + v * (1 - gate));
#endif
            }
            ((Row*)(du + i * DOWN * d))->set(d_u), ((Row*)(ddelta + i * DOWN * d))->set(d_delta);
            if (HAS_Z) ((Row*)(dz + i * DOWN * d))->set(d_z);
        }
        du -= CHUNK * d, ddelta -= CHUNK * d;
        if (HAS_Z) dz -= CHUNK * d;
    };
    auto emit_maps = [&](int size) {  // the gradients of B and C
#pragma unroll
        for (int q = 0; q < CHUNK / 4; q += QUADS) {
            int t = (q + d_quad) * 4;
            if ((THREADS % (2 * N) && d_quad >= QUADS) || t >= size) break;
            float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
            for (int i = 0; i < COLUMNS; i++) {
                float4 part = *(const float4*)&m.d_maps[0][0][from_map + i * 2 * SUM_ROWS + q * 4];
                total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
            }
            float* to = dmaps + q * 8 * N;
            to[0] = total.x;
            if (t + 1 < size) to[2 * N] = total.y;
            if (t + 2 < size) to[4 * N] = total.z;
            if (t + 3 < size) to[6 * N] = total.w;
        }
        dmaps -= CHUNK * 2 * N;
    };
    auto begin = [&](int size) {
        store(size);
        if (start > begins) load(CHUNK);
        __syncthreads();
    };
    auto end = [&](int size) {
        __syncthreads();
        emit(size);
        emit_maps(size);
        start -= CHUNK;
    };
    int size = ends - start;
    load(size);
    if constexpr (!OUT) {
        float total = 0;
        arrange(STEPS);
#pragma unroll 1
        for (; start >= begins; size = CHUNK, start -= CHUNK) {
            begin(size);
            total += thread.walk_back(m);
            __syncthreads();
        }
#pragma unroll
        for (int by = 1; by < LANES; by *= 2) total += __shfl_xor_sync(ALL, total, by * PLACES);
        long long to = ((long long)(segment - 1) * rows + row) * d + c;
        if (thread.lane != LANES - 1 || c0 + thread.channel >= d) return;  // the lane that `enter` tells what is left
        if (thread.group == 0) back_steps[to] = total;
#pragma unroll
        for (int s = 0; s < S; s++)
            if (thread.first + s < N) backs[to * N + thread.first + s] = thread.carry[s];
        return;
    }
    if (TAIL < STEPS) {
        arrange(TAIL);
        begin(size);
        thread.walk<TAIL>(m);
        end(size);
        size = CHUNK;
        __syncthreads();  // what one thread reads another now writes
    }
    arrange(STEPS);
#pragma unroll 1
    for (; start >= begins; size = CHUNK) {
        begin(size);
        thread.walk<STEPS>(m);
        end(size);
    }
#pragma unroll
    for (int s = 0; s < S; s++) {
#pragma unroll
        for (int by = 1; by < LANES; by *= 2) thread.sum_A[s] += __shfl_xor_sync(ALL, thread.sum_A[s], by * PLACES);
        bool mine = thread.lane == 0 && c0 + thread.channel < d && thread.first + s < N;
        if (mine) dA[(((long long)segment * rows + row) * d + c) * N + thread.first + s] = thread.sum_A[s];
    }
    if (!HAS_D && !HAS_BIAS) return;
    __syncthreads();
    float* parts = m.d_step[0][0];  // (DOWN, 2, CHANNELS)
#pragma unroll
    for (int w = 0; w < WIDE; w++) {
        if (down >= DOWN) break;
        float* to = parts + down * 2 * CHANNELS + across * WIDE + w;
        to[0] = sum_D[w], to[CHANNELS] = sum_bias[w];
    }
    __syncthreads();
    for (int v = threadIdx.x; v < 2 * CHANNELS; v += THREADS) {
        float total = 0;
        for (int j = 0; j < DOWN; j++) total += parts[j * 2 * CHANNELS + v];
        long long to = ((long long)segment * rows + row) * d + c0 + v % CHANNELS;
        if (c0 + v % CHANNELS < d) (v < CHANNELS ? dD : dbias)[to] = total;
    }
}

#define ARGUMENTS                                                                                                        \
    const float *dy, const float *states, const real_t *u, const real_t *delta, const float *__restrict__ A,             \
        const real_t *B, const real_t *C, const float *__restrict__ D, const real_t *z, const float *__restrict__ bias,  \
        real_t *__restrict__ du, real_t *__restrict__ ddelta, real_t *__restrict__ dz, float *__restrict__ dA,           \
        float *__restrict__ dmaps, float *__restrict__ dD, float *__restrict__ dbias, float *__restrict__ backs,         \
        float *__restrict__ back_steps, int routes, int length, int d, int per, int Bb, int Bk, int Bl, int Bn, int Cb,  \
        int Ck, int Cl, int Cn
#define PASSED                                                                                                           \
    dy, states, u, delta, A, B, C, D, z, bias, du, ddelta, dz, dA, dmaps, dD, dbias, backs, back_steps, routes, length,  \
        d, per, Bb, Bk, Bl, Bn, Cb, Ck, Cl, Cn

extern "C" __global__ void __launch_bounds__(THREADS, WARPS < 12 ? 12 / WARPS : 1) backward(ARGUMENTS) {
    scan<true>(PASSED);
}
extern "C" __global__ void __launch_bounds__(THREADS, WARPS < 12 ? 12 / WARPS : 1) backs(ARGUMENTS) { scan<false>(PASSED); }
