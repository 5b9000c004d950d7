// The weights of a mixer along routes; their layout and letters are in route_weights.py. A thread makes one number.
//
// Compile-time: T_BF16, T_FP16 or T_FP32; P and X, types of the parameters and of the weights.

template <typename V> __device__ __forceinline__ float wide(V v) {
    if constexpr (sizeof(V) == 4) return v;
    else return real(v);
}

// x_proj (k, r + 2n, d), dt_proj (k, d, r), A_log (k, d, n); weights (b, k, rank + maps + rank, d), A (k, d, n)
extern "C" __global__ void __launch_bounds__(128) forward(
    const P* __restrict__ x_proj, const P* __restrict__ dt_proj, const P* __restrict__ A_log, X* __restrict__ weights,
    float* __restrict__ A, int batch, int routes, int channels, int r, int n, int rank, int maps) {
    int rows = 2 * rank + maps, total = routes * rows * channels, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= total) {
        if (i - total < routes * channels * n) A[i - total] = -expf(wide(A_log[i - total]));
        return;
    }
    int c = i % channels, row = i / channels % rows, k = i / channels / rows;
    int map = row - rank, back = map - maps;
    float v = 0;
    if (back >= 0) {
        if (back < r) v = wide(dt_proj[(k * channels + c) * r + back]);
    } else if (map >= 0) {
        if (map < 2 * n) v = wide(x_proj[(k * (r + 2 * n) + r + map) * channels + c]);
    } else if (row < r) {
        v = wide(x_proj[(k * (r + 2 * n) + row) * channels + c]);
    }
    for (int b = 0; b < batch; b++) weights[(long long)b * total + i] = stored<X>(v);
}
