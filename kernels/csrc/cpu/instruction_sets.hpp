// The kernels of one instruction set, as a table; and the choice of a table at run time.
#pragma once

#include "problems.hpp"

namespace multisa {

struct Kernels {
    const char* name;
    long (*walk_workspace)(const WalkProblem&);
    bool (*walk)(const WalkProblem&, float* workspace);
    long (*affinity_workspace)(const AffinityProblem&);
    bool (*affinity_from_features)(const AffinityProblem&, float* workspace);
    bool (*affinity_from_boundary)(const AffinityProblem&, float* workspace);
    void (*place)(const PlacementProblem&);
    long (*mean_field_workspace)(const MeanFieldProblem&);
    void (*mean_field)(const MeanFieldProblem&, float* workspace);
    long (*enlarge_workspace)(const EnlargeProblem&);
    bool (*enlarge)(const EnlargeProblem&, float* workspace);
    double (*multiply_adds)(long rounds);  // runs `rounds` of independent multiply-adds; returns how many
};

#if defined(__x86_64__)
extern const Kernels AVX512_KERNELS, AVX2_KERNELS;
#endif
extern const Kernels PORTABLE_KERNELS;

}  // namespace multisa
