// The random walk on one image: (D^-1 W)^steps on every channel, without a matrix; W is A^beta and the identity.
//
// Operator. One product is P x = r (W' x) + c x: W' holds the pairs, r is 1 / D in float32 and c is 1 - r D', with
// D' the row sums of W' as this very code adds them up. Rows of P therefore sum to one as nearly as float32 can
// say, and no step shifts a constant but by its own rounding. P is similar to the symmetric D^-1/2 W D^-1/2, so
// its eigenvalues are real and in [-1, 1], and the Chebyshev series of x^steps applies to it.
//
// Layout. The image, flattened row by row, is cut into WIDTH segments of equal length, one for each lane: lane
// i of vector j is pixel i * length + j. A neighbour at a fixed offset is then the vector at a fixed distance,
// so every load is whole and aligned, for every offset and every image width. Past both ends of the segments
// lies a halo, the vectors of the other end with the lanes moved by one. Of each pair only one weight is
// stored, at its source, and the target finds it there: weights are what is read most, and so those of a 128 x
// 128 image nearly fit the second cache. They have no such halo, but are read one float early for each lane that
// they have to move by; the lanes that get nothing meet zeros in the halo of the state.
#pragma once

#include "problems.hpp"
#include "vector.hpp"

namespace MULTISA_ISA {

using multisa::WalkProblem;

constexpr int MAX_RADIUS = 64;
// Channels taken at once: each weight is loaded once for all of them.
constexpr int CHANNEL_GROUP = 4;
// The most vectors of one channel summed at once; segments are multiples of it, and weights have so many extra
// vectors in front that a block never has to move only some of its lanes.
constexpr int MAX_BLOCK = 8;
// Edges below this count as none: far under the resolution of a float32 sum with the self-loop of 1.
constexpr float NEGLIGIBLE_EDGE = 1e-20f;

// An image in the layout above. Row dy of the stencil has the planes dx = -reach..reach, side by side.
struct Grid {
    long width, pixels, length, halo, lead;
    int radius;
    int reach[MAX_RADIUS];
    const Vec* row[MAX_RADIUS];  // [length][planes_of_row], `lead` vectors in front, radius - 1 behind
    const Vec* inverse_degree;   // r, [length]
    const Vec* self;             // c, [length]
};

// One product: next = scale * P x - previous where `subtract`, and total += coefficient * next.
struct Step {
    float scale;
    bool subtract;
    float coefficient;
};

// The channels of a group in the layout above; `next` is `previous` before the step.
struct States {
    const Vec* current[CHANNEL_GROUP];
    Vec* next[CHANNEL_GROUP];
    Vec* total[CHANNEL_GROUP];
};

static Grid grid_of(const WalkProblem& problem) {
    Grid grid = {};
    grid.width = problem.width;
    grid.pixels = problem.height * grid.width;
    const long unit = WIDTH * MAX_BLOCK;
    grid.length = (grid.pixels + unit - 1) / unit * MAX_BLOCK;
    grid.radius = problem.radius;
    const long far = problem.radius - 1;
    grid.halo = far * grid.width + far + 1;
    grid.lead = 2 * far + MAX_BLOCK;
    for (int dy = 0; dy <= far; ++dy) grid.reach[dy] = multisa::reach_of(problem.radius, dy);
    return grid;
}

// Planes of a row of the stencil; in the row of the pixel itself only pairs to the right are stored.
MULTISA_INLINE long planes_of_row(const Grid& grid, int dy) {
    return dy == 0 ? grid.reach[0] : 2 * grid.reach[dy] + 1;
}

// Vectors that a row of the stencil takes in the workspace.
MULTISA_INLINE long row_size(const Grid& grid, int dy) {
    return (grid.lead + grid.length + grid.radius - 1) * planes_of_row(grid, dy);
}

// Vectors of one channel: two states with halos, and their sum.
MULTISA_INLINE long state_size(const Grid& grid) { return grid.length + 2 * grid.halo + 1; }
MULTISA_INLINE long channel_size(const Grid& grid) { return 2 * state_size(grid) + grid.length; }

// Floats of workspace for a problem.
static long walk_workspace(const WalkProblem& problem) {
    const Grid grid = grid_of(problem);
    long vectors = 1 + 2 * grid.length + CHANNEL_GROUP * channel_size(grid);
    for (int dy = 0; dy < grid.radius; ++dy) vectors += row_size(grid, dy);
    return vectors * WIDTH;
}

// base^exponent for base in [0, 1].
struct Power {
    float exponent;
    int whole;  // the exponent, or 0 when it is no small whole number

