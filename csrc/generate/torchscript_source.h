// The archive run by libtorch, through the plug-in.
#pragma once

#include <memory>
#include <string>

#include "engine/decoder.h"
#include "engine/model_file.h"

namespace nanogpt {

// Finds and loads the plug-in and opens the archive `file` with it; `path` names it in sentences,
// `threads` = 0 leaves torch's choice. Throws UsageError where the archive holds a foreign program
// and `trust` is not given, before anything of torch is loaded, and where there is no plug-in that
// fits; InputError where torch refuses the file.
std::unique_ptr<LogitsSource> open_torchscript(const ModelFile& file, const std::string& path,
                                               int threads, bool trust);

}  // namespace nanogpt
