# SPDX-License-Identifier: Apache-2.0
"""Trains, exports and checks the small language model of examples/generate.

    python3 tools/train_tiny.py --train --export --golden --work DIR

--train    reads the King James Bible through the `bible` command (Debian
           package bible-kjv), trains tokenizer and model, keeps both in DIR
--export   writes DIR's last checkpoint to examples/models/kjv-tiny
--golden   writes golden.json there, from the exported files alone

The model is a Llama: RMSNorm, rotary positions on (i, i + head_dim/2) pairs,
grouped-query attention, SwiGLU, no biases, tied embeddings.
"""
import argparse
import collections
import json
import math
import pathlib
import re
import subprocess
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 640,
    "vocab_size": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}
SEED = 1611
TOKENS_PER_STEP = 2048
SHORT_WINDOW, SHORT_UNTIL = 256, 0.75  # shorter windows for this share of the run: faster
PEAK_LR = 1.5e-3
WARMUP_STEPS = 200
DROPOUT = 0.1
GOLDEN_TOKENS = 64
GOLDEN_PROMPTS = [
    "And it came to pass",
    "Thus saith the LORD of hosts; Behold, I will bring evil upon this city, because",
    "Now Peter and John went up together into the temple at the hour of prayer, being the "
    "ninth hour.\n"
    "And a certain man lame from his mother's womb was carried, whom they laid daily at the "
    "gate of the temple which is called Beautiful, to ask alms of them that entered into "
    "the temple;\n"
    "Who seeing Peter and John about to go into the temple asked an alms.\n"
    "And Peter, fastening his eyes upon him with John, said, Look on us.\n"
    "And he gave heed unto them, expecting to receive something of them.\n"
    "Then Peter said, Silver and gold have I none; but such as I have give I thee: In the "
    "name of Jesus Christ of Nazareth rise up and walk.\n"
    "And he took him by the right hand, and lifted him up: and immediately his feet and "
    "ankle bones received strength.\n",
]
HELD_OUT_EVERY = 40  # one chapter in 40 is kept for validation
OUT = pathlib.Path(__file__).resolve().parent.parent / "examples/models/kjv-tiny"


# Text and tokenizer

def read_chapters():
    """Chapters as strings: one verse a line, no verse numbers."""
    raw = subprocess.run(["bible", "-f", "Gen1:1-Rev22:21"], check=True, capture_output=True,
                         text=True, stdin=subprocess.DEVNULL).stdout
    chapters = collections.defaultdict(list)
    for line in raw.splitlines():
        chapter, text = re.fullmatch(r"(\w+):\d+ (.*)", line).groups()
        chapters[chapter].append(" ".join(text.split()) + "\n")
    return ["".join(verses) + "\n" for verses in chapters.values()]


def pre_tokens(text):
    """ASCII letter runs, each with one space before it if there is one; any other byte alone."""
    return re.findall(rb" ?[A-Za-z]+|[^A-Za-z]", text.encode())


def train_bpe(text, vocab_size):
    """Merges in rank order: the most frequent pair first, the smaller ids on a tie."""
    words = [(list(word), n) for word, n in sorted(collections.Counter(pre_tokens(text)).items())]
    counts, where = collections.Counter(), collections.defaultdict(set)
    for index, (ids, n) in enumerate(words):
        for pair in zip(ids, ids[1:]):
            counts[pair] += n
            where[pair].add(index)
    merges = []
    while 256 + len(merges) < vocab_size:
        best = max(counts, key=lambda pair: (counts[pair], -pair[0], -pair[1]))
        for index in sorted(where[best]):
            ids, n = words[index]
            for pair in zip(ids, ids[1:]):
                counts[pair] -= n
            merge_pair(ids, best, 256 + len(merges))
            for pair in zip(ids, ids[1:]):
                counts[pair] += n
                where[pair].add(index)
        merges.append(best)
    return merges


def merge_pair(ids, pair, new_id):
    """Replaces every occurrence of pair in ids, left to right."""
    i = 0
    while i + 1 < len(ids):
        if (ids[i], ids[i + 1]) == pair:
            ids[i:i + 2] = [new_id]
        i += 1


class Tokenizer:
    def __init__(self, merges):
        self.merges = [tuple(pair) for pair in merges]
        self.rank = {pair: rank for rank, pair in enumerate(self.merges)}
        self.pieces = [bytes([b]) for b in range(256)]
        for left, right in self.merges:
            self.pieces.append(self.pieces[left] + self.pieces[right])
        self.cache = {}

    def encode(self, text):
        return [token for word in pre_tokens(text) for token in self.encode_word(word)]

    def encode_word(self, word):
        if word not in self.cache:
            ids = list(word)
            while pairs := [pair for pair in zip(ids, ids[1:]) if pair in self.rank]:
                best = min(pairs, key=self.rank.get)
                merge_pair(ids, best, 256 + self.rank[best])
            self.cache[word] = ids
        return self.cache[word]

    def decode(self, ids):
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")

    def save(self, path):
        pieces = ",\n".join(json.dumps(list(piece), separators=(",", ":")) for piece in self.pieces)
        merges = ",\n".join(json.dumps(pair, separators=(",", ":")) for pair in self.merges)
        path.write_text(f'{{"vocab_size":{len(self.pieces)},\n"pieces":[\n{pieces}\n],\n'
                        f'"merges":[\n{merges}\n]}}\n')

    @staticmethod
    def load(path):
        return Tokenizer(json.loads(path.read_text())["merges"])


