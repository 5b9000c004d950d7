// Fused 2D selective scan, forward and backward; the equation and its letters are in scan2d_reference.py.
//
// A block scans 32 channels of one sample along its routes, one after the other, each added to the sum in y. It walks
// in tiles of 64 steps: a warp holds 8 steps, a lane one channel, so every row of channels is one coalesced access and
// a warp's recurrence stays in a lane's registers. Warps are chained through shared memory, with one barrier per
// tile and state. Delta is projected by the tensor cores (tf32). What a tile needs is loaded one tile ahead.
// The backward walks from the end: it runs a tile again from the state kept before it, and the adjoint the other way.
//
// Compile-time: T_BF16 or T_FP16 (the inputs' type), N states, R ranks, LOG_A, WHOLE (a route visits every pixel), CUT (routes
// are cut into segments), blocks per multiprocessor, and the bytes of shared memory that a block takes.

#include "scan2d_common.cu"
#include "scan2d_segment.cu"
#include "scan2d_warp.cu"

constexpr int TILE = WARPS * STEPS;

// What a warp loads of its 8 steps' projections, as it comes from memory
struct Loaded {
    u16 factor[2 * KS], bc[(STEPS * 2 * N + 31) / 32];
};

// Lane j holds of step j % 8 the pixel
__device__ __forceinline__ int pixel_at(const int* route, int at, int length, int p) {
    return pixel_of(route, at + (threadIdx.x & 7), length, p);
}

// Rows of projected for a warp's steps; where there is no pixel, those of pixel 0.
__device__ __forceinline__ void load(Loaded& to, const u16* own, int pixel, int p, int kw) {
    int lane = threadIdx.x & 31;
    unsigned row = (pixel < p ? pixel : 0) * kw * 2;
    load_factors(to.factor, own, row);
#pragma unroll
    for (int i = 0; i * 32 < STEPS * 2 * N; i++) {
        int v = i * 32 + lane;
        to.bc[i] = fetch(own, __shfl_sync(ALL, row, v / (2 * N) % STEPS) + (R + v % (2 * N)) * 2);
    }
}

// Rows of 32 channels for a warp's steps, from a map to shared memory, without waiting; `room` channels are there.
// Zeros where there is no pixel or channel.
template <typename V> __device__ __forceinline__ void fetch_rows(V (*to)[32], const V* map, int pixel, int p, int d,
                                                                 int room) {
    constexpr int EACH = 16 / sizeof(V), CHUNKS = 32 / EACH;
#pragma unroll
    for (int i = 0; i < STEPS * CHUNKS / 32; i++) {
        int v = i * 32 + (threadIdx.x & 31), j = v / CHUNKS, q = v % CHUNKS * EACH, at = __shfl_sync(ALL, pixel, j);
        bool there = at < p && q < room;
        copy_16(&to[j][q], map + (there ? at * d + q : 0), there);
    }
}

// The rows in shared memory to their pixels of a map.
__device__ __forceinline__ void store_rows(float* map, float (*rows)[32], int pixel, int p, int d, int room) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < STEPS / 4; i++) {
        int v = i * 32 + (threadIdx.x & 31), j = v / 8, q = v % 8 * 4, at = __shfl_sync(ALL, pixel, j);
        if (at < p && q < room) *(float4*)(map + at * d + q) = *(float4*)&rows[j][q];
    }
    __syncwarp();
}

struct Forward {                      // shared memory
    float4 weight[KS][2][32];         // dt_proj as the tensor cores take it
    float raw[WARPS][STEPS * RAW];    // projected delta: step, channel
    float bc[WARPS][STEPS * 2 * N];   // B and C of each step, in pairs
    float2 chain[2][WARPS][32];       // each warp's map h -> x h + y
    float carry[2][N][32];            // the state before a tile
    u16 x[WARPS][STEPS][32];
    float y[WARPS][STEPS][32];
};
static_assert(sizeof(Forward) == FORWARD_BYTES, "the launch reserves as much");

