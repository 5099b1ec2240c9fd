// The float32 kernel as a program, for CPUs that are emulated: FOLDER OUT_FEATURES IN_FEATURES TOKENS

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "kernels.cpp"

static std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

int main(int, char** given) {
  std::string folder = given[1];
  std::vector<char> values = read(folder + "/values"), columns = read(folder + "/columns");
  std::vector<char> rows = read(folder + "/rows"), counts = read(folder + "/counts");
  std::vector<char> starts = read(folder + "/starts"), bias = read(folder + "/bias"), inputs = read(folder + "/inputs");
  Weights weights{(uint32_t*)values.data(), (uint8_t*)columns.data(), (uint8_t*)rows.data(),
                  (uint8_t*)counts.data(),  (int64_t*)starts.data(),  (float*)bias.data(),
                  nullptr,                  nullptr,                  std::stol(given[2]),
                  std::stol(given[3])};
  int64_t tokens = std::stol(given[4]);
  std::vector<float> outputs(tokens * weights.out_features);
  int done = sparsehooks_float32_float32(&weights, inputs.data(), outputs.data(), tokens, 1);
  std::ofstream(folder + "/outputs", std::ios::binary).write((char*)outputs.data(), 4 * outputs.size());
  return !done;
}
