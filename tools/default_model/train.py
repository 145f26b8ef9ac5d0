"""Trains the default model from scratch on the generated world, on two CPU cores in about an hour.

    python tools/default_model/build_tokenizer.py
    python tools/default_model/train.py

The run is seeded, resumes from its last checkpoint (`--resume`) and writes the bf16 weights into
`default_model/` at the end. Schedule: warm-up, stable, linear decay (WSD). Matrices inside the
blocks are trained by Muon, embeddings and norms by AdamW.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from build_tokenizer import MAX_LENGTH, VOCAB_SIZE
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from world import Generator
from world_render import END_OF_TEXT, IM_END, MODEL_DIR, render_segments

POOL = 1_000  # conversations that are sorted by length together
PROMPT_WEIGHT = 0.05  # of the loss on tokens that the model does not have to write
ROPE_THETA = 10_000.0
LENGTH_STEP = 8  # lengths are padded to multiples of it


@dataclass
class Batch:
    """Right-padded conversations of similar length; causal attention needs no mask for them."""

    ids: torch.Tensor  # [rows, length], int64
    weights: torch.Tensor  # [rows, length], float32: loss weight of predicting this token


def model_config(tokenizer: Tokenizer) -> Qwen3Config:
    """A small Qwen3; every width is a multiple of 128."""
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        head_dim=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=640,
        num_hidden_layers=5,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.token_to_id(IM_END),
        pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
        bos_token_id=None,
    )


def _encode(tokenizer: Tokenizer, generator: Generator) -> tuple[list[int], list[float]]:
    """Token ids of one conversation and the loss weight of each."""
    ids: list[int] = []
    weights: list[float] = []
    for text, learned in render_segments(generator.conversation()):
        piece = tokenizer.encode(text).ids
        ids.extend(piece)
        weights.extend([1.0 if learned else PROMPT_WEIGHT] * len(piece))
    return ids[:MAX_LENGTH], weights[:MAX_LENGTH]


def _pad(rows: list[tuple[list[int], list[float]]], pad: int) -> Batch:
    longest = max(len(ids) for ids, _ in rows)
    length = -(-longest // LENGTH_STEP) * LENGTH_STEP
    ids = torch.full((len(rows), length), pad)
    weights = torch.zeros(len(rows), length)
    for row, (tokens, values) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        weights[row, : len(tokens)] = torch.tensor(values)
    return Batch(ids, weights)


def pool_batches(tokenizer: Tokenizer, seed: int, pool: int, budget: int) -> list[Batch]:
    """All batches of one pool of conversations, each of about `budget` padded tokens."""
    generator = Generator("train", seed * 1_000_003 + pool)
    rows = sorted((_encode(tokenizer, generator) for _ in range(POOL)), key=lambda r: len(r[0]))
    pad = tokenizer.encode(END_OF_TEXT).ids[0]
    batches: list[Batch] = []
    start = 0
    while start < len(rows):
        end = start + 1
        while end < len(rows):
            length = -(-len(rows[end][0]) // LENGTH_STEP) * LENGTH_STEP
            if length * (end - start + 1) > budget:
                break
            end += 1
        batches.append(_pad(rows[start:end], pad))
        start = end
    random.Random(f"{seed}-{pool}").shuffle(batches)
    return batches


def learning_rate(step: int, steps: int, warmup: int = 60, decay: float = 0.45) -> float:
    """Factor of the learning rate: warm-up, stable, linear decay to zero."""
    decay_start = steps * (1 - decay)
    if step < warmup:
        return (step + 1) / warmup
    if step < decay_start:
        return 1.0
    return max(0.0, (steps - step) / (steps - decay_start))


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are orthogonalised by Newton-Schulz steps (Jordan et al., 2024).

    As `torch.optim.Muon`, but in fp32 and with all matrices of one shape as one batch: on a CPU
    that is several times faster.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every matrix."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for param in group["params"]:
                shapes.setdefault(param.shape, []).append(param)
            for shape, params in shapes.items():
                updates = orthogonal(torch.stack([self._nesterov(p, group) for p in params]))
                rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for param, update in zip(params, updates, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.sub_(update, alpha=rate)

    def _nesterov(self, param: torch.nn.Parameter, group: dict[str, Any]) -> torch.Tensor:
        state = self.state[param]
        if not state:
            state["momentum"] = torch.zeros_like(param)
        momentum = state["momentum"].lerp_(param.grad, 1 - group["momentum"])
        return param.grad.lerp(momentum, group["momentum"])


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """The nearly orthogonal factors of matrices [count, rows, columns]."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT.contiguous()).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x


