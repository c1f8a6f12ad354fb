// The random walk on one image: (D^-1 W)^steps on every channel, without a matrix; W is A^beta and the identity.
//
// Operator. One product is P x = r (W' x) + c x: W' holds the pairs, r is 1 / D in float32 and c is 1 - r D', with
// D' the row sums of W' as this same code adds them up. Rows of P therefore sum to one up to float32 rounding,
// and a step changes a constant only by its own rounding. P is similar to the symmetric D^-1/2 W D^-1/2, so
// its eigenvalues are real and in [-1, 1], and the Chebyshev series of x^steps applies to it.
//
// Layout. The image is cut into WIDTH upright strips of equal width, one for each lane: lane i of vector (y, x) is
// the pixel (y, i * strip + x), or nothing past the last column. A neighbour at a fixed offset is then the vector
// at a fixed distance, so every load is whole, and a row of pixels reads a few rows of vectors only: the cache
// holds them until the rows below have used them too. The channels of a group are adjacent.
//   State: around its strip every row has halo columns, those of the strip's other side with the lanes moved by
// one and zero where there is no lane; above and below the image lie rows of zeros.
//   Weights: of each pair only one is stored, at its source; the target finds it there. Where the source lies in
// another strip, its weights are read as many floats early or late as the lanes have to move. The lanes that so
// get the weights of something else meet the zeros of the state's halo; all they need is to be finite.
//
// Order. A block is a few rows of one column, whose sums stay in registers. Several steps go down the image
// together, each as far behind the one before as its neighbourhood reaches: weights are what is read most, and so
// they come from memory once for all of these steps.
#pragma once

#include "problems.hpp"
#include "vector.hpp"

