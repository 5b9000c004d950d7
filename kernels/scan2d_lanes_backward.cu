// Fused 2D selective scan, backward, for several states: lanes share states. The equation and its letters are in
// scan2d_reference.py.
//
// LANES lanes of a warp share a channel, each with S of its states in registers. A block works on CHANNELS channels of one
// sample along a route, then on the next such channels, `span` times in all, then along its next route; what it has for a pixel
// it adds to what it left there. It goes from the route's last tile of 64 steps to the first. Each starts from the state that
// the forward kept: the block finds the states before each part of 8 steps, and takes the parts from the last to the first.
// Sums over states are taken for several steps at once, so that each exchange between lanes halves the number of values.
//
// The tensor cores (tf32) project delta, take its gradient back, and sum the gradients of B and C over a warp's channels: lane
// 4g + q holds what they want of row g and column q where channels lie side by side in q. What the next tile needs is copied,
// without waiting, into the rows that this one is done with. Nothing is atomic.
//
// Compile-time: T_BF16 or T_FP16 (the inputs' type), N states, R ranks, S states of a lane, WHOLE (a route visits every pixel),
// LOG_A, CUT (routes are cut into segments), SPANS (a block takes several groups of channels), THREADS of a block, BYTES of
// shared memory.

constexpr int WIDE = 1, MAPS = 1;  // of what is included, not used here
constexpr bool SOFTPLUS = true;

#include "selective_scan_common.cu"
#include "scan2d_common.cu"
#include "scan2d_segment.cu"

constexpr int PART = 8, PARTS = CHUNK / PART;  // steps
constexpr int LANES = lanes_of(N), STATES = LANES * S;  // the states past N are zeros
constexpr int WARPS = THREADS / 32, PLACES = 32 / LANES, CHANNELS = WARPS * PLACES;  // channels of a warp, and of a block
constexpr int BESIDE = PLACES < 4 ? PLACES : 4;  // channels in lanes that are side by side; then come the lanes of a channel
constexpr int EACH = PART > LANES ? PART / LANES : 1;   // steps whose gradients of u and delta a lane ends up with,
constexpr int TWINS = LANES > PART ? LANES / PART : 1;  // and lanes that end up with the same
constexpr int SUMS = (PART * 2 * STATES + THREADS - 1) / THREADS;  // of a part over channels, for a thread
// A product that sums over channels takes TURN steps, in 8 columns. A lane's q is one of 4 channels; where a warp has 8, a step
// has a column for either 4, and where it has 2, q is also one of 2 lanes of states, with a column for either. The tensor cores
// cut the last 13 bits of states and their gradients; on average that is made up for by the other factor, UNCUT times as large.
constexpr int COLUMNS = PLACES == 4 ? 1 : 2, TURN = 8 / COLUMNS, PAIRS = (S + 1) / 2;
constexpr float UNCUT = 1 + 0.72f / 2048;
constexpr int HALVES = CHANNELS / 16, TILES_W = HALVES * KS, MORE_W = (TILES_W + WARPS - 1) / WARPS;  // of dt_proj's gradient
constexpr int UNIT = WIDTH % 8 == 0 ? 16 : WIDTH % 4 == 0 ? 8 : WIDTH % 2 == 0 ? 4 : 2;  // bytes of a row copied at once
constexpr int ROW = CHANNELS + 2, ROW_F = 8 * KS + 2, ROW_W = CHANNELS + 8, ROW_D = 2 * STATES + 1;  // without bank conflicts
static_assert(LANES >= 4 && LANES <= 16 && CHANNELS % 16 == 0, "as the products take them");

struct alignas(16) Backward {              // shared memory
    float2 move[CHUNK][ROW];               // delta and delta u; then the gradients of raw delta (tf32) and of u
    float maps[CHUNK][2 * STATES];         // B and C
    float dy[CHUNK][CHANNELS];
    u16 x[CHUNK][CHANNELS];
    u16 rows[CHUNK][WIDTH];                // of projected
    float before[PARTS - 1][S][THREADS];   // states before each part but the last
    float weight[8 * KS][ROW_W];           // dt_proj
    float shift[CHANNELS];
    float d_maps[2][WARPS][PART][ROW_D];   // gradients of B and C from a warp's channels
    u16 factor[CHUNK][ROW_F];
    int pixel[2][CHUNK];
};
static_assert(sizeof(Backward) == BYTES, "the launch reserves as much");

