// Runs the blocks of a grid and the threads of a block, as fibers or as threads.
#pragma once

namespace cuda_on_cpu {

inline void run_thread() {
    try {
        block.kernel(block.arguments);
    } catch (const std::exception &problem) {
#ifdef SHIM_THREADS
        std::fprintf(stderr, "%s\n", problem.what());
        std::_Exit(70);
#else
        if (block.error.empty()) block.error = problem.what();
#endif
    }
    self->state = State::finished;
}

// A fiber serves one thread of each block: entered anew after it has finished.
inline void fiber_entry() {
    for (;;) {
        run_thread();
        Thread *const me = self;
        swapcontext(&me->context, &block.scheduler);
    }
}

inline void make_fiber(Thread &thread) {
    if (!thread.stack) thread.stack.reset(new char[stack_size]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = stack_size;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, fiber_entry, 0);
}

inline void run_fibers(std::mt19937 &random) {
    std::vector<unsigned> order(block.count);
    std::iota(order.begin(), order.end(), 0u);
    for (bool any = true; any && block.error.empty();) {
        any = false;
        if (seed) std::shuffle(order.begin(), order.end(), random);
        for (const unsigned t : order) {
            Thread &thread = *block.threads[t];
            if (thread.state != State::ready) continue;
            any = true;
            self = &thread;
            swapcontext(&block.scheduler, &thread.context);
            if (!block.error.empty()) break;
        }
    }
    if (!block.error.empty()) return;
    for (unsigned t = 0; t < block.count; ++t)
        if (block.threads[t]->state != State::finished) {
            block.error = describe();
            return;
        }
}

__attribute__((no_sanitize("address"))) inline void poison_shared(std::size_t dynamic_bytes) {
    for (volatile unsigned char *p = __start_cuda_shared; p < __stop_cuda_shared; ++p) *p = 0xff;
    std::memset(block.shared.get(), 0xff, dynamic_bytes);
}

inline void prepare_threads(dim3 size) {
    block.size = size;
    block.count = size.x * size.y * size.z;
    block.votes.assign(block.count, 0);
    block.warps.clear();
    for (unsigned w = 0; w * warp_size < block.count; ++w) block.warps.push_back(std::make_unique<Warp>());
    while (block.threads.size() < block.count) {
        block.threads.push_back(std::make_unique<Thread>());
        make_fiber(*block.threads.back());
    }
    for (unsigned t = 0; t < block.count; ++t) {
        Thread &thread = *block.threads[t];
        thread.index = {t % size.x, t / size.x % size.y, t / size.x / size.y};
        thread.linear = t;
        thread.lane = t % warp_size;
        thread.warp = block.warps[t / warp_size].get();
        thread.warp->existing |= 1u << thread.lane;
    }
}

inline void enter_block(unsigned linear, std::size_t bytes) {
    const dim3 grid = block.grid;
    block.index = {linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y};
    block.arrived = 0;
    poison_shared(bytes);
    for (unsigned t = 0; t < block.count; ++t) block.threads[t]->state = State::ready;
}

// The same threads serve all blocks, which follow each other; the barrier between two of them orders all.
inline void run_threads(const std::vector<unsigned> &order, std::size_t bytes) {
    std::size_t next = 0;
    enter_block(order[0], bytes);
    std::barrier between(block.count, [&]() noexcept {
        if (++next < order.size()) enter_block(order[next], bytes);
    });
    std::vector<std::thread> pool;
    for (unsigned t = 0; t < block.count; ++t)
        pool.emplace_back([t, &between, count = order.size()] {
            self = block.threads[t].get();
            for (std::size_t i = 0; i < count; ++i) {
                run_thread();
                between.arrive_and_wait();
            }
        });
    for (std::thread &thread : pool) thread.join();
}

// Runs a whole grid; returns what went wrong, or nothing.
inline std::string run_grid(void (*kernel)(void **), void **arguments, dim3 grid, dim3 size, std::size_t bytes) {
    if (!grid.x || !grid.y || !grid.z || grid.y > largest_grid_yz || grid.z > largest_grid_yz)
        return "the grid is empty or too large";
    if (!size.x || !size.y || !size.z || size.z > 64 || size.x * size.y * size.z > largest_block)
        return "the block is empty or too large";
    if (bytes > largest_shared) return "more shared memory than a device grants";
    block.grid = grid;
    block.kernel = kernel;
    block.arguments = arguments;
    block.shared.reset(new unsigned char[bytes]);
    block.error.clear();
    prepare_threads(size);
    std::mt19937 random(seed);
    std::vector<unsigned> order(grid.x * grid.y * grid.z);
    std::iota(order.begin(), order.end(), 0u);
    if (seed) std::shuffle(order.begin(), order.end(), random);
#ifdef SHIM_THREADS
    run_threads(order, bytes);
#else
    for (const unsigned b : order) {
        enter_block(b, bytes);
        run_fibers(random);
        if (block.error.empty()) continue;
        block.threads.clear();  // their stacks hold half-run kernels
        break;
    }
#endif
    return block.error;
}

}  // namespace cuda_on_cpu
