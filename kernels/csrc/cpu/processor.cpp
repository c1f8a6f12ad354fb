#include "processor.hpp"

#include <atomic>
#include <cstddef>
#include <new>
#include <stdexcept>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace multisa {

namespace {

std::vector<const Kernels*> available() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found.push_back(&AVX512_KERNELS);
    if (avx2) found.push_back(&AVX2_KERNELS);
#endif
    found.push_back(&PORTABLE_KERNELS);
    return found;
}

std::atomic<const Kernels*>& choice() {
    static std::atomic<const Kernels*> chosen{available().front()};
    return chosen;
}

}  // namespace

const Kernels& chosen_kernels() { return *choice().load(std::memory_order_relaxed); }

std::vector<std::string> available_instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* kernels : available()) names.emplace_back(kernels->name);
    return names;
}

void choose_instruction_set(const std::string& name) {
    for (const Kernels* kernels : available()) {
        if (kernels->name == name) {
            choice().store(kernels);
            return;
        }
    }
    std::string message = "instruction set: got '" + name + "', expected one of this processor's";
    for (const std::string& known : available_instruction_sets()) message += " " + known;
    throw std::invalid_argument(message);
}

namespace {

constexpr std::align_val_t CACHE_LINE{64};
constexpr long LARGE = 1 << 24;  // floats, 64 MiB

struct Memory {
    float* floats = nullptr;
    long size = 0;

    void resize(long wanted) {
        ::operator delete(floats, CACHE_LINE);
        floats = nullptr;
        size = 0;
        if (wanted == 0) return;
        floats = static_cast<float*>(::operator new(static_cast<std::size_t>(wanted) * sizeof(float), CACHE_LINE));
        size = wanted;
    }
    ~Memory() { resize(0); }
};

thread_local Memory memory;

}  // namespace

Workspace::Workspace(long floats) {
    if (memory.size < floats) memory.resize(floats);
    floats_ = memory.floats;
}

Workspace::~Workspace() {
    if (memory.size > LARGE) memory.resize(0);
}

#if defined(__x86_64__)
FlushDenormals::FlushDenormals() : before_(_mm_getcsr()) {
    _mm_setcsr(static_cast<unsigned>(before_) | 0x8040);  // flush to zero, denormals are zero
}
FlushDenormals::~FlushDenormals() { _mm_setcsr(static_cast<unsigned>(before_)); }
#elif defined(__aarch64__)
FlushDenormals::FlushDenormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    __asm__ volatile("msr fpcr, %0" ::"r"(before_ | (1ul << 24)));
}
FlushDenormals::~FlushDenormals() { __asm__ volatile("msr fpcr, %0" ::"r"(before_)); }
#else
FlushDenormals::FlushDenormals() : before_(0) {}
FlushDenormals::~FlushDenormals() = default;
#endif

}  // namespace multisa
