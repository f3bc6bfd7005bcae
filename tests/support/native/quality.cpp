// quality.cpp: what the map from words to normals does to *all* words; prints "name value" lines for quality.py
//
// usage    quality [threads [sector_step]]: every sector_step-th of the 4096 values of a word's top 12 bits, 1 = all 2^32 words
// math     z = r sin phi ("sin", even elements) and w = r cos phi ("cos", odd elements) of normal_pair; moments in float64,
//          summed sector by sector; KS and tails from exact counts in bins of 2^-10 that cover [-6, 6)
// work     about 40 s on two cores for all words
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "zo/normal.h"

namespace {

constexpr int kRadii = 1 << 20;
constexpr int kSectors = 1 << 12;
constexpr int kBinsPerUnit = 1024, kReach = 6, kBins = 2 * kReach * kBinsPerUnit;
constexpr double kTails[] = {3.0, 4.0, 4.5, 5.0};  // all of them limits of bins

struct Tally {
  double moment[2][7] = {};
  double product = 0, squares = 0, largest = 0;
  std::vector<uint64_t> bins[2] = {std::vector<uint64_t>(kBins), std::vector<uint64_t>(kBins)};

  void add(const Tally& other) {
    for (int i = 0; i < 2; ++i) {
      for (int k = 0; k < 7; ++k) moment[i][k] += other.moment[i][k];
      for (int b = 0; b < kBins; ++b) bins[i][b] += other.bins[i][b];
    }
    product += other.product;
    squares += other.squares;
    largest = std::max(largest, other.largest);
  }
};

void sweep(uint32_t sector, const std::vector<float>& radius, Tally& total) {
  double moment[2][7] = {}, product = 0, squares = 0;
  for (uint32_t n = 0; n < kRadii; ++n) {
    float sine, cosine;
    zo::normal_angle((sector << 20) | n, sine, cosine);
    const double z[2] = {zo::mul_rn(radius[n], sine), zo::mul_rn(radius[n], cosine)};
    for (int i = 0; i < 2; ++i) {
      double power = 1;
      for (int k = 1; k < 7; ++k) moment[i][k] += (power *= z[i]);
      ++total.bins[i][static_cast<int>((z[i] + kReach) * kBinsPerUnit)];  // the sum is exact in float64
      total.largest = std::max(total.largest, std::fabs(z[i]));
    }
    product += z[0] * z[1];
    squares += z[0] * z[0] * z[1] * z[1];
  }
  for (int i = 0; i < 2; ++i) {
    for (int k = 1; k < 7; ++k) total.moment[i][k] += moment[i][k];
  }
  total.product += product;
  total.squares += squares;
}

double normal_below(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }

}  // namespace

int main(int count, char** arguments) {
  const int workers = count > 1 ? std::atoi(arguments[1]) : 2;
  const int step = count > 2 ? std::atoi(arguments[2]) : 1;

  std::vector<float> radius(kRadii);
  float smallest = 1e9f, largest = 0;
  int broken = 0;  // radius indices where -2 ln u came out as 0, negative or NaN: their root is not a positive number
  for (uint32_t n = 0; n < kRadii; ++n) {
    radius[n] = zo::normal_radius(n);
    broken += !(radius[n] > 0 && std::isfinite(radius[n]));
    smallest = std::min(smallest, radius[n]);
    largest = std::max(largest, radius[n]);
  }

  Tally total;
  std::mutex lock;
  std::vector<std::thread> threads;
  for (int worker = 0; worker < workers; ++worker) {
    threads.emplace_back([&, worker] {
      Tally mine;
      for (int sector = worker * step; sector < kSectors; sector += workers * step) sweep(sector, radius, mine);
      const std::lock_guard<std::mutex> hold(lock);
      total.add(mine);
    });
  }
  for (std::thread& thread : threads) thread.join();

  const double words = static_cast<double>(kRadii) * ((kSectors + step - 1) / step);
  std::printf("words %.0f\nbroken_radii %d\n", words, broken);
  std::printf("smallest_radius %.9g\nlargest_radius %.9g\nlargest_value %.9g\n", smallest, largest, total.largest);
  const char* names[] = {"sin", "cos"};
  for (int i = 0; i < 2; ++i) {
    const double expected[] = {1, 0, 1, 0, 3, 0, 15};
    for (int k = 1; k < 7; ++k) {
      const double moment = total.moment[i][k] / words;
      std::printf("%s_moment_%d %.6e\n", names[i], k, expected[k] > 0 ? moment / expected[k] - 1 : moment);
    }
    double distance = 0;
    uint64_t below = 0;
    for (int b = 0; b <= kBins; ++b) {
      distance = std::max(distance, std::fabs(below / words - normal_below(static_cast<double>(b) / kBinsPerUnit - kReach)));
      if (b < kBins) below += total.bins[i][b];
    }
    std::printf("%s_ks %.6e\n", names[i], distance);
    for (const double tail : kTails) {
      // |z| > tail: bins are closed below, so the negative side also counts -tail itself, one value in 2^32 at most
      uint64_t beyond = 0;
      const int edge = static_cast<int>(tail * kBinsPerUnit);
      for (int b = 0; b < kReach * kBinsPerUnit - edge; ++b) beyond += total.bins[i][b];
      for (int b = kReach * kBinsPerUnit + edge; b < kBins; ++b) beyond += total.bins[i][b];
      std::printf("%s_tail_%.1f %.6e\n", names[i], tail, beyond / words / (2 * normal_below(-tail)) - 1);
    }
  }
  std::printf("product %.6e\nsquares %.6e\n", total.product / words, total.squares / words - 1);
  return 0;
}
