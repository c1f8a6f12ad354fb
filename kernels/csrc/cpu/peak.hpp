// How many multiply-adds this processor can do: the floor that the benchmarks compare with.
#pragma once

#include "vector.hpp"

namespace MULTISA_ISA {

// Runs rounds of 12 independent vector multiply-adds, none of which touches memory; returns their number.
static double multiply_adds(long rounds) {
    Vec sums[12];
    for (Vec& sum : sums) sum = broadcast(1.0f);
    const Vec factor = broadcast(0.999f);
    for (long round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (Vec& sum : sums) sum = sum * factor + factor;
        __asm__ volatile("" ::: "memory");
    }
    volatile float keep = 0;
    for (Vec& sum : sums) keep = keep + sum[0];
    return (double)rounds * 12 * WIDTH;
}

}  // namespace MULTISA_ISA