namespace MULTISA_ISA {

using multisa::WalkProblem;

constexpr int MAX_RADIUS = 64;
// Channels processed together: each weight is loaded once for all of them.
constexpr int CHANNEL_GROUP = 4;
// Rows of a block for a group of so many channels. The sums hide the latency of a multiply-add and fit, with what
// they are made from, in 16 registers. Taller blocks share more loads, but more rows have to stay in the cache.
constexpr int block_rows(int channels) { return channels == 1 ? 6 : channels == 2 ? 4 : channels == 3 ? 3 : 2; }
// The share of the L2 cache for the rows that several steps work on.
constexpr long CACHE_BYTES = 1200 << 10;
// Edges below this are dropped: far below the resolution of a float32 sum with the self-loop of 1.
constexpr float NEGLIGIBLE_EDGE = 1e-20f;

// The plane of the pair (dy, 0); (dy, dx) lies dx further. In the row of the pixel itself only pairs to the right
// are stored, and so its (0, 0) is the one before the first.
static constexpr int centre_plane(int radius, int dy) {
    int plane = -1;
    for (int row = 1; row <= dy; ++row)
        plane += multisa::reach_of(radius, row - 1) + 1 + multisa::reach_of(radius, row);
    return plane;
}

// An image in the layout above.
struct Grid {
    long height, width;
    long strip;   // columns of a lane
    long halo;    // columns and rows that a neighbourhood reaches beyond its centre
    long rows;    // up to the end of the last block, however many rows a block has
    long planes;
    int radius;
    int reach[MAX_RADIUS], centre[MAX_RADIUS];  // of each row of the stencil: furthest column, plane of column 0
    const float* weights;        // [rows][strip][planes] vectors, and room for loads that begin early or late
    const long* source;          // [-halo..strip + halo): where in a row the weights of a column are, in floats
    const Vec* inverse_degree;   // r, [rows][strip]
    const Vec* self;             // c, [rows][strip]
};

// One product: next = scale * P x - previous where `subtract`, and total += coefficient * next.
struct Step {
    float scale;
    bool subtract;
    float coefficient;
};

// A group of channels: two states, each in the place of the last but one, and the sum of the series.
struct States {
    long pitch;     // vectors from a row to the next
    Vec* state[2];  // at row 0, column 0; [row][column][channel]
    Vec* total;     // [rows][strip][channel]
};

MULTISA_INLINE long blocks_of(const Grid& grid, int block) { return (grid.height + block - 1) / block; }

static Grid grid_of(const WalkProblem& problem) {
    Grid grid = {};
    grid.height = problem.height;
    grid.width = problem.width;
    grid.strip = (grid.width + WIDTH - 1) / WIDTH;
    grid.halo = problem.radius - 1;
    for (int channels = 1; channels <= CHANNEL_GROUP; ++channels) {
        const long rows = blocks_of(grid, block_rows(channels)) * block_rows(channels);
        grid.rows = rows > grid.rows ? rows : grid.rows;
    }
    grid.radius = problem.radius;
    for (int dy = 0; dy < problem.radius; ++dy) {
        grid.reach[dy] = multisa::reach_of(problem.radius, dy);
        grid.centre[dy] = centre_plane(problem.radius, dy);
    }
    grid.planes = grid.centre[grid.halo] + grid.reach[grid.halo] + 1;
    return grid;
}

// Vectors from a row of the state to the next. Odd, so that the rows of a block spread over the sets of the cache.
MULTISA_INLINE long state_pitch(const Grid& grid, int channels) {
    return ((grid.strip + 2 * grid.halo) * channels) | 1;
}

// Vectors of the parts of the workspace.
MULTISA_INLINE long pixels_size(const Grid& grid) { return grid.rows * grid.strip; }
MULTISA_INLINE long state_size(const Grid& grid, int channels) {
    return (grid.rows + 2 * grid.halo) * state_pitch(grid, channels);
}
MULTISA_INLINE long weights_size(const Grid& grid) { return pixels_size(grid) * grid.planes; }
// A column of the halo lies at most so many lanes away: that early or late may a load of weights begin.
MULTISA_INLINE long weights_room(const Grid& grid) { return grid.halo / WIDTH + 1; }
MULTISA_INLINE long source_size(const Grid& grid) {
    return ((grid.strip + 2 * grid.halo) * (long)sizeof(long) + (long)sizeof(Vec) - 1) / (long)sizeof(Vec);
}

// Floats of workspace for a problem.
static long walk_workspace(const WalkProblem& problem) {
    const Grid grid = grid_of(problem);
    const long fixed = grid.strip + source_size(grid) + 2 * weights_room(grid) + weights_size(grid);
    const long states = 2 * state_size(grid, CHANNEL_GROUP) + CHANNEL_GROUP * pixels_size(grid);
    return (fixed + 2 * pixels_size(grid) + states) * WIDTH;
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

// Lane i of the result is lane i + by of the vector, zero where there is none; `by` is 1 or -1.
template <int BY>
MULTISA_INLINE Vec moved(Vec v) {
    IntVec lanes = {}, kept = ~IntVec{};
    for (int lane = 0; lane < WIDTH; ++lane) lanes[lane] = (lane + BY) & (WIDTH - 1);
    kept[BY < 0 ? 0 : WIDTH - 1] = 0;
    return (Vec)((IntVec)permuted(v, lanes) & kept);
}

MULTISA_INLINE void clear(Vec* from, long count) {
    for (long i = 0; i < count; ++i) from[i] = Vec{};
}

// The pixels of column x of a row of the image that `line` holds, WIDTH * strip floats.
MULTISA_INLINE Vec gather(const float* line, const Grid& grid, long x) {
    Vec value;
    for (int lane = 0; lane < WIDTH; ++lane) value[lane] = line[lane * grid.strip + x];
    return value;
}

// Put the weights of the pairs (dy, dx) of row y into the layout, affinities to the power of beta and 0 where there
// is no pair; `line` holds the affinities. Returns false for an affinity outside [0, 1] or NaN.
static bool lay_out_pairs(const WalkProblem& problem, const Grid& grid, const float* line, long y, int dy, int dx,
                          const Power& power, Vec* to) {
    const long left = dx < 0 ? -dx : 0, right = dx > 0 ? dx : 0;
    const int first = (int)(left > problem.margin ? left : problem.margin);
    const int last = (int)(grid.width - (right > problem.margin ? right : problem.margin));  // exclusive
    const bool any = y < grid.height - (dy > problem.margin ? dy : problem.margin);
    IntVec column = {};
    for (int lane = 0; lane < WIDTH; ++lane) column[lane] = (int)(lane * grid.strip);
    IntVec valid = ~IntVec{};
    for (long x = 0; x < grid.strip; ++x, column += 1, to += grid.planes) {
        *to = Vec{};
        if (!any) continue;
        const IntVec inside = (column >= first) & (column < last);
        const Vec value = (Vec)((IntVec)gather(line, grid, x) & inside);
        valid &= (value >= 0) & (value <= 1);  // false for a NaN
        const Vec weight = power(value);
        *to = weight >= NEGLIGIBLE_EDGE ? weight : Vec{};
    }
    return all(valid);
}

// Lay out all weights; `line` is zero past the last column.
static bool lay_out_weights(const WalkProblem& problem, const Grid& grid, float* line, Vec* weights) {
    Power power = {problem.beta, 0};
    if (problem.beta <= 64 && problem.beta == (float)(int)problem.beta) power.whole = (int)problem.beta;
    const long pixels = grid.height * grid.width, row = grid.strip * grid.planes;
    bool valid = true;
    for (long y = 0; y < grid.height; ++y) {
        const float* plane = problem.affinity + y * grid.width;
        Vec* to = weights + y * row;
        for (int dy = 0; dy < grid.radius; ++dy) {
            for (int dx = dy == 0 ? 1 : -grid.reach[dy]; dx <= grid.reach[dy]; ++dx, plane += pixels) {
                memcpy(line, plane, (size_t)grid.width * sizeof(float));
                valid &= lay_out_pairs(problem, grid, line, y, dy, dx, power, to++);
            }
        }
    }
    clear(weights + grid.height * row, (grid.rows - grid.height) * row);
    return valid;
}

// Position of the weights of each column in a row; see Grid.
static void find_sources(const Grid& grid, long* source) {
    for (long x = -grid.halo; x < grid.strip + grid.halo; ++x) {
        long column = x, lanes = 0;
        for (; column < 0; column += grid.strip) --lanes;
        for (; column >= grid.strip; column -= grid.strip) ++lanes;
        source[x] = column * grid.planes * WIDTH + lanes;
    }
}

// Inputs of a block at (y, x). Above the image it reads the weights of the first row, which meet zeros.
struct Neighbourhood {
    const Vec* state;        // at (y, x)
    long state_pitch;        // vectors
    const float* weights;    // at (y, x)
    const float* row_start;  // weights of row y
    const long* source;      // of column x
    long weights_pitch;      // floats
    long y;
};

// Where the planes of radius 5 are, as centre_plane() says.
constexpr int CENTRE_5[5] = {centre_plane(5, 0), centre_plane(5, 1), centre_plane(5, 2), centre_plane(5, 3),
                             centre_plane(5, 4)};

// Whether a row `dy` further down and a column `dx` further right is a neighbour for radius 5, other than itself.
static constexpr bool is_neighbour_5(int dy, int dx) {
    return (dy != 0 || dx != 0) && dy * dy + dx * dx < 25;
}

// The neighbours in one row for radius 5, the usual one, unrolled: ROW counts from the block's first.
template <int CHANNELS, int BLOCK, int ROW>
MULTISA_INLINE void pull_row_5(Vec (&acc)[CHANNELS][BLOCK], const Vec* state, const float* weights, long pitch,
                               const float* above, const long (&source)[9]) {
#pragma GCC unroll 9
    for (int dx = -4; dx <= 4; ++dx) {
        bool any = false;
        for (int b = 0; b < BLOCK; ++b) any |= is_neighbour_5(ROW - b, dx);
        if (!any) continue;
        Vec value[CHANNELS];
#pragma GCC unroll 4
        for (int c = 0; c < CHANNELS; ++c) value[c] = load_here((const float*)(state + dx * CHANNELS + c));
#pragma GCC unroll 8
        for (int b = 0; b < BLOCK; ++b) {
            const int dy = ROW - b;
            if (!is_neighbour_5(dy, dx)) continue;
            const bool forward = dy > 0 || (dy == 0 && dx > 0);
            const Vec weight = load_here(forward ? weights + b * pitch + (CENTRE_5[dy] + dx) * WIDTH
                                                 : above + source[dx + 4] + (CENTRE_5[-dy] - dx) * WIDTH);
#pragma GCC unroll 4
            for (int c = 0; c < CHANNELS; ++c) accumulate(acc[c][b], weight, value[c]);
        }
    }
}

template <int CHANNELS, int BLOCK, int ROW = -4>
MULTISA_INLINE void pull_radius_5(Vec (&acc)[CHANNELS][BLOCK], const Neighbourhood& n, const Vec* state,
                                  const float* above, const long (&source)[9]) {
    pull_row_5<CHANNELS, BLOCK, ROW>(acc, state, n.weights, n.weights_pitch, above, source);
    if constexpr (ROW < BLOCK + 3) {
        if (ROW >= 0 || n.y + ROW >= 0) above += n.weights_pitch;
        pull_radius_5<CHANNELS, BLOCK, ROW + 1>(acc, n, state + n.state_pitch, above, source);
    }
}

// The same for any radius.
template <int CHANNELS, int BLOCK>
MULTISA_INLINE void pull_any_radius(Vec (&acc)[CHANNELS][BLOCK], const Grid& grid, const Neighbourhood& n) {
    for (int dy = 0; dy < grid.radius; ++dy) {
        for (int dx = dy == 0 ? 1 : -grid.reach[dy]; dx <= grid.reach[dy]; ++dx) {
            const long plane = (grid.centre[dy] + dx) * WIDTH;
#pragma GCC unroll 8
            for (int b = 0; b < BLOCK; ++b) {
                const Vec* below = n.state + (b + dy) * n.state_pitch + dx * CHANNELS;
                const Vec* above = n.state + (b - dy) * n.state_pitch - dx * CHANNELS;
                const long up = dy - b < n.y ? dy - b : n.y;
                const Vec forward = load_here(n.weights + b * n.weights_pitch + plane);
                const Vec backward = load_here(n.row_start - up * n.weights_pitch + n.source[-dx] + plane);
#pragma GCC unroll 4
                for (int c = 0; c < CHANNELS; ++c) {
                    accumulate(acc[c][b], forward, below[c]);
                    accumulate(acc[c][b], backward, above[c]);
                }
            }
        }
    }
}

// acc += the sum over all neighbours of the block at (y, x), for each pixel in the same order in every block.
template <int CHANNELS, int BLOCK>
MULTISA_INLINE void pull(Vec (&acc)[CHANNELS][BLOCK], const Grid& grid, const States& states, const Vec* state,
                         long y, long x) {
    const long pitch = grid.strip * grid.planes * WIDTH;
    const float* row_start = grid.weights + y * pitch;
    const Neighbourhood n = {state + y * states.pitch + x * CHANNELS,
                             states.pitch,
                             row_start + x * grid.planes * WIDTH,
                             row_start,
                             grid.source + x,
                             pitch,
                             y};
    if (grid.radius != 5) return pull_any_radius(acc, grid, n);
    long source[9];
#pragma GCC unroll 9
    for (int dx = -4; dx <= 4; ++dx) source[dx + 4] = n.source[dx];
    const float* first = row_start - (y < 4 ? y : 4) * pitch;
    pull_radius_5<CHANNELS, BLOCK>(acc, n, n.state - 4 * n.state_pitch, first, source);
}

// Copy the sides of a strip into the halo on its other side.
template <int CHANNELS>
MULTISA_INLINE void fill_halo(Vec* row, const Grid& grid) {
    const long strip = grid.strip * CHANNELS, halo = grid.halo * CHANNELS;
    for (long i = -1; i >= -halo; --i) row[i] = moved<-1>(row[i + strip]);
    for (long i = strip; i < strip + halo; ++i) row[i] = moved<1>(row[i - strip]);
}

// Complete the step of a block at (y, x) from the sums over its neighbours.
template <int CHANNELS, int BLOCK>
MULTISA_INLINE void finish(Vec (&acc)[CHANNELS][BLOCK], const Grid& grid, const Vec* current, Vec* next, long pitch,
                           Vec* total, long pixel, const Step step) {
#pragma GCC unroll 8
    for (int b = 0; b < BLOCK; ++b) {
        const Vec inverse_degree = grid.inverse_degree[pixel + b * grid.strip] * step.scale;
        const Vec self = grid.self[pixel + b * grid.strip] * step.scale;
        // The self-loop comes last: it is near 1 where all neighbours are tiny, and a sum that starts with it
        // would lose them one by one.
#pragma GCC unroll 4
        for (int c = 0; c < CHANNELS; ++c)
            acc[c][b] = acc[c][b] * inverse_degree + self * current[b * pitch + c];
        if (step.subtract) {
#pragma GCC unroll 4
            for (int c = 0; c < CHANNELS; ++c) acc[c][b] -= next[b * pitch + c];
        }
#pragma GCC unroll 4
        for (int c = 0; c < CHANNELS; ++c) next[b * pitch + c] = acc[c][b];
    }
    if (step.coefficient == 0) return;
#pragma GCC unroll 8
    for (int b = 0; b < BLOCK; ++b) {
#pragma GCC unroll 4
        for (int c = 0; c < CHANNELS; ++c)
            total[b * grid.strip * CHANNELS + c] += acc[c][b] * step.coefficient;
    }
}

// One step of the rows of a block, from row y.
template <int CHANNELS>
static void take_block_row(const Grid& grid, const States& states, const Vec* current, Vec* next, long y,
                           const Step step) {
    constexpr int BLOCK = block_rows(CHANNELS);
    for (long x = 0; x < grid.strip; ++x) {
        Vec acc[CHANNELS][BLOCK] = {};
        pull<CHANNELS, BLOCK>(acc, grid, states, current, y, x);
        const long pixel = y * grid.strip + x, at = y * states.pitch + x * CHANNELS;
        finish<CHANNELS, BLOCK>(acc, grid, current + at, next + at, states.pitch, states.total + pixel * CHANNELS,
                                pixel, step);
    }
    for (int b = 0; b < BLOCK; ++b) fill_halo<CHANNELS>(next + (y + b) * states.pitch, grid);
}

// Product k of a problem, from 1. Of the series the first is T_1 = P x, then comes T_k+1 = 2 P T_k - T_k-1.
static Step step_of(const WalkProblem& problem, long k) {
    if (problem.coefficients == nullptr) return {1, false, 0};
    return {k > 1 ? 2.0f : 1.0f, k > 1, problem.coefficients[k]};
}

// Blocks that a step stays behind the one before.
MULTISA_INLINE long lag_of(const Grid& grid, int block) { return (grid.halo + block - 1) / block; }

// Steps that go down the image together: as many as fit their rows into the cache.
static long steps_together(const Grid& grid, int channels, int block) {
    const long row_bytes = (grid.planes + 3 * channels) * grid.strip * (long)sizeof(Vec);
    const long apart = lag_of(grid, block) * block, left = CACHE_BYTES / row_bytes - block - grid.halo;
    return apart > 0 && left >= apart ? 1 + left / apart : 1;
}

// Compute the products first..last-1 in one sweep. When step k takes a block, step k - 1 has done at least the rows
// that its neighbourhood reaches, and reads none of this block's any more: what lies below is read from `lag`
// blocks on. So the next state can take the place of the last but one, as if the steps came one by one.
template <int CHANNELS>
static void sweep(const WalkProblem& problem, const Grid& grid, const States& states, long first, long last) {
    constexpr int BLOCK = block_rows(CHANNELS);
    const long lag = lag_of(grid, BLOCK), blocks = blocks_of(grid, BLOCK);
    for (long front = 0; front < blocks + lag * (last - first - 1); ++front) {
        for (long k = first; k < last; ++k) {
            const long block = front - lag * (k - first);
            if (block < 0 || block >= blocks) continue;
            take_block_row<CHANNELS>(grid, states, states.state[(k - 1) & 1], states.state[k & 1], block * BLOCK,
                                     step_of(problem, k));
        }
    }
}

// Divide the workspace for a group of channels, and clear the rows around the image, which are never written.
static States states_of(const Grid& grid, Vec* workspace, int channels) {
    States states;
    states.pitch = state_pitch(grid, channels);
    const long size = state_size(grid, channels), start = grid.halo * (states.pitch + channels);
    clear(workspace, 2 * size);
    states.state[0] = workspace + start;
    states.state[1] = workspace + size + start;
    states.total = workspace + 2 * size;
    return states;
}

// Set r and c from one product with ones; both are zero or one beyond the image, where all else is zero.
static void normalise(const Grid& grid, Vec* workspace, Vec* inverse_degree, Vec* self) {
    constexpr int BLOCK = block_rows(1);
    const States states = states_of(grid, workspace, 1);
    for (long y = 0; y < grid.rows; ++y) {
        Vec* row = states.state[0] + y * states.pitch;
        for (long x = 0; x < grid.strip; ++x) row[x] = broadcast(1.0f);
        fill_halo<1>(row, grid);
    }
    clear(inverse_degree, pixels_size(grid));
    clear(self, pixels_size(grid));
    for (long y = 0; y < grid.height; y += BLOCK) {
        for (long x = 0; x < grid.strip; ++x) {
            Vec acc[1][BLOCK] = {};
            pull<1, BLOCK>(acc, grid, states, states.state[0], y, x);
#pragma GCC unroll 8
            for (int b = 0; b < BLOCK; ++b) {
                const long pixel = (y + b) * grid.strip + x;
                inverse_degree[pixel] = 1.0f / (acc[0][b] + 1.0f);
                self[pixel] = 1.0f - acc[0][b] * inverse_degree[pixel];
            }
        }
    }
}

// Range of the values of one channel.
struct Range {
    float low, high;
};

static Range range_of(const float* values, long count) {
    Vec low = broadcast(values[0]), high = low;
    long i = 0;
    for (; i + WIDTH <= count; i += WIDTH) {
        low = smaller(low, load(values + i));
        high = larger(high, load(values + i));
    }
    Range range = {low[0], high[0]};
    for (int lane = 1; lane < WIDTH; ++lane) {
        range.low = smaller(range.low, low[lane]);
        range.high = larger(range.high, high[lane]);
    }
    for (; i < count; ++i) {
        range.low = smaller(range.low, values[i]);
        range.high = larger(range.high, values[i]);
    }
    return range;
}

// Put one channel into the layout and start its sum; `line` is zero past the last column.
static void lay_out_state(const float* scores, const Grid& grid, const States& states, float* line, int channel,
                          int channels, float coefficient) {
    for (long y = 0; y < grid.rows; ++y) {
        const long count = y < grid.height ? grid.width : 0;
        memcpy(line, scores + (y < grid.height ? y : 0) * grid.width, (size_t)count * sizeof(float));
        for (long x = 0; x < grid.strip; ++x) {
            const Vec value = count > 0 ? gather(line, grid, x) : Vec{};
            states.state[0][y * states.pitch + x * channels + channel] = value;
            states.total[(y * grid.strip + x) * channels + channel] = value * coefficient;
        }
    }
}

// Write one channel back. An average never leaves the range of its input; the last bits of rounding may.
static void read_back(const Vec* state, const Grid& grid, long pitch, int channels, Range range, float* line,
                      float* out) {
    for (long y = 0; y < grid.height; ++y) {
        for (long x = 0; x < grid.strip; ++x) {
            const Vec value = larger(smaller(state[y * pitch + x * channels], broadcast(range.high)),
                                     broadcast(range.low));
            for (int lane = 0; lane < WIDTH; ++lane) line[lane * grid.strip + x] = value[lane];
        }
        memcpy(out + y * grid.width, line, (size_t)grid.width * sizeof(float));
    }
}

// Walk the channels first.. of a group.
template <int CHANNELS>
static void walk_group(const WalkProblem& problem, const Grid& grid, Vec* workspace, float* line, long first) {
    const bool series = problem.coefficients != nullptr;
    const States states = states_of(grid, workspace, CHANNELS);
    const long pixels = grid.height * grid.width;
    Range range[CHANNELS];
    clear((Vec*)line, grid.strip);
    for (int c = 0; c < CHANNELS; ++c) {
        const float* scores = problem.scores + (first + c) * pixels;
        range[c] = range_of(scores, pixels);
        lay_out_state(scores, grid, states, line, c, CHANNELS, series ? problem.coefficients[0] : 0.0f);
    }
    for (long y = 0; y < grid.rows; ++y) fill_halo<CHANNELS>(states.state[0] + y * states.pitch, grid);
    const long products = series ? problem.coefficient_count - 1 : problem.steps;
    const long together = steps_together(grid, CHANNELS, block_rows(CHANNELS));
    for (long k = 1; k <= products; k += together)
        sweep<CHANNELS>(problem, grid, states, k, k + together <= products ? k + together : products + 1);
    const Vec* result = series ? states.total : states.state[products & 1];
    const long pitch = series ? grid.strip * CHANNELS : states.pitch;
    for (int c = 0; c < CHANNELS; ++c)
        read_back(result + c, grid, pitch, CHANNELS, range[c], line, problem.out + (first + c) * pixels);
}

static void walk_group(const WalkProblem& problem, const Grid& grid, Vec* workspace, float* line, long first) {
    switch (problem.channels - first) {
        case 1: return walk_group<1>(problem, grid, workspace, line, first);
        case 2: return walk_group<2>(problem, grid, workspace, line, first);
        case 3: return walk_group<3>(problem, grid, workspace, line, first);
        default: return walk_group<4>(problem, grid, workspace, line, first);
    }
}

// Walk one image; `workspace` has walk_workspace() floats and is aligned to a vector. Returns false and
// writes nothing for scores that are not finite or an affinity outside [0, 1].
static bool walk(const WalkProblem& problem, float* workspace) {
    if (!all_finite(problem.scores, problem.channels * problem.height * problem.width)) return false;
    Grid grid = grid_of(problem);
    Vec* line = (Vec*)workspace;
    Vec* table = line + grid.strip;
    Vec* room = table + source_size(grid);
    Vec* weights = room + weights_room(grid);
    Vec* inverse_degree = weights + weights_size(grid) + weights_room(grid);
    Vec* self = inverse_degree + pixels_size(grid);
    Vec* states = self + pixels_size(grid);

    long* source = (long*)table + grid.halo;
    find_sources(grid, source);
    clear(line, grid.strip);
    clear(room, weights_room(grid));
    clear(weights + weights_size(grid), weights_room(grid));
    if (!lay_out_weights(problem, grid, (float*)line, weights)) return false;
    grid.weights = (const float*)weights;
    grid.source = source;
    grid.inverse_degree = inverse_degree;
    grid.self = self;
    normalise(grid, states, inverse_degree, self);
    for (long c = 0; c < problem.channels; c += CHANNEL_GROUP)
        walk_group(problem, grid, states, (float*)line, c);
    return true;
}

}  // namespace MULTISA_ISA
