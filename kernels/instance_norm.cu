// Instance normalisation of maps (planes, pixels), a residual and LeakyReLU, forward and backward:
//
// z = (x - mean) / sqrt(var + eps) weight + bias + residual,  y = z > 0 ? z : slope z
//
// A block holds a part of a plane in registers. Where that is the plane (not SPLIT) memory is read once. Else there is a
// block for each part and pass; the second pass follows the first at such a distance that it finds the part in the L2
// cache, and waits for the first one over its plane, whose blocks have smaller numbers and so were started before (CUB's
// scans rely on the same). What is added up has a fixed order.
//
// Compile-time: IN, ADDED, OUT (types of x, the residual and y: float, bf16 or fp16); AFFINE; ACT (slope is not 1); ADD
// (forward: there is a residual; backward: there was one, so that y tells which z were positive); DEEP (backward: the
// residual has a gradient); PACK neighbouring pixels in a read, PER of them in each of THREADS; SPLIT; T_FP32.

#include "half_types.cu"

constexpr int CHUNK = THREADS * PER * PACK, BLOCKS = 1024 / THREADS < 16 ? 1024 / THREADS : 16;

template <typename T> struct alignas(sizeof(T) * PACK < 16 ? sizeof(T) * PACK : 16) Pack {
    T v[PACK];
};
template <typename T> using Part = Pack<T>[PER];

// The number of a thread's pack i in a part, in pixels
__device__ __forceinline__ int pixel(int i) { return (i * THREADS + threadIdx.x) * PACK; }

template <typename T> __device__ __forceinline__ void fetch(Part<T>& to, const T* from, int left) {
#pragma unroll
    for (int i = 0; i < PER; i++) {
        to[i] = {};
        if (pixel(i) < left) to[i] = *(const Pack<T>*)(from + pixel(i));
    }
}

// So that the compiler widens a part's numbers anew rather than keep them wide, for which there are no registers
template <typename T> __device__ __forceinline__ void keep_narrow(Part<T>& part) {
    constexpr int WORDS = sizeof(Pack<T>) / 4;
    if constexpr (WORDS > 0 && sizeof(T) < 4) {
#pragma unroll
        for (int i = 0; i < PER * WORDS; i++)
            asm volatile("" : "+r"(reinterpret_cast<unsigned(&)[PER * WORDS]>(part)[i]));
    }
}

// f(pack, number in it) of every pixel of a part that there is
template <typename F> __device__ __forceinline__ void each(int left, F f) {
#pragma unroll
    for (int i = 0; i < PER; i++)
        if (pixel(i) < left) {
#pragma unroll
            for (int v = 0; v < PACK; v++) f(i, v);
        }
}

// f(pack, number in it) to every pixel
template <typename T, typename F> __device__ __forceinline__ void store(T* to, int left, F f) {
#pragma unroll
    for (int i = 0; i < PER; i++) {
        Pack<T> pack;
#pragma unroll
        for (int v = 0; v < PACK; v++) pack.v[v] = stored<T>(f(i, v));
        if (pixel(i) < left) *(Pack<T>*)(to + pixel(i)) = pack;
    }
}

// Sums over the threads of a block
__device__ __forceinline__ float2 total(float2 v) {
#pragma unroll
    for (int step = 16; step; step /= 2) {
        v.x += __shfl_xor_sync(ALL, v.x, step);
        v.y += __shfl_xor_sync(ALL, v.y, step);
    }
    __shared__ float2 parts[THREADS / 32];
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
    __syncthreads();
    v = {};
#pragma unroll
    for (int w = 0; w < THREADS / 32; w++) v.x += parts[w].x, v.y += parts[w].y;
    return v;
}
__device__ __forceinline__ float total(float v) { return total(float2{v, 0.f}).x; }

// What a block is to do: the first or the second pass over a part of a plane
struct Task {
    int plane, part, left;  // left: pixels from the part's first on
    bool second;
    long long at;  // of the part's first pixel
};

// The second pass is `ahead` parts behind the first, a plane's at least
__device__ __forceinline__ Task task_of_block(int planes, int pixels, int parts, int ahead) {
    int at = blockIdx.x;
    bool second = false;
    if (SPLIT) {
        int turn = at - ahead, both = 2 * (planes * parts - ahead);
        second = turn >= both || (turn >= 0 && turn % 2 == 0);
        at = turn < 0 ? at : turn >= both ? at - planes * parts : second ? turn / 2 : ahead + turn / 2;
    }
    int plane = at / parts, part = at % parts;
    return {plane, part, pixels - part * CHUNK, second, (long long)plane * pixels + part * CHUNK};
}

// Leaves two numbers of a part for the second pass
__device__ __forceinline__ void leave(float2 value, float2* of_part, int* done) {
    if (threadIdx.x) return;
    *of_part = value;
    __threadfence();
    atomicAdd(done, 1);
}

// Waits until all parts of a plane have left theirs
__device__ __forceinline__ void wait(const int* done, int parts) {
    if (threadIdx.x == 0) {
        int count;
        do asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(count) : "l"(done) : "memory");
        while (count < parts);
    }
    __syncthreads();
}

// Mean and sum of squared deviations of a part
__device__ __forceinline__ float2 moments(Part<IN>& x, const IN* first, int left) {
    float base = real(*first), sum = 0, squares = 0;  // so that the mean of a constant is exact
    each(left, [&](int i, int v) { sum += real(x[i].v[v]) - base; });
    float mean = base + total(sum) / min(left, CHUNK);
    keep_narrow(x);
    each(left, [&](int i, int v) {
        float centred = real(x[i].v[v]) - mean;
        squares += centred * centred;
    });
    return {mean, total(squares)};
}

