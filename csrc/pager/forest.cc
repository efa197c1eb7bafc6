#include "pager/forest.h"

#include <algorithm>
#include <numeric>

namespace flashcore {
namespace {

// Rows as sequences of pages from a root position on. A row that starts inside a prefix borrows the missing top from an
// anchor, a row that reads the same page at that position; borrowed blocks only place the row in the order: segments
// never cover positions before a row's start.
class Sequences {
 public:
  explicit Sequences(const Snapshot& s) : s_(s), spans_(s.num_rows()), root_(s.num_rows()) {
    std::vector<int32_t> by_start;
    for (int64_t r = 0; r < s.num_rows(); ++r) {
      if (s.may_share[r]) by_start.push_back(r);
    }
    std::stable_sort(by_start.begin(), by_start.end(), [&](int a, int b) { return s.begin[a] < s.begin[b]; });
    for (size_t k = 0; k < by_start.size(); ++k) complete(by_start, k);
  }

  int32_t root(int64_t row) const { return root_[row]; }

  // Tokens up to which rows a and b, of the same root, read the same slots, as an absolute position; `less` says
  // whether a sorts before b: by the first differing page, then the shorter, then the index.
  int32_t lcp(int64_t a, int64_t b, bool* less) const {
    const int64_t tokens = s_.page_tokens;
    size_t i = 0, j = 0;
    int64_t block = root_[a] / tokens;
    while (i < spans_[a].size() && j < spans_[b].size()) {
      const Span &x = spans_[a][i], &y = spans_[b][j];
      const int64_t stop = std::min(x.end, y.end);
      const int32_t* first = x.pages + (block - x.begin);
      const int32_t* other = y.pages + (block - y.begin);
      const auto [m, n] = std::mismatch(first, first + (stop - block), other);
      if (m != first + (stop - block)) {
        if (less) *less = *m < *n;
        return std::max<int64_t>((block + (m - first)) * tokens, root_[a]);
      }
      block = stop;
      i += x.end == stop, j += y.end == stop;
    }
    if (less) *less = s_.end[a] != s_.end[b] ? s_.end[a] < s_.end[b] : a < b;
    return std::min(s_.end[a], s_.end[b]);
  }

  bool before(int64_t a, int64_t b) const {
    if (root_[a] != root_[b]) return root_[a] < root_[b];
    bool less;
    lcp(a, b, &less);
    return less;
  }

 private:
  struct Span {
    const int32_t* pages;
    int64_t begin, end;  // blocks
  };

  // by_start[0 .. k) are complete and start no later.
  void complete(const std::vector<int32_t>& by_start, size_t k) {
    const int32_t row = by_start[k], start = s_.begin[row];
    const int64_t first = s_.first_block(row);
    root_[row] = start;
    for (size_t i = 0; i < k && s_.begin[by_start[i]] < start; ++i) {
      const int32_t anchor = by_start[i];
      if (s_.end[anchor] <= start || s_.page(anchor, first) != s_.page(row, first)) continue;
      root_[row] = root_[anchor];
      for (const Span& span : spans_[anchor]) {
        if (span.begin < first) spans_[row].push_back({span.pages, span.begin, std::min(span.end, first)});
      }
      break;
    }
    spans_[row].push_back({s_.row_pages(row), first, first + s_.num_blocks(row)});
  }

