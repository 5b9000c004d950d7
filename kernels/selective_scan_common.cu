// What the kernels of the selective scan share; they include it.
//
// Compile-time: S states of a lane, WIDE channels and MAPS numbers of B or C that are read at once, SOFTPLUS.

constexpr int CHUNK = 64;  // steps from one kept state to the next

__host__ __device__ constexpr int lanes_of(int states) {  // of a channel, where each has S of its states
    int lanes = 1;
    while (lanes * S < states) lanes *= 2;
    return lanes;
}

template <int COUNT, bool PAIRS = COUNT % 2 == 0 && sizeof(real_t) == 2>
struct alignas(sizeof(real_t) * COUNT) Pack {  // numbers that lie side by side
    real_t v[COUNT];
    __device__ __forceinline__ float at(int i) const { return real(v[i]); }
    __device__ __forceinline__ void set(const float (&from)[COUNT]) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) v[i] = stored<real_t>(from[i]);
    }
};
#ifndef T_FP32
template <int COUNT>
struct alignas(2 * COUNT) Pack<COUNT, true> {  // two in a register
    unsigned v[COUNT / 2];
    __device__ __forceinline__ float at(int i) const {
#ifdef T_BF16
        return __uint_as_float(i % 2 ? v[i / 2] & 0xffff0000u : v[i / 2] << 16);
#else
        return real((unsigned short)(i % 2 ? v[i / 2] >> 16 : v[i / 2]));
#endif
    }
    __device__ __forceinline__ void set(const float (&from)[COUNT]) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 2) v[i / 2] = stored<real_t>(from[i]) | (unsigned)stored<real_t>(from[i + 1]) << 16;
    }
};
#endif

// From memory, in the order of the program: the compiler may not put it off until the number is needed
template <typename V> __device__ __forceinline__ V fetched(const V* from) {
    constexpr int WORDS = (sizeof(V) + 3) / 4;
    unsigned word[WORDS];
    if constexpr (sizeof(V) == 2) asm volatile("ld.global.u16 %0, [%1];" : "=r"(word[0]) : "l"(from) : "memory");
    else if constexpr (WORDS == 1) asm volatile("ld.global.b32 %0, [%1];" : "=r"(word[0]) : "l"(from) : "memory");
    else if constexpr (WORDS == 2)
        asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "l"(from) : "memory");
    else
        asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3]) : "l"(from) : "memory");
    V v;
    memcpy(&v, word, sizeof v);
    return v;
}

// A number that is not computed anew wherever it is used
__device__ __forceinline__ void hold(int& v) { asm volatile("" : "+r"(v)); }

typedef Pack<WIDE> Row;  // channels
typedef Pack<MAPS> Few;  // states' B or C

struct alignas(4 * WIDE) Floats {
    float v[WIDE];
};

// Floats from shared memory
template <int COUNT> __device__ __forceinline__ void read(float (&to)[COUNT], const float* from) {
    if constexpr (COUNT % 4 == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            float4 v = *(float4*)(from + i);
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        }
    } else if constexpr (COUNT % 2 == 0) {
        float2 v = *(float2*)from;
        to[0] = v.x, to[1] = v.y;
    } else {
        to[0] = *from;
    }
}

__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1 + power2(-LOG2E * v)); }

__device__ __forceinline__ float step_of(float raw) { return SOFTPLUS ? softplus(raw) : raw; }
