// Sums of a row's softmax in float64, once for every instruction set. Included by kernels_loops.h.
//
// Isa gives D, a vector of doubles that the compiler's operators work on, and its fma.

namespace nanogpt {
namespace {

using D = Isa::D;
constexpr int kDoubles = sizeof(D) / sizeof(double);
typedef int64_t Bits __attribute__((vector_size(sizeof(D))));

inline D spread(double x) { return D{} + x; }

inline D load_doubles(const double* from) {
  D out;
  memcpy(&out, from, sizeof out);
  return out;
}

// e^x to about one unit in the last place for x in -708 .. 0: 2^n times the Taylor series of the
// rest, which is at most log(2) / 2.
inline D exp_of(D x) {
  const D shift = spread(0x1.8p52);  // in whose last bits a sum holds its whole part
  const D shifted = Isa::fma(x, spread(0x1.71547652b82fep0), shift);
  const D n = shifted - shift;
  D r = Isa::fma(n, spread(-0x1.62e42fefa3800p-1), x);
  r = Isa::fma(n, spread(-0x1.ef35793c76730p-45), r);
  // By pairs (Estrin): half as long a chain as Horner's, which is what would be waited for.
  const D r2 = r * r, r4 = r2 * r2;
  const D p01 = r + spread(1.0);
  const D p23 = Isa::fma(r, spread(1.0 / 6.0), spread(0.5));
  const D p45 = Isa::fma(r, spread(1.0 / 120.0), spread(1.0 / 24.0));
  const D p67 = Isa::fma(r, spread(1.0 / 5040.0), spread(1.0 / 720.0));
  const D p89 = Isa::fma(r, spread(1.0 / 362880.0), spread(1.0 / 40320.0));
  const D p1011 = Isa::fma(r, spread(1.0 / 39916800.0), spread(1.0 / 3628800.0));
  const D low = Isa::fma(r2, p23, p01), middle = Isa::fma(r2, p67, p45);
  const D high = Isa::fma(r4, spread(1.0 / 479001600.0), Isa::fma(r2, p1011, p89));
  const D p = Isa::fma(r4, Isa::fma(r4, high, middle), low);
  return (D)((Bits)p + ((Bits)shifted << 52));
}

// Adds exp(beta z), and its products with z and z^2, of kDoubles numbers z <= 0. What is too small
// for a double counts nothing, -inf too.
inline void add_weights(D z, D beta, D* sums) {
  const D lowest = spread(-708.0);
  const D x = z * beta;
  const Bits counts = x >= lowest;
  z = (D)((Bits)z & counts);
  D weights = exp_of((D)((Bits)x & counts));
  weights = (D)((Bits)weights & counts);
  sums[0] += weights;
  weights *= z;
  sums[1] += weights;
  sums[2] = Isa::fma(weights, z, sums[2]);
}

void softmax_sums(const double* z, int64_t n, const double* betas, int count, double* out) {
  const int64_t whole = n / kDoubles * kDoubles;
  D rest = spread(-__builtin_inf());
  memcpy(&rest, z + whole, static_cast<size_t>(n - whole) * sizeof(double));
  for (int k = 0; k < count; ++k) {
    const D beta = spread(betas[k]);
    D sums[3] = {};
    for (int64_t i = 0; i < whole; i += kDoubles) add_weights(load_doubles(z + i), beta, sums);
    if (whole < n) add_weights(rest, beta, sums);
    for (int j = 0; j < 3; ++j) {
      double total = 0.0;
      for (int i = 0; i < kDoubles; ++i) total += sums[j][i];
      out[3 * k + j] = total;
    }
  }
}

}  // namespace
}  // namespace nanogpt
