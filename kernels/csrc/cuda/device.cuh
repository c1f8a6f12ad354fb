// The few helpers that kernels use beyond CUDA itself, and the only place that knows both ways to compile them:
// with nvcc for a device, or with MULTISA_ON_CPU and a C++ compiler, whose header emulates CUDA.
//
// Kernels use only blocks, shared memory, `_sync` shuffles and atomics.
#pragma once

#ifdef MULTISA_ON_CPU
#include "cuda_on_cpu.hpp"
// The shared memory of a block, of the size given at launch.
#define MULTISA_DYNAMIC_SHARED(type, name) type *const name = static_cast<type *>(cuda_on_cpu::dynamic_shared())
#else
#include <cuda_fp16.h>
#define MULTISA_DYNAMIC_SHARED(type, name)                         \
    extern __shared__ __align__(16) unsigned char multisa_shared[]; \
    type *const name = reinterpret_cast<type *>(multisa_shared)
#endif

namespace multisa {

// Reads four fp16 values, 8-byte aligned, by one load.
__device__ __forceinline__ float4 load_half4(const __half *address) {
    const uint2 words = __ldg(reinterpret_cast<const uint2 *>(address));
    const float2 low = __half22float2(*reinterpret_cast<const __half2 *>(&words.x));
    const float2 high = __half22float2(*reinterpret_cast<const __half2 *>(&words.y));
    return make_float4(low.x, low.y, high.x, high.y);
}

}  // namespace multisa
