// Affinities of the pairs of one image, the half stencil, without a tensor of gathered features.
//
// The map is read through a padded copy, so that a vector may start at any column and reach past the last one.
// Results there are not stored.
#pragma once

#include "problems.hpp"
#include "vector.hpp"

namespace MULTISA_ISA {

using multisa::AffinityProblem;

// A copy of the map with `margin` columns left and right and `margin` rows below.
struct Padded {
    const float* origin;  // of the first pixel
    long stride, plane;   // floats from row to row, and from one map of the stack to the next
};

MULTISA_INLINE long padded_stride(const AffinityProblem& problem) {
    return problem.width + 2 * (problem.radius - 1) + WIDTH;
}

// Floats of workspace for a problem.
static long affinity_workspace(const AffinityProblem& problem) {
    return problem.depth * (problem.height + problem.radius) * padded_stride(problem);
}

static Padded pad(const AffinityProblem& problem, float* to) {
    const long margin = problem.radius - 1, stride = padded_stride(problem);
    const long plane = (problem.height + problem.radius) * stride;
    memset(to, 0, (size_t)(problem.depth * plane) * sizeof(float));
    for (long d = 0; d < problem.depth; ++d)
        for (long y = 0; y < problem.height; ++y)
            memcpy(to + d * plane + y * stride + margin, problem.map + (d * problem.height + y) * problem.width,
                   (size_t)problem.width * sizeof(float));
    return {to + margin, stride, plane};
}

// Store the part of a vector of plane (dy, dx) whose pairs lie in the grid, 0 for the other pixels.
MULTISA_INLINE void store_pairs(const AffinityProblem& problem, long dx, Vec value, long x, float* row) {
    for (int lane = 0; lane < WIDTH && x + lane < problem.width; ++lane) {
        const long target = x + lane + dx;
        row[x + lane] = target >= 0 && target < problem.width ? value[lane] : 0.0f;
    }
}

MULTISA_INLINE void store_row(const AffinityProblem& problem, long dx, Vec value, long x, float* row) {
    const long target = x + dx;
    if (target >= 0 && target + WIDTH <= problem.width && x + WIDTH <= problem.width)
        store(row + x, value);
    else
        store_pairs(problem, dx, value, x, row);
}

// exp(-mean over depth of |f_i - f_j|) for PLANES neighbours dx = first, first + 1, ... of row dy.
template <int PLANES>
static void compare_features(const AffinityProblem& problem, const Padded& map, long dy, long first, float* out) {
    const long pixels = problem.height * problem.width;
    const float scale = -1.0f / (float)problem.depth;
    for (long y = 0; y + dy < problem.height; ++y) {
        for (long x = 0; x < problem.width; x += WIDTH) {
            const float* source = map.origin + y * map.stride + x;
            const float* target = source + dy * map.stride + first;
            Vec sum[PLANES] = {};
            for (long d = 0; d < problem.depth; ++d, source += map.plane, target += map.plane) {
                const Vec here = load(source);
#pragma GCC unroll 16
                for (int p = 0; p < PLANES; ++p) sum[p] += absolute(load(target + p) - here);
            }
            for (int p = 0; p < PLANES; ++p)
                store_row(problem, first + p, exponential(sum[p] * scale), x, out + p * pixels + y * problem.width);
        }
    }
}

// Affinities from features; `workspace` has affinity_workspace() floats. Returns false when one is not finite.
static bool affinity_from_features(const AffinityProblem& problem, float* workspace) {
    const long pixels = problem.height * problem.width;
    if (!all_finite(problem.map, problem.depth * pixels)) return false;
    const Padded map = pad(problem, workspace);
    float* out = problem.out;
    for (long dy = 0; dy < problem.radius; ++dy) {
        const long reach = multisa::reach_of(problem.radius, dy);
        const long planes = dy == 0 ? reach : 2 * reach + 1;
        if (planes == 0) continue;  // of radius 1: no pairs, and nowhere to write
        memset(out, 0, (size_t)(planes * pixels) * sizeof(float));
        long p = 0;
        const long first = dy == 0 ? 1 : -reach;
        for (; p + 4 < planes; p += 5, out += 5 * pixels) compare_features<5>(problem, map, dy, first + p, out);
        for (; p < planes; ++p, out += pixels) compare_features<1>(problem, map, dy, first + p, out);
    }
    return true;
}

// 1 - max over the straight path of the pair (dy, dx): the points whose squared distance to it is below 1.
static void follow_path(const AffinityProblem& problem, const Padded& map, long dy, long dx, float* out) {
    const long length = dy * dy + dx * dx;
    const long low = dx < 0 ? dx : 0, high = dx > 0 ? dx : 0;
    for (long y = 0; y + dy < problem.height; ++y) {
        for (long x = 0; x < problem.width; x += WIDTH) {
            Vec highest = {};
            for (long py = 0; py <= dy; ++py)
                for (long px = low; px <= high; ++px) {
                    const long off = dy * px - dx * py;
                    if (off * off < length)
                        highest = larger(highest, load(map.origin + (y + py) * map.stride + x + px));
                }
            store_row(problem, dx, 1.0f - highest, x, out + y * problem.width);
        }
    }
}

// Affinities from a boundary map; `workspace` as above. Returns false for a value outside [0, 1].
static bool affinity_from_boundary(const AffinityProblem& problem, float* workspace) {
    const long pixels = problem.height * problem.width;
    IntVec valid = ~IntVec{};
    const Padded map = pad(problem, workspace);
    for (long y = 0; y < problem.height; ++y)
        for (long x = 0; x < problem.width; x += WIDTH) {
            const Vec value = load(map.origin + y * map.stride + x);
            valid &= (value >= 0) & (value <= 1);
        }
    if (!all(valid)) return false;
    float* out = problem.out;
    for (long dy = 0; dy < problem.radius; ++dy) {
        const long reach = multisa::reach_of(problem.radius, dy);
        for (long dx = dy == 0 ? 1 : -reach; dx <= reach; ++dx, out += pixels) {
            memset(out, 0, (size_t)pixels * sizeof(float));
            follow_path(problem, map, dy, dx, out);
        }
    }
    return true;
}

}  // namespace MULTISA_ISA
