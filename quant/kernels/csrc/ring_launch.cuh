// How a product that reads W through rings of shared memory is launched: ring.cuh says what such a product is.
#pragma once

namespace lowbit {

struct RingLaunch {
  int device;
  int warpgroups;  // of a block that multiply: each has 64 rows of W
  int cluster;     // blocks that share k
  int stages;      // of the ring: chunks of 128 bytes a row that a block has asked for at most
  bool dependent;  // launched with programmatic dependent launch
};

}  // namespace lowbit
