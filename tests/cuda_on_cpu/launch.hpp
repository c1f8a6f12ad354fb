// Finds kernels by name and checks the arguments of a launch: the C interface of the test library.
#pragma once

namespace cuda_on_cpu {

template <class T>
constexpr char kind() {
    if constexpr (std::is_pointer_v<T>) return 'P';
    else if constexpr (std::is_same_v<T, float>) return 'f';
    else if constexpr (std::is_same_v<T, double>) return 'd';
    else if constexpr (std::is_integral_v<T> && sizeof(T) == 4) return std::is_signed_v<T> ? 'i' : 'I';
    else if constexpr (std::is_integral_v<T> && sizeof(T) == 8) return std::is_signed_v<T> ? 'q' : 'Q';
    else static_assert(sizeof(T) == 0, "kernel arguments are pointers, 4- or 8-byte integers, float or double");
}

struct Kernel {
    void (*call)(void **);
    std::string kinds;  // one letter an argument
};

inline std::map<std::string, Kernel> &kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

template <auto function>
struct Registration;

template <class... Arguments, void (*function)(Arguments...)>
struct Registration<function> {
    explicit Registration(const char *name) { kernels()[name] = {&call, {kind<Arguments>()...}}; }

    static void call(void **arguments) { expand(arguments, std::index_sequence_for<Arguments...>{}); }

    template <std::size_t... i>
    static void expand([[maybe_unused]] void **arguments, std::index_sequence<i...>) {
        function(*static_cast<Arguments *>(arguments[i])...);
    }
};

}  // namespace cuda_on_cpu

extern "C" {

inline __attribute__((used, visibility("default"))) const char *cuda_on_cpu_launch(
    const char *name, const unsigned *grid, const unsigned *size, unsigned long long shared_bytes,
    const char *kinds, void **arguments, unsigned seed) {
    static std::string error;
    error.clear();
    const auto found = cuda_on_cpu::kernels().find(name);
    cuda_on_cpu::seed = seed;
    if (found == cuda_on_cpu::kernels().end()) {
        error = "there is no such kernel";
    } else if (found->second.kinds != kinds) {
        error = std::string("got arguments ") + kinds + ", expected " + found->second.kinds;
    } else {
        error = cuda_on_cpu::run_grid(found->second.call, arguments, {grid[0], grid[1], grid[2]},
                                      {size[0], size[1], size[2]}, shared_bytes);
    }
    return error.c_str();
}

inline __attribute__((used, visibility("default"))) const char *cuda_on_cpu_kinds(const char *name) {
    const auto found = cuda_on_cpu::kernels().find(name);
    return found == cuda_on_cpu::kernels().end() ? nullptr : found->second.kinds.c_str();
}

inline __attribute__((used, visibility("default"))) void *cuda_on_cpu_allocate(unsigned long long size) {
    void *memory = nullptr;
    if (posix_memalign(&memory, 256, std::max(size, 1ull))) return nullptr;
    return std::memset(memory, 0xff, size);  // NaN, so that nothing relies on fresh memory
}

inline __attribute__((used, visibility("default"))) void cuda_on_cpu_free(void *memory) { std::free(memory); }
}
