#include "dense_crf.hpp"

#include <cmath>
#include <cstddef>
#include <utility>

#include "processor.hpp"

namespace multisa {

struct DenseCrf::Unary {
    const float* const* probabilities;
    const std::uint8_t* labels;
    float energy_of_label, energy_of_others;
};

DenseCrf::DenseCrf(Lattice bilateral, const Lattice& spatial, float bilateral_compat, float spatial_compat)
    : point_(bilateral.simplex_of.size()),
      position_(bilateral.simplex_of.size()),
      run_(static_cast<std::size_t>(bilateral.simplices) + 1),
      simplex_vertices_(std::move(bilateral.simplex_vertices)),
      bilateral_neighbours_(std::move(bilateral.neighbours)),
      spatial_neighbours_(spatial.neighbours),
      bilateral_vertices_(bilateral.vertices),
      spatial_vertices_(spatial.vertices) {
    // A counting sort of the pixels by their bilateral simplex.
    for (const std::int32_t simplex : bilateral.simplex_of) ++run_[static_cast<std::size_t>(simplex) + 1];
    for (std::size_t simplex = 1; simplex < run_.size(); ++simplex) run_[simplex] += run_[simplex - 1];
    std::vector<std::int32_t> next(run_.begin(), run_.end() - 1);
    // Splatting and slicing both carry the root of the kernel's weight.
    const float bilateral_root = std::sqrt(bilateral_compat), spatial_root = std::sqrt(spatial_compat);
    for (std::size_t pixel = 0; pixel < position_.size(); ++pixel) {
        const std::int32_t at = next[bilateral.simplex_of[pixel]]++;
        position_[pixel] = at;
        CrfPoint& point = point_[at];
        for (std::size_t k = 0; k < 6; ++k)
            point.bilateral_weight[k] = bilateral.weights[pixel * 6 + k] * bilateral_root;
        const std::int32_t* corner = spatial.simplex_vertices.data() + spatial.simplex_of[pixel] * 3;
        for (std::size_t k = 0; k < 3; ++k) {
            point.spatial_weight[k] = spatial.weights[pixel * 3 + k] * spatial_root;
            point.spatial_vertex[k] = corner[k];
        }
    }
}

void DenseCrf::run(const Unary& unary, const std::vector<float*>& out, long iterations) const {
    MeanFieldProblem problem = {};
    problem.points = points();
    problem.labels = static_cast<int>(out.size());
    problem.iterations = iterations;
    problem.point = point_.data();
    problem.run = run_.data();
    problem.simplex_vertices = simplex_vertices_.data();
    problem.bilateral_neighbours = bilateral_neighbours_.data();
    problem.spatial_neighbours = spatial_neighbours_.data();
    problem.bilateral_vertices = bilateral_vertices_;
    problem.spatial_vertices = spatial_vertices_;
    problem.position = position_.data();
    problem.probabilities = unary.probabilities;
    problem.hard_labels = unary.labels;
    problem.energy_of_label = unary.energy_of_label;
    problem.energy_of_others = unary.energy_of_others;
    problem.out = out.data();
    const FlushDenormals flush;
    const Kernels& kernels = chosen_kernels();
    const Workspace workspace(kernels.mean_field_workspace(problem));
    kernels.mean_field(problem, workspace.floats());
}

void DenseCrf::infer(const std::vector<const float*>& probabilities, const std::vector<float*>& out,
                     long iterations) const {
    run({probabilities.data(), nullptr, 0, 0}, out, iterations);
}

void DenseCrf::infer_labels(const std::uint8_t* labels, float confidence, const std::vector<float*>& out,
                            long iterations) const {
    const float others = (1 - confidence) / static_cast<float>(out.size() - 1);
    run({nullptr, labels, -std::log(confidence), -std::log(others)}, out, iterations);
}

}  // namespace multisa
