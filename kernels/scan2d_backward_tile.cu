// What scan2d_lanes_backward.cu does with a tile besides the scan itself: it fetches, projects delta, projects its gradient back,
// sums and stores. It is included there, after the sizes and the structure of shared memory.

struct Map {  // what a block reads of its sample: rows of d channels of which `room` are left, and rows of kw numbers
    const u16 *x, *own;
    const float* dy;
    int p, d, room, kw;
};

__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// A piece of a row to shared memory, without waiting where it has more than 2 bytes; zeros unless it is there
__device__ __forceinline__ void copy_unit(u16* to, const u16* from, bool there) {
    if constexpr (UNIT > 2) copy<UNIT>(to, from, there ? UNIT : 0);
    else *to = there ? *from : u16(0);
}

// The thread's number, from which the compiler computes anew what it would otherwise keep from tile to tile
__device__ __forceinline__ int thread() {
    int t = threadIdx.x;
    asm volatile("" : "+r"(t));
    return t;
}

// Rows of x and dy for the steps of a part
__device__ __forceinline__ void fetch_part(Backward& m, const Map& map, const int* pixel, int part) {
    constexpr int OF_DY = CHANNELS / 4, OF_X = CHANNELS / 8;  // copies of a row
    static_assert(PART * (OF_DY + OF_X) <= THREADS, "one of a thread");
    int v = thread();
    if (v < PART * OF_DY) {
        int j = part * PART + v / OF_DY, q = v % OF_DY * 4, at = pixel[j];
        bool there = at < map.p && q < map.room;
        copy_16(&m.dy[j][q], map.dy + (there ? at * map.d + q : 0), there);
    } else if (v < PART * (OF_DY + OF_X)) {
        v -= PART * OF_DY;
        int j = part * PART + v / OF_X, q = v % OF_X * 8, at = pixel[j];
        bool there = at < map.p && q < map.room;
        copy_16(&m.x[j][q], map.x + (there ? at * map.d + q : 0), there);
    }
}

// Rows of projected for the steps of a tile
__device__ __forceinline__ void fetch_rows(Backward& m, const Map& map, const int* pixel) {
    constexpr int PIECES = WIDTH * 2 / UNIT;
    int first = thread();
#pragma unroll 8
    for (int i = 0; i < (CHUNK * PIECES + THREADS - 1) / THREADS; i++) {
        int v = i * THREADS + first, j = v / PIECES, q = v % PIECES * (UNIT / 2);
        if ((i + 1) * THREADS > CHUNK * PIECES && v >= CHUNK * PIECES) break;
        int at = pixel[j];
        copy_unit(&m.rows[j][q], map.own + (at < map.p ? at * map.kw + q : 0), at < map.p);
    }
}

// A route's dt_proj and bias
__device__ __forceinline__ void load_weights(Backward& m, const float* dt_proj, const float* bias, int c0, int d) {
    int first = thread();
#pragma unroll 4
    for (int v = first; v < 8 * KS * CHANNELS; v += THREADS) {
        int rank = v % (8 * KS), w = v / (8 * KS);
        bool there = rank < R && c0 + w < d;
        m.weight[rank][w] = there ? __uint_as_float(tf32(dt_proj[(c0 + w) * R + rank])) : 0.f;
    }
    if (first < CHANNELS) m.shift[first] = bias[min(c0 + first, d - 1)];
}

// B and C of the steps of a tile, a lane's side by side
__device__ __forceinline__ void spread(Backward& m) {
    int first = thread();
#pragma unroll
    for (int i = 0; i < CHUNK * STATES / THREADS; i++) {
        int v = i * THREADS + first, t = v / STATES, n = v % STATES;
        float* to = &m.maps[t][n / S * 2 * S + n % S];
        to[0] = n < N ? real(m.rows[t][R + min(n, N - 1)]) : 0.f;
        to[S] = n < N ? real(m.rows[t][R + N + min(n, N - 1)]) : 0.f;
    }
}

// Delta, and delta u, of the steps of a tile; there is no step from `size` on
__device__ __forceinline__ void project(Backward& m, int size) {
    int first = thread(), g = first % 32 / 4, q = first % 4;
#pragma unroll
    for (int i = 0; i < CHUNK / 8 / WARPS; i++) {
        int t0 = (first / 32 + i * WARPS) * 8;
        float raw[HALVES][4] = {};
#pragma unroll
        for (int ks = 0; ks < KS; ks++) {
            u16 f0 = m.rows[t0 + g][ks * 8 + q], f1 = m.rows[t0 + g][ks * 8 + q + 4];  // past the ranks weights are zeros
            m.factor[t0 + g][ks * 8 + q] = f0, m.factor[t0 + g][ks * 8 + q + 4] = f1;
#pragma unroll
            for (int half = 0; half < HALVES; half++) {
                const float *w = &m.weight[ks * 8 + q][half * 16 + g], *w4 = w + 4 * ROW_W;
                mma(raw[half], make_float4(w[0], w[8], w4[0], w4[8]), __float_as_uint(real(f0)), __float_as_uint(real(f1)));
            }
        }
#pragma unroll
        for (int e = 0; e < HALVES * 4; e++) {
            int t = t0 + 2 * q + e % 2, channel = g + e / 2 * 8;
            float step = softplus(t < size ? raw[e / 4][e % 4] + m.shift[channel] : -1e30f);
            m.move[t][channel] = make_float2(step, step * real(m.x[t][channel]));
        }
    }
}

