// Segments of the routes of a fused 2D scan; included by scan2d.cu, scan2d_lanes.cu and scan2d_lanes_backward.cu.
//
// Compile-time: CUT (a route has several; then no two routes share a block).

// What a block takes: of `groups` groups of routes one, and of their steps one segment, of `per` steps or what is left of them
struct Segment {
    int group, at, later, first, length;  // `at` segments are before it, `later` after it
    __device__ __forceinline__ Segment(int groups, int per, int all) {
        group = CUT ? blockIdx.y % groups : blockIdx.y, at = CUT ? blockIdx.y / groups : 0;
        first = at * per, length = CUT ? min(per, all - first) : all, later = CUT ? (all - 1) / per - at : 0;
    }
};

// The state that enters a segment or, not FORWARD, the adjoint, of the segments before it or after it. What each makes of nothing,
// and the sum of its step sizes, was found by scan2d_ends.cu: rows `stride` apart from `row` on. `rate` is A log2(e).
template <bool FORWARD>
__device__ __forceinline__ float entering(const Segment& to, const float* end_states, const float* end_steps, long long row,
                                          long long stride, int n, float rate) {
    float h = 0;
    if (!CUT) return h;
    int count = FORWARD ? to.at : to.later;
    if (!FORWARD) row += (to.at + to.later - 1) * stride, stride = -stride;
#pragma unroll 4
    for (int i = 0; i < count; i++, row += stride) h = power2(rate * end_steps[row]) * h + end_states[row * N + n];
    return h;
}
