// The words of CUDA C++ that the kernels use: indices, barriers, warp operations, atomics, types, arithmetic.
#pragma once

#include <bit>
#include <cmath>

#define threadIdx (cuda_on_cpu::self->index)
#define blockIdx (cuda_on_cpu::block.index)
#define blockDim (cuda_on_cpu::block.size)
#define gridDim (cuda_on_cpu::block.grid)
constexpr int warpSize = 32;

// Vector types.
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Barriers of a block. The votes are read between two barriers.
inline void __syncthreads() { cuda_on_cpu::block_barrier(); }
inline int __syncthreads_count(int predicate) {
    auto &votes = cuda_on_cpu::block.votes;
    votes[cuda_on_cpu::self->linear] = predicate != 0;
    __syncthreads();
    int count = 0;
    for (const auto vote : votes) count += static_cast<int>(vote);
    __syncthreads();
    return count;
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) != 0; }
inline int __syncthreads_and(int predicate) { return __syncthreads_count(!predicate) == 0; }
inline void __threadfence() {}
inline void __threadfence_block() {}

// Warp operations: every lane of the mask hands out a value, meets the others, reads, meets them again.
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_cpu::warp_barrier(mask, "__syncwarp"); }

namespace cuda_on_cpu {
template <class T, class Read>
auto exchange(unsigned mask, const char *name, T value, Read read) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    Warp &warp = *self->warp;
    std::memcpy(&warp.value[self->lane], &value, sizeof(T));
    warp_barrier(mask, name);
    const auto result = read(warp, mask & warp.existing);
    warp_barrier(mask, name);
    return result;
}

template <class T>
T lane_value(const Warp &warp, unsigned lane) {
    T value;
    std::memcpy(&value, &warp.value[lane], sizeof(T));
    return value;
}