    MULTISA_MEMBER Vec operator()(Vec base) const {
        if (whole == 0) {
            const Vec result = exponential(logarithm(larger(base, broadcast(1e-37f))) * exponent);
            return base > 0 ? result : Vec{};
        }
        Vec result = broadcast(1.0f), square = base;
        for (int rest = whole;; square *= square) {
            if (rest & 1) result *= square;
            if ((rest >>= 1) == 0) return result;
        }
    }
};

// Lane i of the result is lane (i + by) of the vector, modulo the lanes.
MULTISA_INLINE Vec rotated(Vec v, int by) {
    IntVec lanes;
    for (int lane = 0; lane < WIDTH; ++lane) lanes[lane] = (lane + by) & (WIDTH - 1);
    return permuted(v, lanes);
}

// Lane i of the result is lane i - 1, the segment before; the first has none and gets zero.
MULTISA_INLINE Vec one_lane_on(Vec v) {
    IntVec after_first = ~IntVec{};
    after_first[0] = 0;
    return (Vec)((IntVec)rotated(v, -1) & after_first);
}

// The pixels of vector j: lane i is from[i * length + j], or zero past the last pixel.
MULTISA_INLINE Vec gather(const float* from, const Grid& grid, long j) {
    Vec value;
    if (j + (WIDTH - 1) * grid.length < grid.pixels) {
        for (int lane = 0; lane < WIDTH; ++lane) value[lane] = from[lane * grid.length + j];
        return value;
    }
    for (int lane = 0; lane < WIDTH; ++lane) {
        const long pixel = lane * grid.length + j;
        value[lane] = pixel < grid.pixels ? from[pixel] : 0.0f;
    }
    return value;
}

// Put plane dx of stencil row dy into the layout, to the power of beta, 0 where there is no pair.
// Returns false for an affinity outside [0, 1] or NaN.
static bool lay_out_plane(const WalkProblem& problem, const Grid& grid, const float* plane, int dy, int dx, Vec* to,
                          const Power& power) {
    const long planes = planes_of_row(grid, dy);
    const long left = dx < 0 ? -dx : 0, right = dx > 0 ? dx : 0;
    const int first = (int)(left > problem.margin ? left : problem.margin);
    const int last = (int)(problem.width - (right > problem.margin ? right : problem.margin));  // exclusive
    const long rows = problem.height - (dy > problem.margin ? dy : problem.margin);
    IntVec column, sources;  // of each lane: where in its row it is, and how many of its pixels have this pair
    for (int lane = 0; lane < WIDTH; ++lane) {
        column[lane] = (int)(lane * grid.length % grid.width);
        sources[lane] = (int)(rows * grid.width - lane * grid.length);
    }
    IntVec valid = ~IntVec{};
    for (long j = 0; j < grid.length; ++j) {
        const IntVec inside = (column >= first) & (column < last) & ((int)j < sources);
        const Vec value = (Vec)((IntVec)gather(plane, grid, j) & inside);
        valid &= (value >= 0) & (value <= 1);  // false for a NaN
        const Vec weight = power(value);
        to[j * planes] = weight >= NEGLIGIBLE_EDGE ? weight : Vec{};
        column += 1;
        column = column == (int)grid.width ? IntVec{} : column;
    }
    // On a grid narrower than the stencil the "source" of a pair that cannot be may lie beyond the last vector.
    for (long j = grid.length; j < grid.length + grid.radius - 1; ++j) to[j * planes] = Vec{};
    for (long j = -1; j >= -grid.lead; --j) to[j * planes] = one_lane_on(to[(j + grid.length) * planes]);
    return all(valid);
}

// Where the sources lie whose pairs of row dy end at vector `at`: a pointer to its weights, as loads want it.
MULTISA_INLINE const float* weights_above(const Grid& grid, int dy, long at) {
    long source = at - dy * grid.width, lanes = 0;
    for (; source < 1 - grid.radius - MAX_BLOCK; source += grid.length) ++lanes;
    return (const float*)(grid.row[dy] + source * planes_of_row(grid, dy)) - lanes;
}

// One row of the stencil, seen from the source of its pairs: acc += w[k] * x[at + k - REACH]. FIRST is 0, or
// REACH + 1 for the row of the pixel itself, where only pairs to the right are stored.
template <int CHANNELS, int BLOCK, int REACH, int FIRST>
MULTISA_INLINE void pull_forward(Vec (&acc)[CHANNELS][BLOCK], const Vec* w, const States& states, long at) {
    constexpr int PLANES = 2 * REACH + 1 - FIRST;
#pragma GCC unroll 32
    for (int i = FIRST; i < BLOCK + 2 * REACH; ++i) {
#pragma GCC unroll 8
        for (int c = 0; c < CHANNELS; ++c) {
            const Vec value = states.current[c][at + i - REACH];
#pragma GCC unroll 8
            for (int b = 0; b < BLOCK; ++b) {
                const int k = i - b - FIRST;
                if (k >= 0 && k < PLANES) acc[c][b] += w[b * PLANES + k] * value;
            }
        }
    }
}

// The same row seen from the target: the weight lies at the source, under the mirrored offset.
template <int CHANNELS, int BLOCK, int REACH, int FIRST>
MULTISA_INLINE void pull_backward(Vec (&acc)[CHANNELS][BLOCK], const float* w, const States& states, long at) {
    constexpr int PLANES = 2 * REACH + 1 - FIRST;
#pragma GCC unroll 32
    for (int i = 0; i < BLOCK + 2 * REACH - FIRST; ++i) {
#pragma GCC unroll 8
        for (int c = 0; c < CHANNELS; ++c) {
            const Vec value = states.current[c][at + i - REACH];
#pragma GCC unroll 8
            for (int b = 0; b < BLOCK; ++b) {
                const int k = 2 * REACH - (i - b) - FIRST;
                if (k >= 0 && k < PLANES) acc[c][b] += load(w + ((i - REACH) * PLANES + k) * WIDTH) * value;
            }
        }
    }
}

// The sum over all neighbours for radius 5, the one everybody uses, written out.
template <int CHANNELS, int BLOCK>
MULTISA_INLINE void pull_radius_5(Vec (&acc)[CHANNELS][BLOCK], const Grid& grid, const States& states, long at) {
    const Vec* const* row = grid.row;
    const long w = grid.width;
    pull_backward<CHANNELS, BLOCK, 2, 0>(acc, weights_above(grid, 4, at), states, at - 4 * w);
    pull_backward<CHANNELS, BLOCK, 3, 0>(acc, weights_above(grid, 3, at), states, at - 3 * w);
    pull_backward<CHANNELS, BLOCK, 4, 0>(acc, weights_above(grid, 2, at), states, at - 2 * w);
    pull_backward<CHANNELS, BLOCK, 4, 0>(acc, weights_above(grid, 1, at), states, at - w);
    pull_backward<CHANNELS, BLOCK, 4, 5>(acc, weights_above(grid, 0, at), states, at);
    pull_forward<CHANNELS, BLOCK, 4, 5>(acc, row[0] + at * 4, states, at);
    pull_forward<CHANNELS, BLOCK, 4, 0>(acc, row[1] + at * 9, states, at + w);
    pull_forward<CHANNELS, BLOCK, 4, 0>(acc, row[2] + at * 9, states, at + 2 * w);
    pull_forward<CHANNELS, BLOCK, 3, 0>(acc, row[3] + at * 7, states, at + 3 * w);
    pull_forward<CHANNELS, BLOCK, 2, 0>(acc, row[4] + at * 5, states, at + 4 * w);
}

// The same for any radius.
template <int CHANNELS, int BLOCK>
MULTISA_INLINE void pull_any_radius(Vec (&acc)[CHANNELS][BLOCK], const Grid& grid, const States& states, long at) {
    for (int dy = 0; dy < grid.radius; ++dy) {
        const int reach = grid.reach[dy], first = dy == 0 ? 1 : -reach;
        const long planes = planes_of_row(grid, dy), above = at - dy * grid.width, below = at + dy * grid.width;
        const float* sources = weights_above(grid, dy, at);
        for (int dx = first; dx <= reach; ++dx) {
            const Vec* forward = grid.row[dy] + at * planes + dx - first;
            const float* backward = sources + (dx - first - dx * planes) * WIDTH;
            for (int b = 0; b < BLOCK; ++b) {
                for (int c = 0; c < CHANNELS; ++c)
                    acc[c][b] += forward[b * planes] * states.current[c][below + dx + b] +
                                 load(backward + b * planes * WIDTH) * states.current[c][above - dx + b];
            }
        }
    }
}

template <int CHANNELS, int BLOCK>
MULTISA_INLINE void pull(Vec (&acc)[CHANNELS][BLOCK], const Grid& grid, const States& states, long at) {
    for (auto& channel : acc)
        for (Vec& sum : channel) sum = Vec{};
    if (grid.radius == 5)
        pull_radius_5<CHANNELS, BLOCK>(acc, grid, states, at);
    else
        pull_any_radius<CHANNELS, BLOCK>(acc, grid, states, at);
}

// Copy the ends into the halos. After the last vector, lanes without a segment hold some finite number, whose
// weights are zero; before the first they hold zero, whose weights are some finite number.
static void fill_halo(Vec* state, const Grid& grid) {
    for (long j = -1; j >= -grid.halo; --j) state[j] = one_lane_on(state[j + grid.length]);
    for (long j = grid.length; j < grid.length + grid.halo; ++j)
        state[j] = rotated(state[j - grid.length], 1);
}

template <int CHANNELS>
static void take_step(const Grid& grid, const States& states, const Step& step) {
    // Sums side by side hide the latency of a multiply-add and share what they load, as many as there are
    // registers for: AVX-512 has 32, the others 16.
    constexpr int BLOCK = WIDTH < 16 ? (CHANNELS == 1 ? 8 : CHANNELS == 2 ? 4 : 2) : CHANNELS <= 2 ? 8 : 4;
    for (long at = 0; at < grid.length; at += BLOCK) {
        Vec acc[CHANNELS][BLOCK];
        pull<CHANNELS, BLOCK>(acc, grid, states, at);
        for (int b = 0; b < BLOCK; ++b) {
            const Vec inverse_degree = grid.inverse_degree[at + b], self = grid.self[at + b];
            for (int c = 0; c < CHANNELS; ++c) {
                // The self-loop comes last: it is near 1 where all neighbours are tiny, and a sum that starts
                // with it would lose them one by one.
                Vec next = (acc[c][b] * inverse_degree + self * states.current[c][at + b]) * step.scale;
                Vec* place = states.next[c] + at + b;
                if (step.subtract) next -= *place;
                *place = next;
                if (step.coefficient != 0) states.total[c][at + b] += next * step.coefficient;
            }
        }
    }
    for (int c = 0; c < CHANNELS; ++c) fill_halo(states.next[c], grid);
}

static void take_step(int channels, const Grid& grid, const States& states, const Step& step) {
    switch (channels) {
        case 1: return take_step<1>(grid, states, step);
        case 2: return take_step<2>(grid, states, step);
        case 3: return take_step<3>(grid, states, step);
        default: return take_step<4>(grid, states, step);
    }
}

// Set r and c from one product with ones, which `states` has room for.
static void normalise(const Grid& grid, const States& states, Vec* inverse_degree, Vec* self) {
    Vec* ones = const_cast<Vec*>(states.current[0]);
    for (long j = 0; j < grid.length; ++j) ones[j] = broadcast(1.0f);
    fill_halo(ones, grid);
    for (long at = 0; at < grid.length; ++at) {
        // In blocks of one, but the order of each sum is that of take_step, and so is its rounding.
        Vec acc[1][1];
        pull<1, 1>(acc, grid, states, at);
        inverse_degree[at] = 1.0f / (acc[0][0] + 1.0f);
        self[at] = 1.0f - acc[0][0] * inverse_degree[at];
    }
}

// Lay out the weights of a problem in the workspace; returns what follows them, or null for an invalid one.
static Vec* lay_out_weights(const WalkProblem& problem, Grid& grid, Vec* workspace) {
    Power power = {problem.beta, 0};
    if (problem.beta <= 64 && problem.beta == (float)(int)problem.beta) power.whole = (int)problem.beta;
    const float* plane = problem.affinity;
    bool valid = true;
    *workspace++ = Vec{};  // what a load that begins early may meet
    for (int dy = 0; dy < grid.radius; ++dy) {
        const int reach = grid.reach[dy], first = dy == 0 ? 1 : -reach;
        Vec* row = workspace + grid.lead * planes_of_row(grid, dy);
        grid.row[dy] = row;
        workspace += row_size(grid, dy);
        for (int dx = first; dx <= reach; ++dx, plane += grid.pixels)
            valid &= lay_out_plane(problem, grid, plane, dy, dx, row + dx - first, power);
    }
    return valid ? workspace : nullptr;
}

// Range of the values of one channel.
struct Range {
    float low, high;
};

static Range range_of(const float* values, long count) {
    Range range = {values[0], values[0]};
    for (long i = 1; i < count; ++i) {
        range.low = values[i] < range.low ? values[i] : range.low;
        range.high = values[i] > range.high ? values[i] : range.high;
    }
    return range;
}

// Put one channel into the layout and start its sum.
static void lay_out_state(const float* scores, const Grid& grid, Vec* state, Vec* total, float coefficient) {
    for (long j = 0; j < grid.length; ++j) {
        state[j] = gather(scores, grid, j);
        total[j] = state[j] * coefficient;
    }
    fill_halo(state, grid);
}

// Write one channel back. An average never leaves the range of its input; the last bits of rounding may.
static void read_back(const Vec* state, const Grid& grid, Range range, float* out) {
    for (long j = 0; j < grid.length; ++j) {
        const Vec value = larger(smaller(state[j], broadcast(range.high)), broadcast(range.low));
        for (int lane = 0; lane < WIDTH; ++lane) {
            const long pixel = lane * grid.length + j;
            if (pixel < grid.pixels) out[pixel] = value[lane];
        }
    }
}

static void walk_group(const WalkProblem& problem, const Grid& grid, Vec* workspace, long first, int channels) {
    const bool series = problem.coefficients != nullptr;
    States states;
    Range range[CHANNEL_GROUP];
    for (int c = 0; c < channels; ++c) {
        Vec* state = workspace + c * channel_size(grid) + grid.halo;
        states.current[c] = state;
        states.next[c] = state + state_size(grid);
        states.total[c] = workspace + (c + 1) * channel_size(grid) - grid.length;
        const float* scores = problem.scores + (first + c) * grid.pixels;
        range[c] = range_of(scores, grid.pixels);
        lay_out_state(scores, grid, state, states.total[c], series ? problem.coefficients[0] : 0.0f);
    }
    const long products = series ? problem.coefficient_count - 1 : problem.steps;
    for (long k = 1; k <= products; ++k) {
        // T_1 is P x; after it comes T_k+1 = 2 P T_k - T_k-1.
        const bool recur = series && k > 1;
        take_step(channels, grid, states, {recur ? 2.0f : 1.0f, recur, series ? problem.coefficients[k] : 0.0f});
        for (int c = 0; c < channels; ++c) {
            Vec* next = states.next[c];
            states.next[c] = const_cast<Vec*>(states.current[c]);
            states.current[c] = next;
        }
    }
    for (int c = 0; c < channels; ++c)
        read_back(series ? states.total[c] : states.current[c], grid, range[c],
                  problem.out + (first + c) * grid.pixels);
}

// Walk one image; `workspace` has walk_workspace() floats and is aligned to a vector. Returns false, with
// nothing written, for scores that are not finite or an affinity outside [0, 1].
static bool walk(const WalkProblem& problem, float* workspace) {
    if (!all_finite(problem.scores, problem.channels * problem.height * problem.width)) return false;
    Grid grid = grid_of(problem);
    Vec* inverse_degree = lay_out_weights(problem, grid, (Vec*)workspace);
    if (inverse_degree == nullptr) return false;
    Vec* self = inverse_degree + grid.length;
    Vec* rest = self + grid.length;
    grid.inverse_degree = inverse_degree;
    grid.self = self;
    States states = {};
    states.current[0] = rest + grid.halo;
    normalise(grid, states, inverse_degree, self);
    for (long c = 0; c < problem.channels; c += CHANNEL_GROUP) {
        const long left = problem.channels - c;
        walk_group(problem, grid, rest, c, (int)(left < CHANNEL_GROUP ? left : CHANNEL_GROUP));
    }
    return true;
}

}  // namespace MULTISA_ISA
