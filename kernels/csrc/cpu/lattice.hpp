// The permutohedral lattice of the pixels of an image (Adams, Baek & Davis 2010).
#pragma once

#include <cstdint>
#include <vector>

namespace multisa {

// The lattice of N points in `dimension` features: its vertices, their neighbours, and the weights with
// which each point is splatted to and sliced from the corners of its simplex.
//
// Points of one simplex share its vertices, so simplices are stored, numbered in order of first occurrence. Vertices
// that are used together then have nearby numbers.
struct Lattice {
    int corners = 0;  // dimension + 1
    std::int32_t points = 0, simplices = 0, vertices = 0;
    std::vector<std::int32_t> simplex_of;        // [points]
    std::vector<std::int32_t> simplex_vertices;  // [simplices][corners]
    std::vector<std::int32_t> neighbours;        // [corners][vertices][2]; `vertices` where there is none
    // [points][corners]; symmetrically normalised, so that splatting, blurring and slicing with them is
    // D^-1/2 K D^-1/2 (Kraehenbuehl & Koltun 2013).
    std::vector<float> weights;
};

// The lattice of an image, uint8 [height][width][3] RGB, in (x, y) / sxy and colour / srgb; without an image in
// (x, y) / sxy alone. Throws std::invalid_argument if the deviations are too small for a lattice.
Lattice build_lattice(const std::uint8_t* image, long height, long width, float sxy, float srgb);

}  // namespace multisa
