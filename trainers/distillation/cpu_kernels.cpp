// What training on a CPU spends its time on besides matrix products, each in one pass over its tensors, in float32
// whatever their type. Called by cpu_kernels.py.
//
// 1. The recurrent heads of one layer between input and output projection: causal convolution, recurrence, skip and
// gate,
//    forward and backward. A task is one head of one row; its state stays in the cache, so a token costs one pass over
//    N x P numbers instead of many over [Q, Q] matrices of the chunked form. The backward pass computes the states
//    anew and keeps those of one row and head. projected [B, T, W]: z (H P), x (H P), B (H N), C (H N), A_log (H) side
//    by side. Channels of a head: x, B, C.
// 2. Forward KL divergence of two rows of logits, and its gradient.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Sizes {
  int64_t batch, tokens, heads, head_dim, state, taps;
};

struct bfloat16 {
  uint16_t bits;
};

inline float load(float value) { return value; }
inline float load(bfloat16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline void store(float* place, float value) { *place = value; }
inline void store(bfloat16* place, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  // To nearest even; a NaN stays one.
  place->bits = value != value ? uint16_t((bits >> 16) | 64) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// e^value to 2 units in the last place, in steps that compilers turn into vector instructions, which a call is not.
inline float exponential(float value) {
  value = value < -87.0f ? -87.0f : value > 88.0f ? 88.0f : value;
  const float power = std::floor(value * 1.44269504f + 0.5f);
  const float rest = (value - power * 0.693359375f) + power * 2.12194440e-4f;  // ln 2 in two parts
  // Taylor's series up to the sixth power: |rest| <= ln 2 / 2.
  float sum = 1.0f / 720;
  sum = sum * rest + 1.0f / 120;
  sum = sum * rest + 1.0f / 24;
  sum = sum * rest + 1.0f / 6;
  sum = (sum * rest + 0.5f) * rest * rest + rest + 1.0f;
  const int32_t bits = (int32_t(power) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return sum * scale;
}
inline float sigmoid(float value) { return 1.0f / (1.0f + exponential(-value)); }
// exp(-softplus(A_log))
inline float decay_of(float A_log) { return sigmoid(-A_log); }

// One head of one row: where its numbers stand, and what the passes share. SIZE is the head dim where the compiler may
// know it, and 0 elsewhere.
template <typename T, int64_t SIZE>
struct Head {
  Sizes s;
  const T* row;        // projected[b]
  const int32_t* seq;  // documents of the row, or null
  int64_t width, z, x, B, C, A, channels;
  std::vector<float> weight;  // [taps, channels], the last tap is the token itself

  Head(const Sizes& sizes, const T* projected, const float* conv, const int32_t* seq_idx, int64_t b, int64_t h)
      : s(sizes) {
    int64_t inner = s.heads * s.head_dim, states = s.heads * s.state;
    width = 2 * inner + 2 * states + s.heads;
    row = projected + b * s.tokens * width;
    seq = seq_idx ? seq_idx + b * s.tokens : nullptr;
    z = h * s.head_dim, x = inner + h * s.head_dim;
    B = 2 * inner + h * s.state, C = B + states, A = 2 * inner + 2 * states + h;
    channels = s.head_dim + 2 * s.state;
    weight.resize(s.taps * channels);
    for (int64_t c = 0; c < channels; c++)
      for (int64_t k = 0; k < s.taps; k++) weight[k * channels + c] = conv[channel(h, c) * s.taps + k];
  }
  // Place of a head's channel among the convolution's, [H P | H N | H N].
  int64_t channel(int64_t h, int64_t c) const {
    int64_t inner = s.heads * s.head_dim, states = s.heads * s.state;
    if (c < s.head_dim) return h * s.head_dim + c;
    if (c < s.head_dim + s.state) return inner + h * s.state + c - s.head_dim;
    return inner + states + h * s.state + c - s.head_dim - s.state;
  }
  bool starts(int64_t t) const { return t == 0 || (seq && seq[t] != seq[t - 1]); }
  bool together(int64_t t, int64_t other) const {
    return other >= 0 && other < s.tokens && (!seq || seq[t] == seq[other]);
  }
  // The channels of token t as numbers, into `to`.
  void gather(int64_t t, float* to) const {
    const T* token = row + t * width;
#pragma omp simd
    for (int64_t p = 0; p < s.head_dim; p++) to[p] = load(token[x + p]);
    for (int64_t n = 0; n < s.state; n++) to[s.head_dim + n] = load(token[B + n]);
    for (int64_t n = 0; n < s.state; n++) to[s.head_dim + s.state + n] = load(token[C + n]);
  }
  // Convolution at token t of `raw` [tokens, channels].
  void convolve(const float* raw, int64_t t, float* to) const {
    std::memset(to, 0, channels * sizeof(float));
    for (int64_t back = 0; back < s.taps; back++) {
      if (!together(t, t - back)) continue;
      const float *tap = &weight[(s.taps - 1 - back) * channels], *from = raw + (t - back) * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; c++) to[c] += tap[c] * from[c];
    }
  }
  int64_t size() const { return SIZE ? SIZE : s.head_dim; }
  // state [N, P] after a token with convolved channels `now`; y [P].
  void step(const float* before, float a, const float* now, float* state, float* y) const {
    const int64_t P = size();
    const float *Bs = now + P, *Cs = Bs + s.state;
    for (int64_t p = 0; p < P; p++) y[p] = 0.0f;
    for (int64_t n = 0; n < s.state; n++) {
      const float Bn = Bs[n], Cn = Cs[n];
      const float* old = before + n * P;
      float* fresh = state + n * P;
#pragma omp simd
      for (int64_t p = 0; p < P; p++) {
        const float value = a * old[p] + Bn * now[p];
        fresh[p] = value;
        y[p] += Cn * value;
      }
    }
  }
};

template <typename T, int64_t SIZE>
void forward(const Sizes& s, const T* projected, const float* conv, const float* skip, const int32_t* seq_idx,
             T* out) {
  const int64_t P = SIZE ? SIZE : s.head_dim, channels = P + 2 * s.state;
#pragma omp parallel
  {
    // Memory of a thread, taken once: fresh pages cost more than the numbers written to them.
    std::vector<float> raw(s.tokens * channels), now(channels), state(s.state * P), y(P);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < s.batch * s.heads; task++) {
      const int64_t b = task / s.heads, h = task % s.heads;
      Head<T, SIZE> head(s, projected, conv, seq_idx, b, h);
      std::fill(state.begin(), state.end(), 0.0f);
      for (int64_t t = 0; t < s.tokens; t++) {
        head.gather(t, &raw[t * head.channels]);
        head.convolve(raw.data(), t, now.data());
        const T* token = head.row + t * head.width;
        const float a = head.starts(t) ? 0.0f : decay_of(load(token[head.A]));
        head.step(state.data(), a, now.data(), state.data(), y.data());
        T* to = out + ((b * s.tokens + t) * s.heads + h) * P;
#pragma omp simd
        for (int64_t p = 0; p < P; p++) {
          const float gate = load(token[head.z + p]);
          store(to + p, (y[p] + skip[h] * now[p]) * gate * sigmoid(gate));
        }
      }
    }
  }
}

template <typename T, int64_t SIZE>
void backward(const Sizes& s, const T* projected, const float* conv, const float* skip, const int32_t* seq_idx,
              const T* dout, T* dprojected, float* dconv /* [B, channels of all heads, taps] */,
              float* dskip /* [B, H] */) {
  const int64_t P = SIZE ? SIZE : s.head_dim, N = s.state, channels = P + 2 * N, all = s.heads * channels;
#pragma omp parallel
  {
    // Slot t + 1 of `states` is the state after token t.
    std::vector<float> raw(s.tokens * channels), now(s.tokens * channels), states((s.tokens + 1) * N * P),
        ys(s.tokens * P);
    std::vector<float> decays(s.tokens), dnow(s.tokens * channels), dstate(N * P), dy(P), dweight(s.taps * channels);
    std::vector<float> draw(channels);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < s.batch * s.heads; task++) {
      const int64_t b = task / s.heads, h = task % s.heads;
      Head<T, SIZE> head(s, projected, conv, seq_idx, b, h);
      std::fill(dstate.begin(), dstate.end(), 0.0f);
      std::fill(dweight.begin(), dweight.end(), 0.0f);
      for (int64_t t = 0; t < s.tokens; t++) {
        head.gather(t, &raw[t * channels]);
        head.convolve(raw.data(), t, &now[t * channels]);
        decays[t] = head.starts(t) ? 0.0f : decay_of(load(head.row[t * head.width + head.A]));
        head.step(&states[t * N * P], decays[t], &now[t * channels], &states[(t + 1) * N * P], &ys[t * P]);
      }
      float dD = 0.0f;
      for (int64_t t = s.tokens - 1; t >= 0; t--) {
        const T *token = head.row + t * head.width, *incoming = dout + ((b * s.tokens + t) * s.heads + h) * P;
        T* to = dprojected + (b * s.tokens + t) * head.width;
        const float *x = &now[t * channels], *Bs = x + P, *Cs = Bs + N, *y = &ys[t * P];
        float *dx = &dnow[t * channels], *dB = dx + P, *dC = dB + N, share = 0.0f;
#pragma omp simd reduction(+ : share)
        for (int64_t p = 0; p < P; p++) {
          const float gate = load(token[head.z + p]), open = sigmoid(gate), grad = load(incoming[p]);
          dy[p] = grad * gate * open;
          dx[p] = skip[h] * dy[p];
          share += dy[p] * x[p];
          store(to + head.z + p, grad * (y[p] + skip[h] * x[p]) * open * (1.0f + gate * (1.0f - open)));
        }
        dD += share;
        const float *after = &states[(t + 1) * N * P], *before = &states[t * N * P];
        float da = 0.0f;
        for (int64_t n = 0; n < N; n++) {
          float *ds = &dstate[n * P], ofB = 0.0f, ofC = 0.0f, ofa = 0.0f;
          const float *s1 = after + n * P, *s0 = before + n * P, Bn = Bs[n], Cn = Cs[n], a = decays[t];
#pragma omp simd reduction(+ : ofB, ofC, ofa)
          for (int64_t p = 0; p < P; p++) {
            ofC += dy[p] * s1[p];
            const float value = ds[p] + Cn * dy[p];
            ofB += value * x[p];
            dx[p] += value * Bn;
            ofa += value * s0[p];
            ds[p] = a * value;
          }
          dB[n] = ofB, dC[n] = ofC, da += ofa;
        }
        // a = sigmoid(-A_log), so da / dA_log = -a (1 - a); at a start a is 0 for good.
        store(to + head.A, -da * decays[t] * (1.0f - decays[t]));
      }
      for (int64_t t = 0; t < s.tokens; t++) {
        std::memset(draw.data(), 0, channels * sizeof(float));
        for (int64_t back = 0; back < s.taps; back++) {
          const int64_t k = s.taps - 1 - back;
          if (head.together(t, t + back))
#pragma omp simd
            for (int64_t c = 0; c < channels; c++)
              draw[c] += head.weight[k * channels + c] * dnow[(t + back) * channels + c];
          if (head.together(t, t - back))
#pragma omp simd
            for (int64_t c = 0; c < channels; c++)
              dweight[k * channels + c] += dnow[t * channels + c] * raw[(t - back) * channels + c];
        }
        T* to = dprojected + (b * s.tokens + t) * head.width;
#pragma omp simd
        for (int64_t p = 0; p < P; p++) store(to + head.x + p, draw[p]);
        for (int64_t n = 0; n < N; n++) store(to + head.B + n, draw[P + n]);
        for (int64_t n = 0; n < N; n++) store(to + head.C + n, draw[P + N + n]);
      }
      for (int64_t c = 0; c < channels; c++)
        for (int64_t k = 0; k < s.taps; k++)
          dconv[(b * all + head.channel(h, c)) * s.taps + k] = dweight[k * channels + c];
      dskip[b * s.heads + h] = dD;
    }
  }
}