# Model, for training

def rope_tables(config, length):
    half = config["head_dim"] // 2
    inverse = config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), inverse)
    return angle.cos().float(), angle.sin().float()


def rotate(x, cos, sin):
    """x: [..., positions, head_dim]; element i is paired with element i + head_dim/2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.d = c["head_dim"]
        self.group = c["num_attention_heads"] // c["num_key_value_heads"]
        q_size, kv_size = self.d * c["num_attention_heads"], self.d * c["num_key_value_heads"]
        self.q_proj = nn.Linear(c["hidden_size"], q_size, bias=False)
        self.k_proj = nn.Linear(c["hidden_size"], kv_size, bias=False)
        self.v_proj = nn.Linear(c["hidden_size"], kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, c["hidden_size"], bias=False)

    def forward(self, x, cos, sin):
        q, k, v = (p(x).unflatten(-1, (-1, self.d)).transpose(1, 2)
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(self.group, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Dropout(nn.Module):
    """One mask for the whole batch: drawing the mask is slow on a CPU."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        return x * ((torch.rand(x.shape[1:]) >= self.p) / (1 - self.p)).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, c, dropout):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.mlp = Mlp(c)
        self.dropout = Dropout(dropout)

    def forward(self, x, cos, sin):
        h = self.input_layernorm(x).to(cos.dtype)
        x = x + self.dropout(self.self_attn(h, cos, sin))
        h = self.post_attention_layernorm(x).to(cos.dtype)
        return x + self.dropout(self.mlp(h))


