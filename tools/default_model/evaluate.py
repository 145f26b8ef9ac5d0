"""Measures the default model: exact match on held-out items, with greedy decoding.

    python tools/default_model/evaluate.py --require 0.95
    python tools/default_model/evaluate.py --backend transformers --json accuracy.json
    python tools/default_model/evaluate.py --quantization none int8 int4

Several quantizations are measured on the same items, in the order given. Exits with 1 if a total
accuracy is below `--require`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer
from world import Conversation, held_out_items
from world_render import END_OF_TEXT, IM_END, MODEL_DIR, render_prompt
from world_split import Split

# Room beyond the expected answer: an answer that runs on is wrong anyway.
SLACK = 8


@dataclass
class Example:
    """One held-out item in tokens."""

    item: Conversation
    prompt: list[int]
    max_tokens: int
    output: str = ""

    @property
    def correct(self) -> bool:
        """Exact match without surrounding white space."""
        return self.output.strip() == self.item.expected().strip()


Generate = Callable[[list[Example]], list[list[int]]]


def end_tokens(tokenizer: Tokenizer) -> list[int]:
    """The ids that end an answer; the last one also pads."""
    return [tokenizer.encode(mark).ids[0] for mark in (IM_END, END_OF_TEXT)]


def make_examples(tokenizer: Tokenizer, count: int, seed: int, split: Split) -> list[Example]:
    """The held-out items, tokenized."""
    examples = []
    for item in held_out_items(count, seed, split):
        prompt = tokenizer.encode(render_prompt(item)).ids
        examples.append(Example(item, prompt, len(tokenizer.encode(item.expected()).ids) + SLACK))
    return examples


def transformers_backend(model_path: str, dtype: str, ends: list[int]) -> Generate:
    """Left-padded batches through transformers' `generate`."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_path, dtype=getattr(torch, dtype)
    ).eval()

    def generate(batch: list[Example]) -> list[list[int]]:
        longest = max(len(example.prompt) for example in batch)
        ids = torch.full((len(batch), longest), ends[-1])
        mask = torch.zeros_like(ids)
        for row, example in enumerate(batch):
            ids[row, longest - len(example.prompt) :] = torch.tensor(example.prompt)
            mask[row, longest - len(example.prompt) :] = 1
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                temperature=None,
                top_k=None,
                top_p=None,
                max_new_tokens=max(example.max_tokens for example in batch),
                eos_token_id=ends,
                pad_token_id=ends[-1],
            )
        return [row[longest:].tolist() for row in output]

    return generate


def trimaran_backend(
    model_path: str, dtype: str, ends: list[int], quantization: str | None
) -> Generate:
    """All examples at once through Trimaran's own engine."""
    trimaran = importlib.import_module("trimaran")
    engine: Any = trimaran.LLM(model=model_path, dtype=dtype, quantization=quantization)

    def generate(batch: list[Example]) -> list[list[int]]:
        prompts = [{"prompt_token_ids": example.prompt} for example in batch]
        params = [
            trimaran.SamplingParams(
                temperature=0.0, max_tokens=example.max_tokens, stop_token_ids=ends
            )
            for example in batch
        ]
        return [list(result.outputs[0].token_ids) for result in engine.generate(prompts, params)]

    return generate


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    positions = [ids.index(end) for end in ends if end in ids]
    return ids[: min(positions)] if positions else ids


