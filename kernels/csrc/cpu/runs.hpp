// Finding runs of equal bytes, eight at a time; shared by the codecs and the parts of masks.
#pragma once

#include <cstdint>
#include <cstring>

namespace multisa {

// The first place in [from, end) that does not hold `value`, or `end`.
inline const std::uint8_t* run_end(const std::uint8_t* from, const std::uint8_t* end, std::uint8_t value) {
    const std::uint64_t same = 0x0101010101010101ull * value;
    for (; end - from >= 8; from += 8) {
        std::uint64_t eight;
        std::memcpy(&eight, from, 8);
        if (eight != same) break;
    }
    while (from < end && *from == value) ++from;
    return from;
}

}  // namespace multisa
