// Selective scan, forward; the equation and its letters are in selective_scan_reference.py.
//
// LANES lanes of a warp share a channel, each with S of its states in registers, and walk it step by step. A block works on
// CHANNELS channels of a route, a tile of T steps at a time: its threads load the tile together, the lanes then read step
// sizes, B and C from shared memory. Sums over states are taken for all steps of a tile at once, so that each exchange
// between lanes halves the number of values. What is in shared memory lies so that no two threads of a warp meet in a bank.
//
// Where there are few sequences, each is cut into segments: `ends` finds how every segment maps a state (a step multiplies
// by exp(delta A), so a segment by exp(A sum delta)), and `forward` starts from what the segments before it leave. The first
// segment, which needs no state, is done in `ends`; the last, which nothing follows, in `forward` alone.
//
// Compile-time: T_BF16, T_FP16 or T_FP32 (u, delta, B, C and z), N states, S states of a lane, WIDE channels and MAPS numbers
// of B or C that are read at once, THREADS of a block, HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS, KEEP (the states before each chunk),
// NARROW (y has u's type, not float32).

#include "selective_scan_common.cu"

constexpr int LANES = lanes_of(N), STATES = LANES * S;          // the states past N are zeros
constexpr int PLACES = 32 / LANES, CHANNELS = THREADS / LANES;  // channels of a warp, and of a block
constexpr int T = CHANNELS > 64 ? 8 : 16, SUB = 8;              // steps of a tile; those that are in registers at once

struct Maps {  // B or C: its strides in elements
    int b, k, l, n;
};

// The first of a thread's numbers to memory, `there` of them
template <int COUNT> __device__ __forceinline__ void keep(float* to, const float (&from)[COUNT], int there) {
    if constexpr (COUNT % 4 == 0 && N % COUNT == 0) {  // all or nothing
#pragma unroll
        for (int i = 0; i < COUNT; i += 4)
            if (there > 0) *(float4*)(to + i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) if (i < there) to[i] = from[i];
    }
}

// What a thread loads of a tile: WIDE channels of pairs of steps, DOWN pairs apart
constexpr int ACROSS = CHANNELS / WIDE, DOWN = THREADS / ACROSS, MINE = (T / 2 + DOWN - 1) / DOWN;
// and MAPS numbers of B or C of every MAP_DOWN-th step; S numbers of B stand before S of C
constexpr int MAP_ACROSS = 2 * STATES / MAPS, MAP_DOWN = THREADS / MAP_ACROSS, SHARE = (T + MAP_DOWN - 1) / MAP_DOWN;
// Where a channel stands in the rows of shared memory: even ones before odd ones, as threads with two of them write
constexpr int ODD = CHANNELS / 2 + 4, MOVE_ROW = CHANNELS + 4, Y_ROW = CHANNELS + 2;
__device__ __forceinline__ int place_of(int channel) { return channel % 2 * ODD + channel / 2; }
static_assert(THREADS % MAP_ACROSS == 0 && THREADS % ACROSS == 0 && S % MAPS == 0, "a column for every thread");

#ifdef NARROW
typedef real_t out_t;
#else
typedef float out_t;
#endif

struct Shared {  // memory of a block, of two tiles
    float4 move[2][T / 2][MOVE_ROW];           // of two steps: step size, and what it is times u
    alignas(16) float maps[2][T][2 * STATES];  // B and C
    alignas(8) float y[2][T][Y_ROW];
};

