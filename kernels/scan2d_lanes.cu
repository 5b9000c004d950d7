// Fused 2D selective scan, forward, for several states; the equation and its letters are in scan2d_reference.py.
//
// As in selective_scan.cu, LANES lanes of a warp share a channel, each with S of its states in registers, and walk a tile of
// T steps from shared memory; sums over states are taken for 16 steps at once. A block scans CHANNELS channels of one sample
// along its routes, one after the other, each added to the sum in y.
//
// Rows of x and projected are copied to shared memory while the tile before is walked, and the pixels that say where they are
// one tile ahead of them. A warp then makes what the lanes walk along, for 16 steps and 8 channels: the tensor cores project
// delta (tf32) so that a thread ends up with two steps of two channels.
//
// Compile-time: T_BF16 or T_FP16 (x's and projected's type), N states, S states of a lane, R ranks, THREADS of a block, BLOCKS of
// a multiprocessor, LOG_A, WHOLE (a route visits every pixel), CUT (routes are cut into segments), KEEP (the states before each
// chunk), and the BYTES of shared memory that a block takes.

constexpr int WIDE = 2, MAPS = R % 4 + N % 4 == 0 ? 4 : R % 2 + N % 2 == 0 && S > 1 ? 2 : 1;  // numbers that are read at once
constexpr bool SOFTPLUS = true;

#include "selective_scan_common.cu"
#include "scan2d_common.cu"
#include "scan2d_segment.cu"

constexpr int LANES = lanes_of(N), STATES = LANES * S;  // the states past N are zeros
constexpr int WARPS = THREADS / 32, PLACES = 32 / LANES, CHANNELS = THREADS / LANES;  // channels of a warp, and of a block
constexpr int PART = 16, SUB = 8;                       // steps that are summed at once; those that are in registers at once
constexpr int PARTS = LANES > 4 ? 2 : 1, T = PARTS * PART;
constexpr int EIGHTS = CHANNELS / 8, UNITS = EIGHTS * PARTS;  // each made by a warp
// A thread copies, and stores, for one step: numbers of projected, in so many bytes at once, 8 channels of x, 4 channels of y
constexpr int PER_STEP = THREADS / T, AT_ONCE = WIDTH % 8 == 0 ? 16 : WIDTH % 4 == 0 ? 8 : 4;
constexpr int COPIES = (2 * WIDTH + AT_ONCE - 1) / AT_ONCE, ROUNDS = (COPIES + PER_STEP - 1) / PER_STEP;
// Of B and C it turns into floats MAPS numbers of every MAP_DOWN-th step; S of B then stand before S of C
constexpr int MAP_ACROSS = 2 * STATES / MAPS, MAP_DOWN = THREADS / MAP_ACROSS, SHARE = (T + MAP_DOWN - 1) / MAP_DOWN;
constexpr int RUN = S < MAPS ? S : MAPS;  // of which so many stay together
constexpr int RANKS = R % 2 ? 1 : 2;      // that are read at once
// Rows in shared memory, so that threads of a warp hardly meet in a bank
constexpr int WORDS = COPIES * AT_ONCE / 4, ROW = 2 * (AT_ONCE == 16 ? WORDS : (WORDS + 1) / 4 * 4 + 2), X_ROW = CHANNELS + 8;
constexpr int MOVE_ROW = CHANNELS + 4, Y_ROW = CHANNELS + 4, Y_SKEW = PLACES > 4 ? PLACES : 4;
// where even channels stand before odd ones, as threads with two of them write
constexpr int ODD = CHANNELS / 2 + 4;
__device__ __forceinline__ int place_of(int channel) { return channel % 2 * ODD + channel / 2; }
__device__ __forceinline__ int y_place(int t) { return t * Y_ROW + t / 8 * Y_SKEW; }  // of step t of a part
static_assert(LANES >= 4 && UNITS <= WARPS && THREADS % MAP_ACROSS == 0, "a column for every thread");
static_assert(PER_STEP * 8 >= CHANNELS && PER_STEP * 4 >= CHANNELS, "a thread for every channel of x and of y");

struct Half {                                      // of tiles by turns
    float4 move[T / 2][MOVE_ROW];                  // of two steps: step size, and what it is times u
    float maps[T][2 * STATES];                     // B and C
    float y[PARTS][PART * Y_ROW + Y_SKEW];
    alignas(16) real_t row[T][ROW];                // of projected
};
struct Quarter {                                   // of tiles by turns
    alignas(16) real_t x[T][X_ROW];
    int pixel[T];
};
struct Shared {
    Half half[2];
    Quarter quarter[4];
    float4 before[THREADS];                        // what other routes left of y
    float4 skip[CHANNELS / 4];                     // D
    float2 weight[KS][EIGHTS][32];                 // dt_proj as the tensor cores take it
    float2 shift[CHANNELS / 2];                    // delta's bias
};
static_assert(sizeof(Shared) == BYTES, "the launch reserves as much");

