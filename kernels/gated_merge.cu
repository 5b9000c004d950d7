// The gated sum of routes; the equation and its letters are in gated_merge.py. A thread has VECTOR channels of a pixel.
//
// Compile-time: T_BF16, T_FP16 or T_FP32; Y, Z and X, types of y, z and the result; VECTOR; VISITS of a pixel.

template <typename V> struct __align__(VECTOR * sizeof(V) < 16 ? VECTOR * sizeof(V) : 16) Few { V at[VECTOR]; };

template <typename V> __device__ __forceinline__ float wide(V v) {
    if constexpr (sizeof(V) == 4) return v;
    else return real(v);
}

// y (b, steps, d); z (b, p, d) with `stride` from pixel to pixel; inverse (VISITS, p); out (b, p, d)
extern "C" __global__ void __launch_bounds__(128) forward(
    const Y* __restrict__ y, const Z* __restrict__ z, const int* __restrict__ inverse, X* __restrict__ out, int batch,
    int pixels, int steps, int channels, int stride, float factor) {
    unsigned lanes = channels / VECTOR, g = blockIdx.x * blockDim.x + threadIdx.x, row = g / lanes;
    int c = g % lanes * VECTOR, p = row % pixels, b = row / pixels;
    if (b >= batch) return;
    Few<Z> gate = *reinterpret_cast<const Few<Z>*>(z + (long long)row * stride + c);
    Few<Y> part[VISITS] = {};
#pragma unroll
    for (int v = 0; v < VISITS; v++) {
        int step = __ldg(inverse + v * pixels + p);
        if (step < steps) part[v] = *reinterpret_cast<const Few<Y>*>(y + ((long long)b * steps + step) * channels + c);
    }
    Few<X> result;
#pragma unroll
    for (int j = 0; j < VECTOR; j++) {
        float total = 0, raw = wide(gate.at[j]);
#pragma unroll
        for (int v = 0; v < VISITS; v++) total += wide(part[v].at[j]);
        result.at[j] = stored<X>(total * factor * __fdividef(raw, 1 + power2(-LOG2E * raw)));
    }
    *reinterpret_cast<Few<X>*>(out + (long long)row * channels + c) = result;
}
