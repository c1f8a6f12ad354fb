#include "lattice.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <stdexcept>
#include <string>

#include "key_table.hpp"
#include "processor.hpp"

namespace multisa {

namespace {

// The norm of a pixel below which it is not divided any further (pydensecrf's value).
constexpr float NORM_FLOOR = 1e-20f;
// The largest feature, in standard deviations, that float32 still places well inside a simplex.
constexpr float FEATURE_LIMIT = 65536.0f;
// Bits of the ranks in the key of a simplex, and of the remainder in the key of a vertex.
constexpr int RANK_BITS = 15, REMAINDER_BITS = 3;
// The widest vector; rows of features are repeated up to a multiple of it.
constexpr long LARGEST_VECTOR = 16;

// The position of each point: the remainder-0 vertex of its simplex, and the order of its coordinates.
struct Places {
    int dimension;
    std::vector<std::int32_t> origin[5];
    std::vector<std::int32_t> ranks;
    std::int32_t lowest[5], highest[5];
};

// Place the pixels row by row, so that their features are never all in memory.
Places place_pixels(const std::uint8_t* image, long height, long width, float sxy, float srgb, float* weights) {
    Places places;
    places.dimension = image == nullptr ? 2 : 5;
    const std::size_t points = static_cast<std::size_t>(height * width);
    places.ranks.resize(points);
    for (int axis = 0; axis < places.dimension; ++axis) {
        places.origin[axis].resize(points);
        places.lowest[axis] = std::numeric_limits<std::int32_t>::max();
        places.highest[axis] = std::numeric_limits<std::int32_t>::min();
    }
    float grey[256];
    for (int value = 0; value < 256; ++value) grey[value] = static_cast<float>(value) / srgb;
    const long padded = (width + LARGEST_VECTOR - 1) / LARGEST_VECTOR * LARGEST_VECTOR;
    std::vector<float> features[5];
    for (int axis = 0; axis < places.dimension; ++axis) features[axis].resize(static_cast<std::size_t>(padded));
    for (long x = 0; x < padded; ++x) features[0][x] = static_cast<float>(std::min(x, width - 1)) / sxy;
    for (long y = 0; y < height; ++y) {
        features[1].assign(static_cast<std::size_t>(padded), static_cast<float>(y) / sxy);
        for (int colour = 0; colour + 2 < places.dimension; ++colour)
            for (long x = 0; x < padded; ++x)
                features[2 + colour][x] = grey[image[(y * width + std::min(x, width - 1)) * 3 + colour]];
        PlacementProblem problem = {};
        problem.dimension = places.dimension;
        problem.count = width;
        for (int axis = 0; axis < places.dimension; ++axis) {
            problem.features[axis] = features[axis].data();
            problem.origin[axis] = places.origin[axis].data() + y * width;
        }
        problem.ranks = places.ranks.data() + y * width;
        problem.weights = weights + y * width * (places.dimension + 1);
        problem.lowest = places.lowest;
        problem.highest = places.highest;
        chosen_kernels().place(problem);
    }
    return places;
}

// The place value of each axis in a key: a key is one number, and a step to a neighbour one addition.
struct Strides {
    std::uint64_t of[6];  // the last axis follows from the zero sum and has none
    std::uint64_t sum = 0;
};

Strides strides_of(const Places& places) {
    Strides strides = {};
    double product = 1;
    for (int axis = 0; axis < places.dimension; ++axis) {
        strides.of[axis] = static_cast<std::uint64_t>(product);
        strides.sum += strides.of[axis];
        // Range of the vertices of the simplices, one below the origins, and of their neighbours.
        product *= static_cast<double>(places.highest[axis]) - places.lowest[axis] + 5;
    }
    if (product >= std::ldexp(1.0, 64 - RANK_BITS - 1))
        throw std::invalid_argument("the lattice of this image needs " + std::to_string(std::ilogb(product) + 1) +
                                    " bits for a vertex, expected at most 48; use larger standard deviations "
                                    "(sxy, srgb)");
    return strides;
}

// Look-ups in flight at once, to hide the latency of memory.
constexpr std::size_t AHEAD = 12;

// Number the simplices in order of first occurrence; returns their keys.
std::vector<std::uint64_t> number_simplices(const Places& places, const Strides& strides, Lattice& lattice) {
    std::vector<std::uint64_t> keys(lattice.simplex_of.size()), distinct;
    std::uint64_t offset = 0;
    for (int axis = 0; axis < places.dimension; ++axis)
        offset += static_cast<std::uint64_t>(2 - static_cast<std::int64_t>(places.lowest[axis])) * strides.of[axis];
    for (std::size_t point = 0; point < keys.size(); ++point) {
        std::uint64_t origin = offset;  // modulo 2^64, as are the products of negative coordinates
        for (int axis = 0; axis < places.dimension; ++axis)
            origin += static_cast<std::uint64_t>(static_cast<std::int64_t>(places.origin[axis][point])) * strides.of[axis];
        keys[point] = origin << RANK_BITS | static_cast<std::uint32_t>(places.ranks[point]);
    }
    KeyTable table(keys.size() / 4);
    std::uint64_t before = ~std::uint64_t{0};
    std::int32_t simplex = 0;
    for (std::size_t point = 0; point < keys.size(); ++point) {
        if (point + AHEAD < keys.size()) table.expect(keys[point + AHEAD]);
        // Neighbouring pixels often share a simplex.
        if (keys[point] != before) {
            before = keys[point];
            simplex = table.number_of(before);
            if (static_cast<std::size_t>(simplex) == distinct.size()) distinct.push_back(before);
        }
        lattice.simplex_of[point] = simplex;
    }
    lattice.simplices = static_cast<std::int32_t>(distinct.size());
    return distinct;
}

// Number the vertices of the simplices; returns their keys.
std::vector<std::uint64_t> number_vertices(const std::vector<std::uint64_t>& simplices, const Strides& strides,
                                           Lattice& lattice, KeyTable& table) {
    const int dimension = lattice.corners - 1;
    const std::size_t corners = static_cast<std::size_t>(lattice.corners);
    std::vector<std::uint64_t> of_corner(simplices.size() * corners), distinct;
    for (std::size_t simplex = 0; simplex < simplices.size(); ++simplex) {
        // Corner k is the origin plus k in every coordinate, less a whole (dimension + 1) in the k highest.
        std::uint64_t origin_less[6] = {};
        for (int axis = 0; axis < dimension; ++axis)
            origin_less[simplices[simplex] >> 3 * (dimension - 1 - axis) & 7] = strides.of[axis];
        std::uint64_t vertex = simplices[simplex] >> RANK_BITS;
        for (std::size_t k = 0; k < corners; ++k) {
            if (k > 0) vertex -= origin_less[corners - k];
            of_corner[simplex * corners + k] = vertex << REMAINDER_BITS | k;
        }
    }
    lattice.simplex_vertices.resize(of_corner.size());
    for (std::size_t i = 0; i < of_corner.size(); ++i) {
        if (i + AHEAD < of_corner.size()) table.expect(of_corner[i + AHEAD]);
        const std::int32_t vertex = table.number_of(of_corner[i]);
        if (static_cast<std::size_t>(vertex) == distinct.size()) distinct.push_back(of_corner[i]);
        lattice.simplex_vertices[i] = vertex;
    }
    lattice.vertices = static_cast<std::int32_t>(distinct.size());
    return distinct;
}

// A step along an axis adds 1 to every coordinate and takes dimension + 1 from that of the axis.
void find_neighbours(const std::vector<std::uint64_t>& keys, const Strides& strides, const KeyTable& table,
                     Lattice& lattice) {
    const std::uint64_t dimension = static_cast<std::uint64_t>(lattice.corners - 1);
    const std::int32_t none = lattice.vertices;
    lattice.neighbours.assign(keys.size() * 2 * static_cast<std::size_t>(lattice.corners), none);
    for (int axis = 0; axis < lattice.corners; ++axis) {
        const std::uint64_t back = strides.of[axis] << REMAINDER_BITS;
        const std::uint64_t carry = (strides.sum << REMAINDER_BITS) - dimension;
        std::int32_t* pairs = lattice.neighbours.data() + keys.size() * 2 * static_cast<std::size_t>(axis);
        const auto key_after = [&](std::size_t vertex) {
            const std::uint64_t key = keys[vertex];
            const bool last = (key & ((1u << REMAINDER_BITS) - 1)) == dimension;
            return key + (last ? carry : 1) - back;
        };
        for (std::size_t vertex = 0; vertex < keys.size(); ++vertex) {
            if (vertex + AHEAD < keys.size()) table.expect(key_after(vertex + AHEAD));
            const std::int32_t after = table.find(key_after(vertex));
            if (after < 0) continue;
            pairs[2 * vertex + 1] = after;
            pairs[2 * static_cast<std::size_t>(after)] = static_cast<std::int32_t>(vertex);
        }
    }
}

// Fold the symmetric normalisation into the weights: filter ones, and take the root on both sides.
void normalise(Lattice& lattice) {
    const std::size_t corners = static_cast<std::size_t>(lattice.corners);
    const std::size_t vertices = static_cast<std::size_t>(lattice.vertices);
    std::vector<float> values(vertices + 1), blurred(vertices + 1);
    for (std::size_t point = 0; point < lattice.simplex_of.size(); ++point)
        for (std::size_t k = 0; k < corners; ++k)
            values[lattice.simplex_vertices[lattice.simplex_of[point] * corners + k]] +=
                lattice.weights[point * corners + k];
    for (std::size_t axis = 0; axis < corners; ++axis) {
        const std::int32_t* pairs = lattice.neighbours.data() + axis * vertices * 2;
        for (std::size_t vertex = 0; vertex < vertices; ++vertex)
            blurred[vertex] = values[vertex] + 0.5f * (values[pairs[2 * vertex]] + values[pairs[2 * vertex + 1]]);
        std::swap(values, blurred);
        values[vertices] = 0;
    }
    // Blurring with (1/2, 1, 1/2) along every axis amplifies; this is pydensecrf's factor.
    const float scale = 1.0f / (1.0f + std::ldexp(1.0f, 1 - lattice.corners));
    for (std::size_t point = 0; point < lattice.simplex_of.size(); ++point) {
        float* weights = lattice.weights.data() + point * corners;
        const std::int32_t* vertex = lattice.simplex_vertices.data() + lattice.simplex_of[point] * corners;
        float norm = 0;
        for (std::size_t k = 0; k < corners; ++k) norm += weights[k] * values[vertex[k]];
        const float root = std::sqrt(scale / (norm * scale + NORM_FLOOR));
        for (std::size_t k = 0; k < corners; ++k) weights[k] *= root;
    }
}

}  // namespace

Lattice build_lattice(const std::uint8_t* image, long height, long width, float sxy, float srgb) {
    const float largest = std::max(static_cast<float>(std::max(height, width)) / sxy,
                                   image == nullptr ? 0.0f : 255.0f / srgb);
    if (!(largest < FEATURE_LIMIT))
        throw std::invalid_argument("features: got values up to " + std::to_string(largest) +
                                    " standard deviations, expected below 65536; use larger standard deviations "
                                    "(sxy, srgb)");
    Lattice lattice;
    lattice.corners = image == nullptr ? 3 : 6;
    lattice.points = static_cast<std::int32_t>(height * width);
    lattice.simplex_of.resize(static_cast<std::size_t>(lattice.points));
    lattice.weights.resize(lattice.simplex_of.size() * static_cast<std::size_t>(lattice.corners));
    const Places places = place_pixels(image, height, width, sxy, srgb, lattice.weights.data());
    const Strides strides = strides_of(places);
    const std::vector<std::uint64_t> simplices = number_simplices(places, strides, lattice);
    KeyTable vertex_table(simplices.size());
    const std::vector<std::uint64_t> vertices = number_vertices(simplices, strides, lattice, vertex_table);
    find_neighbours(vertices, strides, vertex_table, lattice);
    normalise(lattice);
    return lattice;
}

}  // namespace multisa
