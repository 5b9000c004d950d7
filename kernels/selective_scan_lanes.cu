// How lanes that share the steps of a channel read and write them, and what enters and leaves each lane's steps; included by
// selective_scan_backward_steps.cu.

constexpr int LANES = 8, STEPS = CHUNK / LANES;
constexpr int PLACES = 32 / LANES;  // channels next to each other in a warp

// Where a step stands among a channel's CHUNK numbers if a lane has `count` of them: four of a lane together, in an order in
// which neither the lanes of a warp nor threads that load neighbours meet in a bank of shared memory
__device__ __forceinline__ int place_of(int channel, int t, int count) {
    if (count < 4) return t;
    int lane = t / count, quad = t % count / 4, mixed = lane ^ (channel % 4 * 2 + channel / 4 % 2) ^ quad * 2;
    return (quad * LANES + mixed) * 4 + t % 4;
}

// A lane's numbers of a channel, in shared memory
template <int COUNT> struct Places {
    int at[COUNT / 4 + (COUNT < 4)];

    __device__ __forceinline__ Places(int start, int channel, int lane) {
#pragma unroll
        for (int q = 0; q < sizeof at / 4; q++) {
            at[q] = start + place_of(channel, lane * COUNT + 4 * q, COUNT);
            hold(at[q]);
        }
    }
    __device__ __forceinline__ void read(float (&to)[COUNT], const float* from) const {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            if constexpr (COUNT >= 4) {
                float4 v = *(const float4*)(from + at[i / 4]);
                to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
            } else {
                for (int j = 0; j < COUNT; j++) to[j] = from[at[0] + j];
            }
        }
    }
    __device__ __forceinline__ void write(float* to, const float (&from)[COUNT]) const {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            if constexpr (COUNT >= 4) {
                *(float4*)(to + at[i / 4]) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
            } else {
                for (int j = 0; j < COUNT; j++) to[at[0] + j] = from[j];
            }
        }
    }
};

// The sums of step sizes of a lane, and of the 2 and 4 lanes that end with it, or (not RIGHT) begin with it
template <bool RIGHT> struct Reach {
    float sums[3];

    __device__ __forceinline__ explicit Reach(float sum) : sums{sum} {
#pragma unroll
        for (int i = 1; i < 3; i++) sums[i] = sums[i - 1] + behind(sums[i - 1], i);
    }
    static __device__ __forceinline__ float behind(float v, int by) {
        return RIGHT ? __shfl_up_sync(ALL, v, by * PLACES) : __shfl_down_sync(ALL, v, by * PLACES);
    }
    // What enters a lane's steps, where `end` is what they make of nothing, and `carry` enters the first lane's, which alone
    // knows it; it becomes what the last lane leaves. Lanes follow each other from left to right, or from right to left.
    __device__ __forceinline__ float enter(float end, float rate, int lane, float& carry) const {
        int order = RIGHT ? lane : LANES - 1 - lane, from = threadIdx.x;
        if (order == 0) end += power2(sums[0] * rate) * carry;
#pragma unroll
        for (int i = 0; i < 3; i++) {
            float before = behind(end, 1 << i), decay = power2(sums[i] * rate);
            if (order >= 1 << i) end += decay * before;
        }
        float left = __shfl_sync(ALL, end, from + (RIGHT ? -PLACES : PLACES)), in = order == 0 ? carry : left;
        carry = left;
        return in;
    }
};
