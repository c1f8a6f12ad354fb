// Mean field of the dense CRF (Kraehenbuehl & Koltun 2011, algorithm 1) on two lattices.
//
// An iteration is one pass over the points and one blur of each lattice. The pass works on blocks that fit the
// L1 cache: slice both lattices, softmax, splat the new belief. The belief of all points is never in memory at once.
// Points are sorted by their bilateral simplex: its corners are loaded once for all of its points, and their new
// values are summed in registers.
#pragma once

#include "problems.hpp"
#include "vector.hpp"

namespace MULTISA_ISA {

using multisa::MeanFieldProblem;

// The energy of the labels that pad a row, so that their belief vanishes.
constexpr float PADDING_ENERGY = 1e4f;
// The unary energy treats probabilities below this as this value (unary_from_softmax of pydensecrf).
constexpr float PROBABILITY_FLOOR = 1e-5f;

// Floats of a row: vectors of 4 or 8 lanes where the labels fit them badly otherwise.
static long row_length(long labels) {
    if (labels <= 4) return 4;
    if (labels <= 8) return 8;
    if (labels > 16 && labels <= 24) return 24;
    return (labels + 15) / 16 * 16;
}

// Values at the vertices of one lattice; the row after the last is the missing neighbour and stays zero.
struct Values {
    float *now, *next;
};

struct MeanFieldMemory {
    float* rows;  // [points][row], the unary energies; the belief in the end
    Values bilateral, spatial;
};

static long mean_field_workspace(const MeanFieldProblem& problem) {
    const long vertices = problem.bilateral_vertices + problem.spatial_vertices + 2;
    return (problem.points + 2 * vertices) * row_length(problem.labels) + 2 * WIDTH;
}

static MeanFieldMemory lay_out_memory(const MeanFieldProblem& problem, float* workspace) {
    const long row = row_length(problem.labels);
    const long bilateral = (problem.bilateral_vertices + 1) * row, spatial = (problem.spatial_vertices + 1) * row;
    MeanFieldMemory memory;
    memory.rows = workspace;
    memory.bilateral = {workspace + problem.points * row, workspace + problem.points * row + bilateral};
    memory.spatial = {memory.bilateral.next + bilateral, memory.bilateral.next + bilateral + spatial};
    memset(memory.bilateral.now, 0, (size_t)(2 * (bilateral + spatial)) * sizeof(float));
    return memory;
}

// Points of a block: their rows fit the L1 cache beside the other data.
constexpr long BLOCK_POINTS = 128;
// The maximum number of labels: as many as uint8 label maps can tell apart.
constexpr long MAX_ROW = 256;

// Write the unary energies, each row at the position of its point.
static void write_energies(const MeanFieldProblem& problem, float* rows) {
    const long row = row_length(problem.labels);
    float block[WIDTH * MAX_ROW];  // [WIDTH][row], so that rows are moved whole
    for (long i = 0; i < WIDTH * row; ++i) block[i] = i % row < problem.labels ? problem.energy_of_others : PADDING_ENERGY;
    for (long pixel = 0; pixel < problem.points; pixel += WIDTH) {
        const long count = problem.points - pixel < WIDTH ? problem.points - pixel : WIDTH;
        for (long label = 0; label < problem.labels && problem.hard_labels == nullptr; ++label) {
            const float* plane = problem.probabilities[label] + pixel;
            Vec probability = broadcast(1.0f);
            if (count == WIDTH)
                probability = load(plane);
            else
                for (long lane = 0; lane < count; ++lane) probability[lane] = plane[lane];
            const Vec energy = -logarithm(larger(smaller(probability, broadcast(1.0f)), broadcast(PROBABILITY_FLOOR)));
            for (long lane = 0; lane < WIDTH; ++lane) block[lane * row + label] = energy[lane];
        }
        for (long lane = 0; lane < count; ++lane) {
            float* to = rows + problem.position[pixel + lane] * row;
            memcpy(to, block + lane * row, (size_t)row * sizeof(float));
            if (problem.hard_labels != nullptr) to[problem.hard_labels[pixel + lane]] = problem.energy_of_label;
        }
    }
}

static void read_belief(const MeanFieldProblem& problem, const float* rows) {
    const long row = row_length(problem.labels);
    for (long pixel = 0; pixel < problem.points; pixel += WIDTH) {
        const long count = problem.points - pixel < WIDTH ? problem.points - pixel : WIDTH;
        const float* from[WIDTH];
        for (long lane = 0; lane < WIDTH; ++lane)
            from[lane] = rows + problem.position[pixel + (lane < count ? lane : 0)] * row;
        for (long label = 0; label < problem.labels; ++label) {
            Vec belief;
            for (long lane = 0; lane < WIDTH; ++lane) belief[lane] = from[lane][label];
            if (count == WIDTH)
                store(problem.out[label] + pixel, belief);
            else
                for (long lane = 0; lane < count; ++lane) problem.out[label][pixel + lane] = belief[lane];
        }
    }
}

// Convolve with (1/2, 1, 1/2) along each axis in turn (section 3.2 of Adams et al.); the result is `next`.
template <class V>
static void blur(Values& values, const int32_t* neighbours, int axes, long vertices, long row) {
    for (int axis = 0; axis < axes; ++axis, neighbours += 2 * vertices) {
        const float* from = values.next;
        float* to = values.now;
        for (long vertex = 0; vertex < vertices; ++vertex) {
            const float* before = from + neighbours[2 * vertex] * row;
            const float* after = from + neighbours[2 * vertex + 1] * row;
            for (long label = 0; label < row; label += LANES_OF<V>)
                store(to + vertex * row + label, load<V>(from + vertex * row + label) +
                                                     (load<V>(before + label) + load<V>(after + label)) * 0.5f);
        }
        values.now = values.next;
        values.next = to;
    }
}

// Softmax of each row in place. Short rows share a vector: GROUP lanes each.
template <int GROUP>
static void softmax_rows(float* values, long floats) {
    for (long at = 0; at < floats; at += WIDTH) {
        Vec power = load(values + at);
        power = exponential(power - largest_of_group<GROUP>(power));
        store(values + at, power / sum_of_group<GROUP>(power));
    }
}

// The same for rows longer than a vector; V divides them.
template <class V>
static void softmax_long_rows(float* values, long floats, long row) {
    for (float* end = values + floats; values < end; values += row) {
        V highest = load<V>(values), sum = {};
        for (long i = LANES_OF<V>; i < row; i += LANES_OF<V>) highest = larger(highest, load<V>(values + i));
        highest = largest_of_group<LANES_OF<V>>(highest);
        for (long i = 0; i < row; i += LANES_OF<V>) {
            const V power = exponential(load<V>(values + i) - highest);
            store(values + i, power);
            sum += power;
        }
        const V share = 1.0f / sum_of_group<LANES_OF<V>>(sum);
        for (long i = 0; i < row; i += LANES_OF<V>) store(values + i, load<V>(values + i) * share);
    }
}

static void softmax(float* values, long points, long row) {
    if (row == 4)
        softmax_rows<4>(values, points * row);
    else if (row == 8 && WIDTH >= 8)
        softmax_rows<WIDTH < 8 ? WIDTH : 8>(values, points * row);
    else if (row % 16 == 0)
        softmax_long_rows<Vec>(values, points * row, row);
    else
        softmax_long_rows<VectorOf<WIDTH < 8 ? WIDTH : 8>::Aligned>(values, points * row, row);
}

// Points first..last - 1, all of one block, and the simplex that the first lies in.
struct Block {
    long first, last, simplex;
};

// Take from both lattices, less the unary energy: belief[point - first] = message - energy. COUNT vectors of a
// row at a time, those from `offset` on, so that the corners fit the registers.
template <class V, int COUNT>
MULTISA_INLINE void slice(const MeanFieldProblem& problem, const MeanFieldMemory& memory, const Block& block, long row,
                          long offset, float* belief) {
    constexpr int LANES = LANES_OF<V>;
    const float* bilateral = memory.bilateral.now + offset;
    const float* spatial = memory.spatial.now + offset;
    const float* energy = memory.rows + offset;
    long at = block.first;
    for (long simplex = block.simplex; at < block.last; ++simplex) {
        const int32_t* corner = problem.simplex_vertices + simplex * 6;
        const long end = problem.run[simplex + 1] < block.last ? problem.run[simplex + 1] : block.last;
        V value[6][COUNT];
#pragma GCC unroll 6
        for (int k = 0; k < 6; ++k)
#pragma GCC unroll 4
            for (int v = 0; v < COUNT; ++v) value[k][v] = load<V>(bilateral + corner[k] * row + v * LANES);
        for (; at < end; ++at) {
            const multisa::CrfPoint& point = problem.point[at];
#pragma GCC unroll 4
            for (int v = 0; v < COUNT; ++v) {
                // Two sums: a single chain of additions would have twice the latency.
                V near = value[0][v] * point.bilateral_weight[0] - load<V>(energy + at * row + v * LANES);
                V far = value[1][v] * point.bilateral_weight[1];
#pragma GCC unroll 6
                for (int k = 2; k < 6; ++k) (k % 2 ? far : near) += value[k][v] * point.bilateral_weight[k];
#pragma GCC unroll 3
                for (int k = 0; k < 3; ++k)
                    (k % 2 ? near : far) +=
                        load<V>(spatial + point.spatial_vertex[k] * row + v * LANES) * point.spatial_weight[k];
                store(belief + (at - block.first) * row + offset + v * LANES, near + far);
            }
        }
    }
}

// Splat the belief of a block into the next values of both lattices.
template <class V, int COUNT>
MULTISA_INLINE void splat(const MeanFieldProblem& problem, const MeanFieldMemory& memory, const Block& block, long row,
                          long offset, const float* belief) {
    constexpr int LANES = LANES_OF<V>;
    float* bilateral = memory.bilateral.next + offset;
    float* spatial = memory.spatial.next + offset;
    long at = block.first;
    for (long simplex = block.simplex; at < block.last; ++simplex) {
        const int32_t* corner = problem.simplex_vertices + simplex * 6;
        const long end = problem.run[simplex + 1] < block.last ? problem.run[simplex + 1] : block.last;
        V sum[6][COUNT];
#pragma GCC unroll 6
        for (int k = 0; k < 6; ++k)
#pragma GCC unroll 4
            for (int v = 0; v < COUNT; ++v) sum[k][v] = load<V>(bilateral + corner[k] * row + v * LANES);
        for (; at < end; ++at) {
            const multisa::CrfPoint& point = problem.point[at];
#pragma GCC unroll 4
            for (int v = 0; v < COUNT; ++v) {
                const V share = load<V>(belief + (at - block.first) * row + offset + v * LANES);
#pragma GCC unroll 6
                for (int k = 0; k < 6; ++k) sum[k][v] += share * point.bilateral_weight[k];
#pragma GCC unroll 3
                for (int k = 0; k < 3; ++k) {
                    float* to = spatial + point.spatial_vertex[k] * row + v * LANES;
                    store(to, load<V>(to) + share * point.spatial_weight[k]);
                }
            }
        }
#pragma GCC unroll 6
        for (int k = 0; k < 6; ++k)
#pragma GCC unroll 4
            for (int v = 0; v < COUNT; ++v) store(bilateral + corner[k] * row + v * LANES, sum[k][v]);
    }
}

enum class Pass { FIRST, MIDDLE, LAST };

// One pass over the points: the belief from the values `now`, in the FIRST from the unary energies alone, is
// summed into the values `next`, or written over the energies in the LAST. COUNT vectors of V at a time make a row.
template <class V, int COUNT>
static void pass_over_points(const MeanFieldProblem& problem, const MeanFieldMemory& memory, Pass pass) {
    const long row = row_length(problem.labels);
    alignas(64) float belief[BLOCK_POINTS * MAX_ROW];
    Block block = {0, 0, 0};
    for (; block.first < problem.points; block.first = block.last) {
        block.last = block.first + BLOCK_POINTS < problem.points ? block.first + BLOCK_POINTS : problem.points;
        while (problem.run[block.simplex + 1] <= block.first) ++block.simplex;
        const long count = block.last - block.first;
        if (pass == Pass::FIRST) {
            for (long i = 0; i < count * row; ++i) belief[i] = -memory.rows[block.first * row + i];
        } else {
            for (long offset = 0; offset < row; offset += COUNT * LANES_OF<V>)
                slice<V, COUNT>(problem, memory, block, row, offset, belief);
        }
        softmax(belief, count, row);
        if (pass == Pass::LAST) {
            memcpy(memory.rows + block.first * row, belief, (size_t)(count * row) * sizeof(float));
            continue;
        }
        for (long offset = 0; offset < row; offset += COUNT * LANES_OF<V>)
            splat<V, COUNT>(problem, memory, block, row, offset, belief);
    }
}

// Blur the splatted values, and clear the next ones.
template <class V>
static void exchange(Values& values, const int32_t* neighbours, int axes, long vertices, long row) {
    blur<V>(values, neighbours, axes, vertices, row);
    float* blurred = values.next;
    values.next = values.now;
    values.now = blurred;
    memset(values.next, 0, (size_t)(vertices * row) * sizeof(float));
}

template <class V, int COUNT>
static void iterate(const MeanFieldProblem& problem, MeanFieldMemory& memory) {
    const long row = row_length(problem.labels);
    if (problem.iterations > 0) pass_over_points<V, COUNT>(problem, memory, Pass::FIRST);
    for (long i = 0; i < problem.iterations; ++i) {
        exchange<V>(memory.bilateral, problem.bilateral_neighbours, 6, problem.bilateral_vertices, row);
        exchange<V>(memory.spatial, problem.spatial_neighbours, 3, problem.spatial_vertices, row);
        pass_over_points<V, COUNT>(problem, memory, i + 1 < problem.iterations ? Pass::MIDDLE : Pass::LAST);
    }
    if (problem.iterations > 0) return;
    // Without an iteration the belief is that of the unary energies alone.
    for (long i = 0; i < problem.points * row; ++i) memory.rows[i] = -memory.rows[i];
    softmax(memory.rows, problem.points, row);
}

// Run mean field; `workspace` has mean_field_workspace() floats.
static void mean_field(const MeanFieldProblem& problem, float* workspace) {
    MeanFieldMemory memory = lay_out_memory(problem, workspace);
    write_energies(problem, memory.rows);
    constexpr int HALF = WIDTH < 8 ? WIDTH : 8;
    switch (row_length(problem.labels)) {
        case 4: iterate<VectorOf<4>::Aligned, 1>(problem, memory); break;
        case 8: iterate<VectorOf<HALF>::Aligned, 8 / HALF>(problem, memory); break;
        case 24: iterate<VectorOf<HALF>::Aligned, WIDTH < 16 ? 1 : 3>(problem, memory); break;
        default: iterate<Vec, 1>(problem, memory);
    }
    read_belief(problem, memory.rows);
}

}  // namespace MULTISA_ISA