template <bool OUT>
__device__ __forceinline__ void scan(Shared& shared, const real_t* u, const real_t* delta, const float* A, const real_t* B,
                                     const real_t* C, const float* D, const real_t* z, const float* bias, out_t* y,
                                     float* last, float* states, float* end_states, float* end_steps, int k, int length,
                                     int d, int per, int segment, Maps to_B, Maps to_C) {
    auto& move = shared.move;
    auto& maps = shared.maps;
    auto& y_s = shared.y;
    int blocks = (d + CHANNELS - 1) / CHANNELS, c0 = blockIdx.x % blocks * CHANNELS;
    int row = blockIdx.x / blocks, ki = row % k, rows = gridDim.x / blocks;
    int first = segment * per, stop = min(length, first + per);
    long long bi = row / k;
    // the channel and states that this thread scans
    int channel = threadIdx.x / 32 * PLACES + threadIdx.x % PLACES, lane = threadIdx.x % 32 / PLACES;
    int c = min(c0 + channel, d - 1);
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
    int across = threadIdx.x % ACROSS, down = threadIdx.x / ACROSS * 2, cw = min(c0 + across * WIDE, d - WIDE);
    bool in_cw = c0 + across * WIDE < d;
    long long origin = ((long long)row * length + first + down) * d + cw;
    u += origin, delta += origin, y += origin;
    if (HAS_Z) z += origin;
    int is_C = threadIdx.x / (MAP_ACROSS / 2) % 2, n_mine = threadIdx.x % (MAP_ACROSS / 2) * MAPS;
    int t_mine = threadIdx.x / MAP_ACROSS, map_l = is_C ? to_C.l : to_B.l;
    const real_t* map = is_C ? C + bi * to_C.b + (long long)ki * to_C.k + min(n_mine, N - MAPS) * to_C.n
                             : B + bi * to_B.b + (long long)ki * to_B.k + min(n_mine, N - MAPS) * to_B.n;
    map += (long long)(first + t_mine) * map_l;
    int to_map = t_mine * 2 * STATES + n_mine / S * 2 * S + is_C * S + n_mine % S;
    // where this thread's numbers stand in shared memory
    int to_move = down / 2 * MOVE_ROW + place_of(across * WIDE), from_move = place_of(channel), from_map = lane * 2 * S;
    int to_y = lane * (T / LANES) * Y_ROW + channel, from_y = down * Y_ROW + across * WIDE;
    hold(to_move), hold(from_move), hold(to_map), hold(from_map), hold(to_y), hold(from_y), hold(lane);
    float shift[WIDE], skip[WIDE];
#pragma unroll
    for (int w = 0; w < WIDE; w++) {
        shift[w] = HAS_BIAS ? bias[ki * d + cw + w] : 0.f, skip[w] = HAS_D ? D[ki * d + cw + w] : 0.f;
    }
    Row next_u[MINE][2] = {}, next_delta[MINE][2] = {}, next_z[MINE][2] = {}, held_u[MINE][2], held_z[MINE][2];
    Few next_map[SHARE] = {};
    auto load = [&](int left) {  // of a tile with `left` steps; others keep old numbers, which a step of 0 leaves out
#pragma unroll
        for (int i = 0; i < MINE; i++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (i * 2 * DOWN + j + down >= min(left, T)) continue;
                int to = (i * 2 * DOWN + j) * d;
                next_u[i][j] = fetched((const Row*)(u + to)), next_delta[i][j] = fetched((const Row*)(delta + to));
                if (OUT && HAS_Z) next_z[i][j] = fetched((const Row*)(z + to));
            }
        }
        u += T * d, delta += T * d;
        if (HAS_Z) z += T * d;
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            if (i * MAP_DOWN + t_mine >= min(left, T) || (!OUT && is_C)) continue;
            next_map[i] = fetched((const Few*)(map + i * MAP_DOWN * map_l));
        }
        map += T * map_l;
    };
    auto store = [&](int turn, int left) {
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            if ((T / 2) % DOWN && i * 2 * DOWN + down >= T) break;
            float moves[2][2][WIDE];
#pragma unroll
            for (int j = 0; j < 2; j++) {
#pragma unroll
                for (int w = 0; w < WIDE; w++) {
                    float step = step_of(next_delta[i][j].at(w) + shift[w]);
                    step = i * 2 * DOWN + j + down < left ? step : 0.f;  // no step past the end
                    moves[j][0][w] = step, moves[j][1][w] = step * next_u[i][j].at(w);
                }
            }
#pragma unroll
            for (int w = 0; w < WIDE; w++) {
                move[turn][i * DOWN][to_move + w * ODD] =
                    make_float4(moves[0][0][w], moves[0][1][w], moves[1][0][w], moves[1][1][w]);
            }
        }
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            if ((T % MAP_DOWN && i * MAP_DOWN + t_mine >= T) || (!OUT && is_C)) break;
            float v[MAPS];
