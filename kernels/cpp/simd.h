// Sixteen floats at a time, from any element type. GCC and Clang lower these vectors to whatever the processor has.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

constexpr int kLanes = 16;
constexpr int64_t kPrefetch = 4096;  // bytes ahead of a stream: hides the memory's latency on the machines tried

typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), aligned(1), may_alias));  // as rows of bf16 and int8 may begin
typedef uint32_t Words __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint16_t Shorts __attribute__((vector_size(32), aligned(2), may_alias));
typedef _Float16 Halves __attribute__((vector_size(32), aligned(2), may_alias));

struct BFloat16 {
  uint16_t bits;
};

// How elements of a type are read. One load takes 64 bytes where that is possible: `parts` groups of 16 elements, of
// which group j holds elements j, j + parts, j + 2 * parts, … Taking them apart that way needs shifts and no shuffles.
template <class T>
struct Element;

template <>
struct Element<float> {
  static constexpr int parts = 1;
  static void load(const float* from, Floats* to) { to[0] = *reinterpret_cast<const Floats*>(from); }
  static float get(float x) { return x; }
  static float put(float x) { return x; }
};

template <>
struct Element<BFloat16> {
  static constexpr int parts = 2;
  static void load(const BFloat16* from, Floats* to) {
    Words pair = *reinterpret_cast<const Words*>(from);
    to[0] = reinterpret_cast<Floats>(pair << 16);
    to[1] = reinterpret_cast<Floats>(pair & 0xffff0000u);
  }
  static float get(BFloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
  }
  static BFloat16 put(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // ties to even
    return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest)};
  }
};

template <>
struct Element<_Float16> {
  static constexpr int parts = 1;
  static void load(const _Float16* from, Floats* to) {
    to[0] = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Floats);
  }
  static float get(_Float16 x) { return float(x); }
  static _Float16 put(float x) { return _Float16(x); }
};

template <>
struct Element<int8_t> {
  static constexpr int parts = 4;
  static void load(const int8_t* from, Floats* to) {
    Ints four = *reinterpret_cast<const Ints*>(from);
    to[0] = __builtin_convertvector((four << 24) >> 24, Floats);
    to[1] = __builtin_convertvector((four << 16) >> 24, Floats);
    to[2] = __builtin_convertvector((four << 8) >> 24, Floats);
    to[3] = __builtin_convertvector(four >> 24, Floats);
  }
  static float get(int8_t x) { return float(x); }
};

template <class T>
constexpr int64_t kStep = kLanes* Element<T>::parts;  // elements per load

// As `load`, of the last `count` < kStep elements of a row; the others are zero and are not touched in memory.
template <class T>
inline void load_tail(const T* from, int64_t count, Floats* to) {
  T padded[kStep<T>] = {};
  std::memcpy(padded, from, count * sizeof(T));
  Element<T>::load(padded, to);
}

// Sizes of a row in floats once it is `arranged`.
template <class T>
inline int64_t padded(int64_t count) {
  return (count + kStep<T> - 1) / kStep<T> * kStep<T>;
}

// Write `count` numbers as floats in the order in which rows of type T are loaded, times `scale`, padded with zeros.
template <class T, class X>
inline void arrange(const X* from, int64_t count, float scale, float* to) {
  constexpr int parts = Element<T>::parts;
  int64_t start = 0;
  if constexpr (std::is_same_v<T, X>)
    for (Floats group[parts]; start + kStep<T> <= count; start += kStep<T>) {
      Element<T>::load(from + start, group);
      for (int part = 0; part < parts; part++)
        *reinterpret_cast<Floats*>(to + start + part * kLanes) = group[part] * scale;
    }
  for (; start < count; start += kStep<T>)
    for (int part = 0; part < parts; part++)
      for (int lane = 0; lane < kLanes; lane++) {
        int64_t i = start + lane * parts + part;
        to[start + part * kLanes + lane] = i < count ? Element<X>::get(from[i]) * scale : 0.0f;
      }
}

// Where element i of a row is once it is arranged.
template <class T>
inline int64_t arranged_index(int64_t i) {
  constexpr int parts = Element<T>::parts;
  int64_t within = i % kStep<T>;
  return i - within + within % parts * kLanes + within / parts;
}

// Sixteen elements in their own order.
inline Floats widen(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline Floats widen(const _Float16* from) {
  return __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Floats);
}
inline Floats widen(const BFloat16* from) {
  return reinterpret_cast<Floats>(__builtin_convertvector(*reinterpret_cast<const Shorts*>(from), Words) << 16);
}
inline void narrow(Floats x, float* to) { *reinterpret_cast<Floats*>(to) = x; }
inline void narrow(Floats x, _Float16* to) { *reinterpret_cast<Halves*>(to) = __builtin_convertvector(x, Halves); }
inline void narrow(Floats x, BFloat16* to) {
  Words bits = reinterpret_cast<Words>(x), nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  nearest = (bits & 0x7fffffffu) > 0x7f800000u ? Words{} + 0x7fc0u : nearest;
  *reinterpret_cast<Shorts*>(to) = __builtin_convertvector(nearest, Shorts);
}

inline float sum(Floats x) {  // in a fixed order, so that equal inputs give equal bits wherever this is inlined
  auto eight = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
               __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  auto four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  auto two = __builtin_shufflevector(four, four, 0, 1) + __builtin_shufflevector(four, four, 2, 3);
  return two[0] + two[1];
}

// e^x for x <= 0, to 2 units in the last place; 0 below -87, NaN for NaN. e^x = 2^n e^r with |r| <= ln(2) / 2.
inline Floats exp_negative(Floats x) {
  const Floats clipped = x < -88.0f ? Floats{} - 88.0f : x;
  const Ints whole = __builtin_convertvector(clipped * 1.44269504f - 0.5f, Ints);  // rounds, as x <= 0
  const Floats n = __builtin_convertvector(whole, Floats);
  const Floats r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats series = r * (1.0f / 5040) + (1.0f / 720);
  series = series * r + (1.0f / 120);
  series = series * r + (1.0f / 24);
  series = series * r + (1.0f / 6);
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const Words power = reinterpret_cast<Words>(series) + (reinterpret_cast<Words>(whole) << 23);
  return reinterpret_cast<Floats>(power & ~reinterpret_cast<Words>(x <= -87.0f));
}

// x / (1 + e^-x), from an exponential that cannot overflow.
inline Floats silu(Floats x) {
  Floats e = exp_negative(x < 0.0f ? x : -x);
  return x * (x < 0.0f ? e : Floats{} + 1.0f) / (e + 1.0f);
}