extern "C" __global__ void __launch_bounds__(256, FORWARD_BLOCKS)
forward(const u16* __restrict__ x, const u16* __restrict__ projected, const float* __restrict__ dt_proj,
        const float* __restrict__ A, const float* __restrict__ D, const float* __restrict__ bias,
        const int* __restrict__ routes, float* y, float* __restrict__ states, const float* __restrict__ end_states,
        const float* __restrict__ end_steps, int p, int k, int all, int d, int share, int per, int rows) {
    extern __shared__ float4 memory[];
    Forward& m = *(Forward*)memory;

    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int blocks = (d + 31) / 32, c0 = blockIdx.x % blocks * 32, c = min(c0 + lane, d - 1);
    long long bi = blockIdx.x / blocks;
    bool in_c = c0 + lane < d;
    int kw = k * WIDTH, room = d - c0;
    Segment segment(k / share, per, all);
    int length = segment.length;
    x = kept_pointer(x + bi * p * d + c0);
    y = kept_pointer(y + (segment.group * (long long)rows + bi) * p * d + c0);
    projected += bi * p * kw;

    for (int turn = 0; turn < share; turn++) {
        int ki = segment.group * share + turn;
        const int* route = routes + (long long)ki * all + segment.first;
        const u16* own = kept_pointer(projected + ki * WIDTH);
        long long row = bi * k + ki;
        float* kept = kept_pointer(states + ((row * ((all + TILE - 1) / TILE) + segment.first / TILE) * d + c) * N);
        float skip = D[ki * d + c], shift = bias[ki * d + c], rate = decay(A[(ki * d + c) * N]) * LOG2E;
        bool add = turn > 0 || !WHOLE;
        __syncthreads();  // the last route is done with shared memory
        load_weights(m.weight, dt_proj + (long long)ki * d * R, c0, d);
        for (int n = warp; n < N; n += WARPS) {
            float by = decay(A[(ki * d + c) * N + n]) * LOG2E;
            m.carry[0][n][lane] = entering<true>(segment, end_states, end_steps, row * d + c, (long long)rows * k * d, n, by);
        }
        Loaded next;
        int pixel = pixel_at(route, warp * STEPS, length, p);
        load(next, own, pixel, p, kw);
        fetch_rows(m.x[warp], x, pixel, p, d, room);
        fetched();
        if (add) fetch_rows(m.y[warp], (const float*)y, pixel, p, d, room);
        fetched();
        int ahead = pixel_at(route, TILE + warp * STEPS, length, p);
        __syncthreads();

        int turns = 0, tile = 0;  // barriers passed, tiles done
#pragma unroll 1
        for (int start = 0; start < length; start += TILE, tile++) {
            int at = start + warp * STEPS, here = pixel;
            float u[STEPS], step[STEPS], out[STEPS];
            wait_for_older();
#pragma unroll
            for (int j = 0; j < STEPS; j++) u[j] = real(m.x[warp][j][lane]);
            __syncwarp();
            Projection projection(m.weight, next.factor);
#pragma unroll
            for (int i = 0; i * 32 < STEPS * 2 * N; i++) {
                int v = i * 32 + lane, of = v % (2 * N);  // pairs of B and C
                if (v < STEPS * 2 * N) m.bc[warp][v / (2 * N) * 2 * N + of % N * 2 + of / N] = real(next.bc[i]);
            }
            projection.store(m.raw[warp]);
            pixel = ahead;
            load(next, own, pixel, p, kw);
            fetch_rows(m.x[warp], x, pixel, p, d, room);
            fetched();
            ahead = pixel_at(route, at + 2 * TILE, length, p);
            __syncwarp();
            unsigned there = WHOLE ? ALL : __ballot_sync(ALL, here < p);  // steps with a pixel
#pragma unroll
            for (int j = 0; j < STEPS; j++) {
                float raw = (WHOLE || there >> j & 1 ? m.raw[warp][j * RAW + lane] : 0.f) + shift;
                step[j] = softplus(at + j < length ? raw : -1e30f);  // no step past the end
                out[j] = u[j] * skip;
                u[j] *= step[j];
            }
#pragma unroll 1
            for (int n = 0; n < N; n++, turns++) {
                if (N > 1) rate = decay(A[(ki * d + c) * N + n]) * LOG2E;
                float a[STEPS], C[STEPS], gain[STEPS], product = 1, sum = 0;
#pragma unroll
                for (int j = 0; j < STEPS; j++) {
                    float2 bc = *(float2*)&m.bc[warp][(j * N + n) * 2];
                    a[j] = power2(step[j] * rate);
                    gain[j] = u[j] * bc.x;
                    C[j] = bc.y;
                }
#pragma unroll
                for (int j = 0; j < STEPS; j++) {
                    product *= a[j];
                    sum = a[j] * sum + gain[j];
                }
                m.chain[turns & 1][warp][lane] = make_float2(product, sum);
                __syncthreads();
                float h = m.carry[tile & 1][n][lane];
                if (warp == 0 && in_c) kept[n] = h;
                float2 map[WARPS - 1];
#pragma unroll
                for (int w = 0; w < WARPS - 1; w++) map[w] = m.chain[turns & 1][w][lane];
#pragma unroll
                for (int w = 0; w < WARPS - 1; w++) h = w < warp ? map[w].x * h + map[w].y : h;
                if (warp == WARPS - 1) m.carry[~tile & 1][n][lane] = product * h + sum;
#pragma unroll
                for (int j = 0; j < STEPS; j++) {
                    h = a[j] * h + gain[j];
                    out[j] += h * C[j];
                }
            }
            kept += d * N;
            wait_for_older();
#pragma unroll
            for (int j = 0; j < STEPS; j++) m.y[warp][j][lane] = add ? m.y[warp][j][lane] + out[j] : out[j];
            store_rows(y, m.y[warp], here, p, d, room);
            if (add) fetch_rows(m.y[warp], (const float*)y, pixel, p, d, room);
            fetched();
        }
    }
}

