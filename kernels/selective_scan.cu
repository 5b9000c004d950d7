// Selective scan, forward; the equation and its letters are in selective_scan_reference.py.
//
// A lane scans one channel step by step, all its N states in registers: no tree, no shuffles, and N recurrences at a time
// hide each other's latency. Four warps share the B and C of their route in shared memory, eight steps at a time, loaded
// eight steps ahead. Where there are few sequences, each is cut into segments: `ends` finds how every segment maps a state
// (a step multiplies by exp(delta A), so a segment by exp(A sum delta)), and `forward` starts from what the segments
// before it leave.
//
// Compile-time: T_BF16, T_FP16 or T_FP32 (u, delta, B, C and z), N states, HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS.

constexpr int STEPS = 8, THREADS = 128, CHUNK = 64, VALUES = STEPS * N, MINE = (VALUES + THREADS - 1) / THREADS;
constexpr int WIDE = N % 4 == 0 ? 4 : 1;  // states that are read from shared memory at once

// WIDE floats from shared memory
__device__ __forceinline__ void read(float (&to)[WIDE], const float* from) {
    if (WIDE == 4) {
        float4 v = *(float4*)from;
        to[0] = v.x, to[1 % WIDE] = v.y, to[2 % WIDE] = v.z, to[3 % WIDE] = v.w;
    } else {
        to[0] = *from;
    }
}

struct Maps {  // B or C: its strides in elements
    int b, k, l, n;
};

// What a thread loads of 8 steps: its channel's u, delta and z, and its share of the block's B and C
struct Loaded {
    real_t u[STEPS], delta[STEPS], z[STEPS], B[MINE], C[MINE];
};

template <bool OUT>
__device__ __forceinline__ void scan(const real_t* u, const real_t* delta, const float* A, const real_t* B,
                                     const real_t* C, const float* D, const real_t* z, const float* bias, float* y,
                                     float* last, float* states, float* end_states, float* end_steps, int k, int length,
                                     int d, int per, Maps to_B, Maps to_C) {
    __shared__ alignas(16) float B_s[2][VALUES], C_s[2][VALUES];  // step, state
    int blocks = (d + THREADS - 1) / THREADS, c0 = blockIdx.x % blocks * THREADS + threadIdx.x, c = min(c0, d - 1);
    int row = blockIdx.x / blocks, ki = row % k, segment = blockIdx.y, rows = gridDim.x / blocks;
    long long bi = row / k, at = (long long)row * length * d + c;
    bool in_c = c0 < d;
    int first = segment * per, stop = min(length, first + per);
    u += at, delta += at, y += at;
    if (HAS_Z) z += at;
    B += bi * to_B.b + (long long)ki * to_B.k, C += bi * to_C.b + (long long)ki * to_C.k;
    float h[N], rate[N], shift = HAS_BIAS ? bias[ki * d + c] : 0.f, skip = HAS_D ? D[ki * d + c] : 0.f, total = 0;
#pragma unroll
    for (int n = 0; n < N; n++) h[n] = 0, rate[n] = A[(ki * d + c) * N + n] * LOG2E;
    if (OUT) {
        for (int s = 0; s < segment; s++) {  // what the segments before this one leave
            long long from = ((long long)s * rows + row) * d + c;
            float sum = end_steps[from];
#pragma unroll
            for (int n = 0; n < N; n++) h[n] = power2(rate[n] * sum) * h[n] + end_states[from * N + n];
        }
    }
    Loaded next;
    auto load = [&](int start) {
#pragma unroll
        for (int j = 0; j < STEPS; j++) {
            long long t = (long long)min(start + j, length - 1) * d;
            next.u[j] = __ldg(u + t), next.delta[j] = __ldg(delta + t);
            if (OUT && HAS_Z) next.z[j] = __ldg(z + t);
        }
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            int v = i * THREADS + threadIdx.x, n = v % N;
            long long t = min(start + v / N % STEPS, length - 1);
            next.B[i] = __ldg(B + t * to_B.l + (long long)n * to_B.n);
            if (OUT) next.C[i] = __ldg(C + t * to_C.l + (long long)n * to_C.n);
        }
    };
    load(first);
    int turn = 0;
