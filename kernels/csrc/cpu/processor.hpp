// Instruction sets of the processor, and the set-up of a thread that runs the kernels.
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

// Scratch memory of this thread for `floats` floats, aligned to a cache line, one at a time. It is reused, so that a
// run over many images allocates once. Its contents are undefined. Large memory is freed at the end, so that one huge
// image does not hold it for ever.
class Workspace {
public:
    explicit Workspace(long floats);
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    float* floats() const { return floats_; }

private:
    float* floats_;
};

// Treats denormal numbers as zero during its lifetime: they are far below any result, and processors take a hundred
// times longer for them.
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
