// A residual stream and its norm; the equation is in add_norm.py. A warp has a row, all of it in registers.
//
// Compile-time: T_BF16, T_FP16 or T_FP32; H and X, types of h and x; VECTOR channels in a read, PER reads of a lane;
// ADD (there is an r), KEEP (the stream is written), CENTRED (LayerNorm), BIASED.

template <typename V> struct __align__(VECTOR * sizeof(V) < 16 ? VECTOR * sizeof(V) : 16) Few { V at[VECTOR]; };

template <typename V> __device__ __forceinline__ float wide(V v) {
    if constexpr (sizeof(V) == 4) return v;
    else return real(v);
}

__device__ __forceinline__ float over_warp(float v) {
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) v += __shfl_xor_sync(0xffffffff, v, lanes);
    return v;
}

// h, r, x, stream (rows, channels); weight, bias (channels)
extern "C" __global__ void __launch_bounds__(128) forward(
    const H* __restrict__ h, const float* __restrict__ r, const float* __restrict__ weight,
    const float* __restrict__ bias, X* __restrict__ x, float* __restrict__ stream, int rows, int channels, float eps) {
    int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    long long start = (long long)row * channels;
    Few<H> from[PER] = {};
    Few<float> total[PER] = {}, scale[PER] = {};
#pragma unroll
    for (int i = 0; i < PER; i++) {
        int c = (i * 32 + lane) * VECTOR;
        if (c >= channels) continue;
        from[i] = *reinterpret_cast<const Few<H>*>(h + start + c);
        if (ADD) total[i] = *reinterpret_cast<const Few<float>*>(r + start + c);
        scale[i] = *reinterpret_cast<const Few<float>*>(weight + c);
    }
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < PER; i++) {
        int c = (i * 32 + lane) * VECTOR;
#pragma unroll
        for (int j = 0; j < VECTOR; j++) sum += total[i].at[j] += wide(from[i].at[j]);
        if (KEEP && c < channels) *reinterpret_cast<Few<float>*>(stream + start + c) = total[i];
    }
    float mean = CENTRED ? over_warp(sum) / channels : 0;
#pragma unroll
    for (int i = 0; i < PER; i++) {
        bool inside = (i * 32 + lane) * VECTOR < channels;
#pragma unroll
        for (int j = 0; j < VECTOR; j++) {
            float v = total[i].at[j] = inside ? total[i].at[j] - mean : 0;
            squares += v * v;
        }
    }
    float factor = rsqrtf(over_warp(squares) / channels + eps);
#pragma unroll
    for (int i = 0; i < PER; i++) {
        int c = (i * 32 + lane) * VECTOR;
        if (c >= channels) continue;
        Few<X> result;
#pragma unroll
        for (int j = 0; j < VECTOR; j++)
            result.at[j] = stored<X>(total[i].at[j] * factor * scale[i].at[j] + (BIASED ? bias[c + j] : 0));
        *reinterpret_cast<Few<X>*>(x + start + c) = result;
    }
}