  const Snapshot& s_;
  std::vector<std::vector<Span>> spans_;  // by row, consecutive blocks
  std::vector<int32_t> root_;             // by row, first position of the completed sequence
};

// A group of rows order[row_begin .. row_end) that agree up to `depth` and no further.
struct Node {
  int32_t row_begin, row_end, depth;
  int32_t parent = -1;
  int64_t tops = 0;       // segments that would start the reading of this subtree
  int32_t max_start = 0;  // no position before it is read by all rows
  bool kept = false;
};

// Nodes of the tree given by neighbours' LCPs, children before parents.
std::vector<Node> build_nodes(const std::vector<int32_t>& lcps, int64_t num_rows) {
  std::vector<Node> nodes;
  struct Open {
    int32_t row_begin, depth;
    std::vector<int32_t> children;
  };
  std::vector<Open> stack;
  for (int64_t k = 0; k < num_rows; ++k) {
    const int32_t depth = k + 1 < num_rows ? lcps[k] : 0;
    int32_t begin = k, child = -1;
    while (!stack.empty() && stack.back().depth > depth) {
      Open& open = stack.back();
      if (child >= 0) open.children.push_back(child);
      child = nodes.size(), begin = open.row_begin;
      nodes.push_back({open.row_begin, static_cast<int32_t>(k + 1), open.depth});
      for (int32_t c : open.children) nodes[c].parent = child;
      stack.pop_back();
    }
    if (depth == 0) continue;
    if (stack.empty() || stack.back().depth < depth) stack.push_back({begin, depth, {}});
    if (child >= 0) stack.back().children.push_back(child);
  }
  return nodes;
}

// Bottom-up: keep a group if reading it once saves more than its segment and its partial results cost.
void decide(std::vector<Node>& nodes, const Snapshot& s, const std::vector<int32_t>& order, const CostModel& cost) {
  std::vector<int32_t> covered(nodes.size(), 0);  // rows below a node that belong to a child
  for (size_t v = 0; v < nodes.size(); ++v) {
    Node& node = nodes[v];
    const int64_t rows = node.row_end - node.row_begin;
    node.tops += rows - covered[v];  // the others are leaves
    for (int32_t k = node.row_begin; k < node.row_end; ++k)
      node.max_start = std::max(node.max_start, s.begin[order[k]]);
    const int32_t top = std::max(node.parent >= 0 ? nodes[node.parent].depth : 0, node.max_start);
    const int64_t length = node.depth - top;
    node.kept =
        length > 0 && length * (node.tops - 1) * cost.token_cost >= cost.segment_cost + rows * cost.partial_cost;
    if (node.kept) node.tops = 1;
    if (node.parent >= 0) nodes[node.parent].tops += node.tops, covered[node.parent] += rows;
  }
}

std::vector<int32_t> sort_rows(const Snapshot& s, const Sequences& sequences) {
  std::vector<int32_t> order(s.num_rows());
  std::iota(order.begin(), order.end(), 0);
  const auto shared_end =
      std::stable_partition(order.begin(), order.end(), [&](int32_t r) { return s.may_share[r] != 0; });
  std::sort(order.begin(), shared_end, [&](int32_t a, int32_t b) { return sequences.before(a, b); });
  return order;
}

}  // namespace

Forest build_forest(const Snapshot& s, const CostModel& cost) {
  const int64_t num_rows = s.num_rows();
  const Sequences sequences(s);
  Forest forest;
  forest.order = sort_rows(s, sequences);
  forest.appendable = std::all_of(s.begin.begin(), s.begin.end(), [&](int32_t b) { return b == s.begin[0]; });

  std::vector<int32_t> lcps(num_rows, 0);
  for (int64_t k = 0; k + 1 < num_rows; ++k) {
    const int32_t a = forest.order[k], b = forest.order[k + 1];
    if (!s.may_share[a] || !s.may_share[b] || sequences.root(a) != sequences.root(b)) continue;
    lcps[k] = sequences.lcp(a, b, nullptr);
    // A row that is a prefix of its neighbour may diverge with its next token.
    if (lcps[k] >= std::min(s.end[a], s.end[b])) forest.appendable = false;
  }

  std::vector<Node> nodes = build_nodes(lcps, num_rows);
  decide(nodes, s, forest.order, cost);

  // Parents before children: where the reading of each row has got to, and where its first shared segment begins.
  std::vector<int32_t> reached(num_rows, -1), first_shared(num_rows, -1);
  for (auto node = nodes.rbegin(); node != nodes.rend(); ++node) {
    if (!node->kept) continue;
    const int32_t begin = std::max(reached[node->row_begin], node->max_start);
    forest.segments.push_back({node->row_begin, node->row_end, begin, node->depth});
    for (int32_t k = node->row_begin; k < node->row_end; ++k) {
      reached[k] = node->depth;
      if (first_shared[k] < 0) first_shared[k] = begin;
    }
  }
  forest.own.assign(num_rows, -1);
  for (int32_t k = 0; k < num_rows; ++k) {
    const int32_t row = forest.order[k], start = s.begin[row], end = s.end[row];
    if (first_shared[k] > start) forest.segments.push_back({k, k + 1, start, first_shared[k]});
    const int32_t begin = std::max(reached[k], start);
    if (begin < end) forest.segments.push_back({k, k + 1, begin, end});
    if (start == end) forest.appendable = false;  // an empty row that grows joins the order anew
  }
  std::sort(forest.segments.begin(), forest.segments.end(), [](const Segment& a, const Segment& b) {
    return a.row_begin != b.row_begin ? a.row_begin < b.row_begin : a.begin < b.begin;
  });
  for (size_t i = 0; i < forest.segments.size(); ++i) {
    const Segment& seg = forest.segments[i];
    const int32_t row = forest.order[seg.row_begin];
    if (seg.row_end - seg.row_begin == 1 && seg.end == s.end[row]) forest.own[row] = i;
  }
  return forest;
}

}  // namespace flashcore
