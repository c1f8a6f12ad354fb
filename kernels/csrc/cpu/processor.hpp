// What the processor can do, and how a thread that runs the kernels is set up.
#pragma once

#include <string>
#include <vector>

#include "instruction_sets.hpp"

namespace multisa {

// The kernels of the best instruction set this processor has, or of the one that was chosen by name.
const Kernels& chosen_kernels();

// Names of the instruction sets this processor has, the best first.
std::vector<std::string> available_instruction_sets();

// Use the named instruction set from now on, in every thread; throws std::invalid_argument for an unknown one.
void choose_instruction_set(const std::string& name);

// Memory of this thread for `floats` floats, aligned to a cache line; the same memory at every call, so that
// a run over many images asks the system once. What it holds is not defined.
float* workspace(long floats);

// Give the memory of this thread back if it is large: one huge image should not be held for ever.
void trim_workspace();

// Denormal numbers count as zero while this lives: they are far below any result, and processors take a
// hundred times longer for them.
class FlushDenormals {
public:
    FlushDenormals();
    ~FlushDenormals();
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;

private:
    unsigned long before_;
};

}  // namespace multisa
