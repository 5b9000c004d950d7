// Numbers of half precision as types of their own, where one kernel reads and writes several; it is included.

struct bf16 {
    unsigned short bits;
};
struct fp16 {
    unsigned short bits;
};

__device__ __forceinline__ float real(bf16 v) { return __uint_as_float(unsigned(v.bits) << 16); }
__device__ __forceinline__ float real(fp16 v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
    return f;
}
template <> __device__ __forceinline__ bf16 stored<bf16>(float v) {
    bf16 f;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(f.bits) : "f"(v));
    return f;
}
template <> __device__ __forceinline__ fp16 stored<fp16>(float v) {
    fp16 f;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(f.bits) : "f"(v));
    return f;
}
