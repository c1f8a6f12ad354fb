// Connected parts of a mask that are too small are given to their neighbours.
//
// Parts are sets of runs (union-find), and a part is known by its first run in reading order. Only small parts keep
// lists of their borders. The smallest part is absorbed first, so every part that grows and stays small at least
// doubles: a border is looked at log2(min_pixels) times at most.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <vector>

#include "runs.hpp"

namespace multisa {

class SmallParts {
public:
    // Copies the mask to `out` and finds its parts. height * width <= 2^30.
    SmallParts(const std::uint8_t* mask, long height, long width, std::uint8_t* out) : width_(width), out_(out) {
        rows_.reserve(static_cast<std::size_t>(height) + 1);
        for (long y = 0; y < height; ++y) add_row(mask + y * width, out + y * width);
        rows_.push_back(size());
        parent_.resize(ends_.size());
        std::iota(parent_.begin(), parent_.end(), 0);
        for_each_contact([&](Index above, Index below, Index) {
            if (ids_[above] == ids_[below]) join(above, below);
        });
        area_.resize(ends_.size());
        for_each_run([&](Index run, std::size_t, Index length) { area_[part_of(run)] += length; });
    }

    // Absorb all parts of fewer than `min_pixels` pixels, except the largest part of each class of `kept`, and write
    // what changes.
    void absorb(std::uint64_t min_pixels, const std::uint8_t* kept = nullptr, std::size_t n_kept = 0) {
        min_pixels_ = min_pixels;
        keep_largest(kept, n_kept);
        std::vector<std::uint64_t> queue;  // area and part, the smallest on top
        for (Index run = 0; run < size(); ++run)
            if (parent_[run] == run && is_small(run)) queue.push_back(key(run));
        if (queue.empty()) return;
        list_borders();
        const auto ids_before = ids_;
        shared_.assign(ends_.size(), 0);
        std::make_heap(queue.begin(), queue.end(), std::greater<>());
        while (!queue.empty()) {
            std::pop_heap(queue.begin(), queue.end(), std::greater<>());
            const std::uint64_t smallest = queue.back();
            queue.pop_back();
            Index part = static_cast<Index>(smallest);
            if (parent_[part] != part || key(part) != smallest) continue;  // it was absorbed, or has grown
            part = absorb_part(part);
            if (key(part) == smallest || !is_small(part)) continue;
            queue.push_back(key(part));
            std::push_heap(queue.begin(), queue.end(), std::greater<>());
        }
        for_each_run([&](Index run, std::size_t at, Index length) {
            const std::uint8_t id = ids_[part_of(run)];
            if (id != ids_before[run]) std::memset(out_ + at, id, length);
        });
    }

private:
    using Index = std::uint32_t;
    static constexpr Index NONE = ~Index{0};
    static constexpr std::uint8_t IGNORED = 255;  // belongs to no class: neither absorbed nor grown

    // A border of a small part, in a list.
    struct Border {
        Index neighbour;  // a run of it
        Index length;     // sides of pixels
        Index next;
    };

    Index size() const { return static_cast<Index>(ends_.size()); }
    bool is_small(Index part) const { return area_[part] < min_pixels_ && ids_[part] != IGNORED && !is_kept_[part]; }
    std::uint64_t key(Index part) const { return std::uint64_t{area_[part]} << 32 | part; }

    void add_row(const std::uint8_t* row, std::uint8_t* out) {
        rows_.push_back(size());
        for (const std::uint8_t *from = row, *const end = row + width_; from < end;) {
            ids_.push_back(*from);
            from = run_end(from, end, *from);
            ends_.push_back(static_cast<Index>(from - row));
        }
        std::memcpy(out, row, static_cast<std::size_t>(width_));
    }

    // Calls visit(run, first pixel, length) for each run.
    template <class Visit>
    void for_each_run(const Visit& visit) const {
        for (std::size_t y = 0; y + 1 < rows_.size(); ++y) {
            Index start = 0;
            for (Index run = rows_[y]; run < rows_[y + 1]; start = ends_[run++])
                visit(run, y * static_cast<std::size_t>(width_) + start, ends_[run] - start);
        }
    }

    // Calls visit(above, below, length) for each two runs of adjacent rows that touch.
    template <class Visit>
    void for_each_contact(const Visit& visit) const {
        for (std::size_t y = 0; y + 2 < rows_.size(); ++y) {
            Index above = rows_[y], below = rows_[y + 1], start = 0;
            while (below < rows_[y + 2]) {
                const Index end = std::min(ends_[above], ends_[below]);
                visit(above, below, end - start);
                start = end;
                const bool both = ends_[above] == ends_[below];
                if (both || ends_[below] > end) ++above;
                if (both || ends_[below] == end) ++below;
            }
        }
    }