#pragma unroll 1
    for (int start = first; start < stop; start += STEPS, turn ^= 1) {
        float step[STEPS], push[STEPS], out[STEPS];
        real_t gate[STEPS];
#pragma unroll
        for (int j = 0; j < STEPS; j++) {
            float raw = real(next.delta[j]) + shift, x = real(next.u[j]);
            if (SOFTPLUS) raw = softplus(raw);
            step[j] = start + j < stop ? raw : 0.f;  // no step past the end
            push[j] = step[j] * x;
            out[j] = skip * x;
            total += step[j];
            if (HAS_Z) gate[j] = next.z[j];
        }
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            int v = i * THREADS + threadIdx.x;
            if (v < VALUES) B_s[turn][v] = real(next.B[i]);
            if (OUT && v < VALUES) C_s[turn][v] = real(next.C[i]);
        }
        __syncthreads();
        load(start + STEPS);
        if (OUT && in_c && start % CHUNK == 0) {
            float* kept = states + (((long long)row * ((length + CHUNK - 1) / CHUNK) + start / CHUNK) * d + c) * N;
#pragma unroll
            for (int n = 0; n < N; n++) kept[n] = h[n];
        }
#pragma unroll
        for (int j = 0; j < STEPS; j++) {
#pragma unroll
            for (int n = 0; n < N; n += WIDE) {
                float b[WIDE], c[WIDE];
                read(b, &B_s[turn][j * N + n]);
                if (OUT) read(c, &C_s[turn][j * N + n]);
#pragma unroll
                for (int i = 0; i < WIDE; i++) {
                    h[n + i] = power2(step[j] * rate[n + i]) * h[n + i] + push[j] * b[i];
                    if (OUT) out[j] += h[n + i] * c[i];
                }
            }
        }
        if (OUT && in_c) {
#pragma unroll
            for (int j = 0; j < STEPS; j++) {
                float value = out[j], g = HAS_Z ? real(gate[j]) : 0.f;
                if (HAS_Z) value *= __fdividef(g, 1 + power2(-LOG2E * g));
                if (start + j < stop) y[(long long)(start + j) * d] = value;
            }
        }
    }
    if (!in_c) return;
    if (!OUT) {
        long long to = ((long long)segment * rows + row) * d + c;
        end_steps[to] = total;
#pragma unroll
        for (int n = 0; n < N; n++) end_states[to * N + n] = h[n];
    } else if (stop == length) {
#pragma unroll
        for (int n = 0; n < N; n++) last[((long long)row * d + c) * N + n] = h[n];
    }
}

#define ARGUMENTS                                                                                                     \
    const real_t *__restrict__ u, const real_t *__restrict__ delta, const float *__restrict__ A,                      \
        const real_t *__restrict__ B, const real_t *__restrict__ C, const float *__restrict__ D,                      \
        const real_t *__restrict__ z, const float *__restrict__ bias, float *__restrict__ y, float *__restrict__ last, \
        float *__restrict__ states, float *__restrict__ end_states, float *__restrict__ end_steps, int k, int length,  \
        int d, int per, int Bb, int Bk, int Bl, int Bn, int Cb, int Ck, int Cl, int Cn
#define PASSED                                                                                                  \
    u, delta, A, B, C, D, z, bias, y, last, states, end_states, end_steps, k, length, d, per, {Bb, Bk, Bl, Bn}, \
        {Cb, Ck, Cl, Cn}

extern "C" __global__ void __launch_bounds__(THREADS) forward(ARGUMENTS) { scan<true>(PASSED); }
extern "C" __global__ void __launch_bounds__(THREADS) ends(ARGUMENTS) { scan<false>(PASSED); }
