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

}  // namespace

int main() {
    const Floats expected = everything();
    bool good = encode_masks();
    for (const std::string& name : multisa::available_instruction_sets()) {
        multisa::choose_instruction_set(name);
        Floats one, two;
        std::thread beside([&one] { one = everything(); });
        two = everything();
        beside.join();
        good = agree(expected, one, name) && agree(expected, two, name) && good;
    }
    return good ? 0 : 1;
}
