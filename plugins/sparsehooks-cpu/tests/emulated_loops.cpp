// The inner loops of files and masks beside plain ones, as a program for CPUs that are emulated. Its exit status is 1
// where they differ, and it says what does.

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "routines.cpp"

static std::mt19937_64 generator(0);
static bool failed = false;

static void expect(bool right, const char* what, int size) {
  if (!right) std::printf("%s is wrong for %d\n", what, size);
  failed |= !right;
}

template <class T>
static std::vector<T> room(int64_t size) {
  return std::vector<T>(size + 1);  // so that there is an address for none
}

static void check_positions(int size, int percent) {
  const int bytes = (size + 7) / 8;
  auto bits = room<uint8_t>(bytes), expected = room<uint8_t>(bytes);
  std::vector<int64_t> positions;
  for (int i = 0; i < size; i++)
    if (int(generator() % 100) < percent) positions.push_back(i), expected[i / 8] |= 1 << i % 8;
  const int64_t count = positions.size();
  auto back = room<int64_t>(count), ones = room<int64_t>(count);
  expect(sparsehooks_pack_bits(positions.data(), count, size, bits.data()) && bits == expected, "pack_bits", size);
  expect(sparsehooks_count(bits.data(), bytes) == count, "count", size);
  expect(sparsehooks_unpack_bits(bits.data(), bytes, back.data(), count) == count, "unpack_bits", size);
  back.resize(count);
  expect(back == positions, "unpack_bits", size);
  for (int low : {0, 1, 7, 8, 9, 15}) {
    auto lowest = room<uint16_t>(count);
    sparsehooks_split_gaps(positions.data(), count, low, lowest.data(), ones.data());
    for (int64_t i = 0, last = -1, one = -1; i < count; last = positions[i++]) {
      const int64_t gap = positions[i] - last - 1;
      one += (gap >> low) + 1;
      const int found = low <= 8 ? ((const uint8_t*)lowest.data())[i] : lowest[i];
      expect(found == (gap & ((1 << low) - 1)) && ones[i] == one, "split_gaps", size);
    }
    sparsehooks_join_gaps(lowest.data(), low <= 8 ? 1 : 2, count, ones.data(), low, back.data());
    expect(back == positions, "join_gaps", size);
  }
}

static void check_planes(int size, int width) {
  const int bytes = (size + 7) / 8;
  auto numbers = room<uint16_t>(size), back = room<uint16_t>(size);
  auto planes = room<uint8_t>(width * bytes), expected = room<uint8_t>(width * bytes);
  for (int i = 0; i < size; i++) {
    numbers[i] = generator() & ((1 << width) - 1);
    for (int bit = 0; bit < width; bit++) expected[bit * bytes + i / 8] |= (numbers[i] >> bit & 1) << i % 8;
  }
  sparsehooks_pack_planes(numbers.data(), 2, size, width, planes.data());
  expect(planes == expected, "pack_planes", size);
  sparsehooks_unpack_planes(planes.data(), width, size, 2, back.data());
  expect(back == numbers, "unpack_planes", size);
}

static void check_scores(int size) {
  auto scores = room<float>(size), inside = room<float>(size), expected = room<float>(size);
  auto mask = room<uint8_t>(size), largest = room<uint8_t>(size);
  const float range[] = {-1, 2, INFINITY}, cut[] = {0, INFINITY};
  int64_t above = 0, found = 0, counted = 0, ties = 3;
  for (int i = 0; i < size; i++) {
    const int kind = generator() % 12;
    const float score = scores[i] = kind == 9 ? NAN : kind == 10 ? -0.0f : kind == 11 ? INFINITY : kind - 4;
    above += score > 2;
    if (score >= -1 && score <= 2) expected[found++] = score;
    largest[i] = score > 0 || (score == 0 && ties-- > 0);
  }
  expect(sparsehooks_between(scores.data(), 4, size, range, inside.data(), &counted) == found, "between", size);
  expect(counted == above && !std::memcmp(inside.data(), expected.data(), 4 * found), "between", size);
  sparsehooks_largest(scores.data(), 4, size, cut, 3, mask.data());
  expect(mask == largest, "largest", size);
}

int main() {
  for (int size : {0, 1, 7, 8, 9, 63, 64, 65, 3839, 3840, 3841, 9001}) {
    for (int percent : {0, 2, 50, 100}) check_positions(size, percent);
    for (int width = 0; width <= 16; width++) check_planes(size, width);
    check_scores(size);
  }
  return failed;
}