constexpr int TILES_W = 2 * KS, GROUPS_W = TILES_W < 8 ? 8 / TILES_W : 1, MORE_W = (TILES_W + 7) / 8;  // of dt_proj's gradient
constexpr int MT = (R + 15) / 16, ROW_F = 8 * KS + 2;  // tiles of 16 ranks; a row of factors in shared memory

struct Backward {                            // shared memory
    float4 weight[KS][2][32];                    // dt_proj as the tensor cores take it: channels x ranks
    float4 back[MT][4][32];                      // the same as ranks x channels
    float raw[WARPS][STEPS * RAW];               // projected delta: step, channel
    float draw[WARPS][STEPS * RAW];              // its gradient
    u16 factor[2][TILE][ROW_F];                  // delta's factor: step, rank
    float bc[WARPS][STEPS * 2 * N];              // B and C of each step, in pairs
    float2 ahead[2][WARPS][32];                  // each warp's map of h
    float behind[2][WARPS][32];                  // and the constant of its map of the adjoint
    float carry[2][N][32];                       // the adjoint after a tile
    float dA[WARPS][N][32];
    float sum[2][WARPS][32];
    u16 x[WARPS][STEPS][32];
    float dy[WARPS][STEPS][32];
    float dx[WARPS][STEPS][32];
};

static_assert(sizeof(Backward) == BACKWARD_BYTES, "the launch reserves as much");

