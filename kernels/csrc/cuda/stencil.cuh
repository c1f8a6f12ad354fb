// Shared by the random walk and the affinities: the half stencil, pixels of a thread, bits of the error word.
#pragma once

#include "device.cuh"

namespace multisa {

constexpr int run = 4;  // pixels of a thread, side by side: one vector load

// Invalid input. Kernels cannot raise, so they set a bit.
constexpr unsigned bad_affinity = 1, bad_scores = 2, bad_boundary = 4, bad_features = 8;

// The stencil of one radius at compile time, in the order of stencil_offsets().
template <int radius>
struct Stencil {
    static constexpr int reach = radius - 1, halo = (reach + run - 1) / run * run;
    static constexpr int window = run + 2 * halo;  // columns that the run of a thread sees

    __device__ static constexpr bool holds(int dy, int dx) {
        return dy * dy + dx * dx < radius * radius && (dy > 0 || dx > 0);
    }
    __device__ static constexpr int plane(int dy, int dx) {
        int count = 0;
        for (int y = 0; y <= dy; ++y)
            for (int x = -reach; x <= reach; ++x)
                if (holds(y, x) && (y < dy || x < dx)) ++count;
        return count;
    }
};

}  // namespace multisa
