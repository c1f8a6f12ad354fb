// Arguments of the kernels: plain structures, shared by the code of every instruction set.
//
// No inline function of the standard library: see vector.hpp.
#pragma once

#include <stdint.h>

namespace multisa {

// A random walk on one image.
struct WalkProblem {
    long channels, height, width;
    int radius;
    float beta;    // exponent of the affinities, above 0
    long margin;   // pairs whose source is nearer than this to the left, right or bottom border are dropped
    long steps;    // taken one by one when there are no coefficients
    const float* coefficients;  // of the Chebyshev series, or null
    long coefficient_count;     // at least 2
    const float* scores;        // [channels][height][width]
    const float* affinity;      // [planes][height][width], in [0, 1]
    float* out;                 // [channels][height][width]
};

// Affinities of the pairs of one image, by features or by boundaries.
struct AffinityProblem {
    long depth, height, width;  // depth is 1 for boundaries
    int radius;
    const float* map;  // [depth][height][width]
    float* out;        // [planes][height][width]
};

// Where points lie among the vertices of the permutohedral lattice (Adams, Baek & Davis 2010, section 3.1). A
// vertex is known by whole numbers q and its remainder k: its coordinates are (dimension + 1) q + k.
struct PlacementProblem {
    int dimension;  // 2 or 5
    long count;
    const float* features[5];  // each [count] in standard deviations, repeated up to a whole vector
    int32_t* origin[5];  // q of the remainder-0 vertex of each point's simplex, on the first `dimension` axes
    int32_t* ranks;      // [count], 3 bits an axis: the order of the coordinates, which tells the simplex
    float* weights;      // [count][dimension + 1], barycentric, summing to one
    int32_t* lowest;     // [dimension], lowered to the least origin on each axis
    int32_t* highest;    // [dimension], raised likewise
};

// What mean field reads of one point: what it gives to and takes from the six corners of its bilateral simplex,
// which are those of its run, and the three of its spatial one.
struct CrfPoint {
    float bilateral_weight[6];
    float spatial_weight[3];
    int32_t spatial_vertex[3];
};

// Mean field on one image. Points come in the order of their bilateral simplices; `position` tells where each
// pixel went. A row is one number for each label, padded to row_length().
struct MeanFieldProblem {
    long points;
    int labels;       // that take part
    long iterations;

    const CrfPoint* point;                // [points]
    const int32_t* run;                   // [simplices + 1], where the points of each bilateral simplex begin
    const int32_t* simplex_vertices;      // [simplices][6]
    const int32_t* bilateral_neighbours;  // [6][bilateral_vertices][2]; `bilateral_vertices` where there is none
    const int32_t* spatial_neighbours;    // [3][spatial_vertices][2]
    long bilateral_vertices, spatial_vertices;

    const int32_t* position;  // [pixels]
    // The unary energies: of probabilities where they are given, of hard labels otherwise.
    const float* const* probabilities;  // [labels] planes of [pixels]
    const uint8_t* hard_labels;         // [pixels], below `labels`
    float energy_of_label, energy_of_others;
    float* const* out;  // [labels] planes of [pixels]
};

// Labels of an image from class probabilities on a grid: bilinear interpolation with half-pixel centres, then argmax.
struct EnlargeProblem {
    long classes;  // 1..256
    long height, width, out_height, out_width;
    const float* probabilities;  // [classes][height][width], in [0, 1]
    const uint8_t* ids;          // [classes]
    uint8_t* labels;             // [out_height][out_width]
    uint8_t* confidence;         // the same
};

// The furthest column of row dy of the stencil dx^2 + dy^2 < radius^2.
static constexpr int reach_of(long radius, long dy) {
    int reach = 0;
    while (dy * dy + (reach + 1) * (reach + 1) < radius * radius) ++reach;
    return reach;
}

}  // namespace multisa
