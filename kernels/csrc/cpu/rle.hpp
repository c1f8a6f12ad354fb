// Run lengths of every class of a mask, from one pass in each direction for any number of classes: COCO's
// (column by column, with the compressed string of its API) and those in reading order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "runs.hpp"

namespace multisa {

struct ClassRuns {
    std::uint64_t area = 0;
    long left = 0, top = 0, right = 0, bottom = 0;  // of the tight box, both ends included
    std::vector<std::uint32_t> columns, rows;       // outside, inside, outside, ... from the first pixel on
    std::uint64_t columns_end = 0, rows_end = 0;    // where the last run inside ended
};

// Transpose, in tiles that fit the L1 cache.
inline void transpose(const std::uint8_t* from, long height, long width, std::uint8_t* to) {
    constexpr long TILE = 64;
    for (long top = 0; top < height; top += TILE)
        for (long left = 0; left < width; left += TILE) {
            const long bottom = std::min(top + TILE, height), right = std::min(left + TILE, width);
            for (long x = left; x < right; ++x)
                for (long y = top; y < bottom; ++y) to[x * height + y] = from[y * width + x];
        }
}

// Calls visit(value, start, length) for each run of `count` bytes, in order.
template <class Visit>
void for_each_run(const std::uint8_t* values, std::uint64_t count, const Visit& visit) {
    const std::uint8_t* const end = values + count;
    for (const std::uint8_t* from = values; from < end;) {
        const std::uint8_t* const stop = run_end(from, end, *from);
        visit(*from, static_cast<std::uint64_t>(from - values), static_cast<std::uint64_t>(stop - from));
        from = stop;
    }
}

inline void append_run(std::vector<std::uint32_t>& counts, std::uint64_t& end, std::uint64_t start,
                       std::uint64_t length) {
    counts.push_back(static_cast<std::uint32_t>(start - end));
    counts.push_back(static_cast<std::uint32_t>(length));
    end = start + length;
}

// Runs of all 256 possible classes; those that are absent have area 0. height * width < 2^32, both at least 1.
inline std::vector<ClassRuns> encode_runs(const std::uint8_t* mask, long height, long width) {
    const std::uint64_t pixels = static_cast<std::uint64_t>(height) * static_cast<std::uint64_t>(width);
    const auto turned = std::make_unique<std::uint8_t[]>(pixels);
    transpose(mask, height, width, turned.get());
    std::vector<ClassRuns> classes(256);
    for_each_run(turned.get(), pixels, [&](std::uint8_t id, std::uint64_t start, std::uint64_t length) {
        ClassRuns& one = classes[id];
        const std::uint64_t last = start + length - 1;
        const long first_column = static_cast<long>(start / height), last_column = static_cast<long>(last / height);
        // A run that continues in the next column covers the bottom of one column and the top of the other.
        const bool turns = first_column != last_column;
        const long top = turns ? 0 : static_cast<long>(start % height);
        const long bottom = turns ? height - 1 : static_cast<long>(last % height);
        if (one.area == 0) one.left = first_column, one.top = top, one.bottom = bottom;
        one.top = std::min(one.top, top);
        one.bottom = std::max(one.bottom, bottom);
        one.right = last_column;
        one.area += length;
        append_run(one.columns, one.columns_end, start, length);
    });
    for_each_run(mask, pixels, [&](std::uint8_t id, std::uint64_t start, std::uint64_t length) {
        append_run(classes[id].rows, classes[id].rows_end, start, length);
    });
    for (ClassRuns& one : classes) {
        if (one.area == 0) continue;
        if (one.columns_end < pixels) one.columns.push_back(static_cast<std::uint32_t>(pixels - one.columns_end));
        if (one.rows_end < pixels) one.rows.push_back(static_cast<std::uint32_t>(pixels - one.rows_end));
    }
    return classes;
}

// COCO's string of run lengths: from the fourth on the difference to the one before the last, in groups of five
// bits from the lowest, a sixth bit says that more follow, the first printable character is "0" (48).
inline std::string compress_counts(const std::vector<std::uint32_t>& counts) {
    std::string text;
    text.reserve(2 * counts.size());
    for (std::size_t i = 0; i < counts.size(); ++i) {
        std::int64_t rest = counts[i];
        if (i > 2) rest -= counts[i - 2];
        for (bool more = true; more;) {
            const int five = static_cast<int>(rest & 31);
            rest >>= 5;
            more = (five & 16) ? rest != -1 : rest != 0;
            text.push_back(static_cast<char>((more ? five | 32 : five) + 48));
        }
    }
    return text;
}

}  // namespace multisa
