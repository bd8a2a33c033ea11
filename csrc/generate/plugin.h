/* What the binary and the TorchScript plug-in agree on: C alone, so that the two may carry
   different C++ libraries. The plug-in exports the one function at the end. */
#ifndef NANOGPT_GENERATE_PLUGIN_H
#define NANOGPT_GENERATE_PLUGIN_H

#include <stddef.h>
#include <stdint.h>

#define NANOGPT_PLUGIN_ABI 2
#define NANOGPT_PLUGIN_FILE "nanogpt_torchscript.so"
#define NANOGPT_PLUGIN_SYMBOL "nanogpt_torchscript_plugin"

#ifdef __cplusplus
extern "C" {
#endif

/* Functions that can fail return 0 when they succeed, or write a sentence to `error`, cut to
   `size` bytes with its closing zero, and return another number. */
typedef struct NanogptPlugin {
  uint32_t abi;            /* NANOGPT_PLUGIN_ABI of the plug-in; the first field for ever */
  const char* built_torch; /* version of the torch it was compiled against, as in "2.13.0" */
  /* Version of the torch that was loaded, written to `version`; "unknown" where it has none. */
  void (*loaded_torch)(char* version, size_t size);
  /* Loads an archive of `count` bytes, which may go once it returns, and may run code in it;
     `threads` = 0 leaves torch's own choice. */
  int (*open)(const void* bytes, size_t count, int threads, void** model, char* error, size_t size);
  /* Appends tokens to the context and writes the logits (vocab_size) of the token that follows. */
  int (*append)(void* model, const int32_t* tokens, int64_t count, float* logits,
                int64_t vocab_size, char* error, size_t size);
  /* Forgets the context. */
  int (*reset)(void* model, char* error, size_t size);
  /* Tokens in the context. */
  int64_t (*length)(const void* model);
  void (*close)(void* model);
} NanogptPlugin;

typedef const NanogptPlugin* (*NanogptPluginFunction)(void);

#ifdef __cplusplus
}
#endif

#endif /* NANOGPT_GENERATE_PLUGIN_H */
