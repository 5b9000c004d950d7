// What the kernels of the fused 2D scan share; they include it.
//
// Compile-time: N states, R ranks, LOG_A (A is given as log(-A)).

typedef unsigned short u16;
constexpr int KS = (R + 7) / 8, WIDTH = R + 2 * N;  // eights of ranks; numbers of a route in a row of projected

__device__ __forceinline__ unsigned tf32(float v) {
    unsigned f;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(f) : "f"(v));
    return f;
}

// d (16 x 8) += a (16 x 8) b (8 x 8). With g = lane / 4, q = lane % 4, a lane has of d (g, 2q), (g, 2q + 1), and both of row
// g + 8; of a (g, q), (g + 8, q), (g, q + 4), (g + 8, q + 4); of b (q, g), (q + 4, g).
__device__ __forceinline__ void mma(float (&d)[4], float4 a, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a.x)), "r"(__float_as_uint(a.y)), "r"(__float_as_uint(a.z)), "r"(__float_as_uint(a.w)),
          "r"(b0), "r"(b1));
}

// The pixel of a step of a route, p for none (a padding zero, or past the route's end)
__device__ __forceinline__ int pixel_of(const int* route, int step, int length, int p) {
    return step < length ? __ldg(route + step) : p;
}

// A as it is used, of A or of log(-A)
__device__ __forceinline__ float decay(float v) { return LOG_A ? -expf(v) : v; }

// A load that stays where it is written: ahead of the computation that hides it.
__device__ __forceinline__ u16 fetch(const u16* base, unsigned offset) {
    u16 v;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"((const char*)base + offset));
    return v;
}

__device__ __forceinline__ float fetch(const float* base, unsigned offset) {
    float v;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"((const char*)base + offset));
    return v;
}

// A pointer whose origin the compiler does not know: it keeps it rather than computing it again at every use.
template <typename V> __device__ __forceinline__ V* kept_pointer(V* p) {
    asm("" : "+l"(p));
    return p;
}

// 4, 8 or 16 bytes from memory to shared memory without waiting; zeros follow the first `there` of them
template <int BYTES_EACH> __device__ __forceinline__ void copy(void* to, const void* from, int there = BYTES_EACH) {
    unsigned address = __cvta_generic_to_shared(to);
    if constexpr (BYTES_EACH == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(there) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(BYTES_EACH), "r"(there)
                     : "memory");
}
__device__ __forceinline__ void copy_16(void* to, const void* from, bool there) { copy<16>(to, from, there ? 16 : 0); }

// Ends a group of such copies
__device__ __forceinline__ void fetched() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all groups but the last have arrived, for the whole warp
__device__ __forceinline__ void wait_for_older() {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncwarp();
}

// Waits until a thread's own copies have all arrived
__device__ __forceinline__ void wait_for_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
