// Cases of the paged cache and of attention over it.
#pragma once
#include "cases_rows.h"

namespace driver {

constexpr int64_t SPLIT = 512;

// Of one layer: heads, a block's tokens, and how the cache keeps numbers.
struct Cached {
    int64_t heads, kv_heads, dim, size;
    Element kept;

    int64_t block_bytes() const {
        const int64_t each = 2 * dim * size * bytes_of(kept);
        return kv_heads * (each + (kept == Element::s8 ? 2 * size * 4 : 0));
    }
    std::string about() const {
        static const char* const names[] = {"f32", "bf16", "f16", "s8"};
        return std::to_string(heads) + "/" + std::to_string(kv_heads) + " heads of " + std::to_string(dim) +
               ", blocks of " + std::to_string(size) + " in " + names[(int)kept];
    }
};
constexpr Cached LAYERS[] = {{4, 2, 64, 16, Element::f32},  {4, 1, 128, 32, Element::bf16},
                             {3, 3, 80, 48, Element::f16},  {8, 2, 64, 32, Element::s8},
                             {2, 2, 256, 16, Element::bf16}, {16, 1, 64, 32, Element::bf16}};

inline bool goes_with(Element element, Element kept) {
    return kept == element || kept == Element::s8 || element == Element::f32;
}

// Writes `rows` keys and values to slots of their own, in no order.
inline Case writing(int kernel, Element element, const Cached& layer, int64_t num_blocks,
                    std::vector<int64_t> slots, Random& random, Values values) {
    const int64_t rows = slots.size(), width = layer.kv_heads * layer.dim;
    Case one(kernel, element, rows, layer.about());
    one.in(0, numbers(element, span(rows, width), random, values));
    one.in(1, numbers(element, span(rows, width), random, values));
    one.in(2, listed(slots));
    one.sizes({layer.kv_heads, layer.dim, layer.size, width + GAP, width + GAP, (int64_t)layer.kept});
    if (layer.kept == Element::s8 && values == Values::edges)  // scales may be NaN with either sign
        one.out(Element::f32, num_blocks * layer.block_bytes() / 4, 0);
    else
        one.out_exact(num_blocks * layer.block_bytes());
    return one;
}

inline std::vector<Case> kv_write(int kernel) {
    std::vector<Case> cases;
    Random random(15);
    for (const Cached& layer : LAYERS)
        for (Element element : FLOATS)
            for (int64_t rows : {0, 1, 17})
                for (Values values : {Values::ordinary, Values::edges, Values::zeros}) {
                    std::vector<int64_t> slots;
                    for (int64_t i = 0; i < rows; i++) slots.push_back((i * 7 + 5) % (3 * layer.size));
                    cases.push_back(writing(kernel, element, layer, 3, slots, random, values));
                }
    return cases;
}

// As attention.h has them.
struct Tile {
    int64_t token, queries, position, begin, end;
    const int32_t* blocks;
    float* partial;
};
struct Merge {
    int64_t token, queries, splits;
    float* partial;
};

struct Sequence {
    int64_t queries, length;
};
struct Batch {
    std::vector<Sequence> sequences;
    int64_t window;
    bool causal, split;  // split: long tiles are cut, and merged
    float softcap, slope;  // slope: of ALiBi, in the first head; 0: there is none
};

// The plan of a batch; what it points to is kept by the case.
class Planner {
   public:
    Planner(Case& one, const Cached& layer, const Batch& batch) : case_(one), layer_(layer), batch_(batch) {}

    Memory plan() {
        int64_t token = 0, block = 0;
        for (const Sequence& sequence : batch_.sequences) {
            std::vector<int32_t> table;
            for (int64_t at = 0; at < sequence.length; at += layer_.size) table.push_back(block++);
            add_sequence(sequence, token, (const int32_t*)case_.keep(listed(table)));
            token += sequence.queries;
        }
        Memory made(16 + tiles_.size() * sizeof(Tile) + merges_.size() * sizeof(Merge));
        const int64_t header[] = {(int64_t)tiles_.size(), (int64_t)merges_.size()};
        char* at = (char*)made.at();
        std::memcpy(at, header, sizeof header);
        std::memcpy(at + sizeof header, tiles_.data(), tiles_.size() * sizeof(Tile));
        if (!merges_.empty())
            std::memcpy(at + sizeof header + tiles_.size() * sizeof(Tile), merges_.data(),
                        merges_.size() * sizeof(Merge));
        return made;
    }

