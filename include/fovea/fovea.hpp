// SPDX-License-Identifier: Apache-2.0
// Everything a caller calls: the front doors and all mechanisms. A map of the library, floor by floor; a file includes only its
// own floor and lower ones:
//   attention.hpp    front door 1: exact softmax attention
//   cascade.hpp      the same over prefixes that several requests share
//   mla.hpp          multi-head latent attention (DeepSeek, Kimi): expanded and absorbed
//   recurrent.hpp    front door 2: linear attention, gated and delta rules, state spaces
//   sparse.hpp       front door 3: exact attention over lists of keys; its selectors and patterns are mechanisms
//   onnx.hpp, onnx_recurrent.hpp   the ONNX operators over plain pointers (not included here)
//   call/            the path of every call; variant.hpp: scores, masks, normalisers of your own
//   modules/         a layer around a mechanism: projections, norms, cache; weights as views (not included here)
//   cache/           containers that own KV memory (not included here: an engine picks one)
//   mechanisms/      one file each: a choice of policies on an engine
//   engine/          the tile engine, the chunk engine, their plans and concepts; parts/ holds the standard policies, RoPE
//   simd/            vectors, elementary functions, packing, micro-kernels; one copy per instruction set
//   core/            views, options, status, workspace, executor: plain data, the same in every translation unit
//   reference/       naive double loops, one file per mechanism; knows core only
//   adapters/        executors over OpenMP, oneTBB, Eigen and std::thread; views from Eigen and std::mdspan (not included here)
#pragma once
#include "attention.hpp"
#include "cascade.hpp"
#include "engine/parts/block_mask.hpp"
#include "engine/parts/pattern_masks.hpp"
#include "engine/parts/rope.hpp"
#include "mechanisms/adamas.hpp"
#include "mechanisms/bigbird.hpp"
#include "mechanisms/block_local.hpp"
#include "mechanisms/differential.hpp"
#include "mechanisms/dsa.hpp"
#include "mechanisms/elu.hpp"
#include "mechanisms/entmax.hpp"
#include "mechanisms/flex_prefill.hpp"
#include "mechanisms/gated.hpp"
#include "mechanisms/head_mixtures.hpp"
#include "mechanisms/hydra.hpp"
#include "mechanisms/kv_bias.hpp"
#include "mechanisms/longformer.hpp"
#include "mechanisms/moba.hpp"
#include "mechanisms/mosa.hpp"
#include "mechanisms/multi_token.hpp"
#include "mechanisms/nsa.hpp"
#include "mechanisms/off_by_one.hpp"
#include "mechanisms/quest.hpp"
#include "mechanisms/reformer.hpp"
#include "mechanisms/registers.hpp"
#include "mechanisms/relative_bias.hpp"
#include "mechanisms/relu.hpp"
#include "mechanisms/routing.hpp"
#include "mechanisms/shaw.hpp"
#include "mechanisms/sigmoid.hpp"
#include "mechanisms/softpick.hpp"
#include "mechanisms/sparse_transformer.hpp"
#include "mechanisms/star.hpp"
#include "mechanisms/transformer_xl.hpp"
#include "mechanisms/vertical_slash.hpp"
#include "mechanisms/xattention.hpp"
#include "mla.hpp"
#include "recurrent.hpp"
#include "sparse.hpp"
