// Integers of fixed width. NVRTC brings no standard headers, and kernels include only from here.
#pragma once

using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