extern "C" __global__ void __launch_bounds__(256, BACKWARD_BLOCKS)
backward(const float* __restrict__ dy, const float* __restrict__ states, const u16* __restrict__ x,
         const u16* __restrict__ projected, const float* __restrict__ dt_proj, const float* __restrict__ A,
         const float* __restrict__ D, const float* __restrict__ bias, const int* __restrict__ routes,
         float* dx, float* __restrict__ dprojected, float* __restrict__ ddt_proj, float* __restrict__ dA,
         float* __restrict__ dD, float* __restrict__ dbias, const float* __restrict__ end_states,
         const float* __restrict__ end_steps, int p, int k, int all, int d, int share, int per, int rows) {
    extern __shared__ float4 memory[];
    Backward& m = *(Backward*)memory;

    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int blocks = (d + 31) / 32, block = blockIdx.x % blocks, c0 = block * 32, c = min(c0 + lane, d - 1);
    long long bi = blockIdx.x / blocks;
    bool in_c = c0 + lane < d;
    Segment segment(k / share, per, all);
    int kw = k * WIDTH, room = d - c0, length = segment.length, tiles = (length + TILE - 1) / TILE;
    x = kept_pointer(x + bi * p * d + c0);
    dy = kept_pointer(dy + bi * p * d + c0);
    dx = kept_pointer(dx + (segment.group * (long long)rows + bi) * p * d + c0);
    projected += bi * p * kw;

    for (int turn = 0; turn < share; turn++) {
        int ki = segment.group * share + turn;
        const int* route = routes + (long long)ki * all + segment.first;
        const u16* own = kept_pointer(projected + ki * WIDTH);
        float* down = kept_pointer(dprojected + (block * (long long)rows + bi) * p * kw + ki * WIDTH);
        long long row = bi * k + ki, last_kept = row * ((all + TILE - 1) / TILE) + segment.first / TILE + tiles - 1;
        const float* kept = kept_pointer(states + (last_kept * d + c) * N);
        float skip = D[ki * d + c], shift = bias[ki * d + c], rate = decay(A[(ki * d + c) * N]);
        float sum_A = 0, sum_D = 0, sum_bias = 0, sum_W[MORE_W][4] = {};
        bool add = turn > 0 || !WHOLE;
        __syncthreads();  // the last route is done with shared memory
        const float* weight = dt_proj + (long long)ki * d * R;
        load_weights(m.weight, weight, c0, d);
        for (int i = threadIdx.x; i < MT * 128; i += 256) {
            int l = i & 31, ks = i >> 5 & 3, mt = i >> 7, rank = mt * 16 + (l >> 2), row = c0 + ks * 8 + (l & 3);
            auto w = [&](int r, int q) { return weight_at(weight, r, q, d); };
            m.back[mt][ks][l] = make_float4(w(row, rank), w(row, rank + 8), w(row + 4, rank), w(row + 4, rank + 8));
        }
        for (int n = warp; n < N; n += WARPS) {
            float by = decay(A[(ki * d + c) * N + n]) * LOG2E;
            m.carry[0][n][lane] = entering<false>(segment, end_states, end_steps, row * d + c, (long long)rows * k * d, n, by);
        }
        for (int n = 0; n < N; n++) m.dA[warp][n][lane] = 0;
        int last = (tiles - 1) * TILE + warp * STEPS;
        Loaded next;
        int pixel = pixel_at(route, last, length, p);
        load(next, own, pixel, p, kw);
        fetch_rows(m.x[warp], x, pixel, p, d, room);
        fetch_rows(m.dy[warp], dy, pixel, p, d, room);
        fetched();
        if (add) fetch_rows(m.dx[warp], (const float*)dx, pixel, p, d, room);
        fetched();
        int ahead = tiles > 1 ? pixel_at(route, last - TILE, length, p) : p;
        __syncthreads();

        int turns = 0;  // barriers passed
#pragma unroll 1
        for (int tile = 0; tile < tiles; tile++) {
            int start = (tiles - 1 - tile) * TILE, at = start + warp * STEPS, here = pixel;
            unsigned there = __ballot_sync(ALL, here < p);  // steps with a pixel
            float u[STEPS], g[STEPS], du[STEPS], step[STEPS], d_step[STEPS];
            wait_for_older();
#pragma unroll
            for (int j = 0; j < STEPS; j++) {
                u[j] = real(m.x[warp][j][lane]);
                g[j] = m.dy[warp][j][lane];
            }
            __syncwarp();
            u16* factor = &m.factor[tile & 1][warp * STEPS + (lane >> 2)][lane & 3];
            bool mine = there >> (lane >> 2) & 1;
#pragma unroll
            for (int i = 0; i < 2 * KS; i++) factor[i * 4] = next.factor[i] = WHOLE || mine ? next.factor[i] : u16(0);
            Projection projection(m.weight, next.factor);
#pragma unroll
            for (int i = 0; i * 32 < STEPS * 2 * N; i++) {
                int v = i * 32 + lane, of = v % (2 * N);  // pairs of B and C
                if (v < STEPS * 2 * N) m.bc[warp][v / (2 * N) * 2 * N + of % N * 2 + of / N] = real(next.bc[i]);
            }
            projection.store(m.raw[warp]);
            pixel = ahead;
            load(next, own, pixel, p, kw);
            fetch_rows(m.x[warp], x, pixel, p, d, room);
            fetch_rows(m.dy[warp], dy, pixel, p, d, room);
            fetched();
            ahead = at >= 2 * TILE ? pixel_at(route, at - 2 * TILE, length, p) : p;
            __syncwarp();
#pragma unroll
            for (int j = 0; j < STEPS; j++) {
                float raw = m.raw[warp][j * RAW + lane] + shift;
                step[j] = softplus(at + j < length ? raw : -1e30f);  // no step past the end
                sum_D += g[j] * u[j];
                du[j] = g[j] * skip;
                d_step[j] = 0;
            }
#pragma unroll 1
            for (int n = 0; n < N; n++, turns++) {
                if (N > 1) rate = decay(A[(ki * d + c) * N + n]);
                float h = in_c ? kept[n] : 0.f;
                float a[STEPS], gain[STEPS], direct[STEPS], product = 1, sum = 0, later = 0, dBC[2 * STEPS];
#pragma unroll
                for (int j = 0; j < STEPS; j++) {
                    float2 bc = *(float2*)&m.bc[warp][(j * N + n) * 2];
                    a[j] = power2(step[j] * rate * LOG2E);
                    gain[j] = step[j] * u[j] * bc.x;
                    direct[j] = g[j] * bc.y;
                }
#pragma unroll
                for (int j = 0; j < STEPS; j++) {
                    product *= a[j];
                    sum = a[j] * sum + gain[j];
                }
#pragma unroll
                for (int j = STEPS - 1; j >= 0; j--) later = a[j] * (direct[j] + later);
                m.ahead[turns & 1][warp][lane] = make_float2(product, sum);
                m.behind[turns & 1][warp][lane] = later;
                __syncthreads();
                float after = m.carry[tile & 1][n][lane];
#pragma unroll
                for (int v = 0; v < WARPS; v++) {  // warps before this one, forwards, and those after it, backwards
                    float2 map = m.ahead[turns & 1][v][lane];
                    h = v < warp ? map.x * h + map.y : h;
                }
#pragma unroll
                for (int v = WARPS - 1; v > 0; v--) {
                    float by = m.ahead[turns & 1][v][lane].x, plus = m.behind[turns & 1][v][lane];
                    after = v > warp ? by * after + plus : after;
                }
                if (warp == 0) m.carry[~tile & 1][n][lane] = product * after + later;
                float past[STEPS];
#pragma unroll
                for (int j = 0; j < STEPS; j++) {
                    past[j] = a[j] * h;  // a[t] h[t-1]
                    h = past[j] + gain[j];
                    dBC[2 * j + 1] = h * g[j];
                }
                float part_A = 0;
#pragma unroll
                for (int j = STEPS - 1; j >= 0; j--) {
                    float dh = direct[j] + after, d_log = dh * past[j];
                    float d_push = dh * m.bc[warp][(j * N + n) * 2];
                    after = a[j] * dh;
                    part_A += d_log * step[j];
                    d_step[j] += d_log * rate + d_push * u[j];
                    du[j] += step[j] * d_push;
                    dBC[2 * j] = dh * step[j] * u[j];
                }
                if (N > 1) m.dA[warp][n][lane] += part_A; else sum_A += part_A;
                sums<2 * STEPS, 32>(dBC, lane, 1);  // lane l ends up with the sum of dBC[l / 2]
                int j = lane >> 2, to = __shfl_sync(ALL, here, j);
                if (!(lane & 1) && at + j < length && to < p) down[(long long)to * kw + R + (lane >> 1 & 1) * N + n] = dBC[0];
            }
            kept -= d * N;
            wait_for_older();
#pragma unroll
            for (int j = 0; j < STEPS; j++) {
                float d_raw = d_step[j] * slope_at(step[j]);
                sum_bias += d_raw;
                m.draw[warp][j * RAW + lane] = in_c ? d_raw : 0.f;
                m.dx[warp][j][lane] = add ? m.dx[warp][j][lane] + du[j] : du[j];
            }
            store_rows(dx, m.dx[warp], here, p, d, room);
            if (add) fetch_rows(m.dx[warp], (const float*)dx, pixel, p, d, room);
            fetched();
            __syncthreads();
            unsigned b[4][2];
#pragma unroll
            for (int ks = 0; ks < 4; ks++) {
                float* of = m.draw[warp] + (lane >> 2) * RAW + ks * 8 + (lane & 3);
                b[ks][0] = tf32(of[0]);
                b[ks][1] = tf32(of[4]);
            }
            int first = (lane & 3) * 2, row0 = __shfl_sync(ALL, here, first), row1 = __shfl_sync(ALL, here, first + 1);
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
                float f[4] = {};
#pragma unroll
                for (int ks = 0; ks < 4; ks++) mma(f, m.back[mt][ks][lane], b[ks][0], b[ks][1]);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int rank = mt * 16 + (lane >> 2) + i / 2 * 8, row = i & 1 ? row1 : row0;
                    if (rank < R && row < p && at + first + (i & 1) < length) down[(long long)row * kw + rank] = f[i];
                }
            }
#pragma unroll
            for (int more = 0; more < MORE_W; more++) {
                int item = TILES_W < 8 ? warp % TILES_W : warp + more * 8, group = TILES_W < 8 ? warp / TILES_W : 0;
                if (item < TILES_W && group < GROUPS_W) {
                    int half = item & 1, rank = (item >> 1) * 8 + (lane >> 2);
#pragma unroll
                    for (int i = 0; i < 8 / GROUPS_W; i++) {
                        int v = group * (8 / GROUPS_W) + i;  // the steps of warp v
                        float* of = m.draw[v] + (lane & 3) * RAW + half * 16 + (lane >> 2);
                        float4 a = make_float4(of[0], of[8], of[4 * RAW], of[4 * RAW + 8]);
                        a.x = __uint_as_float(tf32(a.x)), a.y = __uint_as_float(tf32(a.y));
                        a.z = __uint_as_float(tf32(a.z)), a.w = __uint_as_float(tf32(a.w));
                        const u16* f = &m.factor[tile & 1][v * STEPS + (lane & 3)][rank];
                        mma(sum_W[more], a, __float_as_uint(real(f[0])), __float_as_uint(real(f[4 * ROW_F])));
                    }
                }
            }
        }
        long long part = (segment.at * (long long)rows + bi) * k + ki, at = part * d;
#pragma unroll
        for (int more = 0; more < MORE_W; more++) {
            int item = TILES_W < 8 ? warp % TILES_W : warp + more * 8, group = TILES_W < 8 ? warp / TILES_W : 0;
            if (item < TILES_W && group < GROUPS_W) {
                float* to = ddt_proj + (part * GROUPS_W + group) * d * R;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int row = c0 + (item & 1) * 16 + (lane >> 2) + i / 2 * 8, rank = (item >> 1) * 8 + (lane & 3) * 2 + (i & 1);
                    if (row < d && rank < R) to[(long long)row * R + rank] = sum_W[more][i];
                }
            }
        }
        if (N == 1) m.dA[warp][0][lane] = sum_A;
        m.sum[0][warp][lane] = sum_D;
        m.sum[1][warp][lane] = sum_bias;
        __syncthreads();
        for (int n = warp; n < N + 2; n += WARPS) {
            float total = 0;
            for (int v = 0; v < WARPS; v++) total += n < N ? m.dA[v][n][lane] : m.sum[n - N][v][lane];
            if (in_c) (n < N ? dA[(at + c) * N + n] : n == N ? dD[at + c] : dbias[at + c]) = total;
        }
    }
}
