// For any processor of the platform.
#include "core.cpp"

// Nobody imports this library; some linkers insist on what an import would call.
NEPHI_API void* PyInit__baseline() { return nullptr; }
