// Vectors of floats for one instruction set, in the compiler's own vector types (GCC and Clang, any processor).
//
// The files that include this are compiled once per instruction set, each with MULTISA_ISA (a namespace) and
// MULTISA_WIDTH (floats a vector). They use no inline function of the standard library: the
// linker might keep its AVX-512 copy for every processor.
#pragma once

#include <stdint.h>
#include <string.h>

namespace MULTISA_ISA {

constexpr int WIDTH = MULTISA_WIDTH;

// A vector of floats, and the same at an address that is a multiple of 4 bytes only.
template <int LANES>
struct VectorOf {
    typedef float Aligned __attribute__((vector_size(LANES * 4)));
    typedef float Loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
};
using Vec = VectorOf<WIDTH>::Aligned;

// The vector of integers of the same size: the result of a comparison, 0 or -1 in each lane.
template <class V>
using IntOf = decltype(V{} < V{});
using IntVec = IntOf<Vec>;

template <class V>
constexpr int LANES_OF = sizeof(V) / 4;

#define MULTISA_INLINE static inline __attribute__((always_inline))
#define MULTISA_MEMBER inline __attribute__((always_inline))

// Keep a product from being fused with the sum that follows it, which would round differently.
#if defined(__x86_64__)
#define MULTISA_ROUNDED(vector) __asm__("" : "+x"(vector))
#elif defined(__aarch64__)
#define MULTISA_ROUNDED(vector) __asm__("" : "+w"(vector))
#else
#define MULTISA_ROUNDED(vector) __asm__("" : "+m"(vector))
#endif

template <class V = Vec>
MULTISA_INLINE V broadcast(float value) {
    return value - V{};
}
template <class V = Vec>
MULTISA_INLINE V load(const float* from) {
    return *(const typename VectorOf<LANES_OF<V>>::Loose*)from;
}
template <class V>
MULTISA_INLINE void store(float* to, V value) {
    *(typename VectorOf<LANES_OF<V>>::Loose*)to = value;
}
template <class V>
MULTISA_INLINE V smaller(V a, V b) {
    return a < b ? a : b;
}
template <class V>
MULTISA_INLINE V larger(V a, V b) {
    return a > b ? a : b;
}
template <class V>
MULTISA_INLINE V absolute(V a) {
    return (V)((IntOf<V>)a & 0x7fffffff);
}

// A load and a multiply-add that stay where they are written. In long unrolled code GCC moves loads far ahead of
// their use, and spills what does not fit the registers. Sanitizers check plain C++ only.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#if MULTISA_WIDTH >= 8
#define MULTISA_MOVE "vmovups %1, %0"
MULTISA_INLINE void accumulate(Vec& sum, Vec weight, Vec value) {
    __asm__ volatile("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(value));
}
#else
#define MULTISA_MOVE "movups %1, %0"
MULTISA_INLINE void accumulate(Vec& sum, Vec weight, Vec value) {
    __asm__ volatile("mulps %2, %1\n\taddps %1, %0" : "+x"(sum), "+x"(weight) : "x"(value));
}
#endif
MULTISA_INLINE Vec load_here(const float* from) {
    Vec value;
    __asm__ volatile(MULTISA_MOVE : "=v"(value) : "m"(*(const VectorOf<WIDTH>::Loose*)from));
    return value;
}
#undef MULTISA_MOVE
#else
MULTISA_INLINE Vec load_here(const float* from) { return load(from); }
MULTISA_INLINE void accumulate(Vec& sum, Vec weight, Vec value) { sum += weight * value; }
#endif

// The nearest whole number, ties to even, of |x| < 2^22.
template <class V>
MULTISA_INLINE V nearest(V x) {
    V shifted = x + 12582912.0f;  // 1.5 * 2^23: no room for a fraction
    MULTISA_ROUNDED(shifted);
    return shifted - 12582912.0f;
}

// Lane i of the result is lane i ^ STEP.
template <int STEP, class V>
MULTISA_INLINE V exchanged(V v) {
    constexpr int LANES = LANES_OF<V>;
#if defined(__clang__)
    constexpr int S = STEP;
    if constexpr (LANES == 4)
        return __builtin_shufflevector(v, v, 0 ^ S, 1 ^ S, 2 ^ S, 3 ^ S);
    else if constexpr (LANES == 8)
        return __builtin_shufflevector(v, v, 0 ^ S, 1 ^ S, 2 ^ S, 3 ^ S, 4 ^ S, 5 ^ S, 6 ^ S, 7 ^ S);
    else
        return __builtin_shufflevector(v, v, 0 ^ S, 1 ^ S, 2 ^ S, 3 ^ S, 4 ^ S, 5 ^ S, 6 ^ S, 7 ^ S, 8 ^ S, 9 ^ S,
                                       10 ^ S, 11 ^ S, 12 ^ S, 13 ^ S, 14 ^ S, 15 ^ S);
#else
    IntOf<V> lanes = {};
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; ++lane) lanes[lane] = lane ^ STEP;
    return __builtin_shuffle(v, lanes);
#endif
}

// Lane i of the result is lane `lanes[i]`.
template <class V>
MULTISA_INLINE V permuted(V v, IntOf<V> lanes) {
#if defined(__clang__)
    V result;
    for (int lane = 0; lane < LANES_OF<V>; ++lane) result[lane] = v[lanes[lane]];
    return result;
#else
    return __builtin_shuffle(v, lanes);
#endif
}

// The low byte of each lane.
typedef uint8_t ByteVec __attribute__((vector_size(WIDTH)));
MULTISA_INLINE ByteVec low_bytes(IntVec v) {
#if MULTISA_WIDTH == 8 && !defined(__clang__)
    // GCC converts in a dozen instructions; this is a shuffle within each half and one across.
    typedef int8_t Octets __attribute__((vector_size(32)));
    const Octets low = {0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12,
                        16, 20, 24, 28, 16, 20, 24, 28, 16, 20, 24, 28, 16, 20, 24, 28};
    const IntVec both = __builtin_shuffle((IntVec)__builtin_shuffle((Octets)v, low), IntVec{0, 4, 0, 4, 0, 4, 0, 4});
    ByteVec bytes;
    memcpy(&bytes, &both, sizeof(bytes));
    return bytes;
#else
    return __builtin_convertvector(v, ByteVec);
#endif
}

// Reduce the lanes of each group of GROUP neighbours, a power of two of at least 4; the result is in all of them.
template <int GROUP, class V>
MULTISA_INLINE V largest_of_group(V v) {
    if constexpr (GROUP > 8) v = larger(v, exchanged<8>(v));
    if constexpr (GROUP > 4) v = larger(v, exchanged<4>(v));
    v = larger(v, exchanged<2>(v));
    return larger(v, exchanged<1>(v));
}

template <int GROUP, class V>
MULTISA_INLINE V sum_of_group(V v) {
    if constexpr (GROUP > 8) v += exchanged<8>(v);
    if constexpr (GROUP > 4) v += exchanged<4>(v);
    v += exchanged<2>(v);
    return v + exchanged<1>(v);
}

// Whether a comparison holds in every lane.
MULTISA_INLINE bool all(IntVec comparison) {
    int32_t both = -1;
    for (int lane = 0; lane < WIDTH; ++lane) both &= comparison[lane];
    return both != 0;
}

// Whether no value is NaN or infinite.
static bool all_finite(const float* values, long count) {
    IntVec finite = ~IntVec{};
    long i = 0;
    for (; i + WIDTH <= count; i += WIDTH) finite &= absolute(load(values + i)) <= 3.4028235e38f;
    bool result = all(finite);
    for (; i < count; ++i) result &= __builtin_isfinite(values[i]) != 0;
    return result;
}

// exp(x), relative error below 2e-7 for x in -87..88; x is clamped to that. Cephes' polynomial.
template <class V>
MULTISA_INLINE V exponential(V x) {
    using Int = IntOf<V>;
    x = larger(smaller(x, broadcast<V>(88.0f)), broadcast<V>(-87.0f));
    V shifted = x * 1.44269504f + 12582912.0f;  // see nearest()
    MULTISA_ROUNDED(shifted);
    const V n = shifted - 12582912.0f;
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (V)(((Int)shifted - 0x4b400000 + 127) << 23);
}

// Natural logarithm of x > 0, a normal number; absolute error below 1e-7 of the result's size. Cephes' polynomial.
template <class V>
MULTISA_INLINE V logarithm(V x) {
    using Int = IntOf<V>;
    const Int bits = (Int)x - 0x3f3504f3;  // of sqrt(1/2): the mantissa then lies in sqrt(1/2)..sqrt(2)
    const V m = (V)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
    const V n = __builtin_convertvector(bits >> 23, V);
    V p = m * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    const V square = m * m;
    const V tail = p * m * square + n * -2.12194440e-4f - square * 0.5f;
    return (m + tail) + n * 0.693359375f;
}

}  // namespace MULTISA_ISA