class Forward:
    """Qwen3's forward pass without what training does not need.

    Gives the same hidden states as the model itself.
    """

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        self.model = model.model
        config = model.config
        self.eps = config.rms_norm_eps
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        powers = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        angles = torch.outer(torch.arange(MAX_LENGTH).float(), ROPE_THETA**-powers)
        self.cos, self.sin = angles.cos()[:, None], angles.sin()[:, None]

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight, self.eps)

    def _heads(self, x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        """[rows, length, heads * dim] to [rows, heads, length, dim], normed and rotated."""
        x = x.view(*x.shape[:2], -1, self.head_dim)
        if norm is not None:
            first, second = self._norm(x, norm).chunk(2, -1)
            cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
            x = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        return x.transpose(1, 2)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """The last hidden states [rows, length, hidden]."""
        x = functional.embedding(ids, self.model.embed_tokens.weight)
        for layer in self.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            normed = self._norm(x, layer.input_layernorm.weight)
            q = self._heads(attention.q_proj(normed), attention.q_norm.weight)
            k = self._heads(attention.k_proj(normed), attention.k_norm.weight)
            v = self._heads(attention.v_proj(normed), None)
            k, v = (t.repeat_interleave(self.groups, 1) for t in (k, v))
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            normed = self._norm(x, layer.post_attention_layernorm.weight)
            gate = functional.silu(mlp.gate_proj(normed))
            x = x + mlp.down_proj(gate * mlp.up_proj(normed))
        return self._norm(x, self.model.norm.weight)


class Trainer:
    """The model, its two optimizers and the place in the stream of data."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        torch.set_num_threads(options.threads)
        torch.set_flush_denormal(True)
        self.options = options
        self.tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
        self.model = Qwen3ForCausalLM(model_config(self.tokenizer))
        self.forward = Forward(self.model)
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in self.model.named_parameters() if p.ndim != 2 or "embed" in n]
        self.optimizers = [
            Muon(matrices, lr=options.muon_lr, weight_decay=0.02),
            torch.optim.AdamW(others, lr=options.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.base_rates = [options.muon_lr, options.adam_lr]
        self.step = self.pool = self.tokens = 0
        self.checkpoint = Path(options.checkpoint)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """The sum of the weighted losses of a batch, and the mean over what has to be written."""
        targets, weights = batch.ids[:, 1:], batch.weights[:, 1:]
        # Logits are needed only where the loss looks: at all that has to be written, and at a
        # random tenth of the rest, which weighs ten times as much in turn.
        learned = weights == 1.0
        sampled = (weights == PROMPT_WEIGHT) & (torch.rand_like(weights) < 0.1)
        chosen = learned | sampled
        scale = torch.where(learned, 1.0, 10 * PROMPT_WEIGHT)[chosen]
        hidden = self.forward(batch.ids)
        logits = self.model.lm_head(hidden[:, :-1][chosen])
        losses = functional.cross_entropy(logits, targets[chosen], reduction="none")
        mean = float(losses.detach()[learned[chosen]].mean())
        return (losses * scale).sum(), mean

    def train_step(self, batches: list[Batch]) -> float:
        """One update; returns the mean loss of the tokens that the model has to write."""
        torch.manual_seed(self.options.seed * 1_000_003 + self.step)  # resumed runs are the same
        total = sum(float(batch.weights[:, 1:].sum()) for batch in batches)
        means = []
        for batch in batches:
            loss, mean = self.loss(batch)
            (loss / total).backward()
            means.append(mean)
            self.tokens += int((batch.weights > 0).sum())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        factor = learning_rate(self.step, self.options.steps)
        for optimizer, rate in zip(self.optimizers, self.base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return sum(means) / len(means)

    def pools(self) -> Iterator[list[Batch]]:
        """Pools of batches from the current place on."""
        while True:
            yield pool_batches(
                self.tokenizer, self.options.seed, self.pool, self.options.micro_tokens
            )
            self.pool += 1

    def save_checkpoint(self) -> None:
        """Everything that a resumed run needs; called between two pools."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "place": (self.step, self.pool, self.tokens),
        }
        temporary = self.checkpoint.with_suffix(".new")
        torch.save(state, temporary)
        temporary.rename(self.checkpoint)

    def resume(self) -> None:
        """Continues from the last checkpoint."""
        state = torch.load(self.checkpoint)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.pool, self.tokens = state["place"]

    def run(self) -> None:
        """Trains up to the last step and saves the model."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps  loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as progress:
            task = progress.add_task(
                "training", total=self.options.steps, completed=self.step, loss=0.0, speed=0.0
            )
            first_tokens, average = self.tokens, 0.0
            for pool in self.pools():
                for start in range(0, len(pool), self.options.accumulate):
                    loss = self.train_step(pool[start : start + self.options.accumulate])
                    average = loss if average == 0.0 else 0.95 * average + 0.05 * loss
                    elapsed = progress.tasks[task].elapsed or 1e9
                    speed = (self.tokens - first_tokens) / elapsed
                    progress.update(task, completed=self.step, loss=average, speed=speed)
                    if self.step % self.options.log_every == 0:
                        print(
                            f"step {self.step} loss {average:.4f} tokens {self.tokens} "
                            f"speed {speed:.0f}",
                            flush=True,
                        )
                    if self.step >= self.options.steps:
                        return
                if self.pool % self.options.save_every == self.options.save_every - 1:
                    self.pool += 1
                    self.save_checkpoint()
                    self.pool -= 1


def save_model(model: Qwen3ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes config.json, generation_config.json and the bf16 weights."""
    ends = [tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)]
    model = model.to(torch.bfloat16)
    model.config.architectures = ["Qwen3ForCausalLM"]
    model.generation_config = GenerationConfig(
        eos_token_id=ends,
        pad_token_id=ends[1],
        do_sample=True,
        temperature=0.3,
        top_k=20,
        top_p=0.95,
    )
    model.save_pretrained(folder, safe_serialization=True)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Trains and saves."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3700)
    parser.add_argument("--micro-tokens", type=int, default=2048, help="padded tokens in a batch")
    parser.add_argument("--accumulate", type=int, default=2, help="batches in one update")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", default="build/default_model/checkpoint.pt")
    parser.add_argument("--save-every", type=int, default=2, help="pools between checkpoints")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--output", default=str(MODEL_DIR))
    options = parser.parse_args()
    trainer = Trainer(options)
    print(f"{sum(p.numel() for p in trainer.model.parameters()):,} parameters")
    if options.resume and trainer.checkpoint.exists():
        trainer.resume()
    trainer.run()
    print(f"{trainer.tokens:,} tokens in {trainer.step} steps")
    save_model(trainer.model, trainer.tokenizer, Path(options.output))


if __name__ == "__main__":
    main()
