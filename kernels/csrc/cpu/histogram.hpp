// Counts of each byte of an array, and of each pair of bytes of two arrays.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace multisa {

// Neighbours in a mask are mostly equal: four tables avoid a dependency of each increment on the one before.
inline std::array<std::int64_t, 256> histogram(const std::uint8_t* values, std::size_t count) {
    std::vector<std::uint32_t> tables(4 * 256);
    std::array<std::int64_t, 256> total = {};
    constexpr std::size_t kBlock = std::size_t{1} << 30;  // within what 32 bits hold
    for (std::size_t start = 0; start < count; start += kBlock) {
        const std::size_t end = count - start < kBlock ? count : start + kBlock;
        std::size_t i = start;
        for (; i + 4 <= end; i += 4)
            for (std::size_t lane = 0; lane < 4; ++lane) ++tables[lane * 256 + values[i + lane]];
        for (; i < end; ++i) ++tables[values[i]];
        for (std::size_t entry = 0; entry < tables.size(); ++entry) {
            total[entry % 256] += tables[entry];
            tables[entry] = 0;
        }
    }
    return total;
}

// total: [256][256], zero at first; the first byte is the row.
inline void joint_histogram(const std::uint8_t* rows, const std::uint8_t* columns, std::size_t count,
                            std::int64_t* total) {
    for (std::size_t i = 0; i < count; ++i) ++total[std::size_t{rows[i]} * 256 + columns[i]];
}

}  // namespace multisa
