// The kernels for processors with AVX-512.
#if defined(__x86_64__)
#include <stdint.h>
#include <string.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define MULTISA_ISA avx512
#define MULTISA_WIDTH 16
#define MULTISA_TABLE AVX512_KERNELS
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
