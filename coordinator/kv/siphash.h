// SipHash-2-4 over 64-bit words: a keyed hash, so that a client who does not
// know the key cannot choose prompts that land in one bucket. Equality is never
// concluded from it.
//
// Source: Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012.
#ifndef LOCKSTEP_COORDINATOR_KV_SIPHASH_H_
#define LOCKSTEP_COORDINATOR_KV_SIPHASH_H_

#include <bit>
#include <cstdint>

namespace lockstep {

class SipHash {
 public:
  SipHash(uint64_t key0, uint64_t key1)
      : v0_(key0 ^ 0x736f6d6570736575u),
        v1_(key1 ^ 0x646f72616e646f6du),
        v2_(key0 ^ 0x6c7967656e657261u),
        v3_(key1 ^ 0x7465646279746573u) {}

  void Add(uint64_t word) {
    v3_ ^= word;
    Round();
    Round();
    v0_ ^= word;
    ++words_;
  }

  // Call once, last.
  uint64_t Finish() {
    Add(words_ << 59);  // the length in bytes, modulo 256, in the top byte
    v2_ ^= 0xff;
    for (int i = 0; i < 4; ++i) Round();
    return v0_ ^ v1_ ^ v2_ ^ v3_;
  }

 private:
  void Round() {
    v0_ += v1_;
    v1_ = std::rotl(v1_, 13) ^ v0_;
    v0_ = std::rotl(v0_, 32);
    v2_ += v3_;
    v3_ = std::rotl(v3_, 16) ^ v2_;
    v0_ += v3_;
    v3_ = std::rotl(v3_, 21) ^ v0_;
    v2_ += v1_;
    v1_ = std::rotl(v1_, 17) ^ v2_;
    v2_ = std::rotl(v2_, 32);
  }

  uint64_t v0_, v1_, v2_, v3_;
  uint64_t words_ = 0;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_KV_SIPHASH_H_