// Log of the sum of exponentials of scale * row.
template <typename T>
float log_sum(const T* row, int64_t vocabulary, float scale) {
  float most = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : most)
  for (int64_t v = 0; v < vocabulary; v++) most = std::max(most, scale * load(row[v]));
#pragma omp simd reduction(+ : sum)
  for (int64_t v = 0; v < vocabulary; v++) sum += exponential(scale * load(row[v]) - most);
  return std::log(sum) + most;
}

// KL(teacher || student) of each row of logits [rows, vocabulary]; the student's are replaced by weight times
// gradient.
template <typename T>
void forward_kl(int64_t rows, int64_t vocabulary, float scale, T* student, const T* teacher, const float* weight,
                float* loss) {
#pragma omp parallel for
  for (int64_t row = 0; row < rows; row++) {
    T* ours = student + row * vocabulary;
    const T* theirs = teacher + row * vocabulary;
    float sum = 0.0f;
    const float ours_log = log_sum(ours, vocabulary, scale), theirs_log = log_sum(theirs, vocabulary, scale);
    const float factor = weight[row] * scale;
#pragma omp simd reduction(+ : sum)
    for (int64_t v = 0; v < vocabulary; v++) {
      const float log_q = scale * load(ours[v]) - ours_log, log_p = scale * load(theirs[v]) - theirs_log;
      const float p = exponential(log_p);
      sum += p * (log_p - log_q);
      store(ours + v, factor * (exponential(log_q) - p));
    }
    loss[row] = sum;
  }
}

}  // namespace

#define ENTRANCES(NAME, T)                                                                                         \
  extern "C" void heads_##NAME(const Sizes* s, const T* projected, const float* conv, const float* skip,           \
                               const int32_t* seq, T* out) {                                                       \
    auto kernel = s->head_dim == 64 ? forward<T, 64> : forward<T, 0>;                                              \
    kernel(*s, projected, conv, skip, seq, out);                                                                   \
  }                                                                                                                \
  extern "C" void heads_gradients_##NAME(const Sizes* s, const T* projected, const float* conv, const float* skip, \
                                         const int32_t* seq, const T* dout, T* dprojected, float* dconv,           \
                                         float* dskip) {                                                           \
    auto kernel = s->head_dim == 64 ? backward<T, 64> : backward<T, 0>;                                            \
    kernel(*s, projected, conv, skip, seq, dout, dprojected, dconv, dskip);                                        \
  }                                                                                                                \
  extern "C" void forward_kl_##NAME(int64_t rows, int64_t vocabulary, float scale, T* student, const T* teacher,   \
                                    const float* weight, float* loss) {                                            \
    forward_kl(rows, vocabulary, scale, student, teacher, weight, loss);                                           \
  }

ENTRANCES(float32, float)
ENTRANCES(bfloat16, bfloat16)