    Index part_of(Index run) {
        while (parent_[run] != run) run = parent_[run] = parent_[parent_[run]];
        return run;
    }

    // Returns the first run of both.
    Index join(Index one, Index other) {
        one = part_of(one), other = part_of(other);
        if (one > other) std::swap(one, other);
        return parent_[other] = one;
    }

    // Mark the largest part of each class, of equals the first. One that is large enough stays in any case.
    void keep_largest(const std::uint8_t* classes, std::size_t n_classes) {
        is_kept_.assign(ends_.size(), 0);
        if (n_classes == 0) return;
        std::array<Index, 256> largest;
        largest.fill(NONE);
        for (Index run = 0; run < size(); ++run) {
            Index& part = largest[ids_[run]];
            if (parent_[run] == run && (part == NONE || area_[run] > area_[part])) part = run;
        }
        for (std::size_t i = 0; i < n_classes; ++i)
            if (largest[classes[i]] != NONE) is_kept_[largest[classes[i]]] = 1;
    }

    void list_borders() {
        first_border_.assign(ends_.size(), NONE);
        last_border_.assign(ends_.size(), NONE);
        const auto meet = [&](Index one, Index other, Index length) {
            if (ids_[one] == ids_[other] || ids_[one] == IGNORED || ids_[other] == IGNORED) return;
            for (int side = 0; side < 2; ++side, std::swap(one, other)) {
                const Index part = part_of(one);
                if (is_small(part)) add_border(part, {other, length, NONE});
            }
        };
        for_each_contact(meet);
        for_each_run([&](Index run, std::size_t, Index) {
            if (ends_[run] < static_cast<Index>(width_)) meet(run, run + 1, 1);
        });
    }

    void add_border(Index part, Border border) {
        const Index at = static_cast<Index>(borders_.size());
        borders_.push_back(border);
        append_borders(part, at, at);
    }

    void append_borders(Index part, Index first, Index last) {
        if (first == NONE) return;
        (first_border_[part] == NONE ? first_border_[part] : borders_[last_border_[part]].next) = first;
        last_border_[part] = last;
    }

    // Give a part the class of the neighbour that it shares most with, and join it with its neighbours of that class.
    // Returns the part that it belongs to then.
    Index absorb_part(Index part) {
        neighbours_.clear();
        for (Index at = first_border_[part]; at != NONE; at = borders_[at].next) {
            const Index neighbour = part_of(borders_[at].neighbour);
            if (neighbour == part) continue;
            if (shared_[neighbour] == 0) neighbours_.push_back(neighbour);
            shared_[neighbour] += borders_[at].length;
        }
        if (neighbours_.empty()) return part;
        const Index closest = *std::max_element(neighbours_.begin(), neighbours_.end(), [&](Index one, Index other) {
            return shared_[one] != shared_[other] ? shared_[one] < shared_[other] : ids_[one] > ids_[other];
        });
        const std::uint8_t id = ids_[closest];
        for (const Index neighbour : neighbours_) {
            shared_[neighbour] = 0;
            if (ids_[neighbour] != id) continue;
            const Index both = join(part, neighbour), joined = both == part ? neighbour : part;
            area_[both] += area_[joined];
            is_kept_[both] |= is_kept_[joined];
            append_borders(both, first_border_[joined], last_border_[joined]);
            part = both;
        }
        ids_[part] = id;
        return part;
    }

    long width_;
    std::uint8_t* out_;
    std::uint64_t min_pixels_ = 0;
    std::vector<Index> rows_;          // [height + 1], the first run of each row
    std::vector<Index> ends_;          // [runs], the column after each run
    std::vector<std::uint8_t> ids_;    // [runs], of a part at its first run
    std::vector<Index> parent_;        // [runs]
    std::vector<Index> area_;          // [runs], at the first run of each part
    std::vector<std::uint8_t> is_kept_;  // [runs], at the first run of each part: 1 if it is never absorbed
    std::vector<Border> borders_;
    std::vector<Index> first_border_, last_border_;  // [runs], at the first run of each small part
    std::vector<Index> neighbours_;    // of the part that is being absorbed
    std::vector<Index> shared_;        // [runs], the length of its border with each; 0 for others
};

}  // namespace multisa
