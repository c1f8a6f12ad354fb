// Huffman codes of deflate (RFC 1951 3.2): built from counts, and written bit by bit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace multisa {

// Bits into bytes, the lowest first.
struct BitWriter {
    std::string bytes;

    // `count` at most 32.
    void put(std::uint64_t value, unsigned count) {
        held_ |= value << filled_;
        filled_ += count;
        if (filled_ < 32) return;
        const char four[] = {static_cast<char>(held_), static_cast<char>(held_ >> 8), static_cast<char>(held_ >> 16),
                             static_cast<char>(held_ >> 24)};
        bytes.append(four, 4);
        held_ >>= 32;
        filled_ -= 32;
    }

    // Pad the current byte with zeros.
    void align() {
        for (; filled_ > 0; filled_ = filled_ > 8 ? filled_ - 8 : 0, held_ >>= 8)
            bytes.push_back(static_cast<char>(held_));
    }

private:
    std::uint64_t held_ = 0;
    unsigned filled_ = 0;
};

// A prefix code for symbols with these counts; `lengths` are 0 for symbols that do not occur.
struct HuffmanCode {
    std::vector<std::uint8_t> lengths;
    std::vector<std::uint16_t> bits;  // reversed: the first bit of the code is the lowest

    HuffmanCode(const std::uint32_t* counts, std::size_t symbols, unsigned longest)
        : lengths(symbols), bits(symbols) {
        std::vector<std::uint32_t> weights(counts, counts + symbols);
        // Halving brings counts closer, so that the code gets flatter; equal counts need at most 9 bits.
        while (depth_of(weights) > longest)
            for (std::uint32_t& weight : weights) weight = (weight + 1) / 2;
        number(longest);
    }

private:
    // Merges the two lightest until one is left (Huffman 1952); sets lengths, returns the largest.
    unsigned depth_of(const std::vector<std::uint32_t>& weights) {
        std::vector<std::pair<std::uint32_t, std::uint16_t>> leaves;
        for (std::size_t i = 0; i < weights.size(); ++i)
            if (weights[i] > 0) leaves.emplace_back(weights[i], static_cast<std::uint16_t>(i));
        std::fill(lengths.begin(), lengths.end(), std::uint8_t{0});
        if (leaves.size() == 1) return lengths[leaves[0].second] = 1;
        std::sort(leaves.begin(), leaves.end());
        // Nodes: the leaves in order of weight, then the merged nodes, which are created in order of weight.
        const std::size_t count = leaves.size();
        std::vector<std::uint64_t> merged;
        std::vector<std::size_t> parent(2 * count);
        std::size_t leaf = 0, inner = 0;
        const auto lightest = [&](std::uint64_t& weight) {
            if (inner == merged.size() || (leaf < count && leaves[leaf].first <= merged[inner])) {
                weight += leaves[leaf].first;
                return leaf++;
            }
            weight += merged[inner];
            return count + inner++;
        };
        while (merged.size() + 1 < count) {
            std::uint64_t weight = 0;
            const std::size_t one = lightest(weight), two = lightest(weight);
            parent[one] = parent[two] = count + merged.size();
            merged.push_back(weight);
        }
        const std::size_t root = count + merged.size() - 1;
        std::vector<unsigned> depth(root + 1);
        for (std::size_t node = root; node-- > 0;) depth[node] = depth[parent[node]] + 1;
        for (std::size_t i = 0; i < count; ++i) lengths[leaves[i].second] = static_cast<std::uint8_t>(depth[i]);
        return *std::max_element(depth.begin(), depth.end());
    }

    // Codes follow from their lengths (RFC 1951 3.2.2).
    void number(unsigned longest) {
        unsigned next = 0;
        for (unsigned length = 1; length <= longest; ++length, next <<= 1)
            for (std::size_t symbol = 0; symbol < lengths.size(); ++symbol) {
                if (lengths[symbol] != length) continue;
                unsigned turned = 0;
                for (unsigned bit = 0; bit < length; ++bit) turned |= (next >> bit & 1) << (length - 1 - bit);
                bits[symbol] = static_cast<std::uint16_t>(turned);
                ++next;
            }
    }
};

// The head of a block (RFC 1951 3.2.7): the code lengths of `literals`, and of one distance, the first.
inline void write_codes(BitWriter& out, const std::vector<std::uint8_t>& literals) {
    std::vector<std::uint8_t> lengths(literals);
    while (lengths.size() > 257 && lengths.back() == 0) lengths.pop_back();
    const std::size_t literal_count = lengths.size();
    lengths.push_back(1);  // distance 1
    // Symbols 0..15 are lengths, 17 and 18 stand for many zeros: (symbol, extra bits).
    std::vector<std::pair<std::uint8_t, std::uint8_t>> symbols;
    std::uint32_t counts[19] = {};
    for (std::size_t i = 0; i < lengths.size();) {
        std::size_t zeros = 0;
        while (i + zeros < lengths.size() && lengths[i + zeros] == 0 && zeros < 138) ++zeros;
        if (zeros >= 11)
            symbols.emplace_back(std::uint8_t{18}, static_cast<std::uint8_t>(zeros - 11));
        else if (zeros >= 3)
            symbols.emplace_back(std::uint8_t{17}, static_cast<std::uint8_t>(zeros - 3));
        else
            symbols.emplace_back(lengths[i], std::uint8_t{0}), zeros = 1;
        ++counts[symbols.back().first];
        i += zeros;
    }
    const HuffmanCode code(counts, 19, 7);
    constexpr unsigned ORDER[] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    unsigned written = 19;
    while (written > 4 && code.lengths[ORDER[written - 1]] == 0) --written;
    out.put(literal_count - 257, 5);
    out.put(0, 5);  // one distance
    out.put(written - 4, 4);
    for (unsigned i = 0; i < written; ++i) out.put(code.lengths[ORDER[i]], 3);
    for (const auto& [symbol, extra] : symbols) {
        out.put(code.bits[symbol], code.lengths[symbol]);
        if (symbol == 17) out.put(extra, 3);
        if (symbol == 18) out.put(extra, 7);
    }
}

}  // namespace multisa
