// Launch configuration of a product that streams W through rings of shared memory; ring.cuh has the design.
#pragma once

#include "declare.cuh"

namespace lowbit {

struct RingLaunch {
  LOWBIT_STRUCT(RingLaunch);
  FIELD(int, device);
  FIELD(int, warpgroups);  // multiplying warpgroups per block, with 64 rows of W each
  FIELD(int, cluster);     // blocks that split k
  FIELD(int, stages);      // of the ring: chunks of 128 bytes per row in flight per block
  FIELD(bool, dependent);  // launched with programmatic dependent launch
};

}  // namespace lowbit