#include "scan2d_backward_tile.cu"

extern "C" __global__ void __launch_bounds__(THREADS, THREADS <= 128 ? 3 : 1)
backward(const float* __restrict__ dy, const float* __restrict__ states, const u16* __restrict__ x,
         const u16* __restrict__ projected, const float* __restrict__ dt_proj, const float* __restrict__ A,
         const float* __restrict__ D, const float* __restrict__ bias, const int* __restrict__ routes,
         float* dx, float* __restrict__ dprojected, float* __restrict__ ddt_proj, float* __restrict__ dA,
         float* __restrict__ dD, float* __restrict__ dbias, const float* __restrict__ end_states,
         const float* __restrict__ end_steps, int p, int k, int all, int d, int share, int span, int per, int rows) {
    extern __shared__ float4 memory[];
    Backward& m = *(Backward*)memory;
    int l = threadIdx.x % 32, warp = threadIdx.x / 32, g = l / 4, q = l % 4;
    int lane = l / BESIDE % LANES, place = l % BESIDE + (PLACES == 8 ? l / 16 * 4 : 0), channel = warp * PLACES + place;
    // The channel that a lane has of the other factor in a sum over channels, and whether it is in the lane's column
    int beside = warp * PLACES + (PLACES == 8 ? q + g % 2 * 4 : q % PLACES);
    bool counts = PLACES >= 4 || q / 2 == g % 2;
    Segment segment(k / share, per, all);
    int kw = k * WIDTH, blocks = (d + CHANNELS * span - 1) / (CHANNELS * span), block = blockIdx.x % blocks;
    int length = segment.length, tiles = (length + CHUNK - 1) / CHUNK;
    long long bi = blockIdx.x / blocks, part_of = segment.group * (long long)rows + bi;

#pragma unroll 1
    for (int turn = 0; turn < share * span; turn++) {  // routes, and of each `span` groups of channels
        int ki = segment.group * share + turn / span, c0 = (block * span + turn % span) * CHANNELS, c = min(c0 + channel, d - 1);
        if (c0 >= d) continue;
        bool in_c = c0 + channel < d, more = SPANS && turn % span > 0;  // more channels of a route that was here before
        const int* route = routes + (long long)ki * all + segment.first;
        Map map = {x + bi * p * d + c0, projected + bi * p * kw + ki * WIDTH, dy + bi * p * d + c0, p, d, d - c0, kw};
        float *to_dx = dx + part_of * p * d + c0, *down = dprojected + (block * (long long)rows + bi) * p * kw + ki * WIDTH;
        long long row = bi * k + ki, chunk = row * ((all + CHUNK - 1) / CHUNK) + segment.first / CHUNK + tiles - 1;
        const float* kept = kept_pointer(states + (chunk * d + c) * N + lane * S);
        long long stride = (long long)rows * k * d;
        float rate[S], carry[S], sum_A[S], skip = D[ki * d + c], sum_D = 0, sum_bias = 0, sum_W[MORE_W][4] = {};
#pragma unroll
        for (int s = 0; s < S; s++) {
            int n = lane * S + s;
            sum_A[s] = 0, rate[s] = n < N ? decay(A[(ki * d + c) * N + n]) * LOG2E : 0.f;
            carry[s] = n < N ? entering<false>(segment, end_states, end_steps, row * d + c, stride, n, rate[s]) : 0.f;
        }
        __syncthreads();  // the last route is done with shared memory
        load_weights(m, dt_proj + (long long)ki * d * R, bias + ki * d, c0, d);
        int first = (tiles - 1) * CHUNK + threadIdx.x, ahead = p;
        if (threadIdx.x < CHUNK) {
            m.pixel[0][threadIdx.x] = pixel_of(route, first, length, p);
            if (tiles > 1) ahead = pixel_of(route, first - CHUNK, length, p);
        }
        __syncthreads();
        fetch_rows(m, map, m.pixel[0]);
#pragma unroll 1
        for (int part = 0; part < PARTS; part++) fetch_part(m, map, m.pixel[0], part);
        fetched();
        int odd = 0;
#pragma unroll 1
        for (int tile = tiles - 1; tile >= 0; tile--) {
            int start = tile * CHUNK, size = min(CHUNK, length - start), parts = (size + PART - 1) / PART;
            int *here = m.pixel[(tiles - 1 - tile) % 2], *next = m.pixel[(tiles - tile) % 2];
            float h[S];
#pragma unroll
            for (int s = 0; s < S; s++) h[s] = in_c && lane * S + s < N ? fetched(kept + s) : 0.f;
            wait_for_all();
            __syncthreads();
            if (threadIdx.x < CHUNK) {
                next[threadIdx.x] = ahead;
                if (tile > 1) ahead = pixel_of(route, start - 2 * CHUNK + threadIdx.x, length, p);
            }
            spread(m);
            project(m, size);
            __syncthreads();
            if (tile > 0) {  // the next tile's
                kept -= d * N;
                if (lane == 0) prefetch(kept);
                fetch_rows(m, map, next);
#pragma unroll 1
                for (int part = parts; part < PARTS; part++) fetch_part(m, map, next, part);
                fetched();
            }
#pragma unroll 1
            for (int part = 0; part < parts - 1; part++) {  // the state before each part
                float a[PART][S], gain[PART][S];
#pragma unroll
                for (int j = 0; j < PART; j++) {
                    float2 move = m.move[part * PART + j][channel];
                    float b[S];
                    read(b, &m.maps[part * PART + j][lane * 2 * S]);
#pragma unroll
                    for (int s = 0; s < S; s++) a[j][s] = power2(move.x * rate[s]), gain[j][s] = move.y * b[s];
                }
#pragma unroll
                for (int s = 0; s < S; s++) {
                    m.before[part][s][threadIdx.x] = h[s];
#pragma unroll
                    for (int j = 0; j < PART; j++) h[s] = a[j][s] * h[s] + gain[j][s];
                }
            }
#pragma unroll 1
            for (int part = parts - 1; part >= 0; part--, odd ^= 1) {
                float a[PART][S], before[PART + 1][S], d_step[PART], d_push[PART];  // states before each step
#pragma unroll
                for (int s = 0; s < S; s++) before[0][s] = h[s];
#pragma unroll
                for (int j = 0; j < PART; j++) {
                    float2 move = m.move[part * PART + j][channel];
                    float b[S];
                    read(b, &m.maps[part * PART + j][lane * 2 * S]);
#pragma unroll
                    for (int s = 0; s < S; s++) {
                        a[j][s] = power2(move.x * rate[s]);
                        before[j + 1][s] = a[j][s] * before[j][s] + move.y * b[s];
                    }
                }
#pragma unroll
                for (int first = PART - TURN; first >= 0; first -= TURN) {
                    int column = part * PART + first + g / COLUMNS;
                    unsigned push = tf32(m.move[column][beside].y * UNCUT), g_y = tf32(m.dy[column][beside] * UNCUT);
                    float sum[2][PAIRS][4] = {};  // of B's and C's gradients
                    if (!counts) push = g_y = 0;
#pragma unroll
                    for (int two = TURN - 2; two >= 0; two -= 2) {
                        float dh[2][2 * PAIRS] = {}, after[2][2 * PAIRS] = {};
#pragma unroll
                        for (int i = 1; i >= 0; i--) {
                            int j = first + two + i, t = part * PART + j;
                            float step = m.move[t][channel].x, dy_t = m.dy[t][channel], bc[2 * S];
                            read(bc, &m.maps[t][lane * 2 * S]);
                            d_step[j] = d_push[j] = 0;
#pragma unroll
                            for (int s = 0; s < S; s++) {
                                dh[i][s] = dy_t * bc[S + s] + carry[s];
                                carry[s] = a[j][s] * dh[i][s];
                                float d_log = carry[s] * before[j][s];
                                after[i][s] = before[j + 1][s];
                                sum_A[s] += d_log * step;
                                d_step[j] += d_log * rate[s];
                                d_push[j] += dh[i][s] * bc[s];
                            }
                        }
                        bool is[2] = {g / COLUMNS == two, g / COLUMNS == two + 1};
#pragma unroll
                        for (int i = 0; i < PAIRS; i++) {
                            float4 of_B = make_float4(dh[0][2 * i], dh[0][2 * i + 1], dh[1][2 * i], dh[1][2 * i + 1]);
                            float4 of_C = make_float4(after[0][2 * i], after[0][2 * i + 1], after[1][2 * i], after[1][2 * i + 1]);
                            mma(sum[0][i], of_B, is[0] ? push : 0, is[1] ? push : 0);
                            mma(sum[1][i], of_C, is[0] ? g_y : 0, is[1] ? g_y : 0);
                        }
                    }
                    keep_sums(m.d_maps[odd][warp] + first, sum, lane);
                }
                if (part > 0) {
#pragma unroll
                    for (int s = 0; s < S; s++) h[s] = m.before[part - 1][s][threadIdx.x];
                }
                float total[SUMS];
                int to[SUMS];  // where they go, if anywhere
#pragma unroll
                for (int i = 0; i < SUMS; i++) {
                    int v = i * THREADS + threadIdx.x, of = v % (2 * STATES), at = here[part * PART + v / (2 * STATES) % PART];
                    bool there = (PART * 2 * STATES % THREADS == 0 || v < PART * 2 * STATES) && of % STATES < N && at < p;
                    to[i] = there ? at * kw + R + of / STATES * N + of % STATES : -1;
                    total[i] = more && there ? down[to[i]] : 0.f;
                }
                sums<PART, LANES>(d_step, lane, BESIDE);
                sums<PART, LANES>(d_push, lane, BESIDE);
                __syncwarp();
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    int t = part * PART + lane / TWINS * EACH + i;
                    float step = m.move[t][channel].x, u = real(m.x[t][channel]), dy_t = m.dy[t][channel];
                    float d_raw = (d_step[i] * (1 / LOG2E) + d_push[i] * u) * slope_at(step);
                    if (TWINS > 1) __syncwarp();  // both have read what one writes over
                    if (lane % TWINS == 0) {
                        sum_D += dy_t * u, sum_bias += d_raw;
                        m.move[t][channel] = make_float2(__uint_as_float(tf32(d_raw)), step * d_push[i] + skip * dy_t);
                    }
                }
                __syncthreads();
                if (tile > 0) fetch_part(m, map, next, part);
#pragma unroll
                for (int i = 0; i < SUMS; i++) {
                    int v = i * THREADS + threadIdx.x;
#pragma unroll
                    for (int w = 0; w < WARPS; w++) total[i] += m.d_maps[odd][w][v / (2 * STATES) % PART][v % (2 * STATES)];
                    if (to[i] >= 0) down[to[i]] = total[i];
                }
            }
            fetched();
            project_back(m, sum_W, down, here, map, more);
            store_dx(m, to_dx, here, map, turn >= span || !WHOLE);
        }
        long long at = ((segment.at * (long long)rows + bi) * k + ki) * d;
#pragma unroll
        for (int more = 0; more < MORE_W; more++) {
            int item = warp + more * WARPS;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int row = c0 + item % HALVES * 16 + g + i / 2 * 8, rank = item / HALVES * 8 + q * 2 + i % 2;
                if (item < TILES_W && row < d && rank < R) ddt_proj[(at + row) * R + rank] = sum_W[more][i];
            }
        }
        float total_D[1] = {sum_D}, total_bias[1] = {sum_bias};
        sums<1, LANES>(total_D, lane, BESIDE);
        sums<1, LANES>(total_bias, lane, BESIDE);
        if (in_c && lane == 0) dD[at + c] = total_D[0], dbias[at + c] = total_bias[0];
#pragma unroll
        for (int s = 0; s < S; s++)
            if (in_c && lane * S + s < N) dA[(at + c) * N + lane * S + s] = sum_A[s];
    }
}
