// Attention over stored rows of every code against softmax in double.
#include "../attention.cpp"

#include "rows.h"

// Decoding one token, verifying three across a split, and a prompt.
struct Batch {
  static constexpr int64_t SIZE = 3, LONGEST = 21, TOKENS = 25, WIDTH = 17;
  int64_t position[SIZE] = {70, 510, 0}, count[SIZE] = {1, 3, 21};
  int64_t gather[SIZE][LONGEST], pages[SIZE][WIDTH];
  std::vector<int64_t> page, line;  // of all lines that are stored, sequence after sequence

  Batch() {
    for (int64_t b = 0, token = 0; b < SIZE; token += count[b++]) {
      for (int64_t i = 0; i < LONGEST; i++) gather[b][i] = token + (i < count[b] ? i : 0);
      for (int64_t i = 0; i < WIDTH; i++) pages[b][i] = (b * WIDTH + i) * 29 % Field::PAGES;
      for (int64_t key = 0; key < position[b] + count[b]; key++)
        page.push_back(pages[b][key / Field::LINES]), line.push_back(key % Field::LINES);
    }
  }
};

// With a latent, the first of two scored fields is averaged as well.
bool check(const char* name, Field key, Field value, Field* second, int64_t window) {
  Batch batch;
  constexpr int64_t GROUP = 3, HEADS = Field::HEADS * GROUP;
  Field* fields[] = {&key, second ? second : &value};
  Floats queries[2];
  for (int f = 0; f < 2; f++) {
    fields[f]->put(random_floats((int64_t)batch.page.size() * Field::HEADS * fields[f]->dim), batch.page, batch.line);
    queries[f] = random_floats(Batch::TOKENS * HEADS * fields[f]->dim);
  }
  Field& averaged = second ? key : value;
  const float factor = 3 / std::sqrt((float)key.dim);
  Floats out((size_t)(Batch::TOKENS * HEADS * averaged.dim));
  std::vector<double> expected((size_t)(Batch::TOKENS * HEADS * averaged.dim));
  for (int64_t b = 0; b < Batch::SIZE; b++)
    for (int head = 0; head < Field::HEADS; head++) {
      std::vector<std::vector<double>> rows[2];
      for (int64_t k = 0; k < batch.position[b] + batch.count[b]; k++)
        for (int f = 0; f < 2; f++) rows[f].push_back(fields[f]->row(batch.pages[b][k / Field::LINES], k % Field::LINES, head));
      for (int64_t i = 0; i < batch.count[b] * GROUP; i++) {
        const int64_t last = batch.position[b] + i / GROUP, at = batch.gather[b][i / GROUP] * HEADS + head * GROUP + i % GROUP;
        std::vector<double> framed[2], mean((size_t)averaged.dim);
        for (int f = 0; f < (second ? 2 : 1); f++) {
          const float* from = &queries[f][(size_t)(at * fields[f]->dim)];
          framed[f] = fields[f]->framed_query({from, from + fields[f]->dim}, head);
        }
        double total = 0;
        for (int64_t k = window && last >= window ? last - window + 1 : 0; k <= last; k++) {
          double score = 0;
          for (int f = 0; f < (second ? 2 : 1); f++)
            for (size_t d = 0; d < framed[f].size(); d++) score += rows[f][(size_t)k][d] * framed[f][d];
          const double weight = std::exp(score * factor);
          const std::vector<double>& row = rows[second ? 0 : 1][(size_t)k];
          for (size_t d = 0; d < row.size(); d++) mean[d] += weight * row[d];
          total += weight;
        }
        for (double& x : mean) x /= total;
        mean = averaged.unframed(mean, head);
        std::copy(mean.begin(), mean.end(), expected.begin() + at * averaged.dim);
      }
    }
  const Attend arguments{{key.stored(), fields[1]->stored()}, averaged.stored(), {queries[0].data(), queries[1].data()},
                         {HEADS * key.dim, HEADS * fields[1]->dim}, {key.dim, fields[1]->dim}, out.data(), &batch.gather[0][0],
                         batch.position, batch.count, &batch.pages[0][0], Batch::SIZE, Batch::LONGEST, Batch::WIDTH,
                         Batch::TOKENS, Field::HEADS, GROUP, window, factor, second ? 2 : 1, second != nullptr, 0};
  JOIN(truekv_, attend, _, ISA)(&arguments);
  printf("%3d ", key.dim);
  return close(name, out, expected);
}

int main() {
  bool good = true;
  for (const Coded& format : FORMATS) good &= check(format.name, Field(format.code, 80, 0), Field(format.code, 80, 0), nullptr, 0);
  for (const int dim : {64, 96, 128, 192, 256})
    for (const int code : {ISA::PLAIN16, ISA::INT8, ISA::LM4})
      good &= check(FORMATS[code].name, Field(code, dim, dim == 128), Field(code, dim, dim == 128), nullptr, dim == 64 ? 50 : 0);
  Field rotary(ISA::PLAIN16, 64, 0);
  for (const int code : {ISA::PLAIN16, ISA::E4M3, ISA::INT8, ISA::LM4, ISA::Q8_0}) good &= check("latent", Field(code, 512, 0), Field(code, 512, 0), &rotary, 0);
  return !good;
}
