// __shfl_*_sync, __ballot_sync, __any_sync, __all_sync, __activemask, __syncwarp.
//
// As on the hardware, only __syncwarp orders memory between lanes. A value read from a lane outside the mask is
// undefined in CUDA; here it is all ones (NaN).
#pragma once
#include <cstring>
#include <type_traits>

#include "runtime.h"

namespace pynn::sim {

template <class T>
struct Shuffle {
  T value, result;
  unsigned source;
};

template <class T>
T shuffle(const char* name, unsigned mask, T value, unsigned source, Site site) {
  static_assert(std::is_trivially_copyable_v<T>);
  Shuffle<T> mine{value, value, source};
  meet({name, mask, site, &mine}, [](void* const* lanes, unsigned mask) {
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if (!(mask >> lane & 1)) continue;
      auto& reader = *static_cast<Shuffle<T>*>(lanes[lane]);
      if (mask >> reader.source & 1)
        reader.result = static_cast<const Shuffle<T>*>(lanes[reader.source])->value;
      else
        memset(static_cast<void*>(&reader.result), 0xff, sizeof(T));
    }
  });
  return mine.result;
}

struct Vote {
  unsigned predicate, ballot;
};

inline unsigned ballot(const char* name, unsigned mask, bool predicate, Site site) {
  Vote mine{predicate, 0};
  meet({name, mask, site, &mine}, [](void* const* lanes, unsigned mask) {
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < kWarpSize; ++lane)
      if (mask >> lane & 1) ballot |= static_cast<const Vote*>(lanes[lane])->predicate << lane;
    for (unsigned lane = 0; lane < kWarpSize; ++lane)
      if (mask >> lane & 1) static_cast<Vote*>(lanes[lane])->ballot = ballot;
  });
  return mine.ballot;
}

}  // namespace pynn::sim

inline void __syncwarp(unsigned mask = 0xffffffffu, pynn::sim::Site site = pynn::sim::Site::current()) {
  pynn::sim::sync_warp(mask, site);
}

// width splits the warp into segments of 1, 2, 4, ... 32 lanes; a source outside of the lane's segment is the lane
// itself.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, pynn::sim::Site site = pynn::sim::Site::current()) {
  const unsigned lane = pynn::sim::current->lane, segment = lane & ~unsigned(width - 1);
  return pynn::sim::shuffle("__shfl_sync", mask, value, segment | (unsigned(source) & unsigned(width - 1)), site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 pynn::sim::Site site = pynn::sim::Site::current()) {
  const unsigned lane = pynn::sim::current->lane, in_segment = lane & unsigned(width - 1);
  return pynn::sim::shuffle("__shfl_up_sync", mask, value, in_segment >= delta ? lane - delta : lane, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   pynn::sim::Site site = pynn::sim::Site::current()) {
  const unsigned lane = pynn::sim::current->lane, in_segment = lane & unsigned(width - 1);
  return pynn::sim::shuffle("__shfl_down_sync", mask, value, in_segment + delta < unsigned(width) ? lane + delta : lane,
                            site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  pynn::sim::Site site = pynn::sim::Site::current()) {
  // A lane may read from its own segment and those below it.
  const unsigned lane = pynn::sim::current->lane, source = lane ^ unsigned(lanes);
  return pynn::sim::shuffle("__shfl_xor_sync", mask, value, source <= (lane | unsigned(width - 1)) ? source : lane,
                            site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, pynn::sim::Site site = pynn::sim::Site::current()) {
  return pynn::sim::ballot("__ballot_sync", mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, pynn::sim::Site site = pynn::sim::Site::current()) {
  return pynn::sim::ballot("__any_sync", mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, pynn::sim::Site site = pynn::sim::Site::current()) {
  return pynn::sim::ballot("__all_sync", mask, predicate == 0, site) == 0;
}
