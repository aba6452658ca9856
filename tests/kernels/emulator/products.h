// Between tensor.cpp and scheduler.cpp: a product that the running fiber has asked for, to be computed when it waits.
#pragma once

#include <functional>

namespace emulator {

void later(std::function<void()> product);

}  // namespace emulator