   private:
    void add_sequence(const Sequence& sequence, int64_t token, const int32_t* blocks) {
        const int64_t most = 256 / (layer_.heads / layer_.kv_heads);
        for (int64_t first = 0; first < sequence.queries; first += most) {
            const int64_t queries = std::min(most, sequence.queries - first);
            const int64_t position = sequence.length - sequence.queries + first;
            const int64_t end = batch_.causal ? position + queries : sequence.length;
            const int64_t begin = batch_.window ? std::max<int64_t>(0, position - batch_.window + 1) : 0;
            add_tile({token + first, queries, position, begin, end, blocks, nullptr});
        }
    }
    void add_tile(Tile tile) {
        const int64_t splits = (tile.end - 1) / SPLIT - tile.begin / SPLIT + 1;
        if (!batch_.split || splits == 1) return tiles_.push_back(tile);
        const int64_t rows = tile.queries * (layer_.heads / layer_.kv_heads);
        const int64_t floats = up(rows, 16) * layer_.kv_heads * (layer_.dim + 2);
        float* partial = (float*)case_.keep(Memory(splits * floats * 4));
        merges_.push_back({tile.token, tile.queries, splits, partial});
        for (int64_t split = 0; split < splits; split++) {
            const int64_t border = (tile.begin / SPLIT + split) * SPLIT;
            Tile part = tile;
            part.begin = std::max(tile.begin, border);
            part.end = std::min(tile.end, border + SPLIT);
            part.partial = partial + split * floats;
            tiles_.push_back(part);
        }
    }

    Case& case_;
    const Cached& layer_;
    const Batch& batch_;
    std::vector<Tile> tiles_;
    std::vector<Merge> merges_;
};

// A cache that holds the batch's tokens; what belongs to none is NaN, as it may be.
inline Memory cache_of(Element element, const Cached& layer, const Batch& batch, Random& random) {
    std::vector<int64_t> slots;
    int64_t block = 0;
    for (const Sequence& sequence : batch.sequences) {
        for (int64_t i = 0; i < sequence.length; i++) slots.push_back(block * layer.size + i);
        block += (sequence.length + layer.size - 1) / layer.size;
    }
    Case one = writing((int)Kernel::kv_write, element, layer, block, slots, random, Values::ordinary);
    std::memset(one.outputs[0].memory.at(), 0xff, one.outputs[0].memory.bytes());
    return std::move(outputs_of(one, AVX2, 1)[0]);
}

// A geometric sequence (Press et al. 2022, section 3).
inline Memory slopes_of(int64_t heads, float first) {
    Memory slopes(heads * 4);
    for (int64_t head = 0; head < heads; head++, first /= 2) ((float*)slopes.at())[head] = first;
    return slopes;
}

inline std::vector<Case> attention(int kernel) {
    const Batch batches[] = {
        {{{1, 1}, {1, 17}, {1, 130}}, 0, true, false, 0, 0},
        {{{7, 40}, {1, 600}}, 0, true, true, 0, 0},
        {{{5, 5}, {40, 70}, {1, 33}}, 0, true, false, 0, 0.25f},
        {{{1, 1100}, {3, 700}}, 0, true, true, 0, 0.0625f},
        {{{20, 600}, {1, 64}}, 40, true, true, 30, 0.5f},
        {{{7, 7}, {30, 30}}, 0, false, false, 0, 0.125f},
    };
    std::vector<Case> cases;
    Random random(16);
    for (const Cached& layer : LAYERS)
        for (const Batch& batch : batches)
            for (Element element : FLOATS) {
                if (!goes_with(element, layer.kept)) continue;
                int64_t rows = 0;
                for (const Sequence& sequence : batch.sequences) rows += sequence.queries;
                Case one(kernel, element, rows, layer.about());
                const int64_t width = layer.heads * layer.dim;
                one.in(0, numbers(element, span(rows, width), random));
                one.in(1, cache_of(element, layer, batch, random));
                one.in(2, Planner(one, layer, batch).plan());
                if (batch.slope != 0) one.in(3, slopes_of(layer.heads, batch.slope));
                one.sizes({layer.kv_heads, layer.dim, layer.size, layer.heads, batch.window,
                           batch.causal, width + GAP, width + GAP, (int64_t)layer.kept, 0});
                one.call.f[0] = 1 / std::sqrt((float)layer.dim);
                one.call.f[1] = batch.softcap;
                one.out(element, span(rows, width), 2 * last_place(element), 0.5);
                cases.push_back(std::move(one));
            }
    return cases;
}

}  // namespace driver