class Model(nn.Module):
    """Parameter names are those of Hugging Face's Llama, less the "model." in front."""

    def __init__(self, c, dropout):
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c, dropout) for _ in range(c["num_hidden_layers"]))
        self.norm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.dropout = Dropout(dropout)
        cos, sin = rope_tables(c, c["max_position_embeddings"])
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * c["num_hidden_layers"]) if residual else 0.02
                nn.init.normal_(p, std=std)

    def forward(self, tokens):
        bf16 = torch.is_autocast_enabled("cpu")
        cos, sin = (t[:tokens.shape[1]].to(torch.bfloat16 if bf16 else torch.float32)
                    for t in (self.cos, self.sin))
        x = self.dropout(self.embed_tokens(tokens))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def loss_of(model, windows):
    """Mean negative log-likelihood, in nats, of each window's tokens after its first."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model, ids, window):
    """Loss over all of ids, cut into full windows; in fp32."""
    windows = ids.unfold(0, window + 1, window)
    model.eval()
    total = sum(loss_of(model, w).item() * len(w) for w in windows.split(8))
    model.train()
    return total / len(windows)


@torch.no_grad()
def sample(model, tokenizer, prompt, count, temperature=0.7):
    generator = torch.Generator().manual_seed(SEED)
    ids = tokenizer.encode(prompt)
    model.eval()
    for _ in range(count):
        probabilities = (model(torch.tensor([ids]))[0, -1] / temperature).softmax(-1)
        ids.append(torch.multinomial(probabilities, 1, generator=generator).item())
    model.train()
    return tokenizer.decode(ids)


def prepare_data():
    """Tokenizer, training ids, validation ids, and the validation text's size in bytes."""
    chapters = read_chapters()
    held_out = range(HELD_OUT_EVERY // 2, len(chapters), HELD_OUT_EVERY)
    valid = "".join(chapters[i] for i in held_out)
    train = "".join(c for i, c in enumerate(chapters) if i not in held_out)
    tokenizer = Tokenizer(train_bpe(train, CONFIG["vocab_size"]))
    return tokenizer, *(torch.tensor(tokenizer.encode(t)) for t in (train, valid)), len(valid)


def train(work, minutes, steps):
    """Stops at `steps` or at `minutes`; the learning rate follows whichever is nearer its end."""
    tokenizer, train_ids, valid_ids, valid_bytes = prepare_data()
    work.mkdir(parents=True, exist_ok=True)
    tokenizer.save(work / "tokenizer.json")
    torch.manual_seed(SEED)
    model = Model(CONFIG, DROPOUT)
    bytes_per_token = valid_bytes / len(valid_ids)
    print(f"parameters {sum(p.numel() for p in model.parameters())}, "
          f"train tokens {len(train_ids)}, validation tokens {len(valid_ids)}, "
          f"bytes per token {bytes_per_token:.3f}", flush=True)

    decay = [p for p in model.parameters() if p.dim() == 2]
    no_decay = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1},
                                   {"params": no_decay, "weight_decay": 0.0}],
                                  betas=(0.9, 0.98), fused=True)
    start, step, running = time.monotonic(), 0, None
    while True:
        progress = max(step / steps, (time.monotonic() - start) / (60 * minutes))
        done = progress >= 1
        window = SHORT_WINDOW if progress < SHORT_UNTIL else CONFIG["max_position_embeddings"]
        if step % 500 == 0 or done:
            valid_loss = mean_loss(model, valid_ids, window)
            note = {"step": step, "tokens": step * TOKENS_PER_STEP, "train_loss": running,
                    "valid_loss": valid_loss, "valid_loss_per_byte": valid_loss / bytes_per_token,
                    "minutes": (time.monotonic() - start) / 60}
            torch.save({"model": model.state_dict(), "note": note}, work / "checkpoint.pt")
            print(json.dumps(note), flush=True)
            print(sample(model, tokenizer, "And the king said", 100), flush=True)
        if done:
            return
        warm = min(1.0, (step + 1) / WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        starts = torch.randint(len(train_ids) - window, (TOKENS_PER_STEP // window,))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, torch.stack([train_ids[i:i + window + 1] for i in starts]))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        value = loss.item()
        running = value if running is None else 0.98 * running + 0.02 * value
        if step % 50 == 0:
            print(f"step {step} loss {running:.4f}", flush=True)


def export(work):
    OUT.mkdir(parents=True, exist_ok=True)
    checkpoint = torch.load(work / "checkpoint.pt")
    weights = {"model." + name: p.to(torch.bfloat16).contiguous()
               for name, p in checkpoint["model"].items()}
    save_file(weights, OUT / "model.safetensors", metadata={"format": "pt"})
    (OUT / "model.safetensors").chmod(0o644)
    (OUT / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    Tokenizer.load(work / "tokenizer.json").save(OUT / "tokenizer.json")
    print(json.dumps(checkpoint["note"]))


# Golden data: a second, plain forward pass over the exported tensors

def reference_logits(config, w, tokens):
    """Logits at every position, [tokens, vocab], in fp32; every step written out."""
    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * w[name]

    n, d = len(tokens), config["head_dim"]
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    cos, sin = rope_tables(config, n)
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (h @ w[at + f"self_attn.{name}_proj.weight"].T for name in "qkv")
        heads = []
        for head in range(config["num_attention_heads"]):
            own = slice(head * d, (head + 1) * d)
            shared = slice(head // group * d, (head // group + 1) * d)
            scores = rotate(q[:, own], cos, sin) @ rotate(k[:, shared], cos, sin).T / math.sqrt(d)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, shared])
        x = x + torch.cat(heads, dim=-1) @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm.weight")
        gate, up = (h @ w[at + f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[at + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["model.embed_tokens.weight"].T


def golden_entry(config, weights, tokenizer, text):
    def digits(t):
        return [float(f"{x:.7g}") for x in t.tolist()]

    prompt = tokenizer.encode(text)
    logits = reference_logits(config, weights, prompt)
    entry = {"text": text, "tokens": prompt, "logits_last": digits(logits[-1]),
             "argmax": logits.argmax(-1).tolist(), "argmax_logits": digits(logits.amax(-1))}
    tokens, min_gap = list(prompt), math.inf
    for _ in range(GOLDEN_TOKENS):
        best = reference_logits(config, weights, tokens)[-1].topk(2)
        min_gap = min(min_gap, (best.values[0] - best.values[1]).item())
        tokens.append(best.indices[0].item())
    entry["greedy_tokens"] = tokens[len(prompt):]
    entry["greedy_text"] = tokenizer.decode(entry["greedy_tokens"])
    entry["greedy_min_gap"] = round(min_gap, 4)
    return entry


@torch.no_grad()
def golden():
    config = json.loads((OUT / "config.json").read_text())
    weights = {name: p.float() for name, p in load_file(OUT / "model.safetensors").items()}
    tokenizer = Tokenizer.load(OUT / "tokenizer.json")
    entries = [golden_entry(config, weights, tokenizer, text) for text in GOLDEN_PROMPTS]
    assert all(entry["greedy_min_gap"] > 1e-3 for entry in entries)
    lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in entries)
    (OUT / "golden.json").write_text('{"prompts":[\n' + lines + "\n]}\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--golden", action="store_true")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("kjv-tiny-work"))
    parser.add_argument("--steps", type=int, default=6600)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.train:
        train(args.work, args.minutes, args.steps)
    if args.export:
        export(args.work)
    if args.golden:
        golden()


if __name__ == "__main__":
    main()