#pragma unroll
            for (int m = 0; m < MAPS; m++) v[m] = n_mine + m < N ? next_map[i].at(m) : 0.f;
            float* to = maps[turn][i * MAP_DOWN] + to_map;
            if constexpr (MAPS == 4) *(float4*)to = make_float4(v[0], v[1], v[2], v[3]);
            else for (int m = 0; m < MAPS; m++) to[m] = v[m];
        }
    };
    auto emit = [&](int turn, int left) {  // y of a tile that is done
#pragma unroll
        for (int i = 0; i < MINE; i++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int t = i * 2 * DOWN + j;
                if (t + down >= min(left, T)) continue;
                Floats out = *(const Floats*)&y_s[turn][t][from_y];
#pragma unroll
                for (int w = 0; w < WIDE; w++) {
                    out.v[w] += skip[w] * held_u[i][j].at(w);
                    if (HAS_Z) out.v[w] *= silu(held_z[i][j].at(w));
                }
                if (!in_cw) continue;
#ifdef NARROW
                ((Row*)(y + t * d))->set(out.v);
#else
                *(Floats*)(y + t * d) = out;
#endif
            }
        }
        y += T * d;
    };
    long long chunk = (long long)row * ((length + CHUNK - 1) / CHUNK) + (first + CHUNK - 1) / CHUNK;  // the first to keep
    float* kept = states + (chunk * d + c) * N + lane * S;
    auto walk = [&](int turn, int left) {
        float out[T];
#pragma unroll
        for (int part = 0; part < T; part += SUB) {
            float a[SUB][S], gain[SUB][S], c[SUB][S];
#pragma unroll
            for (int j = 0; j < SUB; j++) {
                int t = part + j;
                float4 two = move[turn][t / 2][from_move];
                float step = t % 2 ? two.z : two.x, push = t % 2 ? two.w : two.y, bc[OUT ? 2 * S : S];
                read(bc, &maps[turn][t][from_map]);
                if (!OUT) total += step;
#pragma unroll
                for (int s = 0; s < S; s++) {
                    a[j][s] = power2(step * rate[s]), gain[j][s] = push * bc[s];
                    if (OUT) c[j][s] = bc[OUT ? S + s : s];
                }
            }
#pragma unroll
            for (int j = 0; j < SUB; j++) {
#pragma unroll
                for (int s = 0; s < S; s++) {
                    h[s] = a[j][s] * h[s] + gain[j][s];
                    if (OUT) out[part + j] = s ? out[part + j] + h[s] * c[j][s] : h[s] * c[j][s];
                }
            }
        }
        if (OUT) {  // after all steps: exchanges between lanes would hold up what follows them
            sums<T, LANES>(out, lane, PLACES);
#pragma unroll
            for (int i = 0; i < T / LANES; i++) y_s[turn][i][to_y] = out[i];
        }
    };
    int left = stop - first, turn = 0;
    load(left);
#pragma unroll 1
    for (int start = first; left > 0; start += T, left -= T, turn ^= 1) {
        Row this_u[MINE][2], this_z[MINE][2];
        if (OUT) memcpy(this_u, next_u, sizeof this_u), memcpy(this_z, next_z, sizeof this_z);
        store(turn, left);
        load(left - T);
        __syncthreads();
        if (OUT && start > first) emit(turn ^ 1, left + T);
        if (OUT) memcpy(held_u, this_u, sizeof held_u), memcpy(held_z, this_z, sizeof held_z);
        if (OUT && KEEP && start % CHUNK == 0) {
            if (in_c) keep(kept, h, N - lane * S);
            kept += (long long)d * N;
        }
        walk(turn, left);
    }
    if (OUT) {
        __syncthreads();
        emit(turn ^ 1, left + T);
    }
    if (!in_c) return;
    bool final = OUT && stop == length;
    if (OUT && !final && segment > 0) return;  // its end is known
    long long to = (final ? (long long)row : (long long)segment * rows + row) * d + c;
    if (!final && lane == 0) end_steps[to] = total;  // of the first segment 0, which nothing before it is multiplied by
    keep((final ? last : end_states) + to * N + lane * S, h, N - lane * S);
}

#define ARGUMENTS                                                                                                     \
    const real_t *u, const real_t *delta, const float *__restrict__ A, const real_t *B, const real_t *C,              \
        const float *__restrict__ D, const real_t *z, const float *__restrict__ bias, out_t *__restrict__ y,          \
        float *__restrict__ last, float *__restrict__ states, float *__restrict__ end_states,                         \
        float *__restrict__ end_steps, int k, int length, int d, int per, int first, int Bb, int Bk, int Bl, int Bn,  \
        int Cb, int Ck, int Cl, int Cn
#define PASSED(segment)                                                                                         \
    shared, u, delta, A, B, C, D, z, bias, y, last, states, end_states, end_steps, k, length, d, per, segment, \
        {Bb, Bk, Bl, Bn}, {Cb, Ck, Cl, Cn}
#define BOUNDS __launch_bounds__(THREADS, THREADS > 128 ? 3 : 6)

extern "C" __global__ void BOUNDS forward(ARGUMENTS) {
    __shared__ Shared shared;
    scan<true>(PASSED(first + blockIdx.y));
}
extern "C" __global__ void BOUNDS ends(ARGUMENTS) {
    __shared__ Shared shared;
    if (blockIdx.y == 0) scan<true>(PASSED(0));
    else scan<false>(PASSED(blockIdx.y));
}
