// What a packed layer holds, and where. Shared by all instruction sets. All numbers are little endian.
//
//   header | a Node for each node | rows of weight_in, node after node | pieces of weight_out
//
// A row of weight_in is `padded` columns (hidden, rounded up to 64; the rest is zero). Rows of weight_out are kept in groups of
// `slots` rows that a token adds up together, interleaved column by column, so that one instruction multiplies and adds them
// all: 4 rows of int8, 2 of bf16. A group is the part of a path that ends at some node, so rows near the root are kept more than
// once: twice the bytes, and no shuffling.
//
// The levels that are no multiple of `slots` are at the top. There several trees share a group where they fit, and it is chosen
// by all of their nodes. A piece is 64 columns of a group: 256 bytes. With one tree a group's pieces follow each other, since
// tokens that are sorted by leaf share groups; with more trees the groups' pieces for the same columns do, since then the
// pieces of all groups stay in the second-level cache while all tokens get these columns.
#pragma once
#include <cstdint>

#include "fff.h"

namespace hf_fff {

struct Header {
  char magic[8];
  uint32_t version, rows;
  int64_t hidden, trees, depth, bytes;
  uint64_t content, own;  // checksums: of what follows the header, and of the header before this field
};
static_assert(sizeof(Header) == 64);

// z = (sum of products) * (scale of x) * scale_in + bias; act(z) * scale_out is what a row of weight_out is multiplied by.
struct Node {
  float scale_in, bias, scale_out;
  int32_t row_sum;  // of the integers of weight_in
};
static_assert(sizeof(Node) == 16);

constexpr int64_t piece_columns = 64, piece_bytes = 256;

struct Layout {
  Rows rows;
  int64_t hidden, trees, levels, tree_nodes;
  int64_t padded, parts, row_bytes;
  int64_t slots, top_levels, top_trees;  // levels above the full groups, and how many trees share a top group
  int64_t tops, top_choices;             // top groups that a token uses, and how many there are of each
  int64_t body, body_choices;            // full groups that a token uses in a tree, and how many the tree has
  int64_t groups;                        // all there are
  int64_t nodes_at, in_at, out_at, bytes;
  int64_t part_stride, group_stride;

  Layout(Rows kind, int64_t hidden_size, int64_t n_trees, int64_t depth)
      : rows(kind), hidden(hidden_size), trees(n_trees), levels(depth + 1), tree_nodes((int64_t{2} << depth) - 1) {
    padded = (hidden + piece_columns - 1) / piece_columns * piece_columns;
    parts = padded / piece_columns;
    row_bytes = padded * (rows == Rows::int8 ? 1 : 2);
    slots = rows == Rows::int8 ? 4 : 2;
    top_levels = levels % slots;
    top_trees = top_levels == 0 ? 1 : slots / top_levels;
    tops = top_levels == 0 ? 0 : (trees + top_trees - 1) / top_trees;
    top_choices = top_levels == 0 ? 0 : int64_t{1} << (top_levels - 1) * top_trees;
    body = levels / slots;
    body_choices = 0;
    for (int64_t g = 0; g < body; ++g) body_choices += int64_t{1} << last_level(g);
    groups = tops * top_choices + trees * body_choices;
    nodes_at = sizeof(Header);
    in_at = nodes_at + (trees * tree_nodes * int64_t(sizeof(Node)) + 63) / 64 * 64;
    out_at = in_at + trees * tree_nodes * row_bytes;
    bytes = out_at + groups * parts * piece_bytes;
    part_stride = trees == 1 ? piece_bytes : groups * piece_bytes;
    group_stride = trees == 1 ? parts * piece_bytes : piece_bytes;
  }

  int64_t terms() const { return tops + trees * body; }    // groups that a token uses
  int64_t values() const { return terms() * slots; }       // and rows in them, with those that are not used
  int64_t last_level(int64_t g) const { return top_levels + (g + 1) * slots - 1; }

  // Where the values of a tree's levels are among a token's: those of the top, and those after them.
  int64_t top_value(int64_t tree) const { return tree / top_trees * slots + tree % top_trees * top_levels; }
  int64_t body_value(int64_t tree) const { return (tops + tree * body) * slots; }

  // The group of a top, less what its trees choose, and what a tree adds when it is at `leaf`.
  int64_t top_group(int64_t top) const { return top * top_choices; }
  int64_t top_choice(int64_t tree, int64_t leaf) const {
    const int64_t place = ((leaf + 1) >> (levels - top_levels)) - (int64_t{1} << (top_levels - 1));
    return place << tree % top_trees * (top_levels - 1);
  }
};

}  // namespace hf_fff
