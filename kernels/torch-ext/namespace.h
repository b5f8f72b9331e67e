// Where the operators are. A kernel of the Hub has a namespace of its own in every build, so that several versions fit into one process:
// kernel-builder names it; compiled by hf_fff for its own use it is torch.ops.hf_fff.
#pragma once

#ifndef HF_FFF_NAMESPACE
#ifdef TORCH_EXTENSION_NAME
#define HF_FFF_NAMESPACE TORCH_EXTENSION_NAME
#else
#define HF_FFF_NAMESPACE hf_fff
#endif
#endif

// Macros that paste or quote a name must be given what HF_FFF_NAMESPACE stands for.
#define HF_FFF_QUOTED_(NAME) #NAME
#define HF_FFF_QUOTED(NAME) HF_FFF_QUOTED_(NAME)
#define HF_FFF_OPERATOR(NAME) HF_FFF_QUOTED(HF_FFF_NAMESPACE) "::" NAME  // "hf_fff::fff", for torch_call_dispatcher
#define HF_FFF_IMPLEMENTS_(SPACE, KEY, M) STABLE_TORCH_LIBRARY_IMPL(SPACE, KEY, M)
#define HF_FFF_IMPLEMENTS(KEY, M) HF_FFF_IMPLEMENTS_(HF_FFF_NAMESPACE, KEY, M)
