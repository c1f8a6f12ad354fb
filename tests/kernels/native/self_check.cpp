// Runs the CPU kernels without Python, so that sanitizers and other processors can: every instruction set this
// processor has, odd sizes, two threads at once. All must agree with the first. Exit status 1 when they do not.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "dense_crf.hpp"
#include "instruction_sets.hpp"
#include "lattice.hpp"
#include "mask_deflate.hpp"
#include "processor.hpp"
#include "rle.hpp"
#include "small_parts.hpp"

namespace {

using Floats = std::vector<float>;

struct Random {
    unsigned state = 1;
    float operator()() {
        state = state * 1664525u + 1013904223u;
        return static_cast<float>(state >> 8) / static_cast<float>(1u << 24);
    }
};

Floats random_floats(std::size_t count, Random& random) {
    Floats values(count);
    for (float& value : values) value = random();
    return values;
}

std::size_t planes_of(int radius) {
    std::size_t planes = 0;
    for (int dy = 0; dy < radius; ++dy) planes += dy == 0 ? radius - 1 : 2 * multisa::reach_of(radius, dy) + 1;
    return planes;
}

void append(Floats& all, const Floats& more) { all.insert(all.end(), more.begin(), more.end()); }

Floats walked(long height, long width, long channels, int radius, long margin, bool series) {
    Random random;
    const std::size_t pixels = static_cast<std::size_t>(height * width);
    const Floats scores = random_floats(pixels * static_cast<std::size_t>(channels), random);
    const Floats affinity = random_floats(pixels * planes_of(radius), random);
    const Floats coefficients = {0.25f, 0.5f, 0.0f, 0.25f};
    Floats out(scores.size());
    multisa::WalkProblem problem = {};
    problem.channels = channels;
    problem.height = height;
    problem.width = width;
    problem.radius = radius;
    problem.beta = series ? 8.0f : 2.5f;
    problem.margin = margin;
    problem.steps = 5;
    problem.coefficients = series ? coefficients.data() : nullptr;
    problem.coefficient_count = 4;
    problem.scores = scores.data();
    problem.affinity = affinity.data();
    problem.out = out.data();
    const multisa::Kernels& kernels = multisa::chosen_kernels();
    const long needed = kernels.walk_workspace(problem);
    const multisa::Workspace workspace(needed);
    std::fill_n(workspace.floats(), needed, std::nanf(""));  // nothing may come of what it held before
    if (!kernels.walk(problem, workspace.floats())) std::abort();
    return out;
}

Floats compared(long height, long width, long depth, int radius, bool boundary) {
    Random random;
    const std::size_t pixels = static_cast<std::size_t>(height * width);
    const Floats map = random_floats(pixels * static_cast<std::size_t>(depth), random);
    Floats out(pixels * planes_of(radius), -1.0f);
    const multisa::AffinityProblem problem = {depth, height, width, radius, map.data(), out.data()};
    const multisa::Kernels& kernels = multisa::chosen_kernels();
    const multisa::Workspace workspace(kernels.affinity_workspace(problem));
    const bool valid = boundary ? kernels.affinity_from_boundary(problem, workspace.floats())
                                : kernels.affinity_from_features(problem, workspace.floats());
    if (!valid) std::abort();
    return out;
}

Floats refined(long height, long width, std::size_t labels) {
    Random random;
    const std::size_t pixels = static_cast<std::size_t>(height * width);
    std::vector<std::uint8_t> image(pixels * 3), hard(pixels);
    for (std::size_t i = 0; i < image.size(); ++i) image[i] = static_cast<std::uint8_t>(40 * (i / 90 % 5) + 9 * random());
    for (std::uint8_t& label : hard) label = static_cast<std::uint8_t>(random() * static_cast<float>(labels));
    const Floats probabilities = random_floats(pixels * labels, random);
    const multisa::Lattice spatial = multisa::build_lattice(nullptr, height, width, 3, 1);
    const multisa::DenseCrf crf(multisa::build_lattice(image.data(), height, width, 30, 10), spatial, 3, 1);
    Floats out(pixels * labels), of_labels(out.size());
    std::vector<const float*> from;
    std::vector<float*> to, to_labels;
    for (std::size_t label = 0; label < labels; ++label) {
        from.push_back(probabilities.data() + label * pixels);
        to.push_back(out.data() + label * pixels);
        to_labels.push_back(of_labels.data() + label * pixels);
    }
    crf.infer(from, to, 3);
    if (labels > 1) crf.infer_labels(hard.data(), 0.7f, to_labels, 2);
    append(out, of_labels);
    return out;
}

Floats everything() {
    const multisa::FlushDenormals flush;
    Floats all;
    const long sizes[][2] = {{1, 1}, {1, 19}, {23, 1}, {2, 3}, {17, 29}, {33, 31}};
    for (const auto& [height, width] : sizes) {
        for (const int radius : {1, 2, 5, 7})
            for (const bool flag : {false, true}) {
                append(all, walked(height, width, flag ? 7 : 2, radius, flag ? 0 : radius - 1, flag));
                append(all, compared(height, width, flag ? 1 : 3, radius, flag));
            }
        for (const std::size_t labels : {1, 2, 5, 9, 17, 24, 33}) append(all, refined(height, width, labels));
    }
    return all;
}

bool agree(const Floats& a, const Floats& b, const std::string& name) {
    double worst = 0;
    for (std::size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::fabs(static_cast<double>(a[i]) - b[i]));
    std::printf("%s: %zu values, largest difference %.2g\n", name.c_str(), b.size(), worst);
    return a.size() == b.size() && worst < 1e-4;
}

// The codecs of masks at odd sizes, flat and noisy; their answers are compared in Python, here sanitizers look on.
bool encode_masks() {
    Random random;
    for (const auto& [height, width] : {std::pair<long, long>{1, 1}, {1, 70001}, {300, 1}, {65, 129}})
        for (const float ids : {1.0f, 3.0f, 256.0f}) {
            std::vector<std::uint8_t> mask(static_cast<std::size_t>(height * width));
            for (std::uint8_t& id : mask) id = static_cast<std::uint8_t>(random() * ids);
            std::uint64_t area = 0;
            for (const multisa::ClassRuns& one : multisa::encode_runs(mask.data(), height, width)) {
                area += one.area;
                if (one.area > 0 && multisa::compress_counts(one.columns).empty()) return false;
            }
            if (area != mask.size() || multisa::deflate_mask(mask.data(), height, width).size() < 10) return false;
        }
    return true;
}

// Small parts of noise; once they are gone, nothing is left to do. Of a class that is kept something remains.
bool absorb_parts() {
    Random random;
    for (const auto& [height, width] : {std::pair<long, long>{1, 1}, {1, 301}, {300, 1}, {65, 129}})
        for (const float ids : {1.0f, 3.0f, 256.0f}) {
            std::vector<std::uint8_t> mask(static_cast<std::size_t>(height * width)), once(mask.size()), twice(mask.size());
            for (std::uint8_t& id : mask) id = static_cast<std::uint8_t>(random() * ids);
            multisa::SmallParts(mask.data(), height, width, once.data()).absorb(30);
            multisa::SmallParts(once.data(), height, width, twice.data()).absorb(30);
            if (once != twice) return false;
            const std::uint8_t kept[] = {mask.front(), mask.back()};
            multisa::SmallParts(mask.data(), height, width, once.data()).absorb(mask.size() + 1, kept, 2);
            for (const std::uint8_t id : kept)
                if (std::find(once.begin(), once.end(), id) == once.end()) return false;
        }
    return true;
}

// The interpolated probability of a class, in double.
double interpolated(const float* plane, long height, long width, double y, double x) {
    y = std::min(std::max(y, 0.0), height - 1.0), x = std::min(std::max(x, 0.0), width - 1.0);
    const long top = static_cast<long>(y), left = static_cast<long>(x);
    const long bottom = std::min(top + 1, height - 1), right = std::min(left + 1, width - 1);
    const double upper = plane[top * width + left] * (left + 1 - x) + plane[top * width + right] * (x - left);
    const double lower = plane[bottom * width + left] * (left + 1 - x) + plane[bottom * width + right] * (x - left);
    return upper * (top + 1 - y) + lower * (y - top);
}

// Enlarged and shrunk probabilities of the chosen instruction set against the formula.
bool enlarge_grid(long height, long width, long out_height, long out_width) {
    constexpr long classes = 5;
    Random random;
    const Floats probabilities = random_floats(static_cast<std::size_t>(classes * height * width), random);
    const std::uint8_t ids[classes] = {0, 1, 2, 3, 4};
    std::vector<std::uint8_t> labels(static_cast<std::size_t>(out_height * out_width)), confidence(labels.size());
    const multisa::EnlargeProblem problem = {classes, height, width, out_height, out_width,
                                             probabilities.data(), ids, labels.data(), confidence.data()};
    const multisa::Kernels& kernels = multisa::chosen_kernels();
    const long needed = kernels.enlarge_workspace(problem);
    const multisa::Workspace workspace(needed);
    std::fill_n(workspace.floats(), needed, std::nanf(""));
    if (!kernels.enlarge(problem, workspace.floats())) return false;
    for (long i = 0; i < out_height * out_width; ++i) {
        const double y = (i / out_width + 0.5) * height / out_height - 0.5;
        const double x = (i % out_width + 0.5) * width / out_width - 0.5;
        double highest = 0, chosen = 0;
        for (long c = 0; c < classes; ++c) {
            const double value = interpolated(probabilities.data() + c * height * width, height, width, y, x);
            highest = std::max(highest, value);
            if (labels[i] == c) chosen = value;
        }
        if (chosen < highest - 1e-6 || std::fabs(confidence[i] - 255 * highest) > 0.501) return false;
    }
    return true;
}

bool enlarge_grids() {
    bool good = true;
    for (const auto& [height, width] : {std::pair<long, long>{1, 1}, {1, 19}, {23, 1}, {17, 29}})
        for (const auto& [out_height, out_width] : {std::pair<long, long>{1, 1}, {2, 3}, {1, 70}, {17, 29}, {60, 131}})
            good = enlarge_grid(height, width, out_height, out_width) && good;
    return good;
}

}  // namespace

int main() {
    const Floats expected = everything();
    bool good = encode_masks() && absorb_parts();
    for (const std::string& name : multisa::available_instruction_sets()) {
        multisa::choose_instruction_set(name);
        Floats one, two;
        std::thread beside([&one] { one = everything(); });
        two = everything();
        beside.join();
        good = enlarge_grids() && good;
        good = agree(expected, one, name) && agree(expected, two, name) && good;
    }
    return good ? 0 : 1;
}