// `source` outside the caller's segment gives the caller's own value, as on a device.
template <class T>
T shuffle(unsigned mask, const char *name, T value, int source, int width) {
    const int lane = static_cast<int>(self->lane), first = lane / width * width;
    const bool outside = source < first || source >= first + width;
    const unsigned from = static_cast<unsigned>(outside ? lane : source);
    return exchange(mask, name, value, [from, name](const Warp &warp, unsigned lanes) {
        if (!(lanes >> from & 1)) fail(std::string(name) + ": reads a lane outside the mask");
        return lane_value<T>(warp, from);
    });
}
}  // namespace cuda_on_cpu

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const int first = static_cast<int>(cuda_on_cpu::self->lane) / width * width;
    return cuda_on_cpu::shuffle(mask, "__shfl_sync", value, first + (source & (width - 1)), width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = static_cast<int>(cuda_on_cpu::self->lane);
    return cuda_on_cpu::shuffle(mask, "__shfl_up_sync", value, lane - static_cast<int>(delta), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = static_cast<int>(cuda_on_cpu::self->lane);
    return cuda_on_cpu::shuffle(mask, "__shfl_down_sync", value, lane + static_cast<int>(delta), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const int lane = static_cast<int>(cuda_on_cpu::self->lane);
    return cuda_on_cpu::shuffle(mask, "__shfl_xor_sync", value, lane ^ bits, width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const auto read = [](const cuda_on_cpu::Warp &warp, unsigned lanes) {
        unsigned votes = 0;
        for (unsigned lane = 0; lane < 32; ++lane)
            if (lanes >> lane & 1) votes |= static_cast<unsigned>(warp.value[lane]) << lane;
        return votes;
    };
    return cuda_on_cpu::exchange(mask, "__ballot_sync", std::uint64_t(predicate != 0), read);
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
    return cuda_on_cpu::exchange(mask, "__match_any_sync", value, [value](const auto &warp, unsigned lanes) {
        unsigned same = 0;
        for (unsigned lane = 0; lane < 32; ++lane)
            if ((lanes >> lane & 1) && cuda_on_cpu::lane_value<T>(warp, lane) == value) same |= 1u << lane;
        return same;
    });
}

// Atomics, relaxed as on a device: they order nothing else. All return the old value.
namespace cuda_on_cpu {
template <class T, class Next>
T update(T *address, Next next) {
    T old, desired;
    __atomic_load(address, &old, __ATOMIC_RELAXED);
    do desired = next(old);
    while (!__atomic_compare_exchange(address, &old, &desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}
}  // namespace cuda_on_cpu
template <class T>
T atomicAdd(T *a, std::type_identity_t<T> v) { return cuda_on_cpu::update(a, [v](T old) { return static_cast<T>(old + v); }); }
template <class T>
T atomicMin(T *a, std::type_identity_t<T> v) { return cuda_on_cpu::update(a, [v](T old) { return v < old ? v : old; }); }
template <class T>
T atomicMax(T *a, std::type_identity_t<T> v) { return cuda_on_cpu::update(a, [v](T old) { return v > old ? v : old; }); }
template <class T>
T atomicOr(T *a, std::type_identity_t<T> v) { return cuda_on_cpu::update(a, [v](T old) { return static_cast<T>(old | v); }); }
template <class T>
T atomicAnd(T *a, std::type_identity_t<T> v) { return cuda_on_cpu::update(a, [v](T old) { return static_cast<T>(old & v); }); }
template <class T>
T atomicExch(T *a, std::type_identity_t<T> v) { return cuda_on_cpu::update(a, [v](T) { return v; }); }
template <class T>
T atomicCAS(T *a, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
    return cuda_on_cpu::update(a, [expected, v](T old) { return old == expected ? v : old; });
}

// Loads and bits.
template <class T>
T __ldg(const T *address) { return *address; }
inline int __popc(unsigned v) { return std::popcount(v); }
inline int __popcll(unsigned long long v) { return std::popcount(v); }
inline int __clz(int v) { return std::countl_zero(static_cast<unsigned>(v)); }
inline int __clzll(long long v) { return std::countl_zero(static_cast<unsigned long long>(v)); }
inline int __ffs(int v) { return v ? std::countr_zero(static_cast<unsigned>(v)) + 1 : 0; }
inline int __ffsll(long long v) { return v ? std::countr_zero(static_cast<unsigned long long>(v)) + 1 : 0; }
inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }

// Arithmetic. Compile with -ffp-contract=off: the __f*_rn words promise that nothing is fused.
using std::isfinite;
using std::isnan;
template <class T>
constexpr T min(T a, std::type_identity_t<T> b) { return b < a ? b : a; }
template <class T>
constexpr T max(T a, std::type_identity_t<T> b) { return a < b ? b : a; }
inline float rsqrtf(float v) { return 1 / std::sqrt(v); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float v) { return std::sqrt(v); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __double2float_rn(double v) { return static_cast<float>(v); }
inline int __float2int_rn(float v) { return static_cast<int>(std::nearbyint(v)); }
inline int __float2int_rd(float v) { return static_cast<int>(std::floor(v)); }
inline float __int2float_rn(int v) { return static_cast<float>(v); }

// Half precision, rounded to nearest even.
struct __half { unsigned short bits; };
struct alignas(4) __half2 { __half x, y; };

inline float __half2float(__half h) {
    const unsigned sign = (h.bits & 0x8000u) << 16, magnitude = h.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | magnitude << 13);
    // The exponent of a half, taken for one of a float, is too small by 112; denormals become exact by the product.
    const float value = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
    return std::bit_cast<float>(std::bit_cast<unsigned>(value) | sign);
}

inline __half __float2half_rn(float v) {
    const unsigned bits = std::bit_cast<unsigned>(v), magnitude = bits & 0x7fffffffu;
    const unsigned sign = bits >> 16 & 0x8000u;
    unsigned result;
    if (magnitude > 0x7f800000u) return {0x7fff};
    if (magnitude >= 0x477ff000u) {
        result = 0x7c00u;  // 65520 and above round to infinity
    } else if (magnitude < 0x38800000u) {
        // Denormal: the sum with 0.5 has the half's last place as its own, so the processor rounds.
        result = std::bit_cast<unsigned>(std::bit_cast<float>(magnitude) + 0.5f) - std::bit_cast<unsigned>(0.5f);
    } else {
        result = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    }
    return {static_cast<unsigned short>(result | sign)};
}
inline __half __float2half(float v) { return __float2half_rn(v); }
inline float __low2float(__half2 v) { return __half2float(v.x); }
inline float __high2float(__half2 v) { return __half2float(v.y); }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
