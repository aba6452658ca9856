// Launch configuration of a product that streams W through rings of shared memory; ring.cuh has the design.
#pragma once

namespace lowbit {

struct RingLaunch {
  int device;
  int warpgroups;  // multiplying warpgroups per block, with 64 rows of W each
  int cluster;     // blocks that split k
  int stages;      // of the ring: chunks of 128 bytes per row in flight per block
  bool dependent;  // launched with programmatic dependent launch
};

}  // namespace lowbit
