// Runs CUDA kernels on a CPU, for tests: this header stands for CUDA's own when MULTISA_ON_CPU is defined.
//
// Blocks run one after the other. Each CUDA thread is a fiber (ucontext) that runs until it waits, so a run is
// reproducible; a seed other than 0 shuffles the order of blocks and threads. With -DSHIM_THREADS each CUDA
// thread is a std::thread, for ThreadSanitizer. Shared memory is filled with 0xff (NaN) before every block.
//
// What a device would leave undefined is an error here: a __syncthreads that some thread never reaches, a
// shuffle among lanes that do not meet. Not covered: clusters, grid-wide synchronisation, inline assembly,
// tensor cores, asynchronous copies, fast-math, and the timing of anything.
#pragma once

#include <algorithm>
#include <barrier>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <ucontext.h>
#include <vector>

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline  // not forced: g++ takes minutes for one large function with sanitisers
#define __noinline__ __attribute__((noinline))
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
// One section for all, so that it can be filled. g++ refuses it in templates: those take pointers instead.
#define __shared__ static __attribute__((section("cuda_shared")))

extern "C" unsigned char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern "C" unsigned char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

namespace cuda_on_cpu {

constexpr unsigned warp_size = 32, largest_block = 1024, largest_grid_yz = 65535;
constexpr std::size_t largest_shared = 48 * 1024;  // what every device grants without being asked for more
constexpr std::size_t stack_size = 256 * 1024;
constexpr auto patience = std::chrono::seconds(60);  // for threads, where a deadlock cannot be proved

[[noreturn]] inline void fail(const std::string &message) { throw std::runtime_error(message); }

struct Warp {
    unsigned existing = 0;                    // lanes that the block has
    std::uint64_t value[warp_size];           // what each lane hands out
    unsigned waiting = 0, mask[warp_size];    // lanes that wait, and the lanes each waits for
    const char *operation[warp_size];
    std::mutex lock;                          // one a warp: a common one would order what nothing orders
    std::condition_variable changed;
};

enum class State { ready, at_barrier, in_warp, finished };

struct Thread {
    uint3 index;
    unsigned linear, lane;
    Warp *warp;
    State state;
    ucontext_t context;
    std::unique_ptr<char[]> stack;
};

struct Block {
    dim3 grid, size;
    uint3 index;
    unsigned count = 0, arrived = 0;
    unsigned long long generation = 0;
    std::vector<std::uint64_t> votes;
    std::vector<std::unique_ptr<Thread>> threads;
    std::vector<std::unique_ptr<Warp>> warps;
    std::unique_ptr<unsigned char[]> shared;
    void (*kernel)(void **) = nullptr;
    void **arguments = nullptr;
    ucontext_t scheduler;
    std::string error;
    std::mutex lock;
    std::condition_variable changed;
};

inline Block block;
inline unsigned seed = 0;
#ifdef SHIM_THREADS
inline thread_local Thread *self = nullptr;
#else
inline Thread *self = nullptr;
#endif

inline void *dynamic_shared() { return block.shared.get(); }

inline std::string describe() {
    unsigned counts[4] = {};
    for (unsigned t = 0; t < block.count; ++t) ++counts[static_cast<int>(block.threads[t]->state)];
    return "block (" + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) + ", " +
           std::to_string(block.index.z) + ") is stuck: of " + std::to_string(block.count) + " threads " +
           std::to_string(counts[1]) + " wait at __syncthreads, " + std::to_string(counts[2]) +
           " in a warp operation, " + std::to_string(counts[3]) + " have returned";
}

// Waits until `done`; a fiber hands over to the scheduler, a thread sleeps.
template <class Done>
void park([[maybe_unused]] std::unique_lock<std::mutex> &held, [[maybe_unused]] std::condition_variable &changed,
          Done done) {
#ifdef SHIM_THREADS
    if (!changed.wait_for(held, patience, done)) {
        std::fprintf(stderr, "%s\n", describe().c_str());
        std::_Exit(70);
    }
#else
    Thread *const me = self;
    held.unlock();
    while (!done()) swapcontext(&me->context, &block.scheduler);
#endif
}

inline void wake([[maybe_unused]] std::condition_variable &changed) {
#ifdef SHIM_THREADS
    changed.notify_all();
#endif
}

inline void block_barrier() {
    std::unique_lock<std::mutex> held(block.lock);
    if (++block.arrived == block.count) {
        block.arrived = 0;
        ++block.generation;
#ifndef SHIM_THREADS
        for (unsigned t = 0; t < block.count; ++t) block.threads[t]->state = State::ready;
#endif
        wake(block.changed);
        return;
    }
    self->state = State::at_barrier;
    const auto before = block.generation;
    park(held, block.changed, [before] { return block.generation != before; });
    self->state = State::ready;
}

// Returns once all lanes of `mask` have called the same operation with the same mask.
inline void warp_barrier(unsigned mask, const char *operation) {
    Warp &warp = *self->warp;
    const unsigned lane = self->lane;
    mask &= warp.existing;
    if (!(mask >> lane & 1)) fail(std::string(operation) + ": the mask leaves out the calling lane");
    std::unique_lock<std::mutex> held(warp.lock);
    for (unsigned other = 0; other < warp_size; ++other)
        if ((mask & warp.waiting) >> other & 1)
            if (warp.mask[other] != mask || std::strcmp(warp.operation[other], operation) != 0)
                fail(std::string("lanes of one warp meet in ") + warp.operation[other] + " and " + operation);
    warp.waiting |= 1u << lane;
    warp.mask[lane] = mask;
    warp.operation[lane] = operation;
    if ((warp.waiting & mask) == mask) {
        warp.waiting &= ~mask;
#ifndef SHIM_THREADS
        for (unsigned t = 0; t < warp_size; ++t)
            if (mask >> t & 1) block.threads[self->linear - lane + t]->state = State::ready;
#endif
        wake(warp.changed);
        return;
    }
    self->state = State::in_warp;
    park(held, warp.changed, [&warp, lane] { return !(warp.waiting >> lane & 1); });
    self->state = State::ready;
}

}  // namespace cuda_on_cpu

#include "run_grid.hpp"
#include "cuda_words.hpp"
#include "launch.hpp"
