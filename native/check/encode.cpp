// Storing rows: in every code, framed and as they are, against what double arithmetic reads from the bytes.
#include "rows.h"

// Of all bytes that are stored below: the same on every machine, and those of truekv/formats where pytest runs.
constexpr uint64_t BYTES = 0xdefb2da28db0f57bull;

int main() {
  constexpr int64_t TOKENS = 40;
  bool good = true;
  uint64_t bytes = 14695981039346656037ull;
  for (const Coded& format : FORMATS)
    for (const int dim : {80, 128})
      for (const int order : {0, dim == 80 ? 5 : 1}) {
        Field field(format.code, dim, order);
        const Floats rows = random_floats(TOKENS * Field::HEADS * dim);
        std::vector<int64_t> page, line;
        for (int64_t t = 0; t < TOKENS; t++) page.push_back(t * 7 % Field::PAGES), line.push_back(t * 5 % Field::LINES);
        field.put(rows, page, line);
        double squares = 0, errors = 0;
        for (int64_t t = 0; t < TOKENS; t++)
          for (int head = 0; head < Field::HEADS; head++) {
            const float* from = &rows[(size_t)((t * Field::HEADS + head) * dim)];
            const std::vector<double> stored = field.row(page[(size_t)t], line[(size_t)t], head);
            const std::vector<double> expected = field.framed({from, from + dim}, head);
            for (size_t i = 0; i < expected.size(); i++)
              squares += expected[i] * expected[i], errors += (stored[i] - expected[i]) * (stored[i] - expected[i]);
          }
        const double error = std::sqrt(errors / squares);
        const bool well = error <= format.error;
        printf("store %-10s %3d%s %.1e %s\n", format.name, dim, order ? " framed" : "       ", error, well ? "ok" : "WRONG");
        good = good && well;
        for (const uint8_t byte : field.data) bytes = (bytes ^ byte) * 1099511628211ull;
      }
  printf("bytes 0x%llx %s\n", (unsigned long long)bytes, bytes == BYTES ? "ok" : "WRONG");
  return !good || bytes != BYTES;
}
