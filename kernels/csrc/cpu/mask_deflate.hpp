// The image data of a PNG that holds a mask: filter Up (each row minus the one above, PNG 9.2), deflated (RFC 1951)
// into a zlib stream (RFC 1950).
//
// A filtered mask is zero except along outlines, so the encoder looks for runs of one byte only: matches of
// distance 1. It finds runs by comparing eight bytes at a time, computes their checksum by a formula, and skips the
// search for matches, which dominates a general deflate. The stream depends on the mask alone.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "huffman.hpp"
#include "runs.hpp"

namespace multisa {

// Adler-32 of runs, without going through their bytes.
class RunAdler {
public:
    // `count` bytes of `value`; count at most 2^16.
    void add(std::uint64_t value, std::uint64_t count) {
        // After byte i the first sum is a + i value, and the second sum adds these up.
        second_ += count * first_ + value * (count * (count + 1) / 2);
        first_ += count * value;
        since_ += count;
        if (since_ >= 1u << 16) reduce();
    }

    std::uint32_t digest() {
        reduce();
        return static_cast<std::uint32_t>(second_ << 16 | first_);
    }

private:
    void reduce() {
        first_ %= 65521;
        second_ %= 65521;
        since_ = 0;
    }

    std::uint64_t first_ = 1, second_ = 0, since_ = 0;
};

// Length symbols of deflate (RFC 1951 3.2.5) by match length 3..258: the symbol and its extra bits.
struct LengthCode {
    std::uint16_t symbol, extra;
    std::uint8_t bits;
};

inline const std::array<LengthCode, 259>& length_codes() {
    static const std::array<LengthCode, 259> codes = [] {
        std::array<LengthCode, 259> table = {};
        unsigned length = 3, symbol = 257;
        for (unsigned bits = 0; bits <= 5; ++bits)
            for (unsigned group = 0; group < (bits == 0 ? 8u : 4u); ++group, ++symbol)
                for (unsigned extra = 0; extra < 1u << bits && length < 258; ++extra, ++length)
                    table[length] = {static_cast<std::uint16_t>(symbol), static_cast<std::uint16_t>(extra),
                                     static_cast<std::uint8_t>(bits)};
        table[258] = {285, 0, 0};
        return table;
    }();
    return codes;
}

// Collects literals and matches, and writes a block with its own Huffman codes when it is full.
class MaskDeflater {
public:
    explicit MaskDeflater(std::size_t pixels) {
        tokens_.reserve(TOKENS);
        out_.bytes.reserve(pixels / 8 + 1024);
        out_.bytes.append("\x78\x01", 2);  // deflate, window 32 KiB, fastest
    }

    void add_run(std::uint8_t value, std::size_t count) {
        adler_.add(value, count);
        literal(value);
        --count;
        for (; count >= 258; count -= 258) match(258);
        if (count >= 3) return match(static_cast<unsigned>(count));
        for (; count > 0; --count) literal(value);
    }

    std::string finish() {
        write_block(true);
        out_.align();
        const std::uint32_t sum = adler_.digest();
        for (int shift = 24; shift >= 0; shift -= 8) out_.bytes.push_back(static_cast<char>(sum >> shift));
        return std::move(out_.bytes);
    }

private:
    static constexpr std::size_t TOKENS = 1 << 15;  // of one block: its codes fit it, and its memory stays small

    void literal(unsigned value) { add_token(value, value); }
    void match(unsigned length) { add_token(256 + length, length_codes()[length].symbol); }

    void add_token(unsigned token, unsigned symbol) {
        tokens_.push_back(static_cast<std::uint16_t>(token));
        ++counts_[symbol];
        if (tokens_.size() == TOKENS) write_block(false);
    }

    void write_block(bool last) {
        ++counts_[256];  // the end of the block
        const HuffmanCode code(counts_.data(), counts_.size(), 15);
        out_.put(last ? 5 : 4, 3);  // a block with codes of its own
        write_codes(out_, code.lengths);
        for (const unsigned token : tokens_) {
            if (token < 256) {
                out_.put(code.bits[token], code.lengths[token]);
            } else {
                const LengthCode& length = length_codes()[token - 256];
                out_.put(code.bits[length.symbol], code.lengths[length.symbol]);
                out_.put(length.extra, length.bits + 1u);  // the last bit is the distance, of which there is one
            }
        }
        out_.put(code.bits[256], code.lengths[256]);
        tokens_.clear();
        counts_.fill(0);
    }

    RunAdler adler_;
    BitWriter out_;
    std::vector<std::uint16_t> tokens_;
    std::array<std::uint32_t, 286> counts_ = {};
};

// The zlib stream of a mask [height][width], both at least 1: what IDAT holds at bit depth 8.
inline std::string deflate_mask(const std::uint8_t* mask, long height, long width) {
    constexpr long PIECE = 1 << 16;
    MaskDeflater deflater(static_cast<std::size_t>(height) * static_cast<std::size_t>(width));
    std::vector<std::uint8_t> row(static_cast<std::size_t>(width) + 1);
    const std::vector<std::uint8_t> nothing(static_cast<std::size_t>(width));
    const std::uint8_t* above = nothing.data();
    row[0] = 2;  // the filter's number goes before each row
    for (long y = 0; y < height; ++y, above = mask, mask += width) {
        for (long x = 0; x < width; ++x) row[x + 1] = static_cast<std::uint8_t>(mask[x] - above[x]);
        const std::uint8_t* const end = row.data() + width + 1;
        for (const std::uint8_t* from = row.data(); from < end;) {
            const std::uint8_t* const stop = run_end(from, end - from > PIECE ? from + PIECE : end, *from);
            deflater.add_run(*from, static_cast<std::size_t>(stop - from));
            from = stop;
        }
    }
    return deflater.finish();
}

}  // namespace multisa
