// How a warp takes 8 steps of 32 channels, a lane one channel; included by scan2d.cu and scan2d_ends.cu.

// Warps of a block, steps of a warp; a row of projected delta in shared memory, without bank conflicts
constexpr int WARPS = 8, STEPS = 8, RAW = 36;

// dt_proj at a channel and a rank, as the tensor cores take it
__device__ __forceinline__ float weight_at(const float* dt_proj, int channel, int rank, int d) {
    return channel < d && rank < R ? __uint_as_float(tf32(dt_proj[(long long)channel * R + rank])) : 0.f;
}

// A route's dt_proj for 32 channels from c0 on: channels x ranks
__device__ __forceinline__ void load_weights(float4 (&to)[KS][2][32], const float* dt_proj, int c0, int d) {
    for (int i = threadIdx.x; i < KS * 64; i += WARPS * 32) {
        int l = i & 31, half = i >> 5 & 1, ks = i >> 6, row = c0 + half * 16 + (l >> 2), rank = ks * 8 + (l & 3);
        auto w = [&](int r, int q) { return weight_at(dt_proj, r, q, d); };
        to[ks][half][l] = make_float4(w(row, rank), w(row + 8, rank), w(row, rank + 4), w(row + 8, rank + 4));
    }
}

// The factors of delta, as the tensor cores take them, of a warp's steps: lane j holds where the row of step j % 8 begins, in bytes
__device__ __forceinline__ void load_factors(u16 (&to)[2 * KS], const u16* own, unsigned row) {
    int lane = threadIdx.x & 31;
    unsigned mine = __shfl_sync(ALL, row, lane >> 2);
#pragma unroll
    for (int i = 0; i < 2 * KS; i++) to[i] = fetch(own, mine + min(i * 4 + (lane & 3), R - 1) * 2);
}

// Delta of a warp's steps before its bias, projected from the factors that its lanes hold
struct Projection {
    float half[2][4];  // channels

    __device__ __forceinline__ Projection(const float4 (&weight)[KS][2][32], const u16 (&factor)[2 * KS]) : half{} {
        int lane = threadIdx.x & 31;
#pragma unroll
        for (int ks = 0; ks < KS; ks++) {
            unsigned b0 = __float_as_uint(real(factor[2 * ks])), b1 = __float_as_uint(real(factor[2 * ks + 1]));
            mma(half[0], weight[ks][0][lane], b0, b1);
            mma(half[1], weight[ks][1][lane], b0, b1);
        }
    }
    // To shared memory: step, channel. Other work between the two hides the products' latency.
    __device__ __forceinline__ void store(float (&raw)[STEPS * RAW]) const {
        float* to = raw + (threadIdx.x & 3) * 2 * RAW + ((threadIdx.x & 31) >> 2);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            to[h * 16] = half[h][0];
            to[h * 16 + RAW] = half[h][1];
            to[h * 16 + 8] = half[h][2];
            to[h * 16 + RAW + 8] = half[h][3];
        }
    }
};
