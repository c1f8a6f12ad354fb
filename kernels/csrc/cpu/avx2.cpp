// The kernels for processors with AVX2 and FMA.
#if defined(__x86_64__)
#include <stdint.h>
#include <string.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define MULTISA_ISA avx2
#define MULTISA_WIDTH 8
#define MULTISA_TABLE AVX2_KERNELS
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