def run(examples: list[Example], generate: Generate, tokenizer: Tokenizer, batch_size: int) -> None:
    """Fills in the outputs, batch by batch, the short examples first."""
    ends = end_tokens(tokenizer)
    ordered = sorted(examples, key=lambda e: (len(e.prompt) // 64, e.max_tokens))
    starts = range(0, len(ordered), batch_size)
    for start in track(starts, "evaluating", console=Console(stderr=True)):
        batch = ordered[start : start + batch_size]
        for example, ids in zip(batch, generate(batch), strict=True):
            # Non-special tool tags stay in the text; the end marks are cut off.
            example.output = tokenizer.decode(_until_end(ids, ends), skip_special_tokens=False)


def report(examples: list[Example]) -> dict[str, Any]:
    """Accuracy by category and in total."""
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.item.category].append(example)
    right = {name: sum(e.correct for e in group) for name, group in groups.items()}
    return {
        "categories": {
            name: {
                "items": len(group),
                "correct": right[name],
                "accuracy": right[name] / len(group),
            }
            for name, group in sorted(groups.items())
        },
        "items": len(examples),
        "correct": sum(right.values()),
        "accuracy": sum(right.values()) / len(examples),
    }


def print_report(result: dict[str, Any], errors: list[Example], shown: int) -> None:
    """The table, and some errors to read."""
    console = Console()
    table = Table("category", "items", "correct", "accuracy", title=result["quantization"])
    for name, row in result["categories"].items():
        table.add_row(name, str(row["items"]), str(row["correct"]), f"{row['accuracy']:.2%}")
    table.add_section()
    table.add_row(
        "total", str(result["items"]), str(result["correct"]), f"{result['accuracy']:.2%}"
    )
    console.print(table)
    if "lost" in result:
        console.print(f"against the first: {result['lost']} lost, {result['gained']} gained")
    for example in sorted(errors, key=lambda e: e.item.category)[:shown]:
        question = example.item.messages[-2]["content"] if example.item.messages else ""
        console.print(
            f"[{example.item.category}] {question or example.item.prompt!r}\n"
            f"    expected {example.item.expected()!r}\n    got      {example.output!r}",
            markup=False,
            soft_wrap=True,
        )


def measure(
    options: argparse.Namespace, tokenizer: Tokenizer, quantization: str, first: list[Example]
) -> tuple[dict[str, Any], list[Example]]:
    """The result with one quantization, and its examples. `first`: the same items as another one
    had them, to count what changed; empty: none."""
    started = time.perf_counter()
    examples = make_examples(tokenizer, options.items, options.seed, options.split)
    ends = end_tokens(tokenizer)
    if options.backend == "transformers":
        generate = transformers_backend(options.model, options.dtype, ends)
    else:
        kept_as = None if quantization == "none" else quantization
        generate = trimaran_backend(options.model, options.dtype, ends, kept_as)
    default_size = 64 if options.backend == "transformers" else len(examples)
    run(examples, generate, tokenizer, options.batch_size or default_size)
    result: dict[str, Any] = {"quantization": quantization} | report(examples)
    if first:
        pairs = list(zip(first, examples, strict=True))
        result["lost"] = sum(was.correct and not now.correct for was, now in pairs)
        result["gained"] = sum(now.correct and not was.correct for was, now in pairs)
    result["seconds"] = round(time.perf_counter() - started, 2)
    return result, examples


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(MODEL_DIR))
    parser.add_argument("--backend", choices=("trimaran", "transformers"), default="trimaran")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--quantization",
        nargs="+",
        choices=("none", "int8", "int4", "w4a16"),
        default=["none"],
        help="of the weights at load (trimaran); several: one after the other",
    )
    parser.add_argument("--items", type=int, default=4_200)
    parser.add_argument(
        "--split", choices=("dev", "eval"), default="eval", help="dev: to choose a recipe by"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=0, help="0: 64, or all for trimaran")
    parser.add_argument("--require", type=float, default=0.0, help="least total accuracy")
    parser.add_argument("--json", default="", help="file for the results")
    parser.add_argument("--errors", type=int, default=0, help="errors to print")
    options = parser.parse_args()
    if options.backend == "transformers" and options.quantization != ["none"]:
        parser.error(
            "--quantization is for --backend trimaran: transformers runs the model as it is"
        )
    return options


def main() -> None:
    """Evaluates and prints."""
    options = parse_options()
    tokenizer = Tokenizer.from_file(str(Path(options.model) / "tokenizer.json"))
    results: list[dict[str, Any]] = []
    first: list[Example] = []
    for quantization in options.quantization:
        result, examples = measure(options, tokenizer, quantization, first)
        first = first or examples
        results.append(result)
        print_report(result, [e for e in examples if not e.correct], options.errors)
    if options.json:
        about = {
            "command": " ".join(["tools/default_model/evaluate.py", *sys.argv[1:]]),
            "date": datetime.date.today().isoformat(),
            "backend": options.backend,
            "dtype": options.dtype,
            "seed": options.seed,
            "split": options.split,
        }
        Path(options.json).write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    if min(result["accuracy"] for result in results) < options.require:
        sys.exit(1)


if __name__ == "__main__":
    main()
