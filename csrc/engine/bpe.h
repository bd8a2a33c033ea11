// Byte-level byte-pair encoding with GPT-2's pre-tokenisation.
#pragma once

#include <memory>

#include "engine/json_scanner.h"
#include "engine/tokenizer.h"

namespace nanogpt {

// Reads a tokenizer.json of Hugging Face tokenizers from where `json` stands. Throws InputError
// where it is damaged or asks for what Python's BPETokenizer never writes and would change the ids.
std::unique_ptr<Tokenizer> bpe_tokenizer(JsonScanner& json);

}  // namespace nanogpt
