// A hash table that numbers 64-bit keys in order of first occurrence.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace multisa {

class KeyTable {
public:
    // For about `expected` keys; it grows if there are more.
    explicit KeyTable(std::size_t expected) {
        while (slots_.size() < 2 * expected) slots_.resize(slots_.size() * 2), --shift_;
    }

    // The number of a key, a new number if the key is new; 2^64 - 1 is not a valid key.
    std::int32_t number_of(std::uint64_t key) {
        if (2 * static_cast<std::size_t>(count_) >= slots_.size()) grow();
        for (std::size_t at = slot_of(key);; at = (at + 1) & (slots_.size() - 1)) {
            Slot& slot = slots_[at];
            if (slot.key == key) return slot.number;
            if (slot.key == EMPTY) {
                slot = {key, count_};
                return count_++;
            }
        }
    }

    // The number of a key, or -1.
    std::int32_t find(std::uint64_t key) const {
        for (std::size_t at = slot_of(key);; at = (at + 1) & (slots_.size() - 1)) {
            const Slot& slot = slots_[at];
            if (slot.key == key) return slot.number;
            if (slot.key == EMPTY) return -1;
        }
    }

    // Prefetch the slot of a key.
    void expect(std::uint64_t key) const { __builtin_prefetch(&slots_[slot_of(key)]); }

private:
    static constexpr std::uint64_t EMPTY = ~std::uint64_t{0};
    struct Slot {
        std::uint64_t key = EMPTY;
        std::int32_t number = 0;
    };

    // Fibonacci hashing: the upper bits of a product depend on all bits of the key.
    std::size_t slot_of(std::uint64_t key) const { return (key * 0x9e3779b97f4a7c15u) >> shift_; }

    void grow() {
        std::vector<Slot> old(slots_.size() * 4);
        old.swap(slots_);
        shift_ -= 2;
        for (const Slot& slot : old) {
            if (slot.key == EMPTY) continue;
            std::size_t at = slot_of(slot.key);
            while (slots_[at].key != EMPTY) at = (at + 1) & (slots_.size() - 1);
            slots_[at] = slot;
        }
    }

    int shift_ = 64 - 12;
    std::vector<Slot> slots_ = std::vector<Slot>(std::size_t{1} << 12);
    std::int32_t count_ = 0;
};

}  // namespace multisa
