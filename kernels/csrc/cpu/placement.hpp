// Points of the permutohedral lattice, a vector of them at a time.
#pragma once

#include "problems.hpp"
#include "vector.hpp"

namespace MULTISA_ISA {

using multisa::PlacementProblem;

// Map features onto the hyperplane of zero coordinate sum, scaled so that splatting, blurring and slicing
// together have a standard deviation of one. The roundings are those of pydensecrf: a point on the border of two
// simplices must fall into the same one, or the mean field can amplify the difference.
template <int DIMENSION>
MULTISA_INLINE void elevate(const Vec (&feature)[DIMENSION], Vec (&elevated)[DIMENSION + 1]) {
    const float deviation = (float)(__builtin_sqrt(2.0 / 3.0) * (DIMENSION + 1));
    Vec total = {};
#pragma GCC unroll 8
    for (int axis = DIMENSION; axis > 0; --axis) {
        const float scale = (float)(1.0 / __builtin_sqrt((double)axis * (axis + 1)) * (double)deviation);
        Vec scaled = feature[axis - 1] * scale;
        MULTISA_ROUNDED(scaled);
        Vec multiple = scaled * (float)axis;
        MULTISA_ROUNDED(multiple);
        elevated[axis] = total - multiple;
        total += scaled;
    }
    elevated[0] = total;
}

template <int DIMENSION>
MULTISA_INLINE void place_vector(const PlacementProblem& problem, long at, IntVec (&lowest)[DIMENSION],
                                 IntVec (&highest)[DIMENSION]) {
    constexpr int CORNERS = DIMENSION + 1;
    Vec feature[DIMENSION], elevated[CORNERS], difference[CORNERS];
    for (int axis = 0; axis < DIMENSION; ++axis) feature[axis] = load(problem.features[axis] + at);
    elevate<DIMENSION>(feature, elevated);
    IntVec origin[CORNERS], rank[CORNERS], excess = {};
    for (int i = 0; i < CORNERS; ++i) {
        const Vec multiple = nearest(elevated[i] * (1.0f / CORNERS));
        origin[i] = __builtin_convertvector(multiple, IntVec);
        difference[i] = elevated[i] - multiple * (float)CORNERS;
        excess += origin[i];
        rank[i] = IntVec{};
    }
    for (int i = 0; i < CORNERS; ++i)
        for (int j = i + 1; j < CORNERS; ++j) {
            const IntVec less = difference[i] < difference[j];  // -1 where it holds
            rank[i] -= less;
            rank[j] += less + 1;
        }
    // Rounding each coordinate separately can leave the plane; the outermost coordinates move back.
    for (int i = 0; i < CORNERS; ++i) {
        rank[i] += excess;
        const IntVec low = rank[i] < 0, high = rank[i] >= CORNERS;
        origin[i] += high - low;
        rank[i] += (high - low) * CORNERS;
        difference[i] = elevated[i] - __builtin_convertvector(origin[i] * CORNERS, Vec);
    }
    // Barycentric coordinates from the sorted differences (proposition 4.2).
    Vec ordered[CORNERS], weight[CORNERS];
    for (int r = 0; r < CORNERS; ++r) {
        ordered[r] = Vec{};
        for (int i = 0; i < CORNERS; ++i) ordered[r] = rank[i] == r ? difference[i] : ordered[r];
        ordered[r] *= 1.0f / CORNERS;
    }
    weight[0] = 1.0f + ordered[DIMENSION] - ordered[0];
    for (int k = 1; k < CORNERS; ++k) weight[k] = ordered[DIMENSION - k] - ordered[CORNERS - k];
    IntVec code = {};
    for (int axis = 0; axis < DIMENSION; ++axis) {
        code = code << 3 | rank[axis];
        lowest[axis] = lowest[axis] < origin[axis] ? lowest[axis] : origin[axis];
        highest[axis] = highest[axis] > origin[axis] ? highest[axis] : origin[axis];
    }
    const long left = problem.count - at;
    const int lanes = left < WIDTH ? (int)left : WIDTH;
    for (int lane = 0; lane < lanes; ++lane) {
        for (int axis = 0; axis < DIMENSION; ++axis) problem.origin[axis][at + lane] = origin[axis][lane];
        problem.ranks[at + lane] = code[lane];
        for (int k = 0; k < CORNERS; ++k) problem.weights[(at + lane) * CORNERS + k] = weight[k][lane];
    }
}

template <int DIMENSION>
static void place_points(const PlacementProblem& problem) {
    IntVec lowest[DIMENSION], highest[DIMENSION];
    for (int axis = 0; axis < DIMENSION; ++axis) {
        lowest[axis] = IntVec{} + problem.lowest[axis];
        highest[axis] = IntVec{} + problem.highest[axis];
    }
    for (long at = 0; at < problem.count; at += WIDTH) place_vector<DIMENSION>(problem, at, lowest, highest);
    for (int axis = 0; axis < DIMENSION; ++axis)
        for (int lane = 0; lane < WIDTH; ++lane) {
            if (lowest[axis][lane] < problem.lowest[axis]) problem.lowest[axis] = lowest[axis][lane];
            if (highest[axis][lane] > problem.highest[axis]) problem.highest[axis] = highest[axis][lane];
        }
}

static void place(const PlacementProblem& problem) {
    if (problem.dimension == 2)
        place_points<2>(problem);
    else
        place_points<5>(problem);
}

}  // namespace MULTISA_ISA
