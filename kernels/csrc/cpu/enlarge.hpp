// Class probabilities of a grid as the labels and confidences of an image: bilinear interpolation and argmax at once.
//
// Between four neighbouring grid points (a cell) the interpolation is a convex combination of the corners. A class that
// is below another at all four corners is therefore below it in the whole cell. The candidates of a cell are the
// classes that are not: in most cells one, whose label fills the cell and which alone is interpolated there.
//
// Order. A band is the image rows between two rows of the grid. The candidates of its cells are found once. For each
// image row their values at the left border of the cell and the slopes along x are computed, all cells together;
// a vector of pixels is then one multiply-add for each candidate. Cells are written from left to right in whole vectors,
// so that a cell overwrites what the one before wrote beyond its end.
#pragma once

#include "problems.hpp"
#include "vector.hpp"

namespace MULTISA_ISA {

using multisa::EnlargeProblem;

// Probabilities may leave [0, 1] by the rounding of a softmax. Confidences are not clipped: this is far below half a
// level.
constexpr float PROBABILITY_SLACK = 1e-5f;

// A pixel on one axis: the grid point before it, and the share of the way from there to the next.
struct GridPlace {
    long before;
    float share;
};

// In whole numbers, so that shares are rounded once. Before the first grid point that point is taken; after the
// last there is no next, and its share is of no effect.
MULTISA_INLINE GridPlace grid_place(long pixel, long points, long pixels) {
    const long numerator = (2 * pixel + 1) * points - pixels, denominator = 2 * pixels;
    if (numerator < 0) return {0, 0.0f};
    const long before = numerator / denominator;
    return {before, (float)(numerator - before * denominator) / (float)denominator};
}

// The columns of cells: those that hold a pixel, from left to right.
struct CellColumns {
    long count;
    int32_t* left;   // [count], the grid column of the left corners
    int32_t* begin;  // [count + 1], the first pixel
    float* share;    // [out_width] of pixels, and a vector of zeros
};

// Candidates of the cells of a band, those of a cell by rising class.
struct Candidates {
    int32_t* begin;  // [columns + 1], the first of each cell
    int32_t* id;
    float *top_left, *left_growth;    // at the upper corner, and the difference to the lower one
    float *top_right, *right_growth;
    float *value, *slope;             // in the present image row: at the left border, and from there to the right one
};

struct EnlargeMemory {
    uint8_t* winner;  // [height * width], the most probable class of each grid point, the first of equals
    CellColumns columns;
    Candidates candidates;
    uint8_t* row;  // [2][out_width + WIDTH], labels and confidences where the image has no room for whole vectors
    long floats;
};

// Lay out the workspace; `floats` is its size. Without a workspace there is only the size.
static EnlargeMemory enlarge_memory(const EnlargeProblem& problem, float* workspace) {
    const long columns = problem.width < problem.out_width ? problem.width : problem.out_width;
    // Loops over candidates work on whole vectors.
    const long most = (columns * problem.classes + WIDTH - 1) / WIDTH * WIDTH;
    EnlargeMemory memory = {};
    const auto take = [&](long floats) {
        float* const taken = workspace == nullptr ? nullptr : workspace + memory.floats;
        memory.floats += (floats + WIDTH - 1) / WIDTH * WIDTH;
        return taken;
    };
    Candidates& candidates = memory.candidates;
    float** const values[] = {&candidates.top_left,     &candidates.left_growth, &candidates.top_right,
                              &candidates.right_growth, &candidates.value,       &candidates.slope};
    for (float** value : values) *value = take(most);
    candidates.id = (int32_t*)take(most);
    candidates.begin = (int32_t*)take(columns + 1);
    memory.columns.left = (int32_t*)take(columns);
    memory.columns.begin = (int32_t*)take(columns + 1);
    memory.columns.share = take(problem.out_width + WIDTH);
    memory.winner = (uint8_t*)take((problem.height * problem.width + 3) / 4);
    memory.row = (uint8_t*)take((2 * (problem.out_width + WIDTH) + 3) / 4);
    return memory;
}

// Floats of workspace for a problem.
static long enlarge_workspace(const EnlargeProblem& problem) { return enlarge_memory(problem, nullptr).floats; }

static void list_columns(const EnlargeProblem& problem, CellColumns& columns) {
    columns.count = 0;
    for (long x = 0; x < problem.out_width; ++x) {
        const GridPlace place = grid_place(x, problem.width, problem.out_width);
        columns.share[x] = place.share;
        if (columns.count > 0 && columns.left[columns.count - 1] == place.before) continue;
        columns.left[columns.count] = (int32_t)place.before;
        columns.begin[columns.count++] = (int32_t)x;
    }
    columns.begin[columns.count] = (int32_t)problem.out_width;
    for (long lane = 0; lane < WIDTH; ++lane) columns.share[problem.out_width + lane] = 0.0f;
}

MULTISA_INLINE void store_bytes(uint8_t* to, ByteVec bytes) { memcpy(to, &bytes, sizeof(bytes)); }

// 255 times the probability, rounded as by confidence_levels of masks.py. Fusing the product with the sum changes
// nothing: where the product rounds to half a level, so does the sum to the next one.
MULTISA_INLINE ByteVec confidence_of(Vec probability) {
    return low_bytes(__builtin_convertvector(probability * 255.0f + 0.5f, IntVec));
}

// The most probable class of each grid point, and its confidence unless that is null. Returns false for NaN and for
// probabilities outside [0, 1].
static bool find_winners(const EnlargeProblem& problem, uint8_t* winner, uint8_t* confidence) {
    const long points = problem.height * problem.width;
    IntVec valid = ~IntVec{};
    for (long at = 0; at < points; at += WIDTH) {
        const long lanes = points - at < WIDTH ? points - at : WIDTH;
        Vec highest = broadcast(-1.0f);
        IntVec best = {};
        for (long c = 0; c < problem.classes; ++c) {
            const float* from = problem.probabilities + c * points + at;
            Vec value = {};
            if (lanes == WIDTH)
                value = load(from);
            else
                for (long lane = 0; lane < lanes; ++lane) value[lane] = from[lane];
            valid &= (value >= -PROBABILITY_SLACK) & (value <= 1.0f + PROBABILITY_SLACK);
            const IntVec more = value > highest;
            best = more ? IntVec{} + (int32_t)c : best;
            highest = more ? value : highest;
        }
        const ByteVec classes = low_bytes(best), levels = confidence_of(highest);
        memcpy(winner + at, &classes, (size_t)lanes);
        if (confidence != nullptr) memcpy(confidence + at, &levels, (size_t)lanes);
    }
    return all(valid);
}

// The four corners of a cell, as places in a plane of the grid.
struct Corners {
    long at[4];  // upper left, upper right, lower left, lower right
};

MULTISA_INLINE void add_candidate(const EnlargeProblem& problem, Candidates& candidates, const Corners& corners, long c,
                                  long& count) {
    const float* plane = problem.probabilities + c * problem.height * problem.width;
    candidates.id[count] = problem.ids[c];
    candidates.top_left[count] = plane[corners.at[0]];
    candidates.left_growth[count] = plane[corners.at[2]] - plane[corners.at[0]];
    candidates.top_right[count] = plane[corners.at[1]];
    candidates.right_growth[count] = plane[corners.at[3]] - plane[corners.at[1]];
    ++count;
}

// Whether class c is below class `other` in the whole cell, or equal to it and later.
MULTISA_INLINE bool is_dominated(const EnlargeProblem& problem, const Corners& corners, long c, long other) {
    const long points = problem.height * problem.width;
    const float *plane = problem.probabilities + c * points, *above = problem.probabilities + other * points;
    bool below = true, equal = true;
    for (const long at : corners.at) {
        below &= plane[at] < above[at];
        equal &= plane[at] <= above[at];
    }
    return c > other ? equal : below;
}

// List the candidates of all cells between two rows of the grid, and return their number.
static long list_candidates(const EnlargeProblem& problem, const EnlargeMemory& memory, long top, long bottom) {
    Candidates candidates = memory.candidates;
    long count = 0;
    for (long column = 0; column < memory.columns.count; ++column) {
        const long left = memory.columns.left[column], right = left + 1 < problem.width ? left + 1 : left;
        const long upper = top * problem.width, lower = bottom * problem.width;
        const Corners corners = {{upper + left, upper + right, lower + left, lower + right}};
        candidates.begin[column] = (int32_t)count;
        long winners[4], different = 0;
        for (const long at : corners.at) {
            const long winner = memory.winner[at];
            bool known = false;
            for (long i = 0; i < different; ++i) known |= winners[i] == winner;
            if (!known) winners[different++] = winner;
        }
        if (different == 1) {
            add_candidate(problem, candidates, corners, winners[0], count);
            continue;
        }
        for (long c = 0; c < problem.classes; ++c) {
            bool dominated = false;
            for (long i = 0; i < different && !dominated; ++i)
                dominated = winners[i] != c && is_dominated(problem, corners, c, winners[i]);
            if (!dominated) add_candidate(problem, candidates, corners, c, count);
        }
    }
    candidates.begin[memory.columns.count] = (int32_t)count;
    return count;
}

// Interpolate the candidates in one row of the image, `share` of the way from the upper row of the grid to the lower.
MULTISA_INLINE void interpolate_candidates(const Candidates& candidates, long count, float share) {
    for (long i = 0; i < count; i += WIDTH) {
        const Vec value = load(candidates.top_left + i) + load(candidates.left_growth + i) * share;
        const Vec right = load(candidates.top_right + i) + load(candidates.right_growth + i) * share;
        store(candidates.value + i, value);
        store(candidates.slope + i, right - value);
    }
}

// Write one row of the image from its interpolated candidates, and up to a vector beyond it.
static void enlarge_row(const CellColumns& columns, const Candidates& candidates, uint8_t* labels, uint8_t* confidence) {
    // To the compiler a byte that is written may be part of anything: members would be read again after each.
    const int32_t *const begin = columns.begin, *const first = candidates.begin, *const ids = candidates.id;
    const float *const values = candidates.value, *const slopes = candidates.slope, *const shares = columns.share;
    const long count = columns.count;
    for (long column = 0, x = 0; column < count; ++column) {
        const long own = first[column], end = first[column + 1], next = begin[column + 1];
        const Vec value = broadcast(values[own]), slope = broadcast(slopes[own]);
        if (end - own == 1) {
            const ByteVec label = ByteVec{} + (uint8_t)ids[own];
            for (; x < next; x += WIDTH) {
                store_bytes(labels + x, label);
                store_bytes(confidence + x, confidence_of(value + slope * load(shares + x)));
            }
        } else {
            for (; x < next; x += WIDTH) {
                const Vec along = load(shares + x);
                Vec highest = value + slope * along;
                IntVec label = IntVec{} + ids[own];
                for (long i = own + 1; i < end; ++i) {
                    const Vec other = values[i] + slopes[i] * along;
                    const IntVec more = other > highest;
                    label = more ? IntVec{} + ids[i] : label;
                    highest = more ? other : highest;
                }
                store_bytes(labels + x, low_bytes(label));
                store_bytes(confidence + x, confidence_of(highest));
            }
        }
        x = next;
    }
}

// `workspace` has enlarge_workspace() floats. Returns false for NaN and for probabilities outside [0, 1].
static bool enlarge(const EnlargeProblem& problem, float* workspace) {
    const long height = problem.out_height, width = problem.out_width;
    if (height == problem.height && width == problem.width) {
        const bool valid = find_winners(problem, problem.labels, problem.confidence);
        for (long i = 0; i < height * width; ++i) problem.labels[i] = problem.ids[problem.labels[i]];
        return valid;
    }
    EnlargeMemory memory = enlarge_memory(problem, workspace);
    if (!find_winners(problem, memory.winner, nullptr)) return false;
    list_columns(problem, memory.columns);
    long band = -1, count = 0;
    for (long y = 0; y < height; ++y) {
        const GridPlace place = grid_place(y, problem.height, height);
        if (place.before != band) {
            band = place.before;
            count = list_candidates(problem, memory, band, band + 1 < problem.height ? band + 1 : band);
        }
        interpolate_candidates(memory.candidates, count, place.share);
        uint8_t *const labels = problem.labels + y * width, *const confidence = problem.confidence + y * width;
        // What is written beyond a row lies in those below, which come later; beyond the last there is no room.
        const bool fits = (height - 1 - y) * width >= WIDTH;
        uint8_t *const to = fits ? labels : memory.row, *const levels = fits ? confidence : to + width + WIDTH;
        enlarge_row(memory.columns, memory.candidates, to, levels);
        if (fits) continue;
        memcpy(labels, to, (size_t)width);
        memcpy(confidence, levels, (size_t)width);
    }
    return true;
}

}  // namespace MULTISA_ISA
