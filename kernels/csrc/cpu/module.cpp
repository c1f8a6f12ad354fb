// multisa.kernels._native: the kernels on the CPU for Python. The Python side checks arrays and makes
// them contiguous. Values (NaN, ranges) are checked here, in the pass that reads them.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "dense_crf.hpp"
#include "histogram.hpp"
#include "instruction_sets.hpp"
#include "lattice.hpp"
#include "mask_deflate.hpp"
#include "processor.hpp"
#include "rle.hpp"
#include "small_parts.hpp"

namespace py = pybind11;

namespace {

using Floats = py::array_t<float, py::array::c_style>;

bool walk(const Floats& scores, const Floats& affinity, Floats& out, int radius, float beta, long margin, long steps,
         const std::vector<float>& coefficients) {
    const py::ssize_t images = scores.shape(0);
    multisa::WalkProblem problem = {};
    problem.channels = scores.shape(1);
    problem.height = scores.shape(2);
    problem.width = scores.shape(3);
    problem.radius = radius;
    problem.beta = beta;
    problem.margin = margin;
    problem.steps = steps;
    problem.coefficients = coefficients.empty() ? nullptr : coefficients.data();
    problem.coefficient_count = static_cast<long>(coefficients.size());
    const float* from = scores.data();
    const float* pairs = affinity.data();
    float* to = out.mutable_data();
    const py::gil_scoped_release released;
    const multisa::FlushDenormals flush;
    const multisa::Kernels& kernels = multisa::chosen_kernels();
    const multisa::Workspace workspace(kernels.walk_workspace(problem));
    for (py::ssize_t image = 0; image < images; ++image) {
        problem.scores = from + image * problem.channels * problem.height * problem.width;
        problem.affinity = pairs + image * affinity.shape(1) * problem.height * problem.width;
        problem.out = to + image * problem.channels * problem.height * problem.width;
        if (!kernels.walk(problem, workspace.floats())) return false;
    }
    return true;
}

bool affinity(const Floats& map, Floats& out, int radius, bool boundary) {
    const py::ssize_t images = map.shape(0);
    multisa::AffinityProblem problem = {map.shape(1), map.shape(2), map.shape(3), radius, nullptr, nullptr};
    const float* from = map.data();
    float* to = out.mutable_data();
    const py::gil_scoped_release released;
    const multisa::FlushDenormals flush;
    const multisa::Kernels& kernels = multisa::chosen_kernels();
    const multisa::Workspace workspace(kernels.affinity_workspace(problem));
    for (py::ssize_t image = 0; image < images; ++image) {
        problem.map = from + image * problem.depth * problem.height * problem.width;
        problem.out = to + image * out.shape(1) * problem.height * problem.width;
        const bool valid = boundary ? kernels.affinity_from_boundary(problem, workspace.floats())
                                    : kernels.affinity_from_features(problem, workspace.floats());
        if (!valid) return false;
    }
    return true;
}

using Bytes = py::array_t<std::uint8_t, py::array::c_style>;

std::shared_ptr<multisa::Lattice> spatial_lattice(long height, long width, float sxy) {
    const py::gil_scoped_release released;
    return std::make_shared<multisa::Lattice>(multisa::build_lattice(nullptr, height, width, sxy, 1));
}

std::unique_ptr<multisa::DenseCrf> dense_crf(const Bytes& image, const multisa::Lattice& spatial, float sxy, float srgb,
                                             float bilateral_compat, float spatial_compat) {
    const std::uint8_t* pixels = image.data();
    const long height = image.shape(0), width = image.shape(1);
    const py::gil_scoped_release released;
    multisa::Lattice bilateral = multisa::build_lattice(pixels, height, width, sxy, srgb);
    return std::make_unique<multisa::DenseCrf>(std::move(bilateral), spatial, bilateral_compat, spatial_compat);
}

// The planes of the present labels of an array [labels][height][width].
template <class Value>
std::vector<Value*> planes_of(Value* values, long points, const std::vector<long>& labels) {
    std::vector<Value*> planes;
    for (const long label : labels) planes.push_back(values + label * points);
    return planes;
}

void infer(const multisa::DenseCrf& crf, const Floats& probabilities, const std::vector<long>& labels, Floats& out,
           long iterations) {
    const auto from = planes_of(probabilities.data(), crf.points(), labels);
    const auto to = planes_of(out.mutable_data(), crf.points(), labels);
    const py::gil_scoped_release released;
    crf.infer(from, to, iterations);
}

void infer_labels(const multisa::DenseCrf& crf, const Bytes& hard, float confidence, Floats& out, long iterations) {
    std::vector<long> labels(static_cast<std::size_t>(out.shape(0)));
    std::iota(labels.begin(), labels.end(), 0);
    const std::uint8_t* from = hard.data();
    const auto to = planes_of(out.mutable_data(), crf.points(), labels);
    const py::gil_scoped_release released;
    crf.infer_labels(from, confidence, to, iterations);
}

// (id, area, (x, y, width, height), counts of columns, COCO's string, counts of rows) of each class present.
py::list encode_rle(const Bytes& mask) {
    using Counts = py::array_t<std::uint32_t>;
    std::vector<multisa::ClassRuns> classes;
    std::vector<std::string> texts(256);
    {
        const std::uint8_t* from = mask.data();
        const long height = mask.shape(0), width = mask.shape(1);
        const py::gil_scoped_release released;
        classes = multisa::encode_runs(from, height, width);
        for (std::size_t id = 0; id < 256; ++id)
            if (classes[id].area > 0) texts[id] = multisa::compress_counts(classes[id].columns);
    }
    const auto array = [](const std::vector<std::uint32_t>& counts) {
        return Counts(static_cast<py::ssize_t>(counts.size()), counts.data());
    };
    py::list found;
    for (std::size_t id = 0; id < 256; ++id) {
        const multisa::ClassRuns& one = classes[id];
        if (one.area == 0) continue;
        const auto box = py::make_tuple(one.left, one.top, one.right - one.left + 1, one.bottom - one.top + 1);
        found.append(
            py::make_tuple(id, one.area, box, array(one.columns), py::bytes(texts[id]), array(one.rows)));
    }
    return found;
}

py::bytes deflate_mask(const Bytes& mask) {
    std::string stream;
    {
        const std::uint8_t* from = mask.data();
        const long height = mask.shape(0), width = mask.shape(1);
        const py::gil_scoped_release released;
        stream = multisa::deflate_mask(from, height, width);
    }
    return py::bytes(stream);
}

py::array_t<std::int64_t> histogram(const Bytes& values) {
    std::array<std::int64_t, 256> counts;
    {
        const py::gil_scoped_release released;
        counts = multisa::histogram(values.data(), static_cast<std::size_t>(values.size()));
    }
    return py::array_t<std::int64_t>(256, counts.data());
}

py::array_t<std::int64_t> joint_histogram(const Bytes& rows, const Bytes& columns) {
    py::array_t<std::int64_t> total({256, 256});
    std::int64_t* to = total.mutable_data();
    {
        const py::gil_scoped_release released;
        std::fill_n(to, 256 * 256, 0);
        multisa::joint_histogram(rows.data(), columns.data(), static_cast<std::size_t>(rows.size()), to);
    }
    return total;
}

bool enlarge(const Floats& probabilities, const Bytes& ids, Bytes& labels, Bytes& confidence) {
    const multisa::EnlargeProblem problem = {
        probabilities.shape(0), probabilities.shape(1), probabilities.shape(2), labels.shape(0),
        labels.shape(1),        probabilities.data(),   ids.data(),             labels.mutable_data(),
        confidence.mutable_data(),
    };
    const py::gil_scoped_release released;
    const multisa::FlushDenormals flush;
    const multisa::Kernels& kernels = multisa::chosen_kernels();
    const multisa::Workspace workspace(kernels.enlarge_workspace(problem));
    return kernels.enlarge(problem, workspace.floats());
}

void absorb_small_parts(const Bytes& mask, Bytes& out, std::uint64_t min_pixels, const Bytes& kept) {
    const std::uint8_t* from = mask.data();
    std::uint8_t* to = out.mutable_data();
    const py::gil_scoped_release released;
    multisa::SmallParts parts(from, mask.shape(0), mask.shape(1), to);
    parts.absorb(min_pixels, kept.data(), static_cast<std::size_t>(kept.size()));
}

// Measured multiply-adds a second of one thread, in float32.
double peak_multiply_adds(double seconds) {
    const py::gil_scoped_release released;
    const multisa::Kernels& kernels = multisa::chosen_kernels();
    using Clock = std::chrono::steady_clock;
    double best = 0, spent = 0;
    while (spent < seconds) {
        const auto start = Clock::now();
        const double count = kernels.multiply_adds(1 << 18);
        const double took = std::chrono::duration<double>(Clock::now() - start).count();
        best = std::max(best, count / took);
        spent += took;
    }
    return best;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The kernels of multisa on the CPU; use the functions of multisa.kernels, which check.";
    module.def("walk", &walk);
    module.def("affinity", &affinity);
    py::class_<multisa::Lattice, std::shared_ptr<multisa::Lattice>>(module, "Lattice")
        .def_readonly("vertices", &multisa::Lattice::vertices);
    py::class_<multisa::DenseCrf>(module, "DenseCrf")
        .def("infer", &infer)
        .def("infer_labels", &infer_labels);
    module.def("spatial_lattice", &spatial_lattice);
    module.def("dense_crf", &dense_crf);
    module.def("encode_rle", &encode_rle);
    module.def("deflate_mask", &deflate_mask);
    module.def("histogram", &histogram);
    module.def("joint_histogram", &joint_histogram);
    module.def("enlarge", &enlarge);
    module.def("absorb_small_parts", &absorb_small_parts);
    module.def("peak_multiply_adds", &peak_multiply_adds);
    module.def("instruction_set", [] { return std::string(multisa::chosen_kernels().name); });
    module.def("instruction_sets", &multisa::available_instruction_sets);
    module.def("choose_instruction_set", &multisa::choose_instruction_set);
}
