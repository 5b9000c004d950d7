// Sums of the parts that the backwards of the fused 2D scan leave (scan2d.cu, scan2d_lanes_backward.cu), in a fixed order.
//
// Compile-time: T_BF16 or T_FP16 (the inputs' type), N states, R ranks, LOG_A (A is given as log(-A)).

#include "scan2d_common.cu"

// to[i] = the sum of from's slices: `slices` of `groups` parts each; a part holds `part` numbers of every slice. Where
// `logs` is given, log(-A), the sum is a gradient of A and to[i] that of log(-A).
template <typename V>
__device__ __forceinline__ void total(const float* from, V* to, long long count, int slices, int groups, long long part,
                                      const float* logs = nullptr) {
    constexpr int EACH = 4;
    long long stride = gridDim.x * 256ll * EACH;
    for (long long first = blockIdx.x * 256ll * EACH + threadIdx.x; first < count; first += stride) {
        float sum[EACH] = {};
        long long at[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            long long i = min(first + j * 256, count - 1);
            at[j] = groups == 1 ? i : i + i / part * (groups - 1) * part;
        }
        for (int g = 0; g < groups; g++) {
#pragma unroll 4
            for (int s = 0; s < slices; s++)
#pragma unroll
                for (int j = 0; j < EACH; j++) sum[j] += from[at[j] + g * part + s * groups * count];
        }
#pragma unroll
        for (int j = 0; j < EACH; j++)
            if (first + j * 256 < count)
                to[first + j * 256] = stored<V>(logs ? sum[j] * decay(logs[first + j * 256]) : sum[j]);
    }
}

// The gradients from what a backward leaves, one by each row of blocks: `shares` parts by routes, `blocks` by channels,
// `rows` = b by samples. Weights' have `segments` more, dt_proj's each in `pieces`, by steps.
extern "C" __global__ void __launch_bounds__(256)
totals(const float* dx_parts, const float* dprojected_parts, const float* ddt_proj_parts, const float* dA_parts,
       const float* dD_parts, const float* dbias_parts, const float* A, u16* dx, u16* dprojected, float* ddt_proj, float* dA,
       float* dD, float* dbias, int p, int k, int d, int shares, int blocks, int pieces, int segments,
       int rows) {
    long long channels = (long long)k * d;
    switch (blockIdx.y) {
        case 0: return total(dx_parts, dx, (long long)rows * p * d, shares, 1, 1);
        case 1: return total(dprojected_parts, dprojected, (long long)rows * p * k * WIDTH, blocks, 1, 1);
        case 2: return total(ddt_proj_parts, ddt_proj, channels * R, segments * rows, pieces, (long long)d * R);
        case 3: return total(dA_parts, dA, channels * N, segments * rows, 1, 1, LOG_A ? A : nullptr);
        case 4: return total(dD_parts, dD, channels, segments * rows, 1, 1);
        default: return total(dbias_parts, dbias, channels, segments * rows, 1, 1);
    }
}
