// The gradients of B and C of the selective scan, summed up over blocks of channels in a fixed order.
//
// Compile-time: T_BF16, T_FP16 or T_FP32, their type; N states.

// dB and dC (rows, N) from those of every block, (blocks, rows, 2, N)
extern "C" __global__ void __launch_bounds__(256)
fold(const float* __restrict__ dmaps, real_t* __restrict__ dB, real_t* __restrict__ dC, int blocks, int rows) {
    long long v = blockIdx.x * 256LL + threadIdx.x, all = rows * 2LL * N;
    if (v >= all) return;
    float sum = 0;
#pragma unroll 8
    for (int i = 0; i < blocks; i++) sum += dmaps[i * all + v];
    (v / N % 2 ? dC : dB)[v / (2 * N) * N + v % N] = stored<real_t>(sum);
}
