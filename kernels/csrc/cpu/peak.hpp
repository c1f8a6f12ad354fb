// The peak rate of multiply-adds of this processor: the roofline of the benchmarks.
#pragma once

#include "vector.hpp"

namespace MULTISA_ISA {

// Runs rounds of 8 independent vector multiply-adds, none of which touches memory; returns their number.
static double multiply_adds(long rounds) {
    const Vec factor = broadcast(0.999f);
    Vec a = factor, b = factor, c = factor, d = factor, e = factor, f = factor, g = factor, h = factor;
    // MULTISA_ROUNDED keeps the compiler from computing the result in advance.
#define MULTISA_CHAIN(sum)       \
    sum = sum * factor + factor; \
    MULTISA_ROUNDED(sum)
    for (long round = 0; round < rounds; ++round) {
        MULTISA_CHAIN(a);
        MULTISA_CHAIN(b);
        MULTISA_CHAIN(c);
        MULTISA_CHAIN(d);
        MULTISA_CHAIN(e);
        MULTISA_CHAIN(f);
        MULTISA_CHAIN(g);
        MULTISA_CHAIN(h);
    }
#undef MULTISA_CHAIN
    volatile float keep = (a + b + c + d + e + f + g + h)[0];
    (void)keep;
    return (double)rounds * 8 * WIDTH;
}

}  // namespace MULTISA_ISA