// The gradients of B and C for TURN steps from a warp's channels, out of the products
__device__ __forceinline__ void keep_sums(float (*to)[ROW_D], const float (&sum)[2][PAIRS][4], int lane) {
    int q = threadIdx.x % 4, upper = threadIdx.x % 32 / 16;
#pragma unroll
    for (int of = 0; of < 2; of++)
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const float(&v)[4] = sum[of][i];
            int n = of * STATES + lane * S + i * 2;
            if constexpr (PLACES == 8) {  // half a lane's sums are of its 4 channels; lane 16 further has the other 4's
                float total = (upper ? v[3] : v[0]) + __shfl_xor_sync(ALL, upper ? v[1] : v[2], 16);
                if (i * 2 + upper < S) to[q][n + upper] = total;
            } else {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int t = PLACES == 4 ? q * 2 + e % 2 : q, more = PLACES == 4 ? 0 : (e % 2 - lane % 2) * S;
                    if (i * 2 + e / 2 < S) to[t][n + more + e / 2] = v[e];
                }
            }
        }
}

// Delta's gradient back to the factors of a tile's steps, and added to dt_proj's
__device__ __forceinline__ void project_back(Backward& m, float (&sum_W)[MORE_W][4], float* down, const int* pixel,
                                             const Map& map, bool more) {
    int first = thread(), g = first % 32 / 4, q = first % 4, warp = first / 32;
    int t0 = warp % 4 * 16, row0 = pixel[t0 + g], row1 = pixel[t0 + g + 8];
    float4 back[CHANNELS / 8];
#pragma unroll
    for (int i = 0; i < CHANNELS / 8; i++) {  // channels 2q and 2q + 1 of eight, as the tensor cores' q and q + 4
        const float2 *of = &m.move[t0 + g][i * 8 + q * 2], *below = of + 8 * ROW;
        back[i] = make_float4(of[0].x, below[0].x, of[1].x, below[1].x);
    }
    constexpr int EIGHTS = (KS + WARPS / 4 - 1) / (WARPS / 4);  // of ranks
    float f[EIGHTS][4] = {};
    auto at = [&](int e, int i) {  // where a number goes, -1 for nowhere
        int rank = (e * (WARPS / 4) + warp / 4) * 8 + q * 2 + i % 2, row = i < 2 ? row0 : row1;
        return rank < R && row < map.p ? row * map.kw + rank : -1;
    };
    if (more) {  // read before anything is written, as all these reads wait together
#pragma unroll
        for (int i = 0; i < EIGHTS * 4; i++) f[i / 4][i % 4] = down[max(at(i / 4, i % 4), 0)];
    }
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
        int ks = min(e * (WARPS / 4) + warp / 4, KS - 1);
#pragma unroll
        for (int i = 0; i < CHANNELS / 8; i++) {
            float2 w = *(float2*)&m.weight[ks * 8 + g][i * 8 + q * 2];
            mma(f[e], back[i], __float_as_uint(w.x), __float_as_uint(w.y));
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (at(e, i) >= 0) down[at(e, i)] = f[e][i];
    }
#pragma unroll
    for (int more = 0; more < MORE_W; more++) {
        int item = warp + more * WARPS, half = item % HALVES, rank = item / HALVES * 8 + g;
        if (item >= TILES_W) break;
#pragma unroll
        for (int t = 0; t < CHUNK; t += 8) {
            const float2 *of = &m.move[t + q][half * 16 + g], *below = of + 4 * ROW;
            float f0 = real(m.factor[t + q][rank]), f4 = real(m.factor[t + q + 4][rank]);
            mma(sum_W[more], make_float4(of[0].x, of[8].x, below[0].x, below[8].x), __float_as_uint(f0), __float_as_uint(f4));
        }
    }
}

// The gradients of u of a tile's steps to the pixels of dx, or added to what is there
__device__ __forceinline__ void store_dx(const Backward& m, float* dx, const int* pixel, const Map& map, bool add) {
    constexpr int PIECES = CHANNELS / 4, SHARE = CHUNK * PIECES / THREADS;
    int first = thread();
    int to[SHARE];  // where a piece goes, -1 for nowhere
    float4 old[SHARE] = {};
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        int v = i * THREADS + first, q = v % PIECES * 4, at = pixel[v / PIECES];
        to[i] = at < map.p && q < map.room ? at * map.d + q : -1;
    }
    if (add) {
#pragma unroll
        for (int i = 0; i < SHARE; i++) old[i] = *(const float4*)(dx + max(to[i], 0));
    }
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        int v = i * THREADS + first;
        const float2* of = &m.move[v / PIECES][v % PIECES * 4];
        float4 sum = make_float4(old[i].x + of[0].y, old[i].y + of[1].y, old[i].z + of[2].y, old[i].w + of[3].y);
        if (to[i] >= 0) *(float4*)(dx + to[i]) = sum;
    }
}
