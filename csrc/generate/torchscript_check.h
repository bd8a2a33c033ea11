// Whether the program inside an archive is one that nanogpt's exporter could have written.
#pragma once

#include <string>

#include "engine/model_file.h"

namespace nanogpt {

// An archive is a program, which libtorch compiles and runs; a manifest inside it proves nothing of
// who wrote it. So what libtorch would read is looked at before libtorch is there:
//   - the archive has the records that an export has, and no others;
//   - its code is made of the words and texts of exports alone, among them the names of some forty
//     tensor operators. No operator that reads or writes files, loads code or calls Python can be
//     named, and there is no word for a loop;
//   - the pickle that lays out its tensors is, byte for byte, the one that belongs to the
//     configuration and the index of the file: each tensor dense, and within its own record.
// The words, not the order in which they stand: within these operators a foreign archive may
// compute whatever it likes.
//
// Gives what is foreign in the archive, as the end of a sentence ("it …"), or "" where nothing is.
std::string foreign_program(const ModelFile& file, const std::string& path);

}  // namespace nanogpt
