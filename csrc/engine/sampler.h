// From logits to a token: filters, reward tilt and the counter-based draw.
//
// The order and every formula are those of nanogpt/decoding.py, in float64: repetition penalty,
// temperature, top-k, top-p, min-p, reward tilt, draw. The draw is Gumbel-max over Philox4x32-10
// words with key = seed and counter = (id div 4, position, row, stream).
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace nanogpt {

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

// -log(-log u), u = (w + 0.5) / 2^32, for one id at one place.
double gumbel(uint64_t seed, uint32_t id, uint32_t position, uint32_t row, uint32_t stream);

struct Filters {
  double temperature = 1.0;
  std::optional<int64_t> top_k;
  std::optional<double> top_p;
  std::optional<double> min_p;
  double repetition_penalty = 1.0;
  // Throws UsageError for a value out of range.
  void check() const;
};

// What goes with a tilt, which is added to the log-probabilities that the filters left.
struct Tilting {
  std::optional<int64_t> top_k;  // only so many of the likeliest ids are tilted and drawn from
  bool details = false;          // work out log Z and KL too
};

// p: the probabilities of the ids that the tilt t was added to; q: their probabilities after it.
struct TiltDetails {
  double log_z = 0.0;  // log E_p[exp t]
  double kl = 0.0;     // of q to p, in nats: E_q[t] - log Z
};

// One row's draws. Keeps buffers between calls; nothing is allocated after the first.
class Sampler {
 public:
  // `seed` is not used at temperature 0.
  Sampler(int64_t vocab_size, Filters filters, uint64_t seed, uint32_t row = 0, uint32_t stream = 0,
          Tilting tilting = {});
  // Marks tokens of the text, for the repetition penalty. Throws UsageError for an id outside the
  // vocabulary.
  void see(const int32_t* tokens, size_t count);
  // The id for the token that will stand at `position` of the text. `tilt`, or null: (V) float64
  // added to the log-probabilities that the filters left (beta * reward). Marks the id as seen.
  // Ties go to the lowest id; temperature 0 takes the likeliest (after the tilt). Throws InputError
  // where a logit or a tilt is NaN or +inf, or where nothing is left to choose from.
  int32_t next(const float* logits, uint32_t position, const double* tilt = nullptr);
  // Of the last draw, where they were asked for; zeros where it had no tilt.
  const TiltDetails& details() const { return details_; }

 private:
  struct Candidate {
    double probability;
    int32_t id;
  };

  void keep_top_k(int64_t k);
  void keep_top_p(double p);
  void keep_min_p(double min_p);
  void keep_likeliest(int64_t k);
  void apply_tilt(const double* tilt, uint32_t position);
  double log_sum(const double* tilt, double* mean);
  void add_tilt(const double* tilt, uint32_t position);
  int32_t first_of(double value) const;
  int32_t draw(uint32_t position);
  void widen_list();

  int64_t vocab_size_;
  Filters filters_;
  uint64_t seed_;
  uint32_t row_, stream_;
  Tilting tilting_;
  TiltDetails details_;
  std::vector<uint8_t> seen_;
  std::vector<int32_t> seen_ids_;
  // Log-probabilities up to a constant, in blocks: what is beyond V is -inf. Where `listed_`, only
  // the first `count_` ids of `ids_` are kept, whatever the others hold.
  std::vector<double> values_;
  std::vector<double> block_maxima_;
  double maximum_ = 0.0;
  bool listed_ = false;
  std::vector<int32_t> ids_;
  int64_t count_ = 0;
  std::vector<double> scratch_;
  std::vector<double> weights_;
  std::vector<Candidate> candidates_;
};

// softmax(logits / temperature)[id] in float64: the model's own probability of an id before any
// filter, at its calibration temperature (1 where there is none). Throws UsageError for an id
// outside the vocabulary or a temperature that is not above 0.
double probability_of(const float* logits, int64_t vocab_size, int32_t id, double temperature);

}  // namespace nanogpt