typedef Pack<RANKS> Ranks;
typedef Pack<4> Four;

// Four numbers to memory, where the compiler does not know that the pointer is one to it
__device__ __forceinline__ void put(float4* to, float4 v) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

// What lies so many bytes after `base`: what threads have in common apart from what they do not spares instructions
template <typename V> __device__ __forceinline__ V& in(const void* base, int bytes) { return *(V*)((char*)base + bytes); }

// `count` of a thread's numbers to memory, side by side where they are all there
__device__ __forceinline__ void keep(float* to, const float (&from)[S], int count) {
    if constexpr (S % 4 == 0 && N % S == 0) {
        if (count > 0) put((float4*)to, make_float4(from[0], from[1], from[2], from[3]));
    } else {
#pragma unroll
        for (int i = 0; i < S; i++) if (i < count) to[i] = from[i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
forward(const real_t* __restrict__ x, const real_t* __restrict__ projected, const float* __restrict__ dt_proj,
        const float* __restrict__ A, const float* __restrict__ D, const float* __restrict__ bias,
        const int* __restrict__ routes, float* y, float* __restrict__ states, const float* __restrict__ end_states,
        const float* __restrict__ end_steps, int p, int k, int all, int d, int share, int per, int rows) {
    extern __shared__ float4 memory[];
    Shared& m = *(Shared*)memory;
    int blocks = (d + CHANNELS - 1) / CHANNELS, c0 = blockIdx.x % blocks * CHANNELS, kw = k * WIDTH;
    long long bi = blockIdx.x / blocks;
    // the channel and states that this thread scans
    int in_warp = threadIdx.x % 32, warp = threadIdx.x / 32, lane = in_warp / PLACES;
    int channel = warp * PLACES + in_warp % PLACES, c = min(c0 + channel, d - 1);
    // the two steps and channels that it makes, and the numbers of B or C
    int eighth = warp / PARTS % EIGHTS, two = warp % PARTS * PART + in_warp / 4 * 2, rank = in_warp % 4 * 2;
    int across = eighth * 8 + rank;
    int is_C = threadIdx.x / (MAP_ACROSS / 2) % 2, n_mine = threadIdx.x % (MAP_ACROSS / 2) * MAPS;
    int map_t = threadIdx.x / MAP_ACROSS, map_in_row = R + is_C * N + min(n_mine, N - MAPS);
    // the step that it copies and stores, and its place there
    int mine = threadIdx.x / PER_STEP, place = threadIdx.x % PER_STEP;
    bool in_x = place * 8 < CHANNELS && c0 + place * 8 < d, in_y = place * 4 < CHANNELS && c0 + place * 4 < d;
    // where its numbers stand in shared memory, in bytes
    int to_x = (mine * X_ROW + place * 8) * 2, to_row = mine * ROW * 2 + place * AT_ONCE;
    int from_x = (two * X_ROW + across) * 2, from_row = (two * ROW + rank) * 2;
    int from_last = (two * ROW + min((KS - 1) * 8 + rank, R - RANKS)) * 2, from_few = (map_t * ROW + map_in_row) * 2;
    int to_move = (two / 2 * MOVE_ROW + place_of(across)) * 16, from_move = place_of(channel) * 16;
    int to_map = (map_t * 2 * STATES + n_mine / S * 2 * S + is_C * S + n_mine % S) * 4, from_map = lane * 2 * S * 4;
    int to_y = (y_place(lane * (PART / LANES)) + channel) * 4;
    int from_y = (mine / PART * (PART * Y_ROW + Y_SKEW) + y_place(mine % PART) + place * 4) * 4;
    hold(to_x), hold(to_row), hold(from_x), hold(from_row), hold(from_last), hold(from_few), hold(to_move), hold(from_move);
    hold(to_map), hold(from_map), hold(to_y), hold(from_y), hold(lane), hold(two), hold(mine), hold(place);
    x = kept_pointer(x + bi * p * d + c0);
    Segment segment(k / share, per, all);
    y = kept_pointer(y + (segment.group * (long long)rows + bi) * p * d + c0);

    for (int turns = 0; turns < share; turns++) {
        int ki = segment.group * share + turns, last = segment.length - 1;
        bool add = turns > 0;
        const int* route = kept_pointer(routes + (long long)ki * all + segment.first);
        const real_t* own = kept_pointer(projected + bi * p * kw + ki * WIDTH);
        long long row = bi * k + ki, chunk = row * ((all + CHUNK - 1) / CHUNK) + segment.first / CHUNK;
        float* kept = kept_pointer(states + (chunk * d + c) * N + lane * S);
        long long stride = (long long)rows * k * d;
        float h[S], rate[S];
#pragma unroll
        for (int s = 0; s < S; s++) {
            int n = lane * S + s;
            rate[s] = n < N ? decay(A[(ki * d + c) * N + n]) * LOG2E : 0.f;
            h[s] = n < N ? entering<true>(segment, end_states, end_steps, row * d + c, stride, n, rate[s]) : 0.f;
        }
        // Whether a pixel's row of projected starts amid a word: it is copied from that word on
        auto amid = [&](int pixel) { return WIDTH % 2 ? (int)((size_t)own / 2 + pixel * kw) & 1 : 0; };
        auto look = [&](unsigned tile) {  // for its pixels; past the end, the last one
            int t = threadIdx.x;
            if (t < T) copy<4>(&m.quarter[tile % 4].pixel[t], route + min((int)tile * T + t, last));
        };
        auto load = [&](unsigned tile) {
            Quarter& quarter = m.quarter[tile % 4];
            int pixel = quarter.pixel[mine];
            if (!WHOLE) pixel = min(pixel, p - 1);
            int odd = amid(pixel);
            if (in_x) copy<16>(&in<real_t>(quarter.x, to_x), x + (unsigned)(pixel * d + place * 8));
            const char* from = (const char*)(own + (unsigned)(pixel * kw)) - odd * 2 + place * AT_ONCE;
            char* to = &in<char>(m.half[tile % 2].row, to_row);
#pragma unroll
            for (int i = 0; i < ROUNDS; i++) {
                if ((i + 1) * PER_STEP > COPIES && i * PER_STEP + place >= COPIES) break;
                int there = WIDTH % 2 && !odd && i * PER_STEP + place == COPIES - 1 ? 2 : AT_ONCE;  // it may be memory's last
                copy<AT_ONCE>(to + i * PER_STEP * AT_ONCE, from + i * PER_STEP * AT_ONCE, there);
            }
        };
        auto make = [&](unsigned tile, int left) {  // what the lanes walk along
            Half& half = m.half[tile % 2];
            Quarter& quarter = m.quarter[tile % 4];
            if (UNITS == WARPS || warp < UNITS) {
                float raw[4] = {}, moves[2][2][WIDE];
                int pixels[2] = {}, odd[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    if (!WHOLE || WIDTH % 2) pixels[j] = quarter.pixel[two + j];
                    odd[j] = amid(min(pixels[j], p - 1));
                }
#pragma unroll
                for (int ks = 0; ks < KS; ks++) {  // rows of the product are the even steps, then the odd ones
                    float2 w = m.weight[ks][eighth][in_warp];
                    float f[2][2];
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const real_t* row = half.row[j] + odd[j];
                        Ranks one = ks < KS - 1 ? in<Ranks>(row + ks * 8, from_row) : in<Ranks>(row, from_last);
                        f[j][0] = one.at(0), f[j][1] = one.at(RANKS - 1);
                        if (RANKS == 1) f[j][1] = ks * 8 + rank + 1 < R ? real(in<real_t>(row + ks * 8 + 1, from_row)) : 0.f;
                    }
                    mma(raw, make_float4(f[0][0], f[1][0], f[0][1], f[1][1]), __float_as_uint(w.x), __float_as_uint(w.y));
                }
                float2 shift = m.shift[across / 2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    bool gap = !WHOLE && pixels[j] == p;
                    Row u = in<Row>(quarter.x[j], from_x);
#pragma unroll
                    for (int w = 0; w < WIDE; w++) {
                        float step = softplus((gap ? 0.f : raw[2 * j + w]) + (w ? shift.y : shift.x));
                        step = two + j < left ? step : 0.f;  // no step past the end
                        moves[j][0][w] = step, moves[j][1][w] = gap ? 0.f : step * u.at(w);
                    }
                }
#pragma unroll
                for (int w = 0; w < WIDE; w++) {
                    in<float4>(half.move[0] + w * ODD, to_move) =
                        make_float4(moves[0][0][w], moves[0][1][w], moves[1][0][w], moves[1][1][w]);
                }
            }
#pragma unroll
            for (int i = 0; i < SHARE; i++) {
                if (T % MAP_DOWN && i * MAP_DOWN + map_t >= T) break;
                int pixel = WHOLE && WIDTH % 2 == 0 ? 0 : quarter.pixel[i * MAP_DOWN + map_t];
                bool gap = !WHOLE && pixel == p;
                Few few = in<Few>(half.row[i * MAP_DOWN] + amid(min(pixel, p - 1)), from_few);
#pragma unroll
                for (int e = 0; e < MAPS; e += RUN) {
                    float v[RUN];
#pragma unroll
                    for (int r = 0; r < RUN; r++) v[r] = n_mine + e + r < N && !gap ? few.at(e + r) : 0.f;
                    const float* to = half.maps[i * MAP_DOWN] + e / S * 2 * S;
                    if constexpr (RUN == 4) in<float4>(to, to_map) = make_float4(v[0], v[1], v[2], v[3]);
                    else if constexpr (RUN == 2) in<float2>(to, to_map) = make_float2(v[0], v[1]);
                    else in<float>(to, to_map) = v[0];
                }
            }
        };
        int pixel = 0;  // of the step that this thread stores
        auto emit = [&](unsigned tile, int left) {  // y of a tile that is done
            if (!in_y || mine >= left || (!WHOLE && pixel == p)) return;
            float4 out = in<float4>(m.half[tile % 2].y, from_y), skip = m.skip[place];
            Four u = in<Four>(m.quarter[tile % 4].x, to_x - place * 8);
            out.x += skip.x * u.at(0), out.y += skip.y * u.at(1), out.z += skip.z * u.at(2), out.w += skip.w * u.at(3);
            if (add) {
                float4 sum = m.before[threadIdx.x];
                out.x += sum.x, out.y += sum.y, out.z += sum.z, out.w += sum.w;
            }
            put((float4*)(y + (unsigned)(pixel * d + place * 4)), out);
        };
        auto walk = [&](unsigned tile, int left) {
            Half& half = m.half[tile % 2];
#pragma unroll 1
            for (int part = 0; part < PARTS && part * PART < left; part++) {
                float out[PART];
#pragma unroll
                for (int sub = 0; sub < PART; sub += SUB) {
                    float a[SUB][S], gain[SUB][S], C[SUB][S];
#pragma unroll
                    for (int j = 0; j < SUB; j++) {
                        int t = part * PART + sub + j;
                        float4 pair = in<float4>(half.move[part * (PART / 2) + (sub + j) / 2], from_move);
                        float step = j % 2 ? pair.z : pair.x, push = j % 2 ? pair.w : pair.y, bc[2 * S];
                        read(bc, &in<float>(half.maps[t], from_map));
#pragma unroll
                        for (int s = 0; s < S; s++) {
                            a[j][s] = power2(step * rate[s]), gain[j][s] = push * bc[s], C[j][s] = bc[S + s];
                        }
                    }
#pragma unroll
                    for (int j = 0; j < SUB; j++) {
#pragma unroll
                        for (int s = 0; s < S; s++) {
                            h[s] = a[j][s] * h[s] + gain[j][s];
                            out[sub + j] = s ? out[sub + j] + h[s] * C[j][s] : h[s] * C[j][s];
                        }
                    }
                }
                // after all steps: exchanges between lanes would hold up what follows them
                sums<PART, LANES>(out, lane, PLACES);
#pragma unroll
                for (int i = 0; i < PART / LANES; i++) in<float>(half.y[part] + i * Y_ROW, to_y) = out[i];
            }
        };
        __syncthreads();  // the last route is done with shared memory, and what it left in y can be read
        for (int tile = 0; tile < 3; tile++) look(tile);
        for (int i = threadIdx.x; i < KS * EIGHTS * 32; i += THREADS) {
            int l = i % 32, r = c0 + i / 32 % EIGHTS * 8 + l / 4, q = i / 32 / EIGHTS * 8 + l % 4 * 2;
            const float* from = dt_proj + ((long long)ki * d + r) * R + q;
            auto w = [&](int j) { return r < d && q + j < R ? __uint_as_float(tf32(from[j])) : 0.f; };
            m.weight[i / 32 / EIGHTS][i / 32 % EIGHTS][l] = make_float2(w(0), w(1));
        }
        for (int i = threadIdx.x; i < CHANNELS; i += THREADS) {
            ((float*)m.skip)[i] = D[ki * d + min(c0 + i, d - 1)], ((float*)m.shift)[i] = bias[ki * d + min(c0 + i, d - 1)];
        }
        wait_for_all();
        __syncthreads();
        load(0);
        load(1);
        wait_for_all();
        __syncthreads();
        int left = segment.length;
        unsigned tile = 0;
#pragma unroll 1
        for (; left > 0; tile++, left -= T) {
            make(tile, left);
            wait_for_all();  // for what the next tile is made of
            __syncthreads();
            if (tile > 0) emit(tile - 1, left + T);
            pixel = m.quarter[tile % 4].pixel[mine];
            load(tile + 2);
            look(tile + 3);
            if (add && in_y) copy<16>(&m.before[threadIdx.x], y + (unsigned)(min(pixel, p - 1) * d + place * 4));
            if (KEEP && tile % (CHUNK / T) == 0) {
                if (c0 + channel < d) keep(kept, h, N - lane * S);
                kept += (long long)d * N;
            }
            walk(tile, left);
        }
        wait_for_all();
        __syncthreads();
        emit(tile - 1, left + T);
    }
}
