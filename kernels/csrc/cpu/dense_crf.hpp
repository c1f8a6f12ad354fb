// The dense CRF of one image: its lattices, ready for any number of unaries.
#pragma once

#include <cstdint>
#include <vector>

#include "lattice.hpp"
#include "problems.hpp"

namespace multisa {

class DenseCrf {
public:
    // The bilateral lattice depends on the image, the spatial one on its size; `compat` are the kernels' weights.
    DenseCrf(Lattice bilateral, const Lattice& spatial, float bilateral_compat, float spatial_compat);

    std::int32_t points() const { return static_cast<std::int32_t>(position_.size()); }

    // Refine probabilities: planes of one float per pixel, in and out.
    void infer(const std::vector<const float*>& probabilities, const std::vector<float*>& out, long iterations) const;

    // Refine hard labels, trusted with `confidence`; the others share the rest.
    void infer_labels(const std::uint8_t* labels, float confidence, const std::vector<float*>& out,
                      long iterations) const;

private:
    std::vector<CrfPoint> point_;          // sorted by bilateral simplex
    std::vector<std::int32_t> position_;   // [pixels], where in `point_` each went
    std::vector<std::int32_t> run_;        // [simplices + 1], where in `point_` each simplex begins
    std::vector<std::int32_t> simplex_vertices_, bilateral_neighbours_, spatial_neighbours_;
    std::int32_t bilateral_vertices_, spatial_vertices_;

    struct Unary;
    void run(const Unary& unary, const std::vector<float*>& out, long iterations) const;
};

}  // namespace multisa
