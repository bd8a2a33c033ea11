// The archive run by libtorch, through the plug-in.
#pragma once

#include <memory>
#include <string>

#include "engine/decoder.h"

namespace nanogpt {

// Finds and loads the plug-in and opens the archive with it; `threads` = 0 leaves torch's choice.
// Throws UsageError where there is no plug-in that fits, InputError where torch refuses the file.
std::unique_ptr<LogitsSource> open_torchscript(const std::string& path, const Config& config,
                                               int threads);

}  // namespace nanogpt
