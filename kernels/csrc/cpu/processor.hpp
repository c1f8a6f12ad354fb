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

// Memory of this thread for so many floats, aligned to a cache line, one at a time; the same memory for the next, so
// that a run over many images asks the system once. What it holds is not defined. Memory that is large goes back
// to the system at the end: one huge image should not be held for ever.
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