// The same of a plane
__device__ __forceinline__ float2 merged(const float2* of_parts, int parts, int pixels) {
    float base = __ldcg(of_parts).x, sum = 0, squares = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < parts; i += THREADS)
        sum += (__ldcg(of_parts + i).x - base) * min(pixels - i * CHUNK, CHUNK);
    float mean = base + total(sum) / pixels;
#pragma unroll 1
    for (int i = threadIdx.x; i < parts; i += THREADS) {
        float2 part = __ldcg(of_parts + i);
        float off = part.x - mean;
        squares += part.y + off * off * min(pixels - i * CHUNK, CHUNK);
    }
    return {mean, total(squares)};
}

__device__ __forceinline__ float2 added_up(const float2* of_parts, int parts) {
    float2 sum = {};
#pragma unroll 1
    for (int i = threadIdx.x; i < parts; i += THREADS) {
        float2 part = __ldcg(of_parts + i);
        sum.x += part.x, sum.y += part.y;
    }
    return total(sum);
}

// x, residual, y (planes, pixels); weight, bias (channels); where planes are SPLIT of_parts (planes, parts) and zeros, done
// (planes); stats (2, planes): mean and 1 / sqrt(var + eps)
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
forward(const IN* __restrict__ x, const ADDED* __restrict__ residual, const float* __restrict__ weight,
        const float* __restrict__ bias, OUT* __restrict__ y, float2* of_parts, int* done, float* __restrict__ stats,
        int planes, int channels, int pixels, int parts, int ahead, float eps, float slope) {
    Task task = task_of_block(planes, pixels, parts, ahead);
    float2* of_plane = of_parts + (long long)task.plane * parts;
    Part<IN> held;
    Part<ADDED> added;
    fetch(held, x + task.at, task.left);
    float2 both;
    if (!task.second) {
        both = moments(held, x + task.at, task.left);
        if (SPLIT) return leave(both, of_plane + task.part, done + task.plane);
    }
    keep_narrow(held);
    if (ADD) fetch(added, residual + task.at, task.left);
    float scale = AFFINE ? weight[task.plane % channels] : 1.f;
    float shift = AFFINE ? bias[task.plane % channels] : 0.f;
    if (SPLIT) {
        wait(done + task.plane, parts);
        both = merged(of_plane, parts, pixels);
    }
    float mean = both.x, rate = rsqrtf(both.y / pixels + eps);
    scale *= rate;
    store(y + task.at, task.left, [&](int i, int v) {
        float z = fmaf(real(held[i].v[v]) - mean, scale, shift);
        if (ADD) z += real(added[i].v[v]);
        return !ACT || z > 0 ? z : slope * z;
    });
    if (threadIdx.x || task.part) return;
    stats[task.plane] = mean;
    stats[task.plane + planes] = rate;
}

// sums (2, planes): those of the gradient of z, and of it times x normalised
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
backward(const OUT* __restrict__ dy, const IN* __restrict__ x, const OUT* __restrict__ y,
         const float* __restrict__ weight, const float* __restrict__ bias, const float* __restrict__ stats,
         IN* __restrict__ dx, ADDED* __restrict__ dresidual, float2* of_parts, int* done, float* __restrict__ sums,
         int planes, int channels, int pixels, int parts, int ahead, float slope) {
    Task task = task_of_block(planes, pixels, parts, ahead);
    float2* of_plane = of_parts + (long long)task.plane * parts;
    Part<IN> held;
    Part<OUT> upstream, result;
    fetch(held, x + task.at, task.left);
    fetch(upstream, dy + task.at, task.left);
    if (ACT && ADD) fetch(result, y + task.at, task.left);
    float mean = stats[task.plane], rate = stats[task.plane + planes];
    float scale = AFFINE ? rate * weight[task.plane % channels] : rate;
    float shift = AFFINE ? bias[task.plane % channels] : 0.f;
    auto gradient = [&](int i, int v) {
        float g = real(upstream[i].v[v]);
        if (!ACT) return g;
        float z = ADD ? real(result[i].v[v]) : fmaf(real(held[i].v[v]) - mean, scale, shift);
        return z > 0 ? g : slope * g;
    };
    float2 sum = {};
    if (!task.second) {
        each(task.left, [&](int i, int v) {
            float g = gradient(i, v);
            sum.x += g;
            sum.y += g * (real(held[i].v[v]) - mean);
        });
        sum = total(sum);
        if (SPLIT) return leave(sum, of_plane + task.part, done + task.plane);
    }
    keep_narrow(held);
    keep_narrow(upstream);
    if (ACT && ADD) keep_narrow(result);
    if (SPLIT) {
        wait(done + task.plane, parts);
        sum = added_up(of_plane, parts);
    }
    float level = sum.x / pixels, along = sum.y * rate * rate / pixels;
    store(dx + task.at, task.left, [&](int i, int v) {
        return (gradient(i, v) - level - (real(held[i].v[v]) - mean) * along) * scale;
    });
    if (threadIdx.x == 0 && task.part == 0) {
        sums[task.plane] = sum.x;
        sums[task.plane + planes] = sum.y * rate;
    }
    if (!DEEP) return;
    keep_narrow(upstream);
    store(dresidual + task.at, task.left, gradient);
}
