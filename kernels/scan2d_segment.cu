// Segments of the routes of a fused 2D scan; included by scan2d.cu, scan2d_lanes.cu and scan2d_lanes_backward.cu.
//
// Compile-time: CUT (a route has several; then no two routes share a block).

// What a block takes: of `groups` groups of routes one, and of their steps one segment, of `per` steps or what is left of them
struct Segment {
    int group, at, first, length;
    __device__ __forceinline__ Segment(int groups, int per, int all) {
        group = CUT ? blockIdx.y % groups : blockIdx.y, at = CUT ? blockIdx.y / groups : 0;
        first = at * per, length = CUT ? min(per, all - first) : all;
    }
    // How many come after this one
    __device__ __forceinline__ int after(int per, int all) const { return CUT ? (all - 1) / per - at : 0; }
};

// The state, or its adjoint, that enters a segment. What those before it make of nothing, and the sums of their step sizes, were
// found by scan2d_ends.cu: they are `count`, `stride` rows apart, from row `at` on. `rate` is A log2(e).
__device__ __forceinline__ float entering(const float* end_states, const float* end_steps, int count, long long at,
                                          long long stride, int n, float rate) {
    float h = 0;
    if (!CUT) return h;
#pragma unroll 4
    for (int i = 0; i < count; i++, at += stride) h = power2(rate * end_steps[at]) * h + end_states[at * N + n];
    return h;
}
